"""Rows → encoded chunks, by one process or several: the chunks are the same, bit for bit, for any number of processes.

A chunk is encoded as if no row came before it. What depends on the rows before is then compared with theirs; where it differs, or
encoding has failed, the chunk is encoded once more by this process, after its rows, and so raises what one process would raise.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from rlhf_core.config.training import DatasetConfig
from rlhf_core.data.data_report import DataReport
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.row_cache import as_arrow
from rlhf_core.data.row_source import Row
from rlhf_core.infra.forked_calls import forked_calls

CHUNK = 1024
"""Rows of the data in a chunk. A dataset's fingerprint depends on it."""


_WORDS = 1 << 17
"""Words whose ids a process that encodes remembers, some ten megabytes."""


class EncodedChunk(NamedTuple):
    """Some rows, encoded."""

    batch: pa.RecordBatch
    """The rows that are kept, as `SCHEMA`."""
    digest: bytes
    """Hash of them."""
    report: dict[str, Any]
    """Counts of the rows: `DataReport.state_dict`."""
    encoder: dict[str, bool]
    """Kinds of the rows: `Encoder.state_dict`."""
    checker: dict[str, Any]
    """What the rows had: `RowChecker.state_dict`."""


def encoded_chunks(
    encoder: Encoder, rows: Iterable[Row], processes: int, options: DatasetConfig
) -> Generator[EncodedChunk]:
    """Yield the chunks of some rows, in order; afterwards the encoder is as if it had encoded all of them itself.

    Args:
        processes: how many encode; 1 is this process.
        options: those that the encoder was made with.

    Raises:
        DataError: a row can't be read, or isn't what its record type needs.
        ModelError: the tokenizer lacks what the rows need.
    """
    left = iter(rows)
    chunks = iter(lambda: list(itertools.islice(left, CHUNK)), [])
    if processes == 1:
        for chunk in chunks:
            yield _encoded(encoder, options, chunk)
        return
    with closing(forked_calls(partial(_encoded_alone, encoder, options), chunks, processes)) as calls:
        for chunk, found in calls:
            if found is None or not encoder.checker.absorb(found.checker):
                found = _encoded(encoder, options, chunk)
            encoder.absorb(found.encoder)
            yield found


def _encoded_alone(encoder: Encoder, options: DatasetConfig, rows: Sequence[Row]) -> EncodedChunk:
    """Encode rows as if none came before them."""
    encoder.text_spans.remember_words(_WORDS)
    encoder.checker.reset()
    encoder.load_state_dict({"chats": False, "wrapped": False, "plain": False})
    return _encoded(encoder, options, rows)


def _encoded(encoder: Encoder, options: DatasetConfig, rows: Sequence[Row]) -> EncodedChunk:
    """Encode rows that follow those that the encoder has encoded."""
    report = DataReport(encoder.record, "", files=[], template_sha256=None, quiet=True)
    kept = []
    with _without_collections():
        for outcome in encoder.encode(rows):
            report.add(outcome, strict=options.strict)
            if outcome.row is not None:
                kept.append(outcome.row)
        batch = as_arrow(kept)
    return EncodedChunk(batch, _digest(batch), report.state_dict(), encoder.state_dict(), encoder.checker.state_dict())


def _digest(batch: pa.RecordBatch) -> bytes:
    """Return a hash of encoded rows: of their numbers, ids, masks, prompts and other columns."""
    digest = hashlib.sha256()
    for column in batch.columns[:-1]:
        while isinstance(column, pa.ListArray):
            digest.update(column.offsets.to_numpy().tobytes())
            column = column.values
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    digest.update("\n".join(batch.columns[-1].to_pylist()).encode())  # JSON has no line feed within
    return digest.digest()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the garbage collector from looking at all rows of a chunk again and again, which none of them needs."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
