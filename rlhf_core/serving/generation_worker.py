"""The thread that draws for all clients: their requests join one running batch, and leave it, while it is decoded.

Only this thread uses the engine. Others hand it jobs, and get what becomes of them through a function that the job names.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.known_tokens import ScoredTokens
from rlhf_core.generation.open_batch import Grown, OpenBatch
from rlhf_core.infra.errors import RLHFError

log = logging.getLogger(__name__)

SCORED_AT_ONCE = 1024
"""Most prompt tokens that are scored between two decoding steps, unless one prompt has more: others wait meanwhile."""


class Wanted(NamedTuple):
    """A completion that a job asks for."""

    ids: Sequence[int]
    """The prompt's."""
    seed: int
    sampling: SamplingConfig
    chat: bool
    partly: bool = False
    top: int = 0


class Piece(NamedTuple):
    """A completion of a job has grown, or ended."""

    place: int
    """Which of the job's `wanted` it is."""
    grown: Grown


class ScoredPrompt(NamedTuple):
    """A prompt of a job was scored."""

    place: int
    """Which of the job's `scored` it is."""
    tokens: ScoredTokens | None
    """Of all its tokens but the first; None where it has one alone."""


class Failure(NamedTuple):
    """A job can't be done. Nothing more comes of it."""

    error: Exception


Event = Piece | ScoredPrompt | Failure


@dataclass(eq=False)
class Job:
    """What one request asks for."""

    wanted: Sequence[Wanted]
    deliver: Callable[[Event], None]
    """Called by the worker's thread; it must return at once."""
    scored: Sequence[tuple[Sequence[int], int]] = ()
    """Prompts whose own tokens are to be scored, and how many of the most likely tokens are wanted in each one's place."""
    numbers: dict[int, int] = field(default_factory=dict)
    """Numbers in the running batch of the completions that haven't ended → which of `wanted` they are. The worker's own."""

    @property
    def size(self) -> int:
        """How many completions and scored prompts it asks for."""
        return len(self.wanted) + len(self.scored)


class Stopping(Exception):
    """The server ends before a job is done."""


class _Message(NamedTuple):
    kind: str
    """`add`, `leave` or `end`."""
    job: Job | None
    """None for `end`."""


class GenerationWorker:
    """See the module. `start` it, and `stop` it at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        """Number in the running batch → the job that it is of."""
        self._to_score: list[tuple[Job, int]] = []
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job be done, beside all others."""
        self._inbox.put(_Message("add", job))

    def cancel(self, job: Job) -> None:
        """Give up what is left of a job, and free its rows; what is on its way may still be delivered."""
        self._inbox.put(_Message("leave", job))

    def stop(self) -> None:
        """Give up all jobs, and wait until the thread has ended."""
        self._inbox.put(_Message("end", None))
        self._thread.join()

    # In the thread

    def _work(self) -> None:
        while (message := self._inbox.get()).kind != "end":
            if message.job is not None and message.kind == "add" and not self._serve(message.job):
                return

    def _serve(self, first: Job) -> bool:
        """Do jobs until there are none left; return False where the thread is to end.

        A batch lasts so long: its tables grow with the longest completion, and weights stay packed for it.
        """
        try:
            with self._engine.open() as batch:
                self._add(batch, first)
                while self._jobs or self._to_score:
                    self._score(batch)
                    self._step(batch)
                    if not self._read_inbox(batch):
                        self._fail({*self._jobs.values(), *(job for job, _ in self._to_score)}, Stopping())
                        return False
        except Exception as error:
            log.error("completions failed: %s", error, exc_info=not isinstance(error, RLHFError))
            self._fail({first, *self._jobs.values(), *(job for job, _ in self._to_score)}, error)
        finally:
            self._jobs, self._to_score = {}, []
        return True

    def _read_inbox(self, batch: OpenBatch) -> bool:
        """Let jobs join and leave; return False where the thread is to end."""
        while True:
            try:
                kind, job = self._inbox.get_nowait()
            except queue.Empty:
                return True
            if job is None:
                return False
            if kind == "add":
                self._add(batch, job)
            else:
                self._remove(batch, job)

    def _add(self, batch: OpenBatch, job: Job) -> None:
        """Let a job's completions join; one that can't be done fails, and harms no other."""
        try:
            for index, (ids, seed, sampling, chat, partly, top) in enumerate(job.wanted):
                number = batch.join(ids, seed=seed, sampling=sampling, chat=chat, partly=partly, top=top)
                job.numbers[number], self._jobs[number] = index, job
        except RLHFError as error:
            self._remove(batch, job)
            self._fail([job], error)
        except Exception as error:
            self._fail([job], error)  # it may be in no list yet; `_serve` fails the others
            raise
        else:
            self._to_score += [(job, index) for index in range(len(job.scored))]

    def _remove(self, batch: OpenBatch, job: Job) -> None:
        for number in job.numbers:
            batch.leave(number)
            del self._jobs[number]
        job.numbers.clear()
        self._to_score = [(other, index) for other, index in self._to_score if other is not job]

    def _step(self, batch: OpenBatch) -> None:
        """Draw a step's tokens, and deliver what came of it."""
        for grown in batch.step():
            job = self._jobs[grown.number]
            index = job.numbers[grown.number]
            if grown.ended:
                del self._jobs[grown.number], job.numbers[grown.number]
            job.deliver(Piece(index, grown))

    def _score(self, batch: OpenBatch) -> None:
        """Score some of the prompts that wait for it, in one pass, and deliver what was found."""
        chosen: list[tuple[Job, int, Sequence[int], int]] = []
        for job, index in self._to_score:
            ids, top = job.scored[index]
            if chosen and sum(len(each) for _, _, each, _ in chosen) + len(ids) > SCORED_AT_ONCE:
                break
            chosen.append((job, index, ids, top))
        longer = [each for each in chosen if len(each[2]) > 1]
        found: dict[tuple[Job, int], ScoredTokens] = {}
        if longer:
            try:
                handles = self._engine.prefill([ids[:1] for _, _, ids, _ in longer])
                scored = self._engine.score_with_top(
                    handles, [ids[1:] for _, _, ids, _ in longer], max(top for *_, top in longer)
                )
                self._engine.free(handles)
            except RLHFError as error:
                for job in {job for job, *_ in chosen}:
                    self._remove(batch, job)
                    self._fail([job], error)
                return
            found = {(job, index): tokens for (job, index, *_), tokens in zip(longer, scored, strict=True)}
        # Only now: a job that is in no list would wait for ever where an error ends the batch.
        del self._to_score[: len(chosen)]
        for job, index, *_ in chosen:
            job.deliver(ScoredPrompt(index, found.get((job, index))))

    @staticmethod
    def _fail(jobs: Iterable[Job], error: Exception) -> None:
        for job in jobs:
            job.deliver(Failure(error))
