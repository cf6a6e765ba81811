"""Find and read a module's source where an import would find it, without importing the module or its parents.

Covers source files, zip archives, namespace packages of every kind, and the finders that editable installations put on
`sys.meta_path`.
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

MAX_SOURCE_BYTES = 10_000_000
"""The largest source file that is read: a thousand times a module written by hand."""


class SourceError(Exception):
    """A module's source, or the class in it, can't be read; the text is the reason, `path` the file where one was found."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(reason)
        self.path = path


class NoSourceError(SourceError):
    """The module exists and can be imported, but has no readable source: compiled files, extension modules."""


@dataclass(frozen=True)
class ModuleSource:
    """A module's source: the bytes of its file, or the text that an archive's loader returned."""

    text: bytes | str
    path: Path


def read_module_source(module: str) -> ModuleSource:
    """Return the source of a module.

    Raises:
        NoSourceError: the module is compiled, or the file is too large.
        SourceError: the module isn't found, or can't be read.
    """
    spec = find_module(module)
    if spec.loader in (BuiltinImporter, FrozenImporter):
        raise SourceError(f"module `{module}` is Python's own")
    if spec.loader is None or not spec.origin:
        raise SourceError(f"`{module}` is a package without an `__init__.py`, which defines nothing")
    return _source_of(module, spec)


def find_module(module: str) -> ModuleSpec:
    """Return a module's import spec without importing its parents, as `importlib.util.find_spec` would.

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
"""Specs of packages that were found, by name: every plugin of a package needs the same ones."""


def forget() -> None:
    """Drop the specs that were found, so that every package is searched again."""
    _packages.clear()


def _package(name: str, places: list[str] | None) -> ModuleSpec | None:
    """Return the spec of a package or module in `places` (None: `sys.path`), from the cache where it is a known package."""
    spec = _packages.get(name) or _spec(name, places)
    if spec is not None and spec.submodule_search_locations is not None:
        _packages[name] = spec
    return spec


def _spec(name: str, places: list[str] | None) -> ModuleSpec | None:
    """Ask every finder on `sys.meta_path` for a module; a finder that raises is skipped."""
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
    """Search directories as `PathFinder` does, which itself would import the parent of a nested namespace package."""
    portions: list[str] = []
    for place in sys.path if places is None else places:
        spec = _in_place(place, name)
        if spec is not None and spec.loader is not None:
            return spec
        portions += (spec.submodule_search_locations or ()) if spec is not None else ()
    found = ModuleSpec(name, None, is_package=True)
    found.submodule_search_locations = portions
    return found if portions else None


def _directories(name: str, spec: ModuleSpec) -> list[str] | None:
    """Return the directories that hold a package's modules, or None for a module that is no package."""
    own = _attribute(sys.modules.get(name), "__path__")  # an imported package may have extended it
    own = spec.submodule_search_locations if own is None else own
    try:
        return None if own is None else [str(place) for place in own]
    except Exception:  # a path object of a finder of another package
        return []


def _portions(name: str, places: list[str] | None) -> Iterator[str]:
    """Yield every directory of a package's name in `places`: the parts of a package that extends its `__path__`."""
    for place in sys.path if places is None else places:
        spec = _in_place(place, name)
        yield from (spec.submodule_search_locations or ()) if spec is not None else ()


def _in_place(place: str, name: str) -> ModuleSpec | None:
    """Return the spec of a module in one directory or archive, or None, also where its importer raises."""
    try:
        found = _importer(place or os.getcwd()).find_spec(name)  # noqa: PTH109
    except Exception:
        return None
    return found if isinstance(found, ModuleSpec) else None


def _importer(place: str) -> Any:
    """Return the path entry finder of a directory or archive, as the import system would choose it."""
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
    """Tell whether a package's `__init__.py` extends its `__path__`, as namespace packages before PEP 420 do."""
    try:
        text = _source_of(name, spec).text
    except SourceError:
        return False
    words: Iterable[Any] = ("__path__", "declare_namespace")
    return any(word in text if isinstance(text, str) else word.encode() in text for word in words)


def _source_of(module: str, spec: ModuleSpec) -> ModuleSource:
    """Read the source that a spec names; raises as `read_module_source`."""
    path = Path(str(spec.origin))
    try:
        if path.suffix in (".py", ".pyw") and path.is_file():
            size = path.stat().st_size
            if size > MAX_SOURCE_BYTES:
                raise NoSourceError(f"{path} has {size:,} bytes, and sources are read up to {MAX_SOURCE_BYTES:,}", path)
            return ModuleSource(path.read_bytes(), path)
        get_source = _attribute(spec.loader, "get_source")
        text = get_source(module) if get_source is not None else None
    except SourceError:
        raise
    except Exception as error:  # a loader of another package may raise anything
        raise SourceError(f"{path} can't be read: {describe_error(error)}", path) from error
    if text is None:
        raise NoSourceError(f"module `{module}` has no source ({path})", path)
    return ModuleSource(text, path)


def _attribute(thing: Any, name: str) -> Any:
    """Return an attribute of an object of another package, or None, also where reading it raises."""
    try:
        return getattr(thing, name, None)
    except Exception:
        return None
