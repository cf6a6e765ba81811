"""Capability tests: suites of prompts that a policy answers before and after a change, and whether any of them got worse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from rlhf_core.config.base import config_error
from rlhf_core.config.capability_suites import CapabilitySuite, CapabilityTestsConfig
from rlhf_core.config.file_paths import find_beside
from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample
from rlhf_core.data.prompt_rows import PromptRow, read_prompts
from rlhf_core.evaluation.estimate import Estimate, mean_estimate, paired_difference, share_estimate
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import encode_prompts
from rlhf_core.generation.sampled_rows import input_columns
from rlhf_core.generation.sampler_models import load_policy
from rlhf_core.improvement.paired_tests import holm, paired_test, right_or_wrong
from rlhf_core.infra.errors import ConfigError, DataError, Mistakes, RLHFError
from rlhf_core.infra.files import read_json, replace_json, storage_errors
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.rewards import Rewards, open_rewards, rewards_changed

FORMAT = 1
"""Version of the file that `CapabilityResult.save` writes."""
POINT = 0.01
"""A point: a hundredth of the validator's scale, such as one per cent of the prompts."""


class CapabilityRegression(RLHFError):
    """A policy is significantly worse at a suite than it was, by more than the threshold: what triggers a rollback."""

    code, exit_code = "regression", 8
    regressions: Sequence[CapabilityChange] = ()
    """The suites that got worse."""


@dataclass(frozen=True)
class SuiteResult:
    """How a policy did at one suite. Axis: P, the prompts."""

    name: str
    task: str
    scores: Sequence[float]
    """(P,) per prompt: 1 for right and 0 for wrong, or the mean of its completions' scores."""
    places: Sequence[str]
    """(P,) where each prompt was given, such as `file:line`."""
    made_from: Mapping[str, Any]
    """What scores depend on besides the policy and the seed, by which two results are known to be of the same suite."""

    @property
    def estimate(self) -> Estimate:
        """The mean over prompts, which are the unit of its standard error."""
        return _estimate(self.scores)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; `from_json` reads them."""
        own = {"name": self.name, "task": self.task, "estimate": self.estimate.as_json()}
        return own | {"scores": list(self.scores), "places": list(self.places), "made_from": dict(self.made_from)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SuiteResult:
        """Return what `as_json` described. Raises KeyError or TypeError where it isn't that."""
        scores = [float(one) for one in values["scores"]]
        return cls(values["name"], values["task"], scores, list(values["places"]), dict(values["made_from"]))


@dataclass(frozen=True)
class CapabilityResult:
    """How a policy did at all suites: a baseline, or what is compared with one."""

    suites: Mapping[str, SuiteResult]
    seed: int = 0

    @property
    def tasks(self) -> dict[str, Estimate]:
        """Type of task → the mean over the prompts of all its suites."""
        found: dict[str, list[float]] = {}
        for suite in self.suites.values():
            found.setdefault(suite.task, []).extend(suite.scores)
        return {task: _estimate(scores) for task, scores in found.items()}

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; `from_json` reads them."""
        tasks = {task: estimate.as_json() for task, estimate in self.tasks.items()}
        suites = [suite.as_json() for suite in self.suites.values()]
        return {"format": FORMAT, "seed": self.seed, "tasks": tasks, "suites": suites}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, place: str = "capabilities") -> CapabilityResult:
        """Return what `as_json` described.

        Raises:
            DataError: the values aren't such a result.
        """
        try:
            if values["format"] != FORMAT:
                raise DataError(
                    "the result has another format", place=place, got=values["format"], fix="run the suites again"
                )
            suites = [SuiteResult.from_json(one) for one in values["suites"]]
            return cls({one.name: one for one in suites}, int(values["seed"]))
        except (KeyError, TypeError, ValueError) as error:
            problem = f"isn't a result of capability tests ({type(error).__name__}: {error})"
            raise DataError(problem, place=place, fix="run the suites again") from None

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, whole or not at all.

        Raises:
            StorageError: the file can't be written.
        """
        replace_json(Path(path), self.as_json())

    @classmethod
    def load(cls, path: str | Path) -> CapabilityResult:
        """Return what `save` wrote.

        Raises:
            DataError: the file isn't such a result.
            StorageError: it can't be read.
        """
        path = Path(path)
        try:
            with storage_errors(path):
                values = read_json(path)
        except ValueError as error:
            raise DataError(str(error), place=str(path), fix="run the suites again") from None
        return cls.from_json(values, place=str(path))


