"""Windows: how many there are, where checkpoints and evaluations fall among them, and what the schedule counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from toy import ROWS, ToyTrainer, toy

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Window
from rlhf_core.infra.errors import NumbersError, PluginError
from rlhf_core.testing import simulate
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, require_same_run
from rlhf_core.training.context import RunContext
from rlhf_core.training.distribution import Distribution


class Four(ToyTrainer):
    """Learns from each batch four times."""

    def windows_per_batch(self) -> int | None:
        return 4

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window]:
        for batch in super().experience(stream, run):
            assert isinstance(batch, Batch)
            for number in range(1 if run.evaluating else 4):
                yield Window(batch, last=run.evaluating or number == 3)


class Unstated(Four):
    """The same, and says nothing of it."""

    def windows_per_batch(self) -> int | None:
        return 1


class Overstated(ToyTrainer):
    """Says that it makes two windows of a batch, and makes one."""

    def windows_per_batch(self) -> int | None:
        return 2


class Unknown(Four):
    """As many windows as the data decide."""

    def windows_per_batch(self) -> int | None:
        return None


class Picky(ToyTrainer):
    """Takes batches until one begins with an even row: dynamic sampling."""

    def windows_per_batch(self) -> int | None:
        return None

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        return super().experience((batch for batch in stream if batch.rows[0] % 2 == 0), run)


class Never(Picky):
    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        return super().experience((batch for batch in stream if batch.rows[0] < 0), run)


EPOCHS: dict[str, Any] = {"max_steps": None, "epochs": 2.0, "lr_schedule": "linear", "warmup_ratio": 0.0}


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").iterdir())


def test_checkpoints_are_saved_at_the_first_end_of_a_rollout_that_is_due(tmp_path: Path) -> None:
    """Every 7 steps with rollouts of 4: the steps 7, 14, 21 and 28 are passed at 8, 16, 24 and 28."""
    toy(tmp_path, kind=Four, max_steps=28, checkpoint={"every": 7, "keep": 9, "minutes": None}).train()
    assert checkpoints(tmp_path) == [8, 16, 24, 28]


def test_evaluations_wait_for_the_end_of_a_rollout_too(tmp_path: Path) -> None:
    toy(tmp_path, kind=Four, max_steps=14, eval_rows=ROWS[:8], eval_steps=3).train()
    assert [row["step"] for row in rows_of(tmp_path) if "eval_loss" in row] == [4, 8, 12, 14]


class LastIsEmpty(Four):
    """The last window of the first rollout holds nothing to learn from."""

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window]:
        for window in super().experience(stream, run):
            nothing = window.last and run.step == 3 and not run.evaluating
            mask = window.batch.loss_mask & (not nothing)
            yield Window(replace(window.batch, loss_mask=mask), last=window.last)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {name: weight * bool(batch.loss_mask.any()) for name, weight in super().weights(batch).items()}


def test_an_evaluation_waits_no_longer_where_the_last_window_is_skipped(tmp_path: Path) -> None:
    """A run that is resumed there evaluates at once, so one that never was must, too."""
    toy(tmp_path, kind=LastIsEmpty, max_steps=8, eval_rows=ROWS[:8], eval_steps=3).train()
    assert [row["step"] for row in rows_of(tmp_path) if "eval_loss" in row] == [3, 7, 8]


def test_a_run_that_ends_inside_a_rollout_is_finished_and_resumes_as_that(tmp_path: Path) -> None:
    first = toy(tmp_path, kind=Four, max_steps=6).train()
    assert checkpoints(tmp_path) == [4, 6]  # a longer run would continue from step 4
    again = toy(tmp_path, kind=Four, max_steps=6).train(resume=True)
    assert again.step == first.step == 6 and again.metrics["loss"] == first.metrics["loss"]


def test_epochs_end_where_the_data_do_however_many_windows_there_are(tmp_path: Path) -> None:
    """40 rows in batches of 8, twice: 10 batches, 40 windows, whether they are counted beforehand or not."""
    for kind in (Four, Unknown):
        output = tmp_path / kind.__name__
        assert toy(output, kind=kind, **EPOCHS).train().step == 40
        rates = [row["learning_rate"] for row in rows_of(output)]
        assert rates == sorted(rates, reverse=True) and rates[0] == 0.02 and 0 < rates[-1] <= 0.002 + 1e-9
        assert len(set(rates)) == (40 if kind is Four else 10)  # by windows, or by batches


@pytest.mark.parametrize("kind", [Unstated, Overstated])
def test_a_wrong_number_of_windows_is_refused_at_once(tmp_path: Path, kind: type[ToyTrainer]) -> None:
    with pytest.raises(PluginError, match="`windows_per_batch` says") as caught:
        toy(tmp_path, kind=kind, **EPOCHS).train()
    assert caught.value.exit_code == 5 and kind.__name__ in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists() or len(rows_of(tmp_path)) <= 2


def test_with_max_steps_the_number_of_windows_is_of_no_concern(tmp_path: Path) -> None:
    assert toy(tmp_path, kind=Unstated, max_steps=10).train().step == 10


@pytest.mark.parametrize("options", [EPOCHS, {"max_steps": 7}])
def test_dynamic_sampling_ends_and_its_schedule_with_it(tmp_path: Path, options: dict[str, Any]) -> None:
    result = toy(tmp_path, kind=Picky, **{"lr_schedule": "linear", "warmup_ratio": 0.0, **options}).train()
    rates = [row["learning_rate"] for row in rows_of(tmp_path)]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0
    if "epochs" in options:
        assert 0 < result.step < 10
    else:
        assert result.step == 7 and rates[-1] == pytest.approx(0.02 / 7)


def test_dynamic_sampling_resumes_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "checkpoint": {"every": 1}, "kind": interruptible(Picky)}
    toy(tmp_path / "whole", **options).train()
    broken = toy(tmp_path / "broken", **options)
    broken.stop_after = 4  # type: ignore[attr-defined]
    with pytest.raises(StoppedEarly):
        broken.train()
    toy(tmp_path / "broken", **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")


def test_data_that_never_make_a_window_end_the_run() -> None:
    with pytest.raises(NumbersError, match="5 batches in a row gave nothing to learn from") as caught:
        toy(kind=Never, max_steps=3, max_idle_batches=5).train()
    assert "max_idle_batches" in str(caught.value.fix)


class Hoarder(ToyTrainer):
    """Takes eight batches for a window."""

    says_so = True

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterator[Window]:
        for number, window in enumerate(super().experience(stream, run), 1):
            if self.says_so:
                run.hold()
            if number % 8 == 0:
                yield window


def test_batches_that_are_held_for_a_later_window_are_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toy(kind=Hoarder, max_steps=2, max_idle_batches=1).train().step == 2
    monkeypatch.setattr(Hoarder, "says_so", False)
    with pytest.raises(NumbersError, match="5 batches in a row gave nothing to learn from"):
        toy(kind=Hoarder, max_steps=2, max_idle_batches=5).train()


class Alike(Four):
    """Two of three batches hold nothing to learn from, in all of their windows."""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        weights = super().weights(batch)
        return weights if self.windows % 3 == 0 else dict.fromkeys(weights, 0.0)


def test_windows_with_nothing_to_learn_from_count_by_the_batch(tmp_path: Path) -> None:
    """Eight skipped windows in a row are two batches; and the schedule of an epoch passes over them to its end."""
    toy(tmp_path, kind=Alike, max_idle_batches=3, **EPOCHS).train()
    rates = [row["learning_rate"] for row in rows_of(tmp_path)]
    assert len(rates) == 12 and rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.02 * (1 - 8 / 40)) and rates[-1] == pytest.approx(0.02 * (1 - 35 / 40))


class ReadsAhead(ToyTrainer):
    """Takes the next batch before it yields the one that it has: what it holds back would be lost at a checkpoint."""

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        stream = iter(stream)
        held = next(stream)
        for batch in stream:
            yield from super().experience(iter([held]), run)
            held = batch
        yield from super().experience(iter([held]), run)


class NeverLast(Four):
    """Says of no window that it is its rollout's last."""

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window]:
        for window in super().experience(stream, run):
            yield Window(window.batch, last=False)


