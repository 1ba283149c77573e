"""What the site needs beyond its theme: formulas, links into the repository, and the texts of `genft --help`."""

from __future__ import annotations

import html
import json
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
_SET = re.compile(r"\\[(\[](.*?)\\[)\]]", re.DOTALL)
_NAMES = "sigma σ psi ψ rho ρ alpha α delta δ varphi φ lambda λ eta η varepsilon ε Delta Δ Phi Φ partial ∂ sum Σ cdot ·"
_NAMES += " circ ∘ times × le ≤ ge ≥ Rightarrow ⇒ dots …"
_SIGNS = dict(zip(_NAMES.split()[::2], _NAMES.split()[1::2], strict=True))
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


def on_post_build(config: Any, **kwargs: Any) -> None:
    """The search shows formulas as plain text."""
    index = Path(config.site_dir) / "search" / "search_index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    for entry in entries["docs"]:
        entry["text"] = _SET.sub(lambda found: _plain(html.unescape(found[1])), entry["text"])
    index.write_text(json.dumps(entries, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _plain(formula: str) -> str:
    for command, sign in _SIGNS.items():
        formula = re.sub(rf"\\{command}(?![A-Za-z])", sign, formula)
    formula = re.sub(r"\\begin\{\w+\}|\\end\{\w+\}|\\[A-Za-z]+|\\.|&", " ", formula)
    formula = re.sub(r"[{}]", "", formula.replace("^T", "ᵀ").replace("Δ ", "Δ"))
    return html.escape(re.sub(r"\s+", " ", formula).strip())


def _help(command: list[str]) -> str:
    from genft_cli import main as cli

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    with redirect_stdout(StringIO()) as text, suppress(SystemExit):
        cli.main([*command, "--help"])
    return text.getvalue().rstrip()
