"""What is measured of one prompt's completions, and the estimates over all prompts.

The functions know no model: they take texts, scores and lengths. A `PromptMeasures` is all that an evaluation keeps of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Self

import numpy as np

from rlhf_core.contracts.completion import Completion
from rlhf_core.evaluation.answer_agreement import majority_at_k
from rlhf_core.evaluation.calibration import brier_score, expected_calibration_error
from rlhf_core.evaluation.diversity import distinct_n, self_bleu
from rlhf_core.evaluation.estimate import Estimate, bootstrap_estimate, mean_estimate, ratio_estimate, share_estimate
from rlhf_core.evaluation.win_rate import length_controlled_win_rate, preferences
from rlhf_core.rewards.answer_votes import tally
from rlhf_core.training.completion_metrics import pass_at_k

CALIBRATION, WIN_RATE = "calibration", "win_rate"
"""What the names of points begin with: (confidence, right or not), and (preference, by how many characters it is longer)."""

_RANGES = {
    "length": (0.0, math.inf),
    "distinct_": (0.0, 1.0),
    "self_bleu": (0.0, 1.0),
    "embedding_distance": (0.0, 2.0),
    "brier/": (0.0, 1.0),
}
"""The values that means can have, by what their names begin with."""


@dataclass(frozen=True)
class Measure:
    """A prompt's value of one metric."""

    value: float
    weight: float = 1.0
    """How much it counts in the mean over prompts, such as its number of tokens."""
    trials: int = 0
    """Of a share: the independent trials behind it; 0 for what isn't a share."""


@dataclass
class PromptMeasures:
    """All that was measured of one prompt."""

    values: dict[str, Measure] = field(default_factory=dict)
    """Metric → its value; a metric that a prompt has no value of is left out."""
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """What metrics over all prompts are computed from: `calibration/NAME` and `win_rate/NAME`."""

    def __or__(self, other: PromptMeasures) -> PromptMeasures:
        return PromptMeasures(self.values | other.values, self.points | other.points)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, from which `from_json` makes it again."""
        values = {name: [one.value, one.weight, one.trials] for name, one in self.values.items()}
        return {"values": values, "points": {name: [list(pair) for pair in of] for name, of in self.points.items()}}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Return what `as_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        values = {
            name: Measure(float(value), float(weight), int(trials))
            for name, (value, weight, trials) in found["values"].items()
        }
        return cls(values, {name: [(float(x), float(y)) for x, y in of] for name, of in found["points"].items()})


# Measures of a prompt


def length_measures(completions: Sequence[Completion]) -> PromptMeasures:
    """Return `length` (tokens, mean) and `truncated` (the share that was cut off)."""
    n = len(completions)
    return PromptMeasures(
        {
            "length": Measure(fmean(len(one.ids) for one in completions)),
            "truncated": Measure(sum(one.truncated for one in completions) / n, trials=n),
        }
    )


def reward_measures(name: str, scores: Sequence[float]) -> PromptMeasures:
    """Return `reward/NAME`, the mean score of n completions."""
    return PromptMeasures({f"reward/{name}": Measure(fmean(scores))})


def verified_measures(
    name: str, right: Sequence[bool], keys: Sequence[Hashable | None], ks: Sequence[int]
) -> PromptMeasures:
    """Return `accuracy/NAME`, and for each k `pass@k/NAME` and `majority@k/NAME`.

    Args:
        right: (n,) whether each completion is right.
        keys: (n,) each completion's `answer_key`.
        ks: each in 2 … n.
    """
    n, found = len(right), {f"accuracy/{name}": Measure(sum(right) / len(right), trials=len(right))}
    marks = [float(one) for one in right]
    for k in ks:
        found[f"pass@{k}/{name}"] = Measure(pass_at_k(n, sum(right), k), trials=n // k)
        found[f"majority@{k}/{name}"] = Measure(majority_at_k(keys, marks, k), trials=n // k)
    return PromptMeasures(found)


def vote_confidence(keys: Sequence[Hashable | None], right: Sequence[bool]) -> tuple[float, float]:
    """Return the share of completions that give the most frequent answer, and the share of these that is right.

    Of several most frequent answers the one that was given first counts; where there is no answer both are 0.
    """
    votes = tally(keys)
    if not votes:
        return 0.0, 0.0
    answer = max(votes, key=lambda key: votes[key])
    return votes[answer] / len(keys), fmean(mark for key, mark in zip(keys, right, strict=True) if key == answer)


def calibration_measures(name: str, points: Sequence[tuple[float, float]]) -> PromptMeasures:
    """Return `brier/NAME`, and the points from which the calibration error is computed.

    Args:
        points: confidence and whether it was right, of each completion or of the voted answer.
    """
    values = {f"brier/{name}": Measure(brier_score(*zip(*points, strict=True)))}
    return PromptMeasures(values, {f"{CALIBRATION}/{name}": list(points)})


def diversity_measures(texts: Sequence[str], orders: Sequence[int]) -> PromptMeasures:
    """Return `self_bleu` and `distinct_N` of two completions or more; an order without n-grams is left out."""
    found = {f"distinct_{n}": distinct_n(texts, n) for n in orders} | {"self_bleu": self_bleu(texts)}
    return PromptMeasures({name: Measure(value) for name, value in found.items() if value is not None})


def win_measures(name: str, own: Sequence[float], others: Sequence[float], longer: Sequence[float]) -> PromptMeasures:
    """Return `win_rate/NAME` and `ties/NAME` over all pairs of completions, with their points.

    Args:
        own: (n,) scores. others: (m,) the baseline's.
        longer: (n · m,) by how many characters the own completion of each pair is longer.
    """
    return judged_measures(name, preferences(own, others), longer, trials=min(len(own), len(others)))


def judged_measures(name: str, preferred: Sequence[float], longer: Sequence[float], *, trials: int) -> PromptMeasures:
    """Return `win_rate/NAME` and `ties/NAME` of pairs that were compared, with their points.

    Args:
        preferred: 1 for a win, 0 for a loss, 0.5 for a tie.
        longer: by how many characters the own completion of each pair is longer.
        trials: independent pairs among them.
    """
    ties = sum(one == 0.5 for one in preferred) / len(preferred)
    values = {
        f"{WIN_RATE}/{name}": Measure(fmean(preferred), trials=trials),
        f"ties/{name}": Measure(ties, trials=trials),
    }
    return PromptMeasures(values, {f"{WIN_RATE}/{name}": list(zip(preferred, longer, strict=True))})


def length_differences(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """Return by how many characters each text is longer than each of the others, in the order of `preferences`."""
    return [float(len(own) - len(other)) for own in texts for other in others]


def kl_measures(totals: Sequence[float], tokens: Sequence[int]) -> PromptMeasures:
    """Return `kl/token` and `kl/sequence` of a prompt's completions.

    Args:
        totals: (n,) each completion's KL, summed over its tokens, nats.
        tokens: (n,) each one's tokens.
    """
    count, total = sum(tokens), math.fsum(totals)
    values = {"kl/sequence": Measure(total / len(totals))}
    if count:
        values["kl/token"] = Measure(total / count, weight=float(count))
    return PromptMeasures(values)


# Estimates over prompts


def estimates(
    rows: Sequence[PromptMeasures], *, bins: int, resamples: int, seed: int
) -> tuple[dict[str, Estimate], list[str]]:
    """Return each metric over all prompts, in the order in which they were measured, and what couldn't be computed.

    Means have Student's interval, shares Wilson's, ratios (nats per token) the linearised standard error; the calibration error
    is resampled by prompt.

    Args:
        bins: of the calibration error. resamples, seed: of the bootstrap.
    """
    found = {
        name: _within(name, _over_prompts([row.values[name] for row in rows if name in row.values]))
        for name in metric_names(rows)
    }
    found |= {name: _of_wins(name, rows) for name in found if name.startswith(f"{WIN_RATE}/")}
    notes = []
    for name in dict.fromkeys(name for row in rows for name in row.points):
        kind, _, of = name.partition("/")
        pairs = [row.points[name] for row in rows if name in row.points]
        if kind == CALIBRATION:
            found[f"ece/{of}"] = _calibration_error(pairs, bins, resamples, seed)
            continue
        try:
            found[f"length_controlled_win_rate/{of}"] = length_controlled_win_rate(pairs)
        except ValueError as error:
            notes.append(f"no length-controlled win rate by {of}: {error}")
    return found, notes


def metric_names(rows: Sequence[PromptMeasures]) -> list[str]:
    """Return the metrics that any prompt has a value of, in the order in which they were measured."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _over_prompts(measures: Sequence[Measure]) -> Estimate:
    values = [one.value for one in measures]
    if trials := sum(one.trials for one in measures):
        return share_estimate(values, trials=max(trials, len(values)))
    if any(one.weight != 1 for one in measures):
        return ratio_estimate([one.value * one.weight for one in measures], [one.weight for one in measures])
    return mean_estimate(values)


