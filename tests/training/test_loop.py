"""The loop: one gradient whatever the cut, faults that step nothing, and a run that ends as it says."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ROWS, ToyTrainer, toy

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss, Window
from rlhf_core.infra.errors import ConfigError, DataError, NumbersError, PluginError, Stopped, StorageError
from rlhf_core.infra.files import read_json
from rlhf_core.training import update as update_module
from rlhf_core.training.logger import TrainingLogger

Gradients = list[torch.Tensor]


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Gradients]:
    """Note the gradients of every optimiser step."""
    noted: list[Gradients] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *args: Any) -> Any:
        noted.append([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return noted


def difference(found: Gradients, expected: Gradients) -> float:
    square = sum(float((a.cpu() - b.cpu()).square().sum()) for a, b in zip(found, expected, strict=True))
    return math.sqrt(square / sum(float(b.square().sum()) for b in expected))


CUTS: list[dict[str, Any]] = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 2},
    {"micro_batch_size": 3, "batching": {"length_grouped": False}},
    {"micro_batch_size": 8},
    {"batching": {"micro_batch_tokens": 20}},
]


def test_the_gradient_is_the_same_for_every_cut(gradients: list[Gradients]) -> None:
    for cut in ({}, *CUTS):
        toy(dropout=0.0, max_steps=1, max_grad_norm=None, **cut).train()
    whole, *others = gradients
    for found in others:
        assert difference(found, whole) < 1e-5


def test_a_mean_of_means_would_be_noticed(gradients: list[Gradients], monkeypatch: pytest.MonkeyPatch) -> None:
    toy(dropout=0.0, max_steps=1, max_grad_norm=None).train()
    monkeypatch.setattr(
        update_module,
        "objective",
        lambda terms, weights, place: sum(term / 8 for term in terms.values()) / 1.0,
    )
    toy(dropout=0.0, max_steps=1, max_grad_norm=None, micro_batch_size=1).train()
    assert difference(gradients[1], gradients[0]) > 0.05


def test_the_gradient_is_that_of_the_formula(gradients: list[Gradients]) -> None:
    """The step's gradient equals autograd's on the loss written out over the whole window at once."""
    windows: list[Batch] = []

    class Noting(ToyTrainer):
        def experience(self, stream: Any, run: Any) -> Any:
            for window in super().experience(stream, run):
                windows.append(window)
                yield window

    trainer = toy(dropout=0.0, max_steps=1, max_grad_norm=None, micro_batch_size=3, kind=Noting)
    trainer.train()
    fresh = toy(dropout=0.0)
    window = windows[0]
    logps = fresh.model.token_logps(window) * window.loss_mask
    loss = -logps.sum() / window.loss_mask.sum()
    loss = loss + (logps.sum(1) * window["noise"] / 50).square().mean()
    loss.backward()
    expected = [p.grad for p in fresh.model.parameters() if p.grad is not None]
    assert len(expected) == 3 and difference(gradients[0], expected) < 1e-5


def test_rows_of_metrics_hold_what_they_promise(tmp_path: Path) -> None:
    result = toy(tmp_path / "run", eval_rows=ROWS[:8], eval_steps=4, max_steps=6).train()
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "tokens_per_second"} <= row.keys()
        assert {"loss_nll", "loss_penalty", "mean_logp"} <= row.keys()
        assert row["loss"] == pytest.approx(row["loss_nll"] + row["loss_penalty"])
        assert row["mean_logp"] == pytest.approx(-row["loss_nll"])
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]
    assert rows[-1]["eval_loss"] < rows[0]["loss"]
    assert result.step == 6 and result.eval_metrics["eval_loss"] == rows[-1]["eval_loss"]
    assert result.tokens == sum(row["tokens"] for row in rows)
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "done" and record["exit_code"] == 0 and record["step"] == 6


def test_tokens_are_real_and_each_prompt_counts_once(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "response": "cde"}] * 8
    result = toy(tmp_path / "run", rows=rows, max_steps=1).train()
    # Two letters and the beginning, three letters and the end, eight times.
    assert result.metrics["tokens"] == 8 * (3 + 4)


def test_epochs_end_the_run(tmp_path: Path) -> None:
    assert toy(max_steps=None, epochs=2.0).train().step == 10
    streamed = toy(
        tmp_path / "run",
        max_steps=None,
        epochs=1.0,
        lr_schedule="constant",
        warmup_ratio=0.0,
        dataset={"streaming": True},
        eval_rows=ROWS[:8],
    ).train()
    assert streamed.step == 5
    assert rows_of(tmp_path / "run")[-1]["eval_loss"] == streamed.eval_metrics["eval_loss"]
    assert read_json(tmp_path / "run" / "data.json")["data"]["rows"] == len(ROWS)


def test_a_schedule_without_a_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="isn't known of streamed data") as caught:
        toy(max_steps=None, dataset={"streaming": True}).train()
    assert caught.value.exit_code == 2 and "max_steps" in str(caught.value.fix)


class Poisoned(ToyTrainer):
    """Its loss isn't finite on the third step."""

    calls = 0

    def loss(self, batch: Batch) -> Loss:
        self.calls += 1
        loss = super().loss(batch)
        if self.calls == 3:
            return Loss({**loss.terms, "nll": loss.terms["nll"] * float("nan")}, loss.metrics)
        return loss


