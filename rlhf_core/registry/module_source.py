"""Where a module's source is, found as an import would find it, without importing the module or its parents.

Source files, zip archives, namespace packages of every make, and whatever editable installations put on `sys.meta_path`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from rlhf_core.infra.errors import describe_error

LARGEST = 10_000_000
"""Bytes of source that are read; a module that is written by hand has a thousandth of it."""


class SourceError(Exception):
    """The header can't be read; the message is the reason, in words. `path` is the file, where there is one."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(reason)
        self.path = path


class NoSourceError(SourceError):
    """The module is there, and can be imported, but not as source: compiled files, extension modules."""


@dataclass(frozen=True)
class Source:
    """A module's source: bytes as they are in the file, or text where an archive gives it."""

    text: bytes | str
    path: Path


def read_module_source(module: str) -> Source:
    """Return the source of a module.

    Raises:
        NoSourceError: it is compiled, or too large to be source.
        SourceError: it isn't there, or can't be read.
    """
    spec = find_module(module)
    if spec.loader in (BuiltinImporter, FrozenImporter):
        raise SourceError(f"module `{module}` is Python's own")
    if spec.loader is None or not spec.origin:
        raise SourceError(f"`{module}` is a package without an `__init__.py`, which defines nothing")
    return _source_of(module, spec)


def find_module(module: str) -> ModuleSpec:
    """Return the spec of a module; of its parents, none is imported.

    Raises:
        SourceError: there is no such module.
    """
    name, *rest = module.split(".")
    spec, places = _package(name, None), None
    if spec is None:
        raise SourceError(f"package `{name}` isn't installed")
    for part in rest:
        own = _directories(name, spec)
        if own is None:
            raise SourceError(f"`{name}` is a module, not a package: there is no `{module}`")
        below = f"{name}.{part}"
        found = _package(below, own)
        if found is None and _extends_its_path(name, spec):
            own += [place for place in _portions(name, places) if place not in own]
            found = _package(below, own)
        if found is None:
            raise SourceError(f"package `{name}` has no module `{below}`")
        name, spec, places = below, found, own
    return spec


_packages: dict[str, ModuleSpec] = {}
"""Packages that were found: every plugin of a package asks for it."""


def forget() -> None:
    """Look for every package again."""
    _packages.clear()


def _package(name: str, places: list[str] | None) -> ModuleSpec | None:
    spec = _packages.get(name) or _spec(name, places)
    if spec is not None and spec.submodule_search_locations is not None:
        _packages[name] = spec
    return spec


def _spec(name: str, places: list[str] | None) -> ModuleSpec | None:
    """Ask every finder for a module; one that raises, another package's perhaps, doesn't keep the rest from answering."""
    loaded = _attribute(sys.modules.get(name), "__spec__")
    if isinstance(loaded, ModuleSpec):
        return loaded
    for finder in sys.meta_path:
        find = _attribute(finder, "find_spec")
        try:
            spec = _along(name, places) if finder is PathFinder else find(name, places, None) if find else None
        except Exception:
            continue
        if spec is not None:
            return spec
    return None


def _along(name: str, places: list[str] | None) -> ModuleSpec | None:
    """Look for a module as `PathFinder` does, which for a namespace package within another wants its parent imported."""
    portions: list[str] = []
    for place in sys.path if places is None else places:
        spec = _at(place, name)
        if spec is not None and spec.loader is not None:
            return spec
        portions += (spec.submodule_search_locations or ()) if spec is not None else ()
    found = ModuleSpec(name, None, is_package=True)
    found.submodule_search_locations = portions
    return found if portions else None


def _directories(name: str, spec: ModuleSpec) -> list[str] | None:
    """Return the places that hold a package's modules, or None where it is no package."""
    own = _attribute(sys.modules.get(name), "__path__")  # an imported package may have extended it
    own = spec.submodule_search_locations if own is None else own
    try:
        return None if own is None else [str(place) for place in own]
    except Exception:  # an object of someone else's
        return []


def _portions(name: str, places: list[str] | None) -> Iterator[str]:
    """Yield the directories of that name along a path: what a package that extends its own path is made of."""
    for place in sys.path if places is None else places:
        spec = _at(place, name)
        yield from (spec.submodule_search_locations or ()) if spec is not None else ()


def _at(place: str, name: str) -> ModuleSpec | None:
    try:
        found = _importer(place or os.getcwd()).find_spec(name)  # noqa: PTH109
    except Exception:
        return None
    return found if isinstance(found, ModuleSpec) else None


def _importer(place: str) -> Any:
    known = sys.path_importer_cache.get(place)
    if known is not None:
        return known
    for hook in sys.path_hooks:
        try:
            return hook(place)
        except ImportError:
            continue
    return None


def _extends_its_path(name: str, spec: ModuleSpec) -> bool:
    """Tell whether a package's `__init__` adds directories to it, as namespace packages of the older makes do."""
    try:
        text = _source_of(name, spec).text
    except SourceError:
        return False
    words: Iterable[Any] = ("__path__", "declare_namespace")
    return any(word in text if isinstance(text, str) else word.encode() in text for word in words)


def _source_of(module: str, spec: ModuleSpec) -> Source:
    path = Path(str(spec.origin))
    try:
        if path.suffix in (".py", ".pyw") and path.is_file():
            size = path.stat().st_size
            if size > LARGEST:
                raise NoSourceError(f"{path} has {size:,} bytes, and sources are read up to {LARGEST:,}", path)
            return Source(path.read_bytes(), path)
        get_source = _attribute(spec.loader, "get_source")
        text = get_source(module) if get_source is not None else None
    except SourceError:
        raise
    except Exception as error:  # a loader of someone else's may raise anything
        raise SourceError(f"{path} can't be read: {describe_error(error)}", path) from error
    if text is None:
        raise NoSourceError(f"module `{module}` has no source ({path})", path)
    return Source(text, path)


def _attribute(thing: Any, name: str) -> Any:
    """Return an attribute of an object that may raise anything when it is asked, or None."""
    try:
        return getattr(thing, name, None)
    except Exception:
        return None
