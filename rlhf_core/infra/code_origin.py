"""Describe a function or class for a run's record: its name, the hash of its source, and the values bound to it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.infra.import_object import is_from_file


def describe_code(thing: Any) -> dict[str, Any]:
    """Return `name` (`module:qualified name`), `source_sha256`, and `values`: arguments of partials, attributes, closures.

    The hash is of the whole file for code that can be imported; of the definition's text for code of a script or notebook, whose
    other lines may change; of the compiled code where there is no text; None for what isn't Python. Of the values, only JSON-like
    ones are returned.
    """
    values: dict[str, Any] = {}
    while isinstance(thing, functools.partial):
        values = {str(number): value for number, value in enumerate(thing.args)} | dict(thing.keywords) | values
        thing = thing.func
    if inspect.ismethod(thing):
        values |= _own_values(thing.__self__)
        thing = thing.__func__
    elif not isinstance(thing, type) and not inspect.isroutine(thing):
        values |= _own_values(thing)
        thing = type(thing)
    values |= _closure(thing)
    module = getattr(thing, "__module__", None) or "?"
    if is_from_file(module):  # such a module's name depends on the file's path
        module = Path(sys.modules[module].__file__ or module).name
    found = {"name": f"{module}:{thing.__qualname__}", "source_sha256": _hash(thing)}
    plain = {key: value for key, value in values.items() if _is_plain(value)}
    return found | ({"values": plain} if plain else {})


def _hash(thing: Any) -> str | None:
    """Return the hash that `describe_code` records."""
    if thing.__module__ != "__main__":
        try:
            file = inspect.getsourcefile(thing)
            if file is not None and Path(file).is_file():
                return hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except (OSError, TypeError):
            pass
    try:
        return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()
    except (OSError, TypeError):
        code = getattr(inspect.unwrap(thing) if callable(thing) else thing, "__code__", None)
        return None if code is None else hashlib.sha256(_code_bytes(code)).hexdigest()


def _code_bytes(code: Any) -> bytes:
    """Return a function's bytecode, names and constants, those of inner functions included, without memory addresses."""
    parts = [code.co_code, repr(code.co_names).encode()]
    for one in code.co_consts:
        # The order of a set differs between processes.
        plain = sorted(map(repr, one)) if isinstance(one, frozenset) else one
        parts.append(_code_bytes(one) if hasattr(one, "co_code") else repr(plain).encode())
    return b"\0".join(parts)


def _closure(thing: Callable[..., Any]) -> dict[str, Any]:
    """Return the variables that a function uses from the functions around it, by name."""
    cells = getattr(thing, "__closure__", None) or ()
    names = getattr(getattr(thing, "__code__", None), "co_freevars", ())
    values = {}
    for name, cell in zip(names, cells, strict=False):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return values


def _own_values(thing: Any) -> dict[str, Any]:
    """Return an object's instance attributes; {} for a class."""
    return dict(vars(thing)) if hasattr(thing, "__dict__") and not isinstance(thing, type) else {}


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a scalar, or a list or mapping of such with at most 100 entries."""
    if isinstance(value, list | tuple):
        return len(value) <= 100 and all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return len(value) <= 100 and all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return value is None or isinstance(value, str | int | float | bool)
