"""Batches whose samples take different adapters (`adapter_names`), without gradients: one layer, the next token of
a model, and `generate` with a cache, each beside peft's loop over the adapters."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import genft_modules
from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import DTYPE_NAMES, Case
from benchmarks.measure.timing import cache_bytes
from benchmarks.subjects.layers import Inputs, frozen, wake
from benchmarks.subjects.models import LLM_TARGETS, Size, build_base
from benchmarks.suites.comparison import Settings
from genft_kernels.gate import Verdict, errors, judge
from genft_kernels.timing import Clock, Stats, Step, WallClock, clock_for, interleave, ratio

BASE = "__base__"
PEER = "peft-lora"


@dataclass(frozen=True)
class Entrant:
    """A method whose adapters are mixed: `config` at rank r for the targets; `fused`: peft's on our operations."""

    kind: str
    method: str
    config: Callable[[int, list[str]], Any]
    fused: bool = False


def _peft_lora(r: int, targets: list[str]) -> Any:
    return peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)


ENTRANTS = {
    "genft-lora": Entrant(
        "genft", "lora", lambda r, on: genft_modules.LoRAConfig(r=r, lora_alpha=2 * r, target_modules=on)
    ),
    "genft-wegeft": Entrant(
        "genft", "wegeft", lambda r, on: genft_modules.WeGeFTConfig(r=r, wegeft_alpha=2 * r, target_modules=on)
    ),
    "fused-lora": Entrant("genft", "lora", _peft_lora, fused=True),
    PEER: Entrant("peer", "lora", _peft_lora),
}


def in_turn(samples: int, adapters: int) -> list[str]:
    """a0, a1, ..., a0, a1, ..."""
    return [f"a{sample % adapters}" for sample in range(samples)]


def drawn(samples: int, adapters: int) -> list[str]:
    """Adapters drawn at random, every eighth sample without one."""
    draw = random.Random(adapters)
    return [BASE if sample % 8 == 7 else f"a{draw.randrange(adapters)}" for sample in range(samples)]


WAYS = {"in turn": in_turn, "drawn": drawn}


