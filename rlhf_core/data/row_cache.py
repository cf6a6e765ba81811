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
import shutil
import tempfile
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
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

Write = Callable[[pa.RecordBatch], None]
"""Stores some encoded rows, a batch of `SCHEMA`."""
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
    """The rows can't be loaded from the cache or kept there; the text says why."""


def encoded_table(entry: CacheEntry | None, encode: Encode, *, in_memory: bool) -> EncodedTable:
    """Load rows from the cache, or encode them and keep them there.

    Of several processes one encodes, and the others wait and load. Where the cache can't be read or written, which is logged,
    each process encodes the rows itself.

    Args:
        entry: the rows' place in the cache; None for rows that aren't kept.
        encode: encodes the rows; called a second time where the cache turned out to be full.
        in_memory: whether rows that aren't kept stay in memory, rather than in a temporary file.

    Raises:
        StorageError: the temporary file can't be written.
    """
    if entry is not None:
        try:
            return entry.load() or entry.wait_or_build(encode)
        except _CannotKeep as error:
            logger.info("%s: a resume tokenises these rows again: %s", entry.path, error)
    if in_memory:
        batches: list[pa.RecordBatch] = []
        summary = encode(batches.append)
        import datasets

        table = pa.Table.from_batches(batches, schema=SCHEMA)
        return EncodedTable(datasets.Dataset(datasets.table.InMemoryTable(table)), summary, cached=False)
    return _in_temporary_file(lambda path: _write_arrow(path, encode))


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

    def load(self, *, warn: bool = True) -> EncodedTable | None:
        """Return the rows that are kept; None where there are none, or, with a warning, where they are damaged.

        Raises:
            _CannotKeep: the cache's folder can't be read.
        """
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
        except PermissionError as error:
            raise _CannotKeep(f"the cache can't be read: {error.strerror}") from None
        except Exception as error:  # Readers raise errors of any kind for damaged files.
            if warn and os.path.exists(self.path):  # noqa: PTH110 (`Path.exists` raises some errors)
                reason = getattr(error, "strerror", None) or error
                logger.warning("%s: damaged in the cache, so the rows are tokenised again: %s", self.path, reason)
            return None
        logger.info("%s: %d tokenised rows from the cache", self.path, len(table))
        return EncodedTable(table, kept["summary"], cached=True)

    def wait_or_build(self, encode: Encode) -> EncodedTable:
        """Wait for a process that builds this entry and load it; where there is none, or it is killed, build the entry.

        Raises:
            _CannotKeep: the cache's folder can't be read or written, the disk is full, or the other process failed.
        """
        with self._lock() as lock:
            if lock is not _Lock.ENDED:
                # Another process may have built the entry since it was looked for.
                found = self.load(warn=False)
                return found or self._build(encode, locked=lock is _Lock.HELD)
        # Loaded without the lock, so that several processes compute the SHA-256 at the same time.
        if (found := self.load(warn=False)) is not None:
            return found
        raise _CannotKeep("the process that was to keep them failed")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[_Lock]:
        """Wait until no other process builds this entry, and keep others waiting meanwhile.

        The lock's file is removed at the end, but not by a process that is killed or interrupted: a process that waited can
        tell the two apart.

        Raises:
            _CannotKeep: the cache's folder can't be written.
        """
        file = self.path.with_name(f".{self.path.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _cannot_write(error) from None
        try:
            lock = _lock(descriptor, file)
            try:
                yield lock
            except Exception:
                _remove_lock(file, lock)
                raise
            _remove_lock(file, lock)
        finally:
            os.close(descriptor)

    def _build(self, encode: Encode, *, locked: bool) -> EncodedTable:
        """Encode the rows into this entry and return them; rows of data that changed meanwhile are returned and not kept.

        Raises:
            _CannotKeep: the cache's folder can't be written, or the disk is full.
        """
        growing = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex[:8]}.tmp")
        table = growing / "rows.arrow"

        def move(path: Path) -> dict[str, Any]:
            shutil.move(table, path)
            return summary

        try:
            if locked:
                # Left behind by processes that were killed, or damaged.
                for left in (self.path, *self.path.parent.glob(f".{self.path.name}-*.tmp")):
                    remove_tree(left)
            growing.mkdir()
            summary = _write_arrow(table, encode)
            if not self._unchanged():
                return _in_temporary_file(move)
            kept = {"made_from": self._made_from, "summary": summary, "sha256": sha256_of(table).sha256}
            write_file(growing / "rows.json", [to_json({"sha256": _sha256(kept), "kept": kept})])
            try:
                growing.rename(self.path)
            except OSError:
                # Without locks another process may have built the entry meanwhile, or a damaged one is still there.
                if (found := self.load(warn=False)) is not None:
                    return found._replace(cached=False)
                remove_tree(self.path)
                growing.rename(self.path)
            return EncodedTable(_read_arrow(self.path / "rows.arrow"), summary, cached=False)
        except OSError as error:
            raise _cannot_write(error) from None
        finally:
            with contextlib.suppress(OSError):
                remove_tree(growing)


