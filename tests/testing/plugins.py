"""Rewards, samplers and mergers to try the contracts on: sound ones, and broken ones with one fault each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.interfaces import Completion, Merger, RewardFn, Sample, Sampler
from rlhf_core.testing.arithmetic import step_labels, verify


class Exact(RewardFn):
    """Rewards the right answer, and each right step."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(verify(sample.prompt, sample.completion)) for sample in samples]

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        return [[float(label) for label in step_labels(sample.prompt, sample.completion)] for sample in samples]


class Length(RewardFn):
    """Rewards length."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.completion)) for sample in samples]


class OneScore(Length):
    """Returns one score for all."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return super().score(samples)[:1]


class NoScore(Length):
    """Has no score for what it can't read."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [None if "-" in str(sample.prompt) else 1.0 for sample in samples]  # type: ignore[misc]


class Unordered(Length):
    """Returns the scores sorted."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return sorted(super().score(samples))


class Relative(Length):
    """Scores a sample by its place among the others."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        scores = super().score(samples)
        return [score - max(scores) for score in scores]


class Noisy(Length):
    """Adds noise."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [score + 1e-7 * random.random() for score in super().score(samples)]


class Writes(Length):
    """Notes its score in the sample's columns."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        for sample in samples:
            sample.columns["length"] = len(sample.completion)  # type: ignore[index]
        return super().score(samples)


class BadSteps(Length):
    """Gives a step a score that isn't a number."""

    api = 1

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        return [[1.0, float("nan")] for _ in samples]


class Echo(Sampler):
    """Answers with the same tokens, scored by their number."""

    api = 1
    first = 9
    score: float | None = 1.0

    def sample(self, prompts: Sequence[Any], n: int = 1) -> list[list[Completion]]:
        return [[self.completion(index, n) for index in range(n)] for _ in prompts]

    def completion(self, index: int, n: int) -> Completion:
        length = self.first - index
        return Completion("a" * length, [97] * length, [-0.5] * length, "length", score=float(length))


class Fewer(Echo):
    """Returns one completion, whatever n is."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1) -> list[list[Completion]]:
        return [completions[:1] for completions in super().sample(prompts, n)]


class ManyByDefault(Echo):
    """Returns four completions where none were asked for."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 4) -> list[list[Completion]]:
        return super().sample(prompts, n)


class TextOnly(Echo):
    """Takes no chat messages."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1) -> list[list[Completion]]:
        return super().sample([prompt.strip() for prompt in prompts], n)


class WorstFirst(Echo):
    """Returns the worst first."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1) -> list[list[Completion]]:
        return [completions[::-1] for completions in super().sample(prompts, n)]


class NoLogprobs(Echo):
    """Doesn't say how likely its tokens were."""

    api = 1

    def completion(self, index: int, n: int) -> Completion:
        return Completion("ab", [97, 98], [], "end")


class Positive(Echo):
    """Gives probabilities for log-probabilities."""

    api = 1

    def completion(self, index: int, n: int) -> Completion:
        return Completion("ab", [97, 98], [0.5, 0.5], "end")


class UnknownEnd(Echo):
    """Ends for a reason of its own."""

    api = 1

    def completion(self, index: int, n: int) -> Completion:
        return Completion("ab", [97, 98], [-0.5, -0.5], "eos")


class Linear(Merger):
    """Adds weighted tensors up."""

    api = 1

    def merge_tensor(
        self, name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        merged = torch.zeros(tensors[0].shape)
        for tensor, weight in zip(tensors, weights, strict=True):
            merged += weight * tensor.float()
        return merged


class AddsToBase(Linear):
    """Adds whole models to the base in place of differences."""

    api = 1

    def merge_tensor(
        self, name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        assert base is not None
        return base.float() + super().merge_tensor(name, base, tensors, weights)


class IgnoresWeights(Linear):
    """Averages, whatever the weights."""

    api = 1

    def merge_tensor(
        self, name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        return super().merge_tensor(name, base, tensors, [1 / len(tensors)] * len(tensors))


class FirstWins(Linear):
    """Takes the sign of the first model with a weight."""

    api = 1

    def merge_tensor(
        self, name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        first = next(tensor for tensor, weight in zip(tensors, weights, strict=True) if weight)
        return super().merge_tensor(name, base, tensors, weights).abs() * first.float().sign()


class KeepsBits(Linear):
    """Returns the inputs' dtype."""

    api = 1

    def merge_tensor(
        self, name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        return super().merge_tensor(name, base, tensors, weights).to(tensors[0].dtype)


class InPlace(Linear):
    """Adds up in its first input."""

    api = 1

    def merge_tensor(
        self, name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        merged = super().merge_tensor(name, base, tensors, weights)
        tensors[0].copy_(merged)
        return merged


class Drops(Linear):
    """Drops differences at random, from the global generator."""

    api = 1

    def merge_tensor(
        self, name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        assert base is not None
        merged = super().merge_tensor(name, base, tensors, weights)
        active = sum(1 for weight in weights if weight)
        # A draw an entry: two draws for the whole may be too near each other to change a bit.
        keep = torch.rand(merged.shape) if active > 1 else torch.ones(())
        return base.float() + (1 - 1e-6 * keep) * (merged - base.float())
