"""The scripts and notebooks in examples/ run, each in a directory of its own."""

from __future__ import annotations

import json
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "tiny.py")
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_runs(notebook, tmp_path, monkeypatch, capfd):
    """As Jupyter does: the code cells, one after the other, in one namespace. A traceback names the cell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    namespace = {"__name__": "__main__"}
    for i, cell in enumerate(cells(notebook)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), namespace)
    out, err = capfd.readouterr()
    assert out
    assert "HTTP" not in err


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_has_no_outputs(notebook):
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    for cell in whole["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_the_notebook_shows_what_the_list_promises_and_asks_before_it_takes_a_gpu():
    sources = ["".join(cell["source"]) for cell in cells(EXAMPLES / "genft.ipynb") if cell["cell_type"] == "code"]
    text = "\n".join(sources)
    for name in ("get_peft_model", "save_adapter", "load_adapter", "merge_and_unload", "export_lora", "LoraConfig"):
        assert f"{name}(" in text
    asked = next(i for i, source in enumerate(sources) if "torch.cuda.is_available()" in source)
    assert not any("cuda" in source for source in sources[:asked])
    assert all("if gpu:" in source and "skipped" in source for source in sources[asked:])


def test_the_list_has_every_script():
    listed = re.findall(r"^\| \[[^]]*\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (*SCRIPTS, *NOTEBOOKS))
