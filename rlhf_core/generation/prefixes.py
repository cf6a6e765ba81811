"""Prompts whose keys and values are kept, found again by what a new prompt begins with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from rlhf_core.generation.paged_cache import CachedSequence, PagedKVCache

STRIDE = 16
"""A kept prompt is found by its first 16, 32, 48 … tokens; shorter common beginnings aren't worth sharing."""
MOST_KEPT = 64
"""Prompts that are kept at once, those in use not counted."""


class KeptPrefixes:
    """Sequences in a cache by the tokens that they begin with, the least recently used first to go."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        self._kept: OrderedDict[tuple[int, ...], CachedSequence] = OrderedDict()
        self._by_beginning: dict[int, dict[tuple[int, ...], None]] = {}
        """Hash of a beginning → the kept prompts that begin so, in the order in which they were kept."""

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[CachedSequence]:
        return iter(self._kept.values())

    def fork_longest(self, ids: Sequence[int]) -> CachedSequence:
        """Return a new sequence with as many of these tokens as some kept sequence begins with; empty where none does."""
        if (exact := self._kept.get(tuple(ids))) is not None:
            self._kept.move_to_end(tuple(ids))
            return exact.fork()
        found: tuple[int, ...] | None = None
        for beginning in _beginnings(ids):
            if beginning not in self._by_beginning:
                break
            found = next(reversed(self._by_beginning[beginning]))
        if found is None:
            return self._cache.new()
        self._kept.move_to_end(found)
        shared = next(
            (at for at, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids))
        )
        return self._kept[found].fork(shared)

    def keep(self, ids: Sequence[int], sequence: CachedSequence) -> None:
        """Keep these tokens, with which a sequence begins, besides whoever else holds it."""
        key = tuple(ids)
        if key in self._kept or not key:
            return
        while len(self._kept) >= MOST_KEPT and self.drop_oldest():
            pass
        self._kept[key] = sequence.fork(len(key))
        for beginning in _beginnings(key):
            self._by_beginning.setdefault(beginning, {})[key] = None

    def drop_oldest(self) -> bool:
        """Give up the sequence, of those that nobody else holds, that was used least recently; return whether there was one."""
        key = next((key for key, sequence in self._kept.items() if sequence.stretch.holders == 1), None)
        if key is not None:
            self._drop(key)
        return key is not None

    def _drop(self, key: tuple[int, ...]) -> None:
        self._kept.pop(key).free()
        for beginning in _beginnings(key):
            sharing = self._by_beginning[beginning]
            del sharing[key]
            if not sharing:
                del self._by_beginning[beginning]

    def clear(self) -> None:
        """Give up all sequences."""
        for key in list(self._kept):
            self._drop(key)


def _beginnings(ids: Sequence[int]) -> Iterator[int]:
    """Yield a hash of the first 16, 32, 48 … tokens."""
    found = 0
    for end in range(STRIDE, len(ids) + 1, STRIDE):
        found = hash((found, tuple(ids[end - STRIDE : end])))
        yield found
