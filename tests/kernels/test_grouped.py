"""The grouped operation beyond what `test_operations.py` holds every operation to: samples of several rows, ranks that
differ, groups that are empty, samples that must not see each other, factors in lists, and that the host waits for
nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import genft_kernels as gk
from genft_kernels import DeviceFacts, LaunchPlan, Problem, SkinnyPlan, grouped
from genft_kernels.reference import grouped as reference
from tests.support.truth import EPSILON, GROUPS, Case, assert_close_to_truth, error, make_case, run
from tests.support.watchers import Inside

# "gathered": the reference as on a device whose values the host does not wait for. "thin": tiles of 16 rows; as many
# programs as to split the columns of a few tiles, too.
PLANS = {
    "reference": LaunchPlan(),
    "gathered": LaunchPlan(),
    "thin": LaunchPlan("thin", SkinnyPlan(16, 32, groups=16, warps=4, stages=2)),
}


@pytest.fixture(params=PLANS)
def algorithm(request, monkeypatch) -> str:
    if request.param == "gathered":
        monkeypatch.setattr(reference, "_on_host", lambda x: False)
    return request.param


def taking(index: list[int], *, t: int = 1, n: int = 45, k: int = 130, r: int = 5, dtype=torch.float32, device) -> Case:
    """A case whose samples, of t rows each, take these updates."""
    case = make_case("grouped_lowrank_linear", (len(index), t), n, k, r, dtype, device)
    return replace(case, options={"rows": gk.group_rows(torch.tensor(index, dtype=torch.int64, device=device), GROUPS)})


@pytest.mark.parametrize("t", [1, 7, 20])
def test_samples_of_several_rows_and_split_columns(algorithm, t, device, poisoned):
    """Tiles that hold several samples, samples that take several tiles; both orders of the samples in a tile."""
    case = taking([3, -1, 0, 3, 1, 0], t=t, device=device)
    assert_close_to_truth(case, torch.float32, plan=PLANS[algorithm])


@pytest.mark.parametrize(
    "index",
    [
        [0, 0, 1, 1, 2, 3],  # in order, equal sizes side by side
        [0, 0, -1, 1, 1, 3, 3, 2, 2],  # neighbours, in another order and with a sample without a group among them
        [3, 1, 2, 0, 2, 3, 1, 0],  # in turn
    ],
    ids=str,
)
def test_orders_of_the_samples(algorithm, index, device, poisoned):
    assert_close_to_truth(taking(index, t=2, device=device), torch.float32, plan=PLANS[algorithm])


@pytest.mark.parametrize("group", [[7, 1, -5, 1, GROUPS], [1, 1, GROUPS]], ids=str)
def test_numbers_of_no_group_mean_none(algorithm, group, device, poisoned):
    """What a GPU does not check."""
    group = torch.tensor(group, dtype=torch.int32, device=device)
    order = torch.argsort(group, stable=True)
    bounds = torch.searchsorted(group[order], torch.arange(GROUPS + 1, dtype=torch.int32, device=device))
    rows = gk.RowGroups(group, order.to(torch.int32), bounds.to(torch.int32))
    case = replace(taking([1] * len(group), t=3, device=device), options={"rows": rows})
    assert_close_to_truth(case, torch.float32, plan=PLANS[algorithm])


@pytest.mark.parametrize("index", [[-1, -1, -1], [2, 2, 2], [3], []], ids=str)
def test_groups_without_samples(algorithm, index, device, poisoned):
    case = taking(index, t=3, device=device)
    found = run(case.operation, case, plan=PLANS[algorithm])
    assert_close_to_truth(case, torch.float32, plan=PLANS[algorithm])
    for group in set(range(GROUPS)) - set(index):
        assert not found["grad.p"][group].any()
        assert not found["grad.q"][group].any()


def test_updates_alone(algorithm, device, poisoned):
    case = taking([1, 3, -1, 1, 0], t=5, dtype=torch.bfloat16, device=device)
    alone = replace(case, tensors={**case.tensors, "weight": None, "bias": None})
    assert_close_to_truth(alone, torch.bfloat16, plan=PLANS[algorithm])


def test_samples_do_not_see_each_other(algorithm, device):
    """A sample has the same bits whatever its neighbours take: another update, a broken one, or none."""
    case = taking([0, 1, -1, 0, 3], t=4, device=device)
    tensors = {name: tensor.detach() for name, tensor in case.tensors.items()}

    def y(index: list[int]) -> torch.Tensor:
        rows = gk.group_rows(torch.tensor(index, device=device), GROUPS)
        return case.operation(*tensors.values(), rows=rows, plan=PLANS[algorithm])

    want = y([0, 1, -1, 0, 3])
    plain = F.linear(tensors["x"].reshape(-1, 130), tensors["weight"], tensors["bias"]).reshape(5, 4, 45)
    assert torch.equal(want[2], plain[2])
    tensors["p"][2] = float("nan")
    tensors["q"][2] = float("inf")
    found = y([0, 2, -1, 2, 3])
    assert torch.isnan(found[1]).any()
    for sample in (0, 2, 4):
        assert torch.equal(found[sample], want[sample])


def test_one_group_is_the_plain_operation(algorithm, device):
    case = make_case("lowrank_linear", (3, 6), 20, 24, 4, torch.float32, device, scale=1.0)
    x, weight, p, q, bias = (tensor.detach() for tensor in case.tensors.values())
    rows = gk.group_rows(torch.zeros(3, dtype=torch.int64, device=device), 1)
    found = gk.grouped_lowrank_linear(x, weight, p[None], q[None], rows, bias, plan=PLANS[algorithm])
    torch.testing.assert_close(found, gk.lowrank_linear(x, weight, p, q, bias, backend="reference"))


def test_ranks_that_differ(algorithm, device):
    """An update of lower rank is filled up with zeros."""
    case = taking([1, 0, 1, -1], t=3, r=6, device=device)
    x, weight, p, q, bias = (tensor.detach() for tensor in case.tensors.values())
    narrow_p, narrow_q = p[1, :, :2].contiguous(), q[1, :, :2].contiguous()
    p[1, :, 2:] = 0
    q[1, :, 2:] = 0
    y = case.operation(x, weight, p, q, bias, **case.options, plan=PLANS[algorithm])
    torch.testing.assert_close(y[0], gk.lowrank_linear(x[0], weight, narrow_p, narrow_q, bias, backend="reference"))


class Waits(Inside):
    """The operations that hand a number to the host, and how many products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.calls = 0

    def see(self, function, out) -> None:
        name = str(function.overloadpacket)
        self.calls += 1
        if name in ("aten._local_scalar_dense", "aten.nonzero", "aten.bincount", "aten.unique", "aten.masked_select"):
            self.waits.append(name)


