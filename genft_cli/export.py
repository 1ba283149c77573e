"""`genft export-lora`: convert an adapter to LoRA."""

from __future__ import annotations

from genft_cli.bases import base_of, check_output, genft_config, load, method_of, path_of
from genft_cli.console import UserError, one_line, table
from genft_modules.disk.export import export_lora


def export(
    adapter: str,
    output: str,
    *,
    model: str | None = None,
    max_error: float | None = None,
    rank: int | None = None,
    device: str = "auto",
) -> str:
    """Write the adapter as a peft LoRA adapter. Returns a report with rank and error of each layer."""
    config = genft_config(adapter, "export-lora")
    check_output(output)
    base = base_of(config, adapter, model)
    adapted = load(adapter, config, base, device)
    try:
        layers = export_lora(adapted, path_of(output), max_error=max_error, rank=rank, progressbar=True)
    except (TypeError, ValueError) as error:
        arguments, _, what = one_line(error).partition(":")
        options = arguments.replace("max_error", "--max-error").replace("rank", "--rank")
        raise UserError(f"{options}:{what}") from None
    rows = [
        (layer.name, str(layer.rank), "exact" if layer.exact else "approximated", f"{layer.error:.1e}")
        for layer in layers
    ]
    exact = sum(layer.exact for layer in layers)
    return "\n".join(
        [
            table(("layer", "rank", "ΔW", "relative error"), rows),
            "",
            f"exported   {method_of(config)} as LoRA: {exact} of {len(layers)} layers exactly, largest error "
            f"{max(layer.error for layer in layers):.1e}",
            f"base       {base}; the exported adapter is valid for these base weights only",
            f"saved      {output}",
        ]
    )