def with_adapters(base: nn.Module, entrant: Entrant, count: int, r: int, targets: Sequence[str]) -> Any:
    """A PEFT model in eval mode with adapters a0, a1, ... on the shared weights of `base`."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = entrant.config(r, list(targets))
        model = peft.get_peft_model(
            copy.deepcopy(base, shared), config, adapter_name="a0", autocast_adapter_dtype=False
        )
        for index in range(1, count):
            model.add_adapter(f"a{index}", entrant.config(r, list(targets)), autocast_adapter_dtype=False)
    generator = torch.Generator(next(base.parameters()).device).manual_seed(3)
    for index in range(count):
        model.set_adapter(f"a{index}")
        wake(model, generator)
    model.set_adapter("a0")
    if entrant.fused:
        genft_modules.fuse_lora(model)
    return model.eval()


def _record(name: str, mode: str, r: int, dtype: torch.dtype, **where: Any) -> Record:
    entrant = ENTRANTS.get(name.partition(",")[0])
    return {
        "suite": "mixed",
        "mode": mode,
        "contender": name,
        "kind": entrant.kind if entrant else "floor",
        "method": entrant.method if entrant else "none",
        **where,
        "r": r if entrant else 0,
        "dtype": DTYPE_NAMES[dtype],
    }


def _measure(
    records: dict[str, Record], steps: dict[str, Step], clock: Clock, settings: Settings, layers: int = 1
) -> list[Record]:
    limits = {"min_rounds": settings.min_rounds, "max_rounds": settings.max_rounds, "warmup": settings.warmup}
    measured = interleave(steps, clock, seconds=settings.seconds, **limits)
    for name, ms in measured.items():
        records[name]["ms"] = Stats.of([value / layers for value in ms]).json()
        records[name]["ratio"] = ratio(ms, measured["frozen"]).json()
        if PEER in measured:
            records[name]["over_peer"] = ratio(ms, measured[PEER]).json()
    return list(records.values())


# ---- one layer


def layers(
    case: Case,
    counts: Sequence[int],
    settings: Settings | None = None,
    *,
    replicas: int = 0,
    run: Run | None = None,
) -> list[Record]:
    """One token for each of `case.shape.m` samples with 1, 4, ... adapters, through layers that are given the list of
    names, as peft's are. `replicas`: how many layers; 0 for enough that they do not stay in the cache, as weights and
    factors are what decoding reads."""
    settings = settings or Settings(seconds=1.0, max_rounds=100)
    m, k, most = case.shape.m, case.shape.k, max(counts)
    (n,) = case.shape.n
    if not replicas:
        read = case.itemsize * (n * k + most * case.r * (n + k))
        replicas = max(2, min(16, math.ceil(2 * cache_bytes(case.device) / read)))
    inputs = Inputs(case, replicas=replicas)
    x = inputs.x[0].detach().unsqueeze(1)
    plain = [group[0] for group in inputs.linears]
    entered = {}
    for name, entrant in ENTRANTS.items():
        entered[name] = [
            with_adapters(nn.ModuleDict({"layer": frozen(one.weight)}), entrant, most, case.r, ["layer"])
            for one in plain
        ]
    found: list[Record] = []
    for count in counts:
        for way in WAYS if m >= 4 else ("in turn",):
            mode = f"decode, {count} adapters {way}"
            where = {"m": m, "n": [n], "k": k, "adapters": count}
            names = WAYS[way](m, count)
            records = {"frozen": _record("frozen", mode, case.r, case.dtype, **where)}
            steps: dict[str, Step] = {"frozen": _passes(plain, x)}
            for name, mine in entered.items():
                records[name] = record = _record(name, mode, case.r, case.dtype, **where)
                verdict = _check_layer(mine[0], x, names)
                record["gate"] = verdict.json()
                if verdict.ok:
                    steps[name] = _passes([_layer(model) for model in mine], x, adapter_names=names)
                else:
                    record["withheld"] = f"gate: {verdict}"
            found += _measure(records, steps, WallClock(), settings, len(plain))
            if run is not None:
                run.put(records.values())
    return found


def _layer(model: Any) -> Any:
    return model.base_model.model["layer"]


def _passes(through: Sequence[nn.Module], x: Tensor, **more: Any) -> Step:
    def step(index: int) -> None:
        with torch.no_grad():
            for layer in through:
                layer(x, **more)

    return step


@torch.no_grad()
def _check_layer(model: Any, x: Tensor, names: list[str]) -> Verdict:
    """Against each sample alone in float64, beside each sample alone in this dtype."""

    def alone(model: Any, x: Tensor) -> Tensor:
        one, found = _layer(model), []
        for sample, name in zip(x, names, strict=True):
            if name != BASE:
                one.set_adapter(name)
            found.append((one.base_layer if name == BASE else one)(sample))
        one.set_adapter("a0")
        return torch.stack(found)

    exact, got = alone(copy.deepcopy(model).double(), x.double()), _layer(model)(x, adapter_names=names)
    return judge({"y": got}, {"y": exact}, {"y": alone(model, x)}, x.dtype)


# ---- a model


def next_token(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    counts: Sequence[int],
    r: int,
    settings: Settings | None = None,
) -> list[Record]:
    """The next token of each sample, no cache of earlier ones, with 1, 8, ... adapters in one batch against one active
    adapter. Not captured: the host is part of it."""
    settings = settings or Settings(seconds=4.0, max_rounds=30)
    base = build_base(size, dtype, device).eval()
    generator = torch.Generator(device).manual_seed(2)
    ids = torch.randint(size.vocab, (size.batch, 1), device=device, generator=generator)
    embedded = base.get_input_embeddings()(ids)
    mode, where = "decode, adapters mixed", {"model": dataclasses.asdict(size)}

    def step(model: nn.Module, names: list[str] | None) -> Callable[[int], Tensor]:
        more = {} if names is None else {"adapter_names": names}

        def run(index: int) -> Tensor:
            with torch.no_grad():
                return model(inputs_embeds=embedded, **more).logits  # type: ignore[no-any-return]

        return run

    records = {"frozen": _record("frozen", mode, r, dtype, **where)}
    steps: dict[str, Step] = {"frozen": step(base, None)}
    for name, entrant in ENTRANTS.items():
        model = with_adapters(base, entrant, max(counts), r, LLM_TARGETS)
        records[f"{name}, one active"] = _record(f"{name}, one active", mode, r, dtype, **where)
        steps[f"{name}, one active"] = step(model, None)
        for count in counts:
            mixed = f"{name}, {count} in a batch"
            names = in_turn(size.batch, count)
            own = step(model, names)
            record = records[mixed] = _record(mixed, mode, r, dtype, **where)
            record["gate"] = _check_model(model, names, own, embedded)
            if record["gate"]["ok"]:
                steps[mixed] = own
            else:
                record["withheld"] = f"gate: {record['gate']}"
    found = _measure(records, steps, clock_for(device), settings)
    for record in found:
        if "ms" in record:
            record["tokens_per_s"] = round(size.batch / record["ms"]["median"] * 1e3, 1)
    return found


def _check_model(model: Any, names: list[str], own: Callable[[int], Tensor], embedded: Tensor) -> dict[str, Any]:
    """Every adapter's samples against a batch of its own: bf16 logits may differ by a twentieth, others by 1e-4."""
    got = own(0)
    budget = 0.05 if got.dtype in (torch.bfloat16, torch.float16) else 1e-4
    worst = 0.0
    for adapter in sorted(set(names))[:4]:
        rows = [i for i, name in enumerate(names) if name == adapter]
        model.set_adapter(adapter)
        with torch.no_grad():
            alone = model(inputs_embeds=embedded[rows]).logits
        worst = max(worst, errors(got[rows], alone.double())[0])
    model.set_adapter("a0")
    return {"ok": worst <= budget, "worst": "logits", "error": worst, "budget": budget}


