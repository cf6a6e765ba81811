"""The conformance tests of hooks: a class to inherit.

class TestEvaluations(HookContract):
    method = "acme-evaluations"  # a registered name, or `hook = EvaluationsHook`
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_core import registry
from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import TrainingStage
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Evaluation, Loss, Trainer
from rlhf_core.infra.errors import PluginError
from rlhf_core.registry import hooks
from rlhf_core.testing.contract import Contract, after, require
from rlhf_core.testing.tiny import tiny_policy
from rlhf_core.training.context import RunContext

NAME = "under-test"
HANDLES, NO_ERRORS = "test_it_handles_an_event", "test_no_event_raises"


class HookContract(Contract):
    """The conformance tests of a hook, on short runs of a tiny model that emit every event."""

    kind = "hook"
    hook: ClassVar[Any] = None
    """The class, object or module under test, in place of `method`."""

    def test_it_is_described(self) -> None:
        """The hook's module has a docstring, whose first line is the summary in `rlhf list`."""
        subject = self.subject()
        owner = subject if isinstance(subject, type) else type(subject)
        module = subject if isinstance(subject, ModuleType) else sys.modules[owner.__module__]
        name = module.__name__
        require(
            bool((module.__doc__ or "").strip()),
            f"the module `{name}` has no docstring; `rlhf list` shows its first line",
        )

    def test_it_handles_an_event(self) -> None:
        """A run accepts the hook: its `@hookimpl` functions have the names of events and of their arguments."""
        subject = self.subject()
        listeners = hooks.Hooks()
        with _warnings() as warned:
            listeners.add(subject() if isinstance(subject, type) else subject, NAME)
        require(not warned, "".join(warned[:1]))
        known = ", ".join(hooks.EVENTS)
        require(
            bool(listeners.events_of(NAME)),
            f"the hook handles no event: mark a function with `@hookimpl`, named as one of {known}",
        )

    @after(HANDLES)
    def test_no_event_raises(self) -> None:
        """No event raises an error in the hook, in runs that end or fail, with and without a run directory."""
        for rewards in ([_digits], [_broken]):
            for output in (True, False):
                with self._registered() as warned, suppress(PluginError):
                    _train(rewards, output=output)
                where = "" if output else " in a run without a directory"
                require(not warned, "".join(warned[:1]) + where)

    @after(NO_ERRORS)
    def test_the_run_does_not_change(self) -> None:
        """A run with the hook ends with the same weights, bit by bit, as a run without it."""
        with _only_registered():
            alone = _train([_digits])
        with self._registered():
            hooked = _train([_digits])
        changed = [name for name, value in alone.items() if not torch.equal(value, hooked[name])]
        require(not changed, f"a run with the hook ends with other weights: {', '.join(changed[:4])}")

    @contextmanager
    def _registered(self) -> Iterator[list[str]]:
        """Register the hook under test and no other; yield the list of warnings about it."""
        subject = self.subject()  # looked up before other plugins, and this one's own name, are hidden
        with _only_registered(), _warnings() as warned:
            registry.register("hook", NAME, subject)
            try:
                yield warned
            finally:
                registry.unregister("hook", NAME)


class _Toy(Trainer[OnlineConfig]):
    """A minimal REINFORCE, whose runs emit every event."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = OnlineConfig

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        for batch in stream:
            drawn = run.engine.generate(batch, self.config.group_size, self.config.generation)
            yield Batch.from_completions(batch, drawn).attach(per_response={"rewards": run.score(batch, drawn).total})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"policy": batch.num_responses}

    def loss(self, batch: Batch) -> Loss:
        return Loss({"policy": -(batch["rewards"] * self.policy.response_logps(batch)).sum()})

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        rewards = run.score(batch, run.engine.generate(batch, 1, self.config.generation)).total
        return Evaluation(metrics={"reward": (rewards, torch.ones_like(rewards))})


def _digits(completions: list[str]) -> list[float]:
    return [float(sum(map(str.isdigit, text))) for text in completions]


def _broken(completions: list[str]) -> list[float]:
    raise RuntimeError("this reward of the kit fails on purpose, so that a run fails")


def _train(rewards: list[Any], *, output: bool = True) -> dict[str, Tensor]:
    """Train a tiny policy for two steps with these rewards; return its weights."""
    config = OnlineConfig.parse(
        {
            "max_steps": 2, "batch_size": 2, "group_size": 2, "eval_steps": 1, "learning_rate": 1e-3, "max_length": 32,
            "generation": {"max_new_tokens": 4}, "checkpoint": {"every": int(output)}, "logging": {"progress": False},
        }
    )  # fmt: skip
    rows = [{"prompt": f"{number}+1="} for number in range(4)]
    with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
        place = Path(folder) / "run" if output else None
        trainer = _Toy(config, model=tiny_policy(), data=rows, eval_data=rows[:2], output=place, rewards=rewards)
        trainer.train(quiet=True)
        return {name: value.detach().clone() for name, value in trainer.models.named_parameters()}


@contextmanager
def _only_registered() -> Iterator[None]:
    """Hide every installed plugin."""
    before = os.environ.get(registry.ALLOW_VARIABLE)
    os.environ[registry.ALLOW_VARIABLE] = NAME
    try:
        yield
    finally:
        os.environ.pop(registry.ALLOW_VARIABLE, None)
        if before is not None:
            os.environ[registry.ALLOW_VARIABLE] = before


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Yield the list of warnings that are logged about hooks, and keep them out of the log."""

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    warned: list[str] = []
    logger, handler = logging.getLogger(hooks.__name__), Recorder(logging.WARNING)
    level, passes = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield warned
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passes
