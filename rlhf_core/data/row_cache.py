"""Tokenised rows, kept in the datasets library's cache: a resume and a second process load them and tokenise nothing again.

An entry is a folder `rlhf_core/RECORD-KEY` in `HF_DATASETS_CACHE` with the rows as an Arrow table (`rows.arrow`) and the report
of reading them (`rows.json`). The key is a hash of everything that determines the token ids: the contents of the data, the
tokenizer, the chat template, the options, and the code itself. An entry is renamed into place when it is complete, and used only
if the SHA-256 of both files is right. (`Dataset.map` and `Dataset.from_generator` would load a damaged file without an error.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from rlhf_core.contracts import records
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.infra import errors
from rlhf_core.infra.files import read_json, remove_tree, sha256_of, storage_errors, to_json, write_file

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "prompt_ids": pa.list_(pa.int32()),
        "responses": pa.list_(pa.list_(pa.int32())),
        "masks": pa.list_(pa.list_(pa.bool_())),
        # The prompt and other columns have different types from row to row, so they are kept as JSON.
        "columns": pa.large_string(),
    }
)

Write = Callable[[Sequence[EncodedRow]], None]
"""Stores some encoded rows."""
Encode = Callable[[Write], dict[str, Any]]
"""Encodes all rows, passes them to the `Write` that it gets, and returns what else to keep with them, as JSON values."""

_LIBRARIES = ("rlhf-core", "transformers", "tokenizers", "jinja2", "pyarrow", "datasets")


class EncodedTable(NamedTuple):
    """All rows of a dataset, encoded."""

    table: datasets.Dataset
    summary: dict[str, Any]
    """What `Encode` returned with them."""
    cached: bool
    """Whether they were loaded from the cache instead of encoded."""
    directory: tempfile.TemporaryDirectory[str] | None = None
    """The temporary folder with the table's file, removed when this object is; None for a table in memory or in the cache."""


class _CannotKeep(Exception):
    """The rows can't be written to the cache."""


def encoded_table(entry: CacheEntry | None, encode: Encode, *, in_memory: bool) -> EncodedTable:
    """Load rows from the cache, or encode them and keep them there.

    Of several processes one encodes, and the others wait and load. Where the cache can't be written, which is logged, each
    process encodes the rows itself.

    Args:
        entry: the rows' place in the cache; None for rows that aren't kept.
        encode: encodes the rows; called a second time where the cache turned out to be full.
        in_memory: whether rows that aren't kept stay in memory, rather than in a temporary file.

    Raises:
        StorageError: the temporary file can't be written.
    """
    if entry is not None:
        if (found := entry.load()) is not None:
            return found
        damaged = entry.path.exists()
        try:
            with entry.lock() as lock:
                if (lock.waited or not damaged) and (found := entry.load()) is not None:
                    return found
                if not lock.waited:
                    return entry.build(encode, locked=lock.held)
        except _CannotKeep as error:
            logger.info("%s: the cache can't be written, so a resume tokenises the rows again: %s", entry.path, error)
    if in_memory:
        batches: list[pa.RecordBatch] = []
        summary = encode(lambda rows: batches.append(_as_arrow(rows)))
        import datasets

        table = pa.Table.from_batches(batches, schema=SCHEMA)
        return EncodedTable(datasets.Dataset(datasets.table.InMemoryTable(table)), summary, cached=False)
    with storage_errors(tempfile.gettempdir()):
        directory = tempfile.TemporaryDirectory(prefix="rlhf-data-")
        path = Path(directory.name) / "rows.arrow"
        summary = _write_arrow(path, encode)
    return EncodedTable(_read_arrow(path), summary, cached=False, directory=directory)


