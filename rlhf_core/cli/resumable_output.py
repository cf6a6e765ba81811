"""What `rlhf sample` and `rlhf score` share: rows are appended to `--output`, a stop keeps them, and `--resume` continues."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.infra.errors import ConfigError, Interrupted, Stopped

if TYPE_CHECKING:
    from rlhf_core.data.row_output import RowOutput

ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the file in --output after its last whole row.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file in --output, once the first new row is there.")
]


def output_path(output: str | None, *, resume: bool, overwrite: bool) -> Path | None:
    """Return the path of `--output`; None where there is none.

    Raises:
        ConfigError: `--resume` or `--overwrite` is given without one.
    """
    if output is not None:
        return Path(output).expanduser()
    if resume or overwrite:
        flag = "--resume" if resume else "--overwrite"
        raise ConfigError("no file is named", place=flag, fix="give `--output FILE.jsonl`")
    return None


def output_state(path: Path, *, resume: bool, overwrite: bool) -> str:
    """Return what would be done with a file of rows, as a phrase."""
    if not path.exists() or not path.stat().st_size:
        return "new"
    return "continued" if resume else "replaced" if overwrite else "exists: needs --resume or --overwrite"


def check_apart(output: Path, sources: Sequence[str]) -> None:
    """Refuse to write rows into a file, or a folder, that they are read from.

    Args:
        sources: files, folders, patterns of files, and anything else, such as texts or names of the hub.

    Raises:
        ConfigError: the output is one of these files, or in one of these folders.
    """
    for source in filter(str.strip, sources):
        path = Path(source).expanduser()
        try:
            folder = path.is_dir() and output.resolve().is_relative_to(path.resolve())
            files = [path, *map(Path, glob.glob(str(path)))] if output.exists() else []  # noqa: PTH207 — of any root
            same = any(one.exists() and output.samefile(one) for one in files) or _matches(output, path)
        except (OSError, ValueError):  # a text that can't be a path
            continue
        if folder or same:
            problem = f"is in the folder {source}, which is read" if folder else "is read and written"
            raise ConfigError(problem, place=str(output), fix="name another file as `--output`")


def _matches(output: Path, pattern: Path) -> bool:
    """Tell whether a pattern of files means the output, too, once it is there."""
    return glob.has_magic(str(pattern)) and fnmatch.fnmatch(str(output.absolute()), str(pattern.absolute()))


@contextlib.contextmanager
def stoppable(file: RowOutput | None, *, of: str = "rows") -> Iterator[None]:
    """Stop at once by Ctrl-C or SIGTERM, and note in the file's record how the block ended: `stopped` or `failed`.

    Args:
        file: None where nothing is written.
        of: what there is in all, in words: `of 12 rows`.

    Raises:
        Stopped: by Ctrl-C or SIGTERM; every row that was appended is in the file.
        Interrupted: by one of these, where there is no file.
    """
    from rlhf_core.training.signals import StopNow, StopSignal

    with StopSignal(speak=False) as stop:
        try:
            with stop.at_once():
                yield
        except KeyboardInterrupt as error:
            by = "SIGTERM" if isinstance(error, StopNow) and stop.requested == signal.SIGTERM else "Ctrl-C"
            if file is None:
                raise Interrupted(f"stopped by {by}") from error
            file.note(status="stopped")
            if not file.written:
                problem, fix = f"stopped by {by} before anything was written", "the same command begins again"
                raise Stopped(problem, place=str(file.path), fix=fix) from error
            instead = " (in place of `--overwrite`)" if "--overwrite" in sys.argv else ""
            raise Stopped(
                f"stopped by {by} after {file.written:,} {of}, which are written",
                place=str(file.path),
                fix=f"the same command with `--resume` continues{instead}",
            ) from error
        except Exception:
            if file is not None:
                file.note(status="failed")
            raise