def test_the_host_waits_for_nothing_and_loops_over_no_groups(algorithm, device):
    """The reference on a CPU makes one product for all groups with equally many samples."""
    calls = {}
    for groups in (3, 6, 40):
        x = torch.randn(6, 3, 10, device=device, requires_grad=True)
        p, q = (torch.randn(groups, size, 2, device=device, requires_grad=True) for size in (10, 8))
        rows = gk.group_rows(torch.arange(6, device=device) // (2 if groups == 3 else 1), groups)
        with Waits() as seen:
            y = gk.grouped_lowrank_linear(x, torch.ones(8, 10, device=device), p, q, rows, plan=PLANS[algorithm])
            torch.autograd.grad(y.sum(), (x, p, q))
        assert seen.waits == []
        calls[groups] = seen.calls
    assert calls[3] == calls[6] == calls[40]


# ---- factors in lists


def listed(index: list[int], dtype: torch.dtype, device, *, t: int = 1) -> tuple[list, dict, Case]:
    """The arguments of a call with factors in lists, of several ranks and scales, and the same call with a stack."""
    case = taking(index, t=t, dtype=dtype, device=device)
    x, weight, p, q, bias = (tensor.detach() for tensor in case.tensors.values())
    ranks, scale = [5, 2, 5, 3], [0.5, 1.0, -2.0, 0.25]
    for g, r in enumerate(ranks):
        p[g, :, r:] = 0
        q[g, :, r:] = 0
    factors = [[stack[g, :, :r].t().contiguous().t() for g, r in enumerate(ranks)] for stack in (p, q)]
    stacked = dict(case.tensors, p=p, q=(q.double() * torch.tensor(scale, device=device)[:, None, None]).to(dtype))
    return [x, weight, *factors, index, bias], {"scale": scale}, replace(case, tensors=stacked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [1, reference._ROWS_TO_STAY])
@pytest.mark.parametrize(
    "index",
    [[2, 2, 2], [-1, -1], [], [0, 0, -1, 3], [3, 1, -1, 3, 0, 1], [0, 1, 2, 3], [2, -1, 2]],
    ids=str,
)
def test_factors_in_lists(index, t, dtype, device, poisoned):
    arguments, more, case = listed(index, dtype, device, t=t)
    for alone in (False, True):
        if alone:
            arguments[1] = arguments[-1] = None
            case = replace(case, tensors={**case.tensors, "weight": None, "bias": None})
        truth, own = (run(case.truth, case, kind)["y"] for kind in (torch.float64, dtype))
        with torch.no_grad():
            found = gk.grouped_lowrank_linear(*arguments, **more)
        assert (found.shape, found.dtype) == (truth.shape, dtype)
        assert error(found, truth) <= 2 * error(own, truth) + EPSILON[dtype]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [[1.0, 1.0], [0.5, 0.5], [2.0, -1.0]], ids=str)
