"""Modules that run as `python -m` runs them, in forks of one process that imports what they import, once."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Forks:
    """The process, which sees no GPU: one that has begun to use a GPU could not be forked."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, module: str, *words: object, **environment: object) -> subprocess.CompletedProcess[str]:
        """`python -m module words...`, with more in its environment."""
        added = {name: str(value) for name, value in environment.items()}
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder, name) for name in ("out", "err"))
            asked = [module, [str(word) for word in words], added, str(out), str(err)]
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess([module, *asked[1]], code, out.read_text(), err.read_text())

    def close(self) -> None:
        """The process ends."""
        self.process.communicate()


def serve() -> None:
    for line in sys.stdin:
        module, words, environment, *outputs = json.loads(line)
        with suppress(Exception):  # the fork will meet it again, and say it
            importlib.import_module(module)
        gc.freeze()  # collections in the forks need not look at what is imported
        child = os.fork()
        if child == 0:
            sys.modules.pop(module, None)
            os.environ.update(environment)
            sys.argv[1:] = words
            for number, path in enumerate((os.devnull, *outputs)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
