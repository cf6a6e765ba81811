"""The decoding loop over a `PagedKVCache`, with continuous batching.

Each pass of the loop lets waiting requests join as far as memory allows, reads a bounded number of their prompts' tokens, and
draws one token for every row. A prompt is read once for all its completions, and a row that has its last token leaves at once.
Where the cache runs full, kept prompts are dropped first; then the row that joined last gives up its keys and values and joins
again later, where its tokens are read as a prompt would be: it continues with the same random numbers.

Axes: R rows, N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.block_table_attention import TableChunkAttention
from rlhf_core.generation.cached_attention import CachedAttention, ChunkAttention, DecodingAttention
from rlhf_core.generation.device_steps import DEVICES, STEPS, DeviceRow, DeviceSteps
from rlhf_core.generation.drafting import MOST_GUESSES, DraftCounts, DraftRow, Drafts
from rlhf_core.generation.drawn_rows import DrawnCompletion, DrawnRows
from rlhf_core.generation.paged_cache import CachedSequence, OutOfBlocks, PagedKVCache
from rlhf_core.generation.plain import new_row
from rlhf_core.generation.prefixes import KeptPrefixes
from rlhf_core.generation.requests import UNFINISHED, Finished, Request
from rlhf_core.generation.transformers_loop import forward_logits
from rlhf_core.generation.watching import report_forwarded, report_tokens, uncounted
from rlhf_core.infra.errors import NumbersError, describe_error
from rlhf_core.models.backbone import plain_ids
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.models.precision import exact_products
from rlhf_core.models.probe import FAILURES, deviation

CHUNK = {"cpu": 256, "cuda": 4096}
"""Most prompt tokens that are read between two decoding steps: more would hold up the rows that are being decoded."""
MOST_TOGETHER = 2 * MOST_GUESSES
"""Most tokens per sequence, on average, whose attention is computed for all sequences together."""
NO_NUMBERS = np.zeros(0)
CHUNKS_FIRST = 16
"""So many times as many are read where no row is being decoded, so that rows begin together."""


@dataclass(eq=False)
class _Row:
    """A request that takes part in the loop."""

    request: Request
    ids: list[int]
    """The prompt's tokens and those drawn; the keys and values of all but the last are in the cache once it is decoded."""
    sequence: CachedSequence
    before: DrawnCompletion | None = None
    """What it had drawn before it had to give up its keys and values."""
    draft: Any = None
    """What the drafter keeps for it."""
    passes: int = 0
    """That drew tokens for it while there were drafts."""
    guessed: int = 0
    accepted: int = 0

    @property
    def missing(self) -> int:
        """Tokens that must be read before it can be decoded."""
        return len(self.ids) - 1 - self.sequence.length

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.request.limit - (len(self.ids) - len(self.request.ids))