def test_stack_factors(scale, transposed, device):
    def factors(size: int) -> list[torch.Tensor]:
        return [
            torch.randn(r, size, device=device).t() if transposed else torch.randn(size, r, device=device)
            for r in (3, 2)
        ]

    p, q = factors(6), factors(4)
    for stack, each, scales in zip(gk.stack_factors(p, q, scale), (p, q), ([1.0, 1.0], scale), strict=True):
        want = [F.pad(factor * s, (0, 3 - factor.shape[1])) for factor, s in zip(each, scales, strict=True)]
        assert torch.equal(stack, torch.stack(want))


def test_factors_in_lists_are_differentiated(device):
    arguments, more, _ = listed([1, 0, -1, 3, 1], torch.float64, device)
    x, weight, p, q, index, bias = arguments
    leaves = [x, *p, *q]
    for leaf in leaves:
        leaf.requires_grad_()
    found = gk.grouped_lowrank_linear(x, weight, p, q, index, bias, **more)
    weights = [weight if g < 0 else weight + more["scale"][g] * q[g] @ p[g].t() for g in index]
    want = torch.stack([F.linear(one, w, bias) for one, w in zip(x, weights, strict=True)])
    torch.testing.assert_close(found, want)
    gradients = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (found, want))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


@pytest.mark.parametrize("way", ["triton", "autocast", "compiled"])
def test_where_factors_in_lists_are_stacked(way, device):
    (x, weight, p, q, index, bias), more, _ = listed([1, 0, -1, 3, 1], torch.float32, device)
    call = gk.grouped_lowrank_linear
    if way == "compiled":
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=way == "autocast"):
        found = call(x, weight, p, q, index, bias, **more, backend="triton" if way == "triton" else "auto")
        stack = gk.stack_factors(p, q, more["scale"])
        want = gk.grouped_lowrank_linear(x, weight, *stack, gk.group_rows(index, GROUPS, device), bias)
    torch.testing.assert_close(found, want)


def test_factors_in_lists_are_not_copied_on_a_cpu(monkeypatch):
    arguments, more, _ = listed([1, 0, -1, 3, 1], torch.float32, torch.device("cpu"))
    stacked = []
    monkeypatch.setattr(grouped, "stack_factors", lambda *lists: stacked.append(lists) or gk.stack_factors(*lists))
    with torch.no_grad():
        gk.grouped_lowrank_linear(*arguments, **more)
    assert not stacked
    arguments[2][0].requires_grad_()
    gk.grouped_lowrank_linear(*arguments, **more)
    assert stacked


def test_opcheck(algorithm, device):
    case = taking([1, -1, 3], t=2, n=9, k=10, r=3, device=device)
    x, weight, p, q, bias = case.tensors.values()
    x = x.detach().reshape(6, 10).requires_grad_()
    rows, plan = case.options["rows"], str(PLANS[algorithm])
    weight, bias = (weight, bias) if algorithm == "thin" else (None, None)
    torch.library.opcheck(torch.ops.genft.grouped_lowrank_linear.default, (x, weight, p, q, *rows, bias, plan))
    with torch.no_grad():
        x, p, q = x.detach(), p.detach(), q.detach()
        t, dy = torch.randn(6, 3, device=device), torch.randn(6, 9, device=device)
        needs = [algorithm == "thin", True, False, True]
        torch.library.opcheck(
            torch.ops.genft.grouped_lowrank_linear_backward.default, (dy, x, weight, p, q, t, *rows, needs, plan)
        )


def test_rows_are_sorted_by_group():
    rows = gk.group_rows(torch.tensor([2, -1, 0, 2, 0]), 4)
    assert all(torch.equal(a, b) for a, b in zip(rows, gk.group_rows([2, -1, 0, 2, 0], 4), strict=True))
    assert rows.groups == 4
    assert rows.bounds.tolist() == [1, 3, 3, 5, 5]
    assert [rows.order[a:b].tolist() for a, b in zip(rows.bounds[:-1], rows.bounds[1:], strict=True)] == [
        [2, 4],
        [],
        [0, 3],
        [],
    ]


def test_the_default_plan_fills_the_card_also_with_few_rows():
    plan = gk.choose_plan(Problem("grouped_lowrank_linear", 8, 4096, 4096, 16, 2), DeviceFacts("sm_90", 132))
    assert (plan.algorithm, plan.skinny.groups) == ("thin", 2 * 132)