@dataclass(frozen=True)
class CapabilityChange:
    """How one suite changed between two results of the same prompts."""

    suite: str
    task: str
    before: Estimate
    after: Estimate
    difference: Estimate
    """After less before, of the same prompts."""
    test: str
    """`mcnemar` (exact, for right and wrong) or `sign_flip` (for graded scores); see `paired_tests`."""
    p_value: float
    """One-sided: how likely so low an `after` would be if nothing had changed."""
    adjusted_p_value: float
    """The same after Holm's correction for all suites of the comparison."""
    losses: Sequence[str]
    """Places of the prompts whose score fell."""
    gains: Sequence[str]
    """Places of the prompts whose score rose."""
    regressed: bool
    """Whether the drop is significant and at least the threshold."""

    @property
    def points(self) -> float:
        """The change in points: 1 point is 0.01 of the validator's scale; below 0 for a drop."""
        return self.difference.value / POINT

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        estimates = {name: getattr(self, name).as_json() for name in ("before", "after", "difference")}
        found = {"suite": self.suite, "task": self.task, **estimates, "points": self.points, "test": self.test}
        p_values = {"p_value": self.p_value, "adjusted_p_value": self.adjusted_p_value}
        changed = {"losses": list(self.losses), "gains": list(self.gains)}
        return found | p_values | changed | {"regressed": self.regressed}

    def __str__(self) -> str:
        changed = f"{len(self.losses)} of {self.before.count} prompts worse, {len(self.gains)} better"
        test = f"{self.points:+.1f} points, p of a drop = {self.adjusted_p_value:.2g}"
        return f"{self.suite}: {self.before.value:.3f} → {self.after.value:.3f} ({test}; {changed})"


