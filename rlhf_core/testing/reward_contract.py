"""The conformance tests of rewards: a class to inherit.

class TestBrevity(RewardContract):
    method = "acme-brevity"  # a registered name, or `reward = BrevityReward`, or a plain function
    changes: ClassVar = {"target": 3}  # options that change a score
"""

from __future__ import annotations

import copy
import inspect
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
from rlhf_core.rewards.background import awaited
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.contract import MethodContract, after, is_number, require
from rlhf_core.testing.tiny import tiny_tokenizer

FLOATS = "test_one_finite_float_per_sample"


def score_by(reward: RewardFn, samples: Sequence[Sample]) -> Any:
    """Return what `reward.score` returns for the samples, awaited where it is async."""
    scores = reward.score(samples)
    return awaited(scores) if inspect.isawaitable(scores) else scores


class RewardContract(MethodContract):
    """The conformance tests of a reward."""

    kind = "reward"
    reward: ClassVar[type[RewardFn] | RewardFunction | None] = None
    """The class or function under test, in place of `method`."""
    changes: ClassVar[Mapping[str, Any]] = {}
    """Option → another value, which changes the score of some sample."""
    tolerance: ClassVar[float] = 1e-5
    """Largest difference, relative or absolute, that rounding may make to a score as other samples are scored with it."""

    @classmethod
    def subject(cls) -> Any:
        """Return the class under test; for a function, a class that scores with it."""
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
        """Return the reward's configuration with `options`; an empty one for a function, which gets them as arguments."""
        return BaseConfig() if issubclass(self.subject(), FunctionReward) else super().config()

    def instance(self) -> RewardFn:
        """Return a new reward with `options`."""
        return self.subject()(self.config())

    def ready(self) -> RewardFn:
        """Return a new reward after `prepare`, as a run has it before it scores samples."""
        reward = self.instance()
        reward.prepare()
        return reward

    def samples(self) -> list[Sample]:
        """Return samples to score, at least four, with every column that the reward reads."""
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
        """Return the samples with a group number per prompt; each in its own group where all have the same prompt."""
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

    def test_one_finite_float_per_sample(self) -> None:
        """Each sample gets one finite float; no samples get an empty list."""
        reward, samples = self.ready(), self.samples()
        for batch in (samples, samples[:1], []):
            scores = score_by(reward, batch)
            require(isinstance(scores, list), f"`score` returns a {type(scores).__name__}, not a list")
            require(len(scores) == len(batch), f"`score` returns {len(scores)} scores for {len(batch)} samples")
            wrong = [f"sample {number}: {score!r}" for number, score in enumerate(scores) if not is_number(score)]
            require(not wrong, f"`score` must return finite floats; it returns for {', '.join(wrong[:4])}")

    @after(FLOATS)
    def test_scores_follow_the_order_of_samples(self) -> None:
        """Samples in another order get the same scores in that order."""
        reward, samples = self.ready(), self.grouped()
        order = list(range(len(samples)))
        Random(0).shuffle(order)
        scores = score_by(reward, samples)
        moved = score_by(reward, [samples[number] for number in order])
        self.same(moved, [scores[number] for number in order], "with the samples in another order")

    @after(FLOATS)
    def test_scores_do_not_depend_on_other_samples(self) -> None:
        """A sample's score depends on the sample, or its group, but on no other samples that are scored with it."""
        reward, samples = self.ready(), self.grouped()
        if reward.by_row:  # it says that it needs no others of the group either
            samples = [replace(sample, group=at) for at, sample in enumerate(samples)]
        whole = score_by(reward, samples)
        groups = list(dict.fromkeys(sample.group for sample in samples))
        for size in (1, 3):
            found: dict[int, float] = {}
            for first in range(0, len(groups), size):
                chosen = [at for at, one in enumerate(samples) if one.group in groups[first : first + size]]
                found |= zip(chosen, score_by(reward, [samples[at] for at in chosen]), strict=True)
            self.same([found[at] for at in range(len(samples))], whole, f"with {size} prompts at a time")

    @after(FLOATS)
    def test_group_numbers_mean_nothing(self) -> None:
        """The numbers of groups change no score: they only say which samples have the same prompt."""
        reward, samples = self.ready(), self.grouped()
        other = [replace(sample, group=1000 - 7 * sample.group) for sample in samples]
        self.same(score_by(reward, other), score_by(reward, samples), "with other group numbers")

    @after(FLOATS)
    def test_any_completion_has_a_score(self) -> None:
        """Completions that are truncated, empty, without token ids, or with masked tokens get a finite float as well."""
        reward, samples = self.ready(), self.grouped()
        for what, changed in (
            ("truncated", [replace(sample, stop_reason="length") for sample in samples]),
            ("empty", [replace(sample, completion="", completion_ids=()) for sample in samples]),
            ("without token ids", [replace(sample, prompt_ids=(), completion_ids=()) for sample in samples]),
            ("masked", [replace(one, mask=[at % 2 == 0 for at in range(len(one.completion_ids))]) for one in samples]),
        ):
            scores = score_by(reward, changed)
            bad = len(scores) != len(changed) or not all(map(is_number, scores))
            require(
                not bad, f"completions that are {what} get the scores {scores[:4]}, not one finite float per sample"
            )

    @after(FLOATS)
    def test_the_same_samples_score_the_same(self) -> None:
        """Scoring the same samples again, or with a new instance, gives the same floats."""
        reward, samples = self.ready(), self.samples()
        first = score_by(reward, samples)
        require(score_by(reward, samples) == first, "the same samples get other scores the second time")
        again = self.ready()
        require(score_by(again, samples) == first, "the same samples get other scores from a new instance")

    @after(FLOATS)
    def test_options_change_scores(self) -> None:
        """Each option in `changes`, set to the value there, changes the score of some sample."""
        own = list(self.changes) or list(self.subject().Config.model_fields)
        if not own:
            raise SkipTest("the reward has no options")
        if not self.changes:
            raise SkipTest(
                f"set `changes` on the contract class to values that change a score, of the options {', '.join(own)}"
            )
        samples = self.samples()
        before = score_by(self.ready(), samples)
        for name, value in self.changes.items():
            changed = type(
                "Changed", (type(self),), {"options": {**self.options, name: value}, "expected_failures": {}}
            )
            after = score_by(changed().ready(), samples)
            require(after != before, f"option `{name}: {value!r}` changes no score of the samples")

    def test_what_it_describes_is_recorded(self) -> None:
        """`describe`, which a run records, returns JSON values, the same for each instance, as a resume compares them."""
        found = self.instance().describe()
        require(isinstance(found, dict), f"`describe` returns a {type(found).__name__}, not a dict")
        try:
            text = json.dumps(found, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"`describe` returns values that can't be written as JSON: {error}") from None
        again = json.dumps(self.instance().describe(), sort_keys=True)
        require(
            text == again,
            f"`describe` of a new instance differs: {again[:100]} instead of {text[:100]}, so no run could be resumed",
        )

    def test_samples_do_not_change(self) -> None:
        """Scoring doesn't change the samples, which other rewards score too."""
        samples = self.samples()
        before: list[dict[str, Any]] = copy.deepcopy([asdict(sample) for sample in samples])
        reward = self.ready()
        score_by(reward, samples)
        reward.score_steps(samples)
        for number, sample in enumerate(samples):
            require(asdict(sample) == before[number], f"scoring changes sample {number}, which other rewards score too")

    def test_steps_are_finite_floats(self) -> None:
        """`score_steps` returns a list of finite floats for each sample, in order, or None."""
        reward, samples = self.ready(), self.grouped()
        scores = reward.score_steps(samples)
        if scores is None:
            return
        require(len(scores) == len(samples), f"`score_steps` returns {len(scores)} lists for {len(samples)} samples")
        for number, steps in enumerate(scores):
            require(
                isinstance(steps, list) and bool(steps),
                f"`score_steps` returns {steps!r} for sample {number}, not a list of step scores",
            )
            require(
                all(map(is_number, steps)),
                f"`score_steps` returns step scores that aren't finite floats for sample {number}: {steps}",
            )
        for number, found in zip(reversed(range(len(samples))), reward.score_steps(samples[::-1]) or [], strict=True):
            self.same(found, scores[number], f"with the samples in another order, steps of sample {number}")
