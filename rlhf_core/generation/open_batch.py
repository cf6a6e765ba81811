"""A batch of completions that prompts join and leave while others are drawn: what a server of many clients stands on.

with engine.open() as batch:
    first = batch.join(ids, seed=1)
    while len(batch):
        for grown in batch.step():
            ...  # another prompt may join here
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.requests import UNFINISHED, Finished, Request
from rlhf_core.generation.stop_strings import settled_text
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_core.generation.backend import OpenRun

OWN = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop")
"""Options of `SamplingConfig` in which the completions of one batch may differ."""


class Grown(NamedTuple):
    """A completion that has grown, or ended."""

    number: int
    """What `OpenBatch.join` returned."""
    completion: Completion
    """Whole once `ended`; before, its text leaves out what further tokens may still change."""
    ended: bool
    top: Sequence[Sequence[tuple[int, float]]]
    """For each token the most likely ones in its place under the model's own distribution, most likely first, as (id,
    log-probability in nats); as many as were asked for."""


@dataclass(frozen=True)
class Joining:
    """What is drawn for a prompt, and how its tokens become a completion."""

    request: Request
    completed: Callable[[Finished], Completion]


class OpenBatch:
    """See the module. Made by `Engine.open`; it isn't for several threads at once.

    Every completion is the one that `Engine.generate` would draw with the same seed and options, up to the rounding of logits,
    whatever joins or leaves.

    Args:
        joining: (number, ids, seed, options, chat) → what is drawn for a prompt.
        sampling: the options that all completions share.
    """

    def __init__(
        self,
        run: OpenRun,
        joining: Callable[[int, tuple[int, ...], int, SamplingConfig, bool], Joining],
        sampling: SamplingConfig,
        *,
        step: Callable[[OpenRun], list[Finished]],
    ) -> None:
        self._run, self._joining, self._sampling, self._step = run, joining, sampling, step
        self._open: dict[int, tuple[Joining, SamplingConfig]] = {}
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return how many completions haven't ended."""
        return len(self._open)

    def join(
        self,
        ids: Sequence[int],
        *,
        seed: int,
        sampling: SamplingConfig | None = None,
        chat: bool = False,
        partly: bool = False,
        top: int = 0,
    ) -> int:
        """Let a completion of a prompt join the batch, and return its number.

        Completions of the same prompt that join together share what is computed for it.

        Args:
            ids: the prompt's.
            sampling: how its tokens are drawn, which may differ from the batch's options in `OWN`; None takes those.
            chat: whether the prompt is a chat's, which ends with a turn, and whose texts are decoded alone.
            partly: return it after each of its tokens, too.
            top: most likely tokens that are wanted in the place of each token drawn.

        Raises:
            ConfigError: an option that all completions of a batch share, a seed that is no whole number from 0, `top` below 0.
            DataError: the prompt is empty, or leaves no room for a token among the model's positions.
        """
        sampling = sampling or self._sampling
        for option in SamplingConfig.model_fields:
            if option not in OWN and getattr(sampling, option) != getattr(self._sampling, option):
                raise ConfigError(
                    "all completions of a batch share this option", place=f"`{option}`", got=repr(getattr(sampling, option)),
                    fix="open the batch with it",
                )  # fmt: skip
        if top < 0:
            raise ConfigError("must be at least 0", place="join(top=…)", got=str(top))
        number = self._next
        joining = self._joining(number, tuple(ids), seed, sampling, chat)
        self._run.join([replace(joining.request, sampling=sampling, partly=partly, top=top)])
        self._open[number], self._next = (joining, sampling), number + 1
        return number

    def leave(self, number: int) -> None:
        """Give up a completion, and free its row; one that has ended is gone already. The others draw what they would have."""
        if self._open.pop(number, None) is not None:
            self._run.leave([number])

    def step(self) -> list[Grown]:
        """Draw a token for each row, or a few; return the completions that ended, and those that are wanted as they grow.

        Raises:
            ConfigError: the policy's weights have changed since the batch was opened.
            NumbersError: logits aren't finite, or memory doesn't suffice for one completion. The batch must be closed.
        """
        found = []
        for one in self._step(self._run):
            joining, sampling = self._open[one.number]
            completion, ended = joining.completed(one), one.reason != UNFINISHED
            if ended:
                del self._open[one.number]
            else:
                completion = replace(completion, text=settled_text(completion.text, sampling.stop))
            found.append(Grown(one.number, completion, ended, one.drawn.top))
        return found

    def close(self) -> None:
        """Give up all completions; closing twice does nothing."""
        self._open = {}
        self._run.close()