class CapabilityTester:
    """Runs suites on policies, and tells whether one is worse than another.

        tester = CapabilityTester([CapabilitySuite(name="sums", prompts="test.jsonl", validator="numeric_answer")])
        before = tester.run("models/base")
        tester.check(before, tester.run("runs/grpo/model"))  # raises CapabilityRegression

    Args:
        suites: the suites, as `CapabilitySuite` or mappings of its options; or a whole `CapabilityTestsConfig`.
        options: the other options of `CapabilityTestsConfig`: `alpha`, `threshold`, `resamples`.

    Raises:
        ConfigError: an option or validator is wrong.
    """

    def __init__(
        self, suites: CapabilityTestsConfig | Iterable[CapabilitySuite | Mapping[str, Any]], **options: Any
    ) -> None:
        if isinstance(suites, CapabilityTestsConfig):
            self.config = suites.updated(**options) if options else suites
        else:
            self.config = _parsed({"suites": list(suites), **options})
        self._suites = [_OpenSuite(suite, self.config) for suite in self.config.suites]

    @classmethod
    def load(cls, path: str | Path) -> CapabilityTester:
        """Return the tester that a YAML or JSON file describes.

        Raises:
            ConfigError: the file is missing or wrong; its line is named.
        """
        values, places = load_yaml(path)
        values = find_beside(values, path)
        return cls(CapabilityTestsConfig.parse(values, place=places))

    def prepare(self) -> None:
        """Read every suite's prompts and look at its validator, as `run` does first: faults are found before a model is loaded.

        Raises:
            ConfigError, DataError, PluginError: as `run`.
        """
        for suite in self._suites:
            suite.rows  # noqa: B018

    def run(
        self,
        policy: PolicyModel | str | Path,
        seed: int = 0,
        *,
        finished: Callable[[SuiteResult], None] | None = None,
    ) -> CapabilityResult:
        """Return how a policy does at all suites.

        Args:
            policy: a model, or the path or hub name of one.
            seed: of the completions, where they are drawn; the same seed makes two policies more comparable.
            finished: called with each suite's result as soon as it is there.

        Raises:
            ConfigError: a suite has too few prompts for any drop to be significant.
            DataError: prompts can't be read, or leave no room for a completion.
            PluginError: a validator fails.
        """
        self.prepare()
        model = (
            policy if isinstance(policy, PolicyModel) else load_policy(policy, "policy", place="CapabilityTester.run")
        )
        results: dict[str, SuiteResult] = {}
        for suite in self._suites:
            results[suite.config.name] = suite.run(model, seed)
            if finished is not None:
                finished(results[suite.config.name])
        return CapabilityResult(results, seed)

    def changes(self, before: CapabilityResult, after: CapabilityResult) -> list[CapabilityChange]:
        """Return how each suite changed, with the tests' p-values corrected for all of them.

        Raises:
            DataError: a result lacks a suite, or was made from other prompts, another validator or other options.
        """
        pairs = [(suite.config, suite.known(before, "before"), suite.known(after, "after")) for suite in self._suites]
        for _, old, new in pairs:
            _refuse_other_suite(old, new)
        tests = [paired_test(old.scores, new.scores, resamples=self.config.resamples) for _, old, new in pairs]
        adjusted = holm([p for _, p in tests])
        found = []
        for (suite, old, new), (test, p), q in zip(pairs, tests, adjusted, strict=True):
            differences = [b - a for a, b in zip(old.scores, new.scores, strict=True)]
            drop = -fmean(differences)
            # A drop of exactly the threshold may be a rounding below it.
            regressed = q <= self.config.alpha and drop >= self.config.threshold * POINT - 1e-12
            found.append(
                CapabilityChange(
                    suite.name,
                    suite.task,
                    old.estimate,
                    new.estimate,
                    paired_difference(old.scores, new.scores, shares=right_or_wrong(old.scores, new.scores)),
                    test,
                    p,
                    q,
                    [place for place, change in zip(new.places, differences, strict=True) if change < 0],
                    [place for place, change in zip(new.places, differences, strict=True) if change > 0],
                    regressed,
                )
            )
        return found

    def compare(self, before: CapabilityResult, after: CapabilityResult) -> list[CapabilityChange]:
        """Return the regressions: the suites whose drop is significant at `alpha` and at least `threshold` points.

        Raises:
            DataError: as `changes`.
        """
        return [change for change in self.changes(before, after) if change.regressed]

    def check(self, before: CapabilityResult, after: CapabilityResult) -> list[CapabilityChange]:
        """Return how each suite changed, where none regressed.

        Raises:
            CapabilityRegression: one did; its `regressions` say which.
            DataError: as `changes`.
        """
        changes = self.changes(before, after)
        if regressions := [change for change in changes if change.regressed]:
            error = CapabilityRegression(
                "the policy got worse: " + "; ".join(map(str, regressions)),
                place="capabilities",
                fix="keep the policy from before, train more gently, or raise `threshold`",
            )
            error.regressions = regressions
            raise error
        return changes


