"""What every reward promises, as tests to inherit.

class TestBrevity(RewardContract):
    method = "acme-brevity"  # a registered name, or `reward = BrevityReward`
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from random import Random
from typing import Any, ClassVar

from rlhf_core.interfaces import RewardFn, Sample
from rlhf_core.testing.arithmetic import Arithmetic
from rlhf_core.testing.contract import Contract, after, is_number, require
from rlhf_core.testing.tiny import tiny_tokenizer

FLOATS = "test_one_finite_float_a_sample"


class RewardContract(Contract):
    """The conformance tests of a reward."""

    kind = "reward"
    reward: ClassVar[type[RewardFn] | None] = None
    """The class under test, in place of `method`."""
    tolerance: ClassVar[float] = 1e-5
    """Difference, relative or absolute, that other company in a batch may make to a score, by rounding."""

    def instance(self) -> RewardFn:
        """Return a new reward with `options`."""
        return self.subject()(self.config())

    def samples(self) -> list[Sample]:
        """Return samples to score, at least four, with the columns that the reward reads."""
        tokenizer = tiny_tokenizer()
        right, wrong = (list(Arithmetic(wrong=share).rows("sft", 4, seed=1)) for share in (0.0, 1.0))
        answers = [row["answer"] for row in Arithmetic().rows("prompt", 4, seed=1)]
        return [
            Sample(
                prompt=row["prompt"],
                completion=row["response"],
                prompt_ids=tokenizer(row["prompt"])["input_ids"],
                completion_ids=tokenizer(row["response"], add_special_tokens=False)["input_ids"],
                columns={"answer": answer, "verifiable": True, "steps": row["steps"], "labels": row["labels"]},
            )
            for rows in (right, wrong)
            for row, answer in zip(rows, answers, strict=True)
        ]

    def same(self, found: Sequence[float], expected: Sequence[float], what: str) -> None:
        """Fail unless the scores are equal within `tolerance`."""
        require(len(found) == len(expected), f"{what}: {len(found)} scores for {len(expected)} samples")
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            same = math.isclose(one, other, rel_tol=self.tolerance, abs_tol=self.tolerance)
            require(same, f"{what}: sample {number} scores {one!r} instead of {other!r}")

    def test_one_finite_float_a_sample(self) -> None:
        """Each sample gets one finite float; no samples, no scores."""
        reward, samples = self.instance(), self.samples()
        for batch in (samples, samples[:1], []):
            scores = reward.score(batch)
            require(isinstance(scores, list), f"`score` returns a {type(scores).__name__}, not a list")
            require(len(scores) == len(batch), f"{len(scores)} scores for {len(batch)} samples")
            wrong = [f"sample {number}: {score!r}" for number, score in enumerate(scores) if not is_number(score)]
            require(not wrong, f"not a finite float: {', '.join(wrong[:4])}")

    @after(FLOATS)
    def test_scores_follow_the_order_of_samples(self) -> None:
        """Samples in another order get the same scores in that order."""
        reward, samples = self.instance(), self.samples()
        order = list(range(len(samples)))
        Random(0).shuffle(order)
        scores = reward.score(samples)
        moved = reward.score([samples[number] for number in order])
        self.same(moved, [scores[number] for number in order], "in another order")

    @after(FLOATS)
    def test_scores_do_not_depend_on_company(self) -> None:
        """A sample's score is its own, whichever samples are scored together with it."""
        reward, samples = self.instance(), self.samples()
        whole = reward.score(samples)
        for size in (1, 3):
            parts = [reward.score(samples[first : first + size]) for first in range(0, len(samples), size)]
            self.same([score for part in parts for score in part], whole, f"in batches of {size}")

    @after(FLOATS)
    def test_the_same_samples_score_the_same(self) -> None:
        """Scoring again, or with a new instance, gives the same floats."""
        reward, samples = self.instance(), self.samples()
        first = reward.score(samples)
        require(reward.score(samples) == first, "the same samples score otherwise the second time")
        require(self.instance().score(samples) == first, "the same samples score otherwise with a new instance")

    def test_samples_are_left_alone(self) -> None:
        """Scoring changes nothing in the samples, which other rewards see too."""
        samples = self.samples()
        before: list[dict[str, Any]] = copy.deepcopy([asdict(sample) for sample in samples])
        reward = self.instance()
        reward.score(samples)
        reward.score_steps(samples)
        for number, sample in enumerate(samples):
            require(asdict(sample) == before[number], f"sample {number} isn't as it was")

    def test_steps_are_finite_floats(self) -> None:
        """A step-wise reward gives each sample a list of finite floats; any other gives None."""
        samples = self.samples()
        scores = self.instance().score_steps(samples)
        if scores is None:
            return
        require(len(scores) == len(samples), f"{len(scores)} lists of step scores for {len(samples)} samples")
        for number, steps in enumerate(scores):
            require(
                isinstance(steps, list) and bool(steps), f"sample {number} gets {steps!r}, not a list of step scores"
            )
            require(all(map(is_number, steps)), f"sample {number} has a step score that isn't a finite float: {steps}")