class CacheEntry:
    """The place of one dataset's rows in the cache.

    Args:
        record: the record type, with which the folder's name begins.
        made_from: everything that determines the rows' ids, but for the code, as JSON values.
        unchanged: returns whether the data still have the contents that `made_from` has the hash of.
    """

    def __init__(self, record: str, made_from: Mapping[str, Any], *, unchanged: Callable[[], bool]) -> None:
        import datasets

        self._made_from, self._unchanged = json.loads(json.dumps({**made_from, "code": _code()})), unchanged
        key = hashlib.sha256(json.dumps(self._made_from, sort_keys=True).encode()).hexdigest()
        self.path = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf_core" / f"{record}-{key[:32]}"

    def load(self) -> EncodedTable | None:
        """Return the rows that are kept; None where there are none, or, with a warning, where they are damaged."""
        try:
            document = read_json(self.path / "rows.json")
            kept = document["kept"]
            if document["sha256"] != _sha256(kept):
                raise ValueError("the SHA-256 of rows.json is wrong")
            if kept["made_from"] != self._made_from:
                raise ValueError("rows.json belongs to other rows")
            if kept["sha256"] != sha256_of(self.path / "rows.arrow").sha256:
                raise ValueError("the SHA-256 of rows.arrow is wrong")
            table = _read_arrow(self.path / "rows.arrow")
        except Exception as error:  # Readers raise errors of any kind for damaged files.
            if self.path.exists():
                reason = getattr(error, "strerror", None) or error
                logger.warning("%s: damaged in the cache, so the rows are tokenised again: %s", self.path, reason)
            return None
        logger.info("%s: %d tokenised rows from the cache", self.path, len(table))
        return EncodedTable(table, kept["summary"], cached=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[_BuildLock]:
        """Wait until no other process builds this entry, and keep others waiting meanwhile.

        Raises:
            _CannotKeep: the cache's folder can't be written.
        """
        file = self.path.with_name(f".{self.path.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _CannotKeep(error.strerror or error) from None
        try:
            yield _lock(descriptor, self.path)
        finally:
            # A process that waits for the removed file gets the lock too, and finds the entry or encodes the rows itself.
            with contextlib.suppress(OSError):
                file.unlink()
            os.close(descriptor)

    def build(self, encode: Encode, *, locked: bool) -> EncodedTable:
        """Encode the rows into this entry and return them.

        Raises:
            _CannotKeep: the cache's folder can't be written, the disk is full, or the data changed meanwhile.
        """
        growing = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            if locked:
                # Left behind by processes that were killed, or damaged.
                for left in (self.path, *self.path.parent.glob(f".{self.path.name}-*.tmp")):
                    remove_tree(left)
            growing.mkdir()
            summary = _write_arrow(growing / "rows.arrow", encode)
            if not self._unchanged():
                raise _CannotKeep("the data changed while they were read")
            digest = sha256_of(growing / "rows.arrow").sha256
            kept = {"made_from": self._made_from, "summary": summary, "sha256": digest}
            write_file(growing / "rows.json", [to_json({"sha256": _sha256(kept), "kept": kept})])
            growing.rename(self.path)
            return EncodedTable(_read_arrow(self.path / "rows.arrow"), summary, cached=False)
        except OSError as error:
            raise _CannotKeep(error.strerror or error) from None
        finally:
            remove_tree(growing)


class _BuildLock(NamedTuple):
    """The lock on building an entry, as a process got it."""

    waited: bool
    """Whether another process had the lock; it has built the entry, or failed to."""
    held: bool
    """False where the file system has no locks."""


def _lock(descriptor: int, path: Path) -> _BuildLock:
    """Lock an open file, waiting for other processes. The lock ends when the file is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock.
        return _BuildLock(waited=False, held=False)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _BuildLock(waited=False, held=True)
    except BlockingIOError:
        logger.info("%s: waiting for another process, which tokenises these rows", path)
    except OSError:
        return _BuildLock(waited=False, held=False)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return _BuildLock(waited=True, held=True)


def _write_arrow(path: Path, encode: Encode) -> dict[str, Any]:
    """Encode rows into an Arrow file; return what `encode` returns."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        return encode(lambda rows: writer.write_batch(_as_arrow(rows)))


def _read_arrow(path: Path) -> datasets.Dataset:
    """Return the rows of an Arrow file, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(path))


def _as_arrow(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """Return rows as a batch of `SCHEMA`."""
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names[:-1]}
    columns["columns"] = [json.dumps([row.per_prompt, row.per_response, row.prompt, row.record]) for row in rows]
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _sha256(value: Any) -> str:
    """Return the hash of JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@cache
def _code() -> dict[str, str]:
    """Return the version of the code that encodes: a hash of this package's files, and the versions of libraries.

    A hash, because a version number would have to be raised by hand with every change.
    """
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):  # Code in an archive has a version only.
        for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(records.__file__), Path(errors.__file__)):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    found = {"files": digest.hexdigest(), "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