class _OpenSuite:
    """A suite with its validator made, and its prompts once they are read."""

    def __init__(self, config: CapabilitySuite, tests: CapabilityTestsConfig) -> None:
        self.config, self.tests = config, tests
        self.place = _place(config)
        self.validator: Rewards = open_rewards(config.validator, place=f"{self.place}, validator")
        self._rows: list[PromptRow] | None = None

    @property
    def rows(self) -> list[PromptRow]:
        """Its prompts, read at the first access.

        Raises:
            ConfigError: they are too few for any drop to be significant.
            DataError: they can't be read.
        """
        if self._rows is None:
            self._rows = _read_rows(self.config, self.tests)
        return self._rows

    def run(self, policy: PolicyModel, seed: int) -> SuiteResult:
        """Return how a policy does."""
        config = self.config
        batch = encode_prompts(policy, [row.as_row(number) for number, row in enumerate(self.rows)])
        drawn = Engine(policy, seed=seed).generate(batch, config.n, config.generation)
        scores = self._scores(drawn)
        passed = scores if config.pass_score is None else [float(one >= config.pass_score) for one in scores]
        means = [fmean(passed[at : at + config.n]) for at in range(0, len(passed), config.n)]
        return SuiteResult(config.name, config.task, means, [row.place for row in self.rows], self._made_from())

    def _scores(self, drawn: Sequence[Sequence[Completion]]) -> list[float]:
        """Return the validator's score of each completion, prompt by prompt."""
        samples, places = [], []
        for number, (row, completions) in enumerate(zip(self.rows, drawn, strict=True)):
            for one in completions:
                ids, columns = one.ids, input_columns(row)
                samples.append(Sample(row.prompt, one.text, (), ids, columns, number, one.stop_reason, one.mask))
                places.append(row.place)
        (scores,) = self.validator.score(samples, places).by_name.values()
        return list(scores)

    def _made_from(self) -> dict[str, Any]:
        prompts = json.dumps([[row.prompt, row.tools, input_columns(row)] for row in self.rows], sort_keys=True)
        return {
            "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
            "validator": self.validator.describe(),
            "pass_score": self.config.pass_score,
            "generation": self.config.generation.model_dump(mode="json"),
            "n": self.config.n,
        }

    def known(self, result: CapabilityResult, which: str) -> SuiteResult:
        """Return a result's part about this suite. Raises DataError where it has none."""
        found = result.suites.get(self.config.name)
        if found is None:
            problem = f"the result `{which}` lacks the suite"
            raise DataError(problem, place=self.place, got=", ".join(result.suites), fix="run the suites again")
        return found


def suite_errors(config: CapabilityTestsConfig) -> list[tuple[str, RLHFError]]:
    """Return everything that is wrong with the suites' validators and prompts, each with its suite; no model is loaded."""
    found: list[tuple[str, RLHFError]] = []
    for suite in config.suites:
        mistakes = Mistakes()
        with mistakes.noted():
            open_rewards(suite.validator, place={"": "validator"})
        with mistakes.noted():
            _read_rows(suite, config)
        found += [(suite.name, error) for error in mistakes]
    return found


def _place(suite: CapabilitySuite) -> str:
    return f"suite `{suite.name}`"


def _read_rows(config: CapabilitySuite, tests: CapabilityTestsConfig) -> list[PromptRow]:
    """Return a suite's prompts.

    Raises:
        ConfigError: they are too few for any drop to be significant.
        DataError: they can't be read.
    """
    rows = list(read_prompts(config.prompts, limit=config.limit, columns=config.columns, name=_place(config)))
    # Were all prompts lost, the p-value would be 2^-P, which Holm multiplies by the number of suites.
    level = tests.alpha / len(tests.suites)
    if 2.0 ** -len(rows) > level:
        needed = next(count for count in range(1, 1100) if 2.0**-count <= level)
        raise ConfigError(
            f"no drop could be significant at alpha {tests.alpha:g} over {len(tests.suites)} suites",
            place=_place(config),
            got=f"{len(rows)} prompts",
            fix=f"give it at least {needed} prompts, far more to find small drops",
        )
    return rows


def _parsed(values: dict[str, Any]) -> CapabilityTestsConfig:
    try:
        return CapabilityTestsConfig.model_validate(values)
    except ValidationError as error:
        raise config_error(CapabilityTestsConfig, error, "CapabilityTester") from None


def _estimate(scores: Sequence[float]) -> Estimate:
    """Return the mean over prompts: of right and wrong as a share, whose interval stays within 0 and 1."""
    return share_estimate(scores) if right_or_wrong(scores) else mean_estimate(scores)


def _refuse_other_suite(before: SuiteResult, after: SuiteResult) -> None:
    """Raise `DataError` where two results of a suite aren't comparable prompt by prompt."""
    old, new = dict(before.made_from), dict(after.made_from)
    changed = rewards_changed(old.pop("validator", {}), new.pop("validator", {}))
    changed += [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if len(before.scores) != len(after.scores) and "prompts" not in changed:
        changed.append("the number of scores")
    if changed:
        raise DataError(
            f"the two results are of different suites: {', '.join(changed)} changed",
            place=f"suite `{after.name}`",
            fix="run the suite on both policies again",
        )
