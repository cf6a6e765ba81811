"""Streaming datasets: the same rows as the map-style ones, read and encoded as they are needed.

Rows are shuffled within blocks. A block's order is a function of (seed, epoch, block), and the boundaries between blocks move
from epoch to epoch. So the state of a stream is a position: to resume, one block is read again, and no shuffle buffer is saved.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator
from typing import ClassVar

import torch.utils.data

from rlhf_core.data.encoded_data import EncodedData, Position, add_to_hash
from rlhf_core.data.encoder import EncodedRow, RowOutcome
from rlhf_core.data.row_source import Cursor
from rlhf_core.infra.seeds import random_generator

_ENCODE = 64
_PROBE = 16


class StreamingDataset(EncodedData, torch.utils.data.IterableDataset[EncodedRow]):
    """Rows one after the other. Every process reads all of them; `DataStream` gives each process its share."""

    streaming: ClassVar[bool] = True

    def _read(self) -> None:
        """Encode the first rows, and make the fingerprint of them, of the options and of the ends of the files."""
        options = [
            self.record,
            self.encoder.max_length,
            self.options.model_dump(
                exclude={"shuffle", "strict", "split", "eval_split", "ignore_columns", "processes"}
            ),
        ]
        identity = [{**file, "name": None} for file in self.report.files]
        digest = hashlib.sha256(json.dumps([options, identity], sort_keys=True).encode())
        # The first rows are encoded now: a wrong column is an error at once, and the ids tell tokenizers and templates apart.
        for outcome in self.encoder.encode(list(itertools.islice(self.source.rows(), _PROBE))):
            if outcome.row is not None:
                add_to_hash(digest, outcome.row)
        self.fingerprint = digest.hexdigest()

    def __iter__(self) -> Iterator[EncodedRow]:
        """Yield the rows in the data's order. The first complete pass fills the report."""
        counted = self.report.rows == 0
        for outcome, _ in self.walk(0, seed=0, shuffle=False, position=[]):
            if counted:
                self.report.add(outcome, strict=self.options.strict)
            if outcome.row is not None:
                yield outcome.row
        if counted:
            self.report.finish()

    @property
    def num_rows(self) -> int | None:
        return self.report.kept if self.report.complete else None

    def walk(
        self, epoch: int, *, seed: int, shuffle: bool, position: Position, parts: Collection[int] | None = None
    ) -> Iterator[tuple[RowOutcome, Position]]:
        # A position: the block's number, the cursor at its beginning, rows taken from it, and outcomes taken of the next row.
        block, cursor, taken, within = position or (0, Cursor(), 0, 0)
        cursor = Cursor(*cursor)
        rows = self.source.rows(cursor, parts=parts)
        own = () if parts is None else (min(parts),)
        while chunk := list(itertools.islice(rows, self._block_size(epoch, block, seed, shuffle))):
            key = (seed, epoch, 0, block, *own)
            order = random_generator(*key).permutation(len(chunk)) if shuffle else range(len(chunk))
            for first in range(taken, len(chunk), _ENCODE):
                numbers = order[first : first + _ENCODE]
                # With `dataset.turns: each` a row has one outcome per turn.
                for outcomes in self.encoder.encode_each([chunk[number] for number in numbers]):
                    for done, outcome in enumerate(outcomes[within:], within + 1):
                        last = done == len(outcomes)
                        taken, within = (taken + 1, 0) if last else (taken, done)
                        whole = taken == len(chunk)
                        here = (
                            [block + 1, list(chunk[-1].after), 0, 0] if whole else [block, list(cursor), taken, within]
                        )
                        yield outcome, here
            block, cursor, taken = block + 1, chunk[-1].after, 0

    def _block_size(self, epoch: int, block: int, seed: int, shuffle: bool) -> int:
        """Return how many rows a block has. Only an epoch's first block differs, which moves all boundaries of that epoch."""
        size = self.options.shuffle_block
        return int(random_generator(seed, epoch, 1).integers(1, size + 1)) if shuffle and block == 0 else size
