"""A run of the native backend that requests join and leave while others are drawn.

Where the model is decoded over a `PagedKVCache`, a request joins the running batch at the next step. Where only transformers' own
loop decodes it, rows begin together: what arrives waits for the end of the round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.backend import OpenRun
from rlhf_core.generation.native import NativeDecoding
from rlhf_core.generation.plain import PlainDecoding
from rlhf_core.generation.requests import UNFINISHED, Finished, Request
from rlhf_core.generation.weights_state import weight_versions
from rlhf_core.infra.devices import is_out_of_memory, release_memory
from rlhf_core.infra.errors import ConfigError, NumbersError

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel

LoopFor = Callable[[Sequence[Request], int, NativeDecoding | None], NativeDecoding | None]
"""(All requests, most rows, the loop so far) → the loop over a `PagedKVCache` with room for them; None where none can."""


class NativeOpenRun(OpenRun):
    """See the module.

    Args:
        sampling: of every request that has none of its own.
        most_rows: most completions that are decoded at once; half as many whenever memory runs out.
        computing: returns the context that a forward pass needs.
        loop_for: finds the loop over a `PagedKVCache`.
        plain: makes transformers' loop, for so many rows at once.
        close: called at the end.
    """

    def __init__(
        self,
        policy: PolicyModel,
        sampling: SamplingConfig,
        *,
        most_rows: int,
        computing: Callable[[], AbstractContextManager[None]],
        loop_for: LoopFor,
        plain: Callable[[int], PlainDecoding],
        close: Callable[[], None],
    ) -> None:
        self._policy, self._sampling, self._most_rows = policy, sampling, most_rows
        self._computing, self._loop_for, self._plain, self._close = computing, loop_for, plain, close
        self._versions = weight_versions(policy)
        self._left: dict[int, Request] = {}
        """Requests that haven't got their last token, by number."""
        self._arrived: list[Request] = []
        self._loop: NativeDecoding | None = None
        self._in_loop: dict[int, Request] = {}
        """Those that it draws."""
        self._looping = contextlib.ExitStack()
        self._for_round: list[Request] = []
        """Requests that wait for transformers' loop."""
        self._round: Generator[Finished] | None = None
        self._gone: set[int] = set()
        """Numbers of requests that left a round."""

    def __len__(self) -> int:
        return len(self._left)

    def join(self, requests: Sequence[Request]) -> None:
        self._left |= {request.number: request for request in requests}
        self._arrived += requests

    def leave(self, numbers: Collection[int]) -> None:
        for number in numbers:
            if self._left.pop(number, None) is not None and self._round is not None:
                self._gone.add(number)
            self._in_loop.pop(number, None)
        self._arrived = [request for request in self._arrived if request.number not in numbers]
        self._for_round = [request for request in self._for_round if request.number not in numbers]
        if self._loop is not None:
            self._loop.leave(numbers)

    def step(self) -> list[Finished]:
        if weight_versions(self._policy) != self._versions:
            problem = "the policy's weights have changed while completions were being drawn"
            raise ConfigError(problem, place="an open batch", fix="close it before, and open another one")
        failed = False
        try:
            with self._computing():
                self._let_join()
                found = self._drawn()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed, found = True, []
        if failed:  # outside the handler, as the error's traceback keeps the failed pass's tensors alive
            self._begin_again()
        for one in found:
            if one.reason != UNFINISHED:
                del self._left[one.number]
                self._in_loop.pop(one.number, None)
        return found

    def close(self) -> None:
        self._end_loops()
        self._left, self._arrived, self._for_round = {}, [], []
        closing, self._close = self._close, _closed
        closing()

    def _let_join(self) -> None:
        """Hand what has arrived to the loop that draws it."""
        arrived, self._arrived = self._arrived, []
        if not arrived:
            return
        if self._joined(arrived):
            return
        for request in arrived:  # some may be too long for the loop over a `PagedKVCache`
            if not self._joined([request]):
                self._for_round.append(self._watched(request))

    def _joined(self, requests: Sequence[Request]) -> bool:
        """Let requests join the loop over a `PagedKVCache`; return whether it can decode them all.

        Raises:
            ConfigError: what was kept for others was thrown away meanwhile, after logits that weren't finite.
        """
        loop = self._loop_for([*requests, *self._in_loop.values()], self._most_rows, self._loop)
        if loop is None:
            return False
        if loop is not self._loop:
            if self._in_loop:
                problem = "the engine has thrown away what it kept while completions were being drawn"
                raise ConfigError(problem, place="an open batch", fix="close it, and open another one")
            self._looping.close()
            self._looping.enter_context(loop.running(self._sampling))
            self._loop = loop
        self._in_loop |= {request.number: request for request in requests}
        loop.join(requests)
        return True

    def _watched(self, request: Request) -> Request:
        """Return a request whose row in a round ends once nobody waits for it any more."""
        rule, number = request.rule, request.number
        return replace(request, rule=lambda ids: number in self._gone or (rule is not None and rule(ids)))

    def _drawn(self) -> list[Finished]:
        """Draw a step's tokens in both loops, where both have rows; return the completions that are wanted now."""
        found = [] if self._loop is None else list(self._loop.step())
        if self._round is None and self._for_round:
            requests, self._for_round = self._for_round, []
            self._round = self._plain(self._most_rows).run(requests, self._sampling, partly=True)
        if self._round is None:
            return found
        one = next(self._round, None)
        if one is None:
            self._round, self._gone = None, set()
            return found
        request = self._left.get(one.number)
        wanted = request is not None and (request.partly or one.reason != UNFINISHED)
        return [*found, one] if wanted else found

    def _begin_again(self) -> None:
        """Begin all completions again, with the same random numbers, in half as many rows.

        Raises:
            NumbersError: memory doesn't suffice for one completion.
        """
        self._end_loops()
        release_memory(self._policy.device)
        rows = min(self._most_rows, max(len(self._left), 1))
        if rows == 1:
            raise NumbersError(
                "out of memory with one completion at a time", place="generation", fix="allow shorter completions"
            )
        self._most_rows = rows // 2
        self._arrived, self._for_round = [*self._left.values()], []

    def _end_loops(self) -> None:
        """Free all rows, of either loop."""
        self._looping.close()
        self._loop, self._in_loop = None, {}
        if self._round is not None:
            self._round.close()
            self._round = None
        self._gone = set()


def _closed() -> None:
    """What closing a closed run does."""
