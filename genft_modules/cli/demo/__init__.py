"""The embedded demo: a small model made here, adapted with several methods side by side."""
