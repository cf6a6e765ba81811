"""A run that is resumed for more steps equals one that was planned so, and what else changes is asked for and recorded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from toy import ROWS, toy

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.files import read_json
from rlhf_core.training import logger
from rlhf_core.training.resume_changes import NEVER, check_changes, reason_against

CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_ratio": 0, "checkpoint": {"every": 2}}


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [logger.without_timing(json.loads(line)) for line in (output / "metrics.jsonl").read_text().splitlines()]


def record_of(output: Path) -> dict[str, Any]:
    return read_json(output / "run.json")


def require_same(first: Path, second: Path) -> None:
    assert rows_of(first) == rows_of(second)
    for name in ("model/model.safetensors", f"checkpoints/step-{rows_of(second)[-1]['step']}/optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("streaming", [False, True])
def test_a_finished_run_that_is_stretched_is_the_run_that_was_planned_so(tmp_path: Path, streaming: bool) -> None:
    options = {**CONSTANT, "dataset": {"streaming": streaming, "shuffle_block": 16}}
    toy(tmp_path / "stretched", max_steps=3, **options).train()
    result = toy(tmp_path / "stretched", max_steps=7, **options).train(resume=True)
    toy(tmp_path / "planned", max_steps=7, **options).train()
    assert result.step == 7
    require_same(tmp_path / "stretched", tmp_path / "planned")


@pytest.mark.parametrize(
    ("rows", "before", "after"),
    [
        (40, {"epochs": 1}, {"epochs": 3}),
        (20, {"epochs": 1}, {"epochs": 2}),  # 8 + 8 + 4 rows: the end isn't on the way of the longer run
        (20, {"epochs": 1.5}, {"max_steps": 9}),
    ],
    ids=["whole batches", "a smaller last batch", "by steps instead"],
)
def test_more_epochs_are_those_of_a_run_that_was_planned_so(
    tmp_path: Path, rows: int, before: dict[str, Any], after: dict[str, Any]
) -> None:
    options = {"max_steps": None, "rows": ROWS[:rows], **CONSTANT, "checkpoint": {"minutes": 60}}
    toy(tmp_path / "stretched", **options | before).train()
    toy(tmp_path / "stretched", **options | before | after).train(resume=True)
    toy(tmp_path / "planned", **options | before | after).train()
    require_same(tmp_path / "stretched", tmp_path / "planned")


def test_a_stretched_run_that_is_killed_is_still_that_run(tmp_path: Path) -> None:
    """The end of the shorter run is its newest checkpoint then, and still isn't on the way."""
    options = {"max_steps": None, "rows": ROWS[:20], **CONSTANT, "checkpoint": {"minutes": 60}}
    toy(tmp_path / "stretched", epochs=1, **options).train()

    def killed(batch: Batch) -> Any:
        raise ZeroDivisionError

    trainer = toy(tmp_path / "stretched", epochs=2, **options)
    trainer.loss = killed  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.train(resume=True)
    toy(tmp_path / "stretched", epochs=2, **options).train(resume=True)
    toy(tmp_path / "planned", epochs=2, **options).train()
    require_same(tmp_path / "stretched", tmp_path / "planned")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_is_that_of_the_new_length_from_the_resume_on(
    tmp_path: Path, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"lr_schedule": schedule, "warmup_ratio": 0.25}
    toy(tmp_path / "stretched", max_steps=4, **options).train()
    with caplog.at_level(logging.INFO):
        toy(tmp_path / "stretched", max_steps=8, **options).train(resume=True)
    toy(tmp_path / "planned", max_steps=8, **options).train()
    toy(tmp_path / "short", max_steps=4, **options).train()
    rates = {
        name: [row["learning_rate"] for row in rows_of(tmp_path / name)] for name in ("stretched", "planned", "short")
    }
    assert rates["stretched"] == rates["short"] + rates["planned"][4:]
    first, second = rates["stretched"][3:5]
    assert f"the learning rate was {first:.3g} at step 4, and is {second:.3g} at step 5" in caplog.text
    assert rows_of(tmp_path / "stretched")[0] == rows_of(tmp_path / "short")[0]


def test_a_run_is_not_stretched_to_what_it_has_done_and_not_by_what_has_no_effect(tmp_path: Path) -> None:
    toy(tmp_path, max_steps=4).train()
    kept = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"has made 4 steps already.*max_steps 3"):
        toy(tmp_path, max_steps=3).train(resume=True)
    with pytest.raises(ConfigError, match=r"`epochs` has no effect.*epochs: 1.0 → 3.0.*give `max_steps`"):
        toy(tmp_path, max_steps=4, epochs=3).train(resume=True)
    with pytest.raises(ConfigError, match="can't be continued by `epochs`"):
        toy(tmp_path, max_steps=None, epochs=3).train(resume=True)
    assert (tmp_path / "config.yaml").read_text() == kept and record_of(tmp_path)["status"] == "done"
    assert read_json(tmp_path / "status.json")["status"] == "failed"
    toy(tmp_path / "epochs", max_steps=None, epochs=2).train()
    with pytest.raises(ConfigError, match=r"more epochs, not for fewer.*epochs: 2.0 → 1.0"):
        toy(tmp_path / "epochs", max_steps=None, epochs=1).train(resume=True)


