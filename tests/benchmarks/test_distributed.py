"""The bytes that docs/distributed.md tells of, and the configurations that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from benchmarks import distributed

ROOT = Path(__file__).parents[2]


def test_traffic_of_the_published_setting():
    found, frozen = distributed.traffic(distributed.METHODS["WeGeFT r = 64"]())
    down = 32 * 2 * 4 * 4096 * 64  # layers, forward and backward, float32 of [N, r]
    assert found == distributed.Traffic(gradients=4 * 3_932_160, tensors=10, in_blocks=0, features=(64, down))
    assert frozen == 2 * 8_030_261_248
    shown = "| WeGeFT r = 64 | 15.0 | 15.0 | 15.0 | 15.0 in 10 | 64.0 in 64 |"
    assert distributed.table({"WeGeFT r = 64": (found, frozen)}).splitlines()[-1] == shown
    assert shown in (ROOT / "docs" / "distributed.md").read_text()


def test_a_ring_carries_every_byte_twice_but_for_one_share():
    machine = distributed.Machine(inside=1.0, between=0.5, latency=0.0)
    assert machine.all_reduce(8.0, 1, 8) == pytest.approx(14.0)
    assert machine.all_reduce(16.0, 1, 16) == pytest.approx(2 * 30.0)
    assert machine.gather(8.0, 1, 8) == pytest.approx(7.0)
    assert distributed.Machine(latency=1.0).all_reduce(0.0, 3, 1024) == pytest.approx(60.0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_accelerate_reads_the_configurations(name):
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[name]
    assert config.distributed_type == kind
    assert config.num_processes == 8
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
