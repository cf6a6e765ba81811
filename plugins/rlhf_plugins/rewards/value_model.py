"""A trained value model as a reward: the return that it expects after each step, and of the whole completion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from rlhf_core.plugin import (
    Batch,
    ModelReward,
    ModelRewardConfig,
    Sample,
    SampleScores,
    ScoringModelConfig,
    StepReader,
    ValueModel,
    ValueReader,
    step_ends,
)


class ValueModelRewardConfig(ModelRewardConfig):
    """Options of the reward by a value model."""

    model: ScoringModelConfig = Field(
        description="Path of the value model: the directory `model_value` of a run of `rlhf train ppo`."
    )
    separator: str | None = Field(
        None,
        min_length=1,
        description="Text that ends a step; a rarer one makes longer steps. Null takes that of the search that asks for step"
        " scores, and a line's end in a whole completion.",
    )


class ValueModelReward(ModelReward[ValueModel]):
    """Scores completions, and each of their steps, by the return that a trained value model expects from there on.

    The value at a step's end is that of the state in which the next token is chosen. Behind the token that ends a completion
    nothing is chosen, so training gives no value to that state: the last value is that of the state before it.
    """

    api = 1
    Config = ValueModelRewardConfig
    config: ValueModelRewardConfig
    kind = ValueModel

    @cached_property
    def _scores(self) -> SampleScores[list[float]]:
        return SampleScores(self._score, self.model, self.config)

    def _score(self, batch: Batch) -> list[list[float]]:
        """Return for each completion the values at the ends of its steps, and that at its own end."""
        ends = step_ends(batch, self.model.tokenizer, self.config.separator or "\n").cpu()
        last = batch.response_lengths.cpu() - 1
        # The value behind a token is the value before the next one; the end token is the last one.
        after = [
            [min(at + 1, int(end)) for at in row.nonzero()[:, 0].tolist()] for row, end in zip(ends, last, strict=True)
        ]
        where = ends.new_zeros(ends.shape)
        for row, columns in enumerate(after):
            where[row, [*columns, int(last[row])]] = True
        values = self.model.token_values(batch, where=where.to(batch.device)).tolist()
        return [[row[at] for at in [*columns, int(end)]] for row, columns, end in zip(values, after, last, strict=True)]

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return the value of the state at each completion's end, in units of the reward that the model was trained with."""
        return [values[-1] for values in self._scores(samples)]

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Return for each step of each completion the value of the state at its end."""
        return [values[:-1] for values in self._scores(samples)]

    def step_reader(self, tokenizer: Any) -> StepReader | None:
        """Return what scores the steps of growing completions as `score_steps` does, reading each token once."""
        return ValueReader.of(self.model, self._scores, tokenizer, separator=self.config.separator)
