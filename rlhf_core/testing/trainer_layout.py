"""Checks that an update is the same for any padding, packing, micro-batches, order of rows and number of processes."""

from __future__ import annotations

from unittest import SkipTest

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.testing.contract import after, require
from rlhf_core.testing.scripted_engine import Script
from rlhf_core.testing.simulated_processes import OutOfStep, simulate
from rlhf_core.testing.trainer_setup import GRADIENT, TrainerSetup
from rlhf_core.testing.workbench import Workbench
from rlhf_core.training.distribution import Distribution


class LayoutChecks(TrainerSetup):
    """The first update under different layouts of the same rows."""

    @after(GRADIENT)
    def test_padding_changes_nothing(self) -> None:
        """Wider padding, filled with a garbage token id, gives the same loss and gradient."""
        self.same(self.step(change=Workbench.pad), self.step(), "with padding")

    @after(GRADIENT)
    def test_micro_batches_change_nothing(self) -> None:
        """Micro-batches of 1, 2, 3 and 8 rows, and of at most 200 tokens, give the same loss and gradient as the default ones."""
        expected = self.step()
        for size in (1, 2, 3, 8):
            self.same(self.step({"micro_batch_size": size}), expected, f"with micro_batch_size {size}")
        self.same(self.step({"batching": {"micro_batch_tokens": 200}}), expected, "with micro_batch_tokens 200")

    @after(GRADIENT)
    def test_length_grouping_changes_nothing(self) -> None:
        """Micro-batches of rows of similar lengths, or in the data's order, give the same loss and gradient."""
        grouped, plain = (
            self.step({"micro_batch_size": 2, "batching": {"length_grouped": flag}}) for flag in (True, False)
        )
        self.same(plain, grouped, "without length_grouped")

    @after(GRADIENT)
    def test_packing_changes_nothing(self) -> None:
        """Packed rows give the same loss and gradient as padded ones."""
        packed, plain = (self.step({"batching": {"layout": layout}}) for layout in ("packed", "padded"))
        self.same(packed, plain, "with packed rows")

    @after(GRADIENT)
    def test_shared_prompts_change_nothing(self) -> None:
        """A prompt computed once for all of its responses gives the same loss and gradient as computed for each."""
        _, window = self.window()
        if window.num_responses == window.num_prompts:
            raise SkipTest("each prompt has one response, so no prompt is shared")
        shared, apart = (self.step({"batching": {"layout": "packed", "share_prompts": flag}}) for flag in (True, False))
        self.same(shared, apart, "with share_prompts")

    @after(GRADIENT)
    def test_order_of_rows_changes_nothing(self) -> None:
        """The same rows and completions in another order give the same loss, gradient and metrics."""
        plain = {"batching": {"length_grouped": False}}
        bench, window = self.window(plain)
        expected = bench.step(window)
        found = bench.step(window.select(range(window.num_prompts)[::-1]))
        self.same(found, expected, "with rows in another order")
        self.same_metrics(found, expected, "with rows in another order")
        if not self.repeatable:
            return
        expected = self.step(plain)
        mixed = self.bench(plain, script=Script(self.script.drawn, swapped=True))
        mixed.batches = (batch.select(_shuffled(batch.num_prompts)) for batch in mixed.batches)
        found = mixed.first()
        what = "with the batch's rows in another order before `experience`"
        what += (
            ""
            if self.offline
            else " and completions exchanged within prompts (does each get its own reward, by `owner`?)"
        )
        self.same(found, expected, what)
        self.same_metrics(found, expected, what)

    @after(GRADIENT)
    def test_metrics_change_nothing_with_micro_batches(self) -> None:
        """Micro-batches of 1 and 3 rows give the same reported metrics as the default ones."""
        expected = self.step()
        if not expected.metrics:
            raise SkipTest("the method reports no metrics")
        for size in (1, 3):
            self.same_metrics(self.step({"micro_batch_size": size}), expected, f"with micro_batch_size {size}")

    @after(GRADIENT)
    def test_processes_change_nothing(self) -> None:
        """Two and three processes among which the rows are divided make the same update as one."""
        if not self.repeatable:
            raise SkipTest(
                "the method doesn't generate by `run.engine`, so processes can't be given the same completions"
            )
        for count in (2, 3):
            found, expected = self.shared(count), self.shared(1, {"batch_size": self.shared_rows(count)})
            self.same(found, expected, f"with {count} processes")
            self.same_metrics(found, expected, f"with {count} processes")

    @after(GRADIENT)
    def test_a_process_without_rows_takes_part(self) -> None:
        """A process without rows in a step gathers as often as the others, and yields an empty window with the same columns."""
        if not self.repeatable:
            raise SkipTest(
                "the method doesn't generate by `run.engine`, so processes can't be given the same completions"
            )
        self.window()  # records the completions in the script

        def work(distribution: Distribution) -> Batch:
            bench, main = self.bench(distribution=distribution, script=self.script), distribution.is_main
            bench.batches = (one if main else one.select([]) for one in self.bench().batches)
            return bench.window()

        try:
            full, empty = simulate(2, work, DeviceManager().device)
        except OutOfStep as error:
            raise AssertionError(
                f"a process without rows calls `run.gather` less often than the others: {error}"
            ) from None
        require(
            empty.num_prompts == 0,
            f"on a process without rows, `experience` makes a window of {empty.num_prompts} prompts from an empty batch",
        )
        for kind in ("per_prompt", "per_response", "per_token"):
            lost = sorted(getattr(full, kind).keys() ^ getattr(empty, kind).keys())
            require(
                not lost, f"the window of a process without rows has other columns than the others': {', '.join(lost)}"
            )


def _shuffled(count: int) -> list[int]:
    """Return the numbers below `count` in a fixed order, neither reversed nor rotated: some faults don't show in those."""
    return sorted(range(count), key=lambda number: (7 * number + 3) % 11)
