"""The house rules that a reader relies on: who imports whom, and that importing costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package may import those to its right.
ORDER = ["tests", "benchmarks", "genft_cli", "genft_modules", "genft_kernels"]


def imports_of(path: Path, modules: Iterable[str] = ()) -> set[str]:
    """What a file imports; `from package import name` is package.name where that is one of `modules`."""
    found = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, node.module or "")).strip(".")
            found |= {name if (name := f"{source}.{alias.name}") in modules else source for alias in node.names}
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package):
    forbidden = ORDER[: ORDER.index(package)]
    for path in (ROOT / package).rglob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


def test_modules_use_public_names_of_the_kernels():
    for path in [*(ROOT / "genft_modules").rglob("*.py"), *(ROOT / "genft_cli").rglob("*.py")]:
        for name in imports_of(path):
            assert not name.startswith("genft_kernels._"), f"{path.name} imports {name}"


def graph_of(package: str) -> dict[str, set[str]]:
    """The modules of a package, and which of each other they import."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    return {name: imports_of(path, modules) & modules.keys() - {name} for name, path in modules.items()}


@pytest.mark.parametrize("package", ORDER[1:])
def test_no_circle_of_imports(package):
    TopologicalSorter(graph_of(package)).prepare()  # raises CycleError, which names the circle


# The wings of a package, each of which may import those before it. FILES are those that lie beside the wings: what all
# of genft_modules stands on, and the commands of benchmarks.
FILES = ""
WINGS = {
    "genft_modules": [FILES, "methods", "layer", "model", "disk", "training"],
    "benchmarks": ["measure", "report", "subjects", "suites", FILES],
}


@pytest.mark.parametrize("package", WINGS)
def test_wings_import_downwards(package):
    def floor(module: str) -> int:
        first = module.split(".")[1]
        return WINGS[package].index(first if (ROOT / package / first).is_dir() else FILES)

    graph = graph_of(package)
    graph.pop(package)  # the door: what it imports, anybody may import
    for module, imported in graph.items():
        for name in imported - {package}:
            assert floor(name) <= floor(module), f"{module} imports {name}"


@pytest.mark.parametrize("family", ["lowrank", "rescaled", "edit", "features", "generated", "grouped", "sliced"])
def test_a_family_has_its_files(family):
    """The door, the reference and the algorithms; and the last two have the same functions."""
    door, reference, triton = (
        ast.parse((ROOT / "genft_kernels" / part / f"{family}.py").read_text()) for part in ("", "reference", "_triton")
    )
    functions = [
        {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("ward")}
        for tree in (reference, triton)
    ]
    assert functions[0] == functions[1] != set()
    declared = {
        node.args[0] for node in ast.walk(door) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Operation"
    }
    assert len(declared) == sum(name.endswith("_forward") for name in functions[0])


def test_the_reference_never_imports_triton():
    for path in (ROOT / "genft_kernels").glob("*.py"):
        assert not any(name.split(".")[0] == "triton" for name in imports_of(path)), path.name


def test_nothing_is_unpickled_but_released_checkpoints_and_those_with_weights_only():
    for package in ("genft_kernels", "genft_modules", "genft_cli"):
        for path in (ROOT / package).rglob("*.py"):
            assert not imports_of(path) & {"pickle", "joblib", "dill", "cloudpickle"}, path.name
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                    assert path.name == "released.py"
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


def test_no_text_is_run_and_no_name_from_a_file_is_imported():
    """What SECURITY.md promises of adapters. Of YAML, only plain values are read."""
    for package in ("genft_kernels", "genft_modules", "genft_cli"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "compile", "__import__"}, path.name
                assert name not in {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}, path.name
                if name.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
                    # A family's reference and its algorithms; the functions that a user names by --reward_funcs.
                    assert path.name in ("operation.py", "finetune.py"), path.name


def test_importing_starts_no_gpu_and_no_triton():
    """genft_kernels imports no triton at all; genft_modules none but what peft and transformers may bring."""
    code = """
import sys, torch, genft_kernels
assert "triton" not in sys.modules
import genft_modules
assert not torch.cuda.is_initialized()
assert not any(name.startswith("genft_kernels._triton") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
