"""What a user of peft does with a model beyond `test_contract.py`, for every way of keeping parameters."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import inspect_matched_modules
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from genft_modules import FusedGenLinear, GIFTConfig, LoRAConfig, SharedGenerators, WeGeFTConfig
from tests.support.cases import CASES, IDS, KINDS, MODELS, llama, logits, randomize
from tests.support.device import DEVICE

cases = pytest.mark.parametrize("case", KINDS)
# A kind on one model, by turns, and the first kind on all: `test_contract.py` has every method on every architecture.
FIRST, *OTHERS = KINDS
by_turns = pytest.mark.parametrize(
    ("case", "name"), [*((FIRST, name) for name in MODELS), *zip(OTHERS, list(MODELS) * len(KINDS), strict=False)]
)
TARGETS = MODELS["llama"][1]


def adapt(case: str, name: str = "llama", *, start: bool = False, **fields) -> PeftModel:
    base, targets = MODELS[name]
    model = get_peft_model(base(), CASES[case](target_modules=targets, **fields))
    return model if start else randomize(model)


def layers(model: nn.Module) -> list[FusedGenLinear]:
    return [layer for _, layer in layers_of(model)]


def layers_of(model: nn.Module) -> list[tuple[str, FusedGenLinear]]:
    modules = getattr(model, "get_base_model", lambda: model)().named_modules()
    return [(name, module) for name, module in modules if isinstance(module, FusedGenLinear)]


@by_turns
def test_save_and_load(case, name, tmp_path):
    base, _ = MODELS[name]
    model = adapt(case, name)
    want = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    values = [tensor for tensor in saved.values() if tensor.is_floating_point()]  # the others are indices
    assert sum(tensor.numel() for tensor in values) == sum(p.numel() for p in trained.values())  # each once
    assert not any("default" in key for key in saved)

    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.peft_config["default"])
    assert config.peft_type == model.peft_config["default"].peft_type
    assert "backend" not in json.loads((tmp_path / "adapter_config.json").read_text())
    for low_memory in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), want)
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    loaded = PeftModel.from_pretrained(base(), tmp_path, adapter_name="mine", is_trainable=True)
    assert torch.equal(logits(loaded), want)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == sum(p.numel() for p in trained.values())


@cases
def test_state_dict_of_an_adapter(case):
    model, other = adapt(case), adapt(case, start=True)
    state = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@cases
def test_a_checkpoint_that_does_not_fit_is_refused(case, tmp_path):
    adapt(case).save_pretrained(tmp_path)
    wide = llama(head_dim=16)  # q_proj with twice the rows
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    changed = {next(name for name in ("r", "r_shared", "k", "generator_share_dim") if name in config): 5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    for load in (
        lambda: PeftModel.from_pretrained(llama(), tmp_path),
        lambda: PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True),
        lambda: llama().load_adapter(str(tmp_path)),
    ):
        with pytest.raises((ValueError, RuntimeError), match="mismatch"):
            load()
    if case == "lora":  # the others do not depend on N
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="shape mismatch"):
            PeftModel.from_pretrained(wide, tmp_path)


@by_turns
def test_merging_a_model(case, name):
    base, _ = MODELS[name]
    model = adapt(case, name)
    want, plain = logits(model), base().state_dict()
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
        assert model.get_model_status().merged_adapters == ["default"]
        model.unmerge_adapter()
        assert torch.equal(logits(model), want)
        assert model.get_model_status().merged_adapters == []
    kept = {key.replace("base_layer.", ""): tensor for key, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[key], tensor) for key, tensor in plain.items())

    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is type(base())
    assert list(merged.state_dict()) == list(plain)
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    unloaded = model.unload()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in unloaded.state_dict().items())
    assert not layers(unloaded)
    get_peft_model(unloaded, CASES[case](target_modules=MODELS[name][1]))  # and can be adapted again


@cases
def test_several_adapters(case, tmp_path):
    model = adapt(case)
    first = logits(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", CASES[case](target_modules=["q_proj", "o_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    randomize(model, seed=5)
    second = logits(model)
    assert not torch.allclose(first, second)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".default." in key)

    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    delta = {name: {} for name in ("default", "second")}
    for key, layer in model.get_base_model().named_modules():
        if isinstance(layer, FusedGenLinear):
            for name in layer.genft_generators:
                delta[name][key] = layer.get_delta_weight(name)
    plain = llama()
    with torch.no_grad():
        for deltas in delta.values():
            for key, value in deltas.items():
                plain.get_submodule(key).weight += value
    torch.testing.assert_close(logits(plain), both, rtol=1e-4, atol=1e-5)
    assert set(model.get_model_status().active_adapters) == {"default", "second"}

    model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), first)
    model.delete_adapter("third")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    assert not any("second" in key or "third" in key for key in model.state_dict())
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), first)


@cases
def test_copies_are_independent(case):
    model = adapt(case)
    want = logits(model)
    duplicate = copy.deepcopy(model)
    assert torch.equal(logits(duplicate), want)
    randomize(duplicate, seed=9)
    assert not torch.allclose(logits(duplicate), want)
    assert torch.equal(logits(model), want)


@cases
def test_half_precision_models_have_float32_adapters_unless_told(case, tmp_path):
    fields = {"target_modules": TARGETS}
    model = get_peft_model(llama().to(torch.bfloat16), CASES[case](**fields))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    randomize(model)
    assert logits(model).dtype == torch.bfloat16
    model(input_ids=IDS).logits.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)  # what peft cast is what the layers use
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), logits(model))
        got, want = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
        assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
    model = get_peft_model(llama().to(torch.bfloat16), CASES[case](**fields), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


@cases
def test_models_on_the_meta_device(case):
    model = get_peft_model(llama().to("meta"), CASES[case](target_modules=TARGETS))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.get_nb_trainable_parameters()[0] == adapt(case).get_nb_trainable_parameters()[0]


@cases
def test_other_modules_train_and_are_saved(case, tmp_path):
    base, _ = MODELS["bert"]
    model = adapt(case, "bert", modules_to_save=["classifier"])
    assert any("classifier" in key and p.requires_grad for key, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))
    want = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), want)


def test_a_saved_head_of_several_layers_is_unloaded():
    base, _ = MODELS["bert"]
    model = adapt("wegeft", "bert", modules_to_save=["pooler", "classifier"])
    want = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want)
    assert list(merged.state_dict()) == list(base().state_dict())


@pytest.mark.parametrize(
    ("case", "own"), [("wegeft", "wegeft_only"), ("gift", "gift_only"), ("lora", "lora_only"), ("genft", "genft_only")]
)
def test_biases_train_and_are_saved(case, own, tmp_path):
    for bias in ("all", own):
        model = randomize(adapt(case, "gpt2", bias=bias))
        trained = {key for key, p in model.named_parameters() if p.requires_grad and key.endswith("bias")}
        adapted = {key for key in trained if "base_layer" in key}
        assert len(adapted) == len(layers(model))
        assert (trained > adapted) if bias == "all" else (trained == adapted)
        model.save_pretrained(tmp_path / bias)
        loaded = PeftModel.from_pretrained(MODELS["gpt2"][0](), tmp_path / bias)
        assert torch.equal(logits(loaded), logits(model))


@cases
def test_transformers_own_adapters(case, tmp_path):
    plain = adapt(case)
    plain.save_pretrained(tmp_path)
    want = logits(plain)

    loaded = llama()
    loaded.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(loaded), want)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    model = llama()
    model.add_adapter(CASES[case](target_modules=TARGETS))
    torch.testing.assert_close(logits(model), logits(llama()))
    randomize(model)
    state = model.get_adapter_state_dict()
    assert {key.replace("base_model.model.", "") for key in get_peft_model_state_dict(plain)} == set(state)
    model.save_pretrained(tmp_path / "saved")
    again = llama()
    again.load_adapter(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))

    model.add_adapter(LoRAConfig(r=2, target_modules=["o_proj", "q_proj"]), adapter_name="lora")  # a second method
    model.set_adapter(["default", "lora"])
    assert model.active_adapters() == ["default", "lora"]
    randomize(model)
    both = logits(model)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), logits(llama()))
    model.enable_adapters()
    assert torch.equal(logits(model), both)
    model.delete_adapter("lora")
    assert not any("lora" in key.split(".") for key in model.state_dict())
    assert not torch.allclose(logits(model), both)


@pytest.mark.parametrize("case", ["wegeft", "gift_mlp", "genft_gelu", "grft"])  # one per form; the contract trains all
def test_trainer(case, tmp_path):
    model = adapt(case, start=True)
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        save_steps=2,
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    data = [{"input_ids": row, "labels": row} for row in IDS.cpu()]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trained = logits(model.eval())
    assert not torch.allclose(trained, logits(llama()))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "run" / "checkpoint-3")
    assert torch.equal(logits(loaded), trained)
    resumed = adapt(case, start=True)
    Trainer(resumed, arguments, train_dataset=data).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.eval()), trained)


def test_a_sequential_model_keeps_working():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    want = model(x)
    config = WeGeFTConfig(r=2, target_modules=["0", "2"])
    injected = inject_adapter_in_model(config, copy.deepcopy(model))
    assert isinstance(injected[-1], SharedGenerators)
    torch.testing.assert_close(injected(x), want)
    adapted = get_peft_model(model, config)
    assert len(model) == 3  # a PeftModel keeps what layers share in its tuner
    torch.testing.assert_close(adapted(x), want)
    assert len(adapted.merge_and_unload()) == 3


@pytest.mark.parametrize(
    ("fields", "adapted"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": r".*layers\.1\..*_proj"}, 7),
        ({"target_modules": TARGETS, "exclude_modules": ["k_proj"]}, 4),
        ({"target_modules": TARGETS, "layers_to_transform": [1]}, 3),
        ({"target_modules": TARGETS, "layers_to_transform": 0, "layers_pattern": "layers"}, 3),
        ({}, 4),  # the architecture's usual ones, q_proj and v_proj
    ],
)
def test_targets(fields, adapted):
    model = get_peft_model(llama(), GIFTConfig(r=2, block="mlp", **fields))
    assert len(layers(model)) == adapted
    model.add_adapter("second", GIFTConfig(r=2, block="mlp", **fields))  # adapters are not adapted themselves
    assert len(layers(model)) == adapted
    assert all(len(layer.genft_generators) == 2 for layer in layers(model))


@pytest.mark.filterwarnings("ignore:You are trying", "ignore:Already found")
def test_a_failure_leaves_the_model_as_it_was():
    model = llama()
    names = list(model.state_dict())
    with pytest.raises(TypeError, match="embed_tokens"):
        get_peft_model(model, WeGeFTConfig(target_modules=[r"lm_head", "embed_tokens"]))
    with pytest.raises(ValueError, match="tied_modules"):
        get_peft_model(model, WeGeFTConfig(target_modules="all-linear", tied_modules=[[".*"]]))
    assert list(model.state_dict()) == names
    adapted = randomize(get_peft_model(model, WeGeFTConfig(target_modules=["q_proj"])))
    want = logits(adapted)
    with pytest.raises(ValueError, match="tied_modules"):
        adapted.add_adapter("second", WeGeFTConfig(target_modules="all-linear", tied_modules=[[".*"]]))
    for fields, message in (
        ({"target_modules": ["nope"]}, "nope"),
        ({"target_modules": "all-linear", "tied_modules": [[".*"]]}, "tied_modules"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, WeGeFTConfig(**fields))  # would replace the adapter
        assert adapted.peft_config["default"].target_modules == {"q_proj"}
    assert torch.equal(logits(adapted), want)
    adapted.add_adapter("second", WeGeFTConfig(target_modules=["q_proj", "k_proj"]))
    assert torch.equal(logits(adapted), want)


def test_bad_targets_are_refused():
    with pytest.raises(NoMatchingPeftModuleError, match="nope"):
        get_peft_model(llama(), WeGeFTConfig(target_modules=["nope"]))
    with pytest.raises(TypeError, match=r"target_modules: model.embed_tokens: base_layer: got Embedding"):
        get_peft_model(llama(), WeGeFTConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), WeGeFTConfig())


@pytest.mark.parametrize("case", [case for case in KINDS if case != "genft_gelu"])  # whose ΔW has full rank
def test_conversion_by_peft(case, tmp_path):
    """The factors of ΔW, up to rounding."""
    model = adapt(case)
    assert model.supports_lora_conversion()
    rank = max(layer.low_rank_factors()[0].shape[0] for layer in layers(model))
    save_as_lora(tmp_path, model, rank=rank)
    lora = PeftModel.from_pretrained(llama(), tmp_path)
    assert lora.peft_config["default"].peft_type == PeftType.LORA
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-3, atol=1e-4)


@cases
def test_what_peft_says_of_a_model(case):
    """Every tuner layer is one that is adapted."""
    model, adapted = adapt(case), {name for name, _ in layers_of(adapt(case))}
    status = get_layer_status(model)
    assert {one.name.removeprefix("model.") for one in status} == adapted
    assert {(one.module_type, *one.requires_grad.values()) for one in status} == {("FusedGenLinear", True)}
    whole = get_model_status(model)
    assert whole.num_adapter_layers == len(adapted)
    assert whole.requires_grad == {"default": True}
    assert whole.devices == {"default": [DEVICE]}
    found = inspect_matched_modules(model.base_model)
    assert set(found["matched"]) == adapted
    assert not any("genft_shared" in name for name in found["unmatched"])
    state = get_base_model_state_dict(model)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in llama().state_dict().items()
    }
    model.delete_adapter("default")
    assert not any("genft_" in name for name in model.state_dict())


@cases
def test_a_compiled_model_is_adapted_like_any_other(case, tmp_path):
    """Factors are shared, counted, named and saved as in the model that is compiled."""
    plain, compiled = adapt(case), torch.compile(llama(), backend="eager")
    model = randomize(get_peft_model(compiled, CASES[case](target_modules=TARGETS)))
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    for one, folder in ((plain, "plain"), (model, "compiled")):
        one.save_pretrained(tmp_path / folder)
    want, found = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "compiled"))
    assert want.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in want.items())
    again = PeftModel.from_pretrained(torch.compile(llama(), backend="eager"), tmp_path / "plain")
    state = get_peft_model_state_dict(again)
    assert all(torch.equal(state[key], tensor) for key, tensor in want.items())
    injected = inject_adapter_in_model(CASES[case](target_modules=TARGETS), torch.compile(llama(), backend="eager"))
    assert not set_peft_model_state_dict(injected, want).unexpected_keys
    if case == FIRST:
        torch.testing.assert_close(logits(again), logits(plain))


@pytest.mark.filterwarnings("ignore:You are trying", "ignore:Already found")
@cases
def test_an_adapter_replaces_one_of_its_name(case, tmp_path):
    """peft's get_peft_model on a model that has one, and `PeftModel.from_pretrained` on what transformers loaded."""
    llama().save_pretrained(tmp_path / "base")
    trained = randomize(
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CASES[case](target_modules=TARGETS))
    )
    trained.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(trained))
    again = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trained))
    assert again.state_dict().keys() == trained.state_dict().keys()
    fresh = get_peft_model(again.get_base_model(), CASES[case](target_modules=["q_proj"]))
    torch.testing.assert_close(logits(fresh), logits(llama()))
    assert {name.rpartition(".")[2] for name, _ in layers_of(fresh)} == {"q_proj"}
    fresh.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged into"):
        get_peft_model(fresh.get_base_model(), CASES[case](target_modules=["q_proj"]))


@cases
def test_no_pickles(case, tmp_path):
    model = adapt(case)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="safe_serialization: got False, expected True"):
        randomize(model, seed=7).save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "adapter_model.bin").touch()  # another's
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.bin").exists()


@pytest.mark.parametrize("case", ["lora", "genft"])
def test_a_state_of_other_layers_is_warned_about(case):
    state = get_peft_model_state_dict(
        inject_adapter_in_model(CASES[case](target_modules=["q_proj", "k_proj"]), llama())
    )
    with pytest.warns(RuntimeWarning) as warned:
        inject_adapter_in_model(CASES[case](target_modules=["q_proj", "v_proj"]), llama(), state_dict=state)
    message = str(warned[0].message)
    assert re.search(r"state_dict contained these additional .*k_proj", message)
    assert re.search(r"PEFT config contained these additional .*v_proj", message)
