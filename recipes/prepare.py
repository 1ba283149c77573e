"""Prepare published data sets for the recipes: the rows and the prompts of the published experiments.

    python recipes/prepare.py FORMAT SOURCE TARGET [--model MODEL] [--task NAME]

SOURCE is your copy of the data (.json, .jsonl, .csv or .parquet). TARGET is written as .jsonl: training data with
"prompt" and "completion"; test data, whose formats end in -test, with "prompt", "answer" and "task".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from genft_cli.console import UserError, say
from genft_cli.tables import read_rows

Row = dict[str, Any]

# Stanford Alpaca's prompt without an input.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
# GenFT's prompts, from examples/llama_utils.py.
GENFT = "Below is an instruction that describes a task.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
GENFT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
FENCE = "```"


def commonsense(row: Row) -> Row:
    """LLM-Adapters' commonsense_170k.json in GIFT's and WeGeFT's prompt."""
    return {"prompt": f"{row['instruction']}\n", "completion": row["output"]}


def commonsense_test(row: Row) -> Row:
    return {"prompt": f"{row['instruction']}\n", "answer": row["answer"]}


def math_test(row: Row) -> Row:
    """LLM-Adapters' tests of arithmetic; the training data math_10k.json need no preparation."""
    return {"prompt": ALPACA.format(row["instruction"]), "answer": row["answer"]}


def metamathqa(row: Row) -> Row | None:
    """LoRA-GA's prompt. A response ends with "#### 42\\nThe answer is: 42", of which the last line is left out."""
    if "GSM" not in row["type"]:
        return None
    # LoRA-GA's encoder puts a space between the two.
    return {"prompt": f"Q: {row['query']}\nA: ", "completion": " " + row["response"].split("\nThe answer is:")[0]}


def gsm8k_test(row: Row) -> Row:
    """GSM8K's test.jsonl in the prompt of metamathqa, with the encoder's space."""
    return {"prompt": f"Q: {row['question']}\nA:  ", "answer": row["answer"]}


def codefeedback(row: Row) -> Row | None:
    """Rows with code, up to the end of the first block of code."""
    if FENCE not in row["answer"]:
        return None
    answer = FENCE.join(row["answer"].split(FENCE)[:2]) + FENCE
    return {"prompt": ALPACA.format(row["query"]), "completion": " " + answer}


def wizardlm(row: Row) -> Row | None:
    """Rows without refusals."""
    if any(words in row["output"].lower() for words in ("sorry", "as an ai")):
        return None
    return {"prompt": ALPACA.format(row["instruction"]), "completion": " " + row["output"]}


def genft_alpaca(row: Row) -> Row:
    prompt = GENFT_INPUT if row.get("input") else GENFT
    return {"prompt": prompt.format(**row), "completion": row["output"]}


# What becomes of a row; and for LoRA-GA's data the limits of tokens (fewer than) and of rows.
FORMATS: dict[str, tuple[Callable[[Row], Row | None], int | None, int | None]] = {
    "commonsense": (commonsense, None, None),
    "commonsense-test": (commonsense_test, None, None),
    "math-test": (math_test, None, None),
    "metamathqa": (metamathqa, 512, 100_000),
    "gsm8k-test": (gsm8k_test, None, None),
    "codefeedback": (codefeedback, 1024, 100_000),
    "wizardlm": (wizardlm, 1024, 52_000),
    "genft-alpaca": (genft_alpaca, None, None),
}


def prepare(kind: str, source: str, target: str, *, model: str | None = None, task: str | None = None) -> int:
    """Write TARGET and return the number of its rows."""
    if kind not in FORMATS:
        raise UserError(f"FORMAT {kind}: choose from {', '.join(FORMATS)}")
    change, tokens, most = FORMATS[kind]
    if tokens is not None and model is None:
        raise UserError(
            f"--model is missing: {kind} leaves out rows with {tokens} or more tokens of a model's tokenizer"
        )
    length = _counter(model) if tokens is not None and model is not None else None
    rows = read_rows("SOURCE", source)
    written = 0
    with Path(target).open("w", encoding="utf-8") as file:
        for row in _changed(rows, change, source):
            if length is not None and tokens is not None and length(row["prompt"] + row["completion"]) >= tokens:
                continue
            if kind.endswith("-test"):
                row["task"] = task or kind.removesuffix("-test")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
            if written == most:
                break
    if not written:
        raise UserError(f"SOURCE {source}: no row fits {kind}")
    say(f"{target}: {written:,} of {len(rows):,} rows")
    return written


def _changed(rows: list[Row], change: Callable[[Row], Row | None], source: str) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        try:
            found = change(row)
        except KeyError as error:
            raise UserError(f"SOURCE {source}: row {number} has no {error.args[0]}; it has {', '.join(row)}") from None
        if found is not None:
            yield found


def _counter(model: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text)["input_ids"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument(
        "--model", help="model whose tokenizer counts the tokens, for metamathqa, codefeedback, wizardlm"
    )
    parser.add_argument("--task", metavar="NAME", help="name of the test, for genft score --by task")
    options = vars(parser.parse_args(arguments))
    try:
        prepare(**options)
    except UserError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
