"""The rewards that the kit tries trainers and samplers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.reward import RewardFn, Sample


class TokenShare(RewardFn):
    """Reward for online trainers: the share of a completion's tokens whose id has a bit set.

    It is dense, so that a random model learns it in seconds. An end token counts one half, so that neither ending at once nor
    never ending is best.
    """

    api = 1

    def __init__(self, bit: int = 0) -> None:
        super().__init__()
        self.bit = bit

    def describe(self) -> dict[str, Any]:
        return {"bit": self.bit}

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        """Return one sample's share of tokens with the bit set, in [0, 1]."""
        worth = [float(token >> self.bit & 1) for token in sample.completion_ids]
        if worth and sample.stop_reason == "end":
            worth[-1] = 0.5
        return sum(worth) / max(len(worth), 1)


class DigitReward(RewardFn):
    """Reward for samplers: the number of digits, less a hundredth per token. It records what it was given.

    It is step-wise, too: a step is a line, and its score that of the completion up to its end.
    """

    api = 1

    def __init__(self, config: BaseConfig | None = None, *, sign: int = 1) -> None:
        super().__init__(config)
        self.sign = sign
        """-1 turns the reward into its opposite."""
        self.columns: list[Mapping[str, Any]] = []
        """The columns of every sample that it scored."""
        self.given: dict[tuple[int, ...], float] = {}
        """The score that it gave to each completion, by its ids."""

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return `sign` times each completion's worth, and record columns and scores."""
        self.columns += [sample.columns for sample in samples]
        scores = [self.sign * self.worth(one.completion, one.completion_ids) for one in samples]
        self.given |= {tuple(one.completion_ids): score for one, score in zip(samples, scores, strict=True)}
        return scores

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Return for each line `sign` times the worth of the text up to its end, a token being a character; record columns."""
        self.columns += [sample.columns for sample in samples]
        found = []
        for sample in samples:
            lines = sample.completion.splitlines(keepends=True) or [""]
            texts = ["".join(lines[: at + 1]) for at in range(len(lines))]
            found.append([self.sign * self.worth(text, range(len(text))) for text in texts])
        return found

    def worth(self, text: str, ids: Sequence[int]) -> float:
        """Return a completion's score, but for `sign`."""
        return sum(map(str.isdigit, text)) - 0.01 * len(ids)