def test_a_loss_that_is_not_finite_steps_nothing(tmp_path: Path) -> None:
    trainer = toy(tmp_path / "run", kind=Poisoned, checkpoint={"every": 1})
    with pytest.raises(NumbersError, match=r"step 3: the loss is not finite on rows \d") as caught:
        trainer.train()
    assert caught.value.exit_code == 6
    manager_state = read_json(tmp_path / "run" / "checkpoints" / "step-2" / "state.json")
    assert manager_state["progress"]["step"] == 2
    assert all(torch.isfinite(p).all() for p in trainer.policy.parameters())
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    record = read_json(tmp_path / "run" / "run.json")
    assert (record["status"], record["exit_code"], record["step"]) == ("failed", 6, 2)
    assert "not finite" in read_json(tmp_path / "run" / "status.json")["message"]


class InfiniteGradient(ToyTrainer):
    """Its loss is finite, and the gradient isn't: the root's slope at zero."""

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        zero = (self.policy.norm.bias * 0).sum()
        return Loss({**loss.terms, "nll": loss.terms["nll"] + zero.sqrt()}, loss.metrics)


def test_a_gradient_that_is_not_finite_steps_nothing() -> None:
    trainer = toy(kind=InfiniteGradient)
    before = trainer.model.head.weight.clone()
    with pytest.raises(NumbersError, match=r"step 1: the gradient's norm is not finite on rows") as caught:
        trainer.train()
    assert caught.value.exit_code == 6
    assert torch.equal(before, trainer.model.head.weight.cpu())


class Masked(ToyTrainer):
    """Finds nothing to learn in some windows."""

    empty: tuple[int, ...] = ()

    def weights(self, batch: Batch) -> Mapping[str, float]:
        weights = super().weights(batch)
        return dict.fromkeys(weights, 0.0) if self.windows in self.empty else weights


class SecondIsEmpty(Masked):
    empty = (2,)


class AllAreEmpty(Masked):
    empty = tuple(range(100))


def test_a_window_without_weight_is_skipped_and_counted(tmp_path: Path) -> None:
    result = toy(tmp_path / "run", kind=SecondIsEmpty, max_steps=3).train()
    assert result.step == 3
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["skipped"] for event in events if event["event"] == "window_skipped"] == [1]
    assert read_json(tmp_path / "run" / "run.json")["skipped_windows"] == 1


def test_too_many_batches_without_weight_are_an_error() -> None:
    with pytest.raises(NumbersError, match="10 batches in a row gave nothing to learn from") as caught:
        toy(kind=AllAreEmpty, max_idle_batches=10).train()
    assert caught.value.exit_code == 6


class OtherTerms(ToyTrainer):
    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": 1.0}


class Detached(ToyTrainer):
    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        return Loss({name: term.detach() for name, term in loss.terms.items()})


class Clashing(ToyTrainer):
    def loss(self, batch: Batch) -> Loss:
        return Loss(super().loss(batch).terms, {"tokens": (1.0, 1.0)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherTerms, "`loss` and `weights` name different terms"),
        (Detached, "gives no trained parameter a gradient"),
        (Clashing, "a metric may not be named `tokens`"),
    ],
)
def test_a_method_that_breaks_its_contract_is_named(kind: type[ToyTrainer], message: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        toy(kind=kind).train()
    assert caught.value.exit_code == 5 and kind.__name__ in str(caught.value)


class Hungry(ToyTrainer):
    """Runs out of memory with more than two prompts a micro-batch, after some gradients were accumulated."""

    def loss(self, batch: Batch) -> Loss:
        if batch.num_prompts > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(batch)


class Starving(ToyTrainer):
    def loss(self, batch: Batch) -> Loss:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def test_out_of_memory_halves_the_micro_batch_and_makes_the_same_update(
    tmp_path: Path, gradients: list[Gradients]
) -> None:
    toy(dropout=0.0, max_steps=2).train()
    toy(tmp_path / "run", kind=Hungry, dropout=0.0, max_steps=2, eval_rows=ROWS[:8]).train()
    plain, hungry = gradients[:2], gradients[2:]
    for found, expected in zip(hungry, plain, strict=True):
        assert difference(found, expected) < 1e-5
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["micro_batch_size"] for event in events if event["event"] == "out_of_memory"] == [4, 2]


