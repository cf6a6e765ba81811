"""A scoring session: rewards score samples as these are added, the ones that wait beside generation, the others at the end."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import PluginError
from rlhf_core.infra.time_limit import TimeLimit, call_within, noting_threads, where_thread_is
from rlhf_core.rewards.background import DaemonPool, EventLoopThread, LockWatch, event_loop, forget_event_loop
from rlhf_core.rewards.function_reward import FunctionReward, is_async
from rlhf_core.rewards.leaks import watch_leaks
from rlhf_core.rewards.score_checks import checked_scores, place_of_rows, sample_or_row, scores_of_coroutine

COROUTINES = 32
"""Most calls of an async reward at once, where its `concurrency` isn't set."""

lock_watch = LockWatch()


@dataclass(frozen=True)
class WeightedReward:
    """A reward with its weight in a run, and how it runs."""

    name: str
    reward: RewardFn
    weight: float = 1.0
    time_limit: float | None = None
    """Seconds that one call may take; None sets no limit."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """`distribution` and `version` of a plugin; empty for other rewards."""
    runs_in: Literal["auto", "main", "thread", "process"] = "auto"
    concurrency: int | None = None
    """Most calls at once outside the main thread; None takes what the reward declares."""

    @property
    def at_once(self) -> int:
        """Most calls that run at once where they run."""
        return self.concurrency or self.reward.concurrency or (COROUTINES if self.place == "loop" else 1)

    @property
    def place(self) -> Literal["main", "thread", "process", "loop"]:
        """Where its calls run: `loop` for an async reward, unless the configuration says otherwise."""
        if self.runs_in != "auto":
            return self.runs_in
        asynchronous = self.reward.is_async if isinstance(self.reward, FunctionReward) else is_async(self.reward.score)
        return "loop" if asynchronous else self.reward.runs_in


class BusyTime:
    """Seconds during which at least one of several overlapping calls ran."""

    def __init__(self) -> None:
        self.seconds, self._running, self._since, self._lock = 0.0, 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self.seconds += time.monotonic() - self._since


@dataclass(eq=False)
class _Call:
    """One call of a reward outside the main thread."""

    entry: WeightedReward
    samples: Sequence[Sample]
    at: Sequence[int]
    """The samples' positions in the result."""
    rows: Sequence[int | str] | None
    busy: BusyTime
    ended: Callable[[], None]
    """Called once it has ended."""
    started: float | None = None
    """When, in seconds of `time.monotonic`."""
    thread: int | None = None
    scores: list[float] | None = None
    error: BaseException | None = None
    loop: EventLoopThread | None = None
    cancelled: bool = False
    """Whether it no longer needs to start: its session has ended."""

    @property
    def done(self) -> bool:
        return self.scores is not None or self.error is not None

    @property
    def due(self) -> float | None:
        """When its time limit is reached; None before it has started, and without a limit."""
        return None if self.started is None or self.entry.time_limit is None else self.started + self.entry.time_limit

    def run(self) -> None:
        """Score in this thread, unless the call was cancelled while it waited for the thread."""
        if self.cancelled:
            return
        entry = self.entry
        with self._in_work():
            self.scores = checked_scores(entry.reward, self.samples, rows=self.rows, name=entry.name)

    async def run_async(self, room: Any) -> None:
        """Score on the running event loop, once there is `room`, a semaphore."""
        async with room:
            with self._in_work():
                self.scores = await scores_of_coroutine(
                    self.entry.reward, self.samples, rows=self.rows, name=self.entry.name
                )

    @contextlib.contextmanager
    def _in_work(self) -> Iterator[None]:
        """Note when the call starts, what it raises, and that it has ended."""
        self.started, self.thread = time.monotonic(), threading.get_ident()
        try:
            with self.busy, lock_watch.over(self.entry.time_limit), without_gradients(), noting_threads():
                yield
        except BaseException as error:
            self.error = error
        finally:
            self.ended()

    def too_long(self, where: str) -> PluginError:
        """Return the error of this call's time limit; `where` is the line that it was at, or ''."""
        return _too_long(self.entry, len(self.samples), place_of_rows(self.entry.name, self.rows), where)

    def end(self) -> None:
        """Cancel it, where it hasn't started or is async; a thread can't be ended, and a process ends at its own limit."""
        self.cancelled = True
        if self.loop is not None:
            self.loop.cancel(self)


