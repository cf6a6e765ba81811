"""The check of a method's options: each has an effect, and one that changes the loss changes its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from rlhf_core.config.fields import single_options
from rlhf_core.config.training import LoraConfig, ModelConfig, ReferenceConfig, TrainerConfig
from rlhf_core.contracts.trainer import Window
from rlhf_core.infra.errors import RLHFError
from rlhf_core.testing.contract import after, require
from rlhf_core.testing.option_values import SPEED_ALONE, other_values
from rlhf_core.testing.trainer_setup import GRADIENT, TrainerSetup
from rlhf_core.testing.workbench import NothingToLearn, Workbench
from rlhf_core.training.logger import without_timing

MAX_WINDOWS = 4
"""Windows of which a trace consists at most."""
MAX_COMPANIONS = 24
"""Changes of other options with which an option is tried at most."""
VALUES_WITH_COMPANION = 3
"""Values of an option that are tried beside a change of another option."""


@dataclass(frozen=True)
class Trace:
    """Everything that a method computes from two batches under some options, and that an option may change."""

    windows: tuple[Any, ...]
    """For each window: its ids and columns, and the metrics reported."""
    losses: tuple[float, ...]
    """The loss of each update."""
    gradients: tuple[Mapping[str, Tensor], ...]
    """The gradient of each update, by parameter name."""
    rest: tuple[Any, ...]
    """The declared number of windows per batch, the method's state, and an evaluation."""

    def same_gradients(self, other: Trace) -> bool:
        """Tell whether the gradients of all updates are equal bit by bit."""
        return len(self.gradients) == len(other.gradients) and all(
            own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in own)
            for own, its in zip(self.gradients, other.gradients, strict=True)
        )

    def same(self, other: Trace) -> bool:
        """Tell whether the two traces are equal."""
        return (
            (self.windows, self.losses, self.rest) == (other.windows, other.losses, other.rest)
            and self.same_gradients(other)
        )  # fmt: skip


class OptionChecks(TrainerSetup):
    """Options that the configuration accepts and the method ignores."""

    @after(GRADIENT)
    def test_every_option_does_something(self) -> None:
        """Each option of the method changes a window, loss, metric or evaluation; where it changes a loss, also its gradient."""
        own = [path for path in _own_options(self.subject().Config) if ".".join(path) not in self.no_effect]
        idle, detached = [], []
        for path in own:
            name = ".".join(path)
            pairs = list(self._pairs(path, own))
            if pairs and all(before.same(now) for before, now in pairs):
                idle.append(name)
            # Traces without losses are of values with which the method fails: they say nothing about gradients.
            moved = [(old, new) for old, new in pairs if old.losses and new.losses and old.losses != new.losses]
            if moved and name not in self.no_gradient and all(before.same_gradients(now) for before, now in moved):
                detached.append(name)
        require(
            not idle,
            f"options without any effect: {', '.join(idle)}; use or remove each, or set on the contract class a value that has"
            " one (`other_values`), or name it in `no_effect`",
        )
        require(
            not detached,
            f"options that change the loss and not its gradient: {', '.join(detached)}; the term that each weighs is computed"
            " without gradients or detached (if that is meant, name the option in `no_gradient`)",
        )

    def _pairs(self, path: tuple[str, ...], own: Sequence[tuple[str, ...]]) -> Iterator[tuple[Trace, Trace]]:
        """Yield pairs of traces, with an option's own value and with another, until one pair shows an effect on the gradient.

        Where no value of the option alone has an effect, another option is changed in both traces: some options have an effect
        only beside certain values of others.

        Args:
            path: names of the group and the option.
            own: all options of the method.
        """
        companions = ((other, value) for other in own if other != path for value in self._companions(other))
        for extra in itertools.islice(itertools.chain([None], companions), MAX_COMPANIONS):
            base = {} if extra is None else _nested(*extra)
            seen = False
            for value in self._others(path, base)[: None if extra is None else VALUES_WITH_COMPANION]:
                now = self._trace(base, _nested(path, value))
                before = self._trace(base) if now is not None else None
                if before is None or now is None:
                    continue
                yield before, now
                seen = seen or not before.same(now)
                failed = not (before.losses and now.losses)
                if seen and not failed and (before.losses == now.losses or not before.same_gradients(now)):
                    return
            if seen:
                return

    def _companions(self, path: tuple[str, ...]) -> list[Any]:
        """Return values of an option beside which others may have an effect: each choice, or one number."""
        values = self._others(path)
        return values if any(isinstance(value, str | bool) for value in values) else values[:1]

    def _others(self, path: tuple[str, ...], *changes: Mapping[str, Any]) -> list[Any]:
        """Return other values of an option to try, from `other_values` of the contract or by its type."""
        name = ".".join(path)
        if name in self.other_values:
            given = self.other_values[name]
            return list(given) if isinstance(given, list) else [given]
        try:
            config: Any = self.build(*changes).config
        except RLHFError:
            return []
        for part in path[:-1]:
            config = getattr(config, part)
        field = type(config).model_fields[path[-1]]
        return other_values(field.annotation, getattr(config, path[-1]))

    def _trace(self, *changes: Mapping[str, Any]) -> Trace | None:
        """Return the method's trace under changed options; None where the configuration refuses them."""

        def made() -> Trace | None:
            try:
                bench = self.bench(
                    self.several_windows(minibatches=1), *changes
                )  # several epochs, or policy ratios would all be 1
            except RLHFError:
                return None
            try:
                return traced(bench)
            except Exception as error:  # a value with which the method fails isn't ignored
                return Trace((repr(error),), (), (), ())

        return self.once(("trace", repr([change for change in changes if change])), made)