def test_out_of_memory_draws_the_same_random_numbers(gradients: list[Gradients]) -> None:
    """With the cut given from the start, dropout is the same as when memory forced it."""
    toy(max_steps=1, micro_batch_size=2).train()
    toy(max_steps=1, kind=Hungry).train()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(NumbersError, match="out of memory with one prompt") as caught:
        toy(kind=Starving).train()
    assert caught.value.exit_code == 6 and "gradient_checkpointing" in str(caught.value.fix)


def test_evaluation_changes_no_random_state_and_no_state(tmp_path: Path) -> None:
    toy(tmp_path / "a", max_steps=6).train()
    toy(tmp_path / "b", max_steps=6, eval_rows=ROWS[:8], eval_steps=1).train()
    for a, b in zip(rows_of(tmp_path / "a"), rows_of(tmp_path / "b"), strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]


def test_an_evaluation_is_shown_below_the_step_that_it_follows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rlhf_core"):
        toy(None, max_steps=2, eval_rows=ROWS[:8], eval_steps=1).train()
    shown = [record.getMessage() for record in caplog.records]
    begins = [found[0] for line in shown if (found := re.match(r"(evaluation of )?step \d", line))]
    assert begins == ["evaluation of step 0", "step 1", "evaluation of step 1", "step 2", "evaluation of step 2"]


def test_evaluation_averages_over_the_whole_set() -> None:
    """A batch size that cuts the held-out rows unevenly gives the same averages."""
    found = [
        toy(dropout=0.0, max_steps=1, batch_size=size, eval_rows=ROWS[:12], learning_rate=1e-12).train().eval_metrics
        for size in (4, 8)
    ]
    assert found[0]["eval_loss_nll"] == pytest.approx(found[1]["eval_loss_nll"], rel=1e-6)
    assert found[0]["eval_mean_logp"] == pytest.approx(-found[0]["eval_loss_nll"])


class Terminated(ToyTrainer):
    """Is sent SIGTERM while it makes its third step."""

    def loss(self, batch: Batch) -> Loss:
        if self.windows == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(batch)


def test_sigterm_saves_the_step_and_stops(tmp_path: Path) -> None:
    output = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after step 3; its state is saved") as caught:
        toy(output, kind=Terminated).train()
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert (output / "checkpoints" / "step-3" / "manifest.json").exists()
    assert read_json(output / "status.json") == {
        "status": "stopped", "exit_code": 75, "step": 3, "message": str(caught.value).replace("resume=True", "--resume")
    }  # fmt: skip
    toy(output, kind=Terminated).train(resume=True)
    toy(tmp_path / "whole").train()
    assert (output / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()


class BetweenBoundaries(Terminated):
    """Makes two windows of one batch: a checkpoint waits for the second."""

    def experience(self, stream: Any, run: Any) -> Any:
        for batch in super().experience(stream, run):
            for last in (False, True):
                self.inside = not last
                yield Window(batch, last=last)

    def loss(self, batch: Batch) -> Loss:
        if self.windows == 2 and self.inside:
            os.kill(os.getpid(), signal.SIGTERM)
        return ToyTrainer.loss(self, batch)


def test_checkpoints_wait_for_a_boundary(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="after step 4"):
        toy(tmp_path / "run", kind=BetweenBoundaries, checkpoint={"every": 1, "keep": 9}).train()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_an_interrupt_is_noted_and_nothing_is_saved(tmp_path: Path) -> None:
    class Interrupted(ToyTrainer):
        def loss(self, batch: Batch) -> Loss:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "run", kind=Interrupted).train()
    record = read_json(tmp_path / "run" / "run.json")
    assert (record["status"], record["exit_code"]) == ("stopped", 130)


