"""Import one plugin and check it against its kind's contract.

The import is guarded (see `registry/guarded.py`). An import that ends its process at once, by `os._exit` or a crash in C code,
ends this one; `registry/trial_import.py` does the same in another process.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from rlhf_core.contracts.records import RECORDS
from rlhf_core.infra.version import API
from rlhf_core.registry.class_header import SourceError, split_target
from rlhf_core.registry.guarded import GuardedError, run_guarded

Fault = tuple[str, str]
"""A status of a plugin (`broken`, `wrong-api`) and its reason."""


class LoadFault(Exception):
    """A plugin can't be loaded: `status` and `reason`; `__cause__` is the exception that its import raised, if any."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


def load_target(kind: str, target: str) -> Any:
    """Import the object that `package.module:Class` names, check it against the contract of its kind, and return it.

    Raises:
        LoadFault: the import raised, or the object isn't a plugin of that kind.
    """
    try:
        module, name = split_target(target)
    except SourceError as error:
        raise LoadFault("broken", str(error)) from error
    was_there = module in sys.modules
    loaded = _guarded("importing", lambda: _import(module, name))
    if (fault := contract_fault(kind, loaded)) is not None:
        if not was_there:
            sys.modules.pop(module, None)  # once its file is mended, the next load reads it again
        raise LoadFault(*fault)
    return loaded


def contract_fault(kind: str, cls: Any) -> Fault | None:
    """Return what keeps an object from being a plugin of a kind, or None.

    The object may be anything, even a class whose metaclass raises: an exception while it is looked at is a reason, too.
    """
    if kind == "hook":
        return None
    if kind == "part":
        return None if callable(cls) else ("broken", "it isn't a function")
    try:
        return _guarded("looking at", lambda: _contract_fault(kind, cls))
    except LoadFault as fault:
        return fault.status, fault.reason


def describe_class(cls: Any) -> dict[str, Any]:
    """Return summary, record, stage and api of a loaded class, for plugins whose source can't be read."""

    def text(value: Any) -> str | None:
        return str(value) if isinstance(value, str) else None

    def look() -> dict[str, Any]:
        api = getattr(cls, "api", None)
        return {
            "summary": (inspect.getdoc(cls) or "").strip().split("\n")[0],
            "record": text(getattr(cls, "record", None)),
            "stage": text(getattr(cls, "stage", None)),
            "api": api if type(api) is int else None,
        }

    try:
        return run_guarded(look)
    except GuardedError:
        return {"summary": "", "record": None, "stage": None, "api": None}


def _import(module: str, name: str) -> Any:
    """Import a module and return its attribute `name`, which may be dotted, or the module where it is ''."""
    loaded: Any = importlib.import_module(module)
    for part in name.split(".") if name else ():
        loaded = getattr(loaded, part)
    return loaded


def _guarded(what: str, action: Callable[[], Any]) -> Any:
    """Return `action()`; whatever it raises is a `LoadFault` that says `what` was being done, such as "importing"."""
    try:
        return run_guarded(action)
    except GuardedError as fault:
        raise LoadFault("broken", f"{what} it raised {fault}") from fault.__cause__


def _contract_fault(kind: str, cls: Any) -> Fault | None:
    """Return (status, reason) where a class breaks its kind's contract; may raise what the class's own code raises."""
    from rlhf_core.config.base import BaseConfig
    from rlhf_core.config.training import TrainerConfig
    from rlhf_core.contracts.merger import Merger
    from rlhf_core.contracts.reward import RewardFn
    from rlhf_core.contracts.sampler import Sampler
    from rlhf_core.contracts.trainer import Trainer

    interfaces: dict[str, type] = {"trainer": Trainer, "reward": RewardFn, "sampler": Sampler, "merger": Merger}
    interface = interfaces[kind]
    if not _derives_from(cls, interface):
        return "broken", f"not a subclass of rlhf_core.{interface.__name__}"
    issubclass(object, cls)  # Python asks this of every subclass of the interface, so it must not raise
    if (missing := sorted(getattr(cls, "__abstractmethods__", ()))) != []:
        return "broken", f"doesn't define {', '.join(f'`{name}`' for name in missing)}"
    base = TrainerConfig if kind == "trainer" else BaseConfig
    if not _derives_from(getattr(cls, "Config", None), base):
        return "broken", f"its `Config` is not a subclass of rlhf_core.{base.__name__}"
    if kind == "trainer" and getattr(cls, "record", None) not in RECORDS:
        return "broken", f"its `record` is not one of: {', '.join(sorted(RECORDS))}"
    api = getattr(cls, "api", None)
    if api != API:
        return "wrong-api", f"written for api {api}, not {API}"
    return None


def _derives_from(cls: Any, base: type) -> bool:
    """Tell whether `base` is among a class's bases; `issubclass` would call the metaclasses of all other plugins as well."""
    return issubclass(type(cls), type) and any(one is base for one in type.__dict__["__mro__"].__get__(cls))
