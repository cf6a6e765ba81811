"""Import an object by name: `package.module:attribute`, or `path/to/file.py:attribute`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_core.infra.errors import ConfigError, PluginError, RLHFError, describe_error, did_you_mean, nearest

_PREFIX = "rlhf_file_"


def import_object(name: str, *, place: str) -> Any:
    """Import and return the object that a name means.

    A module is searched as by `import`, then in the current directory. A file can import modules that lie beside it.

    Args:
        name: `package.module:attribute` or `path/to/file.py:attribute`; the attribute may be dotted.
        place: where the name was given, for messages.

    Raises:
        ConfigError: there is no such module, file or attribute.
        PluginError: importing the module or file raised.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        fix = "write `FILE.py:NAME` or `package.module:NAME`"
        raise ConfigError("isn't the name of an object in a module or file", place=place, got=f"`{name}`", fix=fix)
    module = _file(source, place) if source.endswith(".py") else _module(source, place)
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            there = getattr(found, "__dict__", {})
            own = [key for key, value in there.items() if callable(value) and not key.startswith("_")]
            near = nearest(part, own)
            hint = f"did you mean `{near}`?" if near else did_you_mean(part, own) if len(own) < 20 else None
            raise ConfigError(f"`{source}` has no `{attribute}`", place=place, fix=hint) from None
    return found


def is_from_file(module: str) -> bool:
    """Tell whether a module was imported from a file by `import_object`."""
    return module.startswith(_PREFIX) and module in sys.modules


def _module(name: str, place: str) -> ModuleType:
    """Import a module, found as `import` does or in the current directory."""
    if not all(part.isidentifier() for part in name.split(".")):
        fix = "write `package.module:name` or `path/to/file.py:name`"
        raise ConfigError("isn't a valid name of a module", place=place, got=f"`{name}`", fix=fix)
    here = str(Path.cwd())
    top = Path(here, name.partition(".")[0])
    if here not in sys.path and (top.is_dir() or top.with_name(f"{top.name}.py").is_file()):
        sys.path.append(here)  # where `python script.py` would find it; last, so that it hides no installed module
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise _broken(name, place, error) from error
        fix = f"install it, or run from the directory that holds `{missing.partition('.')[0]}`"
        raise ConfigError(f"there is no module `{missing}`", place=place, got=f"`{name}`", fix=fix) from None
    except RLHFError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken(name, place, error) from error


def _file(name: str, place: str) -> ModuleType:
    """Import a Python file as a module, or return that of an earlier import of the same content."""
    path = Path(name).expanduser()
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else None
        fix = f"did you mean {path.parent / near}?" if near else f"give its path from {Path.cwd()}, or an absolute one"
        raise ConfigError("no such file", place=place, got=name, fix=fix)
    path = path.resolve()
    # One module per path and content, however often it is named, so that its state is shared as with any import.
    text = str(path).encode() + path.read_bytes()
    key = f"{_PREFIX}{hashlib.sha256(text).hexdigest()[:12]}_{path.stem}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[key] = module  # where dataclasses and pickle look modules up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        if isinstance(error, RLHFError):
            raise
        raise _broken(name, place, error) from error
    return module


def _broken(name: str, place: str, error: BaseException) -> PluginError:
    """Return the error for a module or file whose import raised."""
    return PluginError(f"importing `{name}` raised an error", place=place, got=describe_error(error, lines=2))
