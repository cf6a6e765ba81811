"""An engine that repeats completions: drawn once for each row, truncated to unequal lengths, and returned again.

Which tokens are sampled depends on rounding, which padding, micro-batches and processes change. Two updates of an online method
can therefore be compared only on the same completions. Their log-probabilities are computed by the policy as it is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.seeds import RandomState
from rlhf_core.models.dropout import evaluating
from rlhf_core.training.context import RunContext


@dataclass
class Script:
    """The completions drawn so far, to be repeated."""

    drawn: dict[Any, list[Completion]] = field(default_factory=dict)
    """The completions of a prompt, by what identifies a draw: stream, row, seeds, number of completions, token limit, and how
    often it was drawn before."""
    swapped: bool = False
    """Whether the first two completions of prompts in even rows are exchanged."""
    as_drawn: bool = False
    """Whether to keep the log-probabilities of the first draw, even if the policy or the temperature has changed since."""


class ScriptedEngine(Engine):
    """An engine that repeats the completions of a script, and draws and records those that it doesn't hold yet."""

    def __init__(self, policy: Any, script: Script, *, seed: int) -> None:
        super().__init__(policy, seed=seed)
        self.script = script
        self.calls = 0
        """How often `generate` was called."""
        self._occurrences: Counter[Any] = Counter()

    def begin(self, name: str, *index: int, policy_version: int = 0) -> None:
        super().begin(name, *index, policy_version=policy_version)
        self._occurrences = Counter()

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        n: int = 1,
        sampling: SamplingConfig | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[Sequence[int]] | None = None,
        min_confidences: Sequence[float] | None = None,
        policy_version: int | None = None,
        finished: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Return each prompt's completions from the script, drawing and recording those that it lacks.

        Log-probabilities are those of the current policy, unless the script is `as_drawn`.
        """
        sampling = sampling or SamplingConfig()
        self.calls += 1
        keys = []
        for number, row in enumerate(batch.rows):
            own = tuple(seeds[number]) if seeds is not None else ()
            most = sampling.max_new_tokens if limits is None else tuple(limits[number])
            least = sampling.min_confidence if min_confidences is None else min_confidences[number]
            name = (self._stream, row, own, n, most, least)
            keys.append((*name, self._occurrences[name]))
            self._occurrences[name] += 1
        random = RandomState.capture()
        missing = [number for number, key in enumerate(keys) if key not in self.script.drawn]
        if missing:
            part = batch.select(missing)
            fresh = super().generate(
                part,
                n,
                sampling,
                seeds=None if seeds is None else [seeds[number] for number in missing],
                limits=None if limits is None else [limits[number] for number in missing],
                min_confidences=None if min_confidences is None else [min_confidences[number] for number in missing],
            )
            for number, group in zip(missing, fresh, strict=True):
                cut = [self._truncated(one, (batch.rows[number], k), sampling) for k, one in enumerate(group)]
                self.script.drawn[keys[number]] = self._scored(batch.select([number]), [cut], sampling)[0]
        random.restore()
        groups = [self.script.drawn[key] for key in keys]
        if not self.script.as_drawn:
            groups = self._scored(batch, groups, sampling)
        version = self.policy_version if policy_version is None else policy_version
        groups = [[replace(one, policy_version=version) for one in group] for group in groups]
        if self.script.swapped and n > 1:
            # Of even rows only: in a method that takes rewards by position, exchanges in all rows could cancel out.
            groups = [
                [group[1], group[0], *group[2:]] if row % 2 == 0 else group
                for row, group in zip(batch.rows, groups, strict=True)
            ]
        if finished is not None:
            for prompt, group in enumerate(groups):
                for k, one in enumerate(group):
                    finished(prompt, k, one)
        return groups

    def _truncated(self, one: Completion, place: tuple[int, int], sampling: SamplingConfig) -> Completion:
        """Return a completion truncated, end token last, to a length that depends on its row and number; short ones unchanged."""
        draw = int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4], "little")
        length = 2 + draw % max(sampling.max_new_tokens - 1, 1)
        end = self.policy.tokenizer.eos_token_id
        if not _plain(sampling) or length >= len(one.ids) or end is None:
            return one
        ids = [*one.ids[: length - 1], end]
        return replace(one, ids=ids, text=str(self.policy.tokenizer.decode(ids[:-1])), stop_reason="end", mask=None)

    def _scored(self, batch: Batch, groups: list[list[Completion]], sampling: SamplingConfig) -> list[list[Completion]]:
        """Return completions with their log-probabilities under the policy as it is now; unchanged where sampling truncates."""
        if not _plain(sampling):
            return groups  # the kept mass of a truncated distribution is known only when it is drawn
        blank = [[replace(one, logprobs=(), raw_logprobs=(), kept_mass=()) for one in group] for group in groups]
        rollout = Batch.from_completions(batch, blank).to(self.policy.device)
        with evaluating(self.policy):
            drawn = self.policy.token_logps(rollout, temperature=sampling.temperature).tolist()
            raw = self.policy.token_logps(rollout).tolist()
        rows = zip((one for group in groups for one in group), drawn, raw, strict=True)
        scored = iter(
            [
                replace(
                    one,
                    logprobs=logps[: len(one.ids)],
                    raw_logprobs=own[: len(one.ids)],
                    kept_mass=[1.0] * len(one.ids),
                )
                for one, logps, own in rows
            ]
        )
        return [[next(scored) for _ in group] for group in groups]


@dataclass
class BenchContext(RunContext):
    """The run context of a workbench, whose engine repeats a script where there is one."""

    script: Script | None = None

    @property
    def engine(self) -> Engine:
        policy = dict(self.trainer.models.items()).get("policy")
        if self._engine is None and self.script is not None and policy is not None:
            self._engine = ScriptedEngine(policy, self.script, seed=self.trainer.config.seed)
        return super().engine

    @property
    def generated(self) -> bool:
        """Whether the method has generated by `run.engine`."""
        return isinstance(self._engine, ScriptedEngine) and self._engine.calls > 0


def _plain(sampling: SamplingConfig) -> bool:
    """Tell whether sampling draws from the whole distribution: nothing truncated, barred or penalised, and not greedily."""
    changes = ("top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens")
    plain = SamplingConfig()
    return sampling.temperature > 0 and all(getattr(sampling, name) == getattr(plain, name) for name in changes)
