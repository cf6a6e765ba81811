"""Numbers are read as they are written, exactly, and nothing else is taken for one."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from rlhf_core.rewards.written_number import numbers_in, read_number

READ = {
    "5": 5, "-5": -5, "−5": -5, "+5": 5, "- 5": -5, "5.": 5, "3.50": "7/2", ".5": "1/2", "007": 7, "-0": 0,
    "1,234": 1234, "1,234.5": "2469/2", "1 234 567": 1234567, "1{,}234": 1234, "1,00,000": 100000, "1_000": 1000,
    "$5": 5, r"\$5": 5, "-$5": -5, "$-5": -5, "5€": 5, "US$5": 5, "$5$": 5, r"\(5\)": 5, "(5)": 5, "**42**": 42,
    "1/2": "1/2", "-3/4": "-3/4", "2 1/2": "5/2", "½": "1/2", "2½": "5/2", r"\frac{3}{4}": "3/4", r"\dfrac34": "3/4",
    r"-\tfrac{3}{4}": "-3/4", r"\frac{-3}{4}": "-3/4", r"2\frac{1}{2}": "5/2", r"-2\frac12": "-5/2",
    "1.5e3": 1500, "1.5E-3": "3/2000", r"1.5\times 10^3": 1500, r"1.5 \cdot 10^{-3}": "3/2000", "2 × 10^4": 20000,
    "5 cm": 5, "5cm": 5, r"5\text{ m}": 5, r"5\,\mathrm{cm}^2": 5, "60 km/h": 60, "16 eggs": 16, "3/4 cup": "3/4",
    "5 square feet": 5, r"90^\circ": 90, r"90^{\circ}": 90, "90°": 90, "42 apples.": 42, "5 million": 5_000_000,
    "x=5": 5, r"x = -\frac{1}{2}": "-1/2", "x_1 = 3": 3, r"x \approx 3.14": "157/50", "٣٫٥": "7/2", "５": 5,
}  # fmt: skip
NONE = [
    "", "abc", "12,34", "1/0", "1/2/3", "(1,2)", "1,2", "3 and 4", "3 or 4", "10:30", "1-2", "1.2.3", "5x", "5 x", "2x+1",
    "2^{10}", "5²", "5!", r"3\sqrt{2}", r"5\pi", "5 pi", "5 dozen", r"\boxed{5}", "0x10", "1e999999999", "9" * 150, "1 " * 500,
    "e", "5 \\times 3", "x<3",
]  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_numbers(text: str) -> None:
    number = read_number(text)
    assert number is not None and number.value == Fraction(READ[text]) and not number.percent


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_number(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize("text", ["50%", r"50\%", "50 percent", r"50 \text{ percent}", "50 per cent"])
def test_percent(text: str) -> None:
    number = read_number(text)
    assert number is not None and (number.value, number.percent) == (50, True)


def test_decimal_comma() -> None:
    number = read_number("1.234,5", decimal_comma=True)
    assert number is not None and number.value == Fraction(2469, 2)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("He has 3 apples and 4 pears, 7 in all.", [3, 4, 7]),
        ("10-5 = 5", [10, 5, 5]),
        ("it is -5", [-5]),
        ("- 5 apples\n- 6 pears", [5, 6]),
        ("costs $18.00.", [18]),
        ("H2O, x2 and version 1.2.3", []),
        ("5x + 3", [3]),
        ("2^10", []),
        ("about 1,234,567 people", [1234567]),
        (r"\frac{1}{2} + \frac{1}{4} = \frac{3}{4}", [Fraction(1, 2), Fraction(1, 4), Fraction(3, 4)]),
    ],
)
def test_numbers_in_a_text(text: str, values: list[int]) -> None:
    assert [number.value for number in numbers_in(text)] == values


@pytest.mark.parametrize(
    "piece", ["9", "1,", "1 ", "1/", "\\frac{", "-", "$", "1 123", "\\text{", ".", "1e", "\\", " ", "1 and "]
)
def test_reading_takes_linear_time(piece: str) -> None:
    begin = time.process_time()
    numbers_in(piece * (50_000 // len(piece)))
    read_number(piece * (50_000 // len(piece)))
    assert time.process_time() - begin < 5  # at most half a second, measured; quadratic time would be minutes
