"""How far transformers' own log-probabilities of drawn tokens are from those of its own forward pass."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_core.contracts.batch import Batch
from rlhf_core.generation.logprob_gap import Gap


@torch.no_grad()
def gap_of_transformers(model: Any, batch: Batch, count: int, *, n: int) -> Gap:
    """Draw n completions of `count` tokens for each prompt by `generate`, and compare with a forward pass in the same dtype."""
    differences = []
    torch.manual_seed(0)
    for prompt, length in zip(batch.prompt_ids, batch.prompt_lengths.tolist(), strict=True):
        ids = prompt[None, :length].repeat(n, 1)
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, temperature=1.0, top_p=1.0,
            max_new_tokens=count, min_new_tokens=count, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        drawn = made.sequences[:, length:, None]
        stepwise = torch.stack(made.logits, dim=1).float().log_softmax(-1).gather(2, drawn)
        whole = model(input_ids=made.sequences, use_cache=False).logits[:, length - 1 : -1].float().log_softmax(-1)
        differences.append((stepwise - whole.gather(2, drawn)).abs())
    every = torch.cat(differences)
    return Gap(float(every.mean()), float(every.max()))
