"""The workflows say what they mean: they can be parsed, what they call is there, their versions fit pyproject.toml."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
PYPROJECT = (ROOT / "pyproject.toml").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PINNED = re.compile(r"^[\w.-]+/[\w./-]+@(release/)?v\d+$")  # a major version


def loaded(name: str) -> dict[str, Any]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    return {"on" if key is True else key: value for key, value in workflow.items()}  # YAML 1.1 reads `on` as a boolean


def jobs(name: str) -> dict[str, dict[str, Any]]:
    return loaded(name)["jobs"]


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in jobs(name).values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_whole(path):
    workflow = loaded(path.name)
    assert workflow.keys() <= {"name", "on", "permissions", "concurrency", "env", "jobs"}
    assert workflow["name"] == path.stem
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert set([job["needs"]] if "needs" in job else []) <= workflow["jobs"].keys() - {name}
        if "uses" in job:
            assert "workflow_call" in loaded(Path(job["uses"]).name)["on"]
            continue
        assert job["runs-on"] == "ubuntu-latest"
        assert 0 < job["timeout-minutes"] <= 120
        assert job["steps"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_have_a_major_version(path):
    for step in steps(path.name):
        assert PINNED.match(step.get("uses", "a/b@v1")), step["uses"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_are_there(path):
    """Each line is a target of the Makefile, a file that can be run, a test of a file, or pip of the environment that
    an earlier step of the job has made."""
    for job in jobs(path.name).values():
        made = False
        for line in (line for step in job.get("steps", []) for line in step.get("run", "").splitlines()):
            command, *arguments = shlex.split(line)
            if command == "make":
                assert arguments
                assert set(arguments) <= TARGETS, line
            elif command == ".venv/bin/python":
                assert made, line
                assert arguments[:2] == ["-m", "pip"], line
            elif command != "test":
                assert (ROOT / command).stat().st_mode & 0o111, line
            made = made or command in ("make", ".ci/run")


def test_a_pull_request_runs_the_pythons_and_torches_that_are_promised():
    workflow = loaded("ci.yml")
    assert {"push", "pull_request", "workflow_call"} == workflow["on"].keys()
    (job,) = workflow["jobs"].values()
    assert next(step["run"] for step in job["steps"] if "run" in step) == ".ci/run"
    matrix = job["strategy"]["matrix"]
    lowest = re.search(r'^requires-python = ">=([\d.]+)"', PYPROJECT, re.MULTILINE)[1]
    assert matrix["python"][0] == lowest
    assert f'"Programming Language :: Python :: {matrix["python"][-1]}"' in PYPROJECT
    assert [entry["torch"] for entry in matrix["include"]] == matrix["torch"]
    oldest, newest = (entry["pins"] for entry in matrix["include"])
    assert newest == ""  # whatever pyproject.toml allows
    pins = {pin.name: pin for pin in map(Requirement, oldest.split())}
    for name in ("torch", "triton"):
        bounds = SpecifierSet(re.search(rf'^  "{name}([<>=.,\d]+)', PYPROJECT, re.MULTILINE)[1])
        first = min(s.version for s in bounds if s.operator == ">=")
        assert str(pins[name].specifier) == f"=={first}.*"
        assert bounds.contains(f"{first}.0")
    assert job["env"]["PINS"] == "${{ matrix.pins }}"


def test_the_nightly_run_tries_what_is_coming():
    (upstream, optional, audit) = jobs("nightly.yml").values()
    assert upstream["strategy"]["matrix"]["package"] == ["peft", "transformers"]
    lines = [step["run"] for step in upstream["steps"] if "run" in step]
    assert [line for line in lines if line.startswith("make")] == ["make venv", "make test"]
    assert "make test-all" in [step.get("run") for step in optional["steps"]]
    assert [step["run"] for step in audit["steps"] if "run" in step] == ["make venv", "make audit"]
    assert "continue-on-error" not in (ROOT / ".github" / "workflows" / "nightly.yml").read_text()


def test_a_release_is_built_checked_and_published_without_a_password():
    workflow = loaded("release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    test, build, publish = workflow["jobs"].values()
    assert test["uses"] == "./.github/workflows/ci.yml"
    assert (build["needs"], publish["needs"]) == ("test", "build")
    assert "make dist" in [step.get("run") for step in build["steps"]]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "with" not in publish["steps"][-1]
    recipe = make("dist")
    assert re.search(r"-m build$", recipe, re.MULTILINE)
    assert "twine check --strict dist/*" in recipe


def make(*arguments: str, **environment: str) -> str:
    """What make would run."""
    return subprocess.run(
        ["make", "-n", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_make_installs_what_the_environment_pins(tmp_path):
    venv = f"VENV={tmp_path}"
    pins = "torch==2.11.* triton==3.6.* numpy<2.4"
    assert re.search(r'pip install [^"\']*-e "\.\[dev\]"$', make("venv", venv), re.MULTILINE)
    quoted = "'torch==2.11.*' 'triton==3.6.*' 'numpy<2.4'"
    assert f'{quoted} -e ".[dev]"' in make("lint", venv, PINS=pins)
    # What was installed is installed again when the pins change, and only then.
    (tmp_path / ".installed").write_text(f"{pins}\n")
    assert "pip install" not in make("test", venv, PINS=pins)
    assert "pip install" in make("test", venv)
    (tmp_path / ".installed").write_text("")  # as `touch` leaves it
    assert "pip install" not in make("test", venv)
    assert "pip install" in make("test", venv, PINS=pins)


def test_make_test_all_runs_what_is_skipped_otherwise(tmp_path):
    recipe = make("test-all", f"VENV={tmp_path}")
    assert '-e ".[dev,optional]"' in recipe
    extra = re.search(r"^optional = \[(.*)\]$", PYPROJECT, re.MULTILINE)[1]
    packages = {"bitsandbytes", "torchao", "hqq", "deepspeed", "timm", "diffusers"}
    assert set(re.findall(r'"(\w+)"', extra)) == packages
    files = set(re.findall(r"tests/\S+\.py", recipe)) - {"tests/kernels/test_cross_compile.py"}
    assert "GENFT_ALL_RANKS=1" in recipe  # of that file
    asked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found = re.findall(r'importorskip\((?:"(\w+)")?', path.read_text())
        assert bool(found) == (str(path.relative_to(ROOT)) in files), path
        asked |= set(found) - {""}  # a name that is not written there, but in a guide
    assert asked <= packages


def test_make_audit_looks_at_what_is_installed(tmp_path):
    recipe = make("audit", f"VENV={tmp_path}")
    assert f"{tmp_path}/bin/python -m pip_audit --skip-editable" in recipe
    assert "pip-audit" not in PYPROJECT  # it is no part of what it looks at


def test_no_pickle_is_checked_for_every_pull_request():
    """By a test that docs/trust.md names."""
    named = "test_nothing_is_unpickled_but_released_checkpoints_and_those_with_weights_only"
    assert f"def {named}(" in (ROOT / "tests" / "test_structure.py").read_text()
    assert named in (ROOT / "docs" / "trust.md").read_text()
    assert "tests/test_structure.py" not in make("test")  # all tests, not some


def test_the_check_of_a_pull_request_is_a_program_for_bash():
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
