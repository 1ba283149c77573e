"""The contract of `contract.py` in two and in four processes, which are started once for all of its checks."""

from __future__ import annotations

import json

from genft_modules import METHODS


def test_the_contract_holds_in_two_and_in_four_processes(tmp_path, forks):
    done = forks.run("tests.distributed.contract", tmp_path / "report.json", GENFT_CHECKPOINTS=tmp_path)
    reports = {path.suffixes[0]: json.loads(path.read_text())["checks"] for path in tmp_path.glob("report.*.json")}
    failed = [f"{n} {name}: {error}" for n, found in reports.items() for name, error in found.items() if error]
    assert not failed, "\n\n".join(failed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f"{way}-{one}" for way in ("ddp", "fsdp_leaves", "tensor_parallel") for one in METHODS} <= reports[
        ".2"
    ].keys()
    assert {f"fsdp_and_tensor_parallel-{one}" for one in ("wegeft", "genft_gelu", "grft")} <= reports[".4"].keys()
    assert all("checkpoint" in reports[processes] for processes in (".2", ".4"))