def traced(bench: Workbench) -> Trace:
    """Return the trace of a method that trains on the windows of two batches and evaluates the first batch.

    Args:
        bench: a workbench that has made no window yet.
    """
    batches = list(itertools.islice(bench.batches, 2))
    bench.batches = iter(batches)
    windows: list[Any] = []
    losses: list[float] = []
    gradients: list[Mapping[str, Tensor]] = []
    trainer = bench.trainer
    for window in itertools.islice(bench.windows(), MAX_WINDOWS):
        # How long rewards took differs from one time to the next.
        logged = without_timing(bench.logged())
        windows.append((_shown(window), tuple(sorted(logged.items()))))
        try:
            step = bench.train_step(window.batch)
        except NothingToLearn:
            continue
        losses.append(step.loss)
        gradients.append(step.gradient)
        windows.append(tuple(sorted(step.metrics.items())))
        bench.steps += 1
    remembered = repr(trainer.state_dict())
    trainer.models.eval()
    with torch.no_grad():
        found = trainer.evaluate(batches[0], bench.run.for_evaluation())
    pairs = [(name, _numbers(pair)) for part in (found.terms, found.metrics) for name, pair in sorted(part.items())]
    return Trace(
        tuple(windows), tuple(losses), tuple(gradients), (trainer.windows_per_batch(), remembered, repr(pairs))
    )


def _shown(window: Window) -> Any:
    """Return a window's rows, response ids, loss mask and columns as values that can be compared."""
    batch = window.batch
    columns = {**batch.per_prompt, **batch.per_response, **batch.per_token}
    return (
        window.last,
        batch.rows,
        batch.response_ids.tolist(),
        batch.loss_mask.tolist(),
        repr({name: column.tolist() for name, column in sorted(columns.items())}),
    )


def _numbers(pair: Any) -> Any:
    """Return a (sum, count) pair as lists of floats."""
    return [torch.as_tensor(value).detach().double().tolist() for value in pair]


_ONLINE = (
    "rewards", "eval_samples", "eval_temperature", "right_from", "max_logprob_gap", "kl_budget", "replay", "rollout_sampler",
    "eval_sampler",
)  # fmt: skip
"""Options of `OnlineConfig` that the core follows: in the loop, in what a rollout reports, in `run.evaluate_completions`."""


def _own_options(config: type[BaseModel]) -> list[tuple[str, ...]]:
    """Return the paths of the options that a method defines itself, those of its groups too."""
    core = {*TrainerConfig.model_fields, *ReferenceConfig.model_fields, *_ONLINE}
    # How a model is loaded is the core's concern, too.
    paths = [tuple(name.split(".")) for name in single_options(config, without=(ModelConfig, LoraConfig))]
    # What the engine does with them is its concern; completions of the kit are too short for those about confidence.
    engines = [("generation", name) for name in (*SPEED_ALONE, "min_confidence", "confidence_window", "confidence_top")]
    return [path for path in paths if path[0] not in core and path not in engines]


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return options in groups, `{"group": {"option": value}}`."""
    for name in reversed(path):
        value = {name: value}
    return value
