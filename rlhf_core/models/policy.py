"""The policy: a causal language model that scores tokens and generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.batch import Batch, on_host, to_device
from rlhf_core.config import LoraConfig
from rlhf_core.errors import ModelError
from rlhf_core.interfaces import Completion
from rlhf_core.models.adapters import AdapterUse
from rlhf_core.models.attention import Kernel
from rlhf_core.models.generate import generate
from rlhf_core.models.heads import warn_of_heads
from rlhf_core.models.loading import load_model
from rlhf_core.models.logprobs import linear_token_logprobs, module_token_logprobs
from rlhf_core.models.output_layer import OutputLayer, Unexplained, graft, measure
from rlhf_core.models.precision import Precision, frozen_dtype, within_products
from rlhf_core.models.probe import FAILURES, Findings
from rlhf_core.models.sequence import LayoutName, SequenceModel


class PolicyModel(SequenceModel):
    """A causal language model to be trained or read, with its tokenizer."""

    _output_layer: tuple[Findings, OutputLayer] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        attention: Kernel = "auto",
        precision: str = "float32",
        lora: LoraConfig | None = None,
        adapter: AdapterUse = "continue",
        frozen_precision: Precision = "auto",
        save_precision: Precision = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        layout: LayoutName = "auto",
        share_prompts: bool = True,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
    ) -> PolicyModel:
        """Load from a local directory, a `.gguf` file, an adapter directory or the hub; trained weights are float32.

        See `TrainerConfig` for what the options do.
        """
        warn_of_heads(source)
        loaded = load_model(
            source,
            hold=frozen_dtype(precision, frozen_precision),
            lora=lora,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
        )
        policy = cls.of(loaded, source)
        if device is not None:
            policy.to(device)
        policy.set_options(
            attention=attention,
            precision=precision,
            lora=lora,
            frozen_precision=frozen_precision,
            save_precision=save_precision,
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
        mask = batch.loss_mask
        scored = on_host(mask).flatten().nonzero().squeeze(1)
        if not len(scored):
            return mask.float()
        scored = to_device(scored, mask.device)
        hidden, layout = self.hidden_states(batch, drop_last=True)
        at, targets = layout.before.flatten()[scored], batch.response_ids.flatten()[scored]
        logps = self._head_logps(hidden[at], targets, 1.0 / temperature)
        found = torch.zeros(mask.numel(), dtype=torch.float32, device=mask.device)
        return found.index_copy(0, scored, logps).view(mask.shape)

    def response_logps(self, batch: Batch) -> Tensor:
        """Return (R,) log-probabilities of the responses, summed over their loss mask, nats."""
        return self.token_logps(batch).sum(dim=1)

    def forward(self, batch: Batch) -> Tensor:
        return self.token_logps(batch)

    @property
    def output_layer(self) -> OutputLayer:
        """What the model does between its hidden states and its logits.

        Raises:
            ModelError: the model isn't causal, or hidden states alone don't decide its logits.
        """
        if self._output_layer is None or self._output_layer[0] is not self.findings:
            self._output_layer = (self.findings, self._measure())
        return self._output_layer[1]

    def check(self) -> None:
        """Try the model, its output layer too; see `output_layer` for what is refused."""
        _ = self.output_layer

    def _measure(self) -> OutputLayer:
        findings, kind = self.findings, type(self.network).__name__
        if not findings.causal:
            raise ModelError(
                "is not a causal language model: what it says of a token depends on the tokens after it",
                place=self.source,
                got=f"{kind}: earlier hidden states change by a factor of {findings.leak:.1e} with later tokens",
                fix="use a decoder, or set `is_decoder: true` in its config.json where it was trained as one",
            )
        try:
            return measure(self.network, findings)
        except (Unexplained, *FAILURES) as error:
            raise ModelError(
                "the model's logits aren't decided by its hidden states, so its log-probabilities can't be computed",
                place=self.source,
                got=f"{kind} {error}".strip(),
                fix="use a model whose logits for a token are a function of its last hidden state",
            ) from None

    def _head_logps(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        with within_products(self.network):
            return self._logps_of(hidden, targets, scale)

    def _logps_of(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        layer = self.output_layer
        if layer.own:
            return module_token_logprobs(graft(self.network, self.findings), hidden, targets, scale=scale)
        head = self.head
        if type(head) is nn.Linear and head.bias is None and layer.cap is None:
            return linear_token_logprobs(hidden, head.weight, targets, scale=scale * layer.slope)
        return module_token_logprobs(lambda states: layer.apply(head(states).float()), hidden, targets, scale=scale)

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[list[Completion]]:
        """Return completions for each prompt; the options are those of `rlhf_core.models.generate.generate`."""
        return generate(self, prompts, **options)
