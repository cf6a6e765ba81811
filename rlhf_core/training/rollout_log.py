"""`rollouts.jsonl`: completions that were trained on, group by group, with rewards, advantages and the engine's gap.

A row has `step` (optimiser steps made before), `row` (of the prompt in its data), `place` (of the prompt in the run's order of
rows), `sample` (the completion's number in its group), `prompt`, `completion`, `stop_reason`, `tokens` (of the completion);
`reward` (the weighted sum) and `rewards` (by name), null and empty where nothing scored it; `advantage`, null where the method
left it out of training; `logprob_gap`, nats per token between engine and trainer, null where it wasn't in the rollout's first
update; `drawn_tokens`: the ids and log-probabilities of its tokens, packed; and, where rollouts are kept whole, in place of these
`drawn`: what a replay needs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from rlhf_core.contracts.completion import Completion
from rlhf_core.infra.errors import printable
from rlhf_core.infra.files import replace_file, storage_errors
from rlhf_core.training.row_log import RowLog, encoded, last_message, packed_tokens, read_row_log, shortened

if TYPE_CHECKING:
    from rlhf_core.config.training import RolloutsConfig
    from rlhf_core.training.rollout_record import RecordedCompletion

log = logging.getLogger(__name__)

ROLLOUTS = "rollouts.jsonl"
_FIELDS = {"ids": "<i4", "logprobs": "<f4", "raw_logprobs": "<f4", "kept_mass": "<f4"}
"""Field of a completion with one number per token → the type in which it is kept; both are what a batch holds."""
_SHOWN_GROUPS = 3


class RolloutLog:
    """Writes a run's `rollouts.jsonl`, and shows a few completions on the console.

    Args:
        directory: the run directory; None writes no file.
        config: how much is kept and shown.
        notify: called with the name and fields of an event.
    """

    def __init__(self, directory: Path | None, config: RolloutsConfig, notify: Callable[..., None]) -> None:
        self.file = RowLog(directory / ROLLOUTS if directory is not None else None)
        self._config, self._notify = config, notify
        self._full = False
        self._shown: int | None = None
        """The step at which completions were shown last."""

    @property
    def wanted(self) -> bool:
        """Whether rollouts are kept or shown; the same on all processes."""
        return self._config.whole or self._config.groups != 0

    def chosen(self, completions: Sequence[RecordedCompletion], step: int) -> list[dict[str, Any]]:
        """Return the rows of the groups that are kept of a rollout: all of them, or some, evenly spaced.

        Args:
            completions: those of this process.
            step: optimiser steps made before.
        """
        places = sorted({one.place for one in completions})
        kept = set(self._spaced(places))
        order = sorted((one for one in completions if one.place in kept), key=lambda one: (one.place, one.index))
        return [self._row(one, step) for one in order]

    def write(self, parts: Sequence[Sequence[dict[str, Any]]], step: int) -> None:
        """Write the rows of one rollout, and show some of them if that is due.

        Args:
            parts: what `chosen` returned on each process.
            step: optimiser steps made before.
        """
        rows = sorted((row for part in parts for row in part), key=lambda row: (row["place"], row["sample"]))
        kept = set(self._spaced(sorted({row["place"] for row in rows})))
        rows = [row for row in rows if row["place"] in kept]
        if not rows:
            return
        lines = [encoded(row) for row in rows]
        if self._has_room(sum(len(line.encode()) + 1 for line in lines), step):
            self.file.append(lines)
        every = self._config.show
        if every and (self._shown is None or step // every > self._shown // every):
            self._shown = step
            table = rollout_table(rows, width=max(100, get_terminal_size().columns))
            log.info("step %d  the best and the worst completion of some prompts:\n%s", step, table)

    def rewind(self, step: int, place: int = 0) -> None:
        """Cut the file back to the rollouts that were drawn before a checkpoint: later ones are made again.

        Args:
            step: the checkpoint's step.
            place: the first place in the run's order of rows that is still to come.
        """
        path = self.file.path
        if path is None or not path.exists():
            return
        lines = self.file.lines()
        rows = [(row_of(line) if line.endswith(b"\n") else None, line) for line in lines]
        # Rollouts of the checkpoint's own step were drawn before it, too, where they made no step.
        kept = [line for row, line in rows if row is not None and (row["step"] < step or row["place"] < place)]
        replace_file(path, b"".join(kept))

    def _spaced(self, places: Sequence[int]) -> list[int]:
        """Return as many of the places as are kept of a rollout, evenly spaced."""
        most = None if self._config.whole else self._config.groups
        if most is None or len(places) <= most:
            return list(places)
        return [places[number * len(places) // most] for number in range(most)]

    def _row(self, one: RecordedCompletion, step: int) -> dict[str, Any]:
        """Return the row of a completion."""
        text = str if self._config.whole else shortened
        row: dict[str, Any] = {"step": step, "row": one.row, "place": one.place, "sample": one.index}
        row |= {"prompt": shortened(one.sample.prompt), "completion": text(one.completion.text)}
        row |= {"stop_reason": one.completion.stop_reason, "tokens": len(one.completion.ids)}
        row |= {"reward": one.reward, "rewards": one.rewards}
        row |= {"advantage": _finite(one.advantage), "logprob_gap": _finite(one.logprob_gap)}
        if self._config.whole:
            row["drawn"] = pack(one.completion) | {"prompt": prompt_hash(one.sample.prompt_ids)}
        elif self._config.probabilities:
            row["drawn_tokens"] = packed_tokens(one.completion)
        return row

    def _has_room(self, size: int, step: int) -> bool:
        """Return whether so many bytes fit into the file; warn at the first rollout that doesn't."""
        path = self.file.path
        if path is None:
            return False
        with storage_errors(path):
            used = path.stat().st_size if path.exists() else 0
        if used + size <= self._config.megabytes * 1e6:
            return True
        if not self._full:
            self._full = True
            log.warning(
                "%s has %.4g MB: the rollout after step %d and others that don't fit into `logging.rollouts.megabytes`"
                " (%g) aren't kept",
                path, used / 1e6, step, self._config.megabytes,
            )  # fmt: skip
            self._notify("rollouts_full", step=step, bytes=used)
        return False