def test_early_stopping_ends_the_run_and_is_kept_over_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_rows": ROWS[:8],
        "eval_steps": 1,
        "max_steps": 12,
        "early_stopping": {"metric": "eval_loss", "patience": 2, "min_delta": 100.0},
    }
    result = toy(tmp_path / "run", **options).train()
    # The first evaluation is the best there is; two more without such a gain end the run.
    assert result.stopped_early and result.step == 3
    again = toy(tmp_path / "run", **options).train(resume=True)
    assert again.stopped_early and again.step == 3


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ({"eval_steps": 2}, "evaluations need held-out data", "eval_data"),
        ({"early_stopping": {}}, "early stopping needs evaluations", "eval_data"),
        ({"early_stopping": {}, "eval_rows": ROWS[:8]}, "early stopping needs evaluations", "eval_steps"),
        ({"checkpoint": {"every": 2}}, "no directory for checkpoints", "output"),
        ({"max_length": 500}, r"longer than the model's positions; got 500 for a model of 128", "max_length: 128"),
        ({"logging": {"trackers": ["trackio"]}}, "tracker `trackio` isn't installed", r"rlhf-core\[trackio\]"),
        ({"distributed": {"world_size": 2}}, "2 processes were asked for; got 1 running", "torchrun"),
        ({"distributed": {"strategy": "ddp"}}, "torchrun didn't start this process", "torchrun"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        toy(**options).train()
    assert caught.value.exit_code == 2
    assert re.search(fix, str(caught.value.fix))


def test_an_unknown_metric_to_watch_is_refused_before_the_first_step() -> None:
    trainer = toy(eval_rows=ROWS[:8], eval_steps=5, early_stopping={"metric": "eval_los", "mode": "min"})
    with pytest.raises(ConfigError, match="no metric `eval_los`; fix: did you mean `eval_loss`"):
        trainer.train()
    assert trainer.windows == 0


class NotFinite(ToyTrainer):
    """Has a metric that isn't a number, and a loss over held-out rows that isn't finite."""

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        terms = dict(loss.terms) if self.policy.training else {**loss.terms, "nll": loss.terms["nll"] * math.inf}
        return Loss(terms, {"odd": (math.nan, 1.0), "steep": (-math.inf, 1.0)})


def test_metrics_that_are_not_finite_are_saved_and_come_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": NotFinite, "eval_rows": ROWS[:8], "eval_steps": 1, "max_steps": 2}
    first = toy(tmp_path, checkpoint={"every": 1}, **options).train()
    again = toy(tmp_path, checkpoint={"every": 1}, **options).train(resume=True)
    for result in (first, again):
        assert math.isnan(result.metrics["odd"]) and result.metrics["steep"] == -math.inf
        assert result.eval_metrics["eval_loss"] == math.inf and math.isnan(result.eval_metrics["eval_odd"])
    assert again.metrics.keys() == first.metrics.keys() and again.metrics["loss"] == first.metrics["loss"]
    assert rows_of(tmp_path)[-1]["odd"] is None


class Reused(ToyTrainer):
    """Learns from each batch twice."""

    def windows_per_batch(self) -> int:
        return 2

    def experience(self, stream: Any, run: Any) -> Any:
        for batch in super().experience(stream, run):
            yield Window(batch, last=False)
            yield Window(batch)


def test_epochs_make_as_many_steps_as_a_batch_has_windows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": None, "epochs": 1.0, "lr_schedule": "linear", "warmup_ratio": 0.0}
    once, twice = toy(tmp_path / "once", **options), toy(tmp_path / "twice", kind=Reused, **options)
    assert (once.train().step, twice.train().step) == (5, 10)
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "twice")]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 10 and rates[-1] > 0


def test_sigterm_before_the_first_step_stops_there(tmp_path: Path) -> None:
    class Early(ToyTrainer):
        asked = True

        def build(self, loader: Any) -> Any:
            if self.asked:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().build(loader)

    for output, fix in ((tmp_path / "run", "begin again with `resume=True`"), (None, "begin again")):
        trainer = toy(output, kind=Early)
        with pytest.raises(Stopped, match="stopped before the first step; nothing is saved") as caught:
            trainer.train()
        assert (caught.value.exit_code, caught.value.fix, trainer.windows) == (75, fix, 0)
    assert read_json(tmp_path / "run" / "status.json")["status"] == "stopped"
    Early.asked = False
    assert toy(tmp_path / "run", kind=Early).train(resume=True).step == 6
    Early.asked = True
    with pytest.raises(Stopped, match="stopped before it had resumed; its checkpoints are as they were"):
        toy(tmp_path / "run", kind=Early).train(resume=True)
    assert read_json(tmp_path / "run" / "status.json")["step"] == 6


def test_a_fault_between_log_and_steps_is_the_one_that_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("no room", place="metrics.jsonl")

    monkeypatch.setattr(TrainingLogger, "rewind", full)
    with pytest.raises(StorageError, match="no room"):
        toy(tmp_path / "run").train()
    assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 7


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = toy("~/run", rows="~/rows.jsonl", eval_rows=["~/rows.jsonl"], max_steps=1).train()
    assert result.output == tmp_path / "run" and (tmp_path / "run" / "model").is_dir()


