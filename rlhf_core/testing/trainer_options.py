"""The check of a method's options: each of them does something, and what changes the loss changes its gradient."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel
from torch import Tensor

from rlhf_core.config.training import LoraConfig, ModelConfig, ReferenceConfig, TrainerConfig
from rlhf_core.contracts.trainer import Window
from rlhf_core.infra.errors import RLHFError
from rlhf_core.testing.contract import after, require
from rlhf_core.testing.trainer_setup import GRADIENT, TrainerSetup
from rlhf_core.testing.workbench import NothingToLearn, Workbench

NUMBERS = (0.5, 0.01, 2.0, 0.1, 0.0, 0.9, 1.0)
COUNTS = (2, 1, 3, 4, 0, 8)
MOST_WINDOWS = 4
MOST_COMPANIONS = 24
FEW = 3


@dataclass(frozen=True)
class Trace:
    """What a method makes of two batches under some options: all that an option may change."""

    windows: tuple[Any, ...]
    """The ids and columns of each window, and what was reported."""
    losses: tuple[float, ...]
    gradients: tuple[Mapping[str, Tensor], ...]
    rest: tuple[Any, ...]
    """The number of windows per batch, the state that it remembers, and the evaluation."""

    def same_gradients(self, other: Trace) -> bool:
        """Tell whether every update's gradient has the same bits."""
        return len(self.gradients) == len(other.gradients) and all(
            own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in own)
            for own, its in zip(self.gradients, other.gradients, strict=True)
        )

    def same(self, other: Trace) -> bool:
        """Tell whether nothing at all differs."""
        return (
            (self.windows, self.losses, self.rest) == (other.windows, other.losses, other.rest)
            and self.same_gradients(other)
        )  # fmt: skip


class OptionChecks(TrainerSetup):
    """Options that are accepted and ignored."""

    @after(GRADIENT)
    def test_every_option_does_something(self) -> None:
        """Each option of the method changes a loss, metric, window, draw or evaluation, and a loss with its gradient."""
        own = [path for path in _own_options(self.subject().Config) if ".".join(path) not in self.no_effect]
        idle, detached = [], []
        for path in own:
            name = ".".join(path)
            pairs = list(self._pairs(path, own))
            if pairs and all(before.same(now) for before, now in pairs):
                idle.append(name)
            # A value that the method fails with has no losses, and says nothing of their gradient.
            moved = [(old, new) for old, new in pairs if old.losses and new.losses and old.losses != new.losses]
            if moved and name not in self.no_gradient and all(before.same_gradients(now) for before, now in moved):
                detached.append(name)
        require(
            not idle,
            f"no effect on anything: {', '.join(idle)}; use it, leave it out, or say in the contract class what shows it"
            " (`other_values`), or that nothing here can (`no_effect`)",
        )
        require(
            not detached,
            f"changes the loss and not its gradient: {', '.join(detached)}; what it weighs is computed without gradients or"
            " detached (where that is meant, say so by `no_gradient`)",
        )

    def _pairs(self, path: tuple[str, ...], own: Sequence[tuple[str, ...]]) -> Iterator[tuple[Trace, Trace]]:
        """Yield traces without and with another value of an option, until one shows what it does.

        Where no other value alone does anything, other options are changed too: some mean something beside others only.
        """
        companions = ((other, value) for other in own if other != path for value in self._companions(other))
        for extra in itertools.islice(itertools.chain([None], companions), MOST_COMPANIONS):
            base = {} if extra is None else _nested(*extra)
            seen = False
            for value in self._others(path, base)[: None if extra is None else FEW]:
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
        """Return values of an option that others may need: each choice, or one number."""
        values = self._others(path)
        return values if any(isinstance(value, str | bool) for value in values) else values[:1]

    def _others(self, path: tuple[str, ...], *changes: Mapping[str, Any]) -> list[Any]:
        """Return other values of an option to try."""
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
        now = getattr(config, path[-1])
        return [value for value in values_of(field.annotation, now) if type(value) is not type(now) or value != now]

    def _trace(self, *changes: Mapping[str, Any]) -> Trace | None:
        """Return what the method does under changed options; None where they are refused."""

        def made() -> Trace | None:
            try:
                bench = self.bench(self.several_windows(minibatches=1), *changes)  # else no ratio is ever other than 1
            except RLHFError:
                return None
            try:
                return traced(bench)
            except Exception as error:  # a value that the method can't do with isn't ignored
                return Trace((repr(error),), (), (), ())

        return self.once(("trace", repr([change for change in changes if change])), made)


def traced(bench: Workbench) -> Trace:
    """Return what a method does with two batches, learning from each window, and with the first as held-out rows."""
    batches = list(itertools.islice(bench.batches, 2))
    bench.batches = iter(batches)
    windows: list[Any] = []
    losses: list[float] = []
    gradients: list[Mapping[str, Tensor]] = []
    trainer = bench.trainer
    for window in itertools.islice(bench.windows(), MOST_WINDOWS):
        windows.append((_shown(window), tuple(sorted(bench.logged().items()))))
        try:
            step = bench.learn(window.batch)
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
    pairs = [(name, _plain(pair)) for part in (found.terms, found.metrics) for name, pair in sorted(part.items())]
    return Trace(
        tuple(windows), tuple(losses), tuple(gradients), (trainer.windows_per_batch(), remembered, repr(pairs))
    )


def _shown(window: Window) -> Any:
    batch = window.batch
    columns = {**batch.per_prompt, **batch.per_response, **batch.per_token}
    return (
        window.last,
        batch.rows,
        batch.response_ids.tolist(),
        batch.loss_mask.tolist(),
        repr({name: column.tolist() for name, column in sorted(columns.items())}),
    )


def _plain(pair: Any) -> Any:
    return [torch.as_tensor(value).detach().double().tolist() for value in pair]


def _own_options(config: type[BaseModel]) -> list[tuple[str, ...]]:
    """Return the options that a method answers for, those of its groups too: all but the core's."""
    core = {*TrainerConfig.model_fields, *ReferenceConfig.model_fields, "rewards"}
    return [path for name in config.model_fields if name not in core for path in _paths(config, (name,))]


def _paths(config: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    annotation = config.model_fields[path[-1]].annotation
    kinds = [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if any(issubclass(kind, ModelConfig | LoraConfig) for kind in kinds):
        return  # how a model is loaded is the core's
    if annotation in kinds:
        for name in kinds[0].model_fields:
            yield from (path[:-1] + below for below in _below(kinds[0], path[-1], name))
    else:
        yield path


def _below(group: type[BaseModel], name: str, option: str) -> Iterator[tuple[str, ...]]:
    for path in _paths(group, (option,)):
        yield (name, *path)


def _kinds(annotation: Any) -> list[Any]:
    """Return the types of a union, flat, without None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [] if annotation is type(None) else [annotation]


def values_of(annotation: Any, now: Any) -> list[Any]:
    """Return values of a type, the likeliest to show an effect first."""
    found: list[Any] = []
    for kind in _kinds(annotation):
        if get_origin(kind) is Literal:
            found += get_args(kind)
        elif kind is bool:
            found += [True, False]
        elif kind is int:
            found += [*([now * 2, now + 1] if isinstance(now, int) else []), *COUNTS]
        elif kind is float:
            found += [*([now * 2, now / 2] if isinstance(now, int | float) and now else []), *NUMBERS]
        elif kind is str:
            found += [*([now + now, now + "x"] if isinstance(now, str) else []), "x"]
    return [*found, None] if type(None) in get_args(annotation) else found


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value
