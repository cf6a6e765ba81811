"""What every reward promises, as tests to inherit.

class TestBrevity(RewardContract):
    method = "acme-brevity"  # a registered name, or `reward = BrevityReward`, or a plain function
    changes: ClassVar = {"target": 3}  # options that change a score
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any, ClassVar
from unittest import SkipTest

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.rewards import FunctionReward, RewardFunction
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.contract import MethodContract, after, is_number, require
from rlhf_core.testing.tiny import tiny_tokenizer

FLOATS = "test_one_finite_float_a_sample"


class RewardContract(MethodContract):
    """The conformance tests of a reward."""

    kind = "reward"
    reward: ClassVar[type[RewardFn] | RewardFunction | None] = None
    """The class or function under test, in place of `method`."""
    changes: ClassVar[Mapping[str, Any]] = {}
    """Options → another value of each, with which some sample scores otherwise."""
    tolerance: ClassVar[float] = 1e-5
    """Difference, relative or absolute, that other company in a batch may make to a score, by rounding."""

    @classmethod
    def subject(cls) -> Any:
        """Return the class under test; of a function, a class that scores by it."""
        given = super().subject()
        if isinstance(given, type):
            return given

        class Function(FunctionReward):
            api = 1

            def __init__(self, config: BaseConfig | None = None) -> None:
                super().__init__(given, cls.options)

        Function.__doc__ = given.__doc__
        return Function

    def config(self) -> Any:
        """Return the reward's configuration with `options`; a function has none, and takes them as arguments."""
        return BaseConfig() if issubclass(self.subject(), FunctionReward) else super().config()

    def instance(self) -> RewardFn:
        """Return a new reward with `options`."""
        return self.subject()(self.config())

    def ready(self) -> RewardFn:
        """Return a new reward that is prepared, as a run has it before the first samples."""
        reward = self.instance()
        reward.prepare()
        return reward

    def samples(self) -> list[Sample]:
        """Return samples to score, at least four, with the columns that the reward reads."""
        tokenizer = tiny_tokenizer()
        right, wrong = (list(ArithmeticTask(wrong=share).rows("sft", 4, seed=1)) for share in (0.0, 1.0))
        answers = [row["answer"] for row in ArithmeticTask().rows("prompt", 4, seed=1)]
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

    def grouped(self) -> list[Sample]:
        """Return the samples with those of one prompt as a group; each its own group where all have one prompt."""
        samples = self.samples()
        prompts = [json.dumps(sample.prompt, default=repr) for sample in samples]
        number = {prompt: at for at, prompt in enumerate(dict.fromkeys(prompts))}
        if len(number) < 2:
            return [replace(sample, group=at) for at, sample in enumerate(samples)]
        return [replace(sample, group=number[prompt]) for sample, prompt in zip(samples, prompts, strict=True)]

    def same(self, found: Sequence[float], expected: Sequence[float], what: str) -> None:
        """Fail unless the scores are equal within `tolerance`."""
        require(len(found) == len(expected), f"{what}: {len(found)} scores for {len(expected)} samples")
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            same = math.isclose(one, other, rel_tol=self.tolerance, abs_tol=self.tolerance)
            require(same, f"{what}: sample {number} scores {one!r} instead of {other!r}")

    def test_one_finite_float_a_sample(self) -> None:
        """Each sample gets one finite float; no samples, no scores."""
        reward, samples = self.ready(), self.samples()
        for batch in (samples, samples[:1], []):
            scores = reward.score(batch)
            require(isinstance(scores, list), f"`score` returns a {type(scores).__name__}, not a list")
            require(len(scores) == len(batch), f"{len(scores)} scores for {len(batch)} samples")
            wrong = [f"sample {number}: {score!r}" for number, score in enumerate(scores) if not is_number(score)]
            require(not wrong, f"not a finite float: {', '.join(wrong[:4])}")

    @after(FLOATS)
    def test_scores_follow_the_order_of_samples(self) -> None:
        """Samples in another order get the same scores in that order."""
        reward, samples = self.ready(), self.grouped()
        order = list(range(len(samples)))
        Random(0).shuffle(order)
        scores = reward.score(samples)
        moved = reward.score([samples[number] for number in order])
        self.same(moved, [scores[number] for number in order], "in another order")

    @after(FLOATS)
    def test_scores_do_not_depend_on_company(self) -> None:
        """A sample's score is its own, or its group's, whichever other samples are scored together with it."""
        reward, samples = self.ready(), self.grouped()
        whole = reward.score(samples)
        groups = list(dict.fromkeys(sample.group for sample in samples))
        for size in (1, 3):
            found: dict[int, float] = {}
            for first in range(0, len(groups), size):
                chosen = [at for at, one in enumerate(samples) if one.group in groups[first : first + size]]
                found |= zip(chosen, reward.score([samples[at] for at in chosen]), strict=True)
            self.same([found[at] for at in range(len(samples))], whole, f"{size} prompts at a time")

    @after(FLOATS)
    def test_group_numbers_mean_nothing(self) -> None:
        """Which number a group has changes no score: it only says which samples answer one prompt."""
        reward, samples = self.ready(), self.grouped()
        other = [replace(sample, group=1000 - 7 * sample.group) for sample in samples]
        self.same(reward.score(other), reward.score(samples), "with other group numbers")

    @after(FLOATS)
    def test_any_completion_has_a_score(self) -> None:
        """Completions that were cut off, are empty, or have tokens that the policy didn't write get a finite float as well."""
        reward, samples = self.ready(), self.grouped()
        for what, changed in (
            ("cut off", [replace(sample, stop_reason="length") for sample in samples]),
            ("empty", [replace(sample, completion="", completion_ids=()) for sample in samples]),
            ("without ids", [replace(sample, prompt_ids=(), completion_ids=()) for sample in samples]),
            ("masked", [replace(one, mask=[at % 2 == 0 for at in range(len(one.completion_ids))]) for one in samples]),
        ):
            scores = reward.score(changed)
            bad = len(scores) != len(changed) or not all(map(is_number, scores))
            require(not bad, f"completions that are {what} score {scores[:4]}, not one finite float a sample")

    @after(FLOATS)
    def test_the_same_samples_score_the_same(self) -> None:
        """Scoring again, or with a new instance, gives the same floats."""
        reward, samples = self.ready(), self.samples()
        first = reward.score(samples)
        require(reward.score(samples) == first, "the same samples score otherwise the second time")
        again = self.ready()
        require(again.score(samples) == first, "the same samples score otherwise with a new instance")

    @after(FLOATS)
    def test_options_change_scores(self) -> None:
        """Each option in `changes`, set to the value there, changes the score of some sample."""
        own = list(self.changes) or list(self.subject().Config.model_fields)
        if not own:
            raise SkipTest("it has no options")
        if not self.changes:
            raise SkipTest(f"`changes` names no option to try, of {', '.join(own)}")
        samples = self.samples()
        before = self.ready().score(samples)
        for name, value in self.changes.items():
            changed = type(
                "Changed", (type(self),), {"options": {**self.options, name: value}, "expected_failures": {}}
            )
            after = changed().ready().score(samples)
            require(after != before, f"`{name}: {value!r}` changes no score of the samples")

    def test_what_it_describes_is_recorded(self) -> None:
        """What it says of itself for a run's record is JSON, and the same for each instance, or no run could be resumed."""
        found = self.instance().describe()
        require(isinstance(found, dict), f"`describe` returns a {type(found).__name__}, not a dict")
        try:
            text = json.dumps(found, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"`describe` returns what JSON can't hold: {error}") from None
        again = json.dumps(self.instance().describe(), sort_keys=True)
        require(text == again, f"`describe` of a new instance says otherwise: {again[:100]} for {text[:100]}")

    def test_samples_are_left_alone(self) -> None:
        """Scoring changes nothing in the samples, which other rewards see too."""
        samples = self.samples()
        before: list[dict[str, Any]] = copy.deepcopy([asdict(sample) for sample in samples])
        reward = self.ready()
        reward.score(samples)
        reward.score_steps(samples)
        for number, sample in enumerate(samples):
            require(asdict(sample) == before[number], f"sample {number} isn't as it was")

    def test_steps_are_finite_floats(self) -> None:
        """A step-wise reward gives each sample a list of finite floats, in order; any other gives None."""
        reward, samples = self.ready(), self.grouped()
        scores = reward.score_steps(samples)
        if scores is None:
            return
        require(len(scores) == len(samples), f"{len(scores)} lists of step scores for {len(samples)} samples")
        for number, steps in enumerate(scores):
            require(
                isinstance(steps, list) and bool(steps), f"sample {number} gets {steps!r}, not a list of step scores"
            )
            require(all(map(is_number, steps)), f"sample {number} has a step score that isn't a finite float: {steps}")
        for number, found in zip(reversed(range(len(samples))), reward.score_steps(samples[::-1]) or [], strict=True):
            self.same(found, scores[number], f"steps of sample {number} in another order")
