"""What is run: comparisons behind the gate, the parts of a run, the sweep, and the files that pytest runs."""
