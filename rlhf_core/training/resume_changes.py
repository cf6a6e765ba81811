"""What may change when a run is resumed: some options always, its length, others where they are named, and some never."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.config.yaml_file import flatten
from rlhf_core.infra.errors import ConfigError, nearest

MAY_CHANGE = (
    "output", "logging", "checkpoint", "distributed", "micro_batch_size", "batching.micro_batch_tokens", "max_logprob_gap",
    "kl_budget",
    "push_to_hub",
)  # fmt: skip
"""Options that a resumed run may change. None of them changes what a step computes, beyond rounding."""

OF_EXPORT = ("keep_best", "save_precision")
"""Options that it may change as well, which change no step either, but the model that it exports."""

LENGTH = ("max_steps", "epochs")
"""Options by which a resumed run may become longer; from there on its learning rate is that of a run planned so."""

_START_OVER = "start a new run in another directory, from this one's `model/` to train on"
_AS_IT_WAS = f"resume with the run's own configuration, or {_START_OVER}"
_ORDER = "which rows a step has follows from it, and the run's place in the data is counted by it"
_READ = "the run's place in the data is one among rows that were read so"
_SHAPE = "the weights and the optimiser's state in the checkpoint have the shapes that it gives them"

NEVER: Mapping[str, str] = {
    "method": "the checkpoint holds the models and the state of another method",
    "model": "the checkpoint holds its weights, and what was frozen of it isn't in there",
    "data": "the run's place in the data would be one in other rows",
    "eval_data": "evaluations before and after the resume couldn't be compared, nor the best of them found",
    "seed": "every random stream, the order of rows among them, began with it",
    "batch_size": _ORDER,
    "dataset": _READ,
    "max_length": _READ,
    "lora": _SHAPE,
    "adapter": _SHAPE,
    "new_tokens": _SHAPE,
    "freeze": "the checkpoint holds the optimiser's state of what was trained",
    "optimizer.name": "the checkpoint holds the state of another optimiser",
}
"""Options that no resumed run may change, with the reason; a group stands for all of its options."""
_YET = ("lora.dropout", "dataset.strict")
"""Options of those groups that may change where they are named."""


@dataclass(frozen=True)
class OptionChange:
    """An option that a resumed run has with another value than before."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} → {self.now!r}"


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[OptionChange]:
    """Return the options whose values differ between two nested mappings, by their dotted names, sorted.

    Args:
        before: the options that the run was started with, as `resolved_options` returned them.
        now: those that it is resumed with.
    """
    old, new = flatten(before), flatten(now)
    if new.get("max_length") is None:
        new["max_length"] = old.get("max_length")  # not known before the model is built, and compared then
    names = sorted(old.keys() | new.keys())
    return [OptionChange(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def check_changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    place: str,
    allowed: Collection[str] = (),
    steps_done: int = 0,
) -> list[OptionChange]:
    """Return the options that a resumed run changes and may change.

    Args:
        before: the options that the run was started with, as `resolved_options` returned them.
        now: those that it is resumed with.
        place: the run's directory, for messages.
        allowed: options that may change besides, by dotted names; a group's name stands for all of its options.
        steps_done: steps of the newest checkpoint.

    Raises:
        ConfigError: an option changed that may not, with the difference; or `allowed` names one that never may, or none at all.
    """
    _check_allowed(allowed, before, now)
    changes = find_changes(before, now)
    refused = [one for one in changes if not _is_among(one.name, [*MAY_CHANGE, *OF_EXPORT, *LENGTH, *allowed])]
    if refused:
        raise ConfigError(
            "the configuration changed since the run was started",
            place=place,
            got=", ".join(map(str, refused)),
            fix=_fix(refused),
        )
    _check_length(changes, now, steps_done, place)
    return [one for one in changes if one.name != "output"]


def _fix(refused: Iterable[OptionChange]) -> str:
    """Return what to do about options that changed: allow them, where all may, else leave them, with the reason for the first."""
    reasons = {one.name: reason_against(one.name) for one in refused}
    if never := [name for name, reason in reasons.items() if reason is not None]:
        return f"`{never[0]}` can't change in a run ({reasons[never[0]]}): {_AS_IT_WAS}"
    return f"`--allow-change {','.join(reasons)}` takes the new values from here on; else {_AS_IT_WAS}"


def reason_against(name: str) -> str | None:
    """Return why no resumed run may change an option; None where it may."""
    if _is_among(name, _YET):
        return None
    return next((reason for never, reason in NEVER.items() if _is_among(name, [never])), None)


def _is_among(name: str, groups: Iterable[str]) -> bool:
    """Return whether an option is one of those, or in a group of those."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _check_allowed(allowed: Collection[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse names that no option has, and those of options that never change."""
    known = {*flatten(before), *flatten(now)}
    known |= {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
    for name in allowed:
        if (reason := reason_against(name)) is not None:
            raise ConfigError(
                f"`{name}` can't change in a run: {reason}", place="--allow-change", got=name, fix=_START_OVER
            )
        if name not in known:
            near = nearest(name, sorted(known))
            fix = f"did you mean `{near}`?" if near else "`config.yaml` in the run's directory lists its options"
            raise ConfigError("the run has no such option", place="--allow-change", got=name, fix=fix)


def _check_length(changes: Iterable[OptionChange], now: Mapping[str, Any], steps_done: int, place: str) -> None:
    """Refuse a length that the run is past already, or that has no effect."""
    changed = {one.name: one for one in changes}
    steps, epochs = changed.get("max_steps"), changed.get("epochs")
    if steps is not None and steps.now is None:
        raise ConfigError(
            "a run that was planned by `max_steps` can't be continued by `epochs`",
            place=place, got=str(steps), fix="give `--max_steps`",
        )  # fmt: skip
    if steps is not None and steps.now < steps_done:
        raise ConfigError(
            f"the run has made {steps_done} steps already", place=place, got=f"max_steps {steps.now}",
            fix=f"give `--max_steps` {steps_done} or more",
        )  # fmt: skip
    if epochs is not None and now.get("max_steps") is not None and steps is None:
        raise ConfigError(
            "the run's length is given by `max_steps`, beside which `epochs` has no effect",
            place=place, got=str(epochs), fix="give `--max_steps`",
        )  # fmt: skip
    if epochs is not None and epochs.now < epochs.before:
        raise ConfigError(
            "a run can be continued for more epochs, not for fewer",
            place=place, got=str(epochs), fix="`--max_steps` ends it at a step that it hasn't made yet",
        )  # fmt: skip
