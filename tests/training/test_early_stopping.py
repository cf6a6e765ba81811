"""When patience runs out, that is said, and the best model is what is exported."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from toy import ROWS, ToyTrainer, toy

from rlhf_core.config.metric_direction import better_when
from rlhf_core.config.training import KeepBestConfig, TrainerConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.safetensors_file import read_tensors
from rlhf_core.training.early_stopping import BestEvaluation, EarlyStopping, KLBudget


def feed(stopping: EarlyStopping, *values: float) -> list[bool]:
    return [stopping.update({stopping.metric: value}, step) for step, value in enumerate(values, 1)]


def test_it_stops_after_patience_without_improvement() -> None:
    stopping = EarlyStopping(patience=2)
    assert feed(stopping, 3.0, 2.0, 2.5, 1.9, 1.9, 2.0) == [False, False, False, False, False, True]
    assert (stopping.best, stopping.best_step) == (1.9, 4)


def test_larger_can_be_better() -> None:
    assert feed(EarlyStopping("eval_accuracy", mode="max", patience=1), 0.5, 0.6, 0.6) == [False, False, True]


def test_a_gain_must_exceed_min_delta() -> None:
    assert feed(EarlyStopping(patience=1, min_delta=0.5), 3.0, 2.6) == [False, True]


def test_one_noisy_step_spends_no_kl_budget() -> None:
    """m = 0.9 m + 0.1 kl: 0.9 · 0.005 + 0.1 · 0.5 = 0.0545, and ten steps of 0.15 reach 0.15 (1 − 0.9^10) = 0.0977."""
    budget = KLBudget(0.06)
    budget.mean = 0.005
    assert budget.update({"kl": 0.5}) == pytest.approx({"kl_mean": 0.0545}) and not budget.spent
    lasting = KLBudget(0.06)
    spent = []
    for _ in range(10):
        lasting.update({"kl": 0.15})
        spent.append(lasting.spent)
    assert lasting.mean == pytest.approx(0.0977, abs=1e-4) and spent == [False] * 4 + [True] * 6
    resumed = KLBudget(0.06)
    resumed.load_state_dict(json.loads(json.dumps(lasting.state_dict())))
    assert resumed.mean == lasting.mean and resumed.spent


def test_the_mean_of_the_kl_is_kept_without_a_budget_and_a_step_without_the_kl_needs_none() -> None:
    free = KLBudget(None)
    assert free.update({"kl": 1.0}) == {} and free.update({"kl": float("nan")}) == {} and free.mean == 0.1
    assert free.update({"loss": 1.0}) == {} and not free.spent
    with pytest.raises(ConfigError, match="reports no KL to the reference"):
        KLBudget(0.1).update({"loss": 1.0})


def test_nan_is_no_improvement() -> None:
    assert feed(EarlyStopping(patience=2), float("nan"), float("nan")) == [False, True]


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean `eval_loss`"):
        EarlyStopping("eval_los").check({"eval_loss": 1.0, "eval_kl": 0.0})


def test_its_state_comes_back() -> None:
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    feed(first, 1.0, 2.0)
    second.load_state_dict(first.state_dict())
    expected = {
        "metric": "eval_loss",
        "mode": "min",
        "start": None,
        "best": 1.0,
        "best_step": 1,
        "waited": 1,
        "best_metrics": {"eval_loss": 1.0},
    }
    assert second.state_dict() == first.state_dict() == expected


class Rated(ToyTrainer):
    """Its evaluations are as the test says, one after the other; training is the toy's."""

    ratings: ClassVar[dict[int, float]] = {}

    def summary(self, values: Any) -> dict[str, float]:
        return {}

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        if not self.evaluating:
            return loss
        rating = self.ratings[round(float(self.policy.seen) / 8)]  # Eight rows a step were seen.
        return Loss(loss.terms, {"rating": (rating * batch.num_prompts, batch.num_prompts)})


RATINGS = {0: 0.0, 1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5, 5: 1.0, 6: 0.5}


def rated(output: Path | None, *, ratings: dict[int, float] | None = None, **options: Any) -> Rated:
    kind = type("Rated", (Rated,), {"ratings": ratings or RATINGS})
    watched = {"metric": "eval_rating", "mode": "max", "patience": 3, **options.pop("early_stopping", {})}
    return toy(output, kind=kind, eval_rows=ROWS[:4], eval_steps=1, early_stopping=watched, **options)


