"""Confidence-based stopping (Fu et al. 2025, "Deep Think with Confidence", arXiv 2508.15260): unsure completions end early.

A completion's lowest group confidence is the least mean confidence of any `confidence_window` tokens in a row. A few completions
per prompt, drawn whole, say what is low for this prompt; the others end where they are less sure than that.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import Batch, Completion, Sampler, SamplingConfig, is_decided, prompt_batch, tally, whole_count
from rlhf_plugins.samplers.candidate_choice import answer_keys, best_by_votes

SLACK = 1e-5
"""Part by which the threshold is lowered, so that rounding doesn't end a copy of the completion that it was taken from."""


class ConfidenceConfig(SamplingConfig):
    """Options of confidence-based stopping: those of every completion that is drawn, and of the vote among them."""

    candidates: int = Field(
        16,
        ge=1,
        description="Most completions drawn per prompt, or n where that is more; larger makes the vote surer and costs more.",
    )
    warmup: int = Field(
        4,
        ge=1,
        description="Completions per prompt that are drawn whole, for the threshold below which the others end; larger estimates"
        " it better, and lets fewer end early.",
    )
    keep: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the warm-up's completions whose lowest group confidence is above the threshold; smaller ends more"
        " completions, earlier. The paper has 0.9 and 0.1.",
    )
    weight: Literal["mean", "lowest", "tail", "equal"] = Field(
        "mean",
        description="What a vote counts: the `mean` confidence of the completion's tokens, its `lowest` group confidence, that of"
        " its last `confidence_window` tokens (`tail`), or 1 (`equal`).",
    )
    consensus: float | None = Field(
        0.95,
        gt=0.5,
        le=1,
        description="A vote of at least two completions ends once the leading answer has this share of it; smaller ends it"
        " sooner, and more often with another winner. With weight equal a vote also ends once nothing can change it; null ends it"
        " then alone.",
    )
    round_size: int | None = Field(
        4,
        ge=1,
        description="Completions drawn at once after the warm-up; smaller ends a vote sooner, and decodes fewer together. Null"
        " draws all at once, as is done where no vote can end early: without consensus, and with another weight than equal.",
    )

    @property
    def ends_votes(self) -> bool:
        """Whether a vote may end before all candidates are drawn."""
        return self.consensus is not None or self.weight == "equal"

    @model_validator(mode="after")
    def _confidence_can_end(self) -> ConfidenceConfig:
        # In place of the check of `SamplingConfig`: without `min_confidence`, too, there is a threshold.
        if self.confidence_window > self.max_new_tokens:
            raise ValueError(
                f"no completion of at most {self.max_new_tokens} tokens (`max_new_tokens`) has the {self.confidence_window} of"
                " `confidence_window`, so none would end early: lower the window"
            )
        if not self.ends_votes and self.round_size not in (None, ConfidenceConfig.model_fields["round_size"].default):
            raise ValueError(
                "round_size has no meaning where no vote can end early: set `consensus`, or `weight: equal`"
            )
        if self.warmup >= self.candidates:
            raise ValueError(
                f"warmup ({self.warmup}) leaves none of the {self.candidates} `candidates` to end early: lower it"
            )
        return self


def lowest_group(confidence: Sequence[float], window: int) -> float:
    """Return the least mean of `window` token confidences in a row, nats; of fewer tokens their mean.

    Args:
        confidence: of each token of a completion, at least one.
    """
    width = min(window, len(confidence))
    sums = list(accumulate(confidence, initial=0.0))
    return min(after - before for before, after in zip(sums, sums[width:], strict=False)) / width


def confidence_threshold(lowest: Sequence[float], keep: float) -> float:
    """Return the bound that the share `keep` of the lowest group confidences is above: their quantile 1 - keep, interpolated."""
    ordered = sorted(lowest)
    place = (1 - keep) * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def vote_confidence(confidence: Sequence[float], window: int, weight: str) -> float:
    """Return what a completion's vote counts, by the option `weight`.

    Args:
        confidence: of each of its tokens, at least one.
    """
    if weight == "equal":
        return 1.0
    if weight == "lowest":
        return lowest_group(confidence, window)
    return fmean(confidence[-window:] if weight == "tail" else confidence)