class _Lock(Enum):
    """What a process that asked for the lock on an entry got."""

    HELD = "the lock: no other process builds the entry, or the one that did was killed"
    ENDED = "no lock: another process had it, and has built the entry or failed to"
    NONE = "no lock: the file system or the operating system has none"


def _lock(descriptor: int, file: Path) -> _Lock:
    """Lock an open file, waiting for other processes. The lock ends when the file is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock.
        return _Lock.NONE
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another process, which tokenises these rows", file)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return _Lock.NONE
    try:
        return _Lock.HELD if os.path.samestat(os.fstat(descriptor), file.stat()) else _Lock.ENDED
    except OSError:
        return _Lock.ENDED


def _remove_lock(file: Path, lock: _Lock) -> None:
    """Remove a lock's file, unless it is another process's."""
    if lock is not _Lock.ENDED:
        with contextlib.suppress(OSError):
            file.unlink()


def _cannot_write(error: OSError) -> _CannotKeep:
    return _CannotKeep(f"the cache can't be written: {error.strerror or error}")


def _in_temporary_file(write: Callable[[Path], dict[str, Any]]) -> EncodedTable:
    """Return rows that `write` puts into a temporary Arrow file; it returns what `Encode` returned.

    Raises:
        StorageError: the file can't be written.
    """
    with storage_errors(tempfile.gettempdir()):
        directory = tempfile.TemporaryDirectory(prefix="rlhf-data-")
        path = Path(directory.name) / "rows.arrow"
        summary = write(path)
    return EncodedTable(_read_arrow(path), summary, cached=False, directory=directory)


def _write_arrow(path: Path, encode: Encode) -> dict[str, Any]:
    """Encode rows into an Arrow file; return what `encode` returns."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        return encode(writer.write_batch)


def _read_arrow(path: Path) -> datasets.Dataset:
    """Return the rows of an Arrow file, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(path))


def as_arrow(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """Return rows as a batch of `SCHEMA`."""
    responses = [ids for row in rows for ids in row.responses]
    masks = [mask for row in rows for mask in row.masks]
    counts = [len(row.responses) for row in rows]
    columns = [json.dumps([row.per_prompt, row.per_response, row.prompt, row.record]) for row in rows]
    arrays = (
        pa.array([row.index for row in rows], pa.int64()),
        _lists([row.prompt_ids for row in rows], _as_int32),
        pa.ListArray.from_arrays(_offsets(counts), _lists(responses, _as_int32)),
        pa.ListArray.from_arrays(_offsets(counts), _lists(masks, _as_bool)),
        pa.array(columns, pa.large_string()),
    )
    return pa.RecordBatch.from_arrays(list(arrays), schema=SCHEMA)


def _lists(values: Sequence[list[Any]], flat: Callable[[Sequence[list[Any]]], np.ndarray]) -> pa.ListArray:
    """Return lists as an Arrow array; `flat` returns their values one after the other. Arrow's own conversion is much slower."""
    return pa.ListArray.from_arrays(_offsets([len(one) for one in values]), pa.array(flat(values)))


def _as_int32(values: Sequence[list[int]]) -> np.ndarray:
    made = array("i")
    for one in values:
        made.fromlist(one)
    return np.frombuffer(made, np.int32)


def _as_bool(values: Sequence[list[bool]]) -> np.ndarray:
    return np.frombuffer(b"".join(map(bytes, values)), np.bool_)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    """Return where each of some lists begins in all of their values, and where the last one ends."""
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))


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
