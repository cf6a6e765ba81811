"""Public names of a package that load what they need on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: its `__name__`.
        modules: the names that each module defines, blank-separated, by the module's whole name. A module without names is
            itself a name of the package, its last part.
    """
    table = {name: module for module, names in modules.items() for name in names.split()}
    whole = {module.rpartition(".")[2]: module for module, names in modules.items() if not names}

    def getattr_(name: str) -> Any:
        if name in whole:
            return importlib.import_module(whole[name])
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(table[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    everything = sorted([*table, *whole])
    return getattr_, lambda: everything, everything
