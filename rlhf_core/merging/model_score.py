"""The user's function that scores a model, for methods that choose by it what to merge."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from rlhf_core.infra.errors import ConfigError, PluginError, RLHFError, describe_error
from rlhf_core.infra.import_object import import_object

Evaluate = Callable[[Path], float]
"""Takes a model's directory and returns its score; larger is better."""


class ModelScore:
    """A function that scores a model's directory; what goes wrong in it is reported under its name.

    Args:
        function: the function, or its name: `FILE.py:FUNCTION` or `package.module:FUNCTION`.

    Raises:
        ConfigError: there is no such file, module or function.
        PluginError: importing it raises.
    """

    def __init__(self, function: Evaluate | str) -> None:
        self.name = function if isinstance(function, str) else "evaluate"
        found = import_object(function, place="evaluate") if isinstance(function, str) else function
        if not callable(found):
            raise ConfigError("is not a function", place="evaluate", got=f"`{function}`")
        self._function: Evaluate = found

    def __call__(self, model: Path) -> float:
        """Return the score of a model. Raises PluginError where the function raises, or returns no number."""
        try:
            value = self._function(model)
        except RLHFError:
            raise
        except Exception as error:
            got = describe_error(error, lines=2)
            raise PluginError(f"the evaluation of {model} raised", place=self.name, got=got) from error
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if math.isnan(score):
            raise PluginError("the evaluation must return a number", place=self.name, got=repr(value))
        return score
