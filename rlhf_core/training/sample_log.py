"""`samples.jsonl`: what a run's model says, one completion per line, of fixed prompts, rollouts and evaluations alike.

A row has `step` (optimiser steps made before), `kind` (see `KINDS`), `row` (the prompt's number: among the fixed prompts, or in
its data), `sample` (the completion's number among those of its prompt), `prompt`, `completion`, `stop_reason`, `tokens` (of the
completion), and where it was scored `reward` (the weighted sum) and `rewards` (by name). That of a fixed prompt has
`drawn_tokens`, the ids and log-probabilities of its tokens, packed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.files import replace_file
from rlhf_core.training.row_log import RowLog, encoded, packed_tokens, read_row_log, shortened

if TYPE_CHECKING:
    from rlhf_core.config.training import SamplesConfig
    from rlhf_core.contracts.completion import Completion
    from rlhf_core.contracts.reward import Sample
    from rlhf_core.rewards import Scores
    from rlhf_core.training.trackers import Trackers

NAME = "samples.jsonl"
KINDS = ("prompt", "evaluation", "rollout")
"""What a completion is of: a fixed prompt of `logging.samples.prompts`, a held-out row, or a row that is trained on."""


def prompt_sample(step: int, number: int, sample: int, prompt: Any, completion: Completion) -> dict[str, Any]:
    """Return the row of a completion of the fixed prompt `number`."""
    return {
        "step": step,
        "kind": "prompt",
        "row": number,
        "sample": sample,
        "prompt": shortened(prompt),
        "completion": shortened(completion.text),
        "stop_reason": completion.stop_reason,
        "tokens": len(completion.ids),
        "drawn_tokens": packed_tokens(completion),
    }


class SampleLog:
    """Writes a run's `samples.jsonl`, and shows its rows in the run's trackers.

    Args:
        directory: the run directory; None writes no file.
        config: how many completions of a rollout are kept.
        trackers: those of the run.
    """

    def __init__(self, directory: Path | None, config: SamplesConfig, trackers: Trackers) -> None:
        self.file = RowLog(directory / NAME if directory is not None else None)
        self._config, self._trackers = config, trackers
        self._kept: tuple[tuple[int, str] | None, int] = (None, 0)
        """The rollout or evaluation that samples were kept of last, as (step, kind), and how many."""
        self._unseen: dict[str, list[dict[str, Any]]] = {}
        """The scored rows by kind that the trackers haven't got."""

    def scored(
        self, samples: Sequence[Sample], scores: Scores, *, rows: Sequence[int], step: int, evaluating: bool
    ) -> None:
        """Write some scored completions, evenly spaced, at most `samples.rollouts` in all calls for the same rollout.

        Args:
            rows: each sample's row number in its data.
            step: optimiser steps made before.
            evaluating: whether the prompts are held out.
        """
        kind = "evaluation" if evaluating else "rollout"
        kept = self._kept[1] if self._kept[0] == (step, kind) else 0
        room = min(self._config.rollouts - kept, len(samples))
        if room <= 0 or (self.file.path is None and not self._trackers.running):
            return
        first_of_group: dict[int, int] = {}
        for number, sample in enumerate(samples):
            first_of_group.setdefault(sample.group, number)
        made = []
        for number in (place * len(samples) // room for place in range(room)):
            sample = samples[number]
            row = {"step": step, "kind": kind, "row": rows[number], "sample": number - first_of_group[sample.group]}
            row |= {"prompt": shortened(sample.prompt), "completion": shortened(sample.completion)}
            row |= {"stop_reason": sample.stop_reason, "tokens": len(sample.completion_ids)}
            row |= {"reward": float(scores.total[number])}
            row |= {"rewards": scores.named(number)}
            made.append(row)
        self._write(made)
        self._unseen.setdefault(kind, []).extend(made)
        self._kept = ((step, kind), kept + room)

    def completed(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Write all completions of the fixed prompts at a step, each as `prompt_sample` returned it, at once."""
        self._write(rows)
        self._trackers.log_samples("prompt", rows, step)

    def show_scored(self, step: int) -> None:
        """Show the trackers the scored completions that they haven't got, beside the metrics of `step`."""
        for kind, rows in self._unseen.items():
            self._trackers.log_samples(kind, rows, step)
        self._unseen = {}

    def rewind(self, step: int, *, evaluated: int | None, sampled: int | None) -> None:
        """Cut the file back to a checkpoint: what comes later is made again.

        Args:
            step: the checkpoint's step; rollouts before it stay.
            evaluated: the step of its last evaluation. sampled: the last step at which the fixed prompts were completed.
        """
        path = self.file.path
        if path is None or not path.exists():
            return
        last = {"rollout": step - 1} | {
            kind: -1 if until is None else until for kind, until in (("evaluation", evaluated), ("prompt", sampled))
        }
        lines = self.file.lines()
        rows = [(_row_of(line) if line.endswith(b"\n") else None, line) for line in lines]
        kept = [line for row, line in rows if row is not None and row["step"] <= last[row["kind"]]]
        replace_file(path, b"".join(kept))

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.file.append([encoded(row) for row in rows])


def read_samples(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of a `samples.jsonl`, also one that a run is writing, and the numbers of its damaged lines, from 1.

    A last line without its end is neither: the run is writing it, or was killed while it did.

    Raises:
        StorageError: the file can't be read.
    """
    return read_row_log(path, _row_of)


@dataclass
class PromptSamples:
    """The completions of one prompt."""

    number: int
    """Of the prompt among all of the run, from 1."""
    rows: list[dict[str, Any]]
    """As in `samples.jsonl`, in its order."""

    @property
    def kind(self) -> str:
        return str(self.rows[0]["kind"])

    @property
    def steps(self) -> list[int]:
        return list(dict.fromkeys(row["step"] for row in self.rows))

    def of(self, step: int) -> list[dict[str, Any]]:
        """Return the completions after a step."""
        return [row for row in self.rows if row["step"] == step]

    def only(self, steps: Sequence[int]) -> PromptSamples:
        """Return those of some steps."""
        return PromptSamples(self.number, [row for row in self.rows if row["step"] in steps])


def samples_by_prompt(rows: Sequence[dict[str, Any]]) -> list[PromptSamples]:
    """Return the rows by prompt: fixed prompts first, then held-out rows, then those that are trained on."""
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = (KINDS.index(row["kind"]), row["row"], json.dumps(row["prompt"], sort_keys=True))
        groups.setdefault(key, []).append(row)
    order = sorted(groups, key=lambda key: key[0])  # stable: each kind in the order of the file
    return [PromptSamples(number, groups[key]) for number, key in enumerate(order, 1)]


def _row_of(line: bytes) -> dict[str, Any] | None:
    """Return the row on a line; None where it isn't whole, or is none of this file's."""
    try:
        row = json.loads(line)
        whole = type(row["step"]) is int and row["kind"] in KINDS and isinstance(row["completion"], str)
        return row if whole and type(row["row"]) is int and "prompt" in row else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
