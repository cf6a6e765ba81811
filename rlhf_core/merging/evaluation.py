"""A function of the user's own that scores merged models: `FILE.py:FUNCTION`, or `package.module:FUNCTION`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_core.infra.errors import ConfigError, PluginError, RLHFError
from rlhf_core.infra.model_files import first_line
from rlhf_core.infra.named_objects import named_object
from rlhf_core.merging.merge import Evaluate


def load_evaluation(name: str, *, place: str = "--evaluate") -> Evaluate:
    """Return the function that a name means, guarded: what goes wrong in it is reported under its name.

    Raises:
        ConfigError: there is no such file, module or function.
        PluginError: importing it raises.
    """
    found = named_object(name, place=place)
    if not callable(found):
        raise ConfigError("is no function", place=place, got=f"`{name}`")

    def guarded(model: Path) -> float:
        try:
            value: Any = found(model)
        except RLHFError:
            raise
        except Exception as error:
            raise _broken(f"evaluating {model} raised", name, error) from error
        try:
            return float(value)
        except (TypeError, ValueError):
            raise PluginError("the evaluation gave no number", place=name, got=repr(value)) from None

    return guarded


def _broken(problem: str, place: str, error: Exception) -> PluginError:
    return PluginError(problem, place=place, got=f"{type(error).__name__}: {first_line(error)}")
