"""Stock peft LoRA on our operations: what peft computes, in float64; and layers that stay peft's in every other way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from genft_kernels import draw_seed
from genft_modules import FusedGenLinear, FusedLayer, LoRAConfig, fuse_lora, unfuse_lora
from genft_modules.methods import forms
from genft_modules.model import fused
from tests.support.cases import llama
from tests.support.device import DEVICE
from tests.support.grids import pairwise
from tests.support.truth import dropped
from tests.support.watchers import Allocations, Doubling

K, N = 11, 7
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"one": 2}, "alpha_pattern": {"two": 3}},
    "biases": {"lora_bias": True, "bias": "all"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}
BASES: dict[str, Callable[[int, int], nn.Module]] = {
    "Linear": nn.Linear,
    "Conv1D": lambda k, n: Conv1D(n, k),
    "other forward": Doubling,
}


class Net(nn.Module):
    def __init__(self, base: Callable[[int, int], nn.Module] = nn.Linear, k: int = K, n: int = N) -> None:
        super().__init__()
        self.one, self.two = base(k, n), base(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def make(adapter: str = "plain", base: str = "Linear", dtype: torch.dtype = torch.float64, **more: Any) -> PeftModel:
    torch.manual_seed(0)
    config = _config(adapter, **({"fan_in_fan_out": True} if base == "Conv1D" else {}), **more)
    model = get_peft_model(Net(BASES[base]).to(DEVICE), config)  # peft's initialisations want float32
    return _woken(model.to(dtype))


def _config(adapter: str, **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": ["one", "two"], **ADAPTERS[adapter], **more})


def _woken(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, dtype=torch.float64, device=DEVICE) * 0.3
                parameter.add_(noise if "magnitude" not in name else noise * 0.3)
    return model.train()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


def rows(m: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(DEVICE, dtype).requires_grad_()


def results(model: nn.Module, run: Callable[..., Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    x = rows()
    y = (run or model)(x, **kwargs)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], **how: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **how)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a fused layer was computed by us."""
    calls: list[bool] = []
    for name in ("_active", "_mixed"):
        compute = getattr(fused.FusedForward, name)

        def noted(self: Any, *arguments: Any, compute: Any = compute) -> Tensor | None:
            y = compute(self, *arguments)
            calls.append(y is not None)
            return y

        monkeypatch.setattr(fused.FusedForward, name, noted)
    return calls


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, fullgraph=True, backend=counter)

    def call(x: Tensor) -> Tensor:
        y = run(x)
        (graph,) = counter.graphs
        assert sum("genft" in str(node.target) for node in graph.graph.nodes) >= 2, graph.graph
        return y

    return call


RUNS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "eager": lambda model: model,
    "compiled": compiled,
    "checkpointed": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
}


@pytest.mark.parametrize(("adapter", "base", "run"), pairwise(list(ADAPTERS), list(BASES), list(RUNS)), ids=str)
def test_output_and_gradients_are_pefts(adapter, base, run, served):
    if adapter == "olora" and base == "Conv1D":
        base = "Linear"  # there, peft gives the factors of W0ᵀ to W0
    if base == "other forward" and run == "compiled":
        run = "eager"  # the update is computed around the base by plain products
    model = make(adapter, base)
    expected = results(model)
    report = fuse_lora(model)
    assert [(layer.fused, layer.reason) for layer in report] == [(True, "")] * 2
    close(results(model, RUNS[run](model)), expected)
    if run == "eager":
        assert served == [adapter != "dora" or base != "other forward"] * 2


def test_several_active_adapters_are_one_operation(served):
    model = make("biases", lora_dropout=0.0)
    model.add_adapter("other", _config("rslora", r=2))
    _woken(model)
    model.base_model.set_adapter(["default", "other"])
    expected = results(model)
    fuse_lora(model)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "lowrank_linear", lambda *a, **kw: calls.append(a[2].shape) or _lowrank(*a, **kw))
        close(results(model), expected)
    assert calls == [(K, 5), (N, 5)]
    assert served == [True] * 2


_lowrank = forms.lowrank_linear


@pytest.mark.parametrize("base", list(BASES))
def test_samples_with_adapters_of_their_own(base, served):
    model = make("plain", base)
    model.add_adapter("other", _config("rslora", r=2, target_modules=["two"]))
    _woken(model).eval()
    names = ["other", "__base__", "default", "default", "other", "__base__"]
    expected = model(rows(), adapter_names=names)
    fuse_lora(model)
    torch.testing.assert_close(model(rows(), adapter_names=names), expected)
    assert served == [True] * 2
    with pytest.raises(ValueError, match="same as the number of inputs"):  # peft's refusals stay
        model(rows(), adapter_names=names[:-1])


@pytest.mark.parametrize("adapter", ["plain", "dora"])
def test_dropout_is_pefts_without_a_stored_mask(adapter, monkeypatch, served):
    model = make(adapter, lora_dropout=0.4)
    seed = draw_seed(DEVICE)
    for module in (forms, fused):
        monkeypatch.setattr(module, "draw_seed", lambda device: seed)
    with monkeypatch.context() as patch:  # peft with our mask
        patch.setattr(F, "dropout", lambda x, p, training, inplace: dropped(x, p, seed) if training else x)
        expected = results(model)
    with torch.no_grad():
        evaluated = model.eval()(rows())
    model.train()
    fuse_lora(model)
    close(results(model), expected)
    assert served == [True] * 2
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(rows()), evaluated)


