"""Verification of a saved run: reload it in a new process and compare its logits with those of the trained model.

`python -m genft_cli.verify RUN...` reads RUN/run.json and RUN/probe.safetensors, writes RUN/reload.json; what fails, it
says on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genft_cli import methods
from genft_cli.console import RunError, quiet, told
from genft_modules.files import replace_text
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.weights import is_quantised
from genft_modules.progress import bar

# Allowed difference (reloaded, merged), relative to the largest logit. Merging rounds W0 + ΔW to the weights' dtype in
# every layer.
TOLERANCES = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-2, 1e-1),
    torch.float16: (2e-3, 2e-2),
}


def save_probe(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Save the logits of `model` on `inputs` for the comparison."""
    from safetensors.torch import save_file

    tensors = {name: value.cpu().contiguous() for name, value in inputs.items()}
    save_file({**tensors, "logits": _logits(model, inputs)}, str(path))


@torch.no_grad()
def _logits(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    output: Any = model.eval()(**{name: value.to(device) for name, value in inputs.items()})
    logits: torch.Tensor = output.logits
    return logits.float().cpu().contiguous()


def verify_in_new_process(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """`verify` for each run, in one new process. Raises RunError if that process fails."""
    command = [sys.executable, "-m", "genft_cli.verify", *map(str, runs)]
    # A session of its own: Ctrl-C reaches this process only, which then ends the other.
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, start_new_session=True)
    if done.returncode:
        raise RunError(f"reloading in a new process failed: {done.stdout.strip() or f'exit code {done.returncode}'}")
    return [json.loads((run / "reload.json").read_text(encoding="utf-8")) for run in runs]


def verify(run: Path) -> dict[str, Any]:
    """Max |difference| of the logits from the trained model's: as loaded, and merged (None for a full model, and for
    adapters on quantised layers, which cannot be merged)."""
    import transformers
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    probe = load_file(str(run / "probe.safetensors"))
    dtype = getattr(torch, record["dtype"])
    base = record["base"] if record["adapter"] else str(run)
    details: dict[str, Any] = {}
    if record["quantization"] is not None:
        details = {"quantization_config": record["quantization"], "device_map": {"": record["device"]}}
    details |= record.get("load", {})
    inputs = {name: value for name, value in probe.items() if name != "logits"}
    model = getattr(transformers, record["kind"]).from_pretrained(base, dtype=dtype, **details)
    if record["quantization"] is None:
        model = model.to(record["device"])
    if record["adapter"]:
        model = PeftModel.from_pretrained(model, str(run))
        methods.apply_fused(model, record["method"])
    largest = float(probe["logits"].abs().max())
    loaded = float((_logits(model, inputs) - probe["logits"]).abs().max())
    merged = None
    layers: list[Any] = [module for module in model.modules() if isinstance(module, (FusedGenLinear, LoraLayer))]
    if record["adapter"] and not any(is_quantised(layer.base_layer) for layer in layers):
        model = model.merge_and_unload()
        merged = float((_logits(model, inputs) - probe["logits"]).abs().max())
    allowed, allowed_merged = TOLERANCES[dtype]
    agree = loaded <= allowed * largest and (merged is None or merged <= allowed_merged * largest)
    return {"loaded": loaded, "merged": merged, "largest_logit": largest, "agree": agree}


def verify_all(runs: Sequence[Path]) -> None:
    """`verify` for each run; the results are in RUN/reload.json."""
    with bar(len(runs), "reloading in a new process", unit="adapter") as progress:
        for run in runs:
            replace_text(run / "reload.json", json.dumps(verify(run), indent=2) + "\n")
            progress.update()


def main(arguments: Sequence[str]) -> int:
    quiet()
    try:
        verify_all([Path(argument) for argument in arguments])
    except Exception as error:
        print(told(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
