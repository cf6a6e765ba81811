"""Score samples with the rewards of a run: each under its time limit, its scores checked, and the weighted sum of all."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlhf_core.config.yaml_file import flatten
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample, StepReader
from rlhf_core.infra.code_origin import describe_code
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.infra.redact import redact
from rlhf_core.rewards.background import DaemonPool
from rlhf_core.rewards.function_reward import FunctionReward
from rlhf_core.rewards.reward_process import ProcessReward
from rlhf_core.rewards.score_checks import blame_reward, checked_steps, gives_steps, sample_or_row
from rlhf_core.rewards.session import ScoringSession, WeightedReward, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contracts.batch import Batch

_LARGEST = 3.4028234e38
"""The largest float32, in which advantages are computed."""


@dataclass
class Scores:
    """The scores of N samples by the rewards of a run."""

    total: Tensor
    """(N,) float32: the weighted sum of all rewards, which the policy is trained on."""
    by_name: dict[str, list[float]]
    """Reward name → N unweighted scores."""
    groups: Sequence[int] = ()
    """(N,) the index of each sample's prompt in its batch."""
    score_steps: Callable[[], dict[str, list[list[float]]]] = field(repr=False, compare=False, default=dict)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Reward name → seconds during which it scored; those of different rewards overlap."""
    waited: float = field(default=0.0, compare=False)
    """Seconds that the caller waited for all scores, once the last completion was there."""

    @cached_property
    def steps(self) -> dict[str, list[list[float]]]:
        """Name of a step-wise reward → for each of N samples, one score per step; computed at the first access."""
        return self.score_steps()

    def named(self, number: int) -> dict[str, float]:
        """Return what one sample got, unweighted: `NAME` by each reward, and `NAME/PART` of one with parts."""
        found: dict[str, float] = {}
        for name, values in self.by_name.items():
            score = values[number]
            found[name] = float(score)
            found |= {f"{name}/{part}": value for part, value in getattr(score, "parts", {}).items()}
        return found

    @property
    def with_parts(self) -> dict[str, list[float]]:
        """`NAME` → N unweighted scores, and `NAME/PART` of a reward with parts."""
        found: dict[str, list[float]] = {}
        for name, values in self.by_name.items():
            found[name] = values
            for part in getattr(values[0], "parts", ()) if values else ():
                found[f"{name}/{part}"] = [value.parts[part] for value in values]  # type: ignore[attr-defined]
        return found

    def per_prompt(self, prompts: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the metrics `reward` and `reward/NAME` per prompt, from which an evaluation computes standard errors.

        Args:
            prompts: the number of prompts in the batch.

        Returns:
            Metric → (sum, count) over the samples of each prompt, both (prompts,) float64.
        """
        import torch

        groups = torch.tensor(list(self.groups), dtype=torch.long)
        counts = torch.zeros(prompts, dtype=torch.float64).index_add_(
            0, groups, torch.ones(len(groups), dtype=torch.float64)
        )

        def sums(values: Tensor) -> Tensor:
            return torch.zeros(prompts, dtype=torch.float64).index_add_(0, groups, values.double())

        named = {
            f"reward/{name}": torch.tensor(values, dtype=torch.float64) for name, values in self.with_parts.items()
        }
        return {name: (sums(values), counts) for name, values in (named | {"reward": self.total}).items()}


