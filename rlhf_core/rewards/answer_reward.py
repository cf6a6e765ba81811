"""The base class of rewards that compare a completion's final answer with the reference answer in its row."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.reward import RewardFn, Sample, SampleError
from rlhf_core.infra.errors import did_you_mean, shortened
from rlhf_core.rewards.final_answer import FinalAnswer, Thinking, after_thinking, find_answer
from rlhf_core.rewards.written_number import WrittenNumber, numbers_in, only_number

_LAST_CHARACTERS = 2000
"""How much of the end of an unmarked text is searched for its last number."""
_MOST_REFERENCES = 100_000
"""Read references that are kept, since the completions of a prompt, and its later epochs, share one."""


class AnswerRewardConfig(BaseConfig):
    """Options of every reward that compares answers."""

    column: str = Field(
        "answer",
        min_length=1,
        description="Column of the reference answer: a text, a number, or a list of which any is right; a path such as"
        " `reward_model.ground_truth` leads into nested columns.",
    )
    accept: Literal["anywhere", "marked", "boxed"] = Field(
        "anywhere",
        description="Where an answer counts: in `\\boxed{…}` alone (`boxed`), in `<answer>…</answer>` or after `####` as well"
        " (`marked`), or, where nothing is marked, also after `the answer is`, else in the text itself.",
    )
    thinking: Thinking = Field(
        "auto",
        description="The answer is searched after `</think>`, if there is one. `required`: a completion without it has no answer,"
        " for models whose chat template opens the block; `ignore`: it is searched in all of the text.",
    )
    truncated: Literal["marked", "never", "always"] = Field(
        "marked",
        description="Whether a completion that was cut off at the length limit has an answer: if it is `marked` and complete,"
        " `never`, or `always`, also where the last number may be cut off.",
    )
    wrong_score: float = Field(0.0, description="Score of a wrong answer; smaller punishes more. A right one scores 1.")
    no_answer_score: float | None = Field(
        None,
        description="Score of a completion without an answer that can be read; smaller punishes more. null: `wrong_score`.",
    )


class AnswerReward(RewardFn):
    """The base class of rewards that compare a completion's final answer with the reference answer in its row.

    A subclass defines `read` and `compare`.
    """

    Config: ClassVar[type[BaseConfig]] = AnswerRewardConfig
    config: AnswerRewardConfig

    @abstractmethod
    def read(self, references: Sequence[str]) -> list[Any]:
        """Return each reference as `compare` gets it; None for one that can't be read, which is an error. Results are kept."""

    @abstractmethod
    def compare(self, answers: Sequence[tuple[FinalAnswer, Sequence[Any]]]) -> list[bool | None]:
        """Return for each answer and its references whether it equals one of them; None where the answer can't be read."""

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return 1 for a right answer, `wrong_score` for a wrong one, `no_answer_score` where there is none.

        Raises:
            SampleError: a row lacks the reference answer, or it can't be read.
        """
        references = self._references(samples)
        answers = [
            (number, answer, references[number])
            for number, sample in enumerate(samples)
            if (answer := self.answer_of(sample)) is not None
        ]
        verdicts = self.compare([(answer, right) for _, answer, right in answers])
        wrong, missing = self.config.wrong_score, self.config.no_answer_score
        missing = wrong if missing is None else missing
        scores = [missing] * len(samples)
        for (number, _, _), verdict in zip(answers, verdicts, strict=True):
            scores[number] = 1.0 if verdict else missing if verdict is None else wrong
        return scores

    def answer_of(self, sample: Sample) -> FinalAnswer | None:
        """Return a completion's final answer; None where it has none that the options accept."""
        config = self.config
        complete = not sample.truncated or config.truncated == "always"
        if not complete and config.truncated == "never":
            return None
        text = after_thinking(with_stop(sample, "</answer>"), config.thinking)
        answer = None if text is None else find_answer(text, complete=complete)
        if answer is None or config.accept == "anywhere":
            return answer
        return answer if answer.how == "boxed" or (config.accept == "marked" and answer.marked) else None

    @cached_property
    def _read(self) -> dict[str, Any]:
        """Reference text → the reference as read."""
        return {}

    def _references(self, samples: Sequence[Sample]) -> list[list[Any]]:
        """Return what the references of each sample were read as."""
        column = self.config.column
        texts = [self._texts(column_of(sample, column, number), number) for number, sample in enumerate(samples)]
        if len(self._read) > _MOST_REFERENCES:
            self._read.clear()
        new = [text for text in dict.fromkeys(text for row in texts for text in row) if text not in self._read]
        self._read.update(zip(new, self.read([_answer_in(text) for text in new]), strict=True))
        for number, row in enumerate(texts):
            for text in row:
                if self._read[text] is None:
                    raise SampleError(
                        "the reference answer can't be read",
                        sample=number,
                        place=f"column `{column}`",
                        got=shortened(text),
                        fix="correct the row, leave it out, or name another `column`",
                    )
        return [[self._read[text] for text in row] for row in texts]

    def _texts(self, value: Any, number: int) -> list[str]:
        """Return the texts of a column's value: of a list, one each."""
        values = list(value) if isinstance(value, list | tuple) else [value]
        texts = [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
        bad = [
            one
            for one, text in zip(values, texts, strict=True)
            if not isinstance(one, str | int | float)
            or not text.strip()
            or (isinstance(one, float) and math.isnan(one))
        ]
        if bad or not values:
            raise SampleError(
                "a reference answer must be a text, a number, or a list of these",
                sample=number,
                place=f"column `{self.config.column}`",
                got=shortened(value),
            )
        return texts


def number_of(answer: FinalAnswer, *, decimal_comma: bool = False) -> WrittenNumber | None:
    """Return the number that an answer gives; None where it gives none, several that could be meant, or a formula.

    Of a marked answer the only number counts, of a stated one the first (after the last equals sign), of a text the last.
    """
    if answer.marked:
        return only_number(answer.text, decimal_comma=decimal_comma)
    if answer.how == "text":
        found = numbers_in(answer.text[-_LAST_CHARACTERS:], decimal_comma=decimal_comma)
        return found[-1] if found else None
    result = answer.text.rpartition("=")[2]
    number = only_number(result, decimal_comma=decimal_comma)
    if number is not None or re.search(r"[\\^]", result):
        return number
    return next(iter(numbers_in(result, decimal_comma=decimal_comma)), None)


def with_stop(sample: Sample, tag: str) -> str:
    """Return a completion's text with the closing tag at which it stopped: a stop string is no part of the text."""
    text = sample.completion
    opening = tag.replace("</", "<", 1)
    return text + tag if sample.stop_reason == "stop" and text.rfind(opening) > text.rfind(tag) else text


def _answer_in(reference: str) -> str:
    """Return the answer in a reference text: worked solutions, such as those of GSM8K and MATH, mark it as completions do."""
    answer = find_answer(reference)
    return answer.text if answer is not None and answer.marked else reference.strip()


def column_of(sample: Sample, column: str, number: int, *, option: str = "column") -> Any:
    """Return the value of a sample's column, or of a path into it such as `reward_model.ground_truth`.

    Args:
        number: the sample's index among those that are scored, for messages.
        option: the reward's option that names the column, for messages.

    Raises:
        SampleError: the row has no such column.
    """
    value: Any = sample.columns
    if column in sample.columns:
        return sample.columns[column]
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = [str(key) for key in (value if isinstance(value, Mapping) else sample.columns)]
            hint = did_you_mean(part, known) if known else "keep it in the data"
            fix = f"set the reward's option `{option}` to the one that is meant; {hint}" if known else hint
            raise SampleError(f"the row has no column `{column}`", sample=number, fix=fix)
        value = value[part]
    return value
