"""What the commands share that show texts of a run: finding its file, and texts that fit a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from rlhf_core.cli.printing import encodable, print_warning
from rlhf_core.infra.errors import StorageError, printable
from rlhf_core.infra.near_runs import near_run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def require_run(run: Path) -> None:
    """Refuse what is no run's directory, with a hint at one nearby.

    Raises:
        StorageError: says what it is.
    """
    from rlhf_core.training.run_directory import is_run

    if not run.is_dir() or not is_run(run):
        what = "is not a run's directory" if run.is_dir() else "is a file" if run.exists() else "no such directory"
        fix = near_run(run) or "give the directory that a run was started with as `--output`"
        raise StorageError(what, place=str(run), fix=fix)


def warn_of_damage(path: Path, damaged: Sequence[int]) -> None:
    """Warn of lines of a file that were left out, by their numbers."""
    if damaged:
        shown = ", ".join(map(str, damaged[:8])) + (" …" if len(damaged) > 8 else "")
        print_warning(f"{path}: damaged and left out: line{'s' * (len(damaged) > 1)} {shown}")


def terminal() -> Console:
    """Return a console on stdout as wide as the terminal, which changes no text."""
    from rich.console import Console

    return Console(width=get_terminal_size().columns, highlight=False, markup=False, emoji=False, soft_wrap=False)


def clipped(console: Console, text: str, width: int, most: int | None) -> Text:
    """Return a text wrapped to a width, with at most so many lines."""
    lines = list(styled(text).wrap(console, max(width, 1)))
    made = styled("")
    for number, line in enumerate(lines[:most]):
        line.rstrip()
        made.append("\n" if number else "").append_text(line)
    if most is not None and len(lines) > most:
        more = len(lines) - most
        made.append("\n").append_text(styled(f"… {more} more line{'s' * (more > 1)}", "dim"))
    return made


def styled(text: str, style: str = "") -> Text:
    """Return text that a terminal shows and doesn't act upon."""
    from rich.text import Text

    return Text(encodable(printable(text, lines=True)), style=style)
