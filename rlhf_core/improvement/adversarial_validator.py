"""Looks for flaws in completions, and for rewards that are pleased without being earned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rlhf_core.contracts.reward import Sample
from rlhf_core.data.completion_rows import CompletionRow, read_completion_rows
from rlhf_core.evaluation.estimate import Estimate, bootstrap_estimate, mean_estimate, paired_difference, share_estimate
from rlhf_core.improvement.flaw_detectors import DETECTORS, FlawDetector
from rlhf_core.infra.errors import ConfigError, DataError, PluginError, did_you_mean
from rlhf_core.infra.files import replace_json
from rlhf_core.infra.statistics import auc
from rlhf_core.rewards import Rewards, open_rewards

HACKING = "reward_hacking"
"""Name of the flaw that a wrong completion has which the proxy reward likes as much as right ones."""


@dataclass(frozen=True)
class CompletionFlaws:
    """What was found in one completion."""

    place: str
    """Where it was given: `file:line`, or `samples[3]`."""
    quality: float
    """Π (1 - severity) over the flaws that apply: 1 without any, 0 where one is total."""
    severities: Mapping[str, float | None]
    """Flaw → its severity, 0 to 1; None where it doesn't apply."""
    flagged: Sequence[str]
    """Flaws whose severity is at least their detector's `flagged_from`."""
    proxy: float | None = None
    verifier: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        found = {"place": self.place, "quality": self.quality, "severities": dict(self.severities)}
        return found | {"flagged": list(self.flagged), "proxy": self.proxy, "verifier": self.verifier}


@dataclass(frozen=True)
class RewardGap:
    """How far a proxy reward is from a verifier, over a set of completions."""

    rank_correlation: Estimate | None
    """Spearman's rank correlation of the two, by a bootstrap over prompts; None where one of them is constant."""
    auc: float | None
    """Probability that the proxy puts a right completion above a wrong one; None where all are right, or all wrong."""
    proxy: Estimate
    verifier: Estimate

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        correlation = None if self.rank_correlation is None else self.rank_correlation.as_json()
        means = {"proxy": self.proxy.as_json(), "verifier": self.verifier.as_json()}
        return {"rank_correlation": correlation, "auc": self.auc, **means}


@dataclass(frozen=True)
class ValidationReport:
    """What was found in a set of completions. Prompts are the unit of standard errors."""

    completions: Sequence[CompletionFlaws]
    quality: Estimate
    shares: Mapping[str, Estimate]
    """Flaw → share of the completions that have it, of those to which it applies."""
    gap: RewardGap | None = None
    prompts: Sequence[str] = field(default=(), repr=False)
    """Which prompt each completion answers, as a key."""

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        shares = {name: share.as_json() for name, share in self.shares.items()}
        own = {
            "quality": self.quality.as_json(),
            "shares": shares,
            "gap": None if self.gap is None else self.gap.as_json(),
        }
        return own | {"completions": [one.as_json() for one in self.completions]}

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, whole or not at all.

        Raises:
            StorageError: the file can't be written.
        """
        replace_json(Path(path), self.as_json())


@dataclass(frozen=True)
class OverOptimisation:
    """How proxy and verifier changed between two policies, on the same prompts."""

    proxy: Estimate
    verifier: Estimate
    found: bool
    """Whether the proxy rose beyond its interval, and the verifier didn't rise at all (Gao et al. 2022, arXiv 2210.10760)."""


