"""Amounts: what people write, and exact integers back."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smol.recipe.units import (
    Amount,
    exact_tokens,
    format_bytes,
    format_tokens,
    parse_amount,
    parse_steps,
    parse_tokens,
    round_half_up,
)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("6T", 6 * 10**12, "tokens"),
        ("1.3T", 1_300_000_000_000, "tokens"),
        ("75B", 75 * 10**9, "tokens"),
        ("75 b tokens", 75 * 10**9, "tokens"),
        ("0.15M", 150_000, "tokens"),
        ("12k", 12_000, "tokens"),
        ("65536", 65536, "tokens"),
        ("65_536", 65536, "tokens"),
        ("65,536", 65536, "tokens"),
        (65536, 65536, "tokens"),
        (1e9, 10**9, "tokens"),
        ("1e9", 10**9, "tokens"),
        ("1 token", 1, "tokens"),
        ("2000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
        ("4_716_000 steps", 4_716_000, "steps"),
        ("5k steps", 5000, "steps"),
    ],
)
def test_reads(text: object, value: int, unit: str) -> None:
    assert parse_amount(text) == Amount(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "six", "-5B", "1.5", "1.00001k", "10 epochs", "5X", True, None, [1], "1T2"]
)
def test_refuses(text: object) -> None:
    with pytest.raises(
        ValueError, match=r"write tokens as 6T, 75B, 1\.3T or 65536, and steps as '2000 steps'"
    ):
        parse_amount(text)


def test_unit_matters() -> None:
    assert parse_steps(50) == parse_steps("50 steps") == 50
    with pytest.raises(ValueError, match="only tokens are allowed"):
        parse_tokens("50 steps")
    with pytest.raises(ValueError, match="only steps are allowed"):
        parse_steps("50B")


@given(st.integers(0, 10**16))
def test_exact_text_reads_back(tokens: int) -> None:
    assert parse_amount(exact_tokens(tokens)) == Amount(tokens, "tokens")
    assert parse_amount(str(Amount(tokens, "steps"))) == Amount(tokens, "steps")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (5_240_000 * 2_097_152, "10.989T"),
        (75 * 10**9, "75B"),
        (6_000_000_172_032, "6T"),
        (999_999_999_999, "1T"),
        (348_160, "348,160"),
        (0, "0"),
        (1_711_376_384, "1.711B"),
    ],
)
def test_formats(tokens: int, text: str) -> None:
    assert format_tokens(tokens) == text


def test_format_bytes() -> None:
    assert format_bytes(23_959_269_376) == "23.96 GB"
    assert format_bytes(12) == "12 B"


def test_halves_round_up() -> None:
    halves = [Fraction(n, 2) for n in (-3, -1, 0, 1, 2, 3, 5)]
    assert [round_half_up(value) for value in halves] == [-1, 0, 0, 1, 1, 2, 3]
    assert round_half_up(Fraction(6 * 10**12, 2_097_152)) == 2_861_023
