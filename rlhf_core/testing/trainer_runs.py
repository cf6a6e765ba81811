"""Checks over several windows or whole runs: the number of windows, evaluation, learning, and resuming."""

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
    """Faults that show only over several windows, evaluations and steps."""

    @after(GRADIENT)
    def test_windows_are_counted(self) -> None:
        """`experience` makes as many windows as `windows_per_batch` says, and none of a rollout after its last one."""
        self._count_windows({})
        if several := self.several_windows():
            self._count_windows(several)

    def _count_windows(self, change: dict[str, Any]) -> None:
        """Fail unless one pass over the data makes the declared number of windows under changed options."""
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
                f"window {made} belongs to a rollout whose last window was already yielded{shown}: a run that is resumed between"
                " the two would lose it; yield all windows but a rollout's last as `Window(batch, last=False)`",
            )
            ended, before = window.last, taken
        require(
            ended,
            f"the last window of a pass over the data isn't the last of its rollout (`Window.last`){shown}, so no checkpoint"
            " could be saved after it",
        )
        if per_batch is not None:
            require(
                made == per_batch * taken,
                f"`windows_per_batch` returns {per_batch}, but {taken} batches give {made} windows{shown}, so the learning rate's"
                " schedule would end at the wrong step; return the right number, or None where it depends on the data",
            )

    @after(GRADIENT)
    def test_held_out_rows_count_once(self) -> None:
        """An evaluation scores each held-out row once and returns sums and counts, whichever rows are scored together."""
        bench = self.bench(self.several_windows(), script=self.script)
        batch = next(iter(bench.batches))
        if type(bench.trainer).evaluate is Trainer.evaluate:
            self._each_row_once(bench, batch)
        before = json.dumps(bench.trainer.state_dict(), sort_keys=True)
        whole, logged = self._evaluated(bench, batch)
        require(
            json.dumps(bench.trainer.state_dict(), sort_keys=True) == before,
            "an evaluation changes the method's state (`state_dict`), and with it the run; leave the state unchanged where"
            " `run.evaluating` is true",
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
        """Fail unless `experience` in an evaluation yields each row of a batch, and each response once."""
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
            f"held-out rows {again[:8]} are scored more than once: where `run.evaluating` is true, yield each row once",
        )
        lost = sorted(set(batch.rows) - set(made))
        require(not lost, f"held-out rows {lost[:8]} aren't scored: where `run.evaluating` is true, leave no row out")

    def _evaluated(self, bench: Workbench, batch: Batch) -> tuple[Evaluation, dict[str, tuple[float, float]]]:
        """Return a batch's evaluation, and what the method reported by `run.log` in it, as sums and counts."""
        context = bench.run.for_evaluation()
        bench.trainer.models.eval()
        with torch.no_grad():
            found = bench.trainer.evaluate(batch, context)
        require(isinstance(found, Evaluation), f"`evaluate` returns a {type(found).__name__}, not an `Evaluation`")
        return found, context.logged()

    # Learning

    @after(GRADIENT)
    def test_loss_falls(self) -> None:
        """Twenty steps on the same rows lower the loss."""
        if not self.offline:
            raise SkipTest("the loss is on the policy's own responses, so it needn't fall")
        _, losses = self._trained()
        require(
            losses[-1] < losses[0] - 0.01 * abs(losses[0]),
            f"training on the same rows doesn't lower the loss: it is {losses[0]:.4f} before and {losses[-1]:.4f} after"
            f" {len(losses)} steps",
        )

    @after(GRADIENT)
    def test_it_learns_in_the_right_direction(self) -> None:
        """Training improves its aim: likelier responses, better responses above worse ones, or larger rewards."""
        if not self.offline:
            return self._rewards_rise()
        trained, _ = self._trained()
        bench = self.bench({"batch_size": len(self.rows())}, moved=False)
        batch = next(iter(bench.batches)).to(bench.devices.device)
        before, after_it = self.quality(bench.trainer, batch), self.quality(trained, batch)
        if before is None or after_it is None:
            raise SkipTest(
                "what training should raise isn't known: return it from the contract's `quality(trainer, batch)`"
            )
        require(
            after_it > before,
            f"training makes it worse: {QUALITIES[self.record_type]} {before:.4f} before and {after_it:.4f} after 20 steps"
            " on the same rows; the loss has the wrong sign",
        )
        return None

    @torch.no_grad()
    def quality(self, trainer: Trainer, batch: Batch) -> float | None:
        """Return a number that training should raise on the rows that it trains on; None where none is known.

        By default, for `sft` the log-probability per token in the loss, nats; for `preference` and `unpaired` the mean difference
        between better and worse responses in log-probability or in the reward model's score.
        """
        scores = self.response_scores(trainer, batch)
        record = self.record_type
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
        """Return (R,) a score of each response that training should raise for better ones; None without a policy or reward model.

        The policy's log-probability, nats, the reward model's score, or the process reward model's mean step score plus outcome.
        """
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
        """Return a trainer after 20 steps on all rows, and the loss of each step."""

        def made() -> tuple[Trainer, list[float]]:
            with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
                trainer = self.build(
                    {"max_steps": 20, "batch_size": len(self.rows())}, self.learning, output=Path(folder) / "run"
                )
                trainer.train(quiet=True)
                return trainer, [row["loss"] for row in metrics_of(Path(folder) / "run")]

        return self.once("trained", made)

    def _rewards_rise(self) -> None:
        """Fail unless the mean reward of a short run rises with the contract's rewards."""
        if not self.rewarded:
            raise SkipTest("the method has no rewards, so no mean reward can rise")
        with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
            output = Path(folder) / "run"
            # The kit's reward is dense; the rewards in `options` may be too sparse for a random model.
            change: dict[str, Any] = {"max_steps": 24, "learning_rate": 1e-2, "batch_size": 8}
            if issubclass(self.subject().Config, OnlineConfig):
                change |= {"rollout_epochs": 1, "minibatches": 1}
            self.build(change, self.learning, output=output, rewards=self.rewards).train(quiet=True)
            rewards = [row["reward"] for row in metrics_of(output) if "reward" in row]
        require(
            bool(rewards),
            "no step reports a mean `reward`: take rewards from `run.score(batch, completions)`, which reports it",
        )
        require(
            rises(rewards),
            "training doesn't raise the mean reward, which any policy gradient does with this reward: it is"
            f" {_mean(rewards[:3]):.3f} in the first steps and {_mean(rewards[-8:]):.3f} in the last of {len(rewards)} rollouts;"
            " the loss has the wrong sign, or rewards are attached to other responses",
        )

    # Resuming

    @after(GRADIENT)
    def test_resume_is_exact(self) -> None:
        """A run that is interrupted and resumed ends with the weights, optimiser and metrics of one that wasn't, bit by bit."""
        self.resume({}, times=3)

    @after(GRADIENT)
    def test_resume_of_a_stream_is_exact(self) -> None:
        """A run on streamed rows that is interrupted and resumed ends with the bits of an uninterrupted run."""
        self.resume({"dataset": {"streaming": True, "shuffle_block": 7}}, times=1)


