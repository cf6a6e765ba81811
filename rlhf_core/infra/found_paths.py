"""Where names of files were looked for, for messages that say so."""

from __future__ import annotations

import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_SEARCHED: dict[str, Path] = {}
"""A relative path of a configuration file that was found nowhere → the directory of that file."""


def exists_or_matches(name: str | Path) -> bool:
    """Tell whether a path exists, or files match it as a pattern."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return True
        if not {*str(name)} & {*"*?["}:
            return False
        found = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
        return any(True for _ in found)
    except (
        OSError,
        ValueError,
        RuntimeError,
        NotImplementedError,
    ):  # no path: too long, no such user's home, a bad pattern
        return False


def note_search(name: str, folder: Path) -> None:
    """Note that a configuration file in a folder names a path that exists neither there nor in the working directory."""
    _SEARCHED[name] = folder


def looked_in(name: str | Path) -> str:
    """Return where a name of a file was looked for, as the end of a message's problem; nothing for one of the command line."""
    folder = _SEARCHED.get(str(name))
    if folder is None:
        return ""
    here, there = Path.cwd(), folder.resolve()
    if here == there:
        return f" in {here}"
    return f" in the working directory ({here}), nor beside the configuration ({there})"


def places_of(name: str | Path) -> list[Path]:
    """Return the paths that a name was looked for as: in the working directory, and for one of a configuration beside it."""
    folder = _SEARCHED.get(str(name))
    return [Path(name), *([folder / name] if folder is not None else [])]


def unexpanded(name: str) -> str | None:
    """Return a hint for a name with a variable in it, which nothing has expanded; None for a name without."""
    if (found := _VARIABLE.search(name)) is None:
        return None
    return f"`{found[0]}` stands for itself here: the shell expands it outside of single quotes, and a YAML file as `${{NAME}}`"
