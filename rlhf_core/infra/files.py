"""Files that are whole or not there: writes are fsynced and renamed into place, reads are bounded.

What the operating system refuses becomes one `StorageError` that names the path and, for a full disk, the bytes needed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.errors import RLHFError, StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_JSON_BYTES = 256 * 2**20
"""The largest JSON file that is read: a longer one isn't ours."""

_LEFTOVER = re.compile(r"\.(?:tmp|old)-(?P<checkpoint>.+)|\.(?P<file>.+)\.(?:tmp|old)|\.probe-\d+")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_QUOTED = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class FileRecord:
    """What was written: its SHA-256 in hexadecimal and its length in bytes."""

    sha256: str
    bytes: int


@contextmanager
def storage_errors(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` about `path`; `needed` is the number of bytes that were to be written."""
    try:
        yield
    except Exception as raised:
        error = _system_error(raised)
        if error is None:
            raise
        raise storage_error(error, path, needed) from raised


def storage_error(error: OSError, path: str | Path, needed: int | None = None) -> StorageError:
    """Return what `storage_errors` raises: for loops in which a context manager would be most of the time."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        room = f"{needed} bytes are needed" if needed is not None else "more room is needed"
        fix = "free space, raise the file size limit, or choose another output directory"
        return StorageError(f"cannot write: {room}", place=str(path), got=reason, fix=fix)
    denied = error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}
    mend = "choose a directory that you may write" if denied else None
    return StorageError("cannot read or write", place=str(path), got=reason, fix=mend)


def _system_error(error: Exception) -> OSError | None:
    """Return the system's error behind an exception: safetensors and tokenizers, written in Rust, raise others that quote it."""
    if isinstance(error, OSError):
        return error
    quoted = None if isinstance(error, RLHFError) else _QUOTED.search(str(error))
    return OSError(int(quoted[1]), os.strerror(int(quoted[1]))) if quoted else None


def require_space(directory: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes where the disk has fewer left."""
    with storage_errors(directory):
        free = shutil.disk_usage(directory).free
    if free < needed:
        raise StorageError(
            f"cannot write: {needed} bytes are needed",
            place=str(directory),
            got=f"{free} bytes free",
            fix="free space or choose another output directory",
        )


def write_file(path: Path, chunks: Iterable[Buffer]) -> FileRecord:
    """Write a new file, fsynced before this returns; hashes while it writes."""
    digest, size = hashlib.sha256(), 0
    # Unbuffered: a full disk must show in the write, where the path is known, not in a later close.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(digest.hexdigest(), size)


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory durable, where the system lets a directory be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make what was written to a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_directory(path: Path, name: str, what: str = "working in this directory") -> int | None:
    """Hold a directory until this process ends, however it ends, or `os.close` is called on what this returns.

    Returns None where the system or the file system has no locks.

    Raises:
        StorageError: another process holds it, or the directory can't be written.
    """
    with storage_errors(path):
        descriptor = os.open(path / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl
    except ImportError:  # Windows has no such lock.
        os.close(descriptor)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(f"another process is {what}", place=str(path), fix="wait for it, or stop it") from None
    except OSError:
        os.close(descriptor)  # A file system without locks.
        return None
    return descriptor


def temporary_path(path: Path) -> Path:
    """Return where a file or directory grows until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def replaced_path(path: Path) -> Path:
    """Return where a directory that is replaced waits for its removal."""
    return path.with_name(f".{path.name}.old")


def leftover_of(name: str) -> str | None:
    """Return what a process of ours that was killed was about to write or replace when it left a file of this name behind.

    Empty for one that belongs to nothing (the trial whether a directory can be written); None for a name that is none of ours.
    """
    match = _LEFTOVER.fullmatch(name)
    return None if match is None else match["file"] or match["checkpoint"] or ""


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place whole: readers see the old content or the new, never a part."""
    temporary = temporary_path(path)
    with storage_errors(path, len(content)):
        write_file(temporary, [content])
        temporary.replace(path)
        fsync_directory(path.parent)


def to_json(value: Any) -> bytes:
    """Encode as indented JSON; a number that is not finite is an error, since other readers refuse it."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def replace_json(path: Path, value: Any) -> None:
    """Put a JSON file in place whole."""
    replace_file(path, to_json(value))


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of at most `limit` bytes.

    Raises:
        ValueError: too long, not UTF-8, not JSON, nested too deeply, a key that stands twice, or too many digits.
        OSError: not readable.
    """
    if path.stat().st_size > limit:
        raise ValueError(f"{path.name} is longer than {limit} bytes")
    try:
        return json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_keys, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


class DuplicateKey(ValueError):
    """A JSON object has the same key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} stands twice")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dictionary: the `object_pairs_hook` of parsers that refuse a repeated key.

    Raises:
        DuplicateKey: a key stands twice, where `json` itself would silently keep the last value.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        raise DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return values


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python has a limit
        raise ValueError(f"a number has {len(digits):,} digits") from None


def sha256_of(path: Path) -> FileRecord:
    """Hash a file without holding it in memory."""
    with path.open("rb") as file:
        return FileRecord(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())


def remove_tree(path: Path) -> None:
    """Remove a file or directory; a link is removed, never followed. What is gone already is fine."""
    with suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
