"""Which of two implementations this process computes with, where it measured which is faster; a run's record holds it.

Both are right, and differ in the last bits of what they compute: two processes agree exactly only where they chose alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.infra.files import as_json_value

_made: dict[str, dict[str, Any]] = {}
_recorded: dict[str, dict[str, Any]] = {}


def note_choice(what: str, taken: str, **why: Any) -> None:
    """Note which implementation is taken for something, such as `training, float32`.

    Args:
        taken: such as `oneDNN`.
        why: what was measured, as JSON values.
    """
    _made[what] = as_json_value({"taken": taken, **why})


def take_recorded(choices: Mapping[str, Any]) -> None:
    """Let what this process hasn't measured yet be chosen as in a record: of the run that it resumes, or of its first process.

    Args:
        choices: as `measured_choices` returned them there; empty to measure everything here.
    """
    _recorded.clear()
    _recorded.update({what: choice for what, choice in choices.items() if isinstance(choice, dict)})


def follow_record(what: str, **circumstances: Any) -> str | None:
    """Note, and return, which implementation the record says was taken for something; None where it must be measured here.

    Args:
        circumstances: what the choice depends on, such as the number of threads; under others the record doesn't count.
    """
    choice = _recorded.get(what, {})
    if "taken" not in choice or any(choice.get(name) != value for name, value in circumstances.items()):
        return None
    note_choice(what, **choice)
    return str(choice["taken"])


def measured_choices() -> dict[str, dict[str, Any]]:
    """Return what this process has chosen so far, by what it is for."""
    return {what: dict(choice) for what, choice in sorted(_made.items())}
