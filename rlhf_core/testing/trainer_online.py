"""Checks of methods that train on completions of their policy: sampling, rewards, ratios, temperature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import SkipTest

import torch

from rlhf_core.config.online import OnlineConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Window
from rlhf_core.testing.contract import after, require
from rlhf_core.testing.kit_rewards import TokenShare
from rlhf_core.testing.scripted_engine import Script
from rlhf_core.testing.trainer_setup import GRADIENT, TERMS, TrainerSetup, distance, sharpened
from rlhf_core.testing.workbench import Step, Workbench


class OnlineChecks(TrainerSetup):
    """Faults that only a method with rollouts can have."""

    @after(TERMS)
    def test_completions_differ(self) -> None:
        """Completions of one prompt differ within a group, between rows, and from step to step."""
        self._require_online()
        bench = self.bench()
        sampling = getattr(bench.trainer.config, "generation", None)
        if sampling is not None and sampling.temperature == 0:
            raise SkipTest("at temperature 0 all completions of a prompt are equal")
        batch = next(iter(bench.batches))
        alike = replace(batch.select([0] * batch.num_prompts), rows=batch.rows)
        bench.batches = iter([alike, alike, alike])
        rollouts = [_by_row(rollout) for rollout in _rollouts(bench, 2)]
        require(bool(rollouts) and bool(rollouts[0]), "`experience` yields no window")
        for groups in rollouts:
            for row, group in groups.items():
                if len(group) > 1:
                    require(len(set(group)) > 1, f"the {len(group)} completions of row {row} are all equal: {SEED}")
            drawn = [tuple(sorted(group)) for group in groups.values()]
            require(
                len(drawn) < 2 or len(set(drawn)) == len(drawn),
                f"rows with equal prompts get the same completions in one step: {SEED}",
            )
        if len(rollouts) > 1:
            again = [row for row, group in rollouts[0].items() if sorted(group) == sorted(rollouts[1].get(row, ()))]
            require(not again, f"row {again[:1]} gets the same completions in two steps: {SEED}")

    @after(GRADIENT)
    def test_rewards_decide_the_gradient(self) -> None:
        """Different rewards of the same completions give different gradients."""
        if not self.rewarded:
            raise SkipTest("the method has no rewards")
        found = [self._update(rewards=[TokenShare(bit)]) for bit in (0, 1)]
        require(
            distance(found[1].gradient, found[0].gradient) > 100 * self.allowed,
            "different rewards of the same completions give the same gradient: the loss contains no reward or advantage",
        )

    @after(GRADIENT)
    def test_ratios_follow_the_policy(self) -> None:
        """In later windows of a rollout, the loss depends on how far the policy has moved since it drew the completions."""
        self._require_online()
        if self._is_config() and not self.rewarded:
            raise SkipTest("the method has no rewards, so its loss need not be a policy gradient, which has ratios")
        if not self.repeatable:
            raise SkipTest(
                "the method doesn't generate by `run.engine`, so it can't be given the same completions again"
            )
        change = self.several_windows(minibatches=1)
        if self._windows_of_a_rollout(change) < 2:
            raise SkipTest(
                "each rollout makes one window, so every completion is trained on by the policy that drew it"
            )
        script = Script()
        bench = self.bench(change, script=script)
        window = bench.window()
        bench.perturb(0.004)
        stale = bench.step(window)
        fresh = self.bench(change, script=script, moved=False)
        fresh.perturb()
        fresh.perturb(0.004)
        current = fresh.step(fresh.window())
        require(
            distance(stale.gradient, current.gradient) > 10 * self.allowed,
            "completions that an earlier policy drew give the same gradient as completions of the current policy: the ratio of"
            " the two policies is always 1; use the log-probabilities from sampling (`sampled_logps`), or compute them in"
            " `experience`",
        )

    @after(GRADIENT)
    def test_temperature_reaches_the_loss(self) -> None:
        """Completions drawn at a temperature are scored at that temperature."""
        if not (self.rewarded and self._is_config()):
            raise SkipTest("the method has no rewards, or its configuration isn't an `OnlineConfig`")
        if not self.repeatable:
            raise SkipTest(
                "the method doesn't generate by `run.engine`, so it can't be given the same completions again"
            )
        script = Script(as_drawn=True)
        cold, warm = (
            self._update({"generation": {"temperature": value, "top_p": 1.0, "top_k": 0}}, script=script)
            for value in (0.7, 1.3)
        )
        require(
            distance(warm.gradient, cold.gradient) > 100 * self.allowed,
            "`generation.temperature` doesn't reach the loss: completions are drawn from softmax(logits / temperature), so their"
            " log-probabilities in the loss must be, too; pass it to `token_logps(batch, temperature=…)`",
        )

        # Other models' values may depend on the temperature, and only the run's own model can be sharpened to match.
        if all(role.trained or name == "reference" for name, role in self.subject().roles.items()):
            self._same_as_sharpened(0.7)

    def _same_as_sharpened(self, temperature: float) -> None:
        """Fail unless an update at a temperature equals that of a policy with logits divided by it, at temperature 1."""
        script, found = Script(), []
        for divisor, value in ((1.0, temperature), (temperature, 1.0)):
            change = {"generation": {"temperature": value, "top_p": 1.0, "top_k": 0}}
            bench = self.bench(change, script=script, moved=False, model=sharpened(divisor))
            step = bench.step(bench.window())
            # The second policy's output layer is the first's divided by the temperature, so its gradient is multiplied by it.
            layer = bench.trainer.policy.network.get_output_embeddings().weight
            gradient = {
                name: value / divisor if bench.parameters[name] is layer else value
                for name, value in step.gradient.items()
            }
            found.append(replace(step, gradient=gradient))
        apart = distance(found[0].gradient, found[1].gradient)
        require(
            apart <= 100 * self.allowed,
            f"at temperature {temperature} the gradient isn't that of a policy with logits divided by {temperature} (relative"
            f" difference {apart:.1e}): log-probabilities from sampling, of the reference and in the loss must all be at one"
            " temperature (`sampled_logps`, not `raw_logps`; pass `temperature=…` to each)",
        )

    def _update(self, *changes: Any, script: Script | None = None, **given: Any) -> Step:
        """Return the first update under changed options on a script's completions."""
        script = script or self.script
        bench = self.bench(*changes, script=script, **given)
        return bench.step(bench.window())

    def _is_config(self) -> bool:
        return issubclass(self.subject().Config, OnlineConfig)

    def _require_online(self) -> None:
        if self.offline:
            raise SkipTest("the method's responses come from the data")

    def _windows_of_a_rollout(self, change: dict[str, Any]) -> int:
        """Return how many windows the method makes of its first rollout under changed options."""
        bench = self.bench(change, script=self.script)
        count = 0
        for window in bench.windows():
            count += 1
            if window.last:
                break
        return count


