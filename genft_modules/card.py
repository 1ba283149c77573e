"""The model card of an adapter: a README.md with the method, the base model and how to load the adapter.

genft writes one marked block and adds missing entries to the YAML header. The rest of an existing README.md, by peft or
a user, is kept. The content comes from adapter_config.json. If the card cannot be written, there is a warning, but the
adapter is still saved.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genft_modules.files import CONFIG, replace_text

CARD = "README.md"
START, END = "<!-- genft:start, overwritten by every save; the rest of this file is kept -->", "<!-- genft:end -->"
BLOCK = re.compile(r"<!-- genft:start\b(?:(?!<!-- genft:start\b).)*?<!-- genft:end -->", re.DOTALL)
HEADER = re.compile(r"\A---[ \t]*\r?\n((?:.*\n)*?)---[ \t]*(?:\r?\n|\Z)")
UNTITLED = "# Model Card for Model ID\n"  # title of peft's template

METHODS = {
    "wegeft": "WeGeFT (arXiv 2312.00700)",
    "gift": "GIFT (arXiv 2312.00700)",
    "genft": "GenFT (arXiv 2506.11042)",
    "lora": "LoRA (arXiv 2106.09685)",
    "grft": "GRFT (arXiv 2507.00016)",
    "sas": "SaS (arXiv 2504.03450, reconstructed)",
    "peanut": "PEANuT (arXiv 2410.01870)",
    "hira": "HiRA (ICLR 2025, openreview TwJrTz9cRS)",
}
TASKS = {  # the Auto class of each task type; an adapter without a task type stores its class
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Facts:
    """The content of a card, from a saved configuration."""

    method: str  # such as "wegeft", or "lora" for peft's own
    ours: bool  # whether loading needs genft
    base: str | None  # the base model's name or path
    loader: str | None  # the transformers class that loads the base model

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Facts:
        kind = str(config.get("peft_type"))
        mapping = config.get("auto_mapping")
        loader = TASKS.get(str(config.get("task_type")))
        if isinstance(mapping, dict) and str(mapping.get("parent_library")).partition(".")[0] == "transformers":
            loader = str(mapping.get("base_model_class"))
        base = " ".join(str(config.get("base_model_name_or_path") or "").split())
        return cls(kind.removeprefix("GENFT_").lower(), kind.startswith("GENFT_"), base or None, loader)

    @property
    def name(self) -> str:
        return METHODS.get(self.method, self.method.upper())

    @property
    def tags(self) -> list[str]:
        return ["genft", self.method] if self.ours else [self.method]


def write_card(
    directory: Path, *, former: Path | None = None, note: str = "", loading: Mapping[str, Any] | None = None
) -> None:
    """Write or update the card of the adapter in `directory`, from its adapter_config.json.

    Args:
        directory: the adapter's directory.
        former: directory of an adapter that will be replaced by this one; its card, if any, is updated.
        note: an additional sentence.
        loading: arguments of the base model's from_pretrained, such as num_labels.
    """
    path = directory / CARD
    source = former / CARD if former is not None and (former / CARD).exists() else path
    try:
        facts = _facts(directory)
        before = _facts(former) if former is not None and (former / CONFIG).exists() else None
        text = source.read_bytes().decode("utf-8") if source.exists() else ""
        replace_text(path, updated(text, facts, before, note, loading))
    except (OSError, ValueError) as error:
        if source != path:
            path.unlink(missing_ok=True)  # so that it does not replace the former card
        warnings.warn(f"{source}: not updated with the adapter's description: {error}", stacklevel=2)


def _facts(directory: Path) -> Facts:
    return Facts.of(json.loads((directory / CONFIG).read_text(encoding="utf-8")))


def updated(
    text: str,
    facts: Facts,
    former: Facts | None = None,
    note: str = "",
    loading: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card ("" if there is none) with our block and missing entries of the header. Entries of the header
    that come from `former`, the previous adapter, are replaced."""
    header = HEADER.match(text)
    fields = _header(header[1] if header else "", facts, former)
    rest = text[header.end() :] if header else text
    ours = block(facts, note, loading)
    if BLOCK.search(rest):
        rest = BLOCK.sub(lambda _: ours, rest, count=1)
    elif rest.lstrip().startswith(UNTITLED):
        rest = rest.replace(UNTITLED, f"{UNTITLED}\n{ours}\n", 1)
    elif rest.strip():
        rest = f"{rest}{'' if rest.endswith(chr(10)) else chr(10)}\n{ours}\n"
    else:
        target = f" for {facts.base}" if facts.base else ""
        rest = f"\n# {facts.name.partition(' (')[0]} adapter{target}\n\n{ours}\n"
    if header:
        return f"{text[: header.start(1)]}{fields}{text[header.end(1) : header.end()]}{rest}"
    return f"---\n{fields}---\n{rest}"


