"""DoRA, rank-stabilised LoRA, modules trained whole: scores are peft's own, off they are the base's, peft reads the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from batches import random_batch, relative
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True, "rank": 9},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "all of them": {
        "use_dora": True,
        "use_rslora": True,
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "up_proj"],
    },
}


def row_by_row(model: Any, batch: Batch) -> Tensor:
    """Return the log-probabilities of the tokens in the loss through a model's own forward pass, response by response."""
    found = []
    for row in range(batch.num_responses):
        owner, length = int(batch.owner[row]), int(batch.response_lengths[row])
        prompt = batch.prompt_ids[owner, : int(batch.prompt_lengths[owner])]
        ids = torch.cat([prompt, batch.response_ids[row, :length]])
        logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        found.append(logps[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).squeeze(1))
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_pefts_own(kind: str, tmp_path: Path) -> None:
    tiny_model(tie_embeddings=False).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    policy = PolicyModel.from_pretrained(tmp_path / "base", lora=LoraConfig.parse({"rank": 4, **KINDS[kind]}))
    batch = random_batch(3, 2)
    base = row_by_row(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), batch)
    assert relative(policy.token_logps(batch)[batch.loss_mask], base) < 1e-5  # nothing changes at first
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    found = policy.token_logps(batch)[batch.loss_mask]
    assert relative(found, base) > 1e-3
    policy.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert relative(found, row_by_row(theirs, batch)) < 1e-5
    with policy.adapter_off():
        assert relative(policy.token_logps(batch)[batch.loss_mask], base) < 1e-5
    folded = PolicyModel.from_pretrained(tmp_path / "adapter", adapter="fold")
    assert relative(folded.token_logps(batch)[batch.loss_mask], found) < 1e-4
    (drawn,) = policy.generate(["abc"], max_new_tokens=6, temperature=0.0)[0]
    (expected,) = folded.generate(["abc"], max_new_tokens=6, temperature=0.0)[0]
    assert list(drawn.ids) == list(expected.ids)
