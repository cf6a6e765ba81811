"""Drafts by a smaller model with the policy's tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rlhf_core.config.sampling_options import SamplingConfig
from rlhf_core.generation.drafting import NONE, Drafter, DraftRow, Guesses
from rlhf_core.generation.memory import MOST_ROWS
from rlhf_core.generation.native import NativeDecoding, measure_native
from rlhf_core.generation.native_backend import NativeBackend
from rlhf_core.generation.paged_cache import CachedSequence, OutOfBlocks
from rlhf_core.generation.requests import Request
from rlhf_core.generation.sampling import Barred, Drawn, draw_tokens, exact_dtype
from rlhf_core.generation.watching import counting_forwarded
from rlhf_core.infra.errors import ModelError
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.models.same_vocabulary import check_same_vocabulary

CLASSES = 10
"""A guess's kind is its probability by the draft model, in so many classes."""


@dataclass
class _DraftText:
    """What the draft model has read of one row."""

    read: list[int] = field(default_factory=list)
    """The tokens whose keys and values are kept; those that were guessed may prove wrong."""
    sure: int = 0
    """The first so many can't."""
    sequence: CachedSequence | None = None

    def catch_up(self, ids: Sequence[int]) -> list[int]:
        """Give up what was guessed wrong, and return the tokens that are to be read now, the last one at least."""
        kept = min(self.sure, len(ids) - 1)
        while kept < min(len(self.read), len(ids) - 1) and self.read[kept] == ids[kept]:
            kept += 1
        if self.sequence is not None and kept < self.sequence.length:
            self.sequence.shorten(kept)
        del self.read[kept:]
        self.sure = len(ids)
        return list(ids[kept:])


class ModelDrafter(Drafter):
    """Guesses by drawing from a draft model, with the random numbers with which the policy draws.

    With the same random number two similar distributions mostly give the same token, at any temperature.

    Args:
        draft: a model of the policy's vocabulary.
        policy: the model whose tokens are guessed.
        counted: called with the number of tokens of each forward pass of the draft model.

    Raises:
        ModelError: the models' vocabularies differ, or the draft's attention can't be replaced: guesses would cost more than
            they save.
    """

    def __init__(
        self, draft: PolicyModel, policy: PolicyModel, *, counted: Callable[[int], None] | None = None
    ) -> None:
        check_same_vocabulary("draft_model", draft, policy, main_is="the model that it drafts for")
        if (obstacle := draft.measured(measure_native).obstacle) is not None:
            raise ModelError(
                f"the model can't draft: {obstacle}", place=draft.source, fix="use another one, or `draft: ngram`"
            )
        self.draft = draft
        self._size = policy.network.config.get_text_config().vocab_size
        self._backend = NativeBackend(draft, memory=None, most_rows=MOST_ROWS)
        self._counted = counted
        self._native: NativeDecoding | None = None
        self._head_weight: Tensor | None = None

    @contextlib.contextmanager
    def running(self, requests: Sequence[Request]) -> Iterator[None]:
        """Put the draft model into the state in which it decodes, with room for some requests."""
        with self._counting(), self._backend.lending(requests) as self._native:
            self._head_weight = self.draft.head_weight()
            try:
                yield
            finally:
                self._native = self._head_weight = None

    def _counting(self) -> contextlib.AbstractContextManager[None]:
        if self._counted is None:
            return contextlib.nullcontext()
        return counting_forwarded(self._counted, of=self.draft.network)

    def begin(self, prompt: Sequence[int]) -> _DraftText:
        return _DraftText()

    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        """Draw up to `most` tokens per row, in as many passes over all rows."""
        found = [NONE for _ in rows]
        if self._native is None:  # sequences are longer than its window
            return found
        active: list[tuple[int, list[int]]] = []
        for number, row in enumerate(rows):
            if min(most, row.room) > 0 and (unread := self._unread(row)) is not None:
                found[number] = Guesses([], [])
                active.append((number, unread))
        for depth in range(most):
            active = [
                (number, ids)
                for number, ids in active
                if depth < rows[number].room and self._has_places(rows[number].state, len(ids))
            ]
            if not active:
                break
            logits = self._logits([(rows[number].state, ids) for number, ids in active])
            drawn = self._draw(logits, [rows[number] for number, _ in active], depth, sampling)
            certain = sampling.temperature == 0  # then a drawn token's probability is 1, which says nothing
            likely = (drawn.raw_logprobs if certain else drawn.logprobs).exp().tolist()
            following = []
            for (number, _), token, share in zip(active, drawn.tokens.tolist(), likely, strict=True):
                if token < self._size:  # a padded table has rows that the policy lacks
                    found[number].ids.append(token)
                    found[number].kinds.append(min(int(share * CLASSES), CLASSES - 1))
                    if token not in rows[number].ends:
                        following.append((number, [token]))
            active = following
        return found

    def _draw(self, logits: Tensor, rows: Sequence[DraftRow], depth: int, sampling: SamplingConfig) -> Drawn:
        """Draw the token of each row that is `depth` tokens ahead, as the policy draws it but for the repetition penalty."""
        device = logits.device
        uniform = torch.from_numpy(np.array([row.uniform[depth] for row in rows])).to(device, exact_dtype(device))
        barred = None
        ends = sorted({token for row in rows if depth < row.before_end for token in row.ends})
        if ends:
            mask = [[depth < row.before_end and token in row.ends for token in ends] for row in rows]
            barred = Barred(torch.tensor(ends, device=device), torch.tensor(mask, device=device))
        return draw_tokens(logits, uniform, sampling, barred=barred)

    def _unread(self, row: DraftRow) -> list[int] | None:
        """Return the tokens of a row that are to be read now; None where memory doesn't suffice for its prompt."""
        text: _DraftText = row.state
        assert self._native is not None
        if text.sequence is not None and text.sequence.cache is not self._native.cache:
            text.read, text.sure, text.sequence = [], 0, None  # the draft model's weights have changed
        if text.sequence is None:
            before = row.ids[: row.prompt_length - 1]
            if self._native.cache.free_blocks <= self._native.cache.blocks_for(len(before)):
                return None
            (text.sequence,) = self._native.prefill([before])
            text.read = list(before)
        return text.catch_up(row.ids)

    def _has_places(self, text: _DraftText, count: int) -> bool:
        """Append places for tokens; return False, and forget the text, where the cache is full."""
        assert text.sequence is not None and self._native is not None
        while True:
            try:
                text.sequence.append(count)
            except OutOfBlocks:
                if not self._native.prefixes.drop_oldest():
                    text.read, text.sure, text.sequence = [], 0, None
                    return False
            else:
                return True

    def _logits(self, chunks: Sequence[tuple[_DraftText, list[int]]]) -> Tensor:
        """Return the logits (R, V) behind the last token of each text, given the tokens to be read, which have places."""
        assert self._native is not None
        hidden = self._native.decode([(text.sequence, ids) for text, ids in chunks if text.sequence is not None])
        for text, ids in chunks:
            text.read += ids
        ends = torch.tensor([len(ids) for _, ids in chunks], device=hidden.device).cumsum(0) - 1
        return self.draft.next_token_logits(hidden[ends], weight=self._head_weight)
