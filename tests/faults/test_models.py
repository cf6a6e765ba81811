"""Models, tokenizers and checkpoints that can't be used, as `rlhf train` reports them: exit code 4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_core.testing.tiny import save_tiny, tiny_tokenizer

CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
EVERY = ("--checkpoint.every", "1")


@pytest.fixture
def mine(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "mine"))


def test_chat_messages_without_a_template_name_the_option(train: Callable, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", layers=1, hidden=16, tokenizer=tiny_tokenizer(chat_template=False))
    ended = train(model=base, data=CHAT)
    assert ended.code == 4
    assert ended.error == (
        f"error[model] {tmp_path / 'rows.jsonl'}:1: the data hold chat messages, and the tokenizer has no chat template;"
        " fix: give one by `--dataset.chat_template`, or use a model that has one"
    )
    template = "{% for m in messages %}{{ m['role'] ~ ': ' ~ m['content'] ~ '<|end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert train("--dataset.chat_template", template, model=base, data=CHAT).code == 0


def test_padding_equal_to_the_end_token_works(train: Callable, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    shared = save_tiny(tmp_path / "shared", layers=1, hidden=16, tokenizer=tokenizer)
    assert train(model=shared).code == 0
    with_pad = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    own = save_tiny(tmp_path / "own", layers=1, hidden=16)
    assert train(model=own, output=tmp_path / "other").code == 0
    assert json.loads((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()[0])["loss"] == with_pad["loss"]


def test_a_tokenizer_of_another_vocabulary_gives_both_sizes(train: Callable, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", layers=1, hidden=16, vocab_size=200)
    ended = train(model=small)
    assert ended.code == 4
    assert ended.error.startswith(
        f"error[model] {small}: the tokenizer has more tokens than the model has embeddings; got 263 tokens and 200 embeddings; "
    )


def test_weights_that_are_not_finite_name_the_tensor(train: Callable, mine: Path) -> None:
    tensors = load_file(mine / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    ended = train(model=mine)
    assert ended.code == 4
    assert ended.error.startswith(
        f"error[model] {mine}: weight `model.norm.weight` is not finite; got 1 of 16 values NaN or infinite; fix: "
    )


def test_a_missing_shard_is_named(train: Callable, mine: Path) -> None:
    (mine / "model.safetensors").rename(mine / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    ended = train(model=mine)
    assert ended.code == 4
    assert ended.error.startswith(
        f"error[model] {mine}: shard model-2.safetensors is missing; got an index of 2 shards"
    )


def test_pickles_are_never_loaded(train: Callable, mine: Path) -> None:
    (mine / "model.safetensors").unlink()
    torch.save({}, mine / "pytorch_model.bin")
    ended = train(model=mine)
    assert ended.code == 4
    assert ended.error.startswith(
        f"error[model] {mine}: has only pickled weights, which can run code when they are loaded"
    )


def test_code_of_a_repository_runs_only_when_asked_for(train: Callable, mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (mine / "config.json").write_text(json.dumps(config))
    (mine / "theirs.py").write_text(f"open({str(mine / 'ran')!r}, 'w')\n")
    ended = train(model=mine)
    assert ended.code == 4 and not (mine / "ran").exists()
    assert ended.error == (
        f"error[model] {mine}: the model needs code that its repository ships;"
        " fix: set `trust_remote_code: true` where you trust that code"
    )


def test_an_adapter_for_another_base_is_reported(train: Callable, tmp_path: Path) -> None:
    assert train("--lora.rank", "4").code == 0
    adapter = tmp_path / "run" / "model"
    config = json.loads((adapter / "adapter_config.json").read_text())
    other = save_tiny(tmp_path / "other", layers=1, hidden=32)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    ended = train(model=adapter, output=tmp_path / "next")
    assert ended.code == 4
    assert ended.error.startswith(f"error[model] {adapter}: the adapter doesn't fit its base; got base {other}: ")
    assert "`base_model_name_or_path`" in ended.error


def test_a_damaged_adapter_configuration_is_reported(train: Callable, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model')
    ended = train(model=tmp_path / "adapter")
    assert ended.code == 4
    assert ended.error.startswith(f"error[model] {tmp_path / 'adapter'}/adapter_config.json: not a JSON object; got ")


def test_a_missing_model_names_the_nearest(train: Callable, model: Path) -> None:
    ended = train(model=model.with_name("modle"))
    assert (ended.code, ended.error) == (
        4, f"error[model] {model.with_name('modle')}: no such model directory or file; fix: did you mean {model}?"
    )  # fmt: skip


def test_no_valid_checkpoint_gives_the_reason_of_each(train: Callable, tmp_path: Path) -> None:
    assert train(*EVERY).code == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-1" / "state.json").unlink()
    damaged = bytearray((checkpoints / "step-2" / "model.safetensors").read_bytes())
    damaged[-3] ^= 1
    (checkpoints / "step-2" / "model.safetensors").write_bytes(damaged)
    ended = train("--resume", *EVERY)
    assert ended.code == 4
    assert ended.error.startswith(
        f"error[model] {checkpoints}: no checkpoint is whole; got step 2: model.safetensors has another SHA-256"
    )
    assert ended.error.endswith(
        "| step 1: state.json is missing; fix: start over with `--overwrite`, or restore a whole checkpoint from a copy"
    )
    # Nor does the next attempt take it for a run that never saved.
    again = train("--resume", *EVERY)
    assert again.code == 4 and "no checkpoint is whole" in again.error


def test_a_damaged_checkpoint_falls_back_loudly(train: Callable, tmp_path: Path) -> None:
    assert train(*EVERY).code == 0
    (tmp_path / "run" / "checkpoints" / "step-2" / "optimizer.safetensors").write_bytes(b"")
    ended = train("--resume", *EVERY)
    assert ended.code == 0
    assert "WARNING checkpoint" in ended.err and "step-2 is damaged (optimizer.safetensors" in ended.err
    assert (tmp_path / "run" / "checkpoints" / "step-2.damaged").is_dir()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert "checkpoint_damaged" in {event["event"] for event in events}


def test_half_a_reward_head_is_no_new_one(train: Callable, model: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4
    assert train(method="reward_model", data=pairs).code == 0
    (tmp_path / "run" / "model" / "reward_head.json").unlink()
    ended = train(method="reward_model", model=tmp_path / "run" / "model", data=pairs, output=tmp_path / "again")
    assert (ended.code, ended.error) == (
        4, f"error[model] {tmp_path}/run/model: the reward head is not whole, so its scores would be random; got"
        " reward_head.safetensors, and no reward_head.json; fix: copy the whole checkpoint again",
    )  # fmt: skip
