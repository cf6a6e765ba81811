"""Hidden states of growing sequences by any model whose attention can be replaced: each token is read once.

What reads here needs no output layer, so a process reward or value model is read as a policy is decoded: over a `PagedKVCache`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.generation.block_table_attention import KERNEL_BLOCK, TableChunkAttention
from rlhf_core.generation.cached_attention import ChunkAttention
from rlhf_core.generation.memory import free_bytes
from rlhf_core.generation.native import new_cache
from rlhf_core.generation.paged_cache import CachedSequence, OutOfBlocks, PagedKVCache
from rlhf_core.infra.errors import NumbersError, describe_error
from rlhf_core.models.backbone import accepted, hidden_of, plain_ids
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.patches import turn_of
from rlhf_core.models.precision import exact_products
from rlhf_core.models.probe import FAILURES, deviation
from rlhf_core.models.sequence_model import SequenceModel

BLOCKS = 64
"""Blocks of a new cache; it grows as it needs to."""
SMALL_BLOCK = 16
"""Tokens per block on a CPU: a step has a few tens of tokens, and each fork begins a block of its own."""


class KeptStates:
    """Reads tokens behind what was read before, and returns their last hidden states.

    The weights must not change while anything is kept. Only for a model for which `measure_reading` finds no obstacle.

    Args:
        most_tokens: most tokens in one forward pass.
        memory: most bytes for keys and values; None takes what `free_bytes` allows.
    """

    def __init__(self, model: SequenceModel, *, most_tokens: int, memory: int | None = None) -> None:
        self.model, self.most_tokens = model, most_tokens
        self.forwarded = 0
        """Tokens that the model was run on."""
        size = KERNEL_BLOCK if model.device.type == "cuda" else SMALL_BLOCK
        self.cache = new_cache(BLOCKS, size, model.device)
        number = 4 if model.precision == torch.float32 else 2
        bytes_per_block = model.measured(measure_reading).elements * size * number
        room = free_bytes(model.device) if memory is None else memory
        self._most_blocks = max(BLOCKS, room // max(1, bytes_per_block))

    @torch.no_grad()
    def read(
        self, kept: Sequence[CachedSequence | None], tokens: Sequence[Sequence[int]]
    ) -> tuple[list[CachedSequence], Tensor]:
        """Read tokens behind sequences, which stay as they are.

        Args:
            kept: what was read before; None begins a sequence.
            tokens: for each sequence, at least one id.

        Returns:
            The longer sequences, and the hidden state (R, D) of the last token of each.

        Raises:
            NumbersError: memory doesn't suffice.
        """
        made = [self.cache.new() if one is None else one.fork() for one in kept]
        last: list[Tensor | None] = [None] * len(made)
        left = deque((number, list(ids)) for number, ids in enumerate(tokens))
        with _reading(self.model):
            while left:
                chunk, room = [], self.most_tokens
                while left and room:
                    number, ids = left.popleft()
                    part, rest = ids[:room], ids[room:]
                    self._append(made[number], len(part))
                    chunk.append((number, part))
                    room -= len(part)
                    if rest:
                        left.appendleft((number, rest))
                hidden = _forward(self.model, self.cache, [(made[number], part) for number, part in chunk])
                self.forwarded += len(hidden)
                for (number, _), states in zip(chunk, hidden.split([len(part) for _, part in chunk]), strict=True):
                    last[number] = states[-1]
        return made, torch.stack([one for one in last if one is not None])

    def _append(self, sequence: CachedSequence, count: int) -> None:
        """Make places for tokens behind a sequence, in a larger cache where this one is full."""
        try:
            return sequence.append(count)
        except OutOfBlocks:
            self.cache.grow(min(self._most_blocks, 2 * self.cache.capacity + self.cache.blocks_for(count)))
        try:
            return sequence.append(count)
        except OutOfBlocks as error:
            raise NumbersError(
                "the memory for keys and values of the process reward doesn't suffice", place="search",
                got=f"room for {self.cache.capacity * self.cache.block_size:,} tokens",
                fix="search fewer prompts at once, or set smaller limits",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class ReadingFacts:
    """What was measured about reading a model over a `PagedKVCache`."""

    obstacle: str | None
    """Why it can't be, in words; None where it gives the hidden states of a plain forward pass."""
    elements: int = 0
    """Numbers per token in all layers' keys and values."""


@torch.no_grad()
def measure_reading(model: SequenceModel) -> ReadingFacts:
    """Read a few known tokens in two parts over a cache, and compare the hidden states with those of one forward pass."""
    probed = model.probe_result
    if probed.arrangement != "packed":
        return ReadingFacts("its attention can't be replaced")
    if model.shared_forward.depends_on_length:
        return ReadingFacts("its positions depend on a sequence's length")
    if probed.window is not None:
        return ReadingFacts("it has a sliding window")
    ids = plain_ids(model.network, 15).tolist()
    cache = new_cache(16, 4, model.device)
    flash, kind = model.attention.kernel == "flash", model.device.type
    try:
        with (
            evaluating(model),
            exact_products(model.network),
            torch.autocast(kind, dtype=model.precision, enabled=flash),
        ):
            backbone, whole = model.backbone, torch.tensor([ids], device=model.device)
            wanted = hidden_of(backbone(input_ids=whole, **accepted(backbone.forward, use_cache=False)))[0].float()
            sequence, found = cache.new(), []
            for part in (ids[:6], ids[6:]):
                sequence.append(len(part))
                found.append(_forward(model, cache, [(sequence, part)]).float())
    except FAILURES as error:
        return ReadingFacts(describe_error(error, lines=1))
    difference = deviation(torch.cat(found), wanted)
    if not difference < (3e-2 if flash else 1e-4):
        return ReadingFacts(f"its hidden states differ by {difference:.0e} (relative)")
    return ReadingFacts(None, cache.elements_per_token)


def _forward(model: SequenceModel, cache: PagedKVCache, chunks: Sequence[tuple[CachedSequence, list[int]]]) -> Tensor:
    """Return the hidden states (N, D) of tokens for which places were appended to sequences, one after the other."""
    kind = TableChunkAttention if cache.fills_blocks else ChunkAttention
    attention = kind(cache, [one for one, _ in chunks], [len(ids) for _, ids in chunks])
    ids = [token for _, tokens in chunks for token in tokens]
    positions = [at for one, tokens in chunks for at in range(one.length - len(tokens), one.length)]
    both = torch.tensor([ids, positions]).to(model.device)
    return model.shared_forward.forward_over_cache(both[0], both[1], attention)


@contextlib.contextmanager
def _reading(model: SequenceModel) -> Iterator[None]:
    with turn_of(model.network), evaluating(model), model.product_precision():
        yield
