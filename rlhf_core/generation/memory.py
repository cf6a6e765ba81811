"""How much memory generation may use, and how much a completion needs."""

from __future__ import annotations

import torch

from rlhf_core.infra.host_memory import available_bytes
from rlhf_core.models.backbone import accepted
from rlhf_core.models.policy_model import PolicyModel

MOST_ROWS = 512
"""Most completions that are decoded at once."""
HOST_BYTES = 2**31
"""Bytes that generation may use at least on a CPU; larger makes larger, faster batches."""


def free_bytes(device: torch.device) -> int:
    """Return how many bytes generation may use: half of a GPU's free memory, a quarter of a computer's, but at least 2 GiB."""
    if device.type != "cuda":
        return max(HOST_BYTES, available_bytes() // 4)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused) // 2


def bytes_per_completion(policy: PolicyModel) -> tuple[int, int]:
    """Estimate how many bytes one completion needs for the work on its logits, and how many per token in the cache."""
    config = policy.network.config.get_text_config()

    def number(name: str, default: int) -> int:
        try:
            value = getattr(config, name, None)
        except Exception:
            value = None  # some configurations have one number per layer, and raise when asked for one
        return value if isinstance(value, int) and value > 0 else default

    heads = number("num_attention_heads", 1)
    width = number("head_dim", policy.width // heads)
    held, layers = number("num_key_value_heads", heads), number("num_hidden_layers", 1)
    size = 4 if policy.precision == torch.float32 else 2
    vocabulary = number("vocab_size", len(policy.tokenizer))
    # A layer's cache is copied as it grows; softmax, sorting and sums each need the vocabulary's size, some in float64.
    every = 0 if accepted(policy.network.forward, logits_to_keep=1) else 4 * vocabulary
    return 40 * vocabulary, 2 * (layers + 1) * held * width * size + every
