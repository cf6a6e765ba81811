"""Public names of a package that are imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose names are imported on first use.

    Args:
        package: the package's `__name__`.
        modules: module → the names that it defines, separated by blanks. A module without names is itself a name
            of the package: its last part.
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
