"""Read growing completions by a model with a head, each token once: keys and values of earlier steps are kept."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from rlhf_core.contracts.reward import Sample, StepReader
from rlhf_core.generation.kept_states import KeptStates, measure_reading
from rlhf_core.generation.paged_cache import CachedSequence
from rlhf_core.infra.errors import DataError
from rlhf_core.models.model_reward import SampleScores
from rlhf_core.models.process_reward_model import ProcessRewardModel
from rlhf_core.models.value_model import ValueModel

log = logging.getLogger(__name__)


class ReadPath(NamedTuple):
    """What is kept of a path."""

    sequence: CachedSequence
    score: float
    """The head's at its last token."""


class ModelStepReader(StepReader):
    """Gives each step what a head says of the hidden state at the step's last token.

    `of` returns one where the model can be read so. A subclass says which tokens it reads, and what the head's output means.

    Args:
        scores: encodes prompts as in the model's training.
        separator: the text that ends a step; None where any will do.
    """

    def __init__(
        self, model: ProcessRewardModel | ValueModel, scores: SampleScores[Any], *, separator: str | None
    ) -> None:
        self.model, self.scores, self.separator = model, scores, separator
        self._states = KeptStates(model.backbone, most_tokens=scores.config.batch_tokens)

    @classmethod
    def of(cls, model: Any, scores: SampleScores[Any], tokenizer: Any, *, separator: str | None) -> Self | None:
        """Return the reader; None where the policy's tokenizer is another one, or the model's attention can't be replaced."""
        obstacle = model.backbone.measured(measure_reading).obstacle
        if tokenizer.get_vocab() != model.tokenizer.get_vocab():
            obstacle = "it has another tokenizer than the policy"
        if obstacle is not None:
            log.info("%s reads completions from their beginning after each step: %s", model.source, obstacle)
            return None
        return cls(model, scores, separator=separator)

    @abstractmethod
    def read_ids(self, sample: Sample, ids: list[int]) -> list[int]:
        """Return which of a step's tokens, its last ones, are read, as they are in the model's training."""

    @abstractmethod
    def head_scores(self, hidden: Tensor) -> Tensor:
        """Return (R,) float32 scores from the hidden states (R, D) at the last tokens."""

    @property
    def forwarded(self) -> int:  # type: ignore[override]
        """Tokens that the model was run on."""
        return self._states.forwarded

    def begin(self, samples: Sequence[Sample]) -> list[ReadPath]:
        if not samples:
            return []
        ids = self.scores.prompt_ids(samples)
        return self._read([None] * len(ids), ids)

    def follow(
        self, kept: Sequence[ReadPath], samples: Sequence[Sample], new: Sequence[int]
    ) -> list[tuple[ReadPath, float]]:
        steps = []
        for number, (before, sample, count) in enumerate(zip(kept, samples, new, strict=True)):
            ids = self.read_ids(sample, [int(token) for token in sample.completion_ids][-count:])
            length, positions = before.sequence.length + len(ids), self.model.max_positions
            if positions is not None and length > positions:
                raise DataError(
                    "a completion is longer than the process reward's positions", place=f"sample {number}",
                    got=f"{length} tokens for {positions} positions", fix="lower `max_new_tokens`",
                )  # fmt: skip
            steps.append(ids)
        read = [number for number, ids in enumerate(steps) if ids]
        paths = dict(zip(read, self._read([kept[at].sequence for at in read], [steps[at] for at in read]), strict=True))
        found = [paths.get(at) or ReadPath(one.sequence.fork(), one.score) for at, one in enumerate(kept)]
        return [(path, path.score) for path in found]

    def free(self, kept: Sequence[ReadPath]) -> None:
        for one in kept:
            one.sequence.free()

    def _read(self, kept: Sequence[CachedSequence | None], tokens: Sequence[Sequence[int]]) -> list[ReadPath]:
        """Read at least one token behind each sequence."""
        if not tokens:
            return []
        read, hidden = self._states.read(kept, tokens)
        with torch.no_grad(), self.model.backbone.product_precision():
            scores = self.head_scores(hidden).tolist()
        return [ReadPath(sequence, score) for sequence, score in zip(read, scores, strict=True)]


class ProcessRewardReader(ModelStepReader):
    """Gives each step the probability that all is right up to its end, as `ProcessRewardModel.scores` computes it."""

    def read_ids(self, sample: Sample, ids: list[int]) -> list[int]:
        # The model was trained with its own end token.
        return [*ids[:-1], self.scores.end_of(sample)] if sample.stop_reason == "end" else ids

    def head_scores(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)[:, 0].float().sigmoid()


class ValueReader(ModelStepReader):
    """Gives each step the value of the state at its end, as `ValueModel.token_values` computes it for the token behind it.

    The token that ends a completion isn't read: training gives values to states in which a token is chosen, and none is chosen
    behind the last one.
    """

    def read_ids(self, sample: Sample, ids: list[int]) -> list[int]:
        return ids if sample.truncated else ids[:-1]

    def head_scores(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)[:, 0].float()
