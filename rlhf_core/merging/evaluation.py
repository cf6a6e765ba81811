"""A function of the user's own that scores merged models: `FILE.py:FUNCTION`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, PluginError, RLHFError, did_you_mean
from rlhf_core.infra.model_files import first_line
from rlhf_core.merging.merge import Evaluate


def load_evaluation(name: str, *, place: str = "--evaluate") -> Evaluate:
    """Import a file and return one of its functions, guarded: what goes wrong in it is told by its name.

    Raises:
        ConfigError: there is no such file or function.
        PluginError: importing the file raises.
    """
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py") or not function:
        raise ConfigError("no function is named", place=place, got=f"`{name}`", fix="write `FILE.py:FUNCTION`")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError("no such file", place=place, got=file)
    spec = importlib.util.spec_from_file_location(f"rlhf_evaluation_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _broken("importing it raised", file, error) from error
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"has no function `{function}`", place=file, fix=did_you_mean(function, own))

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
