"""Tensors without values, on the meta device and under FakeTensorMode: shapes and dtypes of the real call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import genft_kernels as gk
from tests.support.plans import DTYPES, PLANS, short
from tests.support.truth import ALGORITHMS, OPERATIONS, WITH_DROPOUT, Case, make_case, run

dtypes = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=short)


def without_values(case: Case, convert: Callable[[Tensor], Tensor]) -> Case:
    def converted(value: Any) -> Any:
        if isinstance(value, gk.RowGroups):
            return gk.RowGroups(*map(convert, value))
        return convert(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    tensors, options = ({key: converted(value) for key, value in d.items()} for d in (case.tensors, case.options))
    return replace(case, tensors=tensors, options=options)


def random_case(name: str, dtype: torch.dtype, device: torch.device) -> Case:
    dropout = 0.3 if name in WITH_DROPOUT else 0.0
    return make_case(name, (3, 2), 5, 7, 2, dtype, device, factor_dtype=torch.float32, dropout=dropout)


def described(results: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (value.shape, value.dtype) for name, value in results.items()}


@pytest.mark.parametrize("name", OPERATIONS)
@dtypes
def test_an_operation_without_values(name, dtype, device):
    case = random_case(name, dtype, device)
    expected = described(run(case.operation, case))
    on_meta = run(case.operation, without_values(case, lambda tensor: tensor.to("meta")))
    assert described(on_meta) == expected
    assert all(value.is_meta for value in on_meta.values())
    mode = FakeTensorMode()
    fake_case = without_values(case, mode.from_tensor)
    fake_meta_case = without_values(case, lambda tensor: mode.from_tensor(tensor.to("meta")))
    with mode:
        fake, fake_meta = run(case.operation, fake_case), run(case.operation, fake_meta_case)
    assert described(fake) == described(fake_meta) == expected
    assert {value.device.type for value in fake_meta.values()} == {"meta"}
    assert {value.device.type for value in fake.values()} == {device.type}


@pytest.mark.parametrize(("name", "algorithm"), [(name, plan) for name, plans in ALGORITHMS.items() for plan in plans])
def test_any_plan_and_any_backend_has_a_shape_on_meta(name, algorithm, device):
    case = random_case(name, torch.float32, device)
    expected = described(run(case.operation, case))
    on_meta = without_values(case, lambda tensor: tensor.to("meta"))
    assert described(run(case.operation, on_meta, plan=PLANS[algorithm])) == expected
    assert described(run(case.operation, on_meta, backend="triton")) == expected


def test_a_plan_of_another_operation_is_refused_on_meta():
    x, psi = torch.empty(4, 6, device="meta"), torch.empty(2, 6, device="meta")
    with pytest.raises(ValueError, match="input_edit has no algorithm 'panel'"):
        gk.input_edit(x, psi, psi, plan=PLANS["panel"])


def test_what_is_around_the_operations():
    assert gk.draw_seed("meta").is_meta
    rows = gk.group_rows(torch.empty(5, dtype=torch.int64, device="meta"), 3)
    assert [(part.shape, part.dtype, part.device.type) for part in rows] == [
        ((size,), torch.int32, "meta") for size in (5, 5, 4)
    ]
    with FakeTensorMode():
        rows = gk.group_rows(torch.empty(5, dtype=torch.int64), 3)
        sums = gk.squared_gradient_sums(torch.empty(4, 5), torch.empty(4, 6), orientation="column")
    assert [part.shape for part in rows] == [(5,), (5,), (4,)]
    assert sums.shape == (6,)
    sums = gk.squared_gradient_sums(torch.empty(4, 5, device="meta"), torch.empty(4, 6, device="meta"))
    assert (sums.shape, sums.is_meta) == ((5,), True)
