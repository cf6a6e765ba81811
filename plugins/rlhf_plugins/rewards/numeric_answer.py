"""Whether a completion's answer is the same number as the reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from pydantic import Field

from rlhf_core.plugin import AnswerReward, AnswerRewardConfig, FinalAnswer, WrittenNumber, number_of, only_number


class NumericAnswerConfig(AnswerRewardConfig):
    """Options of the reward for numbers."""

    tolerance: float = Field(
        1e-6,
        ge=0,
        description="Largest difference from the reference answer that is right; larger accepts rougher answers.",
    )
    relative_tolerance: float = Field(
        0.0, ge=0, description="The same as a share of the reference answer; the larger of the two allowances counts."
    )
    percent: Literal["either", "hundredth"] = Field(
        "either",
        description="What a percent sign means: `either` takes 50% for 50 and for 0.5, since reference answers often leave"
        " the sign out; `hundredth` for 0.5 alone.",
    )
    decimal_comma: bool = Field(False, description="Whether `1.234,5` is what `1,234.5` is otherwise.")


class NumericAnswerReward(AnswerReward):
    """Scores 1 if the completion's answer is the same number as the reference answer, else 0.

    Numbers are read exactly, as fractions: `1,234.50`, `2 1/2`, `\\frac{3}{4}`, `-$5`, `50\\%`, `1.5 \\times 10^{3}`, `16 eggs`.
    Of a marked answer the only number counts, of `the answer is …` the first (after an equals sign, if there is one), and of a
    text that marks nothing the last, as is usual for GSM8K (Cobbe et al. 2021, arXiv 2110.14168). An answer that names two
    numbers, or has to be computed, is none.
    """

    api = 1
    Config = NumericAnswerConfig
    config: NumericAnswerConfig

    def read(self, references: Sequence[str]) -> list[WrittenNumber | None]:
        """Return the number that each reference is; None where it is none."""
        return [only_number(reference, decimal_comma=self.config.decimal_comma) for reference in references]

    def compare(self, answers: Sequence[tuple[FinalAnswer, Sequence[WrittenNumber]]]) -> list[bool | None]:
        numbers = [number_of(answer, decimal_comma=self.config.decimal_comma) for answer, _ in answers]
        return [
            None if number is None else any(self._equal(number, reference) for reference in references)
            for number, (_, references) in zip(numbers, answers, strict=True)
        ]

    def _equal(self, number: WrittenNumber, reference: WrittenNumber) -> bool:
        """Tell whether a number is the reference within the tolerances, in one of the senses of a percent sign."""
        return any(
            abs(one - other)
            <= max(Fraction(self.config.tolerance), Fraction(self.config.relative_tolerance) * abs(other))
            for one, other in self._senses(number, reference)
        )

    def _senses(self, number: WrittenNumber, reference: WrittenNumber) -> list[tuple[Fraction, Fraction]]:
        """Return the pairs of values to compare."""
        pair = [number.value / 100 if number.percent else number.value]
        pair.append(reference.value / 100 if reference.percent else reference.value)
        if self.config.percent == "either" and number.percent != reference.percent:
            return [(pair[0], pair[1]), (number.value, reference.value)]
        return [(pair[0], pair[1])]
