"""Events of a run, for plugins that listen: pluggy specifications, loaded one by one and guarded.

A hook plugin is an object or module behind an entry point of the group `rlhf_core.hooks`:

    from rlhf_core.plugin import hookimpl

    @hookimpl
    def step_ended(step, metrics):  # any of the event's arguments, by name
        print(step, metrics["loss"])

In a run of several processes only the first one's events are emitted. A hook never stops a run: one that can't be loaded is left
out with a warning; one that raises is not called again, with a warning. Methods are found by name in `registry`, never by hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pluggy

from rlhf_core import registry
from rlhf_core.contracts.callbacks import CALLBACKS, taken_arguments
from rlhf_core.infra.errors import RLHFError, describe_error, did_you_mean
from rlhf_core.registry.guarded import GuardedError, run_guarded

logger = logging.getLogger(__name__)

hookspec = pluggy.HookspecMarker("rlhf_core")
hookimpl = pluggy.HookimplMarker("rlhf_core")
"""Decorator of a function or method that is called at the event of its name."""


class Events:
    """The events of a run. `run` is the trainer whose run it is; listeners may read its `config`, `models` and `output`."""

    @hookspec
    def run_started(self, run: Any) -> None:
        """Models and data are loaded, and the first step comes next; emitted for a resumed run, too."""

    @hookspec
    def step_ended(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Optimiser step `step`, counted from 1, is done; `metrics` is its row of `metrics.jsonl`."""

    @hookspec
    def rollouts_scored(self, run: Any, step: int, samples: Any, rewards: Any, evaluating: bool) -> None:
        """Completions were generated after step `step` and scored. `samples` are this process's `Sample`s, `rewards` the
        weighted sum of each sample's rewards; `evaluating`: the prompts are held-out ones."""

    @hookspec
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out rows were scored after step `step`."""

    @hookspec
    def checkpoint_saved(self, run: Any, step: int, path: Path) -> None:
        """The checkpoint of step `step` is complete at `path`."""

    @hookspec
    def run_ended(self, run: Any, result: Any) -> None:
        """The run reached its end; `result` is what `train` returns."""

    @hookspec
    def run_failed(self, run: Any, error: BaseException) -> None:
        """The run ended by `error`, which is raised after this."""


EVENTS = tuple(name for name in vars(Events) if not name.startswith("_"))


class Hooks:
    """The listeners of one run."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("rlhf_core")
        self._manager.add_hookspecs(Events)
        self._callbacks: dict[str, tuple[str, Callable[..., object]]] = {}

    @property
    def names(self) -> list[str]:
        """The listeners' names, in the order in which they were added."""
        return [name for name, plugin in self._manager.list_name_plugin() if plugin is not None]

    def events_of(self, name: str) -> list[str]:
        """Return the events at which a listener is called."""
        return [caller.name for caller in self._manager.get_hookcallers(self._manager.get_plugin(name)) or ()]

    def add(self, listener: Any, name: str) -> bool:
        """Add a listener: an object or module whose `@hookimpl` functions have the names of events.

        Returns:
            Whether it was added; a listener with a fault is left out with a warning.
        """
        if self._manager.has_plugin(name) or any(listener is one for _, one in self._manager.list_name_plugin()):
            logger.warning("hook `%s` is left out: it was added before", name)
            return False
        try:
            # pluggy hashes and compares listeners, each with every other. A plain dataclass has no hash.
            _ = hash(listener), bool(listener == object())
            self._manager.register(listener, name)
            self._refuse_unknown_events(listener)
        except (ValueError, pluggy.PluginValidationError) as error:
            self._drop(name)
            logger.warning("hook `%s` is left out: %s", name, error)
            return False
        except Exception as error:  # of the object's own methods
            self._drop(name)
            logger.warning("hook `%s` is left out: looking at it raised %s", name, describe_error(error))
            return False
        return True

    def add_callbacks(self, callbacks: Mapping[str, Any]) -> None:
        """Add the functions that the trainer was given (`contracts.callbacks`).

        They are the user's own code, so what one raises ends the run; but for `on_failure`, when the run has failed already.
        """
        given = ((name, function) for name, function in callbacks.items() if function is not None)
        self._callbacks |= {CALLBACKS[name].name: (name, function) for name, function in given}

    def emit(self, event: str, **values: Any) -> None:
        """Call every listener of an event; one that raises is removed with a warning, and the others are still called.

        A callback of the trainer's comes last.

        Raises:
            Exception: what a callback raised.
        """
        if event not in EVENTS:
            raise ValueError(f"no event {event!r}; {did_you_mean(event, EVENTS)}")
        everyone = self._manager.get_plugins()
        for name, listener in self._manager.list_name_plugin():
            if listener is None:
                continue
            try:
                self._manager.subset_hook_caller(event, everyone - {listener})(**values)
            except (Exception, SystemExit) as error:
                self._drop(name)
                logger.warning(
                    "hook `%s` raised %s in %s and is not called again: %s", name, type(error).__name__, event, error
                )
        if event in self._callbacks:
            self._call_back(event, *self._callbacks[event], values)

    @staticmethod
    def _call_back(event: str, name: str, function: Callable[..., object], values: Mapping[str, Any]) -> None:
        try:
            function(**{argument: values[argument] for argument in taken_arguments(name, function)})
        except Exception as error:
            if event != "run_failed":
                error.add_note(f"raised by the function given as `{name}`")
                raise
            logger.warning("the function given as `%s` raised %s", name, describe_error(error))

    def _refuse_unknown_events(self, listener: Any) -> None:
        for caller in self._manager.get_hookcallers(listener) or ():
            if caller.name not in EVENTS:
                raise ValueError(f"there is no event `{caller.name}`; {did_you_mean(caller.name, EVENTS)}")

    def _drop(self, name: str) -> None:
        if self._manager.get_plugin(name) is not None:
            self._manager.unregister(name=name)


def load_hooks() -> Hooks:
    """Load the hook plugins that are installed and enabled, each guarded. Called when a run starts, never before.

    What an import or a constructor prints goes to stderr. A hook whose import ends its process at once (`os._exit`, a crash in C
    code) ends the run; `rlhf list hooks --check` finds such hooks.
    """
    hooks = Hooks()
    for plugin in registry.find("hook"):
        if plugin.status == "disabled":
            continue
        try:
            loaded = registry.load(plugin)
            listener = run_guarded(loaded) if isinstance(loaded, type) else loaded
        except (RLHFError, GuardedError) as error:
            reason = error.line() if isinstance(error, RLHFError) else f"making it raised {error}"
            logger.warning("hook `%s` is left out, and the run continues without it: %s", plugin.qualified, reason)
            continue
        hooks.add(listener, plugin.qualified)
    return hooks
