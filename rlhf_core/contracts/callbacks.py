"""Callbacks of a run from Python: plain functions that a trainer is given, called at its events.

Importing this imports no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

from rlhf_core.infra.errors import ConfigError, did_you_mean


class Callbacks(TypedDict, total=False):
    """The functions that a trainer may be given; each gets those of its event's arguments that it names, by name.

    `DPOTrainer(config, model=m, data=d, on_step=lambda step, metrics: losses.append(metrics["loss"]))`
    """

    on_start: Callable[..., object]
    """`run`: models and data are loaded, and the first step comes next; called for a resumed run, too."""
    on_step: Callable[..., object]
    """`run`, `step`, `metrics`: a step is done; `metrics` is its row of `metrics.jsonl`."""
    on_rollouts: Callable[..., object]
    """`run`, `step`, `samples`, `rewards`, `evaluating`: completions were generated and scored."""
    on_evaluate: Callable[..., object]
    """`run`, `step`, `metrics`: held-out rows were scored."""
    on_checkpoint: Callable[..., object]
    """`run`, `step`, `path`: a checkpoint is complete."""
    on_end: Callable[..., object]
    """`run`, `result`: the run reached its end."""
    on_failure: Callable[..., object]
    """`run`, `error`: the run ended by an error, which is raised after this."""


class Event(NamedTuple):
    """An event of a run as `registry.hooks` names it, with its arguments."""

    name: str
    arguments: tuple[str, ...]


CALLBACKS: Mapping[str, Event] = {
    "on_start": Event("run_started", ("run",)),
    "on_step": Event("step_ended", ("run", "step", "metrics")),
    "on_rollouts": Event("rollouts_scored", ("run", "step", "samples", "rewards", "evaluating")),
    "on_evaluate": Event("evaluated", ("run", "step", "metrics")),
    "on_checkpoint": Event("checkpoint_saved", ("run", "step", "path")),
    "on_end": Event("run_ended", ("run", "result")),
    "on_failure": Event("run_failed", ("run", "error")),
}
"""Each callback's event."""


ELSEWHERE = {
    "args": "write `config`, such as `DPOTrainer.Config(learning_rate=1e-6)`",
    "train_dataset": "write `data`",
    "eval_dataset": "write `eval_data`",
    "processing_class": "write `tokenizer`",
    "reward_funcs": "write `rewards`",
    "reward_model": "write `rewards`, such as `[{'name': 'reward_model', 'options': {'model': 'PATH'}}]`",
    "ref_model": "leave it out: the reference is the model as it was passed",
    "peft_config": "write `config` with `lora`, such as `DPOTrainer.Config(lora={'rank': 16})`",
    "callbacks": "pass functions by the event's name: `on_step=…`, `on_evaluate=…`",
    "compute_metrics": "pass `on_evaluate=…`, or `rlhf evaluate` for metrics of completions",
    "model_init_kwargs": "write options of loading in `config`: `precision`, `attention`",
}
"""Arguments of other libraries' trainers → what to write here."""


def check_callbacks(callbacks: Mapping[str, Any], owner: str, known: tuple[str, ...]) -> None:
    """Refuse what can't be called at an event, when a trainer is made.

    Args:
        callbacks: functions by name.
        owner: the trainer's class, for messages.
        known: its other arguments, of which an unknown name may be meant.

    Raises:
        ConfigError: an unknown name, no function, or a function with an argument that its event doesn't have.
    """
    for name, function in callbacks.items():
        if name not in CALLBACKS:
            near = ELSEWHERE.get(name) or did_you_mean(name, (*known, *CALLBACKS))
            raise ConfigError(f"unknown argument `{name}`", place=owner, fix=near)
        if function is None:
            continue
        if not callable(function):
            raise ConfigError(f"`{name}` must be a function", place=owner, got=type(function).__name__)
        taken_arguments(name, function)


def taken_arguments(name: str, function: Callable[..., object]) -> tuple[str, ...]:
    """Return which of its event's arguments a callback takes.

    Raises:
        ConfigError: it needs one that the event doesn't have.
    """
    offered = CALLBACKS[name].arguments
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a function in C, such as `print`
        return offered
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return offered
    by_name = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_POSITIONAL]
    if foreign := [one for one in needed if one not in offered or one not in by_name]:
        raise ConfigError(
            f"its function needs an argument `{foreign[0]}`",
            place=name,
            fix=f"name any of these: {', '.join(offered)}; they are given by name",
        )
    return tuple(one for one in offered if one in by_name)
