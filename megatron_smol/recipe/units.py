"""Amounts as people write them: "6T", "75B", "65536" (tokens) and "2000 steps".

The first thing a recipe passes through: `schema` turns every such text into an `Amount` or a whole number,
and everything after it (plan, data order, trainer) counts in exact integers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Unit = Literal["tokens", "steps"]

_LARGE = {"T": 10**12, "B": 10**9, "M": 10**6}
_SCALE_OF = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_AMOUNT = re.compile(
    r"(?P<number>\d[\d_,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<scale>[kmbgt]?)\s*(?P<unit>tokens?|steps?|)",
    re.IGNORECASE,
)
HOW_TO_WRITE = "write tokens as 6T, 75B, 1.3T or 65536, and steps as '2000 steps'"


@dataclass(frozen=True, slots=True)
class Amount:
    """A whole number of tokens or of optimizer steps."""

    value: int
    unit: Unit

    def __str__(self) -> str:
        """Exact text that `parse_amount` reads back."""
        return f"{self.value} steps" if self.unit == "steps" else exact_tokens(self.value)


def parse_amount(text: object) -> Amount:
    """Read "6T", "75B", "65536", 65536 or "2000 steps"; a bare number is tokens."""
    if isinstance(text, Amount):
        return text
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ValueError(f"{text!r} is not an amount; {HOW_TO_WRITE}")
    match = _AMOUNT.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not an amount; {HOW_TO_WRITE}")
    number = Fraction(match["number"].replace("_", "").replace(",", ""))
    unit: Unit = "steps" if match["unit"].lower().startswith("step") else "tokens"
    exact = number * _SCALE_OF[match["scale"].lower()]
    if exact.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of {unit}; {HOW_TO_WRITE}")
    return Amount(int(exact), unit)


def parse_tokens(text: object) -> int:
    """Like `parse_amount`, for places where only tokens make sense."""
    amount = parse_amount(text)
    if amount.unit != "tokens":
        raise ValueError(
            f"{text!r} is in steps, and only tokens are allowed here; write it as 6T, 75B or 65536"
        )
    return amount.value


def parse_steps(text: object) -> int:
    """Read "2000 steps" or a bare 2000 as a number of steps, at least 1, for places where only steps make sense."""
    if isinstance(text, int) and not isinstance(text, bool):
        text = f"{text} steps"
    amount = parse_amount(text)
    if amount.unit != "steps":
        raise ValueError(f"{text!r} is in tokens, and only steps are allowed here; write it as '2000 steps'")
    if amount.value < 1:
        raise ValueError(f"{text!r} is no interval; the smallest is 1 step")
    return amount.value


def exact_tokens(tokens: int) -> str:
    """The shortest text that means exactly `tokens`: 6T, 1.3T, 65536."""
    for suffix, scale in _LARGE.items():
        if tokens >= scale and tokens * 1000 % scale == 0:
            return _strip(f"{tokens / scale:.3f}") + suffix
    return str(tokens)


def format_tokens(tokens: int | float) -> str:
    """For reading, rounded to three decimals: 10.989T, 75B; below a million in full, 348,160."""
    for suffix, scale in _LARGE.items():
        if round(tokens / scale, 3) >= 1:
            return _strip(f"{tokens / scale:,.3f}") + suffix
    return f"{round(tokens):,}"


def _strip(decimal: str) -> str:
    return decimal.rstrip("0").rstrip(".")


def format_bytes(count: int | float) -> str:
    """Decimal bytes, as disks and networks are sold: 23.96 GB."""
    for suffix, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g} {suffix}"
    return f"{round(count)} B"


def round_half_up(value: Fraction) -> int:
    """The rounding rule of the plan: to the nearest whole number, halves upwards."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
