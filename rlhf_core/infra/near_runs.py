"""The runs near a path that is none, for messages: the one that was meant, else which ones there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rlhf_core.infra.errors import either, nearest_names

_MOST = 8
"""Runs that a message lists."""
_SEEN = 500
"""Runs that are looked at in a folder."""


def near_run(path: Path, *, pipelines: bool = False) -> str | None:
    """Return a hint for a path that is no run's directory; None where there are no runs near it.

    It is the run that the path lies in, the one of a similar name, or those in the same folder: in the path itself where it is a
    folder, beside it, in `runs` of the current directory where the path is a name alone, and in the folder whose name is most
    like the one that doesn't exist.

    Args:
        pipelines: whether directories of pipelines are meant, too.
    """
    with suppress(OSError):  # of a folder that mustn't be read: a hint has no error of its own
        return _near_run(path, pipelines)
    return None


def _near_run(path: Path, pipelines: bool) -> str | None:
    inside = [parent for parent in path.absolute().parents if _is_run(parent, pipelines)][:1]
    if inside and path.exists():
        return f"give the run's directory, {inside[0]}"
    folder = path if path.is_dir() else _existing(path.parent)
    found = [] if folder is None else _runs_in(folder, pipelines)
    if len(path.parts) == 1 and not path.exists():
        found = [*_runs_in(Path("runs"), pipelines), *found]
    if not found:
        return None
    by_name: dict[str, list[str]] = {}
    for one in found:
        by_name.setdefault(one.name, []).append(str(one))
    near = [place for name in nearest_names(path.name, by_name) for place in by_name[name]] if path != folder else []
    if path == folder and len(found) == 1:
        near = [str(found[0])]
    if near:
        return f"did you mean {either(near)}?"
    listed = ", ".join(str(one) for one in found[:_MOST])
    more = f" and {len(found) - _MOST} more, which `rlhf runs {found[0].parent}` lists" if len(found) > _MOST else ""
    return f"name one of the runs there: {listed}{more}"


def _is_run(path: Path, pipelines: bool) -> bool:
    return (path / "run.json").is_file() or (pipelines and (path / "pipeline.json").is_file())


def _existing(folder: Path) -> Path | None:
    """Return a folder, or where it doesn't exist the one of the most similar name beside it; None where there is none."""
    if folder.is_dir():
        return folder
    if not folder.parent.is_dir():
        return None
    near = nearest_names(folder.name, (one.name for one in folder.parent.iterdir() if one.is_dir()))
    return folder.parent / near[0] if near else None


def _runs_in(folder: Path, pipelines: bool) -> list[Path]:
    """Return the runs in a folder, and those of the stages of pipelines in it, in the order of their names."""
    return sorted(set(_found(folder, pipelines)))[:_SEEN] if folder.is_dir() else []


def _found(folder: Path, pipelines: bool) -> Iterator[Path]:
    for pattern in ("*/run.json", "stages/*/run.json", "*/stages/*/run.json"):
        yield from (file.parent for file in folder.glob(pattern))
    if pipelines:
        yield from (file.parent for file in folder.glob("*/pipeline.json"))
