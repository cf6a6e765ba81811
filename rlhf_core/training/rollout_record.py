"""What a process generated for the rollout that is trained on next: its completions with rewards, advantages and gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample
from rlhf_core.rewards import Scores

NUMBER = "rollout_number"
"""The column that holds each response's number among those recorded."""


@dataclass
class RecordedCompletion:
    """One completion of the rollout."""

    row: int
    place: int
    """Of its prompt in the run's order of rows; the row's number where that isn't known."""
    index: int
    """Among the completions of its prompt."""
    sample: Sample
    completion: Completion
    reward: float | None
    rewards: dict[str, float]
    advantage: float | None = None
    logprob_gap: float | None = None


class RolloutRecord:
    """The completions generated since the last rollout was trained on, in the order in which they were scored."""

    def __init__(self) -> None:
        self.completions: list[RecordedCompletion] = []
        self.fresh = False
        """Whether no update has been made since the last generation; the same on all processes."""
        self.teaches: bool | None = None
        """Whether the method said of the last rollout that its rewards teach, on this process; None where it said nothing."""
        self._last: list[RecordedCompletion] = []
        """Those of the rollout before."""
        self._numbers: dict[tuple[int, int], int] = {}
        """(place of the prompt, index of the completion) → its number."""

    def add(
        self,
        batch: Batch,
        samples: Sequence[Sample],
        completions: Sequence[Sequence[Completion]],
        scores: Scores | None,
    ) -> None:
        """Add the completions of a batch's prompts, with their scores where they have some."""
        if not self.fresh:
            self.fresh, self.teaches = True, None
        numbers = [(prompt, index) for prompt, group in enumerate(completions) for index in range(len(group))]
        for at, (prompt, index) in enumerate(numbers):
            place = _place(batch, prompt)
            self._numbers[place, index] = len(self.completions)
            self.completions.append(
                RecordedCompletion(
                    row=batch.rows[prompt],
                    place=place,
                    index=index,
                    sample=samples[at],
                    completion=completions[prompt][index],
                    reward=None if scores is None else float(scores.total[at]),
                    rewards={} if scores is None else scores.named(at),
                )
            )

    def number(self, rollout: Batch, advantages: Tensor | None) -> Batch:
        """Note the advantages (R,) of a rollout's responses; return it with the column `NUMBER`, −1 for unknown responses."""
        met: dict[int, int] = {}
        numbers = []
        values = [None] * rollout.num_responses if advantages is None else advantages.tolist()
        for prompt, advantage in zip(rollout.owner.tolist(), values, strict=True):
            index = met[prompt] = met.get(prompt, -1) + 1
            number = self._numbers.get((_place(rollout, prompt), index), -1)
            numbers.append(number)
            if number >= 0:
                self.completions[number].advantage = advantage
        column = torch.tensor(numbers, dtype=torch.long, device=rollout.device)
        return rollout.attach(per_response={NUMBER: column})

    def note_gaps(self, gaps: Mapping[int, tuple[float, float]]) -> None:
        """Note the gap of each numbered response, as (sum, count) over its tokens."""
        for number, (total, count) in gaps.items():
            if 0 <= number < len(self.completions) and count:
                self.completions[number].logprob_gap = total / count

    @property
    def latest(self) -> list[RecordedCompletion]:
        """The completions since the last rollout was written, or else those of that one."""
        return self.completions or self._last

    def rewards_shown(self, most: int = 3) -> str:
        """Return the rewards of the first groups as text, such as `row 7: digits 0, 0; row 9: digits 1, 1`."""
        groups: dict[int, list[RecordedCompletion]] = {}
        for one in self.latest:
            groups.setdefault(one.place, []).append(one)
        shown = []
        for group in list(groups.values())[:most]:
            parts = [
                f"{name} "
                + ", ".join(f"{one.rewards[name]:.4g}" for one in group[:8])
                + (" …" if len(group) > 8 else "")
                for name in group[0].rewards
            ]
            shown.append(f"row {group[0].row}: {', '.join(parts)}")
        return "; ".join(shown) or "no rewards on this process"

    def take(self) -> list[RecordedCompletion]:
        """Return the completions and forget them: they are written down."""
        self.fresh = False
        self._last, self.completions, self._numbers = self.completions, [], {}
        return self._last


def _place(batch: Batch, prompt: int) -> int:
    return batch.places[prompt] if batch.places else batch.rows[prompt]