class ConfidenceBasedStopping(Sampler):
    """Confidence-based stopping: ends unsure completions early, and a vote among the others once its winner is clear enough."""

    api = 1
    Config = ConfidenceConfig
    config: ConfidenceConfig
    roles: ClassVar = {"policy": "policy"}

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return the n best of each prompt's completions by a vote, those without one last.

        A completion has no vote without an answer, where it was cut off, or where its lowest group confidence is below the
        prompt's threshold: then it would have ended early. A score is the answer's share of the votes; of one answer's
        completions the one whose vote counts most comes first.
        """
        n = whole_count(n)
        batch = prompt_batch(self.policy, prompts)
        drawn, thresholds = self._drawn(batch, n, max(self.config.candidates, n), seed)
        lengths = batch.prompt_lengths.tolist()
        return [self._best(*each, n) for each in zip(drawn, thresholds, lengths, strict=True)]

    def _drawn(
        self, batch: Batch, n: int, most: int, seed: int | None
    ) -> tuple[list[list[Completion]], Sequence[float]]:
        """Return each prompt's completions, at least n, drawn in rounds until its vote is settled, and its threshold."""
        config, engine = self.config, self.engine(seed)
        size = config.round_size if config.round_size is not None and config.ends_votes else most
        seeds = engine.seeds(batch, most)
        options = {name: getattr(config, name) for name in SamplingConfig.model_fields}
        sampling = SamplingConfig(**{**options, "min_confidence": 0.0})  # reports confidences
        least = config.min_confidence or 0.0
        thresholds = [least] * batch.num_prompts
        drawn: list[list[Completion]] = [[] for _ in seeds]
        open_ones, begin, end = list(range(batch.num_prompts)), 0, config.warmup
        while open_ones and begin < most:
            new = engine.generate(
                batch.select(open_ones),
                end - begin,
                sampling,
                seeds=[seeds[number][begin:end] for number in open_ones],
                min_confidences=[thresholds[number] for number in open_ones],
            )
            for number, completions in zip(open_ones, new, strict=True):
                drawn[number] += completions
            if begin == 0:
                thresholds = [max(least, self._threshold(group)) for group in drawn]
            begin, end = end, min(most, max(end + size, n))
            open_ones = [
                number
                for number in open_ones
                if begin < n or not self._is_settled(drawn[number], thresholds[number], most - begin)
            ]
        return drawn, thresholds

    def _threshold(self, group: Sequence[Completion]) -> float:
        lowest = [lowest_group(one.confidence, self.config.confidence_window) for one in group]
        return confidence_threshold(lowest, self.config.keep) * (1 - SLACK)

    def _votes(self, group: Sequence[Completion], threshold: float) -> tuple[list[Hashable | None], list[float]]:
        """Return each completion's answer, None for one without a vote, and what its vote counts."""
        window, weight = self.config.confidence_window, self.config.weight
        keys = [
            None if lowest_group(one.confidence, window) < threshold or one.stop_reason == "confidence" else key
            for one, key in zip(group, answer_keys(group), strict=True)
        ]
        return keys, [vote_confidence(one.confidence, window, weight) for one in group]

    def _is_settled(self, group: Sequence[Completion], threshold: float, left: int) -> bool:
        """Tell whether a vote ends, with so many completions that may still be drawn."""
        keys, weights = self._votes(group, threshold)
        votes, consensus = tally(keys, weights), self.config.consensus
        several = sum(key is not None for key in keys) > 1
        if consensus is not None and several and max(votes.values()) >= consensus * sum(votes.values()):
            return True
        # By confidence, one further vote may outweigh many.
        return self.config.weight == "equal" and is_decided(keys, left)

    def _best(self, group: Sequence[Completion], threshold: float, prompt_length: int, n: int) -> list[Completion]:
        """Return the n best completions of a prompt with their details."""
        keys, weights = self._votes(group, threshold)
        about = {
            "candidates": len(group),
            "stopped": sum(one.stop_reason == "confidence" for one in group),
            "tokens_forwarded": prompt_length - 1 + sum(len(one.ids) for one in group),
            "threshold": threshold,
        }
        details = [{"vote": 0.0 if key is None else own, **about} for key, own in zip(keys, weights, strict=True)]
        return best_by_votes(group, keys, weights, n, ranks=weights, details=details)
