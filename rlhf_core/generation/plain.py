"""Completions through transformers' own decoding loop, for models that the loop over a `PagedKVCache` doesn't know.

It takes every model that transformers can generate with: sliding windows, recurrent states, their own caches. Completions that
are drawn together begin together and wait for the longest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.drawn_rows import DrawnCompletion, DrawnRows, NewRow
from rlhf_core.generation.memory import bytes_per_completion, free_bytes
from rlhf_core.generation.requests import UNFINISHED, Finished, Request
from rlhf_core.generation.suspended_thread import handed_over
from rlhf_core.generation.transformers_loop import Drawing, Ended, decode, decoding_of, left_padded
from rlhf_core.generation.watching import report_forwarded, report_tokens
from rlhf_core.models.policy_model import PolicyModel


class PlainDecoding:
    """Draws completions batch by batch through transformers' loop.

    The policy must be in evaluation mode, inside the context of its matrix products, without its own generation options.

    Args:
        memory: bytes that one batch may use; None takes what is free.
        most_rows: most completions in a batch.
    """

    def __init__(self, policy: PolicyModel, *, memory: int | None = None, most_rows: int) -> None:
        self.policy, self.memory, self.most_rows = policy, memory, most_rows

    def run(
        self, requests: Iterable[Request], sampling: SamplingConfig, *, partly: bool = False
    ) -> Generator[Finished]:
        """Yield completions, batch by batch; a batch holds prompts of like length, and few enough to fit in memory.

        Args:
            partly: yield every completion after each of its tokens, too.
        """
        for batch in self._batches(list(requests)):
            with contextlib.closing(self._decode(batch, sampling, partly=partly)) as decoding:
                yield from decoding

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Yield requests to be decoded together."""
        together, positions = decoding_of(self.policy).together, self.policy.max_positions or 2**31
        fixed, per_token = bytes_per_completion(self.policy)
        room = self.memory or free_bytes(self.policy.device)
        batch: list[Request] = []
        for request in sorted(requests, key=lambda request: len(request.ids)):
            length = len(request.ids)  # none of the batch is longer
            if batch:
                apart = together == "none" or (together == "equal" and length != len(batch[0].ids))
                # A row that has ended continues until all have ended: none may run out of positions.
                longest = length + max(request.limit, *(one.limit for one in batch))
                full = (len(batch) + 1) * (fixed + per_token * longest) > room
                if apart or longest > positions or len(batch) == self.most_rows or full:
                    yield batch
                    batch = []
            batch.append(request)
        if batch:
            yield batch

    def _decode(self, requests: Sequence[Request], sampling: SamplingConfig, *, partly: bool) -> Generator[Finished]:
        """Draw some completions in one run of the loop; where `partly`, yield them after each of their tokens, too."""
        rows = DrawnRows(sampling, device=self.policy.device)
        rows.join([new_row(one, None) for one in requests])
        ids, mask = left_padded([one.ids for one in requests], self.policy.device)
        drawing = Drawing(rows, filler=self.policy.tokenizer.pad_token_id or 0, rules=[one.rule for one in requests])
        most, cache = max(one.limit for one in requests), decoding_of(self.policy).cache

        report_forwarded(sum(len(one.ids) - 1 for one in requests), self.policy.network)

        def drawn(row: int) -> Finished:
            found = rows.completion(row)
            reason = "rule" if row in drawing.ruled else found.stop_reason or UNFINISHED
            return Finished(requests[row].number, found, reason, found.text, None)

        if not partly:
            decode(self.policy, ids, mask, drawing, Ended(drawing), most=most, cache=cache)
            for row in range(len(requests)):
                one = drawn(row)
                report_tokens(len(one.drawn.ids))
                report_forwarded(len(one.drawn.ids), self.policy.network)
                yield one
            return

        def run(hand_over: Callable[[list[Finished]], None]) -> None:
            growing = set(range(len(requests)))

            def after_token() -> None:
                grown = {row: drawn(row) for row in sorted(growing)}
                growing.difference_update(row for row, one in grown.items() if one.reason != UNFINISHED)
                hand_over([*grown.values()])

            decode(self.policy, ids, mask, drawing, Ended(drawing, after_token), most=most, cache=cache)

        # The loop is suspended between tokens, and nothing of it may be left in the caller's thread meanwhile.
        with contextlib.closing(handed_over(run, self.policy.device)) as running:
            for grown in running:
                report_tokens(len(grown))
                report_forwarded(len(grown), self.policy.network)
                yield from grown


def new_row(request: Request, before: DrawnCompletion | None) -> NewRow:
    """Return the row of a decoding loop that draws what is asked for, behind what was drawn before."""
    return NewRow(
        request.seed,
        request.limit,
        request.ends,
        request.stops,
        prompt_ids=request.ids,
        before=before,
        skipped=request.skipped,
        earlier_confidence=request.earlier_confidence,
        min_confidence=request.min_confidence,
        sampling=request.sampling,
        top=request.top,
    )