class NativeDecoding:
    """Draws completions from a policy whose attention layers read and write a `PagedKVCache`.

    The policy must be in evaluation mode, inside the context of its matrix products.

    Args:
        policy: its rows are packed; see `SharedForward`.
        cache: where keys and values are kept.
        most_rows: most completions that are decoded at once.
        cuda_graphs: whether decoding steps on a GPU are captured where they can be.
    """

    def __init__(
        self,
        policy: PolicyModel,
        cache: PagedKVCache,
        *,
        most_rows: int,
        cuda_graphs: bool = True,
        prefixes: KeptPrefixes | None = None,
    ) -> None:
        self.policy, self.cache, self.most_rows = policy, cache, most_rows
        self._device_steps = DeviceSteps(policy, cache, graphs=cuda_graphs) if cache.fills_blocks else None
        self.prefixes = KeptPrefixes(cache) if prefixes is None else prefixes
        self.preemptions = 0
        """How often a row had to give up its keys and values, in all."""
        self._waiting: deque[_Row] = deque()
        self._joining: dict[tuple[int, ...], list[_Row]] = {}
        """Tokens that are being read → the rows that begin with them; the first one's sequence reads for all."""
        self._rows: list[_Row] = []
        """Rows that are being decoded: in the order in which they joined, which is that of `_drawing`."""
        self._plan: DecodingAttention | None = None
        self._drafts: Drafts | None = None
        self._running = False

    def idle(self, *, most_rows: int) -> NativeDecoding:
        """Return a loop over the same cache that isn't running: this one, unless a call of it was begun and hasn't ended.

        Two streams at once, say, are two loops; each makes room in the cache with its own rows alone.
        """
        if self._running:
            # Graphs captured for it would be thrown away with it.
            return NativeDecoding(
                self.policy, self.cache, most_rows=most_rows, cuda_graphs=False, prefixes=self.prefixes
            )
        self.most_rows = most_rows
        return self

    def run(
        self,
        requests: Iterable[Request],
        sampling: SamplingConfig,
        *,
        partly: bool = False,
        drafts: Drafts | None = None,
    ) -> Generator[Finished]:
        """Yield completions in the order in which they end.

        Args:
            partly: yield every completion after each of its tokens, too; without drafts.
            drafts: guesses tokens that one pass verifies; None draws each in a pass of its own.

        Raises:
            NumbersError: the cache is too small for one completion.
        """
        with self.running(sampling, drafts=drafts):
            self.join(requests)
            while self.busy:
                yield from self.step(partly=partly)

    @contextlib.contextmanager
    def running(self, sampling: SamplingConfig, *, drafts: Drafts | None = None) -> Iterator[None]:
        """Let requests join inside the context, and `step` draw their tokens; at its end all leave."""
        if self._running:
            raise RuntimeError("this decoding loop is running: take an idle one")
        self._running = True
        try:
            self._head_weight = self.policy.head_weight()
            self._drawing, self._drafts = DrawnRows(sampling, device=self.policy.device), drafts
            if self._device_steps is not None:
                self._device_steps.begin()
            yield
        finally:
            for row in (*self._waiting, *(row for rows in self._joining.values() for row in rows), *self._rows):
                row.sequence.free()
            self._waiting.clear()
            self._joining, self._rows, self._plan, self._drafts = {}, [], None, None
            for name in ("_drawing", "_head_weight"):  # megabytes to gigabytes, that nothing needs until the next call
                vars(self).pop(name, None)
            if self._device_steps is not None:
                self._device_steps.end()
            self._running = False

    @property
    def busy(self) -> bool:
        """Whether some request hasn't got its last token."""
        return bool(self._waiting or self._joining or self._rows)

    def step(self, *, partly: bool = False) -> Iterator[Finished]:
        """Let waiting requests join, read some of their prompts' tokens, and draw a token for each row, or a few; see `run`."""
        self._admit()
        self._read_prompts()
        if self._rows:
            yield from self._decode_step(partly)

    def join(self, requests: Iterable[Request]) -> None:
        """Let requests wait for their turn to be decoded, behind those that wait already."""
        self._waiting.extend(_Row(request, list(request.ids), self._begin(request)) for request in requests)

    def leave(self, numbers: Collection[int]) -> None:
        """Take requests out, wherever they are, and free what is kept for them; others aren't affected."""
        for row in self._waiting:
            if row.request.number in numbers:
                row.sequence.free()
        self._waiting = deque(row for row in self._waiting if row.request.number not in numbers)
        for to_read, rows in list(self._joining.items()):
            staying = [row for row in rows if row.request.number not in numbers]
            for row in rows[1:]:
                if row not in staying:
                    row.sequence.free()
            if not staying:
                rows[0].sequence.free()
                del self._joining[to_read]
                continue
            if staying[0] is not rows[0]:  # whose sequence reads for all
                staying[0].sequence.free()
                staying[0].sequence = rows[0].sequence
            self._joining[to_read] = staying
        leaving = {index for index, row in enumerate(self._rows) if row.request.number in numbers}
        if leaving:
            for index in leaving:
                self._rows[index].sequence.free()
            self._remove(leaving)

    def _begin(self, request: Request) -> CachedSequence:
        return self.cache.new() if request.base is None else request.base.fork()

    # Joining

    @property
    def _active(self) -> int:
        return len(self._rows) + sum(map(len, self._joining.values()))

    def _admit(self) -> None:
        """Let waiting rows join, while there is room for their tokens and one block more for each row."""
        while self._waiting and (active := self._active) < self.most_rows:
            row = self._waiting[0]
            to_read = tuple(row.ids[:-1])
            if to_read not in self._joining and row.missing and not row.sequence.length:
                row.sequence.free()
                row.sequence = self.prefixes.fork_longest(to_read)
            # Those that are joining have yet to take their blocks: none may be promised twice.
            needed = 1 + active + sum(self.cache.blocks_for(rows[0].missing) for rows in self._joining.values())
            needed += 0 if to_read in self._joining else self.cache.blocks_for(row.missing)
            while self.cache.free_blocks < needed and self.prefixes.drop_oldest():
                pass
            if self.cache.free_blocks < needed and active:
                # What it shares stays droppable while it waits.
                row.sequence.free()
                row.sequence = self._begin(row.request)
                return
            self._waiting.popleft()
            self._joining.setdefault(to_read, []).append(row)

    def _read_prompts(self) -> None:
        """Read a bounded number of tokens of the rows that are joining; those whose tokens are all read begin to be decoded."""
        left = self._chunk * (1 if self._rows else CHUNKS_FIRST)
        chunks: list[tuple[CachedSequence, list[int]]] = []
        for rows in list(self._joining.values()):
            first = rows[0]
            count = min(left, first.missing)
            if not count:
                continue
            begin = first.sequence.length
            try:
                first.sequence.append(count)
            except OutOfBlocks:
                if not self._rows and not chunks:
                    self._make_room()
                break
            chunks.append((first.sequence, first.ids[begin : begin + count]))
            left -= count
        if chunks:
            self.read(chunks)
        for to_read in [key for key, rows in self._joining.items() if not rows[0].missing]:
            self._begin_decoding(to_read, self._joining.pop(to_read))

    def _begin_decoding(self, to_read: tuple[int, ...], rows: list[_Row]) -> None:
        """Let rows be decoded whose common tokens have been read by the first of them."""
        sequence = rows[0].sequence
        self.prefixes.keep(rows[0].request.ids[:-1], sequence)
        for row in rows[1:]:
            row.sequence.free()
            row.sequence = sequence.fork()
        self._rows += rows
        self._plan = None
        self._drawing.join([new_row(row.request, row.before) for row in rows])

    def read(self, chunks: Sequence[tuple[CachedSequence, Sequence[int]]]) -> Tensor:
        """Read tokens for which places were appended to sequences; return their hidden states (N, D), one after the other."""
        kind = ChunkAttention if self._device_steps is None else TableChunkAttention
        attention = kind(self.cache, [one for one, _ in chunks], [len(ids) for _, ids in chunks])
        ids = [token for _, tokens in chunks for token in tokens]
        positions = [at for one, tokens in chunks for at in range(one.length - len(tokens), one.length)]
        return self._forward(ids, positions, attention)

    def decode(self, chunks: Sequence[tuple[CachedSequence, Sequence[int]]]) -> Tensor:
        """Read a few tokens of each of many sequences, as `read` does; faster where they are few."""
        sequences, counts = [one for one, _ in chunks], [len(ids) for _, ids in chunks]
        if self._device_steps is not None or sum(counts) > MOST_TOGETHER * len(counts):
            return self.read(chunks)
        positions = [
            at for one, count in zip(sequences, counts, strict=True) for at in range(one.length - count, one.length)
        ]
        ids = [token for _, tokens in chunks for token in tokens]
        return self._forward(ids, positions, DecodingAttention(self.cache, sequences, counts))

    def next_logits(self, rows: Sequence[DeviceRow], *, weight: Tensor | None = None) -> Tensor:
        """Read one token of each row, and return the logits (R, V) of the tokens that follow.

        For whoever draws them himself; cheap while the rows stay the same.

        Args:
            rows: with a place appended for the token.
            weight: from `PolicyModel.head_weight`.
        """
        sequences = [row.sequence for row in rows]
        if self._device_steps is not None:
            self.cache.finish_copies()
            report_forwarded(len(rows), self.policy.network)
            hidden = self._device_steps.hidden(rows)
        else:
            if self._plan is None or self._plan.sequences != sequences or not self._plan.step():
                self._plan = DecodingAttention(self.cache, sequences)
            hidden = self._forward([row.token for row in rows], [row.position for row in rows], self._plan)
        return self.policy.next_token_logits(hidden, weight=weight)

    def _forward(self, ids: list[int], positions: list[int], attention: CachedAttention) -> Tensor:
        device = self.policy.device
        report_forwarded(len(ids), self.policy.network)
        both = torch.tensor([ids, positions]).to(device, non_blocking=True)
        return self.policy.shared_forward.forward_over_cache(both[0], both[1], attention)

    def forced_logits(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> Tensor:
        """Return the first prompt's logits (len(tokens), V), float32, while known tokens are decoded behind each prompt."""
        sequences = [self.cache.new() for _ in prompts]
        for one, ids in zip(sequences, prompts, strict=True):
            one.append(len(ids) - 1)
        self.read([(one, ids[:-1]) for one, ids in zip(sequences, prompts, strict=True)])
        # Two rows share the first prompt, as completions do.
        rows = [sequences[0].fork(), *sequences]
        last, logits = [prompts[0][-1], *(ids[-1] for ids in prompts)], []
        for token in tokens:
            for row in rows:
                row.append(1)
            positions = [row.length - 1 for row in rows]
            logits.append(self.next_logits(list(map(DeviceRow, last, positions, rows)))[0].float())
            last = [token] * len(rows)
        return torch.stack(logits)

    # Given tokens

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[CachedSequence]:
        """Read prompts and return a sequence for each; what a prompt has in common with an earlier one isn't read again.

        Raises:
            NumbersError: the cache is too small.
        """
        made: list[CachedSequence] = []
        with self._freed_on_error(made):
            for ids in prompts:
                made.append(self.prefixes.fork_longest(ids))
                self.catch_up([(made[-1], ids)])
                self.prefixes.keep(ids, made[-1])
        return made

    def catch_up(self, wanted: Sequence[tuple[CachedSequence, Sequence[int]]]) -> None:
        """Read what sequences lack of the tokens that they are to hold, a bounded number in each forward pass.

        Raises:
            NumbersError: the cache is too small.
        """
        chunks: list[tuple[CachedSequence, Sequence[int]]] = []
        left = self._chunk
        for sequence, ids in wanted:
            while count := min(left, len(ids) - sequence.length):
                begin, left = sequence.length, left - count
                self._append(sequence, count)
                chunks.append((sequence, ids[begin : begin + count]))
                if not left:
                    self.read(chunks)
                    chunks, left = [], self._chunk
        if chunks:
            self.read(chunks)

    def follow(
        self, sequences: Sequence[CachedSequence], whole: Sequence[Sequence[int]]
    ) -> list[tuple[CachedSequence, Tensor]]:
        """Read the tokens that follow those of sequences, all but the last, in one forward pass; the sequences stay as they are.

        Args:
            whole: for each sequence all its tokens, those that follow included.

        Returns:
            For each a new sequence, and the hidden states (T, D) of the tokens that were read.

        Raises:
            NumbersError: the cache is too small.
        """
        made: list[CachedSequence] = []
        with self._freed_on_error(made):
            counts = []
            for sequence, ids in zip(sequences, whole, strict=True):
                counts.append(len(ids) - 1 - sequence.length)
                made.append(sequence.fork())
                self._append(made[-1], counts[-1])
            following = [ids[-1 - count : -1] for ids, count in zip(whole, counts, strict=True)]
            hidden = self.read(list(zip(made, following, strict=True)))
        return list(zip(made, hidden.split(counts), strict=True))

    def _append(self, sequence: CachedSequence, count: int) -> None:
        while True:
            try:
                return sequence.append(count)
            except OutOfBlocks:
                self._make_room()

    @contextlib.contextmanager
    def _freed_on_error(self, made: list[CachedSequence]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for sequence in made:
                sequence.free()
            raise

    @property
    def _chunk(self) -> int:
        return CHUNK.get(self.policy.device.type, CHUNK["cpu"])

    # Decoding

    def _decode_step(self, partly: bool) -> Iterator[Finished]:
        """Draw a token for each row, or a few, and yield the completions that end with them; the others, too, where `partly`."""
        guesses = [] if self._drafts is None else self._guesses(self._drafts)
        # Where all rows with guesses have to leave, the others have places for one token.
        steps = 1 if any(guesses) else self._steps(partly)
        self._make_places([1 + len(ids) for ids in guesses] if any(guesses) else [steps] * len(self._rows))
        if not self._rows:  # the last one begins again
            return
        guesses = guesses[: len(self._rows)]  # those that joined last may have made room
        begin = time.perf_counter()
        if any(guesses):
            self._draw_behind(guesses)
        elif self._device_steps is None:
            self._draw()
        else:
            rows = [DeviceRow(row.ids[-1], len(row.ids) - 1, row.sequence) for row in self._rows]
            self._device_steps.run(rows, self._drawing, steps, self._logits)
            report_forwarded(len(rows) * steps, self.policy.network)
        ended = dict(self._drawing.ended())
        drawn = [self._drawing.fresh(index) for index in range(len(self._rows))]
        for row, tokens in zip(self._rows, drawn, strict=True):
            row.ids += tokens
        if self._drafts is not None:
            seconds = time.perf_counter() - begin
            self._note_drafts(self._drafts, guesses, drawn, seconds if any(guesses) else seconds / steps)
        report_tokens(sum(map(len, drawn)))
        for index, row in enumerate(self._rows):
            rule = row.request.rule
            if rule is not None and index not in ended and rule(row.ids[len(row.request.ids) :]):
                ended[index] = "rule"
        found = [
            self._drawn(index, UNFINISHED)
            for index, row in enumerate(self._rows)
            if (partly or row.request.partly) and index not in ended
        ]
        if ended:
            found += [self._drawn(index, reason) for index, reason in ended.items()]
            for index in ended:
                if not self._rows[index].request.keep:
                    self._rows[index].sequence.free()
            self._remove(set(ended))
        yield from found

    def _steps(self, partly: bool) -> int:
        """Return how many tokens to draw for each row before the host looks at them."""
        watched = partly or any(row.request.rule is not None or row.request.partly for row in self._rows)
        if self._device_steps is None or watched:
            return 1
        return min(STEPS, max(row.left for row in self._rows))

    def _guesses(self, drafts: Drafts) -> list[list[int]]:
        """Return the tokens that are guessed for each row: none where a rule looks at each token; [] without any look."""
        if not drafts.look(len(self._rows)):
            return []
        # Guesses take free blocks alone, of which each row keeps one for its next token.
        free, rows = self.cache.free_blocks - len(self._rows), []
        for index, row in enumerate(self._rows):
            room = min(drafts.most, row.left - 1, self._drawing.room_for_guesses(index))
            if row.request.rule is not None:
                room = 0
            while room > 0 and row.sequence.blocks_to_append(1 + room) > max(free, 0) + 1:
                room //= 2
            free -= max(0, row.sequence.blocks_to_append(1 + room) - 1)
            if row.draft is None:
                row.draft = drafts.drafter.begin(row.request.ids)
            uniform = self._drawing.uniform_of(index, room) if drafts.drafter.draws and room > 0 else NO_NUMBERS
            ends = (*row.request.ends, *self._drawing.sampling.stop_ids)
            rows.append(
                DraftRow(
                    ids=row.ids,
                    prompt_length=len(row.request.ids),
                    state=row.draft,
                    room=max(room, 0),
                    left=row.left,
                    ends=ends,
                    before_end=self._drawing.sampling.min_new_tokens - (row.request.limit - row.left),
                    uniform=uniform,
                )
            )
        return drafts.choose(rows, self._drawing.sampling, waiting=bool(self._waiting))

    def _draw_behind(self, guesses: Sequence[Sequence[int]]) -> None:
        """Draw a token for each row, and for those whose guesses are right as many more."""
        chunks = [(row.sequence, [row.ids[-1], *ids]) for row, ids in zip(self._rows, guesses, strict=True)]
        self._drawing.draw_behind(self._logits(self.decode(chunks)), guesses)
        self._plan = None

    def _note_drafts(
        self, drafts: Drafts, guesses: Sequence[Sequence[int]], drawn: Sequence[Sequence[int]], seconds: float
    ) -> None:
        """Let rows forget the keys and values of wrong guesses, and take note of what guesses did."""
        if not any(guesses):
            for row, tokens in zip(self._rows, drawn, strict=True):
                row.passes += len(tokens)
        else:
            for row, ids, tokens in zip(self._rows, guesses, drawn, strict=True):
                row.passes += 1
                if ids:
                    row.sequence.shorten(len(row.ids) - 1)
                    row.guessed += len(ids)
                    # Behind a guess that ends the row nothing more is drawn.
                    wrong = len(tokens) <= len(ids) and tokens[-1] != ids[len(tokens) - 1]
                    row.accepted += min(len(ids), len(tokens)) - wrong
        drafts.drawn(drawn, guesses, seconds)

    def _draw(self) -> None:
        """Draw a token for each row."""
        rows = [DeviceRow(row.ids[-1], len(row.ids) - 1, row.sequence) for row in self._rows]
        self._drawing.draw(self.next_logits(rows, weight=self._head_weight))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.policy.next_token_logits(hidden, weight=self._head_weight)

    def _drawn(self, index: int, reason: str) -> Finished:
        """Return what a row has drawn so far."""
        row, drawn = self._rows[index], self._drawing.completion(index)
        keep = row.request.keep and reason != UNFINISHED
        if keep and row.sequence.length >= len(row.ids):
            # Places were made for more tokens than were drawn before its end.
            longer, row.sequence = row.sequence, row.sequence.fork(len(row.ids) - 1)
            longer.free()
        counts = None
        if self._drafts is not None and reason != UNFINISHED:
            counts = DraftCounts(row.passes, len(drawn.ids), row.guessed, row.accepted)
            self._drafts.ended(row.request.ids, drawn.ids, counts)
        return Finished(row.request.number, drawn, reason, drawn.text, row.sequence if keep else None, counts)

    def _remove(self, indices: set[int]) -> None:
        """Take rows out of the loop."""
        kept = [index for index in range(len(self._rows)) if index not in indices]
        self._drawing.keep(kept)
        self._rows = [self._rows[index] for index in kept]
        self._plan = None

    # Memory

    def _make_places(self, counts: Sequence[int]) -> None:
        """Append places for so many next tokens of each row; rows that joined last make room where the cache is full."""
        index = 0
        while index < len(self._rows):
            row = self._rows[index]
            try:
                row.sequence.append(min(counts[index], row.left))
            except OutOfBlocks:
                self._make_room()
            else:
                index += 1

    def _make_room(self) -> None:
        """Free some blocks: drop a kept prompt, else send back the rows that joined last.

        Raises:
            NumbersError: one row has the whole cache, and it doesn't suffice.
        """
        if self.prefixes.drop_oldest():
            return
        if not self._rows and not self._joining:  # given tokens are being read
            self._leave_room_for(None)
            return
        # Rows that join together read their common tokens once.
        last = len(self._rows) + len(self._joining) <= 1
        if self._joining:
            _, victims = self._joining.popitem()
        else:
            victims = [self._rows[-1]]
            victims[0].before = self._drawing.completion(len(self._rows) - 1)
            self._remove({len(self._rows) - 1})
        for row in reversed(victims):
            row.sequence.free()
            row.sequence = self._begin(row.request)
            self._waiting.appendleft(row)
        self.preemptions += len(victims)
        if last:
            self._leave_room_for(victims[0])

    def _leave_room_for(self, row: _Row | None) -> None:
        """Drop every kept prompt, so that a row that needs the whole cache begins alone in it.

        A kept prompt holds its blocks as long as anyone shares its first ones.

        Args:
            row: the row; None for given tokens.

        Raises:
            NumbersError: the cache is too small even so.
        """
        free = self.cache.free_blocks
        self.prefixes.clear()
        # A row reads its tokens again, and draws at least one more in a block of its own.
        if self.cache.free_blocks > (free if row is None else self.cache.blocks_for(row.missing)):
            return
        tokens, others = self.cache.capacity * self.cache.block_size, self.cache.num_sequences - len(self._waiting)
        raise NumbersError(
            "the memory for keys and values doesn't suffice for one completion", place="generation",
            got=f"room for {tokens:,} tokens" + (f", shared with {others} other sequences" if others > 0 else ""),
            fix="shorten prompts or `max_new_tokens`, free sequence handles, or allow more memory",
        )  # fmt: skip


# Which models it knows


def new_cache(blocks: int, block_size: int, device: torch.device) -> PagedKVCache:
    """Return a cache in the order that attention on its device reads."""
    if device.type in DEVICES:
        return PagedKVCache(blocks, block_size, device, order="tokens", fills_blocks=True)
    return PagedKVCache(blocks, block_size, device)


@dataclass(frozen=True)
class NativeFacts:
    """What was measured about decoding a policy over a `PagedKVCache`."""

    obstacle: str | None
    """Why it can't be, in words; None where it gives the logits that the policy is trained on."""
    elements: int = 0
    """Numbers per token in all layers' keys and values."""


@torch.no_grad()
def measure_native(policy: PolicyModel) -> NativeFacts:
    """Decode a few known tokens of a policy over a cache, and compare their logits with those of one plain forward pass."""
    probed = policy.probe_result
    if probed.arrangement != "packed":
        return NativeFacts(
            "its attention can't be replaced (" + probed.obstacles.get("packed", "rows are padded") + ")"
        )
    if policy.shared_forward.depends_on_length:
        return NativeFacts("its positions depend on a sequence's length")
    ids = plain_ids(policy.network, 15)
    first, second, tokens = ids[:4].tolist(), ids[4:12].tolist(), ids[12:].tolist()
    cache = new_cache(16, 4, policy.device)
    decoding = NativeDecoding(policy, cache, most_rows=2)
    flash, kind = policy.attention.kernel == "flash", policy.device.type
    try:
        with (
            uncounted(),
            evaluating(policy),
            exact_products(policy.network),
            torch.autocast(kind, dtype=policy.precision, enabled=flash),
        ):
            wanted = forward_logits(policy, first, tokens)
            found = decoding.forced_logits([first, second], tokens)
    except FAILURES as error:
        return NativeFacts(describe_error(error, lines=1))
    difference = deviation(found, wanted)
    if not difference < (3e-2 if flash else 1e-4):
        return NativeFacts(f"its logits differ by {difference:.0e} (relative)")
    return NativeFacts(None, cache.elements_per_token)