def test_a_batch_that_is_held_back_is_refused() -> None:
    with pytest.raises(PluginError, match="got 1 windows from 2 batches"):
        toy(kind=ReadsAhead, **EPOCHS).train()


def test_a_rollout_without_an_end_is_refused() -> None:
    with pytest.raises(PluginError, match="before it has yielded the rollout's last window"):
        toy(kind=NeverLast, max_steps=9).train()


def test_fewer_held_out_rows_than_processes_are_scored() -> None:
    from rlhf_core.data import DataStream, SFTDataset
    from rlhf_core.testing import tiny_tokenizer

    data = SFTDataset(ROWS[:1], tiny_tokenizer(), max_length=64)
    parts = [DataStream(data, batch_size=4, held_out=True, rank=rank, world_size=2) for rank in range(2)]
    assert [[batch.rows for batch in part] for part in parts] == [[(0,)], [()]]


class Strange(ToyTrainer):
    made: ClassVar[Any] = "window"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Any:
        yield self.made


def test_what_is_no_window_is_refused() -> None:
    with pytest.raises(PluginError, match=r"neither a `Batch` nor a `Window` of one.*got str"):
        toy(kind=Strange).train()


def test_a_function_of_the_step_gives_each_process_its_own_rows() -> None:
    """Ranks over the whole step, in the order of rows: the same for one process and for three with unequal shares."""
    import torch

    from rlhf_core.testing import run_context

    values = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 0.0])

    def ranks(whole: torch.Tensor) -> torch.Tensor:
        return whole.argsort().argsort() + torch.arange(len(whole)) * 10

    def work(shares: list[list[int]]) -> Any:
        def own(process: Any) -> list[int]:
            share = shares[process.rank]
            run = run_context(toy(), distribution=process)
            return run.over_step(ranks, values[share], rows=share).tolist()

        return simulate(len(shares), own)

    whole = work([[0, 1, 2, 3, 4, 5]])[0]
    assert whole == [3, 11, 22, 35, 44, 50]
    assert work([[4], [1, 5, 0], [3, 2]]) == [[44], [11, 50, 3], [35, 22]]


