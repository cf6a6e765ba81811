"""Speculative decoding: guessed tokens that one pass of the policy verifies, instead of a pass for each.

A `Drafter` guesses what comes next, and `Drafts` decides how many guesses are worth verifying, by what passes were measured to
cost and how often guesses of their kind were right. What is drawn doesn't depend on either: a guess is accepted where it is the
token that the policy draws with the random number of that place (see `DrawnRows.draw_behind`), so completions are those without
a draft, and their distribution is the policy's.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median_high
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_core.config.sampling_options import SamplingConfig

if TYPE_CHECKING:
    from rlhf_core.generation.requests import Request

MOST_GUESSES = 16
"""Most tokens that are guessed for a row at once."""
LEAST_GAIN = 1.15
"""Guesses are verified where that should save so many times what it costs: less was lost again, as rows don't end together."""
SAME_COST = 12
"""Before it was measured, a pass is taken to cost as if it read so many tokens more than it does: it reads the weights, too."""
KEPT_TIMES = 5
"""A pass costs the median of the last so many measurements: the least would favour what was measured in a lucky moment."""
LEAST_TIMES = 2
"""Guesses are verified once so many passes without any were measured."""
PLAIN_EVERY = 64
"""A pass without guesses is measured at least once in so many, while guesses are verified all the time."""
FORGOTTEN_AFTER = 256
"""After so many passes a measurement that deters from guessing is forgotten: texts go on, and computers are disturbed."""
LOOKING_SHARE = 0.02
"""While no guesses are worth verifying, looking for some takes at most so much of the time that passes take."""
LEAST_LOOKS = 3
"""So many looks are made before any is left out: the first ones take longer."""
LEAST_LIKELY = 0.05
"""A guess that is less likely to be accepted isn't considered: hardly any pass reads a token so cheaply."""
LENGTHS_DIFFER = 0.03
"""Of two rows the one that may have so much more of its tokens left is e times as likely to be drawn longest."""
PRIOR = 4.0
"""Weight of the first estimate of a kind's acceptance, in guesses."""
MOST_WEIGHT = 256.0
"""Weight beyond which earlier guesses count less and less."""


class Guesses(NamedTuple):
    """The tokens that a drafter expects next in one row."""

    ids: list[int]
    kinds: list[Hashable]
    """For each, of which kind the guess is: those of one kind should be right about equally often, given that all before are."""


NONE = Guesses([], [])


@dataclass
class DraftRow:
    """One row for which tokens are guessed."""

    ids: list[int]
    """The prompt's tokens and those drawn."""
    prompt_length: int
    state: Any
    """What `Drafter.begin` returned for it."""
    room: int
    """Most guesses."""
    left: int
    """Most tokens that will be drawn for it."""
    ends: tuple[int, ...]
    """The ids that end it: nothing need be guessed behind one."""
    before_end: int
    """So many tokens are drawn before it may end."""
    uniform: np.ndarray
    """Random numbers of the next places (at least `room`,), for a drafter that draws."""


class Drafter(ABC):
    """Guesses the next tokens of rows."""

    costs_time: bool = True
    """Whether guessing takes so long that it should be decided before how many tokens are guessed."""
    draws: bool = True
    """Whether guesses are drawn with the rows' random numbers: else it gets none."""

    def running(self, requests: Sequence[Request]) -> AbstractContextManager[object]:
        """Return a context in which `propose` is called, for one run of the decoding loop over some requests."""
        return contextlib.nullcontext()

    @abstractmethod
    def begin(self, prompt: Sequence[int]) -> Any:
        """Return whatever the drafter keeps for a new row."""

    @abstractmethod
    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        """Return guesses for each row, at most `most` and no more than its room."""

    def learn(self, prompt: Sequence[int], ids: Sequence[int]) -> None:  # noqa: B027
        """Take note of a completion that has ended."""


class DraftCounts(NamedTuple):
    """What drafting did for one completion, or for several."""

    passes: int = 0
    """Passes of the policy that drew tokens for it."""
    tokens: int = 0
    """Tokens that they drew."""
    guessed: int = 0
    """Guesses that were verified."""
    accepted: int = 0
    """Guesses that were right, and so drawn with the others."""

    def plus(self, other: DraftCounts) -> DraftCounts:
        """Return the sums."""
        return DraftCounts(*(a + b for a, b in zip(self, other, strict=True)))

    def report(self) -> dict[str, float | None]:
        """Return the rates that are reported: the share of guesses accepted, and tokens per pass of the policy."""
        return {
            "acceptance_rate": self.accepted / self.guessed if self.guessed else None,
            "tokens_per_pass": self.tokens / self.passes if self.passes else None,
        }


