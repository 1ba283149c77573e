"""Configs: what they refuse, how they are saved, how peft knows them."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from genft_modules import (
    METHODS,
    GenFTConfig,
    GenFTModel,
    GIFTConfig,
    GRFTConfig,
    HiRAConfig,
    LoRAConfig,
    PeanutConfig,
    SaSConfig,
    WeGeFTConfig,
)

ALL = list(METHODS.values())


def rank(config) -> str:
    """The field of the rank."""
    return {GenFTConfig: "generator_share_dim", SaSConfig: "r_shared", GRFTConfig: "k"}.get(config, "r")


@pytest.mark.parametrize("config", ALL)
def test_peft_knows_the_method(config, tmp_path):
    fields = {"target_modules": ["b", "a"], "exclude_modules": ["c"], "backend": "reference", rank(config): 3}
    original = config(**fields)
    peft_type = original.peft_type
    assert (peft_type, peft_type.value, peft_type.name) == (f"GENFT_{config.method.upper()}",) * 3
    assert PEFT_TYPE_TO_CONFIG_MAPPING[str.__str__(peft_type)] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is GenFTModel
    original.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is config
    assert loaded.target_modules == {"a", "b"}
    assert loaded.backend == "auto"
    assert "backend" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded.backend = "reference"
    assert loaded == original
    assert copy.deepcopy(original).peft_type == peft_type


def test_tied_modules_survive_saving(tmp_path):
    for tied in ("type", None, [["a", "b"], ["c"]]):
        WeGeFTConfig(tied_modules=tied).save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).tied_modules == tied


REFUSED = [
    (ValueError, ": got 0, expected an integer >= 1", lambda config: config(**{rank(config): 0})),
    (TypeError, ": got 2.0, expected an integer", lambda config: config(**{rank(config): 2.0})),
    (TypeError, ": got True, expected an integer", lambda config: config(**{rank(config): True})),
    (TypeError, "target_modules: got 3, expected a list", lambda config: config(target_modules=3)),
    (TypeError, "exclude_modules: got ", lambda config: config(exclude_modules=[1])),
    (ValueError, "bias: got 'some', expected one of", lambda config: config(bias="some")),
    (ValueError, "backend: got 'cuda', expected one of", lambda config: config(backend="cuda")),
    (ValueError, "layers_to_transform: got 1", lambda config: config(target_modules="a.*", layers_to_transform=1)),
    (ValueError, "layers_pattern: got 'h'", lambda config: config(target_modules=["a"], layers_pattern="h")),
    (ValueError, "Invalid task type", lambda config: config(task_type="PAINTING")),
]


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize(("error", "message", "make"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_every_method_refuses(config, error, message, make):
    with pytest.raises(error, match=message):
        make(config)


@pytest.mark.parametrize(
    ("config", "fields", "error", "message"),
    [
        (WeGeFTConfig, {"wegeft_dropout": 1.0}, ValueError, "wegeft_dropout: got 1.0, expected 0 <="),
        (WeGeFTConfig, {"wegeft_dropout": "a"}, TypeError, "wegeft_dropout: got 'a', expected a number"),
        (WeGeFTConfig, {"wegeft_alpha": None}, TypeError, "wegeft_alpha: got None"),
        (WeGeFTConfig, {"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]: got 0"),
        (WeGeFTConfig, {"alpha_pattern": 3}, TypeError, "alpha_pattern: got 3, expected a dict"),
        (WeGeFTConfig, {"tied_modules": "layer"}, TypeError, "tied_modules: got 'layer', expected 'type', None or"),
        (WeGeFTConfig, {"tied_modules": ["q_proj"]}, TypeError, "tied_modules: got"),
        (WeGeFTConfig, {"tied_modules": [[]]}, TypeError, "tied_modules: got"),
        (LoRAConfig, {"lora_dropout": -0.1}, ValueError, "lora_dropout: got -0.1"),
        (LoRAConfig, {"init_lora_weights": "pissa"}, ValueError, "init_lora_weights: got 'pissa'"),
        (GIFTConfig, {"block": "cnn"}, ValueError, "block: got 'cnn', expected one of"),
        (GIFTConfig, {"block_kwargs": []}, TypeError, "block_kwargs: got"),
        (GIFTConfig, {"block_kwargs": {"mlp_ratio": 2}}, ValueError, r"got 'mlp_ratio' for .*act_layer"),
        (GIFTConfig, {"block_kwargs": {"act_layer": "relu"}}, ValueError, "act_layer: got 'relu'"),
        (GIFTConfig, {"block": "mlp", "block_kwargs": {"norm_layer": "rms"}}, ValueError, "norm_layer: got 'rms'"),
        (GIFTConfig, {"block": "mlp", "block_kwargs": {"mlp_ratio": 0}}, ValueError, "mlp_ratio: got 0"),
        (GIFTConfig, {"block": "mlp", "block_kwargs": {"num_blocks": 1.5}}, TypeError, "num_blocks: got 1.5"),
        (
            GIFTConfig,
            {"r": 3, "block": "transformer", "block_kwargs": {"num_heads": 2}},
            ValueError,
            "num_heads: got 2",
        ),
        (GIFTConfig, {"enable_gift": [True]}, TypeError, "enable_gift: got"),
        (GIFTConfig, {"enable_gift": {"qkv": "qv"}}, TypeError, r"enable_gift\['qkv'\]: got 'qv'"),
        (GIFTConfig, {"enable_gift": {"qkv": [False]}}, ValueError, "at least one True"),
        (GRFTConfig, {"orientation": "rows"}, ValueError, "orientation: got 'rows', expected one of"),
        (GRFTConfig, {"selection": "largest"}, ValueError, "selection: got 'largest', expected one of .*'random'"),
        (GRFTConfig, {"k_pattern": {"q": 0}}, ValueError, r"k_pattern\['q'\]: got 0"),
        (GRFTConfig, {"penalty": -1}, ValueError, "penalty: got -1, expected a number >= 0"),
        (GRFTConfig, {"penalty": "1"}, TypeError, "penalty: got '1', expected a number"),
        (GRFTConfig, {"penalty_modules": 3}, TypeError, "penalty_modules: got 3, expected a list"),
        (PeanutConfig, {"depth": -1}, ValueError, "depth: got -1, expected an integer >= 0"),
        (PeanutConfig, {"act_fn": "swoosh"}, ValueError, "act_fn: got 'swoosh', expected one of .*'relu'"),
        (PeanutConfig, {"scaling": "1"}, TypeError, "scaling: got '1', expected a number"),
        (PeanutConfig, {"init_weights": "yes"}, TypeError, "init_weights: got 'yes', expected True or False"),
        (HiRAConfig, {"hira_dropout": 1.0}, ValueError, "hira_dropout: got 1.0, expected 0 <= hira_dropout < 1"),
        (HiRAConfig, {"init_weights": "zero"}, ValueError, "init_weights: got 'zero', expected True, False or 'gauss"),
        (HiRAConfig, {"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]: got 0"),
        (SaSConfig, {"r_specific": 0}, ValueError, "r_specific: got 0, expected an integer >= 1"),
        (SaSConfig, {"chunk_dim": 0}, ValueError, "chunk_dim: got 0, expected an integer >= 1"),
        (SaSConfig, {"hidden_dim": 1.5}, TypeError, "hidden_dim: got 1.5, expected an integer"),
        (SaSConfig, {"embedding_dim": True}, TypeError, "embedding_dim: got True, expected an integer"),
        (SaSConfig, {"scaling": "1"}, TypeError, "scaling: got '1', expected a number"),
        (GenFTConfig, {"individual_features": -1}, ValueError, "individual_features: got -1, expected an integer >= 0"),
        (GenFTConfig, {"individual_features": False}, TypeError, "individual_features: got False"),
        (GenFTConfig, {"rank_pattern": {"q": -1}}, ValueError, r"rank_pattern\['q'\]: got -1"),
        (GenFTConfig, {"individual_init_a": "zero_update"}, ValueError, "individual_init_a: got 'zero_update'"),
        (GenFTConfig, {"individual_init_b": "ones"}, ValueError, "individual_init_b: got 'ones', .*'zero_update'"),
        (
            GenFTConfig,
            {"individual_init_b": "zero_update", "outer_activation": "relu"},
            ValueError,
            "individual_init_b: got 'zero_update', .* zero gradient at 0",
        ),
        (GenFTConfig, {"ratio_W0": "1"}, TypeError, "ratio_W0: got '1'"),
        (GenFTConfig, {"scaling": None}, TypeError, "scaling: got None"),
        (GenFTConfig, {"drop": 1}, ValueError, "drop: got 1, expected 0 <= drop < 1"),
        (GenFTConfig, {"inner_activation": "silu"}, ValueError, "inner_activation: got 'silu', .*'leakyrelu'"),
        (GenFTConfig, {"outer_activation": 3}, ValueError, "outer_activation: got 3"),
        (GenFTConfig, {"stages": "both"}, ValueError, "stages: got 'both', .*'column_row'"),
        (GenFTConfig, {"orientation": "gpt"}, ValueError, "orientation: got 'gpt'"),
        (GenFTConfig, {"ratio_on": "bias"}, ValueError, "ratio_on: got 'bias'"),
        (GenFTConfig, {"generator_bias": "none"}, TypeError, "generator_bias: got 'none', expected True or False"),
        (GenFTConfig, {"individual_per_block": 1}, TypeError, "individual_per_block: got 1"),
        (GenFTConfig, {"enable_genft": {"qkv": []}}, ValueError, "at least one True"),
    ],
)
def test_a_method_refuses(config, fields, error, message):
    with pytest.raises(error, match=message):
        config(**fields)


def numbers(config) -> dict[str, str]:
    """The fields of a method that are one number, and of which type."""
    return {
        field.name: str(field.type)
        for field in dataclasses.fields(config)
        if str(field.type) in ("int", "float", "bool")
    }


@pytest.mark.parametrize("config", ALL)
def test_every_number_has_bounds(config):
    assert numbers(config)
    for name, kind in numbers(config).items():
        for value in (float("nan"), float("inf"), -float("inf"), 10**9 if kind == "int" else 10**400, -(10**400)):
            with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*, expected "):
                config(**{name: value})
        for value in ("1", None, [], {}, [[[1]]]):
            with pytest.raises(TypeError, match=f"^{name}: got .*, expected "):
                config(**{name: value})


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_mapping", ["LlamaForCausalLM"]),
        ("auto_mapping", {"base_model_class": 3}),
        ("base_model_name_or_path", "a\x1b[31m"),
        ("base_model_name_or_path", 3),
        ("revision", {}),
        ("task_type", ["CAUSAL_LM"]),
        ("inference_mode", "yes"),
        ("target_modules", {"q_proj": 1}),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", [10**9]),
        ("layers_to_transform", "1"),
        ("layers_pattern", 3),
    ],
)
def test_fields_of_peft_are_checked_too(config, name, value):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}(\[.*\])?: got .*, expected "):
        config(**{name: value})


@pytest.mark.parametrize(
    "value",
    ["x" * 3 * 10**6, "\x1b]0;x\x07\n" * 50, [["x"] * 99] * 99, {"a\n": "\x1b"}, 10**5000],
    ids=["long", "control", "nested", "keys", "digits"],
)
def test_messages_are_one_short_line(value):
    for config in ALL:
        for field in dataclasses.fields(config):
            message = ""
            try:
                config(**{field.name: value})
            except (ValueError, TypeError) as error:
                message = f"{error}."
            assert (message.isprintable(), len(message) <= 500) == (True, True)


def test_depth_is_bounded():
    with pytest.raises(ValueError, match="depth: got 1000000000, expected an integer <= 256"):
        PeanutConfig(depth=10**9)
    with pytest.raises(ValueError, match="num_blocks: got 1000000000, expected a positive number, at most 256"):
        GIFTConfig(block="mlp", block_kwargs={"num_blocks": 10**9})
    with pytest.raises(ValueError, match=r"mlp_ratio: got nan"):
        GIFTConfig(block="mlp", block_kwargs={"mlp_ratio": float("nan")})
