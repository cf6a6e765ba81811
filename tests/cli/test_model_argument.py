"""What a user names as a model: a directory, an adapter, a run's directory, a checkpoint, a GGUF file."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import TOKENS, write_gguf

from rlhf_core.cli import main
from rlhf_core.cli.model_argument import open_policy
from rlhf_core.config.training import ModelConfig
from rlhf_core.infra.errors import ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny, tiny_model


def weights(policy: PolicyModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in policy.named_parameters()}


def same(one: PolicyModel, other: PolicyModel) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def opened(path: Path | str) -> PolicyModel:
    return open_policy(ModelConfig(path=str(path)))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start") / "model", layers=1, hidden=32, heads=2, kv_heads=1)


def trained(start: Path, output: Path, *more: str) -> Path:
    """Return the directory of a run of four steps, with a checkpoint every two."""
    data = output.parent / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1=", "response": f"{n + 1}"}) + "\n" for n in range(8)))
    own = ["--model", str(start), "--data", str(data), "--output", str(output), "--max-steps", "4", "--batch-size", "2"]
    options = ["--checkpoint.every", "2", "--learning-rate", "0.01", "--logging.progress", "false"]
    assert main(["train", "sft", *own, *options, *more]) == 0
    return output


@pytest.fixture(scope="module")
def run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(start, tmp_path_factory.mktemp("run") / "sft")


def unfinished(run: Path, copy: Path) -> Path:
    """Return a copy of a run as it is while it trains: without an exported model."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"status": "running"}))
    return copy


def test_a_runs_directory_is_its_exported_model(run: Path) -> None:
    policy = opened(run)
    assert same(policy, opened(run / "model")) and policy.source == str(run / "model")
    assert not any(parameter.requires_grad for parameter in policy.parameters()) and not policy.training


def test_of_an_unfinished_run_the_newest_whole_checkpoint_is_loaded(start: Path, run: Path, tmp_path: Path) -> None:
    copy = unfinished(run, tmp_path / "copy")
    assert same(opened(copy), opened(run)) and not same(opened(copy), opened(start))
    earlier = opened(copy / "checkpoints/step-2")
    assert not same(earlier, opened(copy))
    damaged = copy / "checkpoints/step-4/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert same(opened(copy), earlier)
    with pytest.raises(ModelError, match="damaged"):
        opened(copy / "checkpoints/step-4")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ModelError, match="the run has no model yet"):
        opened(copy)


def test_the_best_checkpoint_is_loaded_where_early_stopping_keeps_one(run: Path, tmp_path: Path) -> None:
    # At so large a learning rate every evaluation after the first is worse.
    data = tmp_path / "held.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "response": "2"}) + "\n")
    more = ["--eval-data", str(data), "--eval-steps", "2", "--early-stopping", "--early_stopping.mode", "max"]
    output = trained(Path(opened(run / "model").source), tmp_path / "best", *more)
    state = json.loads((output / "checkpoints/step-4/state.json").read_text())
    best = state["early_stopping"]["best_step"]
    assert same(opened(unfinished(output, tmp_path / "copy")), opened(output / f"checkpoints/step-{best}"))


@pytest.mark.slow
def test_an_adapter_and_its_checkpoints(start: Path, tmp_path: Path) -> None:
    output = trained(start, tmp_path / "lora", "--lora", "--lora.rank", "2")
    adapter = opened(output)
    assert adapter.has_adapter and same(adapter, opened(output / "model"))
    assert same(opened(unfinished(output, tmp_path / "copy")), adapter)


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory or file"):
        opened(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is an empty directory, and no model"):
        opened(tmp_path / "empty")


def test_a_gguf_file_is_sampled_from_and_chatted_with(
    tmp_path: Path, rlhf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    path = str(write_gguf(tmp_path / "model.gguf", tiny_model(vocab_size=len(TOKENS))))
    options = ["--model", path, "--prompts", "1+1=?", "--max-new-tokens", "3", "--dataset.wrap", "chat", "--json"]
    code, out, err = rlhf("sample", "generate", *options)
    assert code == 0 and json.loads(out)["prompt"] == "1+1=?", err
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    code, out, err = rlhf("chat", path, "--max-new-tokens", "3", "--seed", "0")
    assert code == 0 and out.strip(), err
