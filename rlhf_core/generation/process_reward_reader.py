"""Read growing completions by a process reward model, each token once: keys and values of earlier steps are kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_core.contracts.reward import Sample, StepReader
from rlhf_core.generation.kept_states import KeptStates, measure_reading
from rlhf_core.generation.paged_cache import CachedSequence
from rlhf_core.infra.errors import DataError
from rlhf_core.models.model_reward import SampleScores
from rlhf_core.models.process_reward_model import ProcessRewardModel

log = logging.getLogger(__name__)


class ProcessRewardReader(StepReader):
    """Gives each step the probability that all is right up to its end, as `ProcessRewardModel.scores` computes it.

    `of` returns one where the model can be read so.

    Args:
        scores: encodes prompts as in the model's training.
    """

    def __init__(self, model: ProcessRewardModel, scores: SampleScores[Any]) -> None:
        self.model, self.scores = model, scores
        self.separator = model.separator
        self._states = KeptStates(model.backbone, most_tokens=scores.config.batch_tokens)

    @classmethod
    def of(cls, model: ProcessRewardModel, scores: SampleScores[Any], tokenizer: Any) -> ProcessRewardReader | None:
        """Return the reader; None where the policy's tokenizer is another one, or the model's attention can't be replaced."""
        obstacle = model.backbone.measured(measure_reading).obstacle
        if tokenizer.get_vocab() != model.tokenizer.get_vocab():
            obstacle = "it has another tokenizer than the policy"
        if obstacle is not None:
            log.info("%s reads completions from their beginning after each step: %s", model.source, obstacle)
            return None
        return cls(model, scores)

    @property
    def forwarded(self) -> int:  # type: ignore[override]
        """Tokens that the model was run on."""
        return self._states.forwarded

    def begin(self, samples: Sequence[Sample]) -> list[CachedSequence]:
        if not samples:
            return []
        ids = self.scores.prompt_ids(samples)
        return self._states.read([None] * len(ids), ids)[0]

    def follow(
        self, kept: Sequence[CachedSequence], samples: Sequence[Sample], new: Sequence[int]
    ) -> list[tuple[CachedSequence, float]]:
        if not samples:
            return []
        tokens = []
        for number, (before, sample, count) in enumerate(zip(kept, samples, new, strict=True)):
            ids = [int(token) for token in sample.completion_ids][-count:]
            if sample.stop_reason == "end":  # the model was trained with its own end token
                ids[-1] = self.scores.end_of(sample)
            positions = self.model.max_positions
            if positions is not None and before.length + len(ids) > positions:
                raise DataError(
                    "a completion is longer than the process reward's positions", place=f"sample {number}",
                    got=f"{before.length + len(ids)} tokens for {positions} positions", fix="lower `max_new_tokens`",
                )  # fmt: skip
            tokens.append(ids)
        read, hidden = self._states.read(kept, tokens)
        with torch.no_grad(), self.model.backbone.product_precision():
            scores = self.model.head(hidden)[:, 0].float().sigmoid()
        return list(zip(read, scores.tolist(), strict=True))

    def free(self, kept: Sequence[CachedSequence]) -> None:
        for one in kept:
            one.free()
