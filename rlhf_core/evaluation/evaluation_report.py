"""The result of an evaluation: estimates, the values of each prompt behind them, and the differences between two evaluations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.evaluation.estimate import Estimate, ratio_difference
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.infra.files import read_json, replace_json

SCHEMA = 1
"""Version of the file's structure; one that is read by other rules has another."""
EVALUATION_FILE = "evaluation.json"
_AGAINST = {
    "kl": "reference", "win_rate": "baseline", "length_controlled_win_rate": "baseline", "ties": "baseline",
    "consistent": "baseline",
}  # fmt: skip
"""Beginning of a metric's name → the role of the model that it compares the policy with."""
_SHARES = ("accuracy/", "pass@", "majority@", "win_rate/", "ties/", "consistent/", "truncated")
"""Beginnings of the names of metrics that are shares of completions or of pairs."""


@dataclass(frozen=True)
class MetricByPrompt:
    """A metric's value of each prompt. Axis: P, the prompts of the evaluation."""

    values: Sequence[float | None]
    """(P,) None where a prompt has no value."""
    weights: Sequence[float] | None = None
    """(P,) how much each counts in the mean; None: equally."""

    def weighted(self) -> list[tuple[float, float]]:
        """Return (P,) pairs of value · weight and weight, (0, 0) where there is no value."""
        weights = self.weights or [1.0] * len(self.values)
        return [
            (0.0, 0.0) if value is None else (value * weight, weight)
            for value, weight in zip(self.values, weights, strict=True)
        ]


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found."""

    metrics: Mapping[str, Estimate]
    """`accuracy/NAME`, `pass@K/NAME`, `kl/token` … → its estimate."""
    by_prompt: Mapping[str, MetricByPrompt] = field(default_factory=dict)
    prompts: Sequence[Mapping[str, str]] = ()
    """(P,) each prompt's `place` and `key`, a hash of it."""
    reliability: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Validator → bins of confidence, each with `low`, `high`, `count`, `confidence` and `accuracy`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options, models, rewards and version, as JSON values."""
    notes: Sequence[str] = ()
    """What couldn't be computed, or needs care, in words."""
    seconds: float = 0.0

    def __getitem__(self, metric: str) -> Estimate:
        return self.metrics[metric]

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, from which `from_json` makes it again."""
        return {
            "schema": SCHEMA,
            **self.summary(),
            "reliability": {name: [dict(one) for one in bins] for name, bins in self.reliability.items()},
            "settings": dict(self.settings),
            "prompts": [dict(one) for one in self.prompts],
            "by_prompt": {
                name: {"values": list(one.values), "weights": None if one.weights is None else list(one.weights)}
                for name, one in self.by_prompt.items()
            },
        }

    def summary(self) -> dict[str, Any]:
        """Return the estimates, notes and seconds as JSON values, without what belongs to single prompts."""
        metrics = {name: one.as_json() for name, one in self.metrics.items()}
        return {"metrics": metrics, "notes": list(self.notes), "seconds": round(self.seconds, 3)}

    @classmethod
    def from_json(cls, found: Any, *, place: str = "evaluation") -> EvaluationReport:
        """Return what `as_json` wrote.

        Raises:
            DataError: it isn't an evaluation, or one of another schema.
        """
        if not isinstance(found, Mapping) or "schema" not in found:
            raise DataError(
                "isn't an evaluation", place=place, fix=f"give what `rlhf evaluate` wrote, {EVALUATION_FILE}"
            )
        if found["schema"] != SCHEMA:
            fix = "evaluate again, or read it by the version that wrote it"
            raise DataError(f"has another schema than {SCHEMA}", place=place, got=str(found["schema"]), fix=fix)
        try:
            by_prompt = {
                name: MetricByPrompt(one["values"], one["weights"]) for name, one in found["by_prompt"].items()
            }
            if any(len(one.values) != len(found["prompts"]) for one in by_prompt.values()):
                raise ValueError("a metric has another number of values than there are prompts")
            return cls(
                {name: Estimate.from_json(one) for name, one in found["metrics"].items()},
                by_prompt,
                found["prompts"],
                found["reliability"],
                found["settings"],
                found["notes"],
                found["seconds"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            got = f"no `{error.args[0]}`" if isinstance(error, KeyError) else str(error)
            raise DataError("can't be read as an evaluation", place=place, got=got) from error

    def save(self, directory: str | Path) -> Path:
        """Write `evaluation.json` into a directory, whole or not at all, and return its path.

        Raises:
            StorageError: it can't be written.
        """
        path = Path(directory).expanduser() / EVALUATION_FILE
        replace_json(path, self.as_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Return the evaluation of a directory, or of its `evaluation.json`.

        Raises:
            DataError: there is none, or it can't be read.
        """
        where = Path(path).expanduser()
        where = where / EVALUATION_FILE if where.is_dir() else where
        try:
            return cls.from_json(read_json(where), place=str(where))
        except FileNotFoundError:
            fix = f"give a directory that `rlhf evaluate --output` wrote, with {EVALUATION_FILE}"
            raise DataError("there is no evaluation", place=str(where), fix=fix) from None
        except (OSError, ValueError) as error:
            raise DataError("can't be read as an evaluation", place=str(where), got=str(error)) from error