class ScoringSession:
    """Scores samples by several rewards, which run where each of them declares.

    Those outside the main thread begin as soon as samples are added; `scores` runs the others, and waits for all. Scores are in
    the order of the samples' positions, whatever ends first. Leaving the `with` block cancels the calls that haven't started, and
    async ones that run.

    Args:
        entries: the rewards.
        pools: reward name → the threads for its calls.
    """

    def __init__(self, entries: Sequence[WeightedReward], pools: dict[str, DaemonPool]) -> None:
        self._entries, self._pools = entries, pools
        self.samples: dict[int, Sample] = {}
        """Position → sample."""
        self.rows: dict[int, int | str] = {}
        """Position → row number in the data, where rows are known."""
        self._calls: list[_Call] = []
        self._ended = threading.Condition()
        self._busy = {entry.name: BusyTime() for entry in entries}
        self._room: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for call in self._calls:
            if not call.done:
                call.end()
        self._calls.clear()

    def add(
        self, samples: Sequence[Sample], rows: Sequence[int | str] | None = None, *, at: Sequence[int] | None = None
    ) -> None:
        """Add samples: all completions of a prompt together, since a reward may compare them.

        Args:
            rows: each sample's row number in its data, for messages.
            at: each sample's position in the result; None places them after those that were added before.

        Raises:
            PluginError: a call that has ended meanwhile failed.
        """
        at = range(len(self.samples), len(self.samples) + len(samples)) if at is None else at
        self.samples.update(zip(at, samples, strict=True))
        if rows is not None:
            self.rows.update(zip(at, rows, strict=True))
        for entry in self._entries:
            if entry.place != "main":
                self._start(entry, samples, rows, at)
        self._raise_failed()

    def scores(self) -> dict[str, list[float]]:
        """Return reward name → one score per sample, in the order of positions; run what hasn't run, and wait for the rest.

        Raises:
            PluginError: a reward raised, exceeded its time limit, or returned what isn't one finite number per sample.
        """
        order = sorted(self.samples)
        samples = [self.samples[at] for at in order]
        rows = [self.rows[at] for at in order] if self.rows else None
        found: dict[str, dict[int, float]] = {}
        for entry in self._entries:
            if entry.place == "main":
                scores = self.in_main(entry, samples, rows, checked_scores, "scoring")
                found[entry.name] = dict(zip(order, scores, strict=True))
                self._raise_failed()
        self._wait()
        for call in self._calls:
            assert call.scores is not None
            found.setdefault(call.entry.name, {}).update(zip(call.at, call.scores, strict=True))
        return {entry.name: [found[entry.name][at] for at in order] for entry in self._entries}

    def seconds(self) -> dict[str, float]:
        """Return reward name → seconds during which it scored."""
        return {name: busy.seconds for name, busy in self._busy.items()}

    def in_main(
        self,
        entry: WeightedReward,
        samples: Sequence[Sample],
        rows: Sequence[int | str] | None,
        check: Callable[..., Any],
        doing: str,
    ) -> Any:
        """Return `check(reward, samples)` under the reward's time limit; `doing` says in the error what took too long."""
        reached: list[int] = []
        more = {"reached": reached.append} if entry.reward.by_row and check is checked_scores else {}

        def call() -> Any:
            with without_gradients(), noting_threads():
                return check(entry.reward, samples, rows=rows, name=entry.name, **more)

        try:
            # What other calls open and start meanwhile isn't this reward's.
            alone = all(one.done for one in self._calls)
            with self._busy[entry.name], watch_leaks(entry.reward, entry.name) if alone else contextlib.nullcontext():
                return call_within(entry.time_limit, call)
        except TimeLimit as error:
            place = place_of_rows(entry.name, rows)
            if reached:  # else the reward has all samples at once, or none yet
                place = f"reward `{entry.name}`, {sample_or_row(reached[-1], rows)}"
            raise _too_long(entry, len(samples), place, str(error), doing) from error

    def _start(
        self, entry: WeightedReward, samples: Sequence[Sample], rows: Sequence[int | str] | None, at: Sequence[int]
    ) -> None:
        """Start calls of a reward outside the main thread: one per row, per group, or for all samples together."""
        calls = []
        for numbers in _units(samples, "row" if entry.reward.by_row else entry.place):
            calls.append(
                _Call(
                    entry,
                    [samples[number] for number in numbers],
                    [at[number] for number in numbers],
                    None if rows is None else [rows[number] for number in numbers],
                    self._busy[entry.name],
                    self._notify,
                )
            )
        self._calls += calls
        if entry.place != "loop":
            for call in calls:
                self._pools[entry.name].submit(call.run)
            return
        import asyncio

        room = self._room.setdefault(entry.name, asyncio.Semaphore(entry.at_once))
        loop = event_loop()
        for call in calls:
            call.loop = loop
        loop.start([(call, call.run_async(room)) for call in calls])

    def _notify(self) -> None:
        with self._ended:
            self._ended.notify_all()

    def _raise_failed(self) -> None:
        """Raise what the first of the calls that failed has raised."""
        for call in self._calls:
            if isinstance(call.error, TimeLimit):
                raise call.too_long(str(call.error)) from call.error
            if call.error is not None:
                raise call.error

    def _wait(self) -> None:
        """Wait until all calls have ended.

        Raises:
            PluginError: a call raised, or exceeded its time limit.
        """
        while True:
            with self._ended:
                running = [call for call in self._calls if not call.done]
                due = [call.due for call in running if call.due is not None]
                wait = min([0.5, *(when - time.monotonic() for when in due)])
                if running and wait > 0 and not any(call.error for call in self._calls):
                    self._ended.wait(wait)
            self._raise_failed()
            now = time.monotonic()
            for call in running:
                if not call.done and call.due is not None and call.due <= now:
                    self._give_up(call)
            if not running:
                return

    def _give_up(self, call: _Call) -> None:
        """End a call that exceeded its time limit, and raise the error for it, or for the one that keeps it from running."""
        if call.loop is None:
            where = where_thread_is(call.thread) if call.entry.place == "thread" else ""
            raise call.too_long(where) from TimeLimit(where)
        blocking, where = call.loop.owner(), where_thread_is(call.loop.thread.ident)
        call.end()
        time.sleep(0.05)
        if isinstance(blocking, _Call) and call.loop.owner() is blocking:
            # It runs without awaiting anything, so nothing else on the loop can run, nor it be cancelled.
            forget_event_loop(call.loop)
            if blocking.due is not None and blocking.due <= time.monotonic():
                raise blocking.too_long(where) from TimeLimit(where)
            raise PluginError(
                "an async reward doesn't await, and keeps the others waiting",
                place=place_of_rows(blocking.entry.name, blocking.rows),
                got=f"{time.monotonic() - (blocking.started or 0):.3g} seconds" + (f" at {where}" if where else ""),
                fix="await in it, or run it in a process (`runs_in`)",
            )
        raise call.too_long("") from TimeLimit()


def _units(samples: Sequence[Sample], place: str) -> list[list[int]]:
    """Return which samples, by number, one call gets: a `row` each, a group each in a `process`, else all."""
    if place == "row":
        return [[number] for number in range(len(samples))]
    if place == "process":
        groups: dict[int, list[int]] = {}
        for number, sample in enumerate(samples):
            groups.setdefault(sample.group, []).append(number)
        return list(groups.values())
    return [list(range(len(samples)))]


def _too_long(entry: WeightedReward, count: int, place: str, where: str, doing: str = "scoring") -> PluginError:
    """Return the error of a call that exceeded its time limit; `where` is the line that it was at, or ''."""
    return PluginError(
        f"{doing} took longer than {entry.time_limit:g} seconds",
        place=place,
        got=f"{count} sample{'' if count == 1 else 's'}" + (f", stopped at {where}" if where else ""),
        fix="raise the reward's `time_limit` (null: no limit) if it needs more time, else find out why it hangs",
    )


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """Switch gradients and the caller's autocast off while rewards run, and restore both afterwards."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
