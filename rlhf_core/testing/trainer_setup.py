"""What the trainers' contract works with: a model, rows, a new trainer on them, and updates to compare."""

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
from rlhf_core.config.yaml_file import merge
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.records import RECORDS
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.models import PolicyModel
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.contract import MethodContract, require
from rlhf_core.testing.interrupted_runs import Interrupted, interruptible, require_same_run
from rlhf_core.testing.scripted_engine import Script, TokenShare
from rlhf_core.testing.simulated_processes import OutOfStep, simulate
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Step, Workbench
from rlhf_core.training.checkpoint import CheckpointManager
from rlhf_core.training.distribution import Distribution

Result = TypeVar("Result")

TERMS = "test_every_term_has_a_weight"
GRADIENT = "test_trained_models_get_a_gradient"
"""The two checks that others build on: where one fails, those are skipped, so that one fault is reported once."""


class TrainerSetup(MethodContract):
    """The part of the contract that a method may need to change; it holds no test of its own."""

    kind = "trainer"
    _made: ClassVar[dict[Any, Any]]
    """What several checks look at, made once."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._made = {}

    trainer: ClassVar[type[Trainer] | None] = None
    """The class under test, in place of `method`."""
    rewards: ClassVar[Sequence[Any]] = (TokenShare(bit=1),)
    """What an online method learns from where `options` name no rewards: dense, and a function of a completion's ids alone."""
    constant_weights: ClassVar[bool] = False
    """Whether a term is averaged over a constant on purpose, such as the longest completion that there may be."""
    first_loss: ClassVar[float | Literal["nll"] | None] = None
    """The loss of the first window before any step where it is known, such as ln 2; `nll` is the negative log-likelihood per
    token in the loss. None compares nothing."""
    learning: ClassVar[Mapping[str, Any]] = {}
    """Options with which a tiny model learns in a few steps, where those of the checks are too slow or too careful."""
    no_effect: ClassVar[Sequence[str]] = ()
    """Options of the method, groups' as `group.option`, that change nothing which the checks look at, for a good reason."""
    no_gradient: ClassVar[Sequence[str]] = ()
    """Options that change the loss and not its gradient, for a good reason."""
    other_values: ClassVar[Mapping[str, Any]] = {}
    """For an option, a value (or a list of values) to try in place of its own; others are derived from its type."""
    tolerance: ClassVar[float] = 1e-5
    """Relative difference of loss and gradient that rounding may make in float32 on a CPU; on a GPU, which takes other kernels
    for other shapes, three times that."""

    @property
    def allowed(self) -> float:
        """`tolerance` on the device that trains."""
        return self.tolerance * (1 if DeviceManager().kind == "cpu" else 3)

    def model(self) -> PolicyModel | str | Path:
        """Return the model to train, always the same one; for a method that generates, one that ends its texts now and then."""
        model = tiny_model(hidden=32, heads=2, kv_heads=1)
        if not self.offline:
            _end_often(model)
        return PolicyModel(model, tiny_tokenizer())

    def rows(self) -> list[dict[str, Any]]:
        """Return about 20 rows of the method's record, of unequal lengths."""
        record = self.subject().record
        short, long = (ArithmeticTask(terms=terms).rows(record, 10, seed=terms) for terms in (2, 4))
        return list(chain.from_iterable(zip(short, long, strict=True)))

    @property
    def rewarded(self) -> bool:
        """Whether the method learns from rewards."""
        config = self.subject().Config
        return issubclass(config, OnlineConfig) and config.needs_rewards

    def several_windows(self, *, minibatches: int = 2) -> dict[str, Any]:
        """Return options with which an online method makes several windows of a rollout, where it has the usual ones."""
        known = issubclass(self.subject().Config, OnlineConfig)
        return {"rollout_epochs": 2, "minibatches": minibatches} if known else {}

    @property
    def offline(self) -> bool:
        """Whether the responses come from the data: then experience is the same however rows are laid out."""
        return bool(RECORDS[self.subject().record].responses)

    def build(
        self,
        *changes: Mapping[str, Any],
        output: Path | None = None,
        kind: type[Trainer] | None = None,
        rewards: Sequence[Any] | None = None,
        model: PolicyModel | None = None,
    ) -> Trainer:
        """Return a new trainer with `options` and these changes on top, on a copy of the model.

        `rewards` and `model` stand in place of the contract's own.
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
        if issubclass(kind.Config, OnlineConfig):
            values = {**values, "generation": {"max_new_tokens": 8}, "group_size": 4}
        for over in (self.options, *changes):
            values = merge(values, over)
        given: dict[str, Any] = {}
        if rewards is not None or (self.rewarded and not values.get("rewards")):
            values = {**values, "rewards": []}
            given["rewards"] = list(rewards if rewards is not None else self.rewards)
        config = kind.Config.parse(values, place=f"{type(self).__name__}.options")
        return kind(config, model=copy.deepcopy(model or self.model()), data=rows, output=output, **given)

    @property
    def batch_size(self) -> int:
        """Rows of a step: fewer prompts than rows with responses, since each is completed several times."""
        return 8 if self.offline else 4

    def bench(
        self,
        *changes: Mapping[str, Any],
        moved: bool = True,
        distribution: Distribution | None = None,
        script: Script | None = None,
        **given: Any,
    ) -> Workbench:
        """Return a new trainer prepared for its first window; `moved` puts its models off their start, always alike.

        Its engine repeats a script where one is given. `given` goes to `build`.
        """
        bench = Workbench(self.build({"max_grad_norm": None}, *changes, **given), distribution, script)
        if moved:
            bench.move()
        return bench

    def once(self, key: Any, make: Callable[[], Result]) -> Result:
        """Return what `make` returns, made once for all checks of the class."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def script(self) -> Script:
        """The completions that all updates are compared on."""
        return self.once("script", Script)

    @property
    def repeatable(self) -> bool:
        """Whether the same experience can be made again under other layouts: from the data, or from the script."""

        def tried() -> bool:
            bench = self.bench(script=self.script)
            bench.window()
            return bench.run.generated

        return self.offline or self.once("repeatable", tried)

    def window(self, *changes: Mapping[str, Any], script: Script | None = None) -> tuple[Workbench, Batch]:
        """Return a workbench, its models off their start, with the first window on the script."""
        bench = self.bench(*changes, script=script or self.script)
        return bench, bench.window()

    def step(self, *changes: Mapping[str, Any], change: Callable[[Workbench], None] | None = None) -> Step:
        """Return the first update under changed options, on the same responses as every other such update.

        `change` may alter the workbench before its first window.
        """

        def made() -> Step:
            bench = self.bench(*changes, script=self.script)
            if change is not None:
                change(bench)
            if self.repeatable:
                return bench.first()
            # A method that draws by itself: its responses are those of one run.
            return bench.step(self.bench().window())

        return made() if change is not None else self.once(("step", repr(changes)), made)

    def shared_rows(self, count: int) -> int:
        """Return rows in a step that so many processes can share evenly."""
        return max(1, min(self.batch_size, len(self.rows())) // count) * count

    def shared(self, count: int, *changes: Mapping[str, Any]) -> Step:
        """Return the first update of so many processes that share its rows, unevenly: the first has one row alone."""
        size = {"batch_size": self.shared_rows(count)}
        if not self.offline:
            self.bench(size, *changes, script=self.script).window()  # so that the script knows them all

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
                f"{count} processes don't gather equally often, so they would wait for ever: {error}; gather once a window"
            ) from None

    def same(self, found: Step, expected: Step, what: str) -> None:
        """Fail unless two updates are equal within `tolerance`."""
        require(
            found.gradient.keys() == expected.gradient.keys(),
            f"{what}: other parameters get a gradient:"
            f" {', '.join(sorted(found.gradient.keys() ^ expected.gradient.keys())[:4])}",
        )
        # A loss near zero may be the difference of large parts, such as advantages of both signs; its gradient shows their size.
        size = max(abs(expected.loss), norm(expected.gradient), 1e-12)
        loss = abs(found.loss - expected.loss) / size
        gradient = distance(found.gradient, expected.gradient)
        require(
            loss <= self.allowed and gradient <= self.allowed,
            f"{what}: loss {found.loss:.7g} instead of {expected.loss:.7g}; relative difference of the loss {loss:.1e}, of"
            f" the gradient {gradient:.1e} ({self.allowed:.0e} is allowed)",
        )

    def same_metrics(self, found: Step, expected: Step, what: str) -> None:
        """Fail unless the metrics are equal. Some are small differences of large sums, so they get ten tolerances."""
        require(
            found.metrics.keys() == expected.metrics.keys(),
            f"{what}: metrics {sorted(found.metrics)} instead of {sorted(expected.metrics)}",
        )
        allowed = 10 * self.allowed
        wrong = [
            f"`{name}` is {value:.6g} instead of {expected.metrics[name]:.6g}"
            for name, value in found.metrics.items()
            if not math.isclose(value, expected.metrics[name], rel_tol=allowed, abs_tol=allowed)
        ]
        require(not wrong, f"{what}: {'; '.join(wrong)}; report a pair (sum, count)")

    def resume(self, changes: Mapping[str, Any], *, times: int) -> None:
        """Train nine steps; train again, stop behind the fifth window, and resume from each of the last checkpoints; compare."""
        run = {"max_steps": 9, "micro_batch_size": 5, "checkpoint": {"every": 1, "keep": 9}}
        kind = interruptible(self.subject())
        with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
            whole, broken = Path(folder) / "whole", Path(folder) / "broken"
            self.build(run, changes, output=whole, kind=kind).train()
            trainer = self.build(run, changes, output=broken, kind=kind)
            trainer.stop_after = 5  # type: ignore[attr-defined]
            try:
                trainer.train()
            except Interrupted:
                pass
            else:
                raise AssertionError("the run took nine steps from fewer than six windows")
            saved = sorted(CheckpointManager(broken / "checkpoints").steps())
            require(bool(saved), "no window of the first five is its rollout's last, so nothing could be saved")
            for step in saved[-times:]:
                resumed = Path(folder) / f"resumed-{step}"
                shutil.copytree(broken, resumed)
                manager = CheckpointManager(resumed / "checkpoints")
                for later in (one for one in saved if one > step):
                    shutil.rmtree(manager.path(later))
                self.build(run, changes, output=resumed, kind=kind).train(resume=True)
                require_same_run(resumed, whole, f"a resume from step {step}")


def sharpened(divisor: float) -> PolicyModel:
    """Return a policy whose logits are those of another one, divided by a number."""
    model = tiny_model(hidden=32, heads=2, kv_heads=1, tie_embeddings=False)
    _end_often(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight / divisor)
    return PolicyModel(model, tiny_tokenizer())


@torch.no_grad()
def _end_often(model: Any) -> None:
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = 1.0  # nearly the same in every hidden state, so that it acts as a bias of the logits
    embeddings[model.config.eos_token_id, 0] = 3.5


def norm(gradient: Mapping[str, Tensor]) -> float:
    """Return the 2-norm of a gradient over all parameters, in float64."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values()))


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all parameters, in float64."""
    difference = norm({name: found[name].double() - value.double() for name, value in expected.items()})
    size = norm(expected)
    return difference / size if size else math.inf if difference else 0.0
