"""`genft score`: compare generated answers with references, by the conventions of the published evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from genft_cli.console import UserError, one_line, table
from genft_cli.tables import check_columns, read_rows

TOLERANCE = 1e-3  # between two numbers; that of LoReFT's, GIFT's and WeGeFT's evaluations
_CHOICES = ("true|false", "answer[1-5]", "ending[1-4]", "option[12]", "solution[12]")
_NUMBER = r"-?\d+\.?\d*"


class Verdict(NamedTuple):
    """One answer: what was found in the output, what was expected, and whether they are equal."""

    found: str | None
    expected: str
    correct: bool


def commonsense(output: str, reference: str) -> Verdict:
    """The first choice in the output, such as "answer2", against that of the reference, which may be a sentence.

    The reference decides between true/false, answer1 to answer5, ending1 to ending4, option1/option2 and
    solution1/solution2. As in LLM-Adapters, case matters and a choice may be a part of a word.

    Raises:
        ValueError: the reference has no choice.
    """
    matches = [(match, choice) for choice in _CHOICES if (match := re.search(choice, reference))]
    if not matches:
        raise ValueError("no choice such as true, answer1, ending1, option1 or solution1 in the reference")
    first, choice = min(matches, key=lambda pair: pair[0].start())
    found = re.search(choice, output)
    return Verdict(found and found[0], first[0], found is not None and found[0] == first[0])


def gsm8k(output: str, reference: str) -> Verdict:
    """The number after the first "####", else the last number of the output, against that of the reference.

    As in LLM-Adapters, commas are removed, and words, units and percent signs around a number are ignored.

    Raises:
        ValueError: the reference has no number.
    """
    expected, found = _number(reference), _number(output)
    if expected is None:
        raise ValueError("no number in the reference")
    correct = found is not None and abs(float(found) - float(expected)) <= TOLERANCE
    return Verdict(found, expected, correct)


def _number(text: str) -> str | None:
    text = text.replace(",", "")
    _, marker, rest = text.partition("####")
    if marker and (found := re.match(rf"[\s$]*({_NUMBER})", rest)):
        return found[1]
    numbers: list[str] = re.findall(_NUMBER, text)
    return numbers[-1] if numbers else None


def letter(output: str, reference: str) -> Verdict:
    """The first capital A to E in the output against the reference, as LLM-Adapters scores AQuA. Note that this takes
    the A of "Answer".

    Raises:
        ValueError: the reference is not one of these letters.
    """
    expected = reference.strip()
    if not re.fullmatch("[A-E]", expected):
        raise ValueError("the reference is none of A, B, C, D, E")
    found = re.search("[A-E]", output)
    return Verdict(found and found[0], expected, found is not None and found[0] == expected)


def exact(output: str, reference: str) -> Verdict:
    """The output against the reference, without spaces and line breaks at either end."""
    found, expected = output.strip(), reference.strip()
    return Verdict(found or None, expected, found == expected)


SCORERS: dict[str, Callable[[str, str], Verdict]] = {
    "commonsense": commonsense,
    "gsm8k": gsm8k,
    "letter": letter,
    "exact": exact,
}


def score(
    answers: str,
    scorer: str,
    *,
    generated_column: str = "generated",
    reference_column: str = "answer",
    by: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Score a file of answers and write the result as JSON, by default beside the file.

    Args:
        answers: .jsonl, .json or .csv with one answer per row.
        scorer: a name in SCORERS.
        generated_column: column of the generated answers.
        reference_column: column of the references.
        by: a column, such as the name of the task: also the accuracy of each of its values, and their mean.
        output: file of the result; default: ANSWERS with .score.json.

    Raises:
        UserError: a mistake in an option or in the file.
    """
    if scorer not in SCORERS:
        raise UserError(f"--scorer {scorer}: choose from {', '.join(SCORERS)}")
    rows = read_rows("ANSWERS", answers)
    columns = {"--generated-column": generated_column, "--reference-column": reference_column, "--by": by}
    for option, column in columns.items():
        if column is not None:
            check_columns(option, answers, rows, column, answers)
    verdicts = []
    for number, row in enumerate(rows, 1):
        try:
            verdicts.append(SCORERS[scorer](str(row[generated_column]), str(row[reference_column])))
        except ValueError as error:
            raise UserError(f"{answers}: row {number}: {error}, which is {row[reference_column]!r:.60}") from None
    result: dict[str, Any] = {"scorer": scorer, **_counts(verdicts)}
    if by is not None:
        names = list(dict.fromkeys(str(row[by]) for row in rows))
        of = {name: [v for v, row in zip(verdicts, rows, strict=True) if str(row[by]) == name] for name in names}
        result["by"] = {name: _counts(chosen) for name, chosen in of.items()}
        result["mean"] = sum(counts["accuracy"] for counts in result["by"].values()) / len(names)
    path = Path(output).expanduser() if output else Path(answers).expanduser().with_suffix(".score.json")
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or one_line(error)}") from None
    return result


def _counts(verdicts: list[Verdict]) -> dict[str, Any]:
    correct = sum(verdict.correct for verdict in verdicts)
    return {
        "rows": len(verdicts),
        "correct": correct,
        "without_answer": sum(verdict.found is None for verdict in verdicts),
        "accuracy": correct / len(verdicts),
    }


def report(result: dict[str, Any]) -> str:
    """The result as text: one line, or with `by` a table."""
    line = f"accuracy {result['accuracy']:.4f} ({result['correct']} of {result['rows']}"
    line += f"; {result['without_answer']} without an answer)" if result["without_answer"] else ")"
    if "by" not in result:
        return line
    rows = [[name, str(counts["rows"]), f"{counts['accuracy']:.4f}"] for name, counts in result["by"].items()]
    rows.append(["mean", "", f"{result['mean']:.4f}"])
    return f"{table(['', 'rows', 'accuracy'], rows)}\n\n{line}"
