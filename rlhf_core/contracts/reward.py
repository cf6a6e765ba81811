"""The contract of a reward: one finite number for each completion. Importing this imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.completion import TRUNCATED
from rlhf_core.infra.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One completion to be scored."""

    prompt: Any
    """Text or chat messages, as in the data."""
    completion: str
    prompt_ids: Sequence[int] = ()
    completion_ids: Sequence[int] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The record's other columns, such as a reference answer."""
    group: int = 0
    """Completions of the same prompt, drawn together, have the same number."""
    stop_reason: str = "end"
    """Why it ended; see `Completion.stop_reason`."""
    mask: Sequence[bool] | None = None
    """For each completion token, whether the policy wrote it; None where it wrote them all."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut off; see `Completion.truncated`."""
        return self.stop_reason in TRUNCATED


class SampleError(DataError):
    """Raised in `score` for a sample that can't be scored, such as one whose row lacks a column. The run's error names its row.

    Args:
        sample: the sample's index in the samples that `score` was called with.
    """

    def __init__(
        self,
        problem: str,
        *,
        sample: int | None = None,
        place: str | None = None,
        got: object | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(problem, place=place, got=got, fix=fix)
        self.sample = sample


class ScoreWithParts(float):
    """A score and the parts that it was made of, which a run logs beside it as `reward/NAME/PART`.

    A reward may return one for each sample in place of a plain float; all of its scores then have the same parts.
    """

    parts: Mapping[str, float]

    def __new__(cls, score: float, parts: Mapping[str, float]) -> ScoreWithParts:
        made = super().__new__(cls, score)
        made.parts = dict(parts)
        return made

    def __reduce__(self) -> tuple[object, ...]:
        return ScoreWithParts, (float(self), self.parts)


class RewardFn(ABC):
    """A reward: one finite float for each sample, in order."""

    api: ClassVar[int]
    Config: ClassVar[type[BaseConfig]] = BaseConfig
    runs_in: Literal["main", "thread", "process"] = "main"
    """Where `score` runs, unless the run's configuration says otherwise. `main`: in the main thread, one reward after the other,
    once all completions are there: right for what computes, a model above all. `thread`: beside generation and the other rewards:
    for what waits, as for a server. `process`: beside them as well, in child processes, which can be killed. An `async def score`
    runs beside them on an event loop."""
    concurrency: int | None = None
    """Most calls of `score` at once outside the main thread, unless the run's configuration says otherwise. None: 1 thread or
    process, 32 calls of an async one."""
    by_row: bool = False
    """Whether each sample is scored by itself. The core then calls `score` with one sample at a time (in threads, processes or an
    event loop with several at once), and its errors name the row that hangs or raises."""

    def __init__(self, config: BaseConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def prepare(self) -> None:  # noqa: B027
        """Load what scoring needs, such as a model. Called once before the first samples, without a time limit."""

    def describe(self) -> dict[str, Any]:
        """Return what scores depend on besides the options and the class's source, as JSON values for the run directory.

        A reward by a model gives its model's `files`, name → SHA-256; a run is resumed only where all of it is as it was. A run
        asks before `prepare`.
        """
        return {}

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Any:
        """Return one finite float for each sample, in order: a list. It may be an `async def`.

        None, NaN or a wrong count stop the run with this reward's name.
        """

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        """Return one finite float for each reasoning step of each sample, or None where the reward is not step-wise."""
        return None

    def step_reader(self, tokenizer: Any) -> StepReader | None:
        """Return what scores the steps of growing completions without reading earlier steps again, or None without one.

        A search over steps asks for one each time that it is run; without one, it asks `score_steps` about the whole completion
        after each step.

        Args:
            tokenizer: that of the policy, whose ids the completions have.
        """
        return None


class StepReader(ABC):
    """Scores the last steps of growing completions, and keeps what it read of the earlier ones: no token is read twice."""

    separator: str | None = None
    """The text that ends a step; None where any will do."""
    forwarded: int = 0
    """Tokens that a model was run on so far."""

    @abstractmethod
    def begin(self, samples: Sequence[Sample]) -> list[Any]:
        """Read prompts, given as samples without a completion; return what is kept for each."""

    @abstractmethod
    def follow(self, kept: Sequence[Any], samples: Sequence[Sample], new: Sequence[int]) -> list[tuple[Any, float]]:
        """Read one more step of each completion; return for each what is kept now, and the step's score.

        Args:
            kept: for each sample, what was kept before the step; it stays as it is, so that several steps may follow it.
            samples: the completions up to the end of the step. One that isn't finished has the stop reason `length`.
            new: for each sample, how many of its last `completion_ids` are the step's.
        """

    def free(self, kept: Sequence[Any]) -> None:  # noqa: B027
        """Give up what is kept for some completions."""
