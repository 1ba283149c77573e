"""Hot-swapping: a model has the ΔW of the adapter that was swapped in, in the tensors and in the graph that it had."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from genft_modules import (
    GeneratorConfig,
    WeGeFTConfig,
    hotswap_adapter,
    load_adapter,
    prepare_model_for_compiled_hotswap,
    save_adapter,
)
from genft_modules.disk import hotswap
from genft_modules.files import CONFIG, WEIGHTS
from genft_modules.model.tuner import adapted_layers
from tests.support.cases import CASES, REPRESENTATIVES, genft, randomize, seeded
from tests.support.device import DEVICE
from tests.support.experts import moe, stacks

TARGETS = ["q", "down"]
HIGHEST = 6


class Net(nn.Module):
    """Two blocks with layers of the same names, one of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "down": nn.Linear(8, 6)}) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["q"](x)
            x = x + F.pad(block["down"](x), (0, 2))
        return self.head(x)


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return seeded(Net).to(dtype)


def adapter(config: GeneratorConfig, seed: int, to: Path | None = None, **fields: Any) -> PeftModel:
    """A model with a trained adapter, saved to a directory. `fields` replace those of the config."""
    config = copy.deepcopy(config)
    for field, value in fields.items():
        setattr(config, field, value)
    model = get_peft_model(net(), config)
    randomize(model, seed)
    if to is not None:
        write(model, to)
    return model.eval()


def write(model: PeftModel, to: Path) -> None:
    """The two files of an adapter, without the card."""
    to.mkdir(exist_ok=True)
    (to / CONFIG).write_text(json.dumps(model.peft_config["default"].to_dict()))
    save_file(get_peft_model_state_dict(model), to / WEIGHTS)


def deltas(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {layer: one.get_delta_weight(name).detach() for layer, one in adapted_layers(base, name).items()}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(deltas(model), deltas(other), rtol=1e-12, atol=1e-13)


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}


def rows(m: int = 5) -> torch.Tensor:
    return torch.randn(m, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(m)).to(DEVICE)


