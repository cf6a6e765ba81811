"""Write files atomically (fsynced, then renamed into place), read JSON strictly, hash, lock and remove.

An `OSError` becomes a `StorageError` that names the path and, for a full disk, the bytes needed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.errors import RLHFError, StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_JSON_BYTES = 256 * 2**20
"""The largest JSON file that is read; no file of this project comes near it."""

_LEFTOVER = re.compile(r"\.(?:tmp|old)-(?P<checkpoint>.+)|\.(?P<file>.+)\.(?:tmp|old)|\.probe-\d+")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_QUOTED = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class FileRecord:
    """A file's SHA-256 in hexadecimal and its length in bytes."""

    sha256: str
    bytes: int


@contextmanager
def storage_errors(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Raise an `OSError` from inside as a `StorageError` about `path`; `needed` is how many bytes were to be written."""
    try:
        yield
    except Exception as raised:
        error = _system_error(raised)
        if error is None:
            raise
        raise storage_error(error, path, needed) from raised


def storage_error(error: OSError, path: str | Path, needed: int | None = None) -> StorageError:
    """Return the error that `storage_errors` would raise, for loops in which a context manager would cost most of the time."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        room = f"{needed} bytes are needed" if needed is not None else "more room is needed"
        fix = "free space, raise the file size limit, or choose another output directory"
        return StorageError(f"cannot write: {room}", place=str(path), got=reason, fix=fix)
    denied = error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}
    mend = "choose a directory that you may write" if denied else None
    return StorageError("cannot read or write", place=str(path), got=reason, fix=mend)


def _system_error(error: Exception) -> OSError | None:
    """Return the `OSError` behind an exception: safetensors and tokenizers (Rust) raise other types that quote its number."""
    if isinstance(error, OSError):
        return error
    quoted = None if isinstance(error, RLHFError) else _QUOTED.search(str(error))
    return OSError(int(quoted[1]), os.strerror(int(quoted[1]))) if quoted else None


def require_space(directory: Path, needed: int) -> None:
    """Raise a `StorageError` where the disk of a directory has fewer than `needed` bytes free."""
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
    """Write chunks of bytes to a new file and fsync it; return its hash and length."""
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
    """Make renames inside a directory durable: fsync the directory, on systems that can open one."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make what was written to a file durable: fsync it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_directory(path: Path, name: str, what: str = "working in this directory") -> int | None:
    """Lock a directory until this process ends, in whatever way, or the returned descriptor is closed with `os.close`.

    Args:
        name: of the lock file in the directory.
        what: what the other process is doing, for the message where the lock is taken.

    Returns:
        The lock file's descriptor, or None where the system or the file system has no locks.

    Raises:
        StorageError: another process has the lock, or the directory can't be written.
    """
    with storage_errors(path):
        descriptor = os.open(path / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        locked = lock_file(descriptor, path, what)
    except StorageError:
        os.close(descriptor)
        raise
    if not locked:
        os.close(descriptor)
        return None
    return descriptor


def lock_file(descriptor: int, path: Path, what: str) -> bool:
    """Lock an open file until it is closed, or this process ends; return False where the system has no locks for it.

    Args:
        path: what is locked, for the message.
        what: what the other process is doing, for the message where the lock is taken.

    Raises:
        StorageError: another process has the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock.
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"another process is {what}", place=str(path), fix="wait for it, or stop it") from None
    except OSError:  # A file system without locks.
        return False
    return True


def lies_in(path: Path, directory: Path) -> bool:
    """Return whether a path exists, and it or what it links to lies in a directory, which is given resolved."""
    places = [path.resolve()]
    if path.name != "..":
        places.append(path.parent.resolve() / path.name)
    return path.exists() and any(place.is_relative_to(directory) for place in places)


def is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock of a lock file; None where the system or the file system has no locks.

    The lock is held by this process for the moment in which it looks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def temporary_path(path: Path) -> Path:
    """Return the path under which a file or directory is written until it is complete: `.NAME.tmp` beside it."""
    return path.with_name(f".{path.name}.tmp")


def replaced_path(path: Path) -> Path:
    """Return the path to which a directory is moved before it is replaced and removed: `.NAME.old` beside it."""
    return path.with_name(f".{path.name}.old")


def leftover_of(name: str) -> str | None:
    """Return the file or checkpoint to which a temporary name belongs that a killed process left: `.model.tmp` → `model`.

    '' for the file that tests whether a directory can be written; None for a name that isn't temporary.
    """
    match = _LEFTOVER.fullmatch(name)
    return None if match is None else match["file"] or match["checkpoint"] or ""


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: readers see the old content or the new, never a part."""
    temporary = temporary_path(path)
    with storage_errors(path, len(content)):
        write_file(temporary, [content])
        temporary.replace(path)
        fsync_directory(path.parent)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append texts to a file as lines, in one write; what a kill left of a line before them stays apart."""
    content = "".join(f"{line}\n" for line in lines).encode()
    with storage_errors(path, len(content)), path.open("ab+", buffering=0) as handle:
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                content = b"\n" + content
        while content:  # a write may be short
            content = content[handle.write(content) :]


def as_json_value(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers that aren't finite as None, objects of other classes as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): as_json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json_value(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def to_json(value: Any) -> bytes:
    """Return a value as indented JSON in UTF-8. Raises ValueError for a number that isn't finite, which JSON doesn't have."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def replace_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    replace_file(path, to_json(value))


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of at most `limit` bytes.

    Raises:
        ValueError: the file is too long, isn't JSON in UTF-8, nests too deeply, repeats a key, or has too long a number.
        OSError: the file can't be read.
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
        super().__init__(f"the key {key!r} occurs twice")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dictionary: the `object_pairs_hook` of parsers that refuse a repeated key.

    Raises:
        DuplicateKey: a key occurs twice, where `json` itself would silently keep the last value.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        raise DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return values


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python limits the digits that it converts
        raise ValueError(f"a number has {len(digits):,} digits") from None


def sha256_of(path: Path) -> FileRecord:
    """Return a file's SHA-256 and length, read in chunks."""
    with path.open("rb") as file:
        return FileRecord(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())


def remove_tree(path: Path) -> None:
    """Remove a file or directory tree, if it exists; a link is removed, not what it points to."""
    with suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def readable_size(count: float) -> str:
    """Return a number of bytes as text, in powers of a thousand: `2.13 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