def refused():
    x, weight, p, q = torch.randn(3, 2, 6), torch.randn(5, 6), torch.randn(4, 6, 2), torch.randn(4, 5, 2)
    rows = gk.group_rows(torch.tensor([0, 1, 3]), 4)
    call = gk.grouped_lowrank_linear
    yield TypeError, r"rows: got Tensor, expected RowGroups from group_rows", lambda: call(x, weight, p, q, rows.group)
    yield ValueError, r"rows: got 3 samples, expected S = 2", lambda: call(x[:2], weight, p, q, rows)
    yield ValueError, r"x: shape \(6,\), expected \[S, ..., K\]", lambda: call(x[0, 0], weight, p, q, rows)
    yield ValueError, r"p: shape \(3, 6, 2\), expected \[4, 6, r\]", lambda: call(x, weight, p[:3], q, rows)
    yield ValueError, r"p: shape \(6, 2\), expected \[4, 6, r\]", lambda: call(x, weight, p[0], q, rows)
    yield ValueError, r"q: shape \(4, 5, 1\), expected \[4, 5, 2\]", lambda: call(x, weight, p, q[..., :1], rows)
    yield ValueError, r"q: shape \(5, 2\), expected \[4, N, 2\]", lambda: call(x, None, p, q[0], rows)
    yield ValueError, "bias: got a tensor, expected None", lambda: call(x, None, p, q, rows, weight[:, 0])
    yield ValueError, "rows: on meta", lambda: call(x, weight, p, q, gk.RowGroups(*(t.to("meta") for t in rows)))
    yield ValueError, "no algorithm 'panel'", lambda: call(x, weight, p, q, rows, plan=LaunchPlan("panel"))
    yield ValueError, "index: got values from 0 to 3, expected -1 to 2", lambda: gk.group_rows(rows.group, 3)
    yield ValueError, "index: got values from -2", lambda: gk.group_rows(rows.group - 2, 4)
    yield ValueError, r"index: shape \(1, 3\)", lambda: gk.group_rows(rows.group[None], 4)
    yield TypeError, "index: got torch.float32", lambda: gk.group_rows(rows.group.float(), 4)
    yield TypeError, "index: got tuple", lambda: gk.group_rows((0, 1), 4)
    yield TypeError, r"index: got \[0, 1.0\], expected integers", lambda: gk.group_rows([0, 1.0], 4)
    yield ValueError, "index: got values from 0 to 4, expected -1 to 3", lambda: gk.group_rows([0, 4], 4)
    yield ValueError, "device: got cpu, expected None", lambda: gk.group_rows(rows.group, 4, torch.device("cpu"))
    ps, qs = list(p), list(q)
    yield ValueError, "p, q, scale: got 4, 3 and 4 groups", lambda: call(x, weight, ps, qs[1:], rows)
    yield ValueError, "p, q, scale: got 4, 4 and 1 groups", lambda: call(x, weight, ps, qs, rows, scale=[1.0])
    yield TypeError, "scale: got str", lambda: call(x, weight, ps, qs, rows, scale=["1"] * 4)
    yield ValueError, "scale: got a list, expected None", lambda: call(x, weight, p, q, rows, scale=[1.0] * 4)
    yield TypeError, "q: got list, expected a tensor", lambda: call(x, weight, p, qs, rows)
    yield ValueError, r"q: shape \(5, 2\), expected \[5, 1\]", lambda: call(x, weight, [w[:, :1] for w in ps], qs, rows)
    yield ValueError, "rows: got 2 samples, expected S = 3", lambda: call(x, weight, ps, qs, [0, 1])
    yield ValueError, "index: got values from 0 to 4", lambda: call(x, weight, ps, qs, [0, 1, 4])
    yield ValueError, "count: got 0", lambda: gk.group_rows(rows.group, 0)


@pytest.mark.parametrize(("error", "message", "call"), [pytest.param(*it, id=it[1]) for it in refused()])
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("index", [[0, -1, 0, 0], [0, -1, 1, 0], [1, 1, -1, 0]], ids=str)
def test_an_infinite_update_stays_with_its_samples(index):
    x, weight = torch.randn(4, 2, 6), torch.randn(5, 6)
    p, q = [torch.randn(6, 3) for _ in range(max(index) + 1)], [torch.randn(5, 3) for _ in range(max(index) + 1)]
    q[0].fill_(torch.inf)
    with torch.no_grad():
        y = gk.grouped_lowrank_linear(x, weight, p, q, index)
    for sample, group in enumerate(index):
        assert y[sample].isfinite().all() == (group != 0)
        if group < 0:
            torch.testing.assert_close(y[sample], x[sample] @ weight.t())
