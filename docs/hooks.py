"""What the site needs beyond mkdocs and mkdocstrings: links into the repository, and the texts of `genft --help`."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[([^][]+)\]\((\.\.[^)#\s]*)\)")
_HELP = re.compile(r"^<!-- help: genft ?(.*) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    here = Path(page.file.abs_src_path).parent

    def unlinked(link: re.Match[str]) -> str:
        """The text alone where the target is a file of the repository that is no page. A target that does not exist
        stays, and mkdocs complains of it."""
        target = (here / link[2]).resolve()
        outside = target.exists() and (ROOT / "docs") not in (target, *target.parents)
        return link[1] if outside else link[0]

    return _HELP.sub(lambda found: f"```text\n{_help(found[1].split())}\n```", _LINK.sub(unlinked, markdown))


def _help(command: list[str]) -> str:
    from genft_cli import main as cli

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    with redirect_stdout(StringIO()) as text, suppress(SystemExit):
        cli.main([*command, "--help"])
    return text.getvalue().rstrip()
