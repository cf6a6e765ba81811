"""A transformers model with its tokenizer as a trainer's model: trained in place, recorded, resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_plugins.trainers.dpo import DPOConfig, DPOTrainer
from rlhf_plugins.trainers.reward_model import RewardModelConfig, RewardModelTrainer
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.publishing.export_model import export_model
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training import loader

PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no"} for n in range(4)]
ROWS = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(4)]


def sft(model: Any, output: Path | None = None, **options: Any) -> SFTTrainer:
    config = SFTConfig(batch_size=2, learning_rate=1e-2, **{"max_steps": 2, **options})
    return SFTTrainer(config, model=model, tokenizer=tiny_tokenizer(), data=ROWS, output=output)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_its_own_modules_are_trained_and_still_work(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = weights(model)
    trainer = DPOTrainer(
        DPOConfig(max_steps=2, batch_size=2), model=(model, tokenizer), data=PAIRS, output=tmp_path / "run"
    )
    result = trainer.train()
    assert not same(before, weights(model)) and trainer.policy.causal_lm is model
    assert result.model_dir is not None and same(weights(model), weights(read(result.model_dir)))
    model.save_pretrained(tmp_path / "own")
    assert same(weights(model), weights(read(tmp_path / "own")))
    ids = tokenizer("1+1=", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
    assert json.loads((tmp_path / "run/models.json").read_text())["policy"]["source"] == "in memory"
    assert "model: <LlamaForCausalLM>" in (tmp_path / "run/config.yaml").read_text()


def read(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def test_a_resume_takes_the_model_as_it_was_at_the_start(tmp_path: Path) -> None:
    whole, part = tiny_model(), tiny_model()
    sft(whole, max_steps=2, checkpoint={}).train()
    failing = sft(part, tmp_path / "run", checkpoint={"every": 1})

    def fails(step: int) -> None:
        if step == 2:
            raise RuntimeError

    failing.callbacks = {"on_step": fails}
    with pytest.raises(RuntimeError):
        failing.train()
    with pytest.raises(ModelError, match="changed since the run was started"):
        sft(part, tmp_path / "run", checkpoint={"every": 1}).train(resume=True)
    again = tiny_model()
    sft(again, tmp_path / "run", checkpoint={"every": 1}).train(resume=True)
    assert same(weights(again), weights(whole))


def test_its_checkpoints_are_not_whole_models(tmp_path: Path) -> None:
    sft(tiny_model(), tmp_path / "run").train()
    with pytest.raises(
        ModelError, match=r"with its model as an object.*got <LlamaForCausalLM>; fix: name the run's `model/`"
    ):
        export_model(tmp_path / "run/checkpoints/step-2", tmp_path / "out")
    export_model(tmp_path / "run", tmp_path / "out")
    assert same(weights(read(tmp_path / "out")), weights(read(tmp_path / "run/model")))


def test_narrow_weights_are_trained_in_float32_and_saved_as_they_came(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    sft(model, tmp_path / "run").train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in read(tmp_path / "run/model").parameters()} == {torch.bfloat16}


def test_an_adapter_is_put_on_its_modules_and_folded_where_it_is_exported(tmp_path: Path) -> None:
    model = tiny_model()
    sft(model, tmp_path / "run", lora={"rank": 2}).train()
    assert any("lora_A" in name for name, _ in model.named_parameters())
    # No checkpoint of its base exists that an adapter's directory could name.
    assert not (tmp_path / "run/model/adapter_config.json").exists()
    assert not same(weights(tiny_model()), weights(read(tmp_path / "run/model")))


def test_other_kinds_of_models_are_built_on_it() -> None:
    model = tiny_model()
    before = weights(model)
    config = RewardModelConfig(max_steps=1, batch_size=2)
    RewardModelTrainer(config, model=(model, tiny_tokenizer()), data=PAIRS).train()
    assert not same(before, weights(model))


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (tiny_model(), None, "a transformers model has no tokenizer with it"),
        ("path", tiny_tokenizer(), "tokenizer: is only for a transformers model; got str"),
        ((tiny_model(),), None, "is the pair of a transformers model and its tokenizer"),
        ((tiny_model(), tiny_tokenizer()), tiny_tokenizer(), "is the pair of"),
        (("path", tiny_tokenizer()), None, "tokenizer: is only for a transformers model"),
    ],
)
def test_what_does_not_go_together_is_refused_when_the_trainer_is_made(
    model: Any, tokenizer: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        SFTTrainer(model=model, tokenizer=tokenizer, data=ROWS)
    assert message in str(raised.value)


def test_a_model_that_can_not_be_trained_is_refused() -> None:
    with pytest.raises(ModelError, match="has no language model head"):
        sft(tiny_model().model).train()
    with pytest.raises(ModelError, match="spread over several devices"):
        sft(tiny_model().to("meta")).train()
    small = tiny_model(vocab_size=100)
    with pytest.raises(ModelError, match="more tokens than the model has embeddings"):
        sft(small).train()
    quantised = tiny_model()
    quantised.is_quantized = True
    with pytest.raises(ModelError, match="is quantised"):
        sft(quantised).train()


def test_arguments_of_other_trainers_are_answered_before_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="`train_dataset`; fix: write `data`"):
        SFTTrainer(model="m", train_dataset=[], processing_class=None)  # type: ignore[call-arg]
    for given, name in (({"model": "m"}, "data"), ({"data": []}, "model")):
        with pytest.raises(ConfigError, match=f"`{name}` is missing; fix: pass `{name}=…`"):
            SFTTrainer(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "products", "warned"), [("bf16", "float32", 1), ("bf16", "bfloat16", 0), ("float32", "float32", 0)]
)
def test_training_warns_of_a_processor_without_products_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, precision: str, products: str, warned: int
) -> None:
    monkeypatch.setattr(loader, "product_dtype", lambda dtype: getattr(torch, products))
    sft(tiny_model(), max_steps=1, precision=precision, logging={"progress": False}).train()
    assert sum("no instructions" in one for one in caplog.messages) == warned
