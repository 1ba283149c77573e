"""The card beside an adapter: a README.md that says what the adapter is, what it belongs to, and how to load it.

Ours is one marked block, and what is missing in the YAML header. A README.md that is there already, of peft or of a
user, keeps its text: only the block is written anew. The card is made of what adapter_config.json says, and a card that
cannot be written is a warning, never a lost adapter.
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
START, END = "<!-- genft:start, written anew by every save; the rest of this file stays -->", "<!-- genft:end -->"
BLOCK = re.compile(r"<!-- genft:start\b(?:(?!<!-- genft:start\b).)*?<!-- genft:end -->", re.DOTALL)
HEADER = re.compile(r"\A---[ \t]*\r?\n((?:.*\n)*?)---[ \t]*(?:\r?\n|\Z)")
UNTITLED = "# Model Card for Model ID\n"  # how a card begins that peft has made and nobody has touched

METHODS = {
    "wegeft": "WeGeFT (arXiv 2312.00700)",
    "gift": "GIFT (arXiv 2312.00700)",
    "genft": "GenFT (arXiv 2506.11042)",
    "lora": "LoRA (arXiv 2106.09685)",
    "grft": "GRFT (arXiv 2507.00016)",
    "sas": "SaS (arXiv 2504.03450, reconstructed)",
    "peanut": "PEANuT (arXiv 2410.01870)",
}
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Facts:
    """What a saved configuration says of its adapter."""

    method: str  # "wegeft", or for peft's own "lora"
    ours: bool  # whether loading needs genft
    base: str | None  # the base model's name or path
    loader: str | None  # the class of transformers that loads it

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


def write_card(directory: Path, *, former: Path | None = None, note: str = "") -> None:
    """Writes, or brings up to date, the card of the adapter whose adapter_config.json is in `directory`.

    Args:
        directory: of the adapter.
        former: a directory whose adapter this one will take the place of: the card there, if any, is what is continued.
        note: a sentence of the one who saves.
    """
    path = directory / CARD
    source = former / CARD if former is not None and (former / CARD).exists() else path
    try:
        facts = _facts(directory)
        before = _facts(former) if former is not None and (former / CONFIG).exists() else None
        text = source.read_bytes().decode("utf-8") if source.exists() else ""
        replace_text(path, updated(text, facts, before, note))
    except (OSError, ValueError) as error:
        if source != path:
            path.unlink(missing_ok=True)  # which would take its place
        warnings.warn(f"{source}: left as it is, without the part about the adapter: {error}", stacklevel=2)


def _facts(directory: Path) -> Facts:
    return Facts.of(json.loads((directory / CONFIG).read_text(encoding="utf-8")))


def updated(text: str, facts: Facts, former: Facts | None = None, note: str = "") -> str:
    """The text of a card, "" for none, with our block and what its header misses. `former` is what the card was of:
    what the header says of that is no longer true."""
    header = HEADER.match(text)
    fields = _header(header[1] if header else "", facts, former)
    rest = text[header.end() :] if header else text
    ours = block(facts, note)
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
    """The lines of a YAML header, with ours where there are none; nothing that somebody else wrote is changed."""
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
    """A line of the header with this value; its end is the group."""
    return re.compile(rf"^{before}[\"']?{re.escape(value)}[\"']?([ \t]*\r?\n)", re.MULTILINE)


def block(facts: Facts, note: str = "") -> str:
    """The part that is ours, between its marks."""
    target = f"the base model `{facts.base}`" if facts.base else "a base model that has no name"
    if facts.ours:
        needs = "Loading it needs the package genft: `import genft_modules` makes the method known to peft."
    else:
        needs = "Loading it needs peft and no other import."
    loader = facts.loader if facts.loader and facts.loader.isidentifier() else None
    base = json.dumps(facts.base or "path/to/the/base/model", ensure_ascii=False)
    lines = [
        START,
        "## Loading",
        "",
        f"A {facts.name} adapter for {target}. {note}".rstrip(),
        "",
        needs,
        "",
        "```python",
        *(["import genft_modules  # makes the method known to peft"] if facts.ours else []),
        "from peft import PeftModel",
        *([f"from transformers import {loader}"] if loader else []),
        "",
        f"base = {loader}.from_pretrained({base})"
        if loader
        else "base = ...  # the base model, loaded as for training",
        'model = PeftModel.from_pretrained(base, "path/to/this/adapter")',
        "```",
        "",
        "Licence: for whoever publishes the adapter to choose, by `license:` in the header; genft sets none.",
        END,
    ]
    return "\n".join(lines)


def note_of_export(method: str | None, errors: Sequence[float]) -> str:
    """A sentence on a LoRA that was made from another adapter: of which method, and the errors of its layers that are
    no exact equivalents."""
    origin = f"Made from a {METHODS.get(method, method.upper())} adapter" if method else "Made from an adapter of genft"
    how = f"with a relative error of ΔW of at most {max(errors):.1e}" if errors else "exactly"
    return f"{origin}, {how}, and for these weights of the base model alone."
