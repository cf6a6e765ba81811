"""Completions through transformers' own decoding loop, for models that the loop over a `PagedKVCache` doesn't know.

It takes every model that transformers can generate with: sliding windows, recurrent states, their own caches. Completions that
are drawn together begin together and wait for the longest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.drawn_rows import DrawnCompletion, DrawnRows, NewRow
from rlhf_core.generation.memory import bytes_per_completion, free_bytes
from rlhf_core.generation.requests import UNFINISHED, Finished, Request
from rlhf_core.generation.transformers_loop import Drawing, Ended, decode, decoding_of, left_padded
from rlhf_core.generation.watching import report_tokens
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
        """Yield completions, batch by batch; a batch holds prompts of like length, and few enough to fit in memory."""
        for batch in self._batches(list(requests)):
            yield from self._decode(batch, sampling, partly=partly)

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Yield requests to be decoded together."""
        together, positions = decoding_of(self.policy).together, self.policy.max_positions or 2**31
        fixed, per_token = bytes_per_completion(self.policy)
        room = self.memory or free_bytes(self.policy.device)
        batch: list[Request] = []
        for request in sorted(requests, key=lambda request: len(request.ids)):
            length = len(request.ids)
            if batch:
                apart = together == "none" or (together == "equal" and length != len(batch[0].ids))
                # A row that has ended continues until all have ended: none may run out of positions.
                apart = apart or length + batch[0].limit > positions
                size = fixed + per_token * (length + batch[0].limit)
                if apart or len(batch) == self.most_rows or (len(batch) + 1) * size > room:
                    yield batch
                    batch = []
            batch.append(request)
        if batch:
            yield batch

    def _decode(self, requests: Sequence[Request], sampling: SamplingConfig, *, partly: bool) -> Iterator[Finished]:
        """Draw some completions in one decoding loop; where `partly`, in loops for one token, two, four and so on."""
        drawn: list[DrawnCompletion | None] = [None] * len(requests)
        done, piece = 0, 1 if partly else max(one.limit for one in requests)
        while requests:
            rows = DrawnRows(sampling, device=self.policy.device)
            rows.join([new_row(one, before) for one, before in zip(requests, drawn, strict=True)])
            ids, mask = left_padded(
                [[*one.ids, *(before.ids if before else ())] for one, before in zip(requests, drawn, strict=True)],
                self.policy.device,
            )
            most = min(piece, max(one.limit for one in requests) - done)
            drawing = Drawing(
                rows, filler=self.policy.tokenizer.pad_token_id or 0, rules=[one.rule for one in requests]
            )
            decode(self.policy, ids, mask, drawing, Ended(drawing), most=most, cache=decoding_of(self.policy).cache)
            drawn = [rows.completion(row) for row in range(len(requests))]
            for row, one in enumerate(requests):
                found = rows.completion(row)
                report_tokens(len(found.ids) - done)
                reason = "rule" if row in drawing.ruled else found.stop_reason or UNFINISHED
                yield Finished(one.number, found, reason, found.text, None)
            left = [row for row in range(len(requests)) if not bool(drawing.ended[row])]
            requests, drawn = [requests[row] for row in left], [drawn[row] for row in left]
            done, piece = done + most, 2 * piece


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
    )