SEED = "leave seeds to `run.engine`, or derive each from the step, the row and the completion's number"
"""What to do about completions that are equal."""


def _rollouts(bench: Workbench, most: int) -> Iterator[list[Window]]:
    """Yield up to `most` rollouts, each as the list of its windows; every window counts as one optimiser step."""
    found: list[Window] = []
    for window in bench.windows():
        found.append(window)
        bench.steps += 1
        if window.last:
            yield found
            found, most = [], most - 1
            if not most:
                return
    if found:
        yield found


def _by_row(rollout: list[Window]) -> dict[int, list[tuple[int, ...]]]:
    """Return each row's responses in a rollout, once each even where several windows hold them, as tuples of token ids."""
    groups: dict[int, list[tuple[int, ...]]] = {}
    for window in rollout:
        seen: dict[int, list[tuple[int, ...]]] = {}
        for row, response in responses_of(window.batch):
            seen.setdefault(row, []).append(response)
        for row, group in seen.items():
            if len(group) > len(groups.get(row, ())):
                groups[row] = group
    return groups


def responses_of(batch: Batch) -> list[tuple[int, tuple[int, ...]]]:
    """Return for each response its row number and its token ids."""
    ids, lengths = batch.response_ids.tolist(), batch.response_lengths.tolist()
    return [
        (batch.rows[owner], tuple(response[:length]))
        for owner, response, length in zip(batch.owner.tolist(), ids, lengths, strict=True)
    ]


def rises(values: list[float]) -> bool:
    """Tell whether the mean of the last third of a series is above that of its first three values by more than one standard
    error.

    The noise is estimated from the differences of neighbours.
    """
    if len(values) < 4:
        return False
    numbers = torch.tensor(values, dtype=torch.float64)
    # E|x − y| of two draws from a normal distribution is 1.128 standard deviations
    noise = float(numbers.diff().abs().mean()) / 1.128
    last = numbers[-max(len(values) // 3, 2) :]
    return float(last.mean() - numbers[:3].mean()) > noise * math.sqrt(1 / 3 + 1 / len(last))
