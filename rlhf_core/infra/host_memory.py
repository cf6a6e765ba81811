"""How much memory this process may still take: what the computer has free, or its container's limit leaves."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Limit, use and details of this process's control group: version 2's names, and version 1's."""


def available_bytes() -> int:
    """Return the bytes that the system reports as available, at most those that the control group's limit leaves.

    A container sees its own group at the root of the file system of groups. Files that are kept in memory count as free: they are
    dropped where memory is needed.
    """
    import psutil

    found: int = psutil.virtual_memory().available
    for limit_name, used_name, details_name in _FILES:
        limit, used = _number(CGROUPS / limit_name), _number(CGROUPS / used_name)
        if limit is not None and used is not None:
            found = min(found, max(0, limit - used + _cached_files(CGROUPS / details_name)))
    return found


def _number(path: Path) -> int | None:
    """Return a file's number; None where there is no such file, or it says that there is no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached_files(path: Path) -> int:
    """Return how many bytes of a group's use are files that can be dropped."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