NO_COUNTS = DraftCounts()


class Drafts:
    """Decides how many of a drafter's guesses are verified.

    Guesses are verified, the likeliest first, as long as that draws more tokens per second, down to none. How likely a guess is
    to be accepted is learned by its kind from what was drawn, from guesses that weren't verified too. What a pass over rows and
    guesses costs beside one over the rows alone is measured as they are run.

    Args:
        drafter: makes the guesses.
        most: most guesses per row and pass; 0 makes none.
    """

    def __init__(self, drafter: Drafter, *, most: int = MOST_GUESSES) -> None:
        self.drafter, self.most = drafter, most
        self.counts = NO_COUNTS
        """Of all completions so far."""
        self.costs = PassCosts()
        self.acceptance = Acceptance()
        self._depths = Acceptance()
        """Acceptance of all guesses up to each depth, by depth."""
        self._draft_seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT_TIMES))
        self._offered: list[Guesses] = []
        self._most = most
        self._look_began = 0.0
        self._look_seconds: deque[float] = deque(maxlen=KEPT_TIMES)
        """Of the last looks, per row."""
        self._in_vain = 0
        """The last so many looks found nothing that was worth verifying."""
        self._wait = self._idle = 0
        self._tried = 0.0
        """Seconds that guessing took the last time, where it takes time."""

    def look(self, rows: int) -> bool:
        """Tell whether to look for guesses before the next pass over so many rows: then `choose` is called."""
        self._offered, self._look_began = [], time.perf_counter()
        if not self.most:
            return False
        if not self.drafter.costs_time:
            return not self._skips(rows)
        if self.costs.plain_is_due():
            return False
        self._most = self._depth(rows)
        return self._most > 0

    def choose(self, rows: Sequence[DraftRow], sampling: SamplingConfig, *, waiting: bool = False) -> list[list[int]]:
        """Return the guesses to be verified for each row, [] for those without.

        Args:
            waiting: whether another row joins as soon as one has ended.
        """
        costly = self.drafter.costs_time
        begin = time.perf_counter()
        self._offered = self.propose(rows, self._most, sampling)
        if costly:
            self._tried = time.perf_counter() - begin
            self._draft_seconds[_size_class(len(rows))].append(self._tried / self._most)
        chosen: list[list[int]] = [[] for _ in rows]
        # Where a pass without guesses is due, whether they are right is learned all the same.
        if costly or not self.costs.plain_is_due():
            worth = self._worth([row.left for row in rows], waiting=waiting)
            if costly:  # the time that guessing took is spent
                chosen = self._worthwhile(self._offered, worth)
            else:
                looking = self._looking(len(rows))
                chosen = self._worthwhile(self._offered, worth, least_gain=LEAST_GAIN, looking=looking)
        self._in_vain = 0 if any(chosen) else self._in_vain + 1
        self._look_seconds.append((time.perf_counter() - self._look_began) / len(rows))
        return chosen

    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        """Return the drafter's guesses, without those behind an end."""
        found = self.drafter.propose(rows, most, sampling)
        for number, (row, guesses) in enumerate(zip(rows, found, strict=True)):
            end = next((at for at, token in enumerate(guesses.ids, start=1) if token in row.ends), None)
            if end is not None:
                found[number] = Guesses(guesses.ids[:end], guesses.kinds[:end])
        return found

    def drawn(self, drawn: Sequence[Sequence[int]], verified: Sequence[Sequence[int]], seconds: float) -> None:
        """Take note of a round.

        Args:
            drawn: the tokens drawn for each row.
            verified: what `choose` returned; empty lists where there were no guesses.
            seconds: what the pass took, in which they were drawn; of several passes the mean.
        """
        guesses = sum(map(len, verified))
        self.costs.measured(len(drawn), guesses, seconds)
        for offered, ids in zip(self._offered, drawn, strict=False):  # some rows may have had to leave
            for depth, (guess, kind) in enumerate(zip(offered.ids, offered.kinds, strict=True)):
                if depth >= len(ids):
                    break
                right = guess == ids[depth]
                self.acceptance.note(kind, right)
                if not right:
                    break
        if self.drafter.costs_time:
            self._note_depths(drawn)

    def ended(self, prompt: Sequence[int], ids: Sequence[int], counts: DraftCounts) -> None:
        """Take note of a completion that has ended."""
        self.counts = self.counts.plus(counts)
        self.drafter.learn(prompt, ids)

    def _note_depths(self, drawn: Sequence[Sequence[int]]) -> None:
        for offered, ids in zip(self._offered, drawn, strict=False):  # some rows may have had to leave
            right = True
            for depth, guess in enumerate(offered.ids):
                if right and depth >= len(ids):
                    break  # not verified, so nobody knows
                right = right and guess == ids[depth]
                self._depths.note(depth, right)

    def _worth(self, left: Sequence[int], *, waiting: bool) -> list[float]:
        """Return what a token is worth for each row, in passes that need not be run; without a draft they add up to 1.

        A token for a row saves that row's share of a pass. The rest of a pass is saved only where one is needed less, and that
        is decided by the rows that are drawn longest, unless others take the place of those that end.
        """
        rows = len(left)
        if waiting or rows == 1:
            return [1 / rows] * rows
        whole, half = self.costs.seconds(rows), self.costs.seconds(rows // 2)
        own = min(max(0.0, (whole - half) / (rows - rows // 2) / whole), 1 / rows)
        scale = max(left) * LENGTHS_DIFFER
        last = [math.exp((one - max(left)) / scale) for one in left]
        return [own + (1 - rows * own) * one / sum(last) for one in last]

    def _worthwhile(
        self, offered: Sequence[Guesses], worth: Sequence[float], *, least_gain: float = 1.0, looking: float = 0.0
    ) -> list[list[int]]:
        """Return the guesses of which verifying saves the most time.

        Args:
            least_gain: how much more must be drawn per second than without guesses.
            looking: seconds that guessing takes before each pass.
        """
        candidates = []
        for row, guesses in enumerate(offered):
            likely = 1.0
            for depth, kind in enumerate(guesses.kinds):
                likely *= self.acceptance.of(kind)
                if likely < LEAST_LIKELY:
                    break
                candidates.append((-likely * worth[row], depth, row))
        candidates.sort()
        rows, saved = len(offered), sum(worth)
        best, best_rate = 0, least_gain * saved / self.costs.seconds(rows)
        for count, (less, _, _) in enumerate(candidates, start=1):
            saved -= less
            tokens = rows + count
            if count < len(candidates) and _size_class(tokens) == _size_class(tokens + 1):
                continue  # costs are known by class: the last of each saves the most
            rate = saved / (looking + self.costs.seconds(rows, count))
            if rate > best_rate:
                best, best_rate = count, rate
        lengths = [0] * rows
        for _, depth, row in candidates[:best]:
            lengths[row] = max(lengths[row], depth + 1)
        return [guesses.ids[:length] for guesses, length in zip(offered, lengths, strict=True)]

    def _looking(self, rows: int) -> float:
        """Return the seconds that a look for guesses takes."""
        return rows * min(self._look_seconds, default=0.0)

    def _skips(self, rows: int) -> bool:
        """Tell whether to look for no guesses this time: after looks in vain fewer are made, until they take little time."""
        self._idle += 1
        most = self._looking(rows) / (LOOKING_SHARE * self.costs.seconds(rows))
        if (
            self._idle < min(2 ** min(self._in_vain, 16), most, FORGOTTEN_AFTER)
            and len(self._look_seconds) >= LEAST_LOOKS
        ):
            return True
        self._idle = 0
        return False

    def _guessing(self, rows: int) -> Sequence[float]:
        """Return measurements of what guessing a token takes for about so many rows: of a size at most eight classes away."""
        size = _size_class(rows)
        near = min(self._draft_seconds, key=lambda each: abs(each - size), default=None)
        return () if near is None or abs(near - size) > 8 else self._draft_seconds[near]

    def _depth(self, rows: int) -> int:
        """Return how many tokens to guess for each row where guessing takes time."""
        own = self._guessing(rows)
        if not own:
            return min(2, self.most)
        seconds, best, best_rate, likely = median_high(own), 0, LEAST_GAIN / self.costs.seconds(rows), 0.0
        for depth in range(1, self.most + 1):
            likely += self._depths.of(depth - 1)
            rate = (1 + likely) / (self.costs.seconds(rows, rows * depth) + depth * seconds)
            if rate > best_rate:
                best, best_rate = depth, rate
        if best:
            self._wait = self._idle = 0
            return best
        # Acceptance can't be seen without guesses: they are tried again, more and more rarely.
        self._idle += 1
        least = self._tried / (LOOKING_SHARE * self.costs.seconds(rows))
        if self._idle > max(self._wait, min(least, FORGOTTEN_AFTER)):
            self._wait, self._idle = min(max(8, 2 * self._wait), FORGOTTEN_AFTER), 0
            return min(2, self.most)
        return 0


class Acceptance:
    """How often guesses of each kind are right, as a running mean."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[float, float]] = {}

    def of(self, kind: Hashable) -> float:
        """Return the share of right guesses."""
        right, tried = self._known.get(kind, (0.0, 0.0))
        return (right + PRIOR / 2) / (tried + PRIOR)

    def note(self, kind: Hashable, right: bool) -> None:
        """Take note of one guess."""
        before, tried = self._known.get(kind, (0.0, 0.0))
        if tried >= MOST_WEIGHT:
            before, tried = before / 2, tried / 2
        self._known[kind] = before + right, tried + 1


class PassCosts:
    """What a pass of the policy costs, by the number of tokens in it: rows, and guesses that are verified with them."""

    def __init__(self) -> None:
        self._plain, self._verifying = _Times(), _Times()
        self._since_plain = self._first = 0

    def plain_is_due(self) -> bool:
        """Tell whether a pass without guesses should be measured."""
        return self._first < LEAST_TIMES or self._since_plain >= PLAIN_EVERY

    def measured(self, rows: int, guesses: int, seconds: float) -> None:
        """Take note of a pass."""
        if guesses:
            self._since_plain += 1
            self._verifying.note(rows + guesses, seconds)
        else:
            self._since_plain, self._first = 0, self._first + 1
            self._plain.note(rows, seconds)

    def seconds(self, rows: int, guesses: int = 0) -> float:
        """Return what a pass takes: measured, or estimated from passes over more and fewer tokens."""
        if not guesses:
            below, above = self._plain.around(rows)
        else:
            below, above = self._verifying.around(rows + guesses)
            if below is None:
                below = rows, self.seconds(rows)
        tokens = rows + guesses
        if below is None or above is None:
            at, seconds = below or above or (tokens, 1.0)
            slope = self._plain.slope()
            if slope is not None and tokens > at:
                return seconds + slope * (tokens - at)
            # A pass over few tokens mostly reads the weights.
            return seconds * (tokens + SAME_COST) / (at + SAME_COST)
        (first, low), (last, high) = below, above
        return low + max(0.0, high - low) * (tokens - first) / max(1, last - first)


class _Times:
    """The last measurements of each size class, those made long ago forgotten."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}
        """Size class → the number of its last measurement."""
        self._count = 0

    def note(self, size: int, seconds: float) -> None:
        """Take note of a measurement."""
        key = _size_class(size)
        self._count += 1
        self._seconds.setdefault(key, deque(maxlen=KEPT_TIMES)).append(seconds)
        self._last[key] = self._count
        for old in [each for each in self._seconds if self._count - self._last[each] > FORGOTTEN_AFTER]:
            del self._seconds[old]

    def around(self, size: int) -> tuple[tuple[int, float] | None, tuple[int, float] | None]:
        """Return the nearest sizes, at most and at least as large, and the median seconds of each; None without one."""
        key = _size_class(size)
        below = max((each for each in self._seconds if each <= key), default=None)
        above = min((each for each in self._seconds if each >= key), default=None)
        if key in self._seconds:
            found = size, self._usual(key)
            return found, found
        first, last = (None if each is None else (_least(each), self._usual(each)) for each in (below, above))
        return first, last

    def _usual(self, key: int) -> float:
        """Return the median seconds of a size class, at most that of a larger one: a few passes may all have been disturbed."""
        return min(median_high(seconds) for each, seconds in self._seconds.items() if each >= key)

    def slope(self) -> float | None:
        """Return what a token more costs between the least and the largest size; None where they hardly differ."""
        least, largest = min(self._seconds, default=0), max(self._seconds, default=0)
        sizes = _least(least), _least(largest)
        if sizes[1] < 2 * sizes[0] or not sizes[0]:
            return None
        return (self._usual(largest) - self._usual(least)) / (sizes[1] - sizes[0])


def _size_class(count: int) -> int:
    """Return the number of a size class: eight to each doubling, so that sizes in it are alike."""
    doubling = max(0, count.bit_length() - 4)
    return 8 * doubling + (count >> doubling)


def _least(size_class: int) -> int:
    """Return the least size of a class."""
    doubling = max(0, size_class // 8 - 1)
    return (size_class - 8 * doubling) << doubling