def read_rollouts(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of a `rollouts.jsonl`, also one that a run is writing, and the numbers of its damaged lines, from 1.

    Raises:
        StorageError: the file can't be read.
    """
    return read_row_log(path, row_of)


def groups_of(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the rows by rollout and prompt, in the order of the file."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["place"]), []).append(row)
    return list(groups.values())


def rollout_table(rows: Sequence[dict[str, Any]], width: int = 100) -> str:
    """Return the best and the worst completion of a few groups as lines of text, each under its prompt.

    Of a chat the last message stands for the prompt. Of a long text its start and its end are shown: the end is where an answer
    is, and where a limit truncated it.

    Args:
        width: most characters of a line.
    """
    groups = groups_of(rows)
    step = max(1, -(-len(groups) // _SHOWN_GROUPS))
    wide = max([6, *(len(row["stop_reason"]) for row in rows)])
    lines = [f"{'reward':>8}  {'advantage':>9}  {'tokens':>6}  {'end':{wide}}  completion"]
    for group in groups[::step]:
        head = f"  row {group[0]['row']}: "
        lines.append(head + _start_and_end(last_message(group[0]["prompt"]), width - len(head)))
        ordered = sorted(group, key=lambda row: -(row["reward"] or 0.0))
        for row in ordered[:1] + ordered[1:][-1:]:
            figures = (_number(row["reward"]), _number(row["advantage"]), row["tokens"], row["stop_reason"])
            head = f"{{:>8}}  {{:>9}}  {{:>6}}  {{:{wide}}}  ".format(*figures)
            lines.append(head + _start_and_end(row["completion"], width - len(head)))
    return "\n".join(lines)


def pack(completion: Completion) -> dict[str, Any]:
    """Return what a batch holds of a completion, exactly, as JSON values; numbers per token as base64 of little-endian ones."""
    import numpy as np

    packed: dict[str, Any] = {
        name: base64.b64encode(np.asarray(getattr(completion, name), dtype=kind).tobytes()).decode()
        for name, kind in _FIELDS.items()
    }
    mask = None if completion.mask is None else "".join("1" if own else "0" for own in completion.mask)
    return {**packed, "mask": mask, "policy_version": completion.policy_version}


def unpack(row: Mapping[str, Any]) -> Completion:
    """Return the completion of a row that `pack` made."""
    import numpy as np

    drawn = row["drawn"]
    numbers = {
        name: np.frombuffer(base64.b64decode(drawn[name]), dtype=kind).tolist() for name, kind in _FIELDS.items()
    }
    return Completion(
        text=row["completion"],
        stop_reason=row["stop_reason"],
        mask=None if drawn["mask"] is None else [own == "1" for own in drawn["mask"]],
        policy_version=drawn["policy_version"],
        **numbers,
    )


def prompt_hash(ids: Sequence[int]) -> str:
    """Return a hash of a prompt's token ids, by which a replay knows that it is the same."""
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()[:16]


def row_of(line: bytes) -> dict[str, Any] | None:
    """Return the row on a line; None where it isn't whole, or is none of this file's."""
    try:
        row = json.loads(line)
        whole = all(type(row[name]) is int for name in ("step", "row", "place", "sample"))
        return row if whole and isinstance(row["completion"], str) and "prompt" in row and "reward" in row else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _start_and_end(text: str, most: int) -> str:
    """Return a text on one line, its line breaks shown, without its middle where it has more than `most` characters."""
    line = printable(text.strip().replace("\n", "⏎"))
    if len(line) <= most:
        return line
    end = (most - 3) // 2
    return f"{line[: most - 3 - end]} … {line[len(line) - end :]}"
