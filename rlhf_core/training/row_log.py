"""A log of a run with one JSON row per line: rows are appended, flushed at checkpoints, and read while the run writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.infra.files import append_lines, as_json_value, fsync_file, storage_errors

_LONGEST = 10_000
"""Characters of a text that a row holds at most."""


class RowLog:
    """One file of rows; without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def append(self, lines: Sequence[str]) -> None:
        """Append rows, each encoded by `encoded`."""
        if self.path is not None:
            append_lines(self.path, lines)

    def lines(self) -> list[bytes]:
        """Return the lines of the file, each with its end; the last one may lack it."""
        if self.path is None or not self.path.exists():
            return []
        with storage_errors(self.path):
            return self.path.read_bytes().splitlines(keepends=True)

    def flush(self) -> None:
        """Flush the rows written so far to the disk."""
        if self.path is not None and self.path.exists():
            with storage_errors(self.path):
                fsync_file(self.path)


def encoded(row: Mapping[str, Any]) -> str:
    """Return a row as JSON, without a line break."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def shortened(value: Any) -> Any:
    """Return a text, or the texts of a chat, with the first `_LONGEST` characters of each, as JSON values."""
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]} … [{len(value) - _LONGEST} characters more]"
    if isinstance(value, Mapping):
        return {str(name): shortened(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(item) for item in value]
    return as_json_value(value)


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text, a chat's messages under each other with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn if isinstance(turn, Mapping) else {"content": turn} for turn in prompt or ()]
    return "\n".join(
        f"{turn.get('role', turn.get('from', ''))}: {turn.get('content', turn.get('value'))}" for turn in turns
    )


def last_message(prompt: Any) -> str:
    """Return what a prompt asks: the text itself, or the last message of a chat, with its role where that isn't the user."""
    return prompt if isinstance(prompt, str) else prompt_text(list(prompt or ())[-1:]).removeprefix("user: ")
