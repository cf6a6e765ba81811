"""The phases of an online method's step (rollout, reward, reference, update): how long each takes, and its tokens per second."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping

UPDATE = "update"
"""The phase of the forward and backward passes with gradients, and of the optimiser's step."""
SECONDS, SPEED = "seconds/", "tokens_per_second/"
"""What the metrics of phases begin with."""


class Phases:
    """Times what a run does. A phase inside another one is not part of it, so that all of them add up to the time that passed.

    Args:
        changed: called with the name of the phase that begins or continues, None where none does.
    """

    def __init__(self, changed: Callable[[str | None], None] = lambda name: None) -> None:
        self._changed = changed
        self._open: list[str] = []
        self._since = 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: Counter[str] = Counter()
        self._all_seconds: defaultdict[str, float] = defaultdict(float)
        """Since the run's process began."""

    @contextlib.contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Count the time of the `with` block as this phase's.

        Args:
            tokens: how many tokens it draws or forwards, for its tokens per second.
        """
        self._charge()
        self._open.append(name)
        self._changed(name)
        try:
            yield
            self.add_tokens(name, tokens)
        finally:
            self._charge()
            self._open.pop()
            self._changed(self._open[-1] if self._open else None)

    def add_tokens(self, name: str, count: int) -> None:
        """Count tokens that a phase drew or forwarded."""
        self._tokens[name] += count

    def _charge(self) -> None:
        """Add the time since the last call to the innermost open phase."""
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def take(self) -> dict[str, tuple[float, int]]:
        """Return (seconds, tokens) by phase since the last call, in the order in which phases were first met; {} where the update
        is the only one there ever was, as in methods that don't generate."""
        for name, seconds in self._seconds.items():
            self._all_seconds[name] += seconds
        found = {name: (self._seconds[name], self._tokens[name]) for name in self._all_seconds}
        self._seconds.clear()
        self._tokens.clear()
        return found if found.keys() - {UPDATE} else {}

    def shares(self) -> dict[str, float]:
        """Return the share of each phase in the time of all, up to the last `take`; {} as there."""
        whole = sum(self._all_seconds.values())
        if not self._all_seconds.keys() - {UPDATE} or not whole:
            return {}
        return {name: seconds / whole for name, seconds in self._all_seconds.items()}


def phase_metrics(parts: list[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Return `seconds/PHASE` and `tokens_per_second/PHASE` of one step from what each process's `take` returned.

    Processes wait for each other, so a phase takes as long as in the slowest of them; tokens are added up.
    """
    metrics = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        seconds = max(part[name][0] for part in parts if name in part)
        tokens = sum(part[name][1] for part in parts if name in part)
        metrics[SECONDS + name] = seconds
        if tokens and seconds:
            metrics[SPEED + name] = tokens / seconds
    return metrics