def exported(output: Path) -> dict[str, torch.Tensor]:
    return read_tensors(output / "model" / "model.safetensors")


def test_the_best_model_is_exported_and_its_checkpoint_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        result = rated(tmp_path / "run", checkpoint={"every": 1}).train()
    assert (result.step, result.stopped_early, result.best_step, result.model_step) == (5, True, 2, 2)
    assert "step 5: stopped early, after 3 evaluations without improvement: `eval_rating` is 1 now" in caplog.text
    assert "`eval_rating` was best at step 2: 3" in caplog.text and "the model of step 2 is exported" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-2", "step-4", "step-5"]
    toy(tmp_path / "two", max_steps=2, lr_schedule="constant").train()
    rated(tmp_path / "same", lr_schedule="constant").train()
    for name, tensor in exported(tmp_path / "two").items():
        assert torch.equal(exported(tmp_path / "same")[name], tensor)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "early_stopped"]
    assert (told["step"], told["best"], told["best_step"], told["value"], told["metric"]) == (
        5,
        3.0,
        2,
        1.0,
        "eval_rating",
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["step"], record["best_step"], record["model_step"]) == (5, 2, 2)


def test_the_best_survives_a_resume(tmp_path: Path) -> None:
    rated(tmp_path / "whole").train()
    trainer = rated(tmp_path / "run", checkpoint={"every": 1})
    windows = trainer.experience

    def broken(stream: Any, run: Any) -> Any:
        for number, window in enumerate(windows(stream, run), 1):
            if number == 5:
                raise ZeroDivisionError
            yield window

    trainer.experience = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    result = rated(tmp_path / "run", checkpoint={"every": 1}).train(resume=True)
    assert (result.step, result.model_step) == (5, 2)
    again = rated(tmp_path / "run", checkpoint={"every": 1}).train(resume=True)
    assert (again.step, again.stopped_early, again.model_step) == (5, True, 2)
    for name, tensor in exported(tmp_path / "whole").items():
        assert torch.equal(exported(tmp_path / "run")[name], tensor)


def test_without_a_checkpoint_of_the_best_step_the_last_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = rated(tmp_path / "run", early_stopping={"keep_best": False}).train()
    assert (result.step, result.best_step, result.model_step) == (5, 2, 5) and "no checkpoint" not in caplog.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-5"]
    result = rated(None).train()
    assert (
        result.model_step == 5
        and "no whole checkpoint of step 2 is left, so the model of step 5 is exported" in caplog.text
    )


def test_a_damaged_best_checkpoint_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rated(tmp_path).train()
    (tmp_path / "checkpoints" / "step-2" / "model.safetensors").write_bytes(b"no")
    assert rated(tmp_path).train(resume=True).model_step == 5
    assert "the checkpoint is damaged" in caplog.text and "no whole checkpoint of step 2" in caplog.text


# The option `keep_best`


def kept(output: Path | None, **options: Any) -> Rated:
    kind = type("Rated", (Rated,), {"ratings": RATINGS})
    asked = {"keep_best": {"metric": "eval_rating", "mode": "max"}, **options}
    return toy(output, kind=kind, eval_rows=ROWS[:4], eval_steps=1, **asked)


def test_the_best_is_kept_without_early_stopping_and_the_result_says_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result = kept(tmp_path / "run", checkpoint={"every": 1}).train()
    assert (result.step, result.stopped_early, result.stopped_because) == (6, False, None)
    assert (result.best_step, result.best_metric, result.best_value, result.model_step) == (2, "eval_rating", 3.0, 2)
    assert "the model of step 2 is exported: `eval_rating` was best at step 2: 3" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-2", "step-5", "step-6"]
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["best_metric"], record["best_value"], record["best_step"]) == ("eval_rating", 3.0, 2)
    toy(tmp_path / "two", max_steps=2, lr_schedule="constant").train()
    kept(tmp_path / "same", lr_schedule="constant").train()
    for name, tensor in exported(tmp_path / "two").items():
        assert torch.equal(exported(tmp_path / "same")[name], tensor)