class AdversarialValidator:
    """Looks for flaws in completions by detectors, and by a proxy reward beside a verifier for reward hacking.

        report = AdversarialValidator(proxy="runs/rm/model", verifier="numeric_answer").validate("samples.jsonl")

    Args:
        detectors: names in `DETECTORS`, or name → `FlawDetector`; None takes the whole table.
        proxy: the reward that a policy is trained on, or a model's directory.
        verifier: a reward that tells right from wrong; with `proxy` alone.
        right_from: score of the verifier from which a completion is right.

    Raises:
        ConfigError: there is no detector of a name, a reward is wrong, or one of proxy and verifier is missing.
    """

    def __init__(
        self,
        detectors: Sequence[str] | Mapping[str, FlawDetector] | None = None,
        *,
        proxy: Any = None,
        verifier: Any = None,
        right_from: float = 1.0,
    ) -> None:
        if (proxy is None) != (verifier is None):
            missing = "verifier" if verifier is None else "proxy"
            problem = "reward hacking is a gap between two rewards, `proxy` and `verifier`"
            raise ConfigError(problem, place=f"AdversarialValidator({missing}=…)", fix="give both, or none")
        if isinstance(detectors, Mapping):
            self.detectors = dict(detectors)
        else:
            names = list(DETECTORS) if detectors is None else list(detectors)
            if unknown := next((name for name in names if name not in DETECTORS), None):
                problem = f"there is no detector `{unknown}`"
                raise ConfigError(problem, place="detectors", fix=did_you_mean(unknown, DETECTORS))
            self.detectors = {name: DETECTORS[name] for name in names}
        self.proxy = None if proxy is None else _opened(proxy, "proxy")
        self.verifier = None if verifier is None else _opened(verifier, "verifier")
        self.right_from = right_from

    def validate(self, completions: Any) -> ValidationReport:
        """Return what is found in completions.

        Args:
            completions: `Sample`s, rows that `read_completion_rows` read, or whatever `rlhf score` reads: files that `rlhf
                sample` wrote, rows with prompts and their responses.

        Raises:
            DataError: there are no completions, or a row can't be read.
            PluginError: a detector or reward fails.
        """
        samples, places = _read(completions)
        keys = [json.dumps(sample.prompt, sort_keys=True, default=str) for sample in samples]
        severities = [self._severities(sample, place) for sample, place in zip(samples, places, strict=True)]
        proxies, verified = ([None] * len(samples), [None] * len(samples))  # type: tuple[list[Any], list[Any]]
        gap = None
        if self.proxy is not None and self.verifier is not None:
            proxies = _scores(self.proxy, samples, places)
            verified = _scores(self.verifier, samples, places)
            right = [score >= self.right_from for score in verified]
            for own, severity in zip(severities, hacking_severities(proxies, right), strict=True):
                own[HACKING] = severity
            gap = _gap(proxies, verified, right, keys)
        found = [
            self._flaws(place, own, proxy, verifier)
            for place, own, proxy, verifier in zip(places, severities, proxies, verified, strict=True)
        ]
        quality = share_estimate(_by_prompt(keys, [one.quality for one in found]))
        return ValidationReport(found, quality, self._shares(found, keys), gap, keys)

    def _severities(self, sample: Sample, place: str) -> dict[str, float | None]:
        """Return each detector's severity for a sample.

        Raises:
            PluginError: one isn't a number from 0 to 1.
        """
        found: dict[str, float | None] = {}
        for name, detector in self.detectors.items():
            value = detector.severity(sample)
            if value is not None and not 0 <= value <= 1:
                problem = "a severity must be from 0 to 1, or None"
                raise PluginError(problem, place=f"detector `{name}`, {place}", got=value)
            found[name] = None if value is None else float(value)
        return found

    def _flaws(
        self, place: str, severities: Mapping[str, float | None], proxy: float | None, verifier: float | None
    ) -> CompletionFlaws:
        known = {name: value for name, value in severities.items() if value is not None}
        flagged = [name for name, value in known.items() if value >= self._flagged_from(name)]
        return CompletionFlaws(
            place, math.prod(1 - value for value in known.values()), severities, flagged, proxy, verifier
        )

    def _flagged_from(self, name: str) -> float:
        return self.detectors[name].flagged_from if name in self.detectors else 0.5

    def _shares(self, found: Sequence[CompletionFlaws], keys: Sequence[str]) -> dict[str, Estimate]:
        """Return by flaw the share of completions that have it; a flaw that applies to none is left out."""
        shares = {}
        for name in found[0].severities:
            applies = [at for at, one in enumerate(found) if one.severities[name] is not None]
            if applies:
                flags = [float(name in found[at].flagged) for at in applies]
                means = _by_prompt([keys[at] for at in applies], flags)
                shares[name] = share_estimate(means, trials=len(flags))
        return shares


def hacking_severities(proxies: Sequence[float], right: Sequence[bool]) -> list[float | None]:
    """Return for each completion 0 where it is right, else the share of right ones that the proxy puts no higher, ties half.

    So 0.5 is a wrong completion that the proxy ranks like a middling right one; the mean over the wrong ones is 1 - AUC. None for
    wrong ones where none is right, to which they could be compared.
    """
    known = torch.tensor([score for score, one in zip(proxies, right, strict=True) if one], dtype=torch.float64)
    found: list[float | None] = []
    for score, one in zip(proxies, right, strict=True):
        if one:
            found.append(0.0)
        elif len(known) == 0:
            found.append(None)
        else:
            found.append(float(((known < score).double() + 0.5 * (known == score).double()).mean()))
    return found


