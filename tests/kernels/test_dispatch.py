"""Two ways into an operation: past the dispatcher where nothing but autograd watches, and as a `genft::` operator
where something does. Both give the same numbers, and each watcher sees what it came for."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from genft_kernels import LaunchPlan
from tests.support.truth import OPERATIONS, called, make_case, run


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def small(name, device):
    return make_case(name, 6, 5, 7, 2, torch.float64, device, activation="gelu")


def call_of(case):
    """The result as a function of the tensors that have a gradient, and those tensors."""
    wanted = [key for key, tensor in case.tensors.items() if tensor is not None and tensor.requires_grad]

    def call(*values):
        return case.operation(*{**case.tensors, **dict(zip(wanted, values, strict=True))}.values(), **case.options)

    return call, tuple(case.tensors[key].detach() for key in wanted)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_eager_call_does_not_print_its_plan(name, device, monkeypatch):
    case, plan = small(name, device), LaunchPlan("library")
    expected = run(case.truth, case)

    def printed(self: LaunchPlan) -> str:
        raise AssertionError("a plan was printed")

    monkeypatch.setattr(LaunchPlan, "__str__", printed)
    for key, found in run(case.operation, case, plan=plan).items():
        torch.testing.assert_close(found, expected[key])
    with pytest.raises(AssertionError, match="printed"), Names():
        run(case.operation, case, plan=plan)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_dispatch_mode_sees_one_operator_forward_and_one_backward(name, device):
    case = small(name, device)
    expected = run(case.operation, case)
    with Names() as mode:
        found = run(case.operation, case)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ours = [one for one in mode.seen if one.startswith("genft.")]
    assert ours == [f"genft.{called(name)}.default", f"genft.{called(name)}_backward.default"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_tracer_and_functorch_see_the_operator(name, device):
    """A graph traced through `torch.func.grad` has both operators and gives autograd's gradients; vmap over that, the
    gradients of single samples."""
    call, values = call_of(small(name, device))
    function = torch.func.grad(lambda *values: call(*values).square().sum(), argnums=tuple(range(len(values))))
    leaves = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    traced = make_fx(function)(*values)
    for made in (function(*values), traced(*values)):
        assert all(torch.allclose(a, b) for a, b in zip(made, expected, strict=True))
    named = [node.target.__name__ for node in traced.graph.nodes if "genft" in str(node.target)]
    assert named == [f"{called(name)}.default", f"{called(name)}_backward.default"]
    scaled = [torch.stack([value, 2 * value]) for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loops in torch's own operations
        each = torch.vmap(function)(*scaled)
    twice = function(*(2 * value for value in values))
    for found, once, other in zip(each, expected, twice, strict=True):
        assert torch.allclose(found[0], once)
        assert torch.allclose(found[1], other)


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_is_refused(name, device):
    call, values = call_of(small(name, device))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, values, values)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        call(*(forward_ad.make_dual(value, value) for value in values))


def test_other_watchers_see_the_operator(device):
    case = small("lowrank_linear", device)
    call, values = call_of(case)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        call(*values)
    assert "genft::lowrank_linear" in {event.key for event in watched.key_averages()}
    with FakeTensorMode() as mode, torch.device(device):
        fake = make_case("lowrank_linear", 6, 5, 7, 2, torch.float32, device)
        assert isinstance(case.operation(*fake.tensors.values()), type(mode.from_tensor(values[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "genft::lowrank_linear" in str(torch.jit.trace(call, values, check_trace=False).graph)
        program = torch.export.export(Layer(call), values)
    assert "torch.ops.genft.lowrank_linear.default" in program.graph_module.code
    torch.export.save(program, buffer := io.BytesIO())
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(*values), call(*values))


class Layer(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *values):
        return self.call(*values)


def test_selective_checkpointing_keeps_what_it_is_told_to(device):
    case = small("lowrank_linear", device)
    expected = run(case.operation, case)
    kept = torch.ops.genft.lowrank_linear.default

    def policy(context, function, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if function == kept else CheckpointPolicy.PREFER_RECOMPUTE

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Calls.count += function == kept
            return function(*args, **(kwargs or {}))

    def checkpointed(*args, **kwargs):
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(case.operation, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    with Calls():
        found = run(checkpointed, case)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert Calls.count == 1
