"""Map-style datasets: all rows read, checked and encoded when they are opened, and held as memory-mapped Arrow."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch.utils.data

from rlhf_core.data.encoded_chunks import encoded_chunks
from rlhf_core.data.encoded_data import EncodedData, Position
from rlhf_core.data.encoder import EncodedRow, RowOutcome
from rlhf_core.data.row_cache import CacheEntry, Write, encoded_table
from rlhf_core.infra.forked_calls import may_fork, usable_processors
from rlhf_core.infra.seeds import random_generator

logger = logging.getLogger(__name__)

_FETCH = 256

SERIAL = 4 << 20
"""Data of less bytes are encoded by this process alone: it takes a second or two."""
MOST = 8
"""Processes that encode where `dataset.processes` doesn't say how many."""
SMALL = 256 << 10
"""Data of at most so many bytes stay in memory and aren't cached: tokenising them takes well under a second."""


class MapDataset(EncodedData, torch.utils.data.Dataset[EncodedRow]):
    """All rows, by number: `len(dataset)`, `dataset[i]`. Tokenised rows are kept in the datasets library's cache."""

    def _read(self) -> None:
        """Load all rows from the cache, or encode them."""
        small = self.source.size <= SMALL
        rows = encoded_table(None if small else self._cache_entry(), self._encode, in_memory=small)
        self.table, self._directory = rows.table, rows.directory
        self.fingerprint = rows.summary["fingerprint"]
        if rows.cached:
            self.encoder.load_state_dict(rows.summary["encoder"])
            self.report.load_state_dict(rows.summary["report"])
            self.report.repeat_log()
        elif self._changed():
            logger.warning(
                "%s: the data changed while they were read, so their hash in the report may be of other contents",
                self.source.name,
            )

    def _encode(self, write: Write) -> dict[str, Any]:
        """Read, check and encode all rows, hand them to `write`, and return what was reported, to be kept with them."""
        digest = hashlib.sha256()
        self.report.reset()
        with closing(encoded_chunks(self.encoder, self.source.rows(), self._processes(), self.options)) as chunks:
            for chunk in chunks:
                self.report.merge(chunk.report)
                digest.update(chunk.digest)
                write(chunk.batch)
        self.report.finish()
        return {
            "fingerprint": digest.hexdigest(),
            "encoder": self.encoder.state_dict(),
            "report": self.report.state_dict(),
        }

    def _processes(self) -> int:
        """Return how many processes encode the rows: 1 is this process alone."""
        asked = self.options.processes
        if asked is None:
            asked = 1 if self.source.size < SERIAL else min(usable_processors(), MOST)
        if asked > 1 and not may_fork():
            # Of a number that was asked for, it is said; the automatic one is only a matter of speed.
            level = logging.INFO if self.options.processes is None else logging.WARNING
            logger.log(
                level,
                "%s: one process encodes the rows: this one has other threads, and isn't forked",
                self.source.name,
            )
            return 1
        return asked

    def _cache_entry(self) -> CacheEntry | None:
        """Return the rows' place in the cache; None where caching is off, or data or tokenizer have no content fingerprint."""
        import datasets

        encoder, files = self.encoder.identity(), self.report.files
        if encoder is None or not datasets.is_caching_enabled() or not all("sha256" in file for file in files):
            return None
        options = self.options.model_dump(
            mode="json",
            exclude={"shuffle", "shuffle_block", "streaming", "split", "eval_split", "processes"},
        )
        # Rows of each group count on their own, so their numbers follow from the groups; which shares these have changes no row.
        groups = [list(parts) for _, parts in self.source.groups]
        made_from = {"data": files, "groups": groups, "encoder": encoder, "options": options}
        return CacheEntry(self.record, made_from, unchanged=lambda: not self._changed())

    def _changed(self) -> bool:
        """Return whether the data were written since they were opened."""
        return self.source.state() != self.source_state

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> EncodedRow:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self.rows([number % len(self)])[0]

    def rows(self, numbers: Sequence[int]) -> list[EncodedRow]:
        """Return the rows of these numbers, in this order."""
        found = self.table[list(numbers)]
        columns = map(json.loads, found["columns"])
        ids = zip(found["index"], found["prompt_ids"], found["responses"], found["masks"], strict=True)
        return [EncodedRow(*row, *other) for row, other in zip(ids, columns, strict=True)]

    @property
    def num_rows(self) -> int:
        return len(self)

    def walk(
        self, epoch: int, *, seed: int, shuffle: bool, position: Position, parts: Collection[int] | None = None
    ) -> Iterator[tuple[RowOutcome, Position]]:
        numbers = np.arange(len(self)) if parts is None else self._rows_of(parts)
        key = (seed, epoch) if parts is None else (seed, epoch, 2, min(parts))
        order = numbers[random_generator(*key).permutation(len(numbers))] if shuffle else numbers
        for first in range(position[0] if position else 0, len(order), _FETCH):
            for number, row in enumerate(self.rows(order[first : first + _FETCH].tolist()), first + 1):
                yield RowOutcome("", row), [number]

    def _rows_of(self, parts: Collection[int]) -> np.ndarray:
        """Return the numbers of the rows that some parts of the data gave, in order."""
        names = [part.entry.name if part.entry is not None else "" for part in self.source.parts]
        kept = [self.report.entries[name]["kept"] for name in names]
        ends = list(itertools.accumulate(kept, initial=0))
        return np.concatenate([np.arange(ends[part], ends[part + 1]) for part in sorted(parts)])
