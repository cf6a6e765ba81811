"""Tokens that are added in a run: in the tokenizer and the data, with mean rows, trained, saved, and read again by peft."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rlhf_plugins.trainers.dpo import DPOTrainer
from rlhf_plugins.trainers.reward_model import RewardModelTrainer
from rlhf_plugins.trainers.sft import SFTTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core.config.training import TrainerConfig
from rlhf_core.data.chat_rendering import ChatTemplate
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.open_source import open_source
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, RewardModel
from rlhf_core.publishing.export_model import export_model
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training.disk_space import disk_need
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.setup import RunSetup

NEW = ["<think>", "</think>"]
ROWS = [{"prompt": f"{one} + 1 = ", "response": f"<think>{one}</think>{one + 1}"} for one in range(8)]
IDS = torch.tensor([[1, 263, 50, 60, 264, 70]])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_model(tie_embeddings=request.param).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer(model: Any, output: Path | None = None, **options: Any) -> SFTTrainer:
    values: dict[str, Any] = {
        "batch_size": 4, "max_steps": 3, "max_length": 64, "learning_rate": 1e-2, "dataset": {"wrap": "none"}, "new_tokens": NEW,
        **options,
    }  # fmt: skip
    return SFTTrainer(SFTTrainer.Config.parse(values), model=model, data=ROWS, output=output)


@torch.no_grad()
def logits(network: Any) -> Tensor:
    found: Tensor = network.eval()(IDS).logits
    return found


def test_new_rows_are_the_mean_of_the_others(base: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(base)
    made = PolicyModel.from_pretrained(base, new_tokens=NEW)
    assert made.tokenizer.encode("a<think>b", add_special_tokens=False)[1] == 263
    assert made.tokenizer.decode([263, 264], skip_special_tokens=True) == "<think></think>"
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, name)().weight, getattr(made.network, name)().weight
        assert torch.equal(new[:263], old) and new.shape[0] == 265
        assert torch.allclose(new[263:], old.mean(0).expand(2, -1), atol=1e-7)
    tied = made.network.config.tie_word_embeddings
    assert (made.network.get_input_embeddings().weight is made.network.get_output_embeddings().weight) == tied
    assert made.network.config.vocab_size == 265


@pytest.mark.parametrize("lora", [None, {"rank": 4, "target_modules": ["q_proj"]}], ids=["every weight", "LoRA"])
def test_a_run_trains_saves_and_continues_them(base: Path, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    made = trainer(str(base), tmp_path / "run", lora=lora)
    start = made.train()
    assert start.metrics["loss"] > 0
    rows = made.policy.network.get_input_embeddings()(torch.tensor([263, 264]))
    assert not torch.allclose(rows[0], rows[1])  # both began as the mean
    expected, saved = logits(made.policy.network), tmp_path / "run/model"
    assert AutoTokenizer.from_pretrained(saved).encode("<think>", add_special_tokens=False) == [263]
    again = PolicyModel.from_pretrained(saved)
    assert torch.allclose(logits(again.network), expected, atol=1e-5)
    folded = PolicyModel.from_pretrained(saved, adapter="fold")
    assert torch.allclose(logits(folded.network), expected, atol=1e-4)
    if lora is not None:
        trained = [name for name, p in made.policy.named_parameters() if p.requires_grad and "lora_" not in name]
        assert trained and all("trainable_tokens_delta" in name for name in trained)
        resized = AutoModelForCausalLM.from_pretrained(base)
        resized.resize_token_embeddings(265, mean_resizing=False)
        assert torch.allclose(logits(peft.PeftModel.from_pretrained(resized, saved)), expected, atol=1e-5)
        # The old rows are those of the base.
        old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
        assert torch.equal(made.policy.network.get_input_embeddings()(torch.arange(263)), old)
    # Its last checkpoint is the same model, exported as the run would have.
    export_model(tmp_path / "run/checkpoints/step-3", tmp_path / "exported")
    assert torch.allclose(logits(PolicyModel.from_pretrained(tmp_path / "exported").network), expected, atol=1e-5)
    # A second run on the result: the tokens are there.
    further = trainer(str(saved), tmp_path / "second", new_tokens=[], max_steps=1)
    further.train()
    with pytest.raises(ConfigError, match="the tokenizer has the token already; got '<think>'; fix: leave it out"):
        trainer(str(saved), tmp_path / "third", **({"adapter": "fold"} if lora else {})).train()


@pytest.mark.parametrize("lora", [None, {"rank": 4, "target_modules": ["q_proj"]}], ids=["every weight", "LoRA"])
def test_a_resumed_run_is_the_run_that_went_on(
    base: Path, lora: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lora": lora, "checkpoint": {"every": 1}}
    whole = trainer(str(base), tmp_path / "whole", **options)
    whole.train()
    steps, loss = iter(range(1, 9)), SFTTrainer.loss

    def stopping(self: SFTTrainer, batch: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SFTTrainer, "loss", stopping)
        trainer(str(base), tmp_path / "cut", **options).train()
    cut = trainer(str(base), tmp_path / "cut", **options)
    cut.train(resume=True)
    assert torch.equal(logits(whole.policy.network), logits(cut.policy.network))


def test_the_reference_has_the_new_rows_as_they_began(base: Path) -> None:
    """With the adapter off, their updates are off too: the losses are those of a copy."""
    pairs = [{"prompt": f"{one} = ", "chosen": f"<think>{one}", "rejected": f"{one}</think>"} for one in range(8)]
    losses: dict[str, list[float]] = {"auto": [], "copy": []}
    for reference, seen in losses.items():
        values = {
            "batch_size": 4, "max_steps": 3, "max_length": 64, "learning_rate": 3e-2, "dataset": {"wrap": "none"},
            "lora": {"rank": 4}, "new_tokens": NEW, "reference": reference,
        }  # fmt: skip
        made = DPOTrainer(DPOTrainer.Config.parse(values), model=str(base), data=pairs)
        made.callbacks = {"on_step": lambda metrics, seen=seen: seen.append(metrics["loss"])}
        made.train()
    assert losses["auto"] == pytest.approx(losses["copy"], rel=1e-5) and losses["auto"][0] == pytest.approx(math.log(2))
    assert losses["auto"][-1] < 0.6


CHATML = ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "target_modules": ["q_proj"]}], ids=["every weight", "LoRA"])
def test_a_template_by_name_gets_its_control_tokens(base: Path, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    options = {"dataset": {"wrap": "chat", "chat_template": "chatml"}, "lora": lora}
    with pytest.raises(ConfigError, match=r"by `new_tokens: \[\"<\|im_start\|>\", \"<\|im_end\|>\"\]`"):
        trainer(str(base), tmp_path / "refused", **options, new_tokens=[]).train()
    made = trainer(str(base), tmp_path / "run", **options, new_tokens=[*CHATML, "<think>"])
    made.train()
    again = PolicyModel.from_pretrained(tmp_path / "run/model")
    tokenizer = again.tokenizer
    assert tokenizer.convert_tokens_to_ids([*CHATML, "<think>"]) == [263, 264, 265]
    assert tokenizer.decode([263, 50, 264, 265], skip_special_tokens=True) == f"{tokenizer.decode([50])}<think>"
    assert ChatTemplate(tokenizer).stops == (264,)
    question = [{"role": "user", "content": "<|im_end|>"}]
    (row,) = Encoder(tokenizer, "prompt").encode(list(open_source([{"prompt": question}]).rows()))
    assert row.row is not None and row.row.prompt_ids.count(264) == 1  # text of a row ends no turn
    assert row.control_text == ("<|im_end|>",)


def test_a_model_in_memory_is_trained_further_from_its_rows() -> None:
    model = PolicyModel(tiny_model(), tiny_tokenizer())
    for _ in range(2):
        trainer(model, learning_rate=1e-9, max_steps=1).train()
        weight = model.network.get_input_embeddings().weight
        with torch.no_grad():
            weight[263] += 1
    assert torch.allclose(weight[263] - weight[264], torch.full((64,), 2.0), atol=1e-5)


def test_a_reward_model_reads_new_tokens(base: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{one} = ", "chosen": f"<think>{one}", "rejected": f"{one}</think>"} for one in range(4)]
    values = {"batch_size": 4, "max_steps": 1, "max_length": 64, "new_tokens": NEW, "dataset": {"wrap": "none"}}
    made = RewardModelTrainer(
        RewardModelTrainer.Config.parse(values), model=str(base), data=pairs, output=tmp_path / "run"
    )
    made.train()
    again = RewardModel.from_pretrained(tmp_path / "run/model")
    assert again.tokenizer.encode("</think>", add_special_tokens=False) == [264]
    assert again.backbone_list[0].network.get_input_embeddings().weight.shape[0] == 265


def test_spare_rows_of_a_padded_vocabulary_are_used(tmp_path: Path) -> None:
    made = PolicyModel(tiny_model(vocab_size=280), tiny_tokenizer()).configure(TrainerConfig.parse({"new_tokens": NEW}))
    weight = made.network.get_input_embeddings().weight
    assert weight.shape[0] == 280 and torch.allclose(weight[263:265], weight[:263].mean(0).expand(2, -1), atol=1e-7)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["<a>", "<a>"], "the token is named twice"), ([" <a>"], "no white space around it"), ([""], "must not be empty")],
)
def test_tokens_that_cannot_be_meant_are_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig.parse({"new_tokens": tokens})


def test_what_would_not_train_them_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="the embeddings of `new_tokens` would stay the mean of the others"):
        trainer(str(base), freeze=["embed_tokens"]).train()
    with pytest.raises(ConfigError, match=r"has the token already; got '<\|user\|>'"):
        trainer(str(base), new_tokens=["<|user|>"]).train()
    adapted = PolicyModel.from_pretrained(base, lora=TrainerConfig.parse({"lora": {"rank": 2}}).lora)
    with pytest.raises(ConfigError, match="a model that has an adapter can't get new tokens"):
        trainer(adapted).train()


def test_the_disk_estimate_has_the_embeddings_in_an_adapters_file(base: Path) -> None:
    made, devices = trainer(str(base), lora={"rank": 4, "target_modules": ["q_proj"]}), DeviceManager()
    setup = RunSetup(made, Distribution(devices.device), devices)
    setup.build_models()
    tables = 1 if made.policy.network.config.tie_word_embeddings else 2
    assert disk_need(setup, 1).model_bytes > 265 * 64 * 4 * tables