def test_an_end_between_is_refused_where_no_checkpoint_is_before_it(tmp_path: Path) -> None:
    options = {"max_steps": None, "rows": ROWS[:6]}
    toy(tmp_path, epochs=1, **options).train()
    with pytest.raises(ModelError, match=r"no checkpoint from which a longer run could continue.*step 1 ends inside"):
        toy(tmp_path, epochs=2, **options).train(resume=True)
    assert toy(tmp_path, epochs=1, **options).train(resume=True).step == 1


# Other options


def test_other_options_change_where_they_are_named_and_the_record_says_from_where(tmp_path: Path) -> None:
    toy(tmp_path, max_steps=4, **CONSTANT).train()
    changed = {**CONSTANT, "max_steps": 6, "learning_rate": 0.01, "optimizer": {"beta1": 0.8}}
    with pytest.raises(ConfigError) as refused:
        toy(tmp_path, **changed).train(resume=True)
    assert refused.value.got == "learning_rate: 0.02 → 0.01, optimizer.beta1: 0.9 → 0.8"
    assert '`allow_change=["learning_rate", "optimizer.beta1"]` takes the new values from here on' in str(
        refused.value.fix
    )
    toy(tmp_path, **changed).train(resume=True, allow_change=["learning_rate", "optimizer"])
    assert [row["learning_rate"] for row in rows_of(tmp_path)] == [0.02] * 4 + [0.01] * 2
    toy(tmp_path, **{**changed, "max_steps": 7}).train(resume=True)
    first, second = record_of(tmp_path)["changes"]
    assert (first["step"], second["step"]) == (4, 6)
    assert first["options"] == {
        "learning_rate": {"before": 0.02, "now": 0.01},
        "max_steps": {"before": 4, "now": 6},
        "optimizer.beta1": {"before": 0.9, "now": 0.8},
    }
    assert second["options"] == {"max_steps": {"before": 6, "now": 7}}
    assert toy(tmp_path, **{**changed, "max_steps": 7}).train(resume=True).step == 7
    assert len(record_of(tmp_path)["changes"]) == 2


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_never_changes_says_why(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}[.a-z]*` can't change in a run: {NEVER[name]}"):
        check_changes({name: 1}, {name: 2}, place="run", allowed=[f"{name}.part" if name == "dataset" else name])
    with pytest.raises(ConfigError) as refused:
        check_changes({name: 1, "beta": 1}, {name: 2, "beta": 2}, place="run", allowed=["beta"])
    assert NEVER[name] in str(refused.value.fix) and refused.value.got == f"{name}: 1 → 2"


def test_names_that_no_option_has_and_changes_of_new_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such option; got lerning_rate; fix: did you mean `learning_rate`"):
        check_changes({"learning_rate": 1}, {"learning_rate": 2}, place="run", allowed=["lerning_rate"])
    with pytest.raises(ConfigError, match="options of a run change where it is resumed"):
        toy(tmp_path).train(allow_change=["learning_rate"])
    assert reason_against("lora.dropout") is None and reason_against("lora.rank") is not None
    assert reason_against("optimizer.beta1") is None and reason_against("dataset.columns.prompt") is not None


def test_early_stopping_can_be_added_or_made_more_patient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**CONSTANT, "eval_rows": ROWS[:4], "eval_steps": 1}
    watched = {"metric": "eval_loss", "mode": "max", "keep_best": False}  # it falls at every step, which is worse here
    toy(tmp_path, max_steps=2, **options).train()
    options["max_steps"] = 9
    with pytest.raises(ConfigError, match=r'`allow_change=\["early_stopping'):
        toy(tmp_path, early_stopping={**watched, "patience": 2}, **options).train(resume=True)
    added = toy(tmp_path, early_stopping={**watched, "patience": 2}, **options)
    assert added.train(resume=True, allow_change=["early_stopping"]).step == 5
    assert "makes no further step" not in caplog.text
    longer = {**options, "max_steps": 12}
    assert toy(tmp_path, early_stopping={**watched, "patience": 2}, **longer).train(resume=True).step == 5
    assert "the run was stopped early, and makes no further step: 2 evaluations without improvement" in caplog.text
    assert (
        "a larger `early_stopping.patience`, allowed by `--allow-change early_stopping.patience`, lets it go"
        in caplog.text
    )
    patient = toy(tmp_path, early_stopping={**watched, "patience": 4}, **longer)
    result = patient.train(resume=True, allow_change=["early_stopping.patience"])
    assert (result.step, result.stopped_early) == (7, True)
