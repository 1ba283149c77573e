"""`genft merge`: merge an adapter into its base model."""

from __future__ import annotations

import shutil
from pathlib import Path

from genft_cli.bases import DTYPES, base_of, check_output, config_of, load, method_of, path_of, place
from genft_cli.console import UserError, one_line, say
from genft_modules.files import new_directory

# Files of a model directory other than config and weights: tokenizer, processors, chat template.
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "*processor_config.json",
)  # fmt: skip


def merge(adapter: str, output: str, *, model: str | None = None, dtype: str = "auto", device: str = "auto") -> str:
    """Write the base model with weights W0 + ΔW. Returns a report."""
    config = config_of(adapter)
    check_output(output)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from auto, {', '.join(DTYPES)}")
    base = base_of(config, adapter, model)
    adapted = load(adapter, config, base, device, DTYPES.get(dtype, "auto"))
    say("merging")
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{adapter}: cannot be merged: {one_line(error)}") from None
    with new_directory(path_of(output)) as partial:
        merged.save_pretrained(str(partial))
        _copy_companions(base, partial)
    stored = str(next(merged.parameters()).dtype).removeprefix("torch.")
    return f"merged     {method_of(config)} into {base}, {stored}\nsaved      {output}"


def _copy_companions(base: str, to: Path) -> None:
    source = Path(place(base))
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(base, allow_patterns=list(_COMPANIONS)))
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and not (to / path.name).exists():
                shutil.copyfile(path, to / path.name)
