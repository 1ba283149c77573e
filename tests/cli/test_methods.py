"""Options become peft configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from genft_cli import methods
from genft_cli.console import UserError
from genft_cli.methods import learning_rate, peft_config
from genft_modules import METHODS

ROOT = Path(__file__).parents[2]


def test_names_are_those_of_the_library_and_a_few_more() -> None:
    assert set(methods.names()) == {*METHODS, "genft-gelu", "peft-lora", "full"}


@pytest.mark.parametrize("method", [*METHODS, "genft-gelu", "peft-lora"])
def test_every_method_makes_its_configuration(method: str) -> None:
    config = peft_config(method, target_modules=["q_proj"])
    assert config.target_modules == {"q_proj"}
    assert str(getattr(config.task_type, "value", config.task_type)) == "CAUSAL_LM"
    described = dict(methods.fields(method, ()))
    assert described.keys() < vars(config).keys()
    assert method in methods.STOCK or not any(text.startswith("see peft") for text in described.values())


def test_full_has_none() -> None:
    assert peft_config("full") is None
    assert methods.fields("full", ()) == []


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
        ({"method": "grft", "r": 3, "extra": {"k": 3}}, "--r and --k are mutually exclusive"),
        ({"method": "sas", "r": 3, "extra": {"r_shared": 3}}, "--r and --r_shared are mutually exclusive"),
        ({"method": "lora", "extra": {"rr": 1}}, "--rr: lora has no such field; it has .*lora_alpha"),
        ({"method": "gift", "extra": {"block": "blok"}}, "--method gift: .*blok"),
        ({"method": "full", "r": 3}, "--r: full"),
        ({"method": "peft-lora", "backend": "triton"}, "--backend triton: peft-lora"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft_config(**options)


def test_learning_rates_are_those_of_the_documentation() -> None:
    """A row per method, a column per size of model."""
    text = (ROOT / "docs/guides/choose.md").read_text().partition("## Learning rates")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    sizes = (1e6, 1e8, 1e9, 7e9, 7e10)
    assert len(rows[0]) == 1 + len(sizes) == 1 + len(methods.LR_FACTORS)
    for names, *rates in rows[2:]:
        for name in names.replace("`", "").split(", "):
            assert [float(rate) for rate in rates] == [learning_rate(name, size) for size in sizes]
    assert {name for row in rows[2:] for name in row[0].replace("`", "").split(", ")} == set(methods.names())
