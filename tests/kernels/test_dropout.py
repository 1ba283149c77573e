"""The counter-based mask: the same everywhere, and as random as dropout needs."""

from __future__ import annotations

import pytest
import torch

from genft_kernels.dropout import draw_seed, keep_mask, threshold


def mask(seed: int, p: float, rows: int = 512, columns: int = 512) -> torch.Tensor:
    return keep_mask(torch.tensor([seed]), p, range(rows), range(columns))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**61 + 12345])
def test_share_of_dropped_elements(p, seed):
    kept = mask(seed, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4.5 * sigma / 512
    for dim in (0, 1):
        # Rows and columns each look like 512 draws of 512: neither their mean nor their spread gives them away.
        spread = float(kept.mean(dim).std())
        assert 0.85 < spread / (sigma / 512**0.5) < 1.15


def test_neighbours_and_seeds_are_uncorrelated():
    a = mask(7, 0.5).double() * 2 - 1
    others = {
        "next row": a.roll(1, 0),
        "next column": a.roll(1, 1),
        "diagonal": a.roll((1, 1), (0, 1)),
        "transposed": a.t(),
        "next seed": mask(8, 0.5).double() * 2 - 1,
        "high bits": mask(7 + (1 << 32), 0.5).double() * 2 - 1,
    }
    for name, b in others.items():
        assert abs(float((a * b).mean())) < 4.5 / 512, name


def test_a_part_of_the_mask_is_that_part():
    whole = mask(3, 0.3)
    part = keep_mask(torch.tensor([3]), 0.3, range(100, 200), torch.arange(7, 500, 3))
    assert torch.equal(part, whole[100:200, 7:500:3])


def test_values_are_fixed_for_good():
    """A checkpoint that replays a seed next year must draw this mask."""
    bits = mask(123456789, 0.5, 4, 16).int()
    assert ["".join(map(str, row.tolist())) for row in bits] == PINNED


PINNED = ["0100110010111001", "1100010100001110", "1111100100001011", "0111010110111001"]


def test_seeds_follow_torch_generators():
    torch.manual_seed(5)
    first = draw_seed()
    assert first.dtype == torch.int64
    assert first.shape == (1,)
    assert not torch.equal(first, draw_seed())
    torch.manual_seed(5)
    assert torch.equal(first, draw_seed())


def test_threshold_covers_the_range():
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31
    assert 0 <= threshold(1.0 - 1e-12) < 2**32
