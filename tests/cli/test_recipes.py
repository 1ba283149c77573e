"""Options become peft configurations."""

from __future__ import annotations

import pytest

from genft_cli.console import UserError
from genft_cli.recipes import RECIPES, methods, parse_field, peft_config
from genft_modules import METHODS


def test_methods() -> None:
    assert {"wegeft", "gift", "lora", "peft-lora", "full"} <= set(methods())
    assert set(RECIPES) <= set(methods())


@pytest.mark.parametrize("method", [*METHODS, "genft-gelu", "peft-lora"])
def test_every_method_makes_its_configuration(method: str) -> None:
    config = peft_config(method, target_modules=["q_proj"])
    assert config.target_modules == {"q_proj"}
    assert str(getattr(config.task_type, "value", config.task_type)) == "CAUSAL_LM"


def test_full_has_none() -> None:
    assert peft_config("full") is None


def test_options_go_to_the_fields_of_the_method() -> None:
    config = peft_config("wegeft", r=4, dropout=0.25, extra={"tied_modules": None}, backend="reference")
    assert (config.r, config.wegeft_alpha, config.wegeft_dropout) == (4, 8, 0.25)
    assert (config.tied_modules, config.backend) == (None, "reference")
    assert peft_config("wegeft").wegeft_alpha == 128
    config = peft_config("grft", r=4, extra={"orientation": "column"})
    assert (config.k, config.orientation) == (4, "column")
    config = peft_config("peft-lora", r=4, alpha=3, dropout=0.5)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 3, 0.5)


def test_genft_and_sas_have_their_rank_in_two_parts_and_genft_a_variant() -> None:
    config = peft_config("genft-gelu", r=5, dropout=0.25)
    assert (config.generator_share_dim, config.individual_features, config.drop) == (3, 2, 0.25)
    assert (config.inner_activation, config.outer_activation) == ("gelu", "gelu")
    config = peft_config("genft", extra={"outer_activation": "tanh", "individual_features": 3})
    assert (config.generator_share_dim, config.individual_features, config.outer_activation) == (8, 3, "tanh")
    config = peft_config("sas", r=5)
    assert (config.r_shared, config.r_specific) == (3, 2)
    with pytest.raises(UserError, match="--alpha: genft has no such setting"):
        peft_config("genft", alpha=2)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["layers.0.mlp.up_proj"], {"layers.0.mlp.up_proj"}),
        (["all-linear"], "all-linear"),
        ([".*(q|v)_proj"], ".*(q|v)_proj"),
    ],
)
def test_target_modules(names: list[str], expected: object) -> None:
    assert peft_config("lora", target_modules=names).target_modules == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorra"}, "--method lorra: unknown; choose from wegeft, gift"),
        ({"method": "wegeft", "r": 0}, "--r 0"),
        ({"method": "wegeft", "dropout": 1.0}, "--dropout 1.0"),
        ({"method": "gift", "alpha": 2.0}, "--alpha: gift has no such setting"),
        ({"method": "grft", "alpha": 2.0}, "--alpha: grft has no such setting"),
        ({"method": "gift", "dropout": 0.1}, "--dropout: gift has no such setting"),
        ({"method": "lora", "extra": {"rr": 1}}, "--config rr: lora has no such field; it has .*lora_alpha"),
        ({"method": "gift", "extra": {"block": "blok"}}, "--method gift: .*blok"),
        ({"method": "full", "r": 3}, "--r: full"),
        ({"method": "full", "target_modules": ["q"]}, "--target-modules: full"),
        ({"method": "full", "extra": {"x": 1}}, "--config: full"),
        ({"method": "peft-lora", "backend": "triton"}, "--backend triton: peft-lora"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft_config(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("block=mlp", ("block", "mlp")),
        ("r=8", ("r", 8)),
        ("x=1e-3", ("x", 1e-3)),
        ("x=true", ("x", True)),
        ("x=None", ("x", None)),
        ("x=null", ("x", None)),
        ("x=", ("x", "")),
        ('tied_modules=[["q_proj", "k_proj"]]', ("tied_modules", [["q_proj", "k_proj"]])),
        ("x=a=b", ("x", "a=b")),
    ],
)
def test_parse_field(text: str, expected: tuple) -> None:
    assert parse_field(text) == expected


@pytest.mark.parametrize("text", ["block", "=3"])
def test_parse_field_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_field(text)
