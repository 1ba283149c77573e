"""`genft tune`: measure a model's shapes on this GPU and save the fastest plans for later runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from genft_cli import methods
from genft_cli.bases import DTYPES, model_config
from genft_cli.console import UserError, check_writable, one_line, say, table
from genft_cli.job import adapted_on_meta
from genft_kernels import Problem, device_facts
from genft_kernels.plan import FEW_ROWS, user_tables
from genft_kernels.tuning import Tuned, operation_of, tune, write_table
from genft_modules.files import writing
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods import Generator, LoRAConfig
from genft_modules.methods.forms import Form, Generated, InputEdit, LowRank
from genft_modules.methods.genft import GenFTGenerator
from genft_modules.methods.weights import QuantisedWeight
from genft_modules.progress import bar

ROWS = (1, 8, 64, 2048, 8192)
MINUTES = 5.0


def run(
    model: str,
    *,
    method: str = "wegeft",
    r: int | None = None,
    target_modules: Sequence[str] | None = None,
    rows: Sequence[int] = ROWS,
    dtype: str = "bfloat16",
    minutes: float = MINUTES,
) -> str:
    """Measure plans and save them in the user's table for this GPU. Returns a report.

    Args:
        model: a local model directory, or a model on the Hub; only its configuration is read.
        method, r, target_modules: of the adapter, as in `genft finetune`.
        rows: numbers of tokens per batch.
        dtype: dtype of the model.
        minutes: time budget in minutes.

    Raises:
        UserError: an option is invalid, or there is no GPU.
    """
    if not rows or min(rows) < 1:
        raise UserError(f"--rows {','.join(map(str, rows))}: each must be at least 1")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(f"--minutes {minutes:g}: must be above 0")
    config = methods.peft_config(method, r=r, target_modules=target_modules)
    if method in methods.PLAIN:
        raise UserError(f"--method {method}: runs none of genft's operations")
    problems = problems_of(_adapted(model, config, method), sorted(set(rows)), DTYPES[dtype].itemsize)
    if not torch.cuda.is_available():
        raise UserError("tune: needs a GPU")
    return _measured(problems, DTYPES[dtype], torch.device("cuda", torch.cuda.current_device()), 60 * minutes)


def _adapted(model: str, config: Any, method: str) -> Any:
    """The adapted model on the meta device."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM

    base = model_config(model)
    causal = type(base) in MODEL_FOR_CAUSAL_LM_MAPPING
    if method == "lora":  # the same operation, in a layer that states its form
        config = LoRAConfig(r=config.r, target_modules=config.target_modules)
    config.task_type = "CAUSAL_LM" if causal else None
    kind = AutoModelForCausalLM if causal else AutoModel
    return adapted_on_meta(base, config, f"--method {method} on {model}", kind)


def _measured(problems: Sequence[Problem], dtype: torch.dtype, device: torch.device, budget: float) -> str:
    facts = device_facts(device)
    path = user_tables() / f"{facts.architecture}.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    check_writable("GENFT_CACHE:", str(path.parent))
    found: list[Tuned] = []
    try:
        with bar(len(problems), "measuring plans", unit="problem") as progress:
            for tuned in tune(problems, dtype, device, budget=budget):
                # Written at once, so that finished problems survive an interruption.
                with writing(path.parent):
                    write_table(path, [tuned.entry()], device=name, torch=torch.__version__)
                found.append(tuned)
                progress.update()
    except ValueError as error:
        raise UserError(one_line(error)) from None
    if len(found) < len(problems):
        say(f"{len(found)} of {len(problems)} problems measured; for the rest, increase --minutes or use fewer --rows")
    return f"{report(found)}\n\nsaved      {path}"


def report(found: Sequence[Tuned]) -> str:
    """A table of each problem's best algorithm and its time, also relative to the plain layer and the default plan."""
    lines = []
    for tuned in found:
        problem, best = tuned.problem, tuned.best
        floor = f"{best.ratio:.2f}" if operation_of(problem).form else ""
        rows = str(problem.m) if problem.operation.endswith("_linear") else ""
        lines.append(
            (
                f"{problem.operation} {problem.n}×{problem.k} r {problem.r}",
                rows,
                best.plan.algorithm,
                f"{best.ms:.3f}",
                floor,
                f"{best.ms / tuned.library.ms:.2f}",
            )
        )
    text = table(("operation", "rows", "fastest", "ms", "× layer", "× library"), lines)
    wrong = sum(len(tuned.red) for tuned in found)
    if wrong:
        text += f"\n\n{wrong} faster plans gave wrong results on this GPU and were discarded: please report this output"
    trained = "; for generated ΔW, with a trainable W0" if any(_is_generated(tuned) for tuned in found) else ""
    return (
        f"{text}\n\nforward and backward, up to {FEW_ROWS} rows forward only; × layer: relative to the layer "
        f"without an adapter{trained}; × library: relative to the default plan"
    )


def _is_generated(tuned: Tuned) -> bool:
    return operation_of(tuned.problem).form == "generated"


# --- what a model asks for ---------------------------------------------------------------------------------------


class _Watched(QuantisedWeight):
    """A stand-in for W0 that records which features a generator requests."""

    def __init__(self, layer: FusedGenLinear) -> None:
        super().__init__(layer)
        self.asked: list[tuple[int, int, Tensor]] = []  # N and K of W0 or of a part of it; A [r, K]

    def features(self, a: Tensor, *_: Any) -> Tensor:
        self.asked.append((*self.shape, a))
        return a.new_empty(self.shape[0], a.shape[0])


def problems_of(model: torch.nn.Module, rows: Sequence[int], itemsize: int) -> list[Problem]:
    """The distinct problems of a model's adapted layers, with `rows` tokens per batch.

    Args:
        model: a model with genft adapters; may be on the meta device.
        itemsize: bytes per element of x and W0.
    """
    found: dict[Problem, None] = {}
    for layer in model.modules():
        if not isinstance(layer, FusedGenLinear):
            continue
        generator = cast(Generator, layer.genft_generators[layer.active_adapters[0]])
        weight = _Watched(layer)
        form = generator.form(cast(Tensor, weight))
        n, k = weight.shape
        for rows_of_w0, columns, a in weight.asked:
            found[Problem("weight_features", rows_of_w0, rows_of_w0, columns, a.shape[0], itemsize)] = None
            if isinstance(generator, GenFTGenerator) and len(generator.stages) == 2 and generator.outer != "none":
                # Computed from the factors alone, in their dtype.
                found[Problem("generated_features", 0, rows_of_w0, columns, a.shape[0], a.dtype.itemsize)] = None
        operation, r = _operation(form)
        found.update(dict.fromkeys(Problem(operation, m, n, k, r, itemsize) for m in rows))
    return list(found)


def _operation(form: Form) -> tuple[str, int]:
    """The operation that applies an update, and its rank."""
    if isinstance(form, LowRank):
        return "lowrank_linear", form.p.shape[1]
    if isinstance(form, InputEdit):
        return "input_edit_linear", form.psi.shape[0]
    if isinstance(form, Generated):
        return "generated_linear", form.h.shape[1]
    return "sliced_linear", form.indices.shape[0]
