"""Noise on embeddings: its size, gradients against inputs_embeds, the same in any layout, cut and padding; runs with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch, relative
from rlhf_plugins.trainers.dpo import DPOTrainer
from rlhf_plugins.trainers.sft import SEEDS, SFTTrainer
from trainers_helpers import built

from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.safetensors_file import read_tensors
from rlhf_core.models import PolicyModel
from rlhf_core.models.embedding_noise import embedding_noise
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

ALPHA = 5.0
ROWS = [{"prompt": f"{one} + 1 = ", "response": str(one + 1)} for one in range(12)]


def noisy(seed: int = 0) -> Batch:
    batch = random_batch(4, 1, masked=True, seed=seed)
    return batch.attach(per_prompt={SEEDS: torch.arange(4) + 17})


def trained(**options: Any) -> SFTTrainer:
    return built(SFTTrainer, model=PolicyModel(tiny_model(), tiny_tokenizer()), neftune_alpha=ALPHA, **options)


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def test_the_size_of_the_noise_by_hand() -> None:
    noise = embedding_noise([3, 4], [7, 20], 64, ALPHA, "cpu")
    assert noise.shape == (27, 64)
    for part, length in zip(noise.split([7, 20]), (7, 20), strict=True):
        most = ALPHA / math.sqrt(length * 64)
        assert 0.9 * most < part.abs().max() <= most
        assert part.std().item() == pytest.approx(most / math.sqrt(3), rel=0.1) and abs(part.mean()) < 0.1 * most
    assert torch.equal(noise[7:], embedding_noise([4], [20], 64, ALPHA, "cpu"))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_gradient_equals_that_through_inputs_embeds(layout: str, weight: float) -> None:
    """Each row by itself through transformers, its noise added to its embeddings."""
    made, batch, model = trained(batching={"layout": layout}, prompt_loss_weight=weight), noisy(), tiny_model()
    total, count = torch.zeros(()), 0.0
    for row in range(4):
        length = int(batch.response_lengths[row])
        prompt = batch.prompt_ids[row, : int(batch.prompt_lengths[row])]
        ids = torch.cat([prompt, batch.response_ids[row, :length]])
        noise = embedding_noise([17 + row], [len(ids)], 64, ALPHA, "cpu")
        logits = model(inputs_embeds=(model.get_input_embeddings()(ids) + noise)[None]).logits[0, :-1]
        weights = torch.cat(
            [torch.full((len(prompt),), weight), torch.where(batch.loss_mask[row, :length], 1.0, weight)]
        )
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total, count = total + (nll * weights[1:]).sum(), count + float(weights[1:].sum())
    (total / count).backward()
    parts = [part.pad(2, 1, value=5) for part in batch.split(size=3)]
    loss = sum(made.loss(part).terms["nll"] for part in parts) / sum(made.weights(part)["nll"] for part in parts)
    loss.backward()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-6)
    assert relative(gradient(made.policy), gradient(model)) < 1e-5
    without = made.loss(batch.attach()).terms["nll"].item()
    plain = built(SFTTrainer, model=PolicyModel(tiny_model(), tiny_tokenizer()), prompt_loss_weight=weight)
    assert abs(plain.loss(batch).terms["nll"].item() - without) > 1e-4


def sft(output: Path | None, **options: Any) -> SFTTrainer:
    values: dict[str, Any] = {
        "batch_size": 4, "max_steps": 4, "max_length": 32, "learning_rate": 1e-2, "dataset": {"wrap": "none"},
        "checkpoint": {"every": 2}, "neftune_alpha": ALPHA, **options,
    }  # fmt: skip
    model = PolicyModel(tiny_model(), tiny_tokenizer())
    return SFTTrainer(SFTTrainer.Config.parse(values), model=model, data=ROWS, eval_data=ROWS[:4], output=output)


def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft(tmp_path / "whole").train()
    steps, loss = iter(range(1, 9)), SFTTrainer.loss

    def stopping(self: SFTTrainer, batch: Any) -> Any:
        if SEEDS in batch.per_prompt and next(steps) == 4:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SFTTrainer, "loss", stopping)
        sft(tmp_path / "cut").train()
    sft(tmp_path / "cut").train(resume=True)
    whole, cut = (read_tensors(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_micro_batches_give_the_same_run_and_evaluations_have_no_noise() -> None:
    options: dict[str, Any] = {"max_steps": 1, "checkpoint": {}, "learning_rate": 1e-9}
    whole, cut = sft(None, **options), sft(None, micro_batch_size=1, **options)
    plain = sft(None, neftune_alpha=None, **options)
    found = [one.train() for one in (whole, cut, plain)]
    assert found[0].metrics["loss"] == pytest.approx(found[1].metrics["loss"], rel=1e-6)
    assert abs(found[0].metrics["loss"] - found[2].metrics["loss"]) > 1e-4
    assert found[0].metrics["grad_norm"] == pytest.approx(found[1].metrics["grad_norm"], rel=1e-5)
    # The steps moved nothing.
    assert found[0].eval_metrics["eval_loss"] == pytest.approx(found[2].eval_metrics["eval_loss"], rel=1e-5)


def test_every_epoch_has_other_noise() -> None:
    seen: list[int] = []

    class Seen(SFTTrainer):
        def loss(self, batch: Any) -> Any:
            seen.extend(batch[SEEDS].tolist() if SEEDS in batch.per_prompt else [])
            return super().loss(batch)

    model = PolicyModel(tiny_model(), tiny_tokenizer())
    Seen(sft(None, max_steps=6, checkpoint={}).config, model=model, data=ROWS, eval_data=ROWS[:4]).train()
    assert len(seen) == len(set(seen)) == 24


def test_it_is_for_one_response_per_prompt() -> None:
    batch = random_batch(2, 2)
    with pytest.raises(ValueError, match="one response per prompt"):
        PolicyModel(tiny_model(), tiny_tokenizer()).noisy_hidden_states(batch, 5.0, torch.arange(2))
    with pytest.raises(ConfigError, match="unknown option `neftune_alpha`"):
        DPOTrainer.Config.parse({"neftune_alpha": 5.0})
    with pytest.raises(ConfigError, match="unknown option `neftune_alpha`"):
        TrainerConfig.parse({"neftune_alpha": 5.0})
