"""Bursts of saves by two processes into one directory; in every second burst, one of them is killed on the way.

`python -m tests.support.two_writers PLACE BURSTS` prints a line per burst and fails if there is not one whole adapter
after it, or if anything is left behind once the next save is done.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from genft_modules import files

SAVES = 12
chance = random.SystemRandom()


def save(directory: Path, mark: int) -> None:
    with files.replaced_adapter(directory) as partial:
        (partial / files.CONFIG).write_text(json.dumps({"mark": mark}))
        save_file({"mark": torch.tensor([mark])}, partial / files.WEIGHTS)


def found(directory: Path) -> int:
    """The mark of the adapter that is there."""
    with files.whole_adapter(directory) as place:
        mark: int = json.loads((place / files.CONFIG).read_text())["mark"]
        assert load_file(place / files.WEIGHTS)["mark"].tolist() == [mark], directory
    return mark


def forked(directory: Path, first: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        for turn in range(SAVES):
            save(directory, first + turn)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def burst(place: Path, number: int) -> None:
    directory = place / str(number) / "adapter"
    directory.parent.mkdir()
    if chance.random() < 0.5:
        save(directory, 0)
    writers = [forked(directory, 1000), forked(directory, 2000)]
    kill = number % 2
    if kill:
        time.sleep(chance.uniform(0, 0.1))
        os.kill(writers[0], signal.SIGKILL)
    ends = [os.waitpid(writer, 0)[1] for writer in writers]
    assert ends[1] == 0, ends
    assert ends[0] in ((0, signal.SIGKILL) if kill else (0,)), ends
    mark = found(directory)
    assert mark in range(1000, 1000 + SAVES) or mark == 2000 + SAVES - 1, mark
    save(directory, 1)  # and clears up
    assert found(directory) == 1
    assert {path.name for path in directory.iterdir()} == {files.CONFIG, files.WEIGHTS}
    assert [path.name for path in directory.parent.iterdir()] == ["adapter"]
    print(f"{number}: whole, of {mark}", flush=True)


if __name__ == "__main__":
    for number in range(int(sys.argv[2])):
        burst(Path(sys.argv[1]), number)