def generating(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    batches: Sequence[tuple[int, int]],
    r: int,
    settings: Settings | None = None,
    *,
    run: Run | None = None,
) -> list[Record]:
    """`generate` of 16 tokens, greedily and with a cache, after prompts of 8, for (samples, adapters) in `batches`.

    What a contender generates is not checked here, because of near ties: `next_token` checks the logits.
    """
    settings = settings or Settings(seconds=4.0, max_rounds=20)
    prompt, new = 8, 16
    base = build_base(size, dtype, device).eval()
    most = max(adapters for _, adapters in batches)
    models = {name: with_adapters(base, entrant, most, r, LLM_TARGETS) for name, entrant in ENTRANTS.items()}
    found: list[Record] = []
    for samples, adapters in batches:
        mode = f"generate, {adapters} adapters in turn"
        where = {"model": dataclasses.asdict(dataclasses.replace(size, batch=samples, sequence=prompt + new))}
        where["model"]["name"] += f"-{samples}"
        generator = torch.Generator(device).manual_seed(2)
        ids = torch.randint(size.vocab, (samples, prompt), device=device, generator=generator)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, **options}

        def step(model: Any, given: dict[str, Any]) -> Step:
            return lambda index: model.generate(**given)

        mixed = {**inputs, "adapter_names": in_turn(samples, adapters)}
        steps = {"frozen": step(base, inputs), **{name: step(model, mixed) for name, model in models.items()}}
        records = {name: _record(name, mode, r, dtype, adapters=adapters, **where) for name in steps}
        found += _measure(records, steps, clock_for(device), settings)
        for record in records.values():
            record["tokens_per_s"] = round(samples * new / record["ms"]["median"] * 1e3, 1)
        if run is not None:
            run.put(records.values())
    return found
