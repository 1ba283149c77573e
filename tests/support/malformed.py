"""Adapters on disk that are wrong in one way each, drawn from a seed: what strangers, crashes and other programs leave.

`malform` writes one into a directory. What it draws is wrong for every method and model, so no case may load.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from genft_modules.methods import METHODS

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
Tensors = dict[str, torch.Tensor]
NAN, INFINITY = float("nan"), float("inf")
CONTROL = "\x1b[31mred\x1b[0m\nline\ttwo\x07\u202e"
NESTED: Any = [[[[[[[[["deep"]]]]]]]]]

# Each takes for ever, or long enough to look like it, in names of layers.
CATASTROPHES = (
    "([a-z._0-9]+)+!",
    "(.*)*x",
    "(.+)+x",
    "((.*)*)*x",
    "(.|.)*x",
    "([a-z_.\\d]+)*!",
    "(.*.*.*.*.*.*)x",
    ".*.*.*.*.*.*.*.*.*x",
    "(.?){40}x",
    "(?:.?" + ")(?:.?".join([""] * 30) + ")x",
    "(a*)*(b*)*(.*)*x",
    "(?=(.+)+x).*",
    "(?!(.+)+x).*",
    "(|){1000000000}",
    "(?:){4000000000}",
    "(?:(?:(?:.{0,9}){0,9}){0,9}){0,9}x",
)
NO_EXPRESSIONS = ("(", "[", "*", "a{2,1}", "(?P<x>", "(?<=a*)b", "\\", "(?P<x>a)(?P<x>a)", "a{99999999999999999999}")
LONG = "(" * 3000 + "a" + ")" * 3000

# What no field of a kind takes.
ANYTHING = ("\x1b[2J", NESTED, {"a": {"b": {}}}, [1, 2], [None], CONTROL)
WRONG: dict[str, tuple[Any, ...]] = {
    "int": (*ANYTHING, -1, 10**9, 10**30, 10**400, 1.5, "8", True, None, NAN, INFINITY, {}, [], "1e9"),
    "float": (*ANYTHING, NAN, INFINITY, -INFINITY, "1", None, [], {}, 1e300, 10**400, -(10**31), True, "nan"),
    "bool": (*ANYTHING, "yes", 1, 0, None, [], {}, 1.0, "true"),
    "choice": (*ANYTHING, 3, [], {}, "no such choice", "x" * 100_000, 1.5, True, "", "é" * 3),
    "dict": (*(value for value in ANYTHING if value != {"a": {"b": {}}}), 3, "r", True, 1.5, {"(": 1}),
    "text": (*ANYTHING, 3, 1.5, True, {}, [], "x" * 100_000),
    "names": (*ANYTHING, 3, 1.5, True, {"q_proj": 1}, [["q_proj"]], [3], ["q_proj", None]),
    "layers": (*(value for value in ANYTHING if value != [1, 2]), "1", -1, 1.5, True, [-1], [10**9], {"1": 1}, 10**400),
    "mapping": (*ANYTHING, 3, [], ["a"], "a", True, {"base_model_class": 3}, {"base_model_class": [1]}, {CONTROL: "a"}),
    "type": (*ANYTHING, 3, None, [], {}, True, 1.5, "GENFT_NEW", "x" * 100_000, "GENFT", "XLORA_", ""),
}
KINDS = {
    "peft_type": "type",
    "task_type": "text",
    "auto_mapping": "mapping",
    "base_model_name_or_path": "text",
    "revision": "text",
    "peft_version": "text",
    "inference_mode": "bool",
    "target_modules": "names",
    "exclude_modules": "names",
    "modules_to_save": "names",
    "penalty_modules": "names",
    "layers_to_transform": "layers",
    "layers_pattern": "names",
    "bias": "choice",
    "tied_modules": "choice",
}
MATCHED = ("target_modules", "exclude_modules", "penalty_modules")  # whole names, if they are strings


def kind_of(field: dataclasses.Field[Any]) -> str:
    if field.name in KINDS:
        return KINDS[field.name]
    annotation = str(field.type)
    return "dict" if annotation.startswith("dict") else "choice" if "str" in annotation else annotation


def wrong_value(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    kinds = {field.name: kind_of(field) for field in _fields_of(fields)}
    name = random_.choice(sorted(kinds))
    value = random_.choice(WRONG[kinds[name]])
    if kinds[name] == "names" and isinstance(value, str):
        value = [value, 3]  # as an expression it may be one
    fields[name] = value
    return f"{name} = {value!r}"[:120] if value != 10**400 else f"{name} = 10**400"


def wrong_expression(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    """A pattern that takes for ever or is none, wherever a method has one."""
    pattern = random_.choice((*CATASTROPHES, *NO_EXPRESSIONS, LONG))
    names = [field.name for field in _fields_of(fields)]
    places = [name for name in names if name in MATCHED or name.endswith("_pattern") or name.startswith("enable_")]
    name = random_.choice(sorted({*places, "modules_to_save", *({"tied_modules"} & set(names))} - {"layers_pattern"}))
    if name in MATCHED:
        fields[name] = pattern
    elif name == "modules_to_save":
        fields[name] = [pattern]
    elif name == "tied_modules":
        fields[name] = [["q_proj"], [pattern]]
    else:
        fields[name] = {pattern: [True, False] if name.startswith("enable_") else 3}
    return f"{name}: {pattern[:60]!r}"


def no_such_field(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    """A field of another method, and the method's rank is wrong with it."""
    rank = next(name for name in ("r", "k", "generator_share_dim", "r_shared") if name in fields)
    fields[random_.choice((CONTROL, "x" * 10_000, "self", "kwargs", "__class__"))] = random_.choice(
        (1, NESTED, CONTROL)
    )
    fields[rank] += 1
    return "an unknown field, and another rank"