def others(config: GeneratorConfig) -> dict[str, Any]:
    """Fields of a smaller adapter with another scale that can be swapped with one of `config`."""
    scales = {"wegeft": {"wegeft_alpha": 5}, "lora": {"lora_alpha": 5, "use_rslora": True}, "sas": {"scaling": 0.3}}
    found: dict[str, Any] = {"peanut": {"scaling": 0.3}, **scales}.get(config.method, {})
    if not config.refuses_padding():
        lower = {field: getattr(config, field) // 2 for field in config.ranks}
        found = {**found, **lower}
    return found


@pytest.mark.parametrize("case", CASES)
def test_delta_is_that_of_a_fresh_model(case: str, tmp_path: Path) -> None:
    """Swapped to higher and to lower ranks and another scale, in the tensors of before."""
    config = CASES[case](target_modules=TARGETS)
    large, small = adapter(config, 1, tmp_path / "large"), adapter(config, 2, tmp_path / "small", **others(config))
    model = copy.deepcopy(small)
    if not config.refuses_padding():
        prepare_model_for_compiled_hotswap(model, target_rank=HIGHEST)
        assert_same(model, small)
        assert {getattr(model.peft_config["default"], field) for field in config.ranks} == {HIGHEST}
    before = addresses(model)
    for name, one in {"large": large, "small": small}.items():
        hotswap_adapter(model, tmp_path / name, "default")
        assert_same(model, one)
        assert addresses(model) == before
    hotswap_adapter(large, tmp_path / "small", "default")  # which was not prepared
    assert_same(large, small)


@pytest.mark.parametrize("case", ["wegeft", "lora", "genft", "sas", "grft"])
def test_what_is_saved_is_what_was_swapped_in(case: str, tmp_path: Path) -> None:
    config = CASES[case](target_modules=TARGETS)
    model, other = adapter(config, 1), adapter(config, 2, tmp_path, **others(config))
    if not config.refuses_padding():
        prepare_model_for_compiled_hotswap(model, target_rank=HIGHEST)
    hotswap_adapter(model, tmp_path, "default")
    write(model, tmp_path)
    assert_same(load_adapter(net(), tmp_path), other)


@pytest.fixture
def compiler() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("case", REPRESENTATIVES)
def test_a_compiled_model_is_not_compiled_again(case: str, tmp_path: Path, compiler: CompileCounter) -> None:
    config = CASES[case](target_modules=TARGETS)
    large, small = adapter(config, 1, tmp_path / "large"), adapter(config, 2, tmp_path / "small", **others(config))
    model = copy.deepcopy(small)
    if not config.refuses_padding():
        prepare_model_for_compiled_hotswap(model, target_rank=HIGHEST)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    with torch.no_grad():
        compiled(rows())
        for name, one in {"large": large, "small": small}.items():
            hotswap_adapter(compiled, tmp_path / name, "default")
            with torch.compiler.set_stance("fail_on_recompile"):
                found = compiled(rows())
            torch.testing.assert_close(found, one(rows()))
    assert compiler.frame_count == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", ["wegeft", "genft", "grft"])
def test_what_eval_mode_keeps_is_computed_anew(case: str, mode: Any, tmp_path: Path) -> None:
    config = CASES[case](target_modules=TARGETS)
    first, second = adapter(config, 1), adapter(config, 2, tmp_path)
    with mode():
        first(rows())
        hotswap_adapter(first, tmp_path, "default")
        torch.testing.assert_close(first(rows()), second(rows()))


# What is in the model, what comes, each as a case with other fields, and what the message says.
MISFITS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], str]] = {
    "method": (("wegeft", {}), ("lora", {}), "peft_type: got PeftType.GENFT_LORA, expected PeftType.GENFT_WEGEFT"),
    "rank": (
        ("lora", {}),
        ("lora", {"rank_pattern": {"down": 5}}),
        r"r, rank_pattern: blocks.0.down has lora_A \[5, 8\], expected at most \[4, 8\]",
    ),
    "rank of shared factors": (
        ("wegeft", {}),
        ("wegeft", {"rank_pattern": {"0.q": 2}}),
        "r, rank_pattern: blocks.0.q and blocks.1.q share factors",
    ),
    "no room": (
        ("genft", {"individual_features": 0}),
        ("genft", {}),
        "generator_share_dim, individual_features, rank_pattern: blocks.0.q has specific",
    ),
    "padding": (("gift_mlp", {}), ("gift_mlp", {"r": 2}), 'r: got 2, expected 4, because norm_layer is "ln"'),
    "activation": (("genft", {}), ("genft_gelu", {}), "inner_activation: got 'gelu', expected 'none'"),
    "orientation": (("grft", {}), ("grft_column", {}), "orientation: got 'column', expected 'row'"),
    "sharing": (("wegeft", {}), ("wegeft_own", {}), "tied_modules: got None, expected 'type'"),
    "row blocks": (("lora", {}), ("lora_halves", {}), "enable_lora: got .*True, True.*, expected {}"),
    "scale before an activation": (
        ("genft_gelu", {}),
        ("genft_gelu", {"scaling": 0.5}),
        "blocks.0.q: scaling: 0.5 times the model's, expected the same because outer_activation is 'gelu'",
    ),
    "sign before an activation": (
        ("genft_vit", {"target_modules": ["down"]}),
        ("genft_vit", {"target_modules": ["down"], "scaling": -1}),
        "scaling: -1 times the model's, expected the same because outer_activation is 'leakyrelu'",
    ),
    "scale of a pair in both stages": (
        ("genft", {}),
        ("genft", {"scaling": 0.5}),
        "scaling: 0.5 times .* a square weight has one specific pair",
    ),
    "scales of shared factors": (
        ("wegeft", {}),
        ("wegeft", {"alpha_pattern": {"0.q": 2}}),
        "wegeft_alpha, alpha_pattern, wegeft_dropout: blocks.0.q and blocks.1.q share factors",
    ),
    "no scale": (("peanut", {"scaling": 0}), ("peanut", {}), "blocks.0.q: its scale in the model is 0"),
    "more layers": (
        ("lora", {"target_modules": ["q"]}),
        ("lora", {}),
        "target_modules: the adapter has blocks.0.down, blocks.1.down, expected",
    ),
    "not all layers that share": (
        ("wegeft", {}),
        ("wegeft", {"exclude_modules": ["blocks.1.q"]}),
        "target_modules: the adapter has blocks.0.q and not blocks.1.q, which share factors",
    ),
    "modules": (
        ("lora", {}),
        ("lora", {"modules_to_save": ["head"]}),
        r"modules_to_save: got \['head'\], expected None",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_refused_before_anything_changes(kind: str, tmp_path: Path) -> None:
    (mine, my_fields), (theirs, their_fields), message = MISFITS[kind]
    model = adapter(CASES[mine](target_modules=TARGETS), 1, **my_fields)
    adapter(CASES[theirs](target_modules=TARGETS), 2, tmp_path, **their_fields)
    state, fields = copy.deepcopy(model.state_dict()), model.peft_config["default"].to_dict()
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.peft_config["default"].to_dict() == fields


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    model = adapter(CASES["lora"](target_modules=TARGETS), 1, tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into blocks\.0\.q"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(ValueError, match=r"'default' is merged into blocks\.0\.q"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises(ValueError, match="adapter_name: got 'other'"):
        hotswap_adapter(model, tmp_path, "other")


def test_an_adapter_that_fsdp_shards_is_refused(tmp_path: Path) -> None:
    model = adapter(CASES["lora"](target_modules=TARGETS), 1, tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh(DEVICE, (1,)))
        for call in (
            lambda: hotswap_adapter(model, tmp_path, "default"),
            lambda: prepare_model_for_compiled_hotswap(model, target_rank=8),
        ):
            with pytest.raises(ValueError, match="sharded by FSDP, expected a model without it; see restore_adapter"):
                call()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("case", ["lora", "wegeft", "grft", "genft"])
def test_layers_that_the_adapter_lacks_get_no_update(case: str, tmp_path: Path) -> None:
    """For GenFT those of one shape, which share factors."""
    model = adapter(CASES[case](target_modules=TARGETS), 1)
    fewer = adapter(CASES[case](target_modules=["down"]), 2, tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    found = deltas(model)
    torch.testing.assert_close({name: found.pop(name) for name in deltas(fewer)}, deltas(fewer), rtol=1e-12, atol=0)
    assert len(found) == 2
    assert all(torch.equal(delta, torch.zeros_like(delta)) for delta in found.values())


PATTERNS = {
    "lora": {"rank_pattern": {"0.q": 2, "down": 5}, "alpha_pattern": {"1.q": 3}},
    "wegeft": {"rank_pattern": {"q": 2}, "alpha_pattern": {"q": 3}},
    "wegeft_own": {"rank_pattern": {"0.q": 2}, "alpha_pattern": {"1.q": 3}},
    "hira": {"rank_pattern": {"0.q": 2}},
    "genft_vit": {"rank_pattern": {"0.q": 0, "1.q": 1}},
    "genft_gelu": {"rank_pattern": {"0.q": 1}},
    "grft_column": {"k_pattern": {"0.q": 2}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_ranks_and_scales_of_single_layers(case: str, tmp_path: Path) -> None:
    config = CASES[case](target_modules=TARGETS)
    plain, patterned = (
        adapter(config, 1, tmp_path / "plain"),
        adapter(config, 2, tmp_path / "patterned", **PATTERNS[case]),
    )
    model = copy.deepcopy(patterned)
    prepare_model_for_compiled_hotswap(model, target_rank=HIGHEST)
    assert_same(model, patterned)
    for name, one in {"plain": plain, "patterned": patterned}.items():
        hotswap_adapter(model, tmp_path / name, "default")
        assert_same(model, one)


@pytest.mark.parametrize("outer", ["none", "relu", "leakyrelu"])
def test_scale_of_genft_where_factors_take_it(outer: str, tmp_path: Path) -> None:
    config = genft("gelu", outer, target_modules=["down"], individual_init_b="normal")
    model, other = adapter(config, 1), adapter(config, 2, tmp_path, scaling=0.3)
    hotswap_adapter(model, tmp_path, "default")
    assert_same(model, other)


def test_ranks_by_field(tmp_path: Path) -> None:
    config = CASES["genft"](target_modules=TARGETS)
    model, former = adapter(config, 1), adapter(config, 1)
    prepare_model_for_compiled_hotswap(model, target_rank={"generator_share_dim": 7})
    assert_same(model, former)
    fields = model.peft_config["default"]
    assert (fields.generator_share_dim, fields.individual_features) == (7, 2)


def test_modules_that_are_saved_whole_and_biases(tmp_path: Path) -> None:
    config = CASES["wegeft"](target_modules=TARGETS, modules_to_save=["head"], bias="all")
    model, other = adapter(config, 1), adapter(config, 2, r=2)
    save_adapter(other, tmp_path)
    before = addresses(model)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(rows()), other(rows()))
    assert addresses(model) == before


def test_injected_adapters(tmp_path: Path) -> None:
    config = CASES["wegeft"](target_modules=TARGETS)
    other = adapter(config, 2, tmp_path)
    model = randomize(inject_adapter_in_model(WeGeFTConfig(r=2, target_modules=TARGETS), net()))
    former = copy.deepcopy(model)
    prepare_model_for_compiled_hotswap(model, target_rank=HIGHEST)
    assert_same(model, former)
    hotswap_adapter(model, tmp_path, "default")
    assert_same(model, other)
    torch.testing.assert_close(model(rows()), other(rows()))


@pytest.mark.parametrize("tied", [True, False])
def test_stacked_experts(tied: bool, tmp_path: Path) -> None:
    """Of two projections and of one, which leaves the other without an update."""

    def made(seed: int, targets: list[str], **fields: Any) -> PeftModel:
        config = WeGeFTConfig(tied_experts=tied, target_modules=targets, **fields)
        return randomize(get_peft_model(moe("qwen3"), config), seed).eval()

    model, both = (made(seed, ["experts.gate_up_proj", "experts.down_proj"], r=seed) for seed in (1, 2))
    one = made(3, ["experts.down_proj"], r=2, wegeft_alpha=3)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    for other in (both, one):
        write(other, tmp_path)
        hotswap_adapter(model, tmp_path, "default")
        for mine, theirs in zip(stacks(model).values(), stacks(other).values(), strict=True):
            for projection in mine.projections:
                delta = mine.get_delta_weight("default", projection, 1)
                lacking = projection not in theirs.adapted()
                expected = torch.zeros_like(delta) if lacking else theirs.get_delta_weight("default", projection, 1)
                torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-7)


def test_a_prepared_adapter_is_as_it_was(tmp_path: Path) -> None:
    """In 16 bits with float32 factors, frozen or not, in train or eval mode, with its backend, and other adapters."""
    config = WeGeFTConfig(r=2, wegeft_alpha=4, target_modules=TARGETS, backend="reference")
    model = randomize(get_peft_model(net(torch.bfloat16), config))
    model.add_adapter("other", WeGeFTConfig(r=3, target_modules=["q"]))
    given = WeGeFTConfig(r=1)
    x = rows().bfloat16()
    before = model.train()(x), {name: p.requires_grad for name, p in model.named_parameters()}
    prepare_model_for_compiled_hotswap(model, target_rank=4, config={"more": given})
    assert before[1] == {name: p.requires_grad for name, p in model.named_parameters()}
    torch.testing.assert_close(model(x), before[0])
    for layer in adapted_layers(model.get_base_model(), "default").values():
        generator = layer.genft_generators["default"]
        assert generator.training
        assert generator.backend == "reference"
        assert {p.dtype for p in generator.adapter_parameters().values()} == {torch.float32}
    assert [one.r for one in (*model.peft_config.values(), given)] == [4, 4, 4]
    assert model.active_adapter == "default"
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    prepare_model_for_compiled_hotswap(model.eval(), target_rank=5)
    assert not any(module.training for module in model.modules())
    model.base_model.set_requires_grad("default", False)  # reaches what layers share
    assert not any(p.requires_grad for p in model.parameters())
    model.delete_adapter("default")
    assert not any(".default." in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("case", "fields", "options", "error", "message"),
    [
        ("lora", {}, {"target_rank": 3}, ValueError, "target_rank: got 3, expected at least 4, the adapter's r"),
        ("lora", {}, {"target_rank": 0}, ValueError, "target_rank: got 0"),
        ("lora", {}, {"target_rank": "8"}, TypeError, "target_rank: got '8'"),
        ("lora", {}, {"target_rank": {"k": 8}}, ValueError, "target_rank: got 'k', expected one of .'r'"),
        ("lora", {}, {"target_rank": 8, "config": LoraConfig()}, TypeError, "config: got LoraConfig"),
        ("lora", {}, {"target_rank": 8, "check_compiled": "no"}, ValueError, "check_compiled: got 'no'"),
        ("grft", {}, {"target_rank": 9}, ValueError, "k: got 9 for blocks.0.q"),
        ("grft", {"selection": "gradient"}, {"target_rank": 5}, ValueError, "no rows are selected yet"),
        (
            "gift_mlp",
            {},
            {"target_rank": 8},
            ValueError,
            "target_rank: got 8, expected the adapter's r, 4, because norm",
        ),
        ("gift_mlp_mixer", {}, {"target_rank": 8}, ValueError, 'because block is "mlp_mixer"'),
        ("gift_transformer", {}, {"target_rank": 7}, ValueError, "num_heads: got 2, expected a divisor of r = 7"),
        (
            "wegeft",
            {"rank_pattern": {"0.q": 2}},
            {"target_rank": 8},
            ValueError,
            "r, rank_pattern: blocks.0.q and blocks.1.q share factors if",
        ),
    ],
)
def test_what_cannot_be_prepared(
    case: str, fields: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = adapter(CASES[case](target_modules=TARGETS), 1, **fields)
    before = addresses(model)
    with pytest.raises(error, match=message):
        prepare_model_for_compiled_hotswap(model, **options)
    assert addresses(model) == before


COMPILED: dict[str, Callable[[Any], Any]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "module.compile": lambda model: model.compile(backend="eager") or model,
    "a part": lambda model: model.get_base_model().blocks[0].compile(backend="eager") or model,
}


@pytest.mark.parametrize("how", COMPILED)
def test_preparing_a_compiled_model(how: str) -> None:
    model = COMPILED[how](adapter(CASES["lora"](target_modules=TARGETS), 1))
    for check, expected in {
        "error": pytest.raises(ValueError, match=r"expected one before torch\.compile"),
        "warn": pytest.warns(UserWarning, match="will be compiled again"),
        "ignore": nullcontext(),
    }.items():
        with expected:
            prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled=check)


def test_without_an_adapter() -> None:
    with pytest.raises(TypeError, match="model: got Net, expected a module with adapters"):
        hotswap_adapter(net(), "adapter", "default")
    with pytest.raises(ValueError, match="No adapter layers found"):  # peft's words
        prepare_model_for_compiled_hotswap(net(), target_rank=8)


def test_selected_rows_come_with_the_adapter(tmp_path: Path) -> None:
    """Also into a model for which none have been selected."""
    config = CASES["grft"](target_modules=TARGETS)
    model, other = adapter(config, 1, selection="gradient"), adapter(config, 2, tmp_path, k=3)
    hotswap_adapter(model, tmp_path, "default")
    assert_same(model, other)


def test_peft_swaps_its_own_lora(tmp_path: Path) -> None:
    stock = LoraConfig(r=2, target_modules=TARGETS)
    other = randomize(get_peft_model(net(), LoraConfig(r=4, target_modules=TARGETS)), 2)
    other.save_pretrained(str(tmp_path))
    model = get_peft_model(net(), stock).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    hotswap_adapter(model, str(tmp_path), "default", torch_device=DEVICE)
    torch.testing.assert_close(model(rows()), other.eval()(rows()))


def test_an_adapter_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CASES["lora"](target_modules=TARGETS)
    model, other = adapter(config, 1), adapter(config, 2, tmp_path / "part")
    asked: list[Any] = []
    monkeypatch.setattr(
        hotswap, "snapshot_download", lambda name, **kwargs: asked.append((name, kwargs)) or str(tmp_path)
    )
    hotswap_adapter(model, "someone/adapter", "default", subfolder="part", revision="v1")
    assert_same(model, other)
    files = ["part/adapter_config.json", "part/adapter_model.safetensors"]
    assert asked == [("someone/adapter", {"allow_patterns": files, "revision": "v1"})]
