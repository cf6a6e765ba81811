"""SFT's loss: a golden number, float64, transformers' and TRL's on the same batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from batches import random_batch, relative
from rlhf_plugins.trainers.dpo import DPOTrainer
from rlhf_plugins.trainers.sft import SFTTrainer, sft_loss
from trainers_helpers import built

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.models.layout import padded_layout
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


def test_a_golden_number() -> None:
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -9.0, -9.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    assert sft_loss(logps, mask).item() == 5.5


def test_a_model_with_equal_logits_has_a_loss_of_log_v_per_token() -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight.zero_()
    batch = random_batch(3, 1)
    made = built(SFTTrainer, model=policy)
    mean = made.loss(batch).terms["nll"].item() / made.weights(batch)["nll"]
    assert mean == pytest.approx(math.log(policy.causal_lm.config.vocab_size), rel=1e-6)


def gradient(policy: PolicyModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_equal_float64(masked: bool) -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    made, batch = built(SFTTrainer, model=policy), random_batch(4, 1, masked=masked)
    loss = made.loss(batch).terms["nll"] / made.weights(batch)["nll"]
    loss.backward()
    model = tiny_model().double()
    layout = padded_layout(batch)
    logps = model(layout.input_ids, attention_mask=layout.attention_mask).logits.log_softmax(-1).flatten(0, 1)
    mask = batch.loss_mask
    expected = -logps[layout.before[mask]].gather(1, batch.response_ids[mask][:, None]).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    # Through a whole float32 model; at the loss's own inputs the gradient holds 1e-6 (test_logprobs).
    assert relative(gradient(policy), theirs) < 5e-6


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_loss_on_prompts_equals_that_of_whole_sequences(weight: float, responses: int, layout: str) -> None:
    """Each row by itself through transformers, loss on all of its tokens, gaps of the mask and prompts with their weight."""
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    made = built(SFTTrainer, model=policy, prompt_loss_weight=weight, batching={"layout": layout})
    batch = random_batch(4, responses, masked=True)
    model, total, count = tiny_model().double(), torch.zeros((), dtype=torch.float64), 0.0
    for row in range(4 * responses):
        owner, length = int(batch.owner[row]), int(batch.response_lengths[row])
        prompt = batch.prompt_ids[owner, : int(batch.prompt_lengths[owner])]
        ids = torch.cat([prompt, batch.response_ids[row, :length]])
        weights = torch.cat(
            [torch.full((len(prompt),), weight), torch.where(batch.loss_mask[row, :length], 1.0, weight)]
        )
        nll = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, count = total + (nll * weights[1:]).sum(), count + float(weights[1:].sum())
    (total / count).backward()
    # In micro-batches, and padded further: neither changes the step.
    parts = [part.pad(2, 3, value=9) for part in batch.split(size=3, divide=True)]
    weights_of_all = sum(made.weights(part)["nll"] for part in parts)
    loss = sum(made.loss(part).terms["nll"] for part in parts) / weights_of_all
    loss.backward()
    assert weights_of_all == pytest.approx(count) and made.weights(batch)["nll"] == pytest.approx(count)
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-6)
    theirs = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert relative(gradient(policy), theirs) < 5e-6


def test_loss_on_prompts_is_for_sft_alone() -> None:
    with pytest.raises(ConfigError, match="unknown option `prompt_loss_weight`"):
        DPOTrainer.Config.parse({"prompt_loss_weight": 1.0})


def test_loss_and_gradient_equal_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL isn't installed (extra `oracles`)")
    from datasets import Dataset

    batch = random_batch(4, 1)
    rows = []
    for row in range(4):
        prompt, length = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
        ids = [*batch.prompt_ids[row, :prompt].tolist(), *batch.response_ids[row, :length].tolist()]
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * length})
    tokenizer = tiny_tokenizer()
    theirs = trl.SFTTrainer(
        model=tiny_model(),
        args=trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
            completion_only_loss=True, gradient_checkpointing=False, shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(theirs.get_train_dataloader()))
    expected = theirs.compute_loss(theirs.model, inputs)
    expected.backward()
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    made = built(SFTTrainer, model=policy)
    ours = made.loss(batch).terms["nll"] / made.weights(batch)["nll"]
    ours.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    other = torch.cat([p.grad.flatten().double() for p in theirs.model.parameters() if p.grad is not None])
    assert relative(gradient(policy), other) < 1e-5


def test_the_end_token_is_in_the_loss_where_padding_shares_its_id() -> None:
    """Masks come from lengths: masking ids equal to the padding id would leave the end of a response out of the loss."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    policy = PolicyModel(tiny_model(), tokenizer)
    end = tokenizer.eos_token_id
    mask = torch.tensor([[True, True], [True, False]])
    batch = Batch(
        prompt_ids=torch.tensor([[9, 10], [11, end]]),
        prompt_lengths=torch.tensor([2, 1]),
        response_ids=torch.tensor([[20, end], [end, end]]),
        response_lengths=torch.tensor([2, 1]),
        owner=torch.tensor([0, 1]),
        loss_mask=mask,
        rows=(0, 1),
    )
    logps = policy.token_logps(batch)
    assert (logps[mask] < 0).all() and logps[1, 1] == 0
    assert built(SFTTrainer, model=policy).weights(batch)["nll"] == 3