@pytest.mark.parametrize("times", [0, 2])
def test_a_function_of_the_step_returns_one_entry_per_row(times: int) -> None:
    import torch

    from rlhf_core.testing import run_context

    run = run_context(toy())
    with pytest.raises(PluginError, match=rf"one entry per row, 3 of them; got a tensor \({3 * times},\)"):
        run.over_step(lambda whole: whole.repeat(times), torch.zeros(3), rows=[0, 1, 2])
    with pytest.raises(PluginError, match="one entry per row, 3 of them; got list"):
        run.over_step(lambda whole: whole.tolist(), torch.zeros(3), rows=[0, 1, 2])


@pytest.mark.parametrize(
    "other", [torch.zeros(0), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4, dtype=torch.float64)]
)
def test_tensors_that_no_step_can_join_are_refused_on_every_process(other: torch.Tensor) -> None:
    """Read as another type, the bytes of one process would be numbers that nobody gathered."""

    def gathered(distribution: Distribution) -> str:
        ours = torch.ones(3, 3, dtype=torch.float64) if distribution.rank == 0 else other
        with pytest.raises(PluginError, match="different types or shapes") as raised:
            distribution.gather_tensor(ours)
        return str(raised.value)

    first, second = simulate(2, gathered)
    assert first == second and "float64 (3, 3)" in first


def test_gather_joins_tensors_and_lists_and_lists_numbers() -> None:
    import torch

    from rlhf_core.testing import run_context

    def work(process: Any) -> Any:
        run, rank = run_context(toy(), distribution=process), process.rank
        tensor = run.gather(torch.arange(rank + 1) + 10 * rank)
        return (
            tensor.tolist(),
            run.gather([rank] * rank),
            run.gather(rank),
            run.gather(torch.tensor(rank + 0.5)).tolist(),
        )

    assert simulate(3, work) == [([0, 10, 11, 20, 21, 22], [1, 2, 2], [0, 1, 2], [0.5, 1.5, 2.5])] * 3
