"""The rows of an ensemble as one of its models keeps them: over a `PagedKVCache`, or in transformers' own loop.

Axes: R rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from rlhf_core.generation.device_steps import DeviceRow
from rlhf_core.generation.memory import bytes_per_completion
from rlhf_core.generation.native import NativeDecoding
from rlhf_core.generation.native_backend import LentLoop
from rlhf_core.generation.paged_cache import CachedSequence, OutOfBlocks
from rlhf_core.generation.suspended_thread import handed_over
from rlhf_core.generation.transformers_loop import decode, decoding_of, left_padded
from rlhf_core.generation.watching import report_forwarded
from rlhf_core.models.policy_model import PolicyModel

if TYPE_CHECKING:
    from rlhf_core.generation.ensemble_backend import LockstepRow


class MemberRows(ABC):
    """What one model keeps of the rows of an ensemble, in their order.

    Args:
        lent: the model's loop, and the state in which it computes.
        counting: returns the context in which what it is run on is counted.
        memory: bytes that keys and values may take.
    """

    def __init__(
        self, policy: PolicyModel, lent: LentLoop, counting: Callable[[], AbstractContextManager[None]], *, memory: int
    ) -> None:
        self.policy, self.lent, self.memory = policy, lent, memory
        self._counting = counting

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Put the model into the state in which it computes, and count what it is run on."""
        with self._counting(), self.lent.computing():
            yield

    @abstractmethod
    def reserve(self, waiting: Sequence[LockstepRow], *, active: int) -> int:
        """Return how many of the waiting rows, the first ones, may join; of none active at least one."""

    @abstractmethod
    def join(self, rows: Sequence[LockstepRow]) -> None:
        """Let rows join behind the others: the first ones of those that `reserve` was asked about last."""

    @abstractmethod
    def make_places(self, rows: Sequence[LockstepRow]) -> bool:
        """Make a place for each row's last token where it has none; return False where memory doesn't suffice for all."""

    @abstractmethod
    def logits(self, rows: Sequence[LockstepRow]) -> Tensor:
        """Read each row's last token and return (R, V) the logits of the next ones."""

    @abstractmethod
    def keep(self, indices: Sequence[int]) -> None:
        """Keep the rows of these indices; the others leave."""

    @abstractmethod
    def clear(self) -> None:
        """Give up what is kept besides the rows."""


class CachedRows(MemberRows):
    """Rows over a `PagedKVCache`. A prompt is read once for all its completions; kept ones aren't read again."""

    def __init__(
        self, policy: PolicyModel, lent: LentLoop, counting: Callable[[], AbstractContextManager[None]], *, memory: int
    ) -> None:
        super().__init__(policy, lent, counting, memory=memory)
        assert lent.decoding is not None
        self._decoding: NativeDecoding = lent.decoding
        self._cache = self._decoding.cache
        self._sequences: list[CachedSequence] = []
        self._reserved: list[CachedSequence | None] = []
        """For each row that may join what is kept of its tokens; None where an earlier one of them has the same."""

    def reserve(self, waiting: Sequence[LockstepRow], *, active: int) -> int:
        prefixes, seen = self._decoding.prefixes, set[tuple[int, ...]]()
        self._reserved, needed = [], 1 + active
        for row in waiting:
            to_read = tuple(row.ids[:-1])
            sequence = None if to_read in seen else prefixes.fork_longest(to_read)
            # One block more for each row.
            more = 1 + (0 if sequence is None else self._cache.blocks_for(len(to_read) - sequence.length))
            while self._cache.free_blocks < needed + more - 1 and prefixes.drop_oldest():
                pass
            if self._cache.free_blocks < needed + more - 1 and (active or self._reserved):
                break
            needed += more
            seen.add(to_read)
            self._reserved.append(sequence)
        return len(self._reserved)

    def join(self, rows: Sequence[LockstepRow]) -> None:
        reserved, self._reserved = self._reserved[: len(rows)], []
        read = {tuple(row.ids[:-1]): one for row, one in zip(rows, reserved, strict=True) if one is not None}
        if not rows:
            return
        with self.computing():
            self._decoding.catch_up([(sequence, ids) for ids, sequence in read.items()])
        for row, own in zip(rows, reserved, strict=True):
            sequence = read[tuple(row.ids[:-1])]
            if own is not None:
                self._decoding.prefixes.keep(row.request.ids[:-1], sequence)
            self._sequences.append(sequence if own is not None else sequence.fork())

    def make_places(self, rows: Sequence[LockstepRow]) -> bool:
        for row, sequence in zip(rows, self._sequences, strict=True):
            while sequence.length < len(row.ids):
                try:
                    sequence.append(1)
                except OutOfBlocks:
                    if not self._decoding.prefixes.drop_oldest():
                        return False
        return True

    def logits(self, rows: Sequence[LockstepRow]) -> Tensor:
        last = [DeviceRow(row.ids[-1], len(row.ids) - 1, one) for row, one in zip(rows, self._sequences, strict=True)]
        with self.computing():
            return self._decoding.next_logits(last, weight=self.lent.weight)

    def keep(self, indices: Sequence[int]) -> None:
        staying = [self._sequences[index] for index in indices]
        for sequence in {*self._sequences} - {*staying}:
            sequence.free()
        self._sequences = staying

    def clear(self) -> None:
        self._decoding.prefixes.clear()


