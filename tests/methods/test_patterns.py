"""Regular expressions for names of layers: what is refused before it is matched, and what must not be."""

from __future__ import annotations

import re
import time

import pytest
from peft import get_peft_model, inject_adapter_in_model
from peft.utils.other import get_pattern_key

from genft_modules import LoRAConfig, WeGeFTConfig
from genft_modules.methods.patterns import _Steps, _TooMany, check_matching, end, fits, pattern_value
from tests.support.cases import llama
from tests.support.malformed import CATASTROPHES, NO_EXPRESSIONS

# As long as those of large models: 80 layers of 256 experts.
NAMES = [
    f"model.language_model.layers.{layer}.{part}"
    for layer in range(80)
    for part in ("self_attn.q_proj", "self_attn.v_proj", *(f"mlp.experts.{i}.down_proj" for i in range(0, 256, 5)))
]
ORDINARY = (
    "q_proj",
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(1[0-9]|2[0-3])\..*\.(q|k|v|o)_proj$",
    r"^(?!.*vision).*(?:q_proj|v_proj)$",
    r"(?:[^.]+\.)*self_attn\.[qv]_proj",
    r"(\w+\.)+\w+",
    r"(?i).*\.Q_PROJ",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj)))",
    "|".join(re.escape(name) for name in NAMES),
    r"(?P<part>q|v)_proj",
    r".*(?<=self_attn\.)q_proj",
)


@pytest.mark.parametrize("pattern", ORDINARY, ids=lambda pattern: pattern[:40])
def test_ordinary_patterns_pass_and_soon(pattern):
    config = LoRAConfig(target_modules=pattern)
    start = time.process_time()
    check_matching(config, NAMES)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("pattern", CATASTROPHES, ids=lambda pattern: pattern[:40])
def test_a_pattern_that_takes_for_ever_is_refused_soon(pattern):
    start = time.process_time()
    for fields in ({"target_modules": pattern}, {"rank_pattern": {pattern: 3}}, {"enable_lora": {pattern: [True]}}):
        config = LoRAConfig(**fields)
        with pytest.raises(ValueError, match=f"{next(iter(fields))}: got .*expected a regular expression without"):
            check_matching(config, NAMES)
    assert time.process_time() - start < 6


@pytest.mark.parametrize("pattern", NO_EXPRESSIONS)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "enable_wegeft", "tied_modules"]
)
def test_what_is_no_expression_is_refused_when_the_config_is_made(field, pattern):
    value = {"rank_pattern": {pattern: 3}, "enable_wegeft": {pattern: [True]}, "tied_modules": [["q_proj"], [pattern]]}
    with pytest.raises(ValueError, match=f"{field}: got .*, expected a regular expression"):
        WeGeFTConfig(**{field: value.get(field, pattern)})


def test_too_long_an_expression_is_refused():
    with pytest.raises(ValueError, match="target_modules: got an expression of 5003 characters, expected at most 4096"):
        LoRAConfig(target_modules="(" + "a" * 5001 + ")")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.*)*x"},
        {"target_modules": ["q_proj"], "exclude_modules": "(.*)*x"},
        {"target_modules": ["q_proj"], "modules_to_save": ["(.*)*x"]},
        {"target_modules": ["q_proj"], "layers_pattern": ["(.*)*x"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "rank_pattern": {"(.*)*x": 3}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"(.*)*x": 3}},
        {"target_modules": ["q_proj"], "enable_wegeft": {"(.*)*x": [True]}},
        {"target_modules": ["q_proj"], "tied_modules": [["(.*)*x"]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("inject", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_every_way_into_a_model_asks_first(fields, inject):
    model = llama()
    before = [(name, id(module)) for name, module in model.named_modules()]
    field = [name for name in fields if name != "layers_to_transform"][-1]
    with pytest.raises(ValueError, match=f"{field}: got .*could take very long"):
        inject(model, WeGeFTConfig(**fields))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_the_count_is_no_less_than_what_the_engine_does():
    """(a|a)* against n characters: 2 to the power of n ways, counted without walking them."""
    left = _Steps("a" * 10, 10**9).of("(a|a)*x")
    assert 2**10 <= 10**9 - left <= 2**14
    with pytest.raises(_TooMany):
        _Steps("a" * 40, 10**9).of("(a|a)*x")
    assert 10**6 - _Steps("a" * 200, 10**6).of("a*x") < 50_000


def test_patterns_match_as_in_peft():
    patterns = {"q_proj": 1, r"layers\.1\..*": 2, "^down_proj": 3, r"mlp\.experts\.5\.down_proj": 4}
    for name in NAMES[::7]:
        key = get_pattern_key(list(patterns), name)
        assert pattern_value(patterns, name, 0) == patterns.get(key, 0)
        assert fits("q_proj", name) == bool(re.match(end("q_proj"), name))
