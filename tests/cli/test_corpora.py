"""The demo's texts: what is held out was never seen."""

from __future__ import annotations

import pytest

from genft_cli.demo import corpora
from genft_cli.demo.corpora import normal


@pytest.fixture(scope="module")
def prose() -> tuple[str, str]:
    return corpora.pydoc_prose()


def test_prose_is_held_out(prose: tuple[str, str]) -> None:
    train, held = prose
    assert len(train) > 200_000
    assert 0.05 < len(held) / len(train) < 0.12
    known = {run for paragraph in train.split("\n\n") for run in corpora.runs(paragraph)}
    assert known.isdisjoint(run for paragraph in held.split("\n\n") for run in corpora.runs(paragraph))


def test_prose_repeats_nothing(prose: tuple[str, str]) -> None:
    for text in prose:
        paragraphs = [normal(p) for p in text.split("\n\n") if p.strip()]
        assert len(paragraphs) == len(set(paragraphs))


def test_code_is_python_without_the_prose(prose: tuple[str, str]) -> None:
    code = corpora.stdlib_code(200_000)
    assert len(code) == 200_000
    assert code == corpora.stdlib_code(300_000)[:200_000]
    assert "def " in code
    assert not any(normal(p) in normal(code) for p in prose[1].split("\n\n") if len(p) > corpora.SHARED_RUN)
