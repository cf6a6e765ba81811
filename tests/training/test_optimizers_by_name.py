"""Optimisers for the matrices in layers: which weights are whose, one step by hand, resume to the bit, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_plugins.trainers.sft import SFTTrainer
from torch import Tensor

from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.trainer import Role
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.safetensors_file import read_tensors
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training.cost_estimate import ModelSize, training_cost
from rlhf_core.training.optimizer import OptimizerPair, create_optimizer, optimizer_state, state_bytes

ROWS = [{"prompt": f"{one} + 1 = ", "response": str(one + 1)} for one in range(12)]
NAMES = ("muon", "adamw_8bit")


def needs(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed (extra `adamw-8bit`)")


def policy(**options: Any) -> PolicyModel:
    made = PolicyModel(tiny_model(tie_embeddings=False), tiny_tokenizer())
    return made.configure(TrainerConfig.parse(options)) if options else made


def config_of(name: str, **options: Any) -> TrainerConfig:
    return TrainerConfig.parse({"learning_rate": 0.1, "optimizer": {"name": name, **options}})


def with_gradients(model: PolicyModel, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_matrices_in_layers_are_its_own_and_all_else_adamws(name: str) -> None:
    needs(name)
    model = policy()
    made = create_optimizer(model, config_of(name, weight_decay=0.5))
    assert isinstance(made, OptimizerPair)
    own, others = ({id(p) for group in part.param_groups for p in group["params"]} for part in made.parts)
    named = dict(model.named_parameters())
    assert {name for name in named if id(named[name]) in own} == {
        name for name in named if ".layers." in name and "proj" in name
    }
    assert own | others == {id(p) for p in named.values()} and not own & others
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.5 if p.ndim == 2 else 0.0) for p in named.values())


def test_a_step_of_muon_by_hand() -> None:
    """U Vᵀ of the gradient's singular value decomposition, scaled by 0.2 · √(longer side), after decay by rate · decay."""
    model = policy()
    made = create_optimizer(model, config_of("muon", weight_decay=0.5, momentum=0.9))
    before = with_gradients(model)
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    made.step()
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.ndim < 2:
            continue
        u, _, v = torch.linalg.svd(gradients[name], full_matrices=False)  # momentum scales a first gradient alone
        expected = before[name].double() * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(max(parameter.shape)) * (u @ v)
        moved, wanted = parameter.detach().double() - before[name], expected - before[name]
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)
        # Five iterations in bf16 bring singular values to 0.7 … 1.2, not to 1.
        assert cosine > 0.97 and 0.75 < moved.norm() / wanted.norm() < 1.2, name


