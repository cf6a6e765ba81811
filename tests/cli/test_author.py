"""`rlhf new` writes packages that are whole: their own tests pass and their headers can be read."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import registry
from rlhf_core.cli import main
from rlhf_core.cli.author import write_package
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.registry.class_header import read_class_header, read_options
from rlhf_core.testing import tiny_policy
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.training.job import load_job


@pytest.mark.parametrize("kind", ["trainer", "reward", "sampler", "merger"])
def test_the_header_of_a_new_package_is_that_of_its_kind(kind: str, tmp_path: Path, monkeypatch) -> None:
    root = write_package(kind, "acme-margin", tmp_path)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (target,) = project["entry-points"][f"rlhf_core.{kind}s"].values()
    monkeypatch.syspath_prepend(str(root / "src"))
    header = read_class_header(target)
    assert header.api == 1 and header.summary.endswith(".")
    assert header.record == ("preference" if kind == "trainer" else None)
    assert all(option.description for option in read_options(target)) and read_options(target)
    assert target == f"acme_margin.{kind}:AcmeMargin{kind.capitalize()}"


def test_new_packages_pass_their_tests(tmp_path: Path, install) -> None:
    paths, roots = [], []
    for kind in ("reward", "sampler", "merger", "hook"):
        root = write_package(kind, f"acme-{kind}", tmp_path)
        entries = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"][f"rlhf_core.{kind}s"]
        paths += [root / "src", install(f"acme-{kind}", {}, **{f"{kind}s": entries})]
        roots.append(str(root / "tests"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *roots]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_new_hook_hears_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Any) -> None:
    from rlhf_plugins import SFTConfig, SFTTrainer

    root = write_package("hook", "acme-evaluations", tmp_path)
    entries = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["rlhf_core.hooks"]
    install("acme-evaluations", {}, hooks=entries)
    monkeypatch.syspath_prepend(str(root / "src"))
    (hook,) = (plugin for plugin in registry.find("hook") if plugin.name == "acme-evaluations")
    assert hook.summary == "Writes each run's evaluations to a table, evaluations.csv in the run directory."
    rows = [{"prompt": "1+1=", "response": "2"}] * 4
    config = SFTConfig(eval_steps=1, batch_size=2, max_steps=2)
    result = SFTTrainer(config, model=tiny_policy(), data=rows, eval_data=rows[:1], output=tmp_path / "run").train()
    table = (tmp_path / "run/evaluations.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["step", "0", "1", "2"]
    last = dict(zip(table[0].split(","), table[-1].split(","), strict=True))
    assert float(last["eval_loss"]) == result.eval_metrics["eval_loss"]


@pytest.mark.parametrize("online", [False, True])
def test_the_example_is_a_valid_configuration(tmp_path: Path, monkeypatch, install, online: bool) -> None:
    name, module = ("acme-drawn", "acme_drawn") if online else ("acme-example", "acme_example")
    root = write_package("trainer", name, tmp_path, online=online)
    stem = "AcmeDrawn" if online else "AcmeExample"
    install(name, {}, trainers={name: f"{module}.trainer:{stem}Trainer"})
    monkeypatch.syspath_prepend(str(root / "src"))
    job = load_job(root / "example.yaml")
    # What it names is what `python -m rlhf_core.testing demo` writes.
    record = "prompt" if online else "preference"
    assert job.run.model == "demo/model" and job.method.record == record
    assert (job.run.data, job.run.eval_data) == (f"demo/train/{record}.jsonl", f"demo/test/{record}.jsonl")
    assert job.method.__name__ == f"{stem}Trainer" and job.options.learning_rate > 0


def test_an_online_trainer_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Any) -> None:
    root = write_package("trainer", "acme-online", tmp_path, online=True)
    target = "acme_online.trainer:AcmeOnlineTrainer"
    install("acme-online", {}, trainers={"acme-online": target})
    monkeypatch.syspath_prepend(str(root / "src"))
    header, options = read_class_header(target), read_options(target)
    assert (header.api, header.record) == (1, "prompt") and all(option.description for option in options)
    assert {"clip", "kl_weight", "group_size"} <= {option.name for option in options}
    config = registry.get("trainer", "acme-online").Config
    held = {"batch_size": 4, "max_steps": 3, "generation": {"max_new_tokens": 4}, "max_length": 64}
    rows = list(ArithmeticTask().rows("prompt", 8))
    for rewards in (
        {"kl_weight": 0.1, "rewards": ["acme_online.rewards:digits"]},
        {"rewards": "acme_online.rewards:right"},
    ):
        trainer = registry.get("trainer", "acme-online")(
            config.parse({**held, **rewards}), model=tiny_policy(), data=rows, eval_data=rows[:2]
        )
        result = trainer.train()
        assert result.step == 3 and {"eval_reward", "eval_reward_se"} <= result.eval_metrics.keys()
        assert hasattr(trainer, "reference") == ("kl_weight" in rewards)
    with pytest.raises(ConfigError, match="above 0"):
        config.parse({"generation": {"temperature": 0.0}})


def test_only_a_trainer_is_online(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "reward", "acme-reward", "--online", "--dir", str(tmp_path)]) == 2
    assert "only a trainer is online" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"use one of: hook, merger, reward, sampler, trainer$"):
        write_package("trainer_online", "acme-other", tmp_path)


def test_names_and_places_that_are_taken(tmp_path: Path) -> None:
    write_package("trainer", "acme-margin", tmp_path)
    with pytest.raises(StorageError, match="the directory isn't empty; fix: choose another name, or another place"):
        write_package("trainer", "acme-margin", tmp_path)
    for name, got in [
        ("sft", "rlhf-core:sft"),
        ("numpy", "numpy"),
        ("class", "class"),
        ("a/b", "a/b"),
        ("..", r"\.\."),
    ]:
        with pytest.raises(ConfigError, match=f"`{got}`"):
            write_package("trainer", name, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acme-margin"]
