"""What hosts and libraries read of the project: how to cite it, how to report, the forms for issues."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def test_the_citation_is_of_this_version_and_names_every_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    pyproject = (ROOT / "pyproject.toml").read_text()
    for field in ("version", "license"):
        assert f'\n{field} = "{citation[field]}"\n' in pyproject
    assert str(citation["keywords"]).replace("'", '"') in pyproject
    cited = []
    for work in [citation, *citation["references"]]:
        assert work["title"]
        assert all(author.keys() in ({"name"}, {"family-names", "given-names"}) for author in work["authors"])
    for work in citation["references"]:
        if "doi" not in work:
            assert work["url"].startswith("https://openreview.net/forum?id=")
            continue
        number = work["doi"].removeprefix("10.48550/arXiv.")
        assert work["url"] == f"https://arxiv.org/abs/{number}"
        cited.append(number)
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "genft_modules").rglob("*.py")]
    assert sorted(cited) == sorted({number for text in texts for number in ARXIV.findall(text.read_text())})


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_of_it(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    identifiers = [field["id"] for field in fields]
    assert len(set(identifiers)) == len(identifiers) > 0
    for field in fields:
        assert field["attributes"]["label"]
        options = field["attributes"].get("options", [])
        assert bool(options) == (field["type"] in ("dropdown", "checkboxes"))
        assert all(isinstance(option, str) == (field["type"] == "dropdown") for option in options)


def test_other_issues_are_welcome():
    assert yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "config.yml").read_text()) == {"blank_issues_enabled": True}


def test_the_texts_name_files_that_are_there():
    texts = [ROOT / "SECURITY.md", GITHUB / "pull_request_template.md", *FORMS]
    for text in texts:
        for name in re.findall(r"[\w./-]*[\w-]+\.(?:md|py|cff)\b|\.ci/run", text.read_text()):
            assert (ROOT / name).exists(), f"{text.name}: {name}"


def test_reports_go_to_the_host_and_to_no_address():
    text = (ROOT / "SECURITY.md").read_text()
    assert "Report a\nvulnerability" in text
    assert "@" not in text
