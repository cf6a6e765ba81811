"""Runs on a mixture of files: killed and resumed they are the same run; of several held-out files each has its own metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import ROWS, ToyConfig, ToyPolicy, ToyTrainer

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss
from rlhf_core.infra.errors import ConfigError
from rlhf_core.training import logger


class Crash(Exception):
    pass


class Crashing(ToyTrainer):
    """Ends with an error in its sixth window, once, and keeps which rows it saw."""

    armed = True

    def loss(self, batch: Batch) -> Loss:
        if self.windows == 6 and self.armed:
            raise Crash
        return super().loss(batch)


def written(folder: Path) -> dict[str, str]:
    paths = {}
    for name, rows in (("easy", ROWS[:24]), ("hard", ROWS[24:33]), ("odd", ROWS[33:])):
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def run(data, output: Path, *, kind=ToyTrainer, eval_data=None, streaming=False, **options):
    config = ToyConfig(
        batch_size=4, learning_rate=0.01, seed=3,
        dataset={"wrap": "none", "streaming": streaming, "shuffle_block": 8}, **options,
    )  # fmt: skip
    return kind(config, model=ToyPolicy(), data=data, eval_data=eval_data, output=output)


def metrics(output: Path) -> list[dict]:
    return [logger.without_timing(json.loads(line)) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_run_on_a_mixture_is_resumed_as_the_same_run(tmp_path, monkeypatch, streaming):
    files = written(tmp_path)
    data = [
        {"path": files["easy"], "share": 0.5},
        {"path": files["hard"], "rows": 5},
        {"path": files["odd"], "weight": 1.5},
    ]
    options = {"max_steps": 30, "checkpoint": {"every": 4}, "streaming": streaming}
    with pytest.raises(Crash):
        run(data, tmp_path / "crashed", kind=Crashing, **options).train()
    monkeypatch.setattr(Crashing, "armed", False)
    run(data, tmp_path / "crashed", kind=Crashing, **options).train(resume=True)
    run(data, tmp_path / "whole", kind=Crashing, **options).train()
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "whole")
    first, second = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("crashed", "whole"))
    assert first == second
    entries = json.loads((tmp_path / "whole" / "data.json").read_text())["data"]["entries"]
    assert entries["easy"]["kept"] == 24 and entries["hard"]["kept"] == 5


@pytest.mark.parametrize(
    ("streaming", "shares"),
    [
        (False, "easy 50 % (24 rows, each 0.6 times in an epoch); hard 50 % (5 rows, each 2.9 times in an epoch)"),
        (True, "easy 50 %; hard 50 %"),
    ],
)
def test_a_run_says_what_share_each_entry_has(tmp_path, caplog, streaming, shares):
    files = written(tmp_path)
    data = [{"path": files["easy"], "share": 0.5}, {"path": files["hard"], "rows": 5}]
    with caplog.at_level("INFO"):
        run(data, tmp_path / "run", max_steps=1, streaming=streaming).train()
    assert f"a step's rows: {shares}" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_each_held_out_file_has_its_own_metrics(tmp_path, streaming):
    files = written(tmp_path)
    held_out = [files["hard"], {"path": files["odd"], "name": "strange"}]
    options = {"max_steps": 2, "streaming": streaming}
    both = run(files["easy"], tmp_path / "both", eval_data=held_out, **options).train().eval_metrics
    alone = {
        name: run(files["easy"], tmp_path / name, eval_data=files[name], **options).train().eval_metrics
        for name in ("hard", "odd")
    }
    for name, own in (("hard", "hard"), ("strange", "odd")):
        found = {key.replace(f"eval_{name}_", "eval_"): value for key, value in both.items() if f"eval_{name}_" in key}
        assert found.keys() == alone[own].keys()
        for metric in ("eval_loss_nll", "eval_mean_logp"):  # the others are of random noise, too
            assert found[metric] == pytest.approx(alone[own][metric], rel=1e-5)
    low, high = sorted(one["eval_loss_nll"] for one in alone.values())
    assert low < both["eval_loss_nll"] < high


def test_a_held_out_file_may_be_watched_by_early_stopping(tmp_path):
    files = written(tmp_path)
    options = {"max_steps": 4, "eval_steps": 2, "early_stopping": {"metric": "eval_odd_loss"}}
    result = run(files["easy"], tmp_path / "run", eval_data=[files["hard"], files["odd"]], **options).train()
    assert "eval_odd_loss" in result.eval_metrics


def test_one_path_may_be_trained_and_scored_on_with_splits_of_its_own(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", ROWS[:20]), ("test", ROWS[20:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, held_out = [{"path": str(folder), "split": "train"}], [{"path": str(folder), "split": "test", "rows": 6}]
    trainer = run(data, tmp_path / "run", eval_data=held_out, max_steps=2)
    trainer.train()
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (report["data"]["kept"], report["eval_data"]["kept"]) == (20, 6)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) is not None
    with pytest.raises(ConfigError, match="held-out rows have no share"):
        run(data, tmp_path / "no", eval_data=[{"path": str(folder), "share": 0.5}, str(folder)], max_steps=2).train()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_held_out_file_of_fewer_rows_than_its_count_is_scored_once(tmp_path, caplog, streaming):
    seen = []

    class Scored(ToyTrainer):
        def evaluate(self, batch, run):
            seen.extend(batch.rows)
            return super().evaluate(batch, run)

    files = written(tmp_path)
    held_out = [{"path": files["odd"], "rows": 100}, {"path": files["hard"], "rows": 2}]
    run(files["easy"], None, kind=Scored, eval_data=held_out, streaming=streaming, max_steps=1).train()
    assert len(seen) == len(set(seen)) == len(ROWS[33:]) + 2
    assert f"it has {len(ROWS[33:])} rows, fewer than `rows: 100`; each is scored once" in caplog.text
    assert "`rows: 2`" not in caplog.text


def test_a_held_out_file_whose_metric_has_the_name_of_a_term_is_refused(tmp_path):
    class Doubled(ToyTrainer):
        def loss(self, batch):
            found = super().loss(batch)
            terms = {**found.terms, "other": found.terms["nll"]}
            return Loss(terms, {**found.metrics, "other": found.metrics["mean_logp"]})

        def weights(self, batch):
            found = super().weights(batch)
            return {**found, "other": found["nll"]}

    files = written(tmp_path)
    named = [{"path": files["hard"], "name": "loss"}, files["odd"]]
    with pytest.raises(
        ConfigError, match=r"two metrics would be called `eval_loss_other`.*the entry `loss`; fix: give"
    ):
        run(files["easy"], None, kind=Doubled, eval_data=named, max_steps=1).train()
