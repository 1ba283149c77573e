"""What the site needs beyond its theme: formulas, links into the repository, and the texts of `genft --help`."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout, suppress
from importlib.metadata import files
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
MATHJAX = "tex-svg.js"  # one file, fonts included
_LINK = re.compile(r"\[([^][]+)\]\((\.\.[^)#\s]*)\)")
_HELP = re.compile(r"^<!-- help: genft ?(.*) -->$", re.MULTILINE)
_DISPLAYED = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONTENTS = re.compile(r"^- \[[^]]+\]\(#[^)]+\).*\n(?:(?:- |  ).*\n)+", re.MULTILINE)
_SCRIPTS = f"""<script src="{{root}}assets/formulas.js"></script>
<script src="{{root}}assets/mathjax/{MATHJAX}" defer></script>
"""


def on_files(listed: Any, config: Any) -> Any:
    (found,) = (path for path in files("sphinx-mathjax-offline") or () if path.name == MATHJAX)
    to = f"assets/mathjax/{MATHJAX}"
    listed.append(File.generated(config, to, abs_src_path=str(found.locate())))
    return listed


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    here = Path(page.file.abs_src_path).parent

    def unlinked(link: re.Match[str]) -> str:
        """The text alone where the target is a file of the repository that is no page. A target that does not exist
        stays, and mkdocs complains of it."""
        target = (here / link[2]).resolve()
        outside = target.exists() and (ROOT / "docs") not in (target, *target.parents)
        return link[1] if outside else link[0]

    markdown = _CONTENTS.sub("", markdown, count=1)  # the site shows the headings beside the page
    markdown = _DISPLAYED.sub(r"$$\n\1$$", _LINK.sub(unlinked, markdown))
    return _HELP.sub(lambda found: f"```text\n{_help(found[1].split())}\n```", markdown)


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """MathJax, on the pages that have formulas."""
    if 'class="arithmatex"' not in output:
        return output
    root = "../" * page.url.count("/")
    return output.replace("</body>", _SCRIPTS.format(root=root) + "</body>")


def _help(command: list[str]) -> str:
    from genft_cli import main as cli

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    with redirect_stdout(StringIO()) as text, suppress(SystemExit):
        cli.main([*command, "--help"])
    return text.getvalue().rstrip()