def missing(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    for key in random_.sample(sorted(tensors), random_.randint(1, len(tensors) - 1)):
        del tensors[key]
    return f"{len(tensors)} tensors left"


def extra(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    key = random_.choice(
        ("odd", f"{PREFIX}odd", CONTROL, f"{PREFIX}{CONTROL}", "x" * 5000, "", f"{PREFIX}lm_head.bias")
    )
    tensors[key] = torch.zeros(random_.choice(((), (0,), (2, 3))))
    return f"extra {key[:40]!r}"


def renamed(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    key = random_.choice(sorted(tensors))
    place = random_.randrange(len(key))
    new = key[:place] + random_.choice(("\x00", "\x1b", "é", "X", "..", "\n")) + key[place + 1 :]
    tensors[new] = tensors.pop(key)
    return f"{key} is {new!r}"


def prefixes(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    some = set(random_.sample(sorted(tensors), random_.randint(1, len(tensors))))
    change: Callable[[str], str] = random_.choice(
        (lambda key: PREFIX + key, lambda key: key.removeprefix(PREFIX), lambda key: f"model.{key}", str.upper)
    )
    changed = {change(key) if key in some else key: tensor for key, tensor in tensors.items()}
    tensors.clear()
    tensors.update(changed)
    return f"prefixes of {len(some)}"


def reshaped(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    key = random_.choice(sorted(tensors))
    old = tensors[key]
    changes = (
        old[:1].repeat(len(old) + 1, *[1] * (old.dim() - 1)),
        old[None],
        old.flatten()[:0],
        old[..., None],
        old[0],
    )
    tensors[key] = random_.choice([new for new in changes if new.shape != old.shape]).contiguous().clone()
    return f"{key}: {tuple(old.shape)} is {tuple(tensors[key].shape)}"


def retyped(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    key = random_.choice(sorted(tensors))
    whole = (torch.int32, torch.int64, torch.bool, torch.uint8)
    tensors[key] = tensors[key].to(random_.choice(whole) if tensors[key].is_floating_point() else torch.float32)
    return f"{key}: {tensors[key].dtype}"


def not_finite(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    key = random_.choice(sorted(key for key, tensor in tensors.items() if tensor.is_floating_point()))
    tensors[key].view(-1)[random_.randrange(tensors[key].numel())] = random_.choice((NAN, INFINITY, -INFINITY))
    return f"{key} is not finite"


def of_another_method(random_: random.Random, fields: dict[str, Any], tensors: Tensors) -> str:
    others = [f"GENFT_{name.upper()}" for name in METHODS] + ["LORA", "IA3", "OFT", "VERA", "ADALORA"]
    fields["peft_type"] = random_.choice([name for name in others if name != fields["peft_type"]])
    return f"peft_type {fields['peft_type']}"


IN_MEMORY = (
    *(wrong_value,) * 6,
    *(wrong_expression,) * 3,
    no_such_field,
    missing,
    extra,
    renamed,
    prefixes,
    reshaped,
    retyped,
    not_finite,
    of_another_method,
)


def truncated(random_: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random_.randrange(len(content) - 1)])


def garbage(random_: random.Random, path: Path) -> None:
    path.write_bytes(random_.choice((b"", b"\0" * 64, b"\xff" * 999, random_.randbytes(4000), b"\x1b]0;x\x07" * 99)))


def header_length(random_: random.Random, path: Path) -> None:
    length = random_.choice((0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, 7))
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def header(random_: random.Random, path: Path) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + size])
    key = random_.choice([key for key in fields if key != "__metadata__"])
    entry = fields[key]
    change = random_.randrange(8)
    if change == 0:
        entry["data_offsets"] = random_.choice(([0, 10**12], [8, 4], [-1, 4], [0], "0", [NAN, 1], [2**63, 2**64]))
    elif change == 1:
        entry["shape"] = random_.choice(([2**40, 2**40], [-1, 4], "4", [1.5], [2**64], NESTED))
    elif change == 2:
        entry["dtype"] = random_.choice(("F99", "", 3, CONTROL, "PICKLE", "C64", None))
    elif change == 3:
        fields[key] = random_.choice((None, 3, [], "\x1b", NESTED))
    elif change == 4:
        fields["__metadata__"] = random_.choice((3, [], {"a": 1}, {"a": NESTED}, {"a": {"b": "c"}}))
    elif change == 5:
        del entry[random_.choice(sorted(entry))]
    elif change == 6:
        fields["a copy"] = dict(entry)
    text = json.dumps(fields).encode()
    if change == 7:
        depth = random_.choice((200, 100_000))
        text = b'{"a":' + b"[" * depth + b"]" * depth + b"," + text[1:]
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def config_text(random_: random.Random, path: Path) -> None:
    text = path.read_text()
    depth = random_.choice((900, 5_000, 200_000))
    deep = "[" * depth + "]" * depth
    fields = text.strip()[1:]
    path.write_text(
        random_.choice(
            (
                deep,
                '{"a":' * depth + "1" + "}" * depth,
                f'{{{fields[:-1]}, "auto_mapping": {deep}}}',
                f'{{{fields[:-1]}, "target_modules": {deep}}}',
                "[]",
                "null",
                "3",
                '"GENFT_LORA"',
                "NaN",
                "{}",
                f"{{{fields} {{}}",
                text + " " * 2**22,
                '{"peft_type": ' + "9" * 5000 + "}",
                '{"peft_type": "\\ud800"}',
                f'{{"peft_type": {json.dumps(CONTROL)}}}',
            )
        )
    )


def removed(random_: random.Random, path: Path) -> None:
    path.unlink()
    if random_.random() < 0.5:
        path.mkdir()


ON_DISK: tuple[tuple[str, Callable[[random.Random, Path], None]], ...] = (
    (WEIGHTS, truncated),
    (WEIGHTS, garbage),
    (WEIGHTS, header_length),
    (WEIGHTS, header),
    (WEIGHTS, removed),
    (CONFIG, truncated),
    (CONFIG, garbage),
    (CONFIG, config_text),
    (CONFIG, config_text),
)


def malform(random_: random.Random, directory: Path, fields: dict[str, Any], tensors: Tensors) -> str:
    """Writes the adapter with one thing wrong; returns what."""
    fields, tensors = json.loads(json.dumps(fields)), {key: tensor.clone() for key, tensor in tensors.items()}
    where, what = "", ""
    if random_.random() < 0.75:
        change = random_.choice(IN_MEMORY)
        where, what = change.__name__, change(random_, fields, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(fields))
    (directory / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    if not where:
        name, damage = random_.choice(ON_DISK)
        damage(random_, directory / name)
        where, what = damage.__name__, name
    return f"{where}: {what}"


def _fields_of(fields: dict[str, Any]) -> list[dataclasses.Field[Any]]:
    config = METHODS[fields["peft_type"].removeprefix("GENFT_").lower()]
    return [field for field in dataclasses.fields(config) if field.name in fields]
