"""Tokenised rows, kept in the datasets library's cache: a resume and a second process load them and tokenise nothing again.

An entry is a folder `rlhf_core/RECORD-KEY` in `HF_DATASETS_CACHE` with the rows as an Arrow table (`rows.arrow`) and all that
reading them reported (`rows.json`). The key is a hash of everything that decides which ids come out: the data's contents, the
tokenizer, the chat template, the options, and the code itself. An entry appears whole, by a rename, and is used only if the
SHA-256 of both files is right.
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
        # The prompt as it stands and other columns differ from row to row, so they are kept as the JSON that they came from.
        "columns": pa.large_string(),
    }
)

Write = Callable[[Sequence[EncodedRow]], None]
Encode = Callable[[Write], dict[str, Any]]
"""Encodes all rows, hands them to `Write`, and returns as JSON values what else is to be kept with them."""

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets")


class EncodedTable(NamedTuple):
    """All rows of a dataset, encoded."""

    table: datasets.Dataset
    summary: dict[str, Any]
    """What `Encode` returned."""
    cached: bool
    """Whether both come from the cache, so that nothing was encoded now."""
    directory: tempfile.TemporaryDirectory[str] | None = None
    """The temporary folder that holds the table's file; it goes when this does. None in memory or in the cache."""


class _CannotKeep(Exception):
    """The cache can't take the rows."""


def encoded_table(entry: CacheEntry | None, encode: Encode, *, in_memory: bool) -> EncodedTable:
    """Return rows from their entry in the cache; where it lacks them, encode and keep them there.

    One process encodes; others that open the same data meanwhile wait and load. Where the cache can't be written, each process
    encodes for itself, which one log line says.

    Args:
        entry: where the rows belong; None keeps nothing.
        encode: called once, or once more where the cache turns out to be full.
        in_memory: whether rows that aren't kept stay in memory, or go to a temporary file.

    Raises:
        StorageError: neither the cache nor the temporary folder can take the rows.
    """
    if entry is not None:
        if (found := entry.load()) is not None:
            return found
        damaged = entry.path.exists()
        try:
            with entry.turn() as turn:
                if (turn.waited or not damaged) and (found := entry.load()) is not None:
                    return found
                if not turn.waited:
                    return entry.build(encode, locked=turn.locked)
        except _CannotKeep as error:
            logger.info("%s: can't be written, so a resume tokenises the rows again: %s", entry.path, error)
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
    """The place in the cache of one dataset's rows.

    Args:
        record: the record type, which the folder's name begins with.
        made_from: everything that decides which ids come out, as JSON values.
        unchanged: tells whether the data are still what `made_from` says.
    """

    def __init__(self, record: str, made_from: Mapping[str, Any], *, unchanged: Callable[[], bool]) -> None:
        import datasets

        self._made_from, self._unchanged = json.loads(json.dumps({**made_from, "code": _code()})), unchanged
        key = hashlib.sha256(json.dumps(self._made_from, sort_keys=True).encode()).hexdigest()
        self.path = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf_core" / f"{record}-{key[:32]}"

    def load(self) -> EncodedTable | None:
        """Return the rows that are kept; None where there are none, or they are damaged, which a warning says."""
        try:
            document = read_json(self.path / "rows.json")
            kept = document["kept"]
            if document["sha256"] != _sha256(kept):
                raise ValueError("rows.json isn't what was written")
            if kept["made_from"] != self._made_from:
                raise ValueError("rows.json is of other rows")
            if kept["sha256"] != sha256_of(self.path / "rows.arrow").sha256:
                raise ValueError("rows.arrow isn't what was written")
            table = _read_arrow(self.path / "rows.arrow")
        except Exception as error:  # A damaged file makes its reader raise errors of any kind.
            if self.path.exists():
                reason = getattr(error, "strerror", None) or error
                logger.warning("%s: can't be used, so the rows are tokenised again: %s", self.path, reason)
            return None
        logger.info("%s: %d tokenised rows from the cache", self.path, len(table))
        return EncodedTable(table, kept["summary"], cached=True)

    @contextlib.contextmanager
    def turn(self) -> Iterator[_Turn]:
        """Wait until no other process builds this entry.

        Raises:
            _CannotKeep: the cache's folder can't be written.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _CannotKeep(error.strerror or error) from None
        try:
            yield _lock(descriptor, self.path)
        finally:
            # Who waits for a lock that is gone finds the entry, or encodes for itself.
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(descriptor)

    def build(self, encode: Encode, *, locked: bool) -> EncodedTable:
        """Encode the rows into this entry and return them.

        Raises:
            _CannotKeep: the cache's folder can't be written, the disk is full, or the data changed meanwhile.
        """
        growing = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            if locked:
                # What processes that were killed left behind.
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


class _Turn(NamedTuple):
    waited: bool
    """Whether another process had the lock, which then built the entry, or failed to."""
    locked: bool
    """False where the file system has no locks."""


def _lock(descriptor: int, path: Path) -> _Turn:
    """Lock an open file; the lock goes when the file is closed, or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock.
        return _Turn(waited=False, locked=False)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _Turn(waited=False, locked=True)
    except BlockingIOError:
        logger.info("%s: waiting for another process, which tokenises these rows", path)
    except OSError:
        return _Turn(waited=False, locked=False)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return _Turn(waited=True, locked=True)


def _write_arrow(path: Path, encode: Encode) -> dict[str, Any]:
    """Encode rows into an Arrow file; return what `encode` does."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        return encode(lambda rows: writer.write_batch(_as_arrow(rows)))


def _read_arrow(path: Path) -> datasets.Dataset:
    """Return the rows of an Arrow file, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(path))


def _as_arrow(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names[:-1]}
    columns["columns"] = [json.dumps([row.per_prompt, row.per_response, row.prompt, row.record]) for row in rows]
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@cache
def _code() -> dict[str, str]:
    """Return what tells the code that encodes from other code: a hash of its text, and the versions of the libraries below.

    So no change of it can be forgotten in a version number.
    """
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(records.__file__), Path(errors.__file__)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    found = {"rlhf_core": digest.hexdigest(), "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
