"""The fixtures of the trainers' contract: a model, rows, a new trainer on them, and updates to compare."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.yaml_file import overlay
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.records import RECORDS
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.models import PolicyModel
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.contract import MethodContract, require
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, require_same_run
from rlhf_core.testing.kit_rewards import TokenShare
from rlhf_core.testing.scripted_engine import Script
from rlhf_core.testing.simulated_processes import OutOfStep, simulate
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Step, Workbench
from rlhf_core.training.checkpoint import CheckpointManager
from rlhf_core.training.distribution import Distribution

Result = TypeVar("Result")

TERMS = "test_every_term_has_a_weight"
GRADIENT = "test_trained_models_get_a_gradient"
"""The two checks on which others depend: where one fails, those are skipped, so that one fault is reported once."""


class TrainerSetup(MethodContract):
    """The attributes and fixtures of the contract, which a subclass may override; it has no checks."""

    kind = "trainer"
    _made: ClassVar[dict[Any, Any]]
    """Values that several checks use, made once for the class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._made = {}

    trainer: ClassVar[type[Trainer] | None] = None
    """The class under test, in place of `method`."""
    rewards: ClassVar[Sequence[Any]] = (TokenShare(bit=1),)
    """Rewards of an online method where `options` name none: dense, and functions of a completion's ids alone."""
    constant_weights: ClassVar[bool] = False
    """Whether a term is averaged over a constant on purpose, such as the maximal length of a completion."""
    first_loss: ClassVar[float | Literal["nll"] | None] = None
    """The loss before the first step, where it is known, such as ln 2; `nll` is the negative log-likelihood per token in the
    loss. None compares nothing."""
    learning: ClassVar[Mapping[str, Any]] = {}
    """Options with which a tiny model learns in a few steps, where it doesn't with those of the checks."""
    no_effect: ClassVar[Sequence[str]] = ()
    """Options of the method that rightly change nothing that the checks compare; an option in a group as `group.option`."""
    no_gradient: ClassVar[Sequence[str]] = ()
    """Options that rightly change the loss and not its gradient."""
    other_values: ClassVar[Mapping[str, Any]] = {}
    """Option → a value, or a list of values, to try instead of its own; for other options, values follow from their types."""
    tolerance: ClassVar[float] = 1e-5
    """Largest relative difference of loss and gradient, by rounding in float32 on a CPU. Three times that is allowed on a GPU,
    which uses other kernels for other shapes."""

    @property
    def allowed(self) -> float:
        """The largest relative difference that is allowed on this machine's device: `tolerance`, or three times that on a GPU."""
        return self.tolerance * (1 if DeviceManager().kind == "cpu" else 3)

    def model(self) -> PolicyModel | str | Path:
        """Return the model to train, the same each time; for a method that generates, one that often draws the end token."""
        model = tiny_model(hidden=32, heads=2, kv_heads=1)
        if not self.offline:
            _end_often(model)
        return PolicyModel(model, tiny_tokenizer())

    @property
    def record_type(self) -> str:
        """The record type of the method's rows under the contract's options."""
        cls = self.subject()
        return cls.record_type(cls.Config.parse(self.options, place=f"{type(self).__name__}.options"))

    def rows(self) -> list[dict[str, Any]]:
        """Return about 20 rows of the method's record type, of unequal lengths."""
        record = self.record_type
        short, long = (ArithmeticTask(terms=terms).rows(record, 10, seed=terms) for terms in (2, 4))
        return list(chain.from_iterable(zip(short, long, strict=True)))

    @property
    def rewarded(self) -> bool:
        """Whether the method learns from rewards."""
        config = self.subject().Config
        return issubclass(config, OnlineConfig) and config.needs_rewards

    def several_windows(self, *, minibatches: int = 2) -> dict[str, Any]:
        """Return options with which an online method makes several windows of each rollout; none for another method."""
        known = issubclass(self.subject().Config, OnlineConfig)
        return {"rollout_epochs": 2, "minibatches": minibatches} if known else {}

    @property
    def offline(self) -> bool:
        """Whether the responses come from the data, so that `experience` is the same for any layout of the rows."""
        return bool(RECORDS[self.record_type].responses)

    def build(
        self,
        *changes: Mapping[str, Any],
        output: Path | None = None,
        kind: type[Trainer] | None = None,
        rewards: Sequence[Any] | None = None,
        model: PolicyModel | None = None,
    ) -> Trainer:
        """Return a new trainer on a copy of the model and the contract's rows.

        Args:
            changes: options that override those of the contract, later ones winning.
            output: run directory.
            kind: class of the trainer; the one under test where None.
            rewards: instead of the contract's.
            model: instead of the contract's.
        """
        kind, rows = kind or self.subject(), self.rows()
        values: Mapping[str, Any] = {
            "learning_rate": 3e-3,
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
            "batch_size": min(self.batch_size, len(rows)),
            "max_length": 256,
            "logging": {"progress": False},
        }
        if issubclass(kind.Config, OnlineConfig) and not self.offline:
            values = {**values, "generation": {"max_new_tokens": 8}, "group_size": 4}
        for over in (self.options, *changes):
            values = overlay(values, over)
        given: dict[str, Any] = {}
        if rewards is not None or (self.rewarded and not values.get("rewards")):
            values = {**values, "rewards": []}
            given["rewards"] = list(rewards if rewards is not None else self.rewards)
        config = kind.Config.parse(values, place=f"{type(self).__name__}.options")
        return kind(config, model=copy.deepcopy(model or self.model()), data=rows, output=output, **given)

    @property
    def batch_size(self) -> int:
        """Rows of an optimiser step: 8 with responses from the data, 4 prompts that are completed several times each."""
        return 8 if self.offline else 4

    def bench(
        self,
        *changes: Mapping[str, Any],
        moved: bool = True,
        distribution: Distribution | None = None,
        script: Script | None = None,
        **given: Any,
    ) -> Workbench:
        """Return a workbench with a new trainer, ready for its first window.

        Args:
            changes: options that override those of the contract.
            moved: whether to add fixed noise to the trained models, so that the policy differs from its reference.
            distribution: this process among those of `simulate`; a single process where None.
            script: completions for its engine to repeat; drawn as in a run where None.
            given: other arguments of `build`.
        """
        bench = Workbench(self.build({"max_grad_norm": None}, *changes, **given), distribution, script)
        if moved:
            bench.perturb()
        return bench

    def once(self, key: Any, make: Callable[[], Result]) -> Result:
        """Return what `make` returns, called once per key for all checks of the class."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def script(self) -> Script:
        """The completions that all compared updates share."""
        return self.once("script", Script)

    @property
    def repeatable(self) -> bool:
        """Whether the method can be given the same responses again, from the data or, by `run.engine`, from the script."""

        def tried() -> bool:
            bench = self.bench(script=self.script)
            bench.window()
            return bench.run.generated

        return self.offline or self.once("repeatable", tried)

    def window(self, *changes: Mapping[str, Any], script: Script | None = None) -> tuple[Workbench, Batch]:
        """Return a workbench as in `bench`, and its first window, whose completions are the script's."""
        bench = self.bench(*changes, script=script or self.script)
        return bench, bench.window()

    def step(self, *changes: Mapping[str, Any], change: Callable[[Workbench], None] | None = None) -> Step:
        """Return the first update under changed options, on the same responses as every other such update.

        Args:
            changes: options that override those of the contract.
            change: alters the workbench before its first window.
        """

        def made() -> Step:
            bench = self.bench(*changes, script=self.script)
            if change is not None:
                change(bench)
            if self.repeatable:
                return bench.first()
            # The method doesn't use `run.engine`: give this update the responses of another workbench.
            return bench.step(self.bench().window())

        return made() if change is not None else self.once(("step", repr(changes)), made)

    def shared_rows(self, count: int) -> int:
        """Return the number of rows of a step that can be divided evenly among `count` processes."""
        return max(1, min(self.batch_size, len(self.rows())) // count) * count

    def shared(self, count: int, *changes: Mapping[str, Any]) -> Step:
        """Return the first update of `count` simulated processes with unequal numbers of rows: the first process has one."""
        size = {"batch_size": self.shared_rows(count)}
        if not self.offline:
            self.bench(size, *changes, script=self.script).window()  # records every completion in the script

        def work(distribution: Distribution) -> Step:
            bench = self.bench(size, *changes, distribution=distribution, script=self.script)
            rank, others = distribution.rank, max(count - 1, 1)
            bench.batches = (
                batch if count == 1 else batch.select([0] if rank == 0 else range(rank, batch.num_prompts, others))
                for batch in self.bench(size, *changes).batches
            )
            return bench.first()

        try:
            return simulate(count, work, DeviceManager().device)[0]
        except OutOfStep as error:
            raise AssertionError(
                f"{count} processes call `run.gather` a different number of times, which deadlocks a real run: {error}; call it"
                " equally often on every process, for example once per window"
            ) from None

    def same(self, found: Step, expected: Step, what: str) -> None:
        """Fail unless two updates have the same loss and gradient within `allowed`.

        Args:
            found, expected: the updates.
            what: what was changed between the two updates, for the message.
        """
        require(
            found.gradient.keys() == expected.gradient.keys(),
            f"{what}, different parameters get a gradient:"
            f" {', '.join(sorted(found.gradient.keys() ^ expected.gradient.keys())[:4])}",
        )
        # A loss near zero may be a difference of large parts, such as advantages of both signs; the gradient's norm shows their
        # size.
        size = max(abs(expected.loss), norm(expected.gradient), 1e-12)
        loss = abs(found.loss - expected.loss) / size
        gradient = distance(found.gradient, expected.gradient)
        require(
            loss <= self.allowed and gradient <= self.allowed,
            f"{what}, the first update changes: loss {found.loss:.7g} instead of {expected.loss:.7g}; relative difference of the"
            f" loss {loss:.1e}, of the gradient {gradient:.1e} ({self.allowed:.0e} is allowed)",
        )

    def same_metrics(self, found: Step, expected: Step, what: str) -> None:
        """Fail unless two updates report the same metrics within ten tolerances: some are small differences of large sums."""
        require(
            found.metrics.keys() == expected.metrics.keys(),
            f"{what}, the step reports the metrics {sorted(found.metrics)} instead of {sorted(expected.metrics)}",
        )
        allowed = 10 * self.allowed
        wrong = [
            f"`{name}` is {value:.6g} instead of {expected.metrics[name]:.6g}"
            for name, value in found.metrics.items()
            if not math.isclose(value, expected.metrics[name], rel_tol=allowed, abs_tol=allowed)
        ]
        require(not wrong, f"{what}, metrics change: {'; '.join(wrong)}; report a metric as a pair (sum, count)")

    def resume(self, changes: Mapping[str, Any], *, times: int) -> None:
        """Fail unless a run that is interrupted after five windows and resumed ends with the bits of one that isn't interrupted.

        Args:
            changes: options that override those of the contract.
            times: how many of the last checkpoints to resume from.
        """
        run = {"max_steps": 9, "micro_batch_size": 5, "checkpoint": {"every": 1, "keep": 9}}
        kind = interruptible(self.subject())
        with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
            whole, broken = Path(folder) / "whole", Path(folder) / "broken"
            self.build(run, changes, output=whole, kind=kind).train(quiet=True)
            trainer = self.build(run, changes, output=broken, kind=kind)
            trainer.stop_after = 5  # type: ignore[attr-defined]
            try:
                trainer.train(quiet=True)
            except StoppedEarly:
                pass
            else:
                raise AssertionError("the run made its nine steps from fewer than six windows of `experience`")
            saved = sorted(CheckpointManager(broken / "checkpoints").steps())
            require(
                bool(saved),
                "none of the first five windows is the last of its rollout (`Window.last`), so no checkpoint was saved",
            )
            for step in saved[-times:]:
                resumed = Path(folder) / f"resumed-{step}"
                shutil.copytree(broken, resumed)
                manager = CheckpointManager(resumed / "checkpoints")
                for later in (one for one in saved if one > step):
                    shutil.rmtree(manager.path(later))
                self.build(run, changes, output=resumed, kind=kind).train(resume=True, quiet=True)
                require_same_run(resumed, whole, f"a resume from step {step}")


def sharpened(divisor: float) -> PolicyModel:
    """Return a policy whose logits are those of `sharpened(1)` divided by a number."""
    model = tiny_model(hidden=32, heads=2, kv_heads=1, tie_embeddings=False)
    _end_often(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight / divisor)
    return PolicyModel(model, tiny_tokenizer())


@torch.no_grad()
def _end_often(model: Any) -> None:
    """Raise the logit of the end token of a tiny model with tied embeddings, so that many completions end."""
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = (
        1.0  # nearly constant in the hidden states, so that the first column acts as a bias of the logits
    )
    embeddings[model.config.eos_token_id, 0] = 3.5


def norm(gradient: Mapping[str, Tensor]) -> float:
    """Return the 2-norm of a gradient over all parameters, in float64."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values()))


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all parameters, in float64."""
    difference = norm({name: found[name].double() - value.double() for name, value in expected.items()})
    size = norm(expected)
    return difference / size if size else math.inf if difference else 0.0