QUALITIES = {
    "sft": "the responses' log-probability per token is",
    "preference": "chosen responses lead rejected ones by",
    "unpaired": "desirable responses lead undesirable ones by",
}
"""What `quality` measures, by record type."""


def _same_sums(whole: Mapping[str, Pair], parts: list[Mapping[str, Pair]], *, sums: bool, allowed: float) -> None:
    """Fail unless the (sum, count) pairs of rows that are evaluated one by one add up to those of the rows together.

    Args:
        whole: pairs of all rows together, by name.
        parts: pairs of each row.
        sums: whether to compare sums as well as counts.
        allowed: largest relative difference.
    """
    for name, pair in whole.items():
        below = [part[name] for part in parts if name in part]
        for place, which in (("count", 1), ("sum", 0)) if sums else (("count", 1),):
            expected = _total(pair[which])
            found = sum(_total(one[which]) for one in below)
            size = sum(abs(_total(one[which])) for one in below)
            require(
                math.isclose(found, expected, rel_tol=allowed, abs_tol=allowed * max(size, 1e-6)),
                f"the {place} of `{name}` is {expected:.6g} for held-out rows evaluated together, and {found:.6g} for the same"
                " rows one by one, added up: return sums and counts, never means",
            )


def _total(value: Tensor | float) -> float:
    return float(torch.as_tensor(value).detach().double().sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
