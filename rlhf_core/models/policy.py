"""The policy: a causal language model that scores tokens and generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.batch import Batch
from rlhf_core.config import LoraConfig
from rlhf_core.interfaces import Completion
from rlhf_core.models.attention import Kernel
from rlhf_core.models.generate import generate
from rlhf_core.models.heads import warn_of_heads
from rlhf_core.models.loading import load_model, plain_checkpoint
from rlhf_core.models.logprobs import linear_token_logprobs, module_token_logprobs
from rlhf_core.models.sequence import LayoutName, SequenceModel


class PolicyModel(SequenceModel):
    """A causal language model to be trained or read, with its tokenizer."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        attention: Kernel = "auto",
        precision: str = "float32",
        lora: LoraConfig | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        layout: LayoutName = "auto",
        share_prompts: bool = True,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
    ) -> PolicyModel:
        """Load from a local directory, a `.gguf` file, an adapter directory or the hub, with float32 weights.

        See `TrainerConfig` for what the options do.
        """
        warn_of_heads(source)
        model, tokenizer = load_model(source, attention="sdpa", lora=lora, trust_remote_code=trust_remote_code)
        policy = cls(model, tokenizer, source=str(source))
        policy.base, policy.loaded = plain_checkpoint(source), True
        if device is not None:
            policy.to(device)
        policy.set_options(
            attention=attention,
            precision=precision,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            layout=layout,
            share_prompts=share_prompts,
        )
        return policy

    @property
    def causal_lm(self) -> Any:
        """The transformers model, adapters inside it."""
        return self.network

    @property
    def head(self) -> nn.Module:
        """The output layer, hidden states to logits."""
        return cast(nn.Module, self.causal_lm.get_output_embeddings())

    def token_logps(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Return (R, T) float32 log-probabilities of the response tokens inside the loss mask, nats; 0 elsewhere.

        The distribution is softmax(logits / temperature), given the prompt and the response so far.
        """
        if not bool(batch.loss_mask.any()):
            return batch.loss_mask.float()
        hidden, layout = self.hidden_states(batch, drop_last=True)
        mask = batch.loss_mask
        logps = self._head_logps(hidden[layout.before[mask]], batch.response_ids[mask], 1.0 / temperature)
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(mask, logps)

    def response_logps(self, batch: Batch) -> Tensor:
        """Return (R,) log-probabilities of the responses, summed over their loss mask, nats."""
        return self.token_logps(batch).sum(dim=1)

    def forward(self, batch: Batch) -> Tensor:
        return self.token_logps(batch)

    def _head_logps(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        config, head = self._text_config, self.head
        softcap = getattr(config, "final_logit_softcapping", None)
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite divides
            scale = scale / scaling
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere multiplies
            scale = scale * factor
        if type(head) is nn.Linear and head.bias is None and softcap is None:
            return linear_token_logprobs(hidden, head.weight, targets, scale=scale)
        return module_token_logprobs(head, hidden, targets, scale=scale, softcap=softcap)

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[list[Completion]]:
        """Return completions for each prompt; the options are those of `rlhf_core.models.generate.generate`."""
        return generate(self, prompts, **options)
