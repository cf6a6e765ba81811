"""Soft tokens: token ids beyond every vocabulary that stand for embeddings of their own.

Whatever takes token ids (packed rows, caches, prefixes that are kept, the engine) then takes embeddings, too. `with_soft_tokens`
puts embeddings beside a network's own for a forward pass, with gradients; a `SoftVocabulary` keeps those of compressed contexts,
under ids that follow from the contexts.

Axes: N soft tokens, E the width of the network's embeddings.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SOFT = 1 << 40
"""The first soft token's id."""
_PLACES = 20
"""Bits of an id that are a soft token's place in its context; the others are the context's."""
LARGEST = 256 << 20
"""Bytes of embeddings from which on a `SoftVocabulary` forgets the contexts that it has had longest."""


@contextlib.contextmanager
def with_soft_tokens(network: Any, rows: Tensor) -> Iterator[int]:
    """Let the ids from `SOFT` on, which is yielded, stand for given embeddings inside the context.

    The embeddings are used as they are: a factor that a network applies to its own (as Gemma's do) isn't applied to them.
    Gradients flow into them.

    Args:
        network: a transformers model.
        rows: (N, E) the embedding of the id `SOFT + i` is row i.

    Raises:
        ValueError: the rows have another width than the embeddings.
        RuntimeError: other soft tokens are beside these embeddings already.
    """
    _check_width(network, rows)
    _put_beside(network, rows.__getitem__)
    try:
        yield SOFT
    finally:
        end_soft_tokens(network)


class SoftVocabulary:
    """Embeddings of compressed contexts, which a network reads by their ids from `attach` on.

    A context of the same name has the same ids whenever and wherever it is compressed: so prefixes of prompts that are kept stay
    right, and seeds that follow from a prompt's ids are the same after a restart.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        """First id → embeddings (N, E) of its context, the oldest first."""
        self._table: tuple[Tensor, Tensor] | None = None
        """All ids (N,) in increasing order, and their embeddings (N, E)."""

    @staticmethod
    def ids_of(name: str, count: int) -> range:
        """Return the ids of the context of a name, which must say all that its embeddings depend on, for so many soft tokens."""
        if count >= 1 << _PLACES:
            raise ValueError(f"a context has fewer than {1 << _PLACES} soft tokens, got {count}")
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 22  # 42 bits
        first = SOFT + (digest << _PLACES)
        return range(first, first + count)

    def __contains__(self, ids: range) -> bool:
        return not len(ids) or (ids.start in self._kept and len(self._kept[ids.start]) == len(ids))

    def __getitem__(self, ids: range) -> Tensor:
        """Return the embeddings (N, E) of a context's ids."""
        return self._kept[ids.start]

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftVocabulary:
        """Return the same one: its ids say what they stand for, whoever reads them."""
        return self

    def add(self, given: dict[range, Tensor], *, used: Iterable[range] = ()) -> None:
        """Keep the embeddings (N, E) of contexts by their ids; forget the oldest others where there would be too many.

        Args:
            used: ids of further contexts that are about to be read; they are kept, too.
        """
        needed = {ids.start: self._kept.pop(ids.start) for ids in used if ids.start in self._kept}
        needed |= {ids.start: rows for ids, rows in given.items() if len(ids)}
        self._kept |= needed
        size = sum(rows.numel() * rows.element_size() for rows in self._kept.values())
        for first in [first for first in self._kept if first not in needed]:
            if size <= LARGEST:
                break
            rows = self._kept.pop(first)
            size -= rows.numel() * rows.element_size()
        self._table = None

    def attach(self, network: Any) -> None:
        """Let a network read these soft tokens, until `end_soft_tokens`.

        Raises:
            RuntimeError: it reads others already.
        """
        for hooks, key in _hooks(network.get_input_embeddings()):
            if getattr(hooks[key].__self__.rows_of, "__self__", None) is self:
                return  # another model of the same network has let it
        _put_beside(network, self._rows)

    def _rows(self, indices: Tensor) -> Tensor:
        """Return the embeddings (..., E) of ids less `SOFT`; of 0, which stands for ordinary tokens, any row."""
        if not self._kept:
            raise RuntimeError("no context has been compressed")
        if self._table is None or self._table[0].device != indices.device:
            order = sorted(self._kept)
            ids = torch.cat([torch.arange(first, first + len(self._kept[first])) for first in order])
            rows = torch.cat([self._kept[first] for first in order])
            self._table = (ids.to(indices.device) - SOFT, rows.to(indices.device))
        known, rows = self._table
        at = torch.searchsorted(known, indices.contiguous()).clamp(max=len(known) - 1)
        if bool(((known[at] != indices) & (indices > 0)).any()):
            raise RuntimeError(
                "a prompt has soft tokens of a context that was forgotten, or compressed for another model"
            )
        return rows[at]


def reads_soft_tokens(network: Any) -> bool:
    """Return whether a network reads soft tokens at the moment."""
    return bool(_hooks(network.get_input_embeddings()))


def end_soft_tokens(network: Any) -> None:
    """Let a network read nothing but its own tokens again."""
    embedding = network.get_input_embeddings()
    for hooks, key in _hooks(embedding):
        del hooks[key]


class _Hidden:
    """Lets an embedding read id 0 in the place of each soft token, and puts the soft tokens' embeddings there afterwards.

    It is an object, so that a copy of the network reads what the network reads.
    """

    def __init__(self, rows_of: Callable[[Tensor], Tensor]) -> None:
        self.rows_of = rows_of
        self.found: list[Tensor | None] = []

    def hide(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        ids = given[0]
        soft = ids >= SOFT
        # A decoding step has none, and no graph that is captured from one may depend on the embeddings of this moment.
        if (ids.is_cuda and torch.cuda.is_current_stream_capturing()) or not bool(soft.any()):
            self.found.append(None)
            return None
        self.found.append(ids)
        return (ids.masked_fill(soft, 0), *given[1:])

    def put(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        ids = self.found.pop()
        if ids is None:
            return None
        rows = self.rows_of((ids - SOFT).clamp(min=0)).to(output.dtype)
        return torch.where((ids >= SOFT)[..., None], rows, output)


def _hooks(embedding: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """Return where the hooks are that let an embedding read soft tokens."""
    both = (embedding._forward_pre_hooks, embedding._forward_hooks)
    return [
        (hooks, key)
        for hooks in both
        for key, hook in list(hooks.items())
        if isinstance(getattr(hook, "__self__", None), _Hidden)
    ]


def _check_width(network: Any, rows: Tensor) -> None:
    width = network.get_input_embeddings().weight.shape[1]
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"soft tokens must be of shape (N, {width}), got {tuple(rows.shape)}")


def _put_beside(network: Any, rows_of: Callable[[Tensor], Tensor]) -> None:
    """Let a network read soft tokens.

    Args:
        rows_of: maps ids less `SOFT`, those of ordinary tokens as 0, to embeddings (..., E).
    """
    if reads_soft_tokens(network):
        raise RuntimeError("the network reads other soft tokens at the moment")
    hidden, embedding = _Hidden(rows_of), network.get_input_embeddings()
    embedding.register_forward_pre_hook(hidden.hide)
    embedding.register_forward_hook(hidden.put)