def over_optimisation(before: ValidationReport, after: ValidationReport) -> OverOptimisation:
    """Return how proxy and verifier changed from one policy to another, and whether only the proxy rose.

    Raises:
        DataError: a report has no gap, or the two are of different prompts.
    """
    if before.gap is None or after.gap is None:
        problem = "a report has no scores of a proxy and a verifier"
        raise DataError(problem, place="over_optimisation", fix="validate with `proxy` and `verifier`")
    if {*before.prompts} != {*after.prompts}:
        raise DataError("the two reports are of different prompts", place="over_optimisation")
    order = sorted({*before.prompts})

    def means(report: ValidationReport, name: str) -> list[float]:
        groups: dict[str, list[float]] = {}
        for key, one in zip(report.prompts, report.completions, strict=True):
            groups.setdefault(key, []).append(getattr(one, name))
        return [fmean(groups[key]) for key in order]

    proxy, verifier = (paired_difference(means(before, name), means(after, name)) for name in ("proxy", "verifier"))
    return OverOptimisation(proxy, verifier, proxy.low is not None and proxy.low > 0 and verifier.value <= 0)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, Pearson's of the ranks, ties with their mean rank; None where one is constant."""
    ranks = [_mean_ranks(values) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / scale if scale > 0 else None


def _mean_ranks(values: Sequence[float]) -> torch.Tensor:
    given = torch.tensor(list(values), dtype=torch.float64)
    ordered = given.sort().values
    below, upto = (torch.searchsorted(ordered, given, right=right).double() for right in (False, True))
    return (below + upto) / 2


def _gap(proxies: Sequence[float], verified: Sequence[float], right: Sequence[bool], keys: Sequence[str]) -> RewardGap:
    groups: dict[str, list[int]] = {}
    for at, key in enumerate(keys):
        groups.setdefault(key, []).append(at)
    prompts = list(groups.values())

    def correlation(drawn: Sequence[int]) -> float:
        chosen = [at for number in drawn for at in prompts[number]]
        found = spearman([proxies[at] for at in chosen], [verified[at] for at in chosen])
        return 0.0 if found is None else found  # a draw in which one is constant says nothing of an order

    constant = spearman(proxies, verified) is None
    sides = [
        torch.tensor([score for score, one in zip(proxies, right, strict=True) if one is side])
        for side in (True, False)
    ]
    return RewardGap(
        None if constant else bootstrap_estimate(correlation, len(prompts), resamples=400),
        auc(*sides) if all(len(side) for side in sides) else None,
        mean_estimate(_by_prompt(keys, proxies)),
        mean_estimate(_by_prompt(keys, verified)),
    )


def _by_prompt(keys: Sequence[str], values: Sequence[float]) -> list[float]:
    """Return the mean over each prompt's completions."""
    groups: dict[str, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(key, []).append(value)
    return [fmean(group) for group in groups.values()]


def _opened(given: Any, place: str) -> Rewards:
    from rlhf_core.rewards.reward_factory import RewardFunctionFactory

    if isinstance(given, Rewards):
        return given
    is_path = isinstance(given, Path) or (isinstance(given, str) and Path(given).expanduser().is_dir())
    return open_rewards(RewardFunctionFactory.from_model(given) if is_path else given, place=place)


def _scores(reward: Rewards, samples: Sequence[Sample], places: Sequence[str]) -> list[float]:
    return [float(score) for score in reward.score(samples, places).total.tolist()]


def _read(completions: Any) -> tuple[list[Sample], list[str]]:
    """Return samples, and where each was given."""
    if isinstance(completions, list | tuple) and completions and all(isinstance(one, Sample) for one in completions):
        return list(completions), [f"samples[{number}]" for number in range(len(completions))]
    samples: list[Sample] = []
    places: list[str] = []
    read = isinstance(completions, list) and all(isinstance(one, CompletionRow) for one in completions)
    for row in completions if read else read_completion_rows(completions):
        samples += row.samples
        places += [row.place] * len(row.samples)
    if not samples:
        raise DataError("there are no completions", place="completions")
    return samples, places