def _of_wins(name: str, rows: Sequence[PromptMeasures]) -> Estimate:
    """Return a win rate p with Wilson's interval for what ties make of its trials.

    A pair that ends in a tie with probability t has the variance p(1−p) − t/4: k pairs are worth k p(1−p) / (p(1−p) − t/4) wins
    and losses.
    """
    both = [(row.values[name], row.values[f"ties{name.removeprefix(WIN_RATE)}"]) for row in rows if name in row.values]
    rates, trials = [one.value for one, _ in both], sum(one.trials for one, _ in both)
    rate, ties = fmean(rates), fmean(one.value for _, one in both)
    spread = rate * (1 - rate) - ties / 4
    worth = trials * rate * (1 - rate) / spread if spread > 1e-9 else trials
    return share_estimate(rates, trials=max(int(worth), len(rates)))


def _within(name: str, found: Estimate) -> Estimate:
    """Return an estimate whose interval has no part outside of the values that the metric can have."""
    least, most = next((bounds for start, bounds in _RANGES.items() if name.startswith(start)), (-math.inf, math.inf))
    if found.low is None or found.high is None:
        return found
    return replace(found, low=min(found.value, max(least, found.low)), high=max(found.value, min(most, found.high)))


def _calibration_error(
    pairs: Sequence[Sequence[tuple[float, float]]], bins: int, resamples: int, seed: int
) -> Estimate:
    """Return the expected calibration error of points (confidence, right), each prompt's counting as one in all."""
    owner = np.repeat(np.arange(len(pairs)), [len(of) for of in pairs])
    sure, right = np.array([pair for of in pairs for pair in of], dtype=float).reshape(-1, 2).T
    each = 1 / np.array([len(of) for of in pairs], dtype=float)[owner]

    def of(units: Sequence[int]) -> float:
        drawn = np.bincount(np.asarray(units), minlength=len(pairs))[owner]
        return expected_calibration_error(sure, right, bins, weights=drawn * each)

    return bootstrap_estimate(of, len(pairs), resamples=resamples, seed=seed)