def compare(before: EvaluationReport, after: EvaluationReport) -> dict[str, Estimate]:
    """Return after − before of each metric that both have by prompt, with the paired standard error over prompts.

    Prompts are paired by their contents, so their order may differ. What both evaluations share, such as how hard a prompt is,
    cancels: the error is smaller than that of two evaluations of different prompts. A prompt counts where both have a value.
    The intervals are those of `paired_difference`. What was measured against different models, such as the KL to two references,
    has no difference: see `not_compared`.

    Raises:
        ConfigError: the evaluations are of different prompts.
    """
    first, second = _keys(before), _keys(after)
    if set(first) != set(second):
        raise ConfigError(
            "the evaluations are of different prompts, which can't be compared pair by pair",
            place="compare",
            got=f"{len(set(first) - set(second))} only before, {len(set(second) - set(first))} only after",
            fix="evaluate both on the same prompts",
        )
    place = {key: number for number, key in enumerate(second)}
    found = {}
    other = _against_others(before, after)
    for name, old in before.by_prompt.items():
        if name not in after.by_prompt or name in other:
            continue
        later = after.by_prompt[name].weighted()
        pairs = zip(old.weighted(), (later[place[key]] for key in first), strict=True)
        both = [(one, other) for one, other in pairs if one[1] and other[1]]
        if both:
            found[name] = ratio_difference(*map(list, zip(*both, strict=True)), shares=name.startswith(_SHARES))
    return found


def not_compared(before: EvaluationReport, after: EvaluationReport) -> list[str]:
    """Return sentences on the metrics that `compare` leaves out because they were measured against different models."""
    by_role: dict[str, list[str]] = {}
    for name, role in _against_others(before, after).items():
        by_role.setdefault(role, []).append(name)
    return [
        f"{', '.join(names)} can't be compared: the {role} is {_named(before, role)} before and {_named(after, role)} after"
        for role, names in by_role.items()
    ]


def _against_others(before: EvaluationReport, after: EvaluationReport) -> dict[str, str]:
    """Return metric → role of those that both have and that were measured against different models in that role."""
    both = [name for name in before.by_prompt if name in after.by_prompt]
    roles = {name: role for name in both if (role := _AGAINST.get(name.partition("/")[0])) is not None}
    return {name: role for name, role in roles.items() if _compared_with(before, role) != _compared_with(after, role)}


def _compared_with(report: EvaluationReport, role: str) -> Any:
    """Return what tells the model in a role from others: the hashes of its files, else its name; or the column of a baseline."""
    model = report.settings.get("models", {}).get(role) or {}
    column = report.settings.get("options", {}).get("baseline_column") if role == "baseline" else None
    return model.get("files") or model.get("source") or column


def _named(report: EvaluationReport, role: str) -> str:
    model = report.settings.get("models", {}).get(role) or {}
    return str(model.get("source") or report.settings.get("options", {}).get("baseline_column") or "unknown")


def _keys(report: EvaluationReport) -> list[tuple[str, int]]:
    """Return each prompt's key, with how often it came before."""
    met: Counter[str] = Counter()
    keys = []
    for one in report.prompts:
        keys.append((one["key"], met[one["key"]]))
        met[one["key"]] += 1
    return keys
