"""What the trainers' contract works with: a model, rows, a new trainer on them, and updates to compare."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rlhf_core.infra.devices import DeviceManager
from rlhf_core.interfaces import Trainer
from rlhf_core.models import PolicyModel
from rlhf_core.records import RECORDS
from rlhf_core.testing.arithmetic import Arithmetic
from rlhf_core.testing.contract import Contract, require
from rlhf_core.testing.processes import OutOfStep, simulate
from rlhf_core.testing.runs import Interrupted, interruptible, require_same_run
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Step, Workbench
from rlhf_core.training.distribution import Distribution
from rlhf_core.yaml_files import merge


class TrainerSetup(Contract):
    """The part of the contract that a method may need to change; it holds no test of its own."""

    kind = "trainer"
    trainer: ClassVar[type[Trainer] | None] = None
    """The class under test, in place of `method`."""
    tolerance: ClassVar[float] = 1e-5
    """Relative difference of loss and gradient that rounding may make in float32 on a CPU; on a GPU, which takes other kernels
    for other shapes, three times that."""

    @property
    def allowed(self) -> float:
        """`tolerance` on the device that trains."""
        return self.tolerance * (1 if DeviceManager().kind == "cpu" else 3)

    def model(self) -> PolicyModel | str | Path:
        """Return the model to train, always the same one."""
        return PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())

    def rows(self) -> list[dict[str, Any]]:
        """Return about 20 rows of the method's record, of unequal lengths."""
        record = self.subject().record
        short, long = (Arithmetic(terms=terms).rows(record, 10, seed=terms) for terms in (2, 4))
        return list(chain.from_iterable(zip(short, long, strict=True)))

    @property
    def offline(self) -> bool:
        """Whether the responses come from the data: then experience is the same however rows are laid out."""
        return bool(RECORDS[self.subject().record].responses)

    def build(
        self, *changes: Mapping[str, Any], output: Path | None = None, kind: type[Trainer] | None = None
    ) -> Trainer:
        """Return a new trainer with `options` and these changes on top, on a copy of the model."""
        kind, rows = kind or self.subject(), self.rows()
        values: Mapping[str, Any] = {
            "learning_rate": 3e-3,
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
            "batch_size": min(8, len(rows)),
            "max_length": 256,
            "logging": {"progress": False},
        }
        for over in (self.options, *changes):
            values = merge(values, over)
        config = kind.Config.parse(values, place=f"{type(self).__name__}.options")
        return kind(config, model=copy.deepcopy(self.model()), data=rows, output=output)

    def bench(
        self, *changes: Mapping[str, Any], moved: bool = True, distribution: Distribution | None = None
    ) -> Workbench:
        """Return a new trainer prepared for its first window; `moved` puts its models off their start, always alike."""
        bench = Workbench(self.build({"max_grad_norm": None}, *changes), distribution)
        if moved:
            bench.move()
        return bench

    def step(self, *changes: Mapping[str, Any], change: Callable[[Workbench], None] | None = None) -> Step:
        """Return the first update under changed options, on the same responses as every other such update.

        `change` may alter the workbench before its first window.
        """
        bench = self.bench(*changes)
        if change is not None:
            change(bench)
        # What is sampled hangs on rounding, so an online method's responses are those of one run.
        return bench.step(bench.window() if self.offline else self.bench().window())

    def shared_rows(self, count: int) -> int:
        """Return rows in a step that so many processes can share evenly."""
        return max(1, min(8, len(self.rows())) // count) * count

    def shared(self, count: int, *changes: Mapping[str, Any]) -> Step:
        """Return the first update of so many processes that share its rows, unevenly: the first has one row alone."""
        size = {"batch_size": self.shared_rows(count)}

        def work(distribution: Distribution) -> Step:
            bench = self.bench(size, *changes, distribution=distribution)
            rank, others = distribution.rank, max(count - 1, 1)
            bench.batches = (
                batch if count == 1 else batch.select([0] if rank == 0 else range(rank, batch.num_prompts, others))
                for batch in self.bench(size, *changes).batches
            )
            return bench.step(bench.window())

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
        loss = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-12)
        gradient = _relative(found.gradient, expected.gradient)
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

    def resume(self, changes: Mapping[str, Any]) -> None:
        """Train six steps; train again, stop after three, resume behind the checkpoint of step two; compare."""
        run = {"max_steps": 6, "micro_batch_size": 5, "checkpoint": {"every": 2}}
        kind = interruptible(self.subject())
        with tempfile.TemporaryDirectory(prefix="rlhf-contract-") as folder:
            whole, broken = Path(folder) / "whole", Path(folder) / "broken"
            self.build(run, changes, output=whole, kind=kind).train()
            trainer = self.build(run, changes, output=broken, kind=kind)
            trainer.stop_after = 3  # type: ignore[attr-defined]
            try:
                trainer.train()
            except Interrupted:
                pass
            else:
                raise AssertionError("the run took six steps from fewer than four windows")
            self.build(run, changes, output=broken, kind=kind).train(resume=True)
            require_same_run(broken, whole)


def _relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all parameters, in float64."""
    difference = sum(float((found[name].double() - value.double()).square().sum()) for name, value in expected.items())
    norm = sum(float(value.double().square().sum()) for value in expected.values())
    return math.sqrt(difference / norm) if norm else math.inf if difference else 0.0
