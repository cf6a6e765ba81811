"""What happens while a stage's command runs: its time is noted for a resume, and people see how it goes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from rlhf_core.infra.errors import printable
from rlhf_core.infra.progress import NewsLine

_BETWEEN_NOTES = 10.0
"""Seconds between two notes of how long the running stage has taken: what a kill loses of it at most."""
_LOGGED = re.compile(r"\d\d:\d\d:\d\d (\S.*)")
"""The first line of a log message, as a command writes it where stderr is no terminal; a table's further lines have no time."""


class StageWatch:
    """Watches the commands of one stage after the other; a `CommandWatch`.

    Args:
        note: called now and then with the running stage's name and its seconds so far.
        tell: prints a line for people.
        shows: whether people see how a stage goes: on a terminal in a line that is renewed, elsewhere by `tell` now and then.
    """

    def __init__(self, note: Callable[[str, float], None], tell: Callable[[str], None], *, shows: bool) -> None:
        self._note, self._tell, self._shows = note, tell, shows
        self._stage: tuple[str, float] | None = None
        """The stage that runs, and when it would have begun had it never been interrupted."""
        self._noted = 0.0
        self._news = ""
        self._line: NewsLine | None = None

    def stage_begun(self, name: str, head: str, spent: float) -> None:
        """Watch a stage from now on.

        Args:
            head: of the lines about it, such as `[1/9] sft`.
            spent: seconds that it took before this process.
        """
        self._noted = time.monotonic()
        self._stage = (name, self._noted - spent)
        if self._shows:
            self._line = NewsLine(head, self._noted, self._tell)

    def stage_ended(self) -> None:
        """No stage runs any more."""
        self.hide()
        self._stage = self._line = None

    def hide(self) -> None:
        """Take the line from the terminal, for others to print."""
        if self._line is not None:
            self._line.hide()

    def begin(self, command: str) -> None:
        self._news = f"rlhf {command}"

    def line(self, text: str) -> None:
        if (found := _LOGGED.match(text)) is not None:
            self._news = printable(found[1].rstrip().removesuffix(":"))

    def tick(self) -> None:
        if self._stage is None:
            return
        now, (name, began) = time.monotonic(), self._stage
        if now - self._noted >= _BETWEEN_NOTES:
            self._noted = now
            self._note(name, round(now - began, 3))
        if self._line is not None:
            self._line.show(self._news)