@pytest.mark.parametrize("adapter", ["plain", "dora"])
def test_what_is_saved_for_backward(adapter):
    """Beyond x and the parameters: t of each layer; for DoRA the unscaled output, too. No mask, no copy of x."""
    m, k, n, r = 50, 64, 48, 4
    torch.manual_seed(0)
    config = _config(adapter, r=r, lora_dropout=0.3, target_modules=["one"])
    model = _woken(get_peft_model(Net(k=k, n=n).to(DEVICE), config))
    layer, x = model.base_model.model.one, torch.randn(m, k, device=DEVICE, requires_grad=True)

    def saved() -> int:
        own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        assert y.requires_grad
        return sum(sizes.values())

    theirs = saved()
    fuse_lora(model)
    seed_and_gain = 8 + (2 * 4 * n if adapter == "dora" else 0)
    outputs = m * n if adapter == "dora" else 0
    assert saved() <= 4 * (m * r + outputs) + seed_and_gain < theirs


def test_dora_makes_nothing_of_the_weights_size():
    model = _woken(get_peft_model(Net(k=320, n=256).to(DEVICE), _config("dora", target_modules=["one"])))
    fuse_lora(model)
    layer, x = model.base_model.model.one, torch.randn(8, 320, device=DEVICE, requires_grad=True)
    with Allocations(*model.parameters(), x) as seen:
        layer(x).sum().backward()
    assert 0 < seen.largest < layer.weight.nbytes


def test_dora_starts_as_the_base_in_16_bits():
    torch.manual_seed(0)
    net = Net(lambda k, n: nn.Linear(k, n, bias=False)).to(DEVICE, torch.bfloat16)
    x = rows(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = net(x)
        model = get_peft_model(net, _config("dora"), autocast_adapter_dtype=False)
        fuse_lora(model)
        assert torch.equal(model(x), expected)


def test_the_norms_of_dora_follow_the_weight():
    model = make("dora")
    fuse_lora(model)
    model(rows())
    with torch.no_grad():
        for layer in layers(model):
            layer.base_layer.weight.mul_(1.5)
    found = results(model)
    unfuse_lora(model)
    close(found, results(model))


@torch.no_grad()
def test_small_updates_reach_a_16_bit_output():
    """N1: <answer, true answer> / <true answer, true answer> at ‖ΔW‖ = 10⁻³ ‖W0‖, where peft has 0.53."""
    side, size = 512, 1e-3
    torch.manual_seed(0)
    net = nn.ModuleDict({"one": nn.Linear(side, side, bias=False)}).to(DEVICE).bfloat16()
    model = get_peft_model(net, _config("plain", r=8, target_modules=["one"]))
    _woken(model)
    fuse_lora(model)
    layer, x = model.base_model.model["one"], torch.randn(side, side, device=DEVICE).bfloat16()
    delta, weight = layer.get_delta_weight("default").double(), layer.weight.double()
    layer.scaling["default"] *= size * float(weight.norm() / delta.norm())
    true = x.double() @ layer.get_delta_weight("default").double().t()
    found = (layer(x).double() - layer.base_layer(x).double()) * true
    assert abs(float(found.sum() / true.square().sum()) - 1) <= 0.03


def test_autocast_and_mixed_dtypes():
    """The dtype and the values of peft, up to the rounding of 16 bits."""
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model = make("plain", dtype=dtype)
        x = rows(dtype=dtype)
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=autocast):
            expected = model(x)
            fuse_lora(model)
            found = model(x)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_layers_stay_pefts():
    """Class, text, parameters and state; copies and pickles are fused on their own; `unfuse_lora` leaves no trace."""
    model = make("dora")
    model.add_adapter("other", _config("plain"))
    before = [dict(vars(layer)) for layer in layers(model)]
    text, state = repr(model), model.state_dict()
    expected = results(model)
    fuse_lora(model)
    fuse_lora(model, backend="reference")  # again
    assert all(type(layer) is lora.Linear for layer in layers(model))
    assert repr(model) == text
    assert list(model.state_dict()) == list(state)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ):
        close(results(other), expected)
        assert all(layer.forward.layer() is layer for layer in layers(other))
    for layer in layers(model):
        replica = layer._replicate_for_data_parallel()
        assert replica.forward.layer() is replica is not layer
    unfuse_lora(model)
    assert [dict(vars(layer)) for layer in layers(model)] == before
    assert results(model).keys() == expected.keys()


