"""Layers that are frozen by name stay as they are to the bit, have no state, and the others move as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_plugins.trainers.reward_model import RewardModelTrainer
from rlhf_plugins.trainers.sft import SFTTrainer

from rlhf_core.config.training import TrainerConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.safetensors_file import read_tensors
from rlhf_core.models import PolicyModel
from rlhf_core.models.diagonal_fisher import DiagonalFisher
from rlhf_core.models.loading import ModelOutline
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training.parameter_counts import count_parameters

ROWS = [{"prompt": f"{one} + 1 = ", "response": str(one + 1)} for one in range(8)]
PAIRS = [{"prompt": f"{one} + 1 = ", "chosen": str(one + 1), "rejected": str(one + 2)} for one in range(8)]
FIRST = {"embed_tokens", "layers.0"}
OPTIONS: dict[str, Any] = {
    "batch_size": 4, "max_steps": 2, "max_length": 32, "learning_rate": 1e-2, "dataset": {"wrap": "none"},
}  # fmt: skip


def policy(*, tie: bool = True) -> PolicyModel:
    return PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1, tie_embeddings=tie), tiny_tokenizer())


def sft(output: Path | None = None, *, model: Any = None, **options: Any) -> SFTTrainer:
    config = SFTTrainer.Config.parse(OPTIONS | options)
    return SFTTrainer(config, model=model if model is not None else policy(), data=ROWS, output=output)


@pytest.mark.parametrize("freeze", [["embed_tokens", "layers.[0].*"], ["model.embed_tokens.weight", "model.layers.0"]])
def test_frozen_layers_stay_and_the_others_move(freeze: list[str], tmp_path: Path) -> None:
    made = sft(tmp_path / "run", freeze=freeze, checkpoint={"every": 1})
    made.train()
    before, after = policy().network.state_dict(), made.policy.network.state_dict()
    saved = read_tensors(tmp_path / "run/model/model.safetensors")
    frozen = {name for name in before if any(part in name for part in FIRST)} | {"lm_head.weight"}  # tied
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert all(torch.equal(saved[name], after[name]) for name in saved)
    held = read_tensors(tmp_path / "run/checkpoints/step-2/optimizer.safetensors")
    assert held and not any(part in name for part in FIRST for name in held)


def test_gradients_of_the_others_are_those_without() -> None:
    found = []
    for freeze in ([], ["layers.0"]):
        made = sft(freeze=freeze, max_steps=1, max_grad_norm=None)
        made.train()
        found.append(made.policy.network.state_dict())
    moved = [name for name in found[0] if "layers.0" not in name]
    assert all(torch.equal(found[0][name], found[1][name]) for name in moved)


def test_elastic_weights_hold_what_is_trained_alone(tmp_path: Path) -> None:
    start = {name: one.detach().clone() for name, one in policy().network.named_parameters()}
    anchor = {name: one + 1 for name, one in start.items()}
    DiagonalFisher({name: torch.ones_like(one) for name, one in start.items()}, anchor).save(tmp_path / "fisher")
    made = sft(
        freeze=["embed_tokens", "layers.0"], max_steps=1, ewc={"fisher": [str(tmp_path / "fisher")], "weight": 0.2}
    )
    penalty = made.train().metrics["ewc_penalty"]
    trained = [name for name in start if not any(part in name for part in FIRST)]
    assert penalty == pytest.approx(0.1 * sum(start[name].numel() for name in trained), rel=1e-4)
    after = dict(made.policy.network.named_parameters())
    assert {name for name in start if not torch.equal(start[name], after[name])} == {*trained}


def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path) -> None:
    options = {"freeze": ["layers.1", "embed_tokens"], "max_steps": 4, "lr_schedule": "constant", "warmup_ratio": 0}
    sft(tmp_path / "whole", **options).train()

    class Stopped(SFTTrainer):
        def loss(self, batch: Any) -> Any:
            if self.policy.training and self.calls == 2:
                raise KeyboardInterrupt
            self.calls += 1
            return super().loss(batch)

        calls = 0

    config = SFTTrainer.Config.parse(OPTIONS | options | {"checkpoint": {"every": 1}})
    with pytest.raises(KeyboardInterrupt):
        Stopped(config, model=policy(), data=ROWS, output=tmp_path / "cut").train()
    made = Stopped(config, model=policy(), data=ROWS, output=tmp_path / "cut")
    made.calls = 10
    made.train(resume=True)
    whole, cut = (read_tensors(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_what_is_trained_is_counted_without_weights() -> None:
    network = policy().network
    outline = ModelOutline(None, None, network.config)
    counts = count_parameters(outline, TrainerConfig.parse({"freeze": ["layers.0", "embed_tokens"]}))
    expected = sum(
        p.numel() for name, p in network.named_parameters() if "layers.1" in name or name == "model.norm.weight"
    )
    assert counts is not None and counts.trained == expected
    with pytest.raises(ConfigError, match="no parameter of the model is named `layers"):
        count_parameters(outline, TrainerConfig.parse({"freeze": ["layers.7"]}))


@pytest.mark.parametrize("freeze", [["*"], ["model.layers.*", "model.norm", "embed_tokens"]])
def test_a_reward_models_head_is_trained_in_any_case(freeze: list[str]) -> None:
    config = RewardModelTrainer.Config.parse(OPTIONS | {"freeze": freeze})
    made = RewardModelTrainer(config, model=policy(tie=False), data=PAIRS)
    made.train()
    trained = [name for name, parameter in made.reward.named_parameters() if parameter.requires_grad]
    assert trained and all("head" in name for name in trained)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["layer.0"], r"no parameter of the model is named `layer\.0`"),
        (["embed_tokens", "embed_token"], r"named `embed_token`; fix: did you mean `embed_tokens`"),
        (["ayers.0"], r"no parameter of the model is named `ayers\.0`"),
        (["*"], "every parameter is frozen, so there is nothing to train"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(freeze: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sft(freeze=freeze).train()
    assert "freeze" in str(caught.value)


def test_an_adapters_base_is_frozen_already() -> None:
    with pytest.raises(ConfigError, match="the base under `lora` is frozen already"):
        TrainerConfig.parse({"freeze": ["norm"], "lora": True})
    adapted = policy().configure(TrainerConfig.parse({"lora": {"rank": 2}}))
    with pytest.raises(ConfigError, match="the base under an adapter is frozen already"):
        sft(model=adapted, freeze=["norm"]).train()


def test_a_model_in_memory_is_frozen_for_one_run_alone() -> None:
    model = policy()
    sft(model=model, freeze=["layers.0"]).train()
    between = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    sft(model=model).train()
    first = [name for name in between if "layers.0" in name and between[name].dim() == 2]
    assert first and not any(torch.equal(model.network.state_dict()[name], between[name]) for name in first)