def test_the_kept_best_survives_a_kill_and_retention(tmp_path: Path) -> None:
    kept(tmp_path / "whole").train()
    trainer = kept(tmp_path / "run", checkpoint={"every": 1})
    windows = trainer.experience

    def broken(stream: Any, run: Any) -> Any:
        for number, window in enumerate(windows(stream, run), 1):
            if number == 5:
                raise ZeroDivisionError
            yield window

    trainer.experience = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    result = kept(tmp_path / "run", checkpoint={"every": 1}).train(resume=True)
    assert (result.step, result.best_step, result.model_step) == (6, 2, 2)
    stretched = kept(tmp_path / "run", checkpoint={"every": 1}, max_steps=7).train
    with pytest.raises(KeyError):  # no rating of step 7: it is killed while it evaluates
        stretched(resume=True)
    assert (tmp_path / "run/checkpoints/step-2").is_dir()
    for name, tensor in exported(tmp_path / "whole").items():
        assert torch.equal(exported(tmp_path / "run")[name], tensor)


def test_another_metric_at_a_resume_counts_the_evaluations_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ratings of steps 1 to 4 are 1, 3, 2, 2.5; after four steps the checkpoints of 2, 3 and 4 are left."""
    kept(tmp_path / "run", checkpoint={"every": 1}, max_steps=4).train()
    for line in (line for line in (tmp_path / "run/events.jsonl").read_text().splitlines() if '"evaluated"' in line):
        assert "eval_rating" in line and "eval_loss" in line
    before = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert before == ["step-2", "step-3", "step-4"]
    options: dict[str, Any] = {"checkpoint": {"every": 1}, "max_steps": 6, "lr_schedule": "constant"}
    caplog.clear()
    # The loss falls from step to step, so that by `max` step 1 was the best, and none was better than the start.
    other = {"metric": "eval_loss", "mode": "max"}
    result = kept(tmp_path / "run", keep_best=other, **options).train(resume=True, allow_change=["lr_schedule"])
    assert (result.step, result.best_metric, result.best_step, result.model_step) == (6, "eval_loss", 2, 2)
    assert "at step 1, whose checkpoint is gone; of those that are left, step 2 was best" in caplog.text
    assert "no evaluation was better than the one before the first step: `eval_loss`" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-2", "step-5", "step-6"]


def test_a_better_checkpoint_that_is_gone_is_named_until_a_later_one_is_as_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy(tmp_path, kind=type("Rated", (Rated,), {"ratings": RATINGS}), eval_rows=ROWS[:4], eval_steps=1,
        checkpoint={"every": 1}, max_steps=3).train()  # fmt: skip
    falling: dict[str, Any] = {"keep_best": {"metric": "eval_rating", "mode": "min"}, "checkpoint": {"every": 1}}
    caplog.clear()
    result = kept(tmp_path, max_steps=4, **falling).train(resume=True)
    assert (result.best_step, result.best_value, result.model_step) == (3, 2.0, 3)
    assert "`eval_rating`: it was 1 at step 1, whose checkpoint is gone; of those that are left, step 3" in caplog.text
    caplog.clear()
    result = kept(tmp_path, max_steps=4, **falling).train(resume=True)
    assert result.best_step == 3 and "it was 1 at step 1" in caplog.text
    result = kept(tmp_path, max_steps=5, **falling).train(resume=True)
    assert (result.best_step, result.best_value) == (5, 1.0)
    caplog.clear()
    assert kept(tmp_path, max_steps=6, **falling).train(resume=True).best_step == 6
    assert "is gone" not in caplog.text


def test_what_is_lost_comes_back_and_decides_whether_the_start_was_improved_on() -> None:
    best = BestEvaluation()
    nothing = {"eval_kl": 1.0}
    made = {
        0: {"eval_loss": 1.0},
        1: {"eval_loss": 0.5},
        2: nothing,
        3: {"eval_loss": 2.0},
        4: {"eval_loss": float("nan")},
    }
    best.recall(made, kept=[2, 3])
    assert (best.best, best.best_step, best.lost, best.never_improved) == (2.0, 3, (1, 0.5), False)
    again = BestEvaluation()
    again.load_state_dict(json.loads(json.dumps(best.state_dict(), allow_nan=False)))
    assert again.state_dict() == best.state_dict() and again.lost == (1, 0.5)
    assert again.describe() == "`eval_loss` was best at step 3: 2; it was 0.5 at step 1, whose checkpoint is gone"
    again.note({"eval_loss": 0.5}, 5)
    assert again.lost is None and again.describe_lost() == ""


def test_keep_best_decides_beside_early_stopping(tmp_path: Path) -> None:
    stopping = {"metric": "eval_loss", "patience": 50}
    result = kept(tmp_path / "both", early_stopping=stopping).train()
    assert (result.best_metric, result.model_step) == ("eval_rating", 2)
    losing = {"metric": "eval_rating", "mode": "min", "patience": 2}
    result = kept(tmp_path / "ended", early_stopping=losing).train()
    assert (result.step, result.stopped_early, result.model_step) == (3, True, 2)
    expected = "2 evaluations without improvement (`patience` 2): `eval_rating` was best at step 1: 1"
    assert (
        result.stopped_because == json.loads((tmp_path / "ended/run.json").read_text())["stopped_because"] == expected
    )


def test_the_direction_is_that_of_the_metric_or_is_stated() -> None:
    config = TrainerConfig.parse({"keep_best": "eval_accuracy", "early_stopping": {"metric": "eval_loss"}})
    assert config.keep_best is not None and config.early_stopping is not None
    assert (config.keep_best.mode, config.early_stopping.mode) == ("max", "min")
    names = {
        "eval_rewards/margin": "max", "eval_reward": "max", "eval_kl": "min", "eval_pass@4": "max", "eval_loss_nll": "min",
        "eval_length": None, "eval_reward_std": None, "eval_rewards/rejected": None,
    }  # fmt: skip
    assert {name: better_when(name) for name in names} == names
    with pytest.raises(ConfigError, match="whether a larger `eval_length` is better isn't known: set `mode: max`"):
        TrainerConfig.parse({"keep_best": "eval_length"})
    with pytest.raises(ConfigError, match="`eval_los` is better isn't known: did you mean `eval_loss`"):
        TrainerConfig.parse({"early_stopping": {"metric": "eval_los"}})
    for given, meant in (("loss", "eval_loss"), ("val/accuracy", "eval_accuracy"), ("evalloss", "eval_loss")):
        for options in ({"keep_best": given}, {"early_stopping": {"metric": given, "mode": "min"}}):
            with pytest.raises(ConfigError, match=f"evaluations, .* got '{given}'; fix: did you mean `{meant}`"):
                TrainerConfig.parse(options)
    assert TrainerConfig.parse({"keep_best": True}).keep_best == KeepBestConfig(metric="eval_loss", mode="min")
    for missing, options in (("output", {}), ("eval_steps", {"eval_steps": None})):
        with pytest.raises(ConfigError, match=f"keep_best: .*; fix: set `{missing}`"):
            toy(None, eval_rows=ROWS[:4], keep_best="eval_loss", **{"eval_steps": 1, **options}).train()
    with pytest.raises(
        ConfigError, match=r"keep_best.metric: evaluation gives no metric `eval_los.*did you mean `eval_loss`"
    ):
        BestEvaluation("eval_los").check({"eval_loss": 1.0})


def test_a_run_that_goes_to_its_end_exports_the_best_too(tmp_path: Path) -> None:
    result = rated(tmp_path, max_steps=4).train()
    assert (result.step, result.stopped_early, result.model_step) == (4, False, 2)


def test_a_start_that_nothing_improved_on_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopping = EarlyStopping(patience=2)
    stopping.update({"eval_loss": 0.5}, 0)
    assert not stopping.never_improved and stopping.best is None
    stopping.update({"eval_loss": 0.7, "eval_kl": float("nan")}, 1)
    assert stopping.never_improved and (stopping.best, stopping.best_step) == (0.7, 1)
    again = EarlyStopping(patience=2)
    again.load_state_dict(json.loads(json.dumps(stopping.state_dict(), allow_nan=False)))
    assert again.never_improved and again.best_metrics["eval_loss"] == 0.7
    stopping.update({"eval_loss": 0.4}, 2)
    assert not stopping.never_improved


def test_the_evaluation_that_is_returned_is_that_of_the_model(tmp_path: Path) -> None:
    result = rated(tmp_path / "run").train()
    assert (result.step, result.model_step) == (5, 2)
    events = map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines())
    evaluated = {event["step"]: event["metrics"] for event in events if event["event"] == "evaluated"}
    assert result.eval_metrics == evaluated[2] != evaluated[5]
