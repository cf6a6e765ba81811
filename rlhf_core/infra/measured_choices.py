"""Which of two implementations this process computes with, where it measured which is faster; a run's record holds it.

Both are right, and differ in the last bits of what they compute: two processes agree exactly only where they chose alike.
"""

from __future__ import annotations

from typing import Any

from rlhf_core.infra.files import as_json_value

_made: dict[str, dict[str, Any]] = {}


def note_choice(what: str, taken: str, **why: Any) -> None:
    """Note which implementation is taken for something, such as `training, float32`.

    Args:
        taken: such as `oneDNN`.
        why: what was measured, as JSON values.
    """
    _made[what] = as_json_value({"taken": taken, **why})


def measured_choices() -> dict[str, dict[str, Any]]:
    """Return what this process has chosen so far, by what it is for."""
    return {what: dict(choice) for what, choice in sorted(_made.items())}