def _header(header: str, facts: Facts, former: Facts | None) -> str:
    """The lines of a YAML header with our entries added; entries by others are not changed."""
    if former is not None:
        if facts.base and former.base and facts.base != former.base:
            header = _entry("base_model[ \t]*:[ \t]*", former.base).sub(
                lambda line: f"base_model: {json.dumps(facts.base, ensure_ascii=False)}{line[1]}", header
            )
        for tag in set(former.tags) - set(facts.tags):
            header = _entry("[ \t]*-[ \t]+", tag).sub("", header)
    if facts.base and not re.search(r"^base_model[ \t]*:", header, re.MULTILINE):
        header += f"base_model: {json.dumps(facts.base, ensure_ascii=False)}\n"
    if not re.search(r"^library_name[ \t]*:", header, re.MULTILINE):
        header += "library_name: peft\n"
    missing = [tag for tag in facts.tags if not _entry("[ \t]*-[ \t]+", tag).search(header)]
    listed = re.search(r"^tags[ \t]*:[ \t]*\r?\n(?=([ \t]*)- )", header, re.MULTILINE)
    if listed:
        lines = "".join(f"{listed[1]}- {tag}\n" for tag in missing)
        return header[: listed.end()] + lines + header[listed.end() :]
    if not re.search(r"^tags[ \t]*:", header, re.MULTILINE):
        header += "".join(["tags:\n", *(f"- {tag}\n" for tag in facts.tags)])
    return header


def _entry(before: str, value: str) -> re.Pattern[str]:
    """A pattern for a line of the header with this value; the group is the end of the line."""
    return re.compile(rf"^{before}[\"']?{re.escape(value)}[\"']?([ \t]*\r?\n)", re.MULTILINE)


def block(facts: Facts, note: str = "", loading: Mapping[str, Any] | None = None) -> str:
    """The block written by genft, with its markers."""
    target = f"the base model `{facts.base}`" if facts.base else "an unnamed base model"
    if facts.ours:
        needs = (
            "Loading it needs the genft package: `import genft_modules` registers the method with peft. Without that, "
            f"peft says `KeyError: 'GENFT_{facts.method.upper()}'`."
        )
    else:
        needs = "Loading it only needs peft."
    loader = facts.loader if facts.loader and facts.loader.isidentifier() else None
    base = json.dumps(facts.base or "path/to/the/base/model", ensure_ascii=False)
    base += "".join(f", {name}={value!r}" for name, value in (loading or {}).items())
    lines = [
        START,
        "## Loading",
        "",
        f"A {facts.name} adapter for {target}. {note}".rstrip(),
        "",
        needs,
        "",
        "```python",
        *(["import genft_modules  # registers the method with peft"] if facts.ours else []),
        "from peft import PeftModel",
        *([f"from transformers import {loader}"] if loader else []),
        "",
        f"base = {loader}.from_pretrained({base})" if loader else "base = ...  # load the base model as for training",
        'model = PeftModel.from_pretrained(base, "path/to/this/adapter")',
        "```",
        "",
        "Licence: not set by genft; add `license:` to the header when you publish the adapter.",
        END,
    ]
    return "\n".join(lines)


def note_of_export(method: str | None, errors: Sequence[float]) -> str:
    """A sentence on an exported LoRA: the original method, and the maximum error if some layers are not exact."""
    origin = (
        f"Converted from a {METHODS.get(method, method.upper())} adapter"
        if method
        else "Converted from a genft adapter"
    )
    how = f"with a relative error of ΔW of at most {max(errors):.1e}" if errors else "exactly"
    return f"{origin}, {how}; only valid for these weights of the base model."
