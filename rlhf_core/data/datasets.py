"""Map-style datasets: all rows read, checked and encoded when they are opened, and held as memory-mapped Arrow."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import torch.utils.data

from rlhf_core.config.training import DatasetConfig
from rlhf_core.data.base import EncodedData, Position, add_to_hash, random_generator
from rlhf_core.data.encode import EncodedRow, Outcome

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_ENCODE = 1024
_FETCH = 256
_IN_MEMORY = 256 << 20
"""Bytes of encoded rows that stay in memory; more is written to a temporary file and memory-mapped."""

_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "prompt_ids": pa.list_(pa.int32()),
        "responses": pa.list_(pa.list_(pa.int32())),
        "masks": pa.list_(pa.list_(pa.bool_())),
        # The prompt as it stands and other columns differ from row to row, so they are kept as the JSON that they came from.
        "columns": pa.large_string(),
    }
)


class MapDataset(EncodedData, torch.utils.data.Dataset[EncodedRow]):
    """Rows by number: `len(dataset)`, `dataset[i]`."""

    def __init__(
        self,
        data: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        options: DatasetConfig | None = None,
        record: str | None = None,
    ) -> None:
        super().__init__(data, tokenizer, max_length=max_length, options=options, record=record)
        store, digest = _Store(), hashlib.sha256()
        rows = self.source.rows()
        while chunk := list(itertools.islice(rows, _ENCODE)):
            kept = []
            for outcome in self.encoder.encode(chunk):
                self.report.add(outcome, strict=self.options.strict)
                if outcome.row is not None:
                    add_to_hash(digest, outcome.row)
                    kept.append(outcome.row)
            store.write(kept)
        self.report.finish()
        self.warn_of_plain_text()
        self.fingerprint = digest.hexdigest()
        self.table = store.close()
        self._directory = store.directory

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> EncodedRow:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self.rows([number % len(self)])[0]

    def rows(self, numbers: Sequence[int]) -> list[EncodedRow]:
        """Return these rows, in this order."""
        found = self.table[list(numbers)]
        columns = map(json.loads, found["columns"])
        ids = zip(found["index"], found["prompt_ids"], found["responses"], found["masks"], strict=True)
        return [EncodedRow(*row, *other) for row, other in zip(ids, columns, strict=True)]

    @property
    def num_rows(self) -> int:
        return len(self)

    def walk(self, epoch: int, *, seed: int, shuffle: bool, position: Position) -> Iterator[tuple[Outcome, Position]]:
        order = random_generator(seed, epoch).permutation(len(self)).tolist() if shuffle else range(len(self))
        for first in range(position[0] if position else 0, len(self), _FETCH):
            for number, row in enumerate(self.rows(order[first : first + _FETCH]), first + 1):
                yield Outcome("", row), [number]


class _Store:
    """Collects encoded rows as Arrow: in memory while they are few, then in a file."""

    def __init__(self) -> None:
        self.directory: tempfile.TemporaryDirectory[str] | None = None
        self._batches: list[pa.RecordBatch] = []
        self._writer: Any = None
        self._size = 0

    def write(self, rows: Sequence[EncodedRow]) -> None:
        columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _SCHEMA.names[:-1]}
        columns["columns"] = [json.dumps([row.per_prompt, row.per_response, row.prompt, row.record]) for row in rows]
        batch = pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)
        self._size += batch.nbytes
        self._batches.append(batch)
        if self._size > _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        if self._writer is None:
            self.directory = tempfile.TemporaryDirectory(prefix="rlhf-data-")
            self._writer = pa.ipc.new_stream(str(Path(self.directory.name) / "rows.arrow"), _SCHEMA)
        for batch in self._batches:
            self._writer.write_batch(batch)
        self._batches.clear()

    def close(self) -> datasets.Dataset:
        import datasets

        if self._writer is None or self.directory is None:
            table = pa.Table.from_batches(self._batches, schema=_SCHEMA)
            return datasets.Dataset(datasets.table.InMemoryTable(table))
        self._spill()
        self._writer.close()
        return datasets.Dataset.from_file(str(Path(self.directory.name) / "rows.arrow"))


class SFTDataset(MapDataset):
    """Prompts with the response to imitate, or conversations."""

    records: ClassVar[tuple[str, ...]] = ("sft",)


class PreferenceDataset(MapDataset):
    """Prompts with a better and a worse response, which stand in that order."""

    records: ClassVar[tuple[str, ...]] = ("preference",)


class KTODataset(MapDataset):
    """Prompts with one response each, desirable or not (column `desirable`)."""

    records: ClassVar[tuple[str, ...]] = ("unpaired",)


class GRPODataset(MapDataset):
    """Prompts to answer, with the columns that a reward needs."""

    records: ClassVar[tuple[str, ...]] = ("prompt", "reasoning")