def test_muon_is_pytorchs_and_the_others_adamws() -> None:
    one, two = policy(), policy()
    made = create_optimizer(one, config_of("muon", beta1=0.8))
    inside = [p for name, p in two.named_parameters() if ".layers." in name and p.ndim == 2]
    outside = [p for name, p in two.named_parameters() if not (".layers." in name and p.ndim == 2)]
    muon = torch.optim.Muon(inside, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(outside, lr=0.1, weight_decay=0.0, betas=(0.8, 0.999), fused=True)
    for seed in range(3):
        with_gradients(one, seed)
        with_gradients(two, seed)
        made.step()
        muon.step()
        adamw.step()
    theirs = dict(two.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in one.named_parameters())


def test_8_bits_follow_32_closely() -> None:
    needs("adamw_8bit")
    one, two = policy(), policy()
    first, second = create_optimizer(one, config_of("adamw_8bit")), create_optimizer(two, config_of("adamw"))
    start = {name: p.detach().clone() for name, p in one.named_parameters()}
    for seed in range(4):
        with_gradients(one, seed)
        with_gradients(two, seed)
        first.step()
        second.step()
    theirs = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        moved = theirs[name] - start[name]
        assert (parameter - theirs[name]).norm() < 0.05 * moved.norm(), name


def sft(output: Path | None, options: Mapping[str, Any], **changes: Any) -> SFTTrainer:
    values: dict[str, Any] = {
        "batch_size": 4, "max_steps": 4, "max_length": 32, "learning_rate": 1e-2, "dataset": {"wrap": "none"},
        "checkpoint": {"every": 2}, "lr_schedule": "constant", **options, **changes,
    }  # fmt: skip
    config = SFTTrainer.Config.parse(values)
    return SFTTrainer(config, model=policy(), data=ROWS, output=output)


def cut_in_third_step(trainer: SFTTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, loss = iter(range(1, 9)), SFTTrainer.loss

    def stopping(self: SFTTrainer, batch: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SFTTrainer, "loss", stopping)
        trainer.train()


@pytest.mark.parametrize(
    "options", [{"optimizer": "muon"}, {"optimizer": "adamw_8bit"}, {"optimizer": "muon", "lora": {"rank": 4}}]
)
def test_a_resumed_run_is_the_run_that_went_on(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(options["optimizer"])
    sft(tmp_path / "whole", options).train()
    cut_in_third_step(sft(tmp_path / "cut", options), monkeypatch)
    assert (tmp_path / "cut/checkpoints/step-2").is_dir()
    sft(tmp_path / "cut", options).train(resume=True)
    whole, cut = (read_tensors(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert whole and all(torch.equal(whole[name], cut[name]) for name in whole)
    states = [read_tensors(tmp_path / name / "checkpoints/step-4/optimizer.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0].keys() | states[1].keys())


@pytest.mark.parametrize("name", ["adamw", *NAMES])
def test_the_estimate_of_the_state_is_what_it_takes(name: str) -> None:
    needs(name)
    model = PolicyModel(tiny_model(hidden=96, heads=2, kv_heads=2), tiny_tokenizer())  # matrices above 4,096 weights
    made = create_optimizer(model, config_of(name))
    with_gradients(model)
    made.step()
    named = dict(model.named_parameters())
    tensors, _ = optimizer_state(made, named)
    # bitsandbytes keeps the same two tables of 256 numbers for all.
    found = sum(tensor.nbytes for key, tensor in tensors.items() if not key.startswith(("qmap", "step")))
    assert state_bytes(named, config_of(name), model) == pytest.approx(found, rel=1e-3)


def test_muon_trains(tmp_path: Path) -> None:
    options = {"optimizer": {"name": "muon", "weight_decay": 0.01}, "max_steps": 20, "learning_rate": 5e-3}
    made = sft(None, {}, **options, checkpoint={})
    assert made.train().metrics["loss"] < 3


def test_options_that_cannot_be_meant_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"`adamw` has no momentum; got 0\.5; fix: set `beta1`, or `name: muon`"):
        TrainerConfig.parse({"optimizer": {"momentum": 0.5}})
    with pytest.raises(ConfigError, match="matrices in a model's layers, and none of them is trained"):
        create_optimizer(torch.nn.Linear(3, 3), config_of("muon"))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ConfigError, match=r'needs the package bitsandbytes; fix: pip install "rlhf-core\[adamw-8bit\]"'
    ):
        create_optimizer(policy(), config_of("adamw_8bit"))
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):  # before anything is loaded
        SFTTrainer(SFTTrainer.Config.parse({"optimizer": "adamw_8bit"}), model="nowhere", data="nowhere").train()


@pytest.mark.parametrize(("name", "expected"), [("adamw", 16_000), ("muon", 13_200), ("adamw_8bit", 11_821.875)])
def test_the_estimate_of_memory_follows_the_optimiser(name: str, expected: float) -> None:
    """By hand: 1,000 weights, 300 of them embeddings with 16 bytes each; the others 8 and what the optimiser keeps."""
    size = ModelSize(parameters=1000, layers=1, width=30, vocabulary=10)
    options = config_of(name).updated(batching={"micro_batch_tokens": 1}, max_steps=1)
    found = training_cost(size, options, {"policy": Role(trained=True)}, rows=8, prompt_tokens=1.0).memory
    assert found == pytest.approx(expected + 17 * 4 * 30 + 8 * 10)
