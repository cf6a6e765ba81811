"""The thread that answers requests by a sampler, one after the other: a sampler ranks or searches whole completions."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.open_batch import Grown
from rlhf_core.infra.errors import RLHFError
from rlhf_core.serving.generation_worker import Failure, Job, Piece, Stopping

log = logging.getLogger(__name__)


@dataclass(eq=False)
class SamplerJob(Job):
    """What one request asks a sampler for; of `wanted` the number counts alone."""

    prompts: Sequence[Any] = ()
    """Texts, or lists of chat messages."""
    n: int = 1
    seed: int | None = None
    options: BaseConfig | None = None
    """The sampler's, with what the request says."""
    left: bool = False
    """Whether nobody waits for it any more."""


class SamplerWorker:
    """See the module. `start` it, and `stop` it at the end.

    Args:
        sampler: nobody else may use its models meanwhile.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._inbox: queue.SimpleQueue[SamplerJob | None] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job be done, behind those that wait."""
        assert isinstance(job, SamplerJob)
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """Give up a job that hasn't begun; one that has is done to its end."""
        assert isinstance(job, SamplerJob)
        job.left = True

    def stop(self) -> None:
        """Give up the jobs that wait, and wait until the one that was begun is done."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._inbox.get()) is not None:
            if self._stopping:
                job.deliver(Failure(Stopping()))
            elif not job.left:
                self._answer(job)

    def _answer(self, job: SamplerJob) -> None:
        """Draw a job's completions and deliver them; an error fails this job alone."""
        try:
            sampler = type(self._sampler)(job.options, **self._sampler.models)
            drawn = sampler.sample(list(job.prompts), job.n, seed=job.seed)
        except Exception as error:
            log.error("completions failed: %s", error, exc_info=not isinstance(error, RLHFError))
            job.deliver(Failure(error))
            return
        for index, completion in enumerate(one for group in drawn for one in group):
            job.deliver(Piece(index, Grown(index, completion, True, ())))
