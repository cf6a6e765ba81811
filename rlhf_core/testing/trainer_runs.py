"""Checks of whole passes and runs: how many windows there are, what is held out, what is learned, and where a run can go on."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from rlhf_core.config.online import OnlineConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Evaluation, Pair, Trainer, Window
from rlhf_core.models import PolicyModel, ProcessRewardModel, RewardModel
from rlhf_core.testing.contract import after, require
from rlhf_core.testing.interrupted_runs import metrics_of
from rlhf_core.testing.trainer_online import responses_of, rises
from rlhf_core.testing.trainer_setup import GRADIENT, TrainerSetup
from rlhf_core.testing.workbench import Workbench


class RunChecks(TrainerSetup):
    """What shows over several windows, evaluations and steps only."""

    @after(GRADIENT)
    def test_windows_are_counted(self) -> None:
        """There are as many windows as `windows_per_batch` says, and nothing of a rollout is left behind its last one."""
        self._count_windows({})
        if several := self.several_windows():
            self._count_windows(several)

    def _count_windows(self, change: dict[str, Any]) -> None:
        bench = self.bench({"batch_size": max(1, self.batch_size // 2)}, change, script=self.script)
        shown = f" ({', '.join(f'{name} {value}' for name, value in change.items())})" if change else ""
        taken = 0

        def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
            nonlocal taken
            for batch in batches:
                taken += 1
                yield batch

        bench.batches = counted(bench.batches)
        per_batch, made, before = bench.trainer.windows_per_batch(), 0, 0
        ended = True
        for window in bench.windows():
            made += 1
            bench.steps += 1
            require(
                not ended or taken > before,
                f"window {made} comes of a rollout whose last one was yielded{shown}: a run that is resumed between them would"
                " lose it; yield all but a rollout's last as `Window(batch, last=False)`",
            )
            ended, before = window.last, taken
        require(ended, f"the last window of the data isn't its rollout's last{shown}: nothing after it would be saved")
        if per_batch is not None:
            require(
                made == per_batch * taken,
                f"`windows_per_batch` says {per_batch}, and {taken} batches give {made} windows{shown}: the schedule ends where"
                " it shouldn't; return the right number, or None where the data decide",
            )

    @after(GRADIENT)
    def test_held_out_rows_count_once(self) -> None:
        """An evaluation scores each held-out row once, and gives sums and counts, whatever is scored together."""
        bench = self.bench(self.several_windows(), script=self.script)
        batch = next(iter(bench.batches))
        if type(bench.trainer).evaluate is Trainer.evaluate:
            self._each_row_once(bench, batch)
        before = json.dumps(bench.trainer.state_dict(), sort_keys=True)
        whole, logged = self._evaluated(bench, batch)
        require(
            json.dumps(bench.trainer.state_dict(), sort_keys=True) == before,
            "held-out rows change what the method remembers (`state_dict`): an evaluation would change the run; leave it where"
            " `run.evaluating`",
        )
        if not self.repeatable:
            return
        parts, logged_parts = zip(
            *(self._evaluated(bench, batch.select([row])) for row in range(batch.num_prompts)), strict=True
        )
        own = type(bench.trainer).evaluate is not Trainer.evaluate
        for kind in ("terms", "metrics"):
            _same_sums(
                getattr(whole, kind), [getattr(part, kind) for part in parts], sums=own, allowed=10 * self.allowed
            )
        _same_sums(logged, list(logged_parts), sums=own, allowed=10 * self.allowed)

    def _each_row_once(self, bench: Workbench, batch: Batch) -> None:
        made: Counter[int] = Counter()
        responses: Counter[tuple[int, tuple[int, ...]]] = Counter()
        with torch.no_grad():
            for one in bench.trainer.experience(iter([batch]), bench.run.for_evaluation()):
                window = one.batch if isinstance(one, Window) else one
                made.update(window.rows)
                responses.update(responses_of(window))
        given = Counter(responses_of(batch)) if self.offline else Counter()
        again = sorted({one[0] for one, count in responses.items() if count > max(given[one], 1)})
        require(
            not again,
            f"held-out rows {again[:8]} are scored more than once: where `run.evaluating`, yield each row once (one epoch)",
        )
        lost = sorted(set(batch.rows) - set(made))
        require(not lost, f"held-out rows {lost[:8]} aren't scored: where `run.evaluating`, leave none out")

    def _evaluated(self, bench: Workbench, batch: Batch) -> tuple[Evaluation, dict[str, tuple[float, float]]]:
        context = bench.run.for_evaluation()
        bench.trainer.models.eval()
        with torch.no_grad():
            found = bench.trainer.evaluate(batch, context)
        require(isinstance(found, Evaluation), f"`evaluate` returns {type(found).__name__}, not an Evaluation")
        return found, context.logged()

    # Learning

    @after(GRADIENT)
    def test_loss_falls(self) -> None:
        """Twenty steps on the same rows lower the loss."""
        if not self.offline:
            raise SkipTest("a loss on the policy's own responses doesn't measure what was learnt")
        _, losses = self._trained()
        require(
            losses[-1] < losses[0] - 0.01 * abs(losses[0]),
            f"the loss is {losses[0]:.4f} before and {losses[-1]:.4f} after {len(losses)} steps on the same rows",
        )

    @after(GRADIENT)
    def test_it_learns_in_the_right_direction(self) -> None:
        """Training makes better what it is for: likelier responses, better ones above worse ones, or larger rewards."""
        if not self.offline:
            return self._rewards_rise()
        trained, _ = self._trained()
        bench = self.bench({"batch_size": len(self.rows())}, moved=False)
        batch = next(iter(bench.batches)).to(bench.devices.device)
        before, after_it = self.quality(bench.trainer, batch), self.quality(trained, batch)
        if before is None or after_it is None:
            raise SkipTest("what training makes better isn't known: give it by `quality(trainer, batch)`")
        require(
            after_it > before,
            f"{WORDS[self.subject().record]} {before:.4f} before and {after_it:.4f} after 20 steps on the same rows: the loss has"
            " the wrong sign",
        )
        return None

    @torch.no_grad()
    def quality(self, trainer: Trainer, batch: Batch) -> float | None:
        """Return what training should raise on the rows that it trains on; None where that isn't known.

        By default the log-probability of responses, or how far the better ones stand above the worse ones by the policy's
        log-probabilities or the reward model's scores.
        """
        scores = self.response_scores(trainer, batch)
        record = self.subject().record
        if scores is None:
            return None
        if record == "sft":
            return float(scores.sum()) / batch.num_loss_tokens
        if record == "preference":
            better, worse = batch.pairs(scores)
            return float((better - worse).mean())
        if record == "unpaired":
            good = batch["desirable"]
            return float(scores[good].mean() - scores[~good].mean())
        return None

    def response_scores(self, trainer: Trainer, batch: Batch) -> Tensor | None:
        """Return (R,) what should be larger for better responses."""
        trainer.models.eval()
        for role, model in trainer.models.items():
            if not trainer.roles[role].trained:
                continue
            if isinstance(model, PolicyModel):
                return model.response_logps(batch)
            if isinstance(model, RewardModel):
                return model.score(batch)
            if isinstance(model, ProcessRewardModel):
                ends = model.step_ends(batch)
                steps, outcome = model.scores(batch, ends)
                return (steps * ends).sum(dim=1) / ends.sum(dim=1).clamp(min=1) + outcome
        return None

    def _trained(self) -> tuple[Trainer, list[float]]:
        """Return a trainer after 20 steps on all rows, and the losses on its way."""

        def made() -> tuple[Trainer, list[float]]:
            with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
                trainer = self.build(
                    {"max_steps": 20, "batch_size": len(self.rows())}, self.learning, output=Path(folder) / "run"
                )
                trainer.train()
                return trainer, [row["loss"] for row in metrics_of(Path(folder) / "run")]

        return self.once("trained", made)

    def _rewards_rise(self) -> None:
        if not self.rewarded:
            raise SkipTest("the method learns from no rewards")
        with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
            output = Path(folder) / "run"
            # The kit's own reward is dense: what an author's test is configured with may be too rare for a random model.
            change: dict[str, Any] = {"max_steps": 24, "learning_rate": 1e-2, "batch_size": 8}
            if issubclass(self.subject().Config, OnlineConfig):
                change |= {"rollout_epochs": 1, "minibatches": 1}
            self.build(change, self.learning, output=output, rewards=self.rewards).train()
            rewards = [row["reward"] for row in metrics_of(output) if "reward" in row]
        require(bool(rewards), "no step reports its mean `reward`: take rewards from `run.score(batch, completions)`")
        require(
            rises(rewards),
            f"the mean reward is {_mean(rewards[:3]):.3f} in the first steps and {_mean(rewards[-8:]):.3f} in the last of"
            f" {len(rewards)} rollouts, with a reward that any policy gradient raises: the loss has the wrong sign, or rewards"
            " reach other responses than theirs",
        )

    # Resuming

    @after(GRADIENT)
    def test_resume_is_exact(self) -> None:
        """A run that is interrupted and resumed ends with the bits of one that wasn't: weights, optimiser, metrics."""
        self.resume({}, times=3)

    @after(GRADIENT)
    def test_resume_of_a_stream_is_exact(self) -> None:
        """The same where rows are read as they are needed."""
        self.resume({"dataset": {"streaming": True, "shuffle_block": 7}}, times=1)


WORDS = {
    "sft": "the responses' log-probability per token is",
    "preference": "chosen responses lead rejected ones by",
    "unpaired": "desirable responses lead undesirable ones by",
}


def _same_sums(whole: Mapping[str, Pair], parts: list[Mapping[str, Pair]], *, sums: bool, allowed: float) -> None:
    """Fail unless the pairs of rows scored one by one add up to those of the rows together."""
    for name, pair in whole.items():
        below = [part[name] for part in parts if name in part]
        for place, which in (("count", 1), ("sum", 0)) if sums else (("count", 1),):
            expected = _total(pair[which])
            found = sum(_total(one[which]) for one in below)
            size = sum(abs(_total(one[which])) for one in below)
            require(
                math.isclose(found, expected, rel_tol=allowed, abs_tol=allowed * max(size, 1e-6)),
                f"the {place} of `{name}` is {expected:.6g} for held-out rows together and {found:.6g} for one after the other:"
                " give sums and what they are counted over, never means",
            )


def _total(value: Tensor | float) -> float:
    return float(torch.as_tensor(value).detach().double().sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
