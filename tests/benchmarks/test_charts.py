"""Charts: one look per method, and names at the ends of lines that do not touch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from matplotlib.text import Text

from benchmarks.measure import results
from benchmarks.report.devices import read_devices
from benchmarks.report.drawing import look as look_of
from genft_cli import plotting
from genft_cli.demo.run import NAMES
from genft_cli.palette import LOOKS, OTHER, apart, look


def test_every_method_has_a_look_of_its_own():
    assert set(LOOKS) == set(NAMES)
    assert len({found.colour for found in LOOKS.values()}) == len(LOOKS) == 11
    assert all(look(title) == LOOKS[method] for method, title in NAMES.items() if method != "lora")
    assert look("LoRA (genft)") == look("lora") != look("peft-lora")
    assert look("something else") == OTHER


# How linear RGB is seen, from Machado, Oliveira and Fernandes (2009), severity 1.
SEEN = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, seen) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = XYZ @ np.clip(np.array(seen) @ linear, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_can_be_told_apart(eyes):
    places = [lab(found.colour, SEEN[eyes]) for found in LOOKS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2)) > 25  # 2 can just be seen


def test_what_was_measured_has_its_methods_look():
    records = [r for device in read_devices(results.FOLDER).values() for r in device.records if "contender" in r]
    found = {r["contender"]: look_of(r) for r in records}
    for name in ("wegeft", "gift", "lora", "sas", "peanut"):
        assert found[f"genft-{name}"] == found[f"naive-{name}"] == LOOKS[name]
    assert found["genft-genft-gelu"] == LOOKS["genft-gelu"]
    assert found["genft-grft-row"] == found["genft-grft-column"] == LOOKS["grft"]
    assert (found["peft-lora"], found["trainable"], found["frozen"]) == (LOOKS["peft-lora"], LOOKS["full"], OTHER)


@pytest.mark.parametrize("wanted", [[], [0.5], [0.3, 0.3, 0.3], [0.9, 0.1, 0.12, 0.11, 0.5], [0.2, 0.1]])
def test_names_are_moved_apart_and_no_further(wanted):
    places = apart(wanted, 0.1)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    assert all(places[b] - places[a] > 0.1 - 1e-9 for a, b in itertools.pairwise(order))
    assert sum(places) == pytest.approx(sum(wanted))  # groups stay where they were
    far = [place for place in wanted if all(abs(place - other) > 0.15 for other in wanted if other is not place)]
    assert all(any(abs(place - found) < 1e-9 for found in places) for place in far)


def test_loss_curves_name_ten_lines_at_their_ends(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: kept.append(figure))
    falling = [(step, 3 + math.exp(-step / 20)) for step in range(1, 60)]
    runs = {title: {"training_curve": falling, "held_out_curve": falling[::10]} for title in NAMES.values()}
    plotting.loss_curves(runs, tmp_path / "loss.png")
    (figure,) = kept
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert {note.get_text() for note in axes.texts} == set(runs)
        texts = [Text.get_window_extent(note) for note in axes.texts]  # without the lines that lead to them
        assert all(not a.overlaps(b) for a, b in itertools.combinations(texts, 2))
        assert all(text.x0 >= axes.get_window_extent().x1 for text in texts)
