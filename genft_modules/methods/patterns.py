"""Regular expressions for names of layers: matched as in peft, and refused if matching them could take very long.

Configurations come from strangers, and Python's engine tries every way in which an expression can match: for `(a+)+$`
twice as many with every character. So, before peft matches anything, the ways are counted for the names of the model,
which takes time proportional to the expression. The count is an upper bound: a name's digits count as any digit,
letters as either case, and what only looks ahead or behind as matching.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

MOST_STEPS = 10**6  # for all expressions of a configuration and all names that differ in more than their digits
LONGEST = 4096  # characters of an expression with groups or repeats
LONGEST_PLAIN = 2**20  # of one without, such as the names of all layers
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_CATEGORIES = {
    "DIGIT": str.isdigit,
    "SPACE": str.isspace,
    "WORD": lambda char: char.isalnum() or char == "_",
}


def whole(pattern: str) -> str:
    """The expression for which peft matches a whole name with a string in target_modules."""
    return pattern


def end(pattern: str) -> str:
    """The expression for which peft matches the end of a name with a key of rank_pattern."""
    return rf"(.*\.)?({pattern})$"


def fits(pattern: str, name: str) -> bool:
    """Whether `pattern` matches layer `name` as in peft: the regular expression matches the end of the name."""
    return bool(_compiled(end(pattern)).match(name))


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The entry of a rank_pattern or alpha_pattern for layer `name`, matched as in peft."""
    return next((value for pattern, value in patterns.items() if fits(pattern, name)), default)


@lru_cache(maxsize=1 << 15)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def expressions(config: Any) -> Iterator[tuple[str, str, str]]:
    """Field, pattern and the expression that peft and genft make of it, for every pattern in a peft configuration. The
    fields have been checked, or are those of peft's own methods."""
    for field, value in vars(config).items():
        if field in ("target_modules", "exclude_modules", "penalty_modules", "feedforward_modules"):
            yield from ((field, pattern, whole(pattern)) for pattern in _strings(value, lists=False))
        elif field == "layers_pattern":
            yield from ((field, part, rf"(?:^|.*?\.){part}\.(?P<idx>\d+)\.") for part in _strings(value))
        elif field == "modules_to_save":
            yield from ((field, part, rf"(^|.*\.){part}($|\..*)") for part in _strings(value))
        elif isinstance(value, dict) and (field.endswith("_pattern") or field.startswith("enable_")):
            yield from ((field, part, end(part)) for part in _strings(list(value)))
        elif field == "tied_modules" and isinstance(value, (list, tuple)):
            yield from ((field, part, end(part)) for part in _strings(value))


def _strings(value: Any, *, lists: bool = True) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif lists and isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _strings(part)


def check_pattern(field: str, pattern: str, expression: str) -> None:
    """Raises ValueError if a pattern is too long, or what is made of it is no regular expression."""
    longest = LONGEST_PLAIN if _is_plain(pattern) else LONGEST
    if len(pattern) > longest:
        raise ValueError(f"{field}: got an expression of {len(pattern)} characters, expected at most {longest}")
    try:
        _compiled(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field}: got {pattern[:80]!r}, expected a regular expression ({error})") from None


def check_expressions(config: Any, *fields: str) -> None:
    """`check_pattern` for all patterns of these fields."""
    for field, pattern, expression in expressions(config):
        if field in fields:
            check_pattern(field, pattern, expression)


def check_matching(config: Any, names: Iterable[str]) -> None:
    """Raises ValueError, naming the field, if matching the configuration's patterns against the names could take very
    long."""
    shapes = sorted({re.sub("[0-9]", "0", name) for name in names})
    left = MOST_STEPS
    for field, pattern, expression in expressions(config):
        check_pattern(field, pattern, expression)
        if _is_plain(expression):
            continue
        try:
            for name in shapes:
                left = _Steps(name, left).of(expression)
        except _TooMany as error:
            raise ValueError(
                f"{field}: got {pattern[:80]!r}, which {str(error) or 'could take very long to match'}; "
                "expected a regular expression without repeats of repeats and without back-references"
            ) from None


def _is_plain(expression: str) -> bool:
    """Whether the expression has neither groups nor repeats. Matching takes a step per character then."""
    return not set("(*+?{") & set(expression)


class _TooMany(Exception):
    pass


class _Steps:
    """Follows all ways in which an expression can match a name. The ways that have come to a place are one entry, place
    → number of ways, so that counting takes much less time than walking them."""

    def __init__(self, name: str, left: int) -> None:
        self.name = name
        self.left = left

    def of(self, expression: str) -> int:
        """How many steps are left; raises _TooMany if none."""
        try:
            self._through(_parsed(expression), Counter({0: 1}))
        except RecursionError:
            raise _TooMany("is nested too deep") from None
        return self.left

    def _spend(self, ways: Counter[int]) -> None:
        self.left -= 10 + sum(ways.values())
        if self.left < 0:
            raise _TooMany

    def _through(self, items: Any, ways: Counter[int]) -> Counter[int]:
        for op, argument in items:
            if not ways:
                break
            self._spend(ways)
            ways = self._after(str(op), argument, ways)
        return ways

    def _after(self, op: str, argument: Any, ways: Counter[int]) -> Counter[int]:
        """The places after one item."""
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return Counter(
                {
                    place + 1: number
                    for place, number in ways.items()
                    if place < len(self.name) and _takes(op, argument, self.name[place])
                }
            )
        if op == "AT":
            return ways
        if op == "SUBPATTERN":
            return self._through(argument[-1], ways)
        if op == "ATOMIC_GROUP":
            return self._through(argument, ways)
        if op == "BRANCH":
            return sum((self._through(items, ways) for items in argument[1]), Counter())
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, items = argument
            everywhere = Counter(dict.fromkeys(range(len(self.name) + 1), sum(ways.values())))
            self._through(items, ways if direction > 0 else everywhere)
            return ways
        if op in _REPEATS:
            least, most, repeated = argument
            return self._repeated(least, most, repeated, ways)
        raise _TooMany(f"contains {op.lower()}")

    def _repeated(self, least: int, most: int, items: Any, ways: Counter[int]) -> Counter[int]:
        if least > LONGEST:
            raise _TooMany(f"repeats a part {least} times")
        done = Counter(ways) if not least else Counter()
        # After the least number, a round that takes no character is the last one.
        for times in range(1, min(most, least + len(self.name)) + 1):
            self._spend(ways)
            ways = self._through(items, ways)
            if times >= least:
                done.update(ways)
            if not ways:
                break
        return done


@lru_cache(maxsize=256)
def _parsed(expression: str) -> Any:
    return parser.parse(expression)


def _takes(op: str, argument: Any, char: str) -> bool:
    """Whether an item can take the character; a digit stands for all digits."""
    chars = "0123456789" if char == "0" else {char, char.lower(), char.upper()}
    return any(_takes_exactly(op, argument, one) for one in chars)


def _takes_exactly(op: str, argument: Any, char: str) -> bool:
    if op == "ANY":
        return True
    if op == "LITERAL":
        return chr(argument) == char
    if op == "NOT_LITERAL":
        return chr(argument) != char
    if op == "RANGE":
        return bool(argument[0] <= ord(char) <= argument[1])
    if op == "CATEGORY":
        name = str(argument).removeprefix("CATEGORY_")
        found = _CATEGORIES[name.removeprefix("NOT_")](char)
        return not char.isascii() or found != name.startswith("NOT_")
    negated = str(argument[0][0]) == "NEGATE"
    return negated != any(_takes_exactly(str(inner), value, char) for inner, value in argument[negated:])
