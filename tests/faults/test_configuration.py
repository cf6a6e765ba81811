"""Configurations that can't hold, as `rlhf train` reports them: the option, what it got, what to set, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_core.cli import main
from rlhf_core.training import run as training_run
from rlhf_core.training.distribution import Distribution

FLAGS = {
    "--lerning_rate 1": "--lerning_rate: unknown option `lerning_rate` of sft; fix: did you mean `--learning_rate`?",
    "--learning_rate -1": "--learning_rate: must be greater than 0; got -1",
    "--learning_rate nan": "--learning_rate: must be a finite number; got 'nan'",
    "--max_steps 0": "--max_steps: must be greater than or equal to 1; got 0",
    "--max_length 500": "max_length: longer than the model's positions; got 500 for a model of 128; fix: set `max_length: 128`",
    "--distributed.world_size 2": "distributed.world_size: 2 processes were asked for; got 1 running; fix: start with `torchrun",
    "--preset 8b": "--preset: unknown preset `8b`; fix: ",
    "--lora.target_modules q_prj": "lora.target_modules: the model has no module `q_prj`; fix: did you mean `q_proj`?",
    "--eval_steps 1": "eval_steps: evaluations need held-out data; fix: set `eval_data`",
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_a_wrong_option_is_reported(train: Callable, flags: str) -> None:
    option = flags.split()[0]
    given = ["--batch_size", "2"]
    for name, value in (("--max_length", "64"), ("--max_steps", "2")):
        given += [] if name == option else [name, value]
    ended = train(*flags.split(), options=given)
    assert ended.code == 2, ended.err
    assert ended.error.startswith(f"error[config] {FLAGS[flags]}"), ended.error


def test_an_unknown_method_names_the_nearest_and_all(train: Callable) -> None:
    ended = train(method="dpoo")
    assert ended.code == 2
    assert ended.error.startswith(
        "error[config] command line: unknown trainer `dpoo`; fix: did you mean `dpo`? (known: "
    )
    assert "dpo, grpo, kto" in ended.error


def test_rows_that_processes_cannot_share(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(Distribution):
        world_size = 3

    monkeypatch.setattr(training_run, "create_distribution", lambda config, devices: Three(torch.device("cpu")))
    ended = train(options=["--batch_size", "8"])
    assert (ended.code, ended.error) == (
        2,
        "error[config] batch_size: 8 rows can't be shared by 3 processes; got 8 = 2 × 3 + 2; fix: set `batch_size` to 6 or 9",
    )


def test_a_resume_with_another_configuration_shows_the_difference(train: Callable, tmp_path: Path) -> None:
    assert train().code == 0
    ended = train(
        "--resume", options=["--batch_size", "4", "--max_length", "64", "--max_steps", "2", "--lora.rank", "4"]
    )
    assert ended.code == 2
    assert ended.error.startswith(
        f"error[config] {tmp_path / 'run'}: the configuration changed since the run was started; got batch_size: 2 → 4, "
    )
    assert "learning_rate: 0.001 → 1e-05" in ended.error and "lora.rank: None → 4" in ended.error
    assert "; fix: `batch_size` can't change in a run (which rows a step has follows from it" in ended.error
    assert ended.error.endswith(
        "): resume with the run's own configuration, or start a new run in another directory, from this one's `model/` to"
        " train on"
    )


YAML = {
    "beta: 0.1\nbeta: 0.2\n": ":5: duplicate key `beta` (lines 4 and 5); fix: remove one of them",
    "lora:\n  rank: 4\n  alpha: 2\n  rank: 8\n": ":7: duplicate key `rank` (lines 5 and 7); fix: remove one of them",
    "beta: !!python/object/apply:os.system [exit]\n": ":4: not valid YAML: could not determine a constructor for the tag",
    "a: &a [x, x]\nb: &b [*a, *a]\n": ":5: YAML aliases are not accepted; got *a; fix: write the value out",
    "lora: {rnk: 4}\n": ":4: unknown option `lora.rnk`; fix: did you mean `rank`?",
    "output: no\n": (
        ":4: `output`: must be text; got False; fix: YAML reads yes, no, on and off as true and false:"
        " put the text in quotes if you meant text"
    ),
    "output: 2024-13-45\n": ": not valid YAML: month must be in 1..12",
    f"lora: {'[' * 5000}\n": ": not valid YAML: nested too deeply",
}  # fmt: skip


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20])
def test_a_wrong_file_is_reported_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"method: dpo\nmodel: m\ndata: d\n{text}")
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error[config] {path}{YAML[text]}") and error.count("\n") == 1, error


def test_the_number_of_processes_is_that_which_was_asked_for(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as one of two that never find each other, a run must not train alone as if nothing were wrong."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    ended = train()
    assert ended.code == 2
    assert "2 processes were started; got 1 that found each other" in ended.error
