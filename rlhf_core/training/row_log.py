"""A log of a run with one JSON row per line: rows are appended, flushed at checkpoints, and read while the run writes."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.files import append_lines, as_json_value, fsync_file, storage_errors

if TYPE_CHECKING:
    from rlhf_core.contracts.completion import Completion

_LONGEST = 10_000
"""Characters of a text that a row holds at most."""
ENDS = {
    "end": "ended",
    "length": "cut off by the limit",
    "stop": "ended by a stop string",
    "rule": "stopped by a rule",
    "confidence": "cut off for too little confidence",
}
"""Stop reason → how it is said."""


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


def read_row_log(
    path: Path, row_of: Callable[[bytes], dict[str, Any] | None]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of a log, also one that a run is writing, and the numbers of its damaged lines, from 1.

    A last line without its end is neither: the run is writing it, or was killed while it did.

    Args:
        row_of: returns the row on a line; None where it is damaged.

    Raises:
        StorageError: the file can't be read.
    """
    with storage_errors(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    found = [row_of(line) for line in lines]
    return [row for row in found if row is not None], [n for n, row in enumerate(found, 1) if row is None]


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


def packed_tokens(completion: Completion) -> dict[str, str]:
    """Return a completion's token ids, and their log-probabilities in half precision, as base64 of little-endian numbers."""
    import numpy as np

    kinds = {"ids": "<i4", "logprobs": "<f2"}
    return {
        name: base64.b64encode(np.asarray(getattr(completion, name), dtype=kind).tobytes()).decode()
        for name, kind in kinds.items()
    }


def unpacked_tokens(row: Mapping[str, Any]) -> tuple[list[int], list[float]] | None:
    """Return the token ids and log-probabilities of a row that keeps them (`drawn_tokens`, or `drawn` of a whole rollout).

    None where it keeps none, or what it keeps is damaged.
    """
    import numpy as np

    whole = isinstance(row.get("drawn"), Mapping)
    kept = row["drawn"] if whole else row.get("drawn_tokens")
    if not isinstance(kept, Mapping):
        return None
    try:
        ids = np.frombuffer(base64.b64decode(kept["ids"], validate=True), dtype="<i4").tolist()
        logprobs = np.frombuffer(base64.b64decode(kept["logprobs"], validate=True), dtype="<f4" if whole else "<f2")
    except (KeyError, TypeError, ValueError, binascii.Error):
        return None
    sound = len(ids) == len(logprobs) and bool(np.isfinite(logprobs).all()) and all(one >= 0 for one in ids)
    return (ids, logprobs.tolist()) if sound else None


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


def length_and_end(row: Mapping[str, Any]) -> str:
    """Return a completion's tokens and why it ended, as text."""
    tokens = f"{row['tokens']} token{'s' * (row['tokens'] != 1)}" if isinstance(row.get("tokens"), int) else ""
    reason = str(row.get("stop_reason", ""))
    return ", ".join(filter(None, [tokens, ENDS.get(reason, reason)]))