class Rewards:
    """The weighted rewards of a run, as `open_rewards` returns them."""

    def __init__(self, entries: Sequence[WeightedReward]) -> None:
        self._entries = tuple(entries)
        self._prepared = False
        self._pools = {
            entry.name: DaemonPool(entry.at_once, f"reward {entry.name}")
            for entry in self._entries
            if entry.place in ("thread", "process")
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, all different: the second of a name is `NAME_2`."""
        return tuple(entry.name for entry in self._entries)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(entry.weight for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Rewards({', '.join(f'{entry.name} × {entry.weight:g}' for entry in self._entries)})"

    def prepare(self) -> None:
        """Let every reward load what it needs, without a time limit. Done once: by this call or by the first `score`.

        Raises:
            PluginError: a reward raised. An `RLHFError`, such as that of a path without a model, keeps its type.
        """
        if self._prepared:
            return
        import torch  # noqa: F401  # whole, before other threads look whether it is there

        for entry in self._entries:
            with blame_reward(entry.name), without_gradients():
                entry.reward.prepare()
        self._prepared = True

    def score(self, samples: Sequence[Sample], rows: Sequence[int | str] | None = None) -> Scores:
        """Return the samples' scores by each reward and their weighted sum, in the samples' order. Gradients are off.

        Args:
            rows: each sample's row number in its data, or its place (`file:line`), for messages.

        Raises:
            ConfigError: the run has no rewards.
            PluginError: a reward raised, took longer than its time limit, or returned another number of scores or one that isn't
                a finite number. The message names the reward and the rows.
        """
        with self.scoring() as session:
            session.add(samples, rows)
            return session.result()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[RewardSession]:
        """Return a session, in whose `with` block samples are added as they come, and `result` returns the scores.

        Rewards that wait (async ones, those in a thread or a process) begin when samples are added, the others in `result`.

        Raises:
            ConfigError: the run has no rewards.
        """
        if not self._entries:
            raise ConfigError(
                "no rewards are given", place="rewards", fix="set `rewards`, a list of names or functions"
            )
        self.prepare()
        with RewardSession(self._entries, self._pools) as session:
            yield session

    @property
    def without_steps(self) -> tuple[str, ...]:
        """The names of the rewards that give no scores to steps."""
        return tuple(entry.name for entry in self._entries if not gives_steps(entry.reward))

    def step_reader(self, tokenizer: Any) -> StepReader:
        """Return what scores the steps of growing completions by the weighted sum of all rewards.

        Args:
            tokenizer: that of the policy, whose ids the completions have.

        Raises:
            ConfigError: a reward isn't step-wise, or two of them end steps by different texts.
        """
        from rlhf_core.rewards.step_readers import WeightedStepReader

        self.prepare()
        return WeightedStepReader(self, self._entries, tokenizer)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return where each reward comes from and all that its scores depend on, as JSON values, secrets redacted.

        The run's record keeps it; `rewards_changed` compares two of them. Hashes of source and model files are computed now.
        """
        found: dict[str, dict[str, Any]] = {}
        for entry in self._entries:
            about: dict[str, Any] = {"weight": entry.weight}
            reward = entry.reward.reward if isinstance(entry.reward, ProcessReward) else entry.reward
            if not isinstance(reward, FunctionReward):
                about |= describe_code(type(reward)) | dict(entry.origin)
                config = getattr(reward, "config", None)  # None where a class has its own constructor
                about["options"] = {} if config is None else config.model_dump(mode="json")
            with blame_reward(entry.name):
                about |= reward.describe()
            found[entry.name] = redact(json.loads(json.dumps(about, default=lambda value: f"<{type(value).__name__}>")))
        return found


class RewardSession(ScoringSession):
    """A scoring session whose result is `Scores`: each reward's scores and their weighted sum."""

    def result(self) -> Scores:
        """Return the scores of all samples that were added, in the order of their positions.

        Raises:
            PluginError: as `Rewards.score`.
        """
        import torch

        if not self.samples:
            return Scores(torch.zeros(0), {entry.name: [] for entry in self._entries}, ())
        order = sorted(self.samples)
        samples = [self.samples[at] for at in order]
        rows = [self.rows[at] for at in order] if self.rows else None
        began = time.monotonic()
        by_name = self.scores()
        waited = time.monotonic() - began
        weights = [entry.weight for entry in self._entries]
        total: list[float] = []
        for number, scores in enumerate(zip(*by_name.values(), strict=True)):
            total.append(sum(weight * score for weight, score in zip(weights, scores, strict=True)))
            if not abs(total[-1]) <= _LARGEST:
                where = sample_or_row(number, rows)
                got = " + ".join(f"{weight:g} × {score:g}" for weight, score in zip(weights, scores, strict=True))
                raise PluginError("the weighted sum is too large for float32", place=f"rewards, {where}", got=got)
        return Scores(
            torch.tensor(total, dtype=torch.float32),
            by_name,
            [sample.group for sample in samples],
            lambda: self._steps(samples, rows),
            seconds=self.seconds(),
            waited=waited,
        )

    def _steps(self, samples: Sequence[Sample], rows: Sequence[int | str] | None) -> dict[str, list[list[float]]]:
        """Return the scores of the samples' steps by each step-wise reward."""
        found = {}
        for entry in self._entries:
            steps = self.in_main(entry, samples, rows, checked_steps, "scoring steps")
            if steps is not None:
                found[entry.name] = steps
        return found


def samples_of(batch: Batch, completions: Sequence[Sequence[Completion]]) -> list[Sample]:
    """Return the samples that rewards score, prompt by prompt.

    Args:
        batch: P prompts.
        completions: for each of the P prompts, its completions.

    Returns:
        One sample per completion; its `group` is the index of its prompt in the batch.
    """
    if len(completions) != batch.num_prompts:
        raise ValueError(f"{len(completions)} lists of completions for {batch.num_prompts} prompts")
    if len(batch.prompts) != batch.num_prompts:
        raise ValueError("the batch lacks `prompts`, the prompts as in the data, which rewards need")
    return [sample for number, group in enumerate(completions) for sample in samples_of_prompt(batch, number, group)]


def samples_of_prompt(batch: Batch, number: int, completions: Sequence[Completion]) -> list[Sample]:
    """Return the samples of one prompt of a batch, the one with this number: its group."""
    ids = batch.prompt_ids[number, : int(batch.prompt_lengths[number])].tolist()
    columns = batch.records[number] if batch.records else {}
    return [
        Sample(
            prompt=batch.prompts[number],
            completion=one.text,
            prompt_ids=ids,
            completion_ids=one.ids,
            columns=columns,
            group=number,
            stop_reason=one.stop_reason,
            mask=one.mask,
        )
        for one in completions
    ]


def rewards_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two records of rewards, one text each, such as "`exact` is new".

    Differences are those of what scores depend on: weights, options, source and model files. A plugin's version isn't one.

    Args:
        before: what `Rewards.describe` returned when the run was started.
        now: what it returns for the resumed run.
    """
    found = [f"`{name}` is gone" for name in before if name not in now]
    found += [f"`{name}` is new" for name in now if name not in before]
    for name in now:
        if name not in before:
            continue
        old, new = flatten(before[name]), flatten(now[name])
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key not in ("distribution", "version"):
                found.append(f"`{name}`: {_difference(key, old.get(key), new.get(key), new.get('name'))}")
    return found


def _difference(key: str, old: Any, new: Any, source: Any) -> str:
    """Return one difference in words; `key` is a dotted key of `Rewards.describe`, `source` the reward's code by name."""
    if key == "source_sha256":
        return f"its source changed ({source})"
    head, _, rest = key.partition(".")
    if head == "files":
        return f"the file {rest} {'is gone' if new is None else 'is new' if old is None else 'changed'}"
    return f"{key} {old!r} → {new!r}"