def test_held_out_rows_that_are_trained_on_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    toy(rows=str(path), eval_rows=[tmp_path / "." / "rows.jsonl"], max_steps=1).train()
    assert f"eval_data: {path} is trained on too" in caplog.text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Note the names and splits that are loaded from the hub."""
    import datasets

    loaded: list[tuple[str, str]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        loaded.append((name, split))
        return datasets.Dataset.from_list(ROWS if split == "train" else ROWS[:8])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return loaded


def test_held_out_rows_of_the_hub_have_a_split_of_their_own(hub: list[tuple[str, str]]) -> None:
    toy(rows="acme/sums", eval_rows="acme/sums", max_steps=1).train()
    toy(rows="acme/sums", eval_rows="acme/sums", max_steps=1, dataset={"eval_split": "dev"}).train()
    assert hub == [("acme/sums", "train"), ("acme/sums", "test"), ("acme/sums", "train"), ("acme/sums", "dev")]
    with pytest.raises(
        ConfigError, match="the held-out rows are those that are trained on; got split `train`"
    ) as caught:
        toy(rows="acme/sums", eval_rows="acme/sums", dataset={"eval_split": "train"}).train()
    assert caught.value.exit_code == 2 and len(hub) == 4
    toy(rows="acme/sums", eval_rows="acme/other", max_steps=1, dataset={"eval_split": "train"}).train()
    assert hub[4:] == [("acme/sums", "train"), ("acme/other", "train")]


def test_a_dataset_of_several_splits_gives_each_its_own() -> None:
    import datasets

    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:8]))
    trainer = toy(rows=splits, eval_rows=splits, max_steps=1)
    assert trainer.train().eval_metrics
    with pytest.raises(ConfigError, match="split `train` of one dataset for both"):
        toy(rows=splits, eval_rows=splits, dataset={"eval_split": "train"}).train()
    with pytest.raises(
        DataError, match=r"has no split `dev`; got train, test; fix: set `dataset.split`, or `dataset.eval_"
    ):
        toy(rows=splits, eval_rows=splits, dataset={"eval_split": "dev"}).train()


def test_trained_weights_stay_float32_in_bf16(tmp_path: Path) -> None:
    trainer = toy(tmp_path / "run", precision="bf16", max_steps=3)
    trainer.model.to(torch.bfloat16)
    trainer.train()
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    before = toy().model.to(torch.bfloat16).float()
    touched = trainer.policy.embedding.weight.cpu() != before.embedding.weight
    assert touched.any(1).float().mean() > 0.9


def test_fp16_halves_its_scale_until_gradients_fit(tmp_path: Path) -> None:
    result = toy(tmp_path / "run", precision="fp16", max_steps=3, checkpoint={"every": 1}).train()
    assert result.step == 3
    # 2^16 times the gradient of eight rows overflows float16; the same window was tried again until it fitted.
    scale = read_json(tmp_path / "run" / "checkpoints" / "step-3" / "state.json")["loss_scale"]["value"]
    assert 1 < scale < 2.0**16
    plain = toy(tmp_path / "plain", max_steps=3).train()
    assert result.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-2)


def test_the_training_survives_a_late_evaluation_that_fails(tmp_path: Path) -> None:
    """A fault that only held-out rows show comes after the last step: no step may be made twice for it."""

    class Late(ToyTrainer):
        broken = True

        def summary(self, values: Any) -> dict[str, float]:
            if self.broken:
                raise PluginError("no summary", place="Late.summary")
            return {"rows": float(len(values["row"]))}

        def loss(self, batch: Batch) -> Loss:
            found = super().loss(batch)
            return Loss(found.terms, {**found.metrics, "row": (torch.ones(batch.num_prompts), batch.num_prompts)})

    with pytest.raises(PluginError, match="no summary"):
        toy(tmp_path / "run", kind=Late, eval_rows=ROWS[:9], max_steps=3).train()
    assert (tmp_path / "run" / "checkpoints" / "step-3").is_dir()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    Late.broken = False
    result = toy(tmp_path / "run", kind=Late, eval_rows=ROWS[:9], max_steps=3).train(resume=True)
    assert result.step == 3 and result.eval_metrics["eval_rows"] == 9.0
    whole = toy(tmp_path / "whole", kind=Late, eval_rows=ROWS[:9], max_steps=3).train()
    assert result.eval_metrics == whole.eval_metrics
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_rows"] == 9.0 and len(rows) == 3