@pytest.mark.parametrize("adapter", ["plain", "dora"])
def test_what_peft_does_afterwards(adapter, tmp_path):
    """Merging, disabling, switching, adding, deleting, combining and swapping adapters, with and without."""

    def life(model: PeftModel, directory: str) -> list[Tensor]:
        seen = [model(rows())]
        with model.disable_adapter():
            seen.append(model(rows()))
        model.add_adapter("other", _config("plain", r=2))
        _woken(model)
        model.set_adapter("other")
        seen.append(model(rows()))
        model.merge_adapter(["other"])
        seen.append(model(rows()))
        model.unmerge_adapter()
        model.base_model.set_adapter(["default", "other"])
        seen.append(model(rows()))
        if adapter == "plain":
            model.add_weighted_adapter(["default", "other"], [0.5, 0.7], "sum", combination_type="cat")
            model.set_adapter("sum")
            seen.append(model(rows()))
        model.delete_adapter("other")
        model.set_adapter("default")
        model.save_pretrained(directory)
        with torch.no_grad():
            for layer in layers(model):
                layer.lora_B["default"].weight.zero_()
        if adapter == "plain":  # which peft 0.21 cannot with DoRA
            hotswap_adapter(model, directory, "default")
        seen.append(model(rows()))
        return [*seen, model.merge_and_unload()(rows())]

    expected = life(make(adapter), str(tmp_path / "theirs"))
    model = make(adapter)
    fuse_lora(model)
    found = life(model, str(tmp_path / "ours"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_bitsandbytes(bits, served):
    """The update is computed around the product of the quantised layer."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    if bits == 4:
        base = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32)
    else:
        base = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    base.load_state_dict(linear.state_dict())
    model = nn.ModuleDict({"one": base.to(DEVICE)})
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8  # as transformers says it
    adapted = _woken(get_peft_model(model, LoraConfig(r=3, target_modules=["one"])))
    (layer,) = layers(adapted)
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]

    def gradients() -> tuple[Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), [x, *factors]))

    gradients()  # bitsandbytes sets itself up in its first call
    expected = gradients()
    assert fuse_lora(adapted)[0].fused
    torch.testing.assert_close(gradients(), expected)
    assert served == [True]


def test_swapping_into_a_compiled_model_compiles_nothing(tmp_path):
    """Padded ranks and scales as tensors, which is how peft prepares a model for it."""
    torch.compiler.reset()
    model, other = make().eval(), make(r=2, lora_alpha=9).eval()
    other.save_pretrained(tmp_path)
    want = [one(rows()).detach() for one in (model, other)]
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    fuse_lora(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(rows()), want[0])
        hotswap_adapter(model, str(tmp_path), "default", torch_device=DEVICE)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(rows()), want[1])
    assert not torch.allclose(*want)


def test_the_report_names_what_is_not_fused():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(4, 4), nn.Conv2d(1, 1, 3)
            self.embedding, self.hooked = nn.Embedding(5, 4), nn.Linear(4, 4)

    model = get_peft_model(Many(), LoraConfig(r=2, target_modules=["linear", "conv", "embedding", "hooked"]))
    hooked = model.base_model.model.hooked
    hooked.forward = lambda x: x
    found = {layer.name.rpartition(".")[2]: layer for layer in fuse_lora(model)}
    assert {name for name, layer in found.items() if layer.fused} == {"linear"}
    assert "Conv2d is no plain LoRA of a linear layer" in str(found["conv"])
    assert "Embedding" in found["embedding"].reason
    assert "forward was replaced" in found["hooked"].reason
    assert str(found["linear"]) == "base_model.model.linear: fused"
    model = make()
    for layer in layers(model):
        layer.lora_variant["default"] = lora.layer.LoraVariant()
    assert fuse_lora(model)[0] == FusedLayer("base_model.model.one", False, "adapter 'default' is a LoraVariant")


def test_what_peft_has_to_compute_it_does(served):
    """A factor with a hook, as DeepSpeed and FSDP add them; two DoRA adapters; a base that trains."""
    model = make("plain")
    fuse_lora(model)
    seen: list[Tensor] = []
    model.base_model.model.one.lora_A["default"].register_forward_hook(lambda *a: seen.append(a[2]))
    model(rows())
    assert len(seen) == 1
    assert served == [False, True]

    model = make("dora")
    model.add_adapter("other", _config("dora"))
    _woken(model).base_model.set_adapter(["default", "other"])
    expected = results(model)
    fuse_lora(model)
    close(results(model), expected)
    assert served[2:] == [False] * 2

    model = make("plain")
    model.base_model.model.one.base_layer.weight.requires_grad_(True)
    expected = results(model)
    fuse_lora(model)
    close(results(model), expected)
    assert "base_model.model.one.base_layer.weight" in expected


def test_models_of_transformers():
    """`add_adapter` injects without a PeftModel."""
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = torch.arange(9, device=DEVICE)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        report = fuse_lora(model)
        assert [layer.fused for layer in report] == [True] * 4
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (lambda: torch.ones(1), {}, TypeError, "model: got Tensor"),
        (Net, {}, ValueError, "model: got a Net without LoRA layers"),
        (lambda: FusedGenLinear.from_linear(nn.Linear(2, 2), LoRAConfig(r=1)), {}, ValueError, "without LoRA layers"),
        (make, {"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
    ],
)
def test_refusals(model, options, error, words):
    with pytest.raises(error, match=words):
        fuse_lora(model(), **options)