class PlainRows(MemberRows):
    """Rows in transformers' own loop, for models whose attention can't be replaced.

    Rows begin together, in as few batches as the model allows, and none joins before all have left.
    """

    def __init__(
        self, policy: PolicyModel, lent: LentLoop, counting: Callable[[], AbstractContextManager[None]], *, memory: int
    ) -> None:
        super().__init__(policy, lent, counting, memory=memory)
        self._places: list[tuple[_PlainBatch, int]] = []
        """For each row its batch and its index there."""

    def reserve(self, waiting: Sequence[LockstepRow], *, active: int) -> int:
        if self._places:
            return 0
        fixed, per_token = bytes_per_completion(self.policy)
        longest, count = 0, 0
        for row in waiting:
            longest = max(longest, len(row.ids) + row.left)
            if count and (count + 1) * (fixed + per_token * longest) > self.memory:
                break
            count += 1
        return count

    def join(self, rows: Sequence[LockstepRow]) -> None:
        together, positions = decoding_of(self.policy).together, self.policy.max_positions or 2**31
        batches: list[list[int]] = []
        for index in sorted(range(len(rows)), key=lambda index: len(rows[index].ids)):
            batch = [rows[at] for at in batches[-1]] if batches else []
            apart = together == "none" or any(
                together == "equal" and len(one.ids) != len(rows[index].ids) for one in batch
            )
            # A row that has ended continues until all have ended: none may run out of positions.
            longest = len(rows[index].ids) + max(one.left for one in (*batch, rows[index]))
            if not batch or apart or longest > positions:
                batches.append([])
            batches[-1].append(index)
        places: dict[int, tuple[_PlainBatch, int]] = {}
        for indices in batches:
            made = _PlainBatch(self.policy, [rows[index] for index in indices])
            places |= {index: (made, at) for at, index in enumerate(indices)}
        self._places += [places[index] for index in range(len(rows))]

    def make_places(self, rows: Sequence[LockstepRow]) -> bool:
        return True

    def logits(self, rows: Sequence[LockstepRow]) -> Tensor:
        last: dict[_PlainBatch, dict[int, int]] = {}
        for row, (batch, at) in zip(rows, self._places, strict=True):
            last.setdefault(batch, {})[at] = row.ids[-1]
        with self.computing():
            found = {batch: batch.step(tokens) for batch, tokens in last.items()}
            return torch.stack([found[batch][at] for batch, at in self._places])

    def keep(self, indices: Sequence[int]) -> None:
        before = {batch for batch, _ in self._places}
        self._places = [self._places[index] for index in indices]
        for batch in before - {batch for batch, _ in self._places}:
            batch.close()

    def clear(self) -> None:
        """Nothing is kept besides the rows."""


class _PlainBatch:
    """Some rows that began together in one run of transformers' loop, which is suspended between tokens."""

    def __init__(self, policy: PolicyModel, rows: Sequence[LockstepRow]) -> None:
        self._policy, self._rows = policy, [list(row.ids) for row in rows]
        self._most = max(row.left for row in rows)
        self._filler = policy.tokenizer.pad_token_id or 0
        self._feeding = _Feeding(self._filler, len(rows), policy.device)
        self._running: Generator[Tensor] | None = None

    def step(self, tokens: dict[int, int]) -> Tensor:
        """Read the last tokens of rows, by their indices, and return (B, V) the logits of all."""
        if self._running is None:
            report_forwarded(sum(map(len, self._rows)), self._policy.network)
            self._running = handed_over(self._decode, self._policy.device)
        else:
            report_forwarded(len(tokens), self._policy.network)
            self._feeding.feed(tokens)
        return next(self._running)

    def close(self) -> None:
        if self._running is not None:
            self._running.close()

    def _decode(self, hand_over: Callable[[Tensor], None]) -> None:
        self._feeding.hand_over = hand_over
        ids, mask = left_padded(self._rows, self._policy.device)
        cache = decoding_of(self._policy).cache
        decode(self._policy, ids, mask, self._feeding, most=self._most, cache=cache)


class _Feeding(LogitsProcessor):
    """Hands over each step's logits, and leaves the decoding loop no choice but the tokens that it is fed."""

    hand_over: Callable[[Tensor], None]

    def __init__(self, filler: int, rows: int, device: torch.device) -> None:
        self._filler, self._tokens = filler, torch.full((rows, 1), filler, device=device)

    def feed(self, tokens: dict[int, int]) -> None:
        """Take the next token of each row, by its index; the others get the filler."""
        chosen = [tokens.get(index, self._filler) for index in range(len(self._tokens))]
        self._tokens = torch.tensor(chosen, device=self._tokens.device)[:, None]

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        self.hand_over(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, self._tokens, 0.0)
