"""The policy: a causal language model that scores tokens and generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
from torch import Tensor, nn

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.infra.errors import ModelError
from rlhf_core.models.fast_linears import packed, product
from rlhf_core.models.head_files import warn_of_heads
from rlhf_core.models.headed_model import wrong_kind
from rlhf_core.models.hidden_states import HiddenStates
from rlhf_core.models.load_options import LoadOptions, apply_load_options, reading_options
from rlhf_core.models.loading import check_tokenizer, load_model
from rlhf_core.models.logprobs import (
    exact_log_softmax,
    linear_token_logprobs,
    module_token_logprobs,
    over_vocabulary,
)
from rlhf_core.models.output_layer import LogitsUndetermined, OutputLayer, measure_output_layer, own_code_logits
from rlhf_core.models.probe import FAILURES
from rlhf_core.models.sequence_model import SequenceModel


class PolicyModel(SequenceModel):
    """A causal language model, trained or only read, with its tokenizer.

    Axes: R responses, T response tokens, S hidden states, D their width, V vocabulary.
    """

    prompt_compression: Any = None
    """The `PromptCompression` through which it reads long prompts, where there is one."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Unpack[LoadOptions]) -> Self:
        """Load a policy from a directory, a `.gguf` file, an adapter's directory or the hub; trained weights are float32.

        See `LoadOptions` and `TrainerConfig` for what the options do.

        Raises:
            ModelError: the model can't be loaded, or can't be used as a policy.
            ConfigError: options don't suit each other or the model.
        """
        reading = reading_options(options)
        warn_of_heads(source)
        policy = cls.of(load_model(source, **reading), source)
        apply_load_options(policy, [policy], options)
        return policy

    @classmethod
    def in_memory(cls, model: nn.Module, tokenizer: Any) -> Self:
        """Return a policy around a transformers model, with or without an adapter of peft's, which it trains in place.

        Raises:
            ModelError: it is no causal language model, its tokenizer is another model's, or its weights are quantised or on
                several devices, or not loaded at all.
        """
        place = f"the {type(model).__name__} in memory"
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            fix = "load it by `AutoModelForCausalLM`; a method that needs a head of its own makes it"
            raise ModelError("has no language model head", place=place, fix=fix)
        if len({parameter.device.type for parameter in model.parameters()}) > 1 or any(
            parameter.device.type == "meta" for parameter in model.parameters()
        ):
            fix = "load it without `device_map`: the run puts it where it trains"
            raise ModelError("is spread over several devices", place=place, fix=fix)
        if getattr(model, "is_quantized", False):
            fix = "give its path, and `lora: {quantize: 4bit}`"
            raise ModelError("is quantised, and can't be set up from here", place=place, fix=fix)
        check_tokenizer(model, tokenizer, place)
        return cls(model, tokenizer)

    @classmethod
    def adopt(cls, model: object) -> Self:
        """Return a policy in memory as it is.

        Raises:
            ModelError: the object is no policy.
        """
        if not isinstance(model, cls):
            raise wrong_kind(model, wanted=cls, allowed="a PolicyModel")
        return model

    @property
    def causal_lm(self) -> Any:
        """The transformers model, adapters inside it."""
        return self.network

    @property
    def head(self) -> nn.Module:
        """The layer that maps hidden states to the vocabulary."""
        return cast(nn.Module, self.causal_lm.get_output_embeddings())

    def token_logps(self, batch: Batch, *, temperature: float = 1.0, states: HiddenStates | None = None) -> Tensor:
        """Return (R, T) float32 log-probabilities of the response tokens inside the loss mask, nats; 0 elsewhere.

        The distribution is softmax(logits / temperature), given the prompt and the response so far.

        Args:
            states: this batch's hidden states, where they were computed before: nothing is forwarded again.
        """
        if not batch.num_loss_tokens:
            return batch.loss_mask.float()
        if states is None:
            states = self.hidden_states(batch, drop_last=True)
        states.check(batch)
        targets = batch.response_ids.flatten()[states.places()]
        return states.to_tokens(self.target_logps(states.predicting(), targets, temperature=temperature))

    def response_logps(self, batch: Batch, *, temperature: float = 1.0, states: HiddenStates | None = None) -> Tensor:
        """Return (R,) log-probabilities of the responses, summed over their loss mask, nats; see `token_logps`."""
        return self.token_logps(batch, temperature=temperature, states=states).sum(dim=1)

    def target_logps(self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Return (S,) float32 log softmax(logits / temperature)[target] for hidden states (S, D) and target ids (S,), nats."""
        layer, head, scale = self.output_layer, self.head, 1.0 / temperature
        if type(head) is not nn.Linear or head.bias is not None or layer.cap is not None or layer.own_code:
            return module_token_logprobs(self.logits, hidden, targets, scale=scale)
        with self.product_precision():
            return linear_token_logprobs(hidden, head.weight, targets, scale=scale * layer.slope)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., V) float32: the model's own logits for hidden states (..., D), with gradients.

        They include whatever the model does to the product with its output embedding (a factor, a cap, its own code). The whole
        (..., V) table is held in memory: for many states use `over_vocabulary`.
        """
        states = hidden.reshape(-1, hidden.shape[-1])
        # A model's own code may not take an empty batch.
        flat = states if len(states) else states.new_zeros(1, states.shape[1])
        layer = self.output_layer
        own_code = own_code_logits(self.network, self.probe_result) if layer.own_code else None
        with self.product_precision():
            found = layer.apply(self.head(flat).float()) if own_code is None else own_code(flat).float()
        return found[: len(states)].reshape(*hidden.shape[:-1], found.shape[-1])

    def next_token_logits(self, hidden: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Return (S, V) the model's own logits for hidden states (S, D), in the dtype in which it computes them.

        For decoding: where the logits are the output layer's product, that is returned as it is.

        Args:
            weight: from `head_weight`.
        """
        if weight is not None:
            return product(hidden.to(self.precision), weight)
        layer = self.output_layer
        if layer.own_code or layer.cap is not None or layer.slope != 1.0:
            return self.logits(hidden)
        return cast(Tensor, self.head(hidden))

    def head_weight(self) -> Tensor | None:
        """Return a copy (V, D) of the output layer's weight for products in their dtype; None where they read it as it is.

        A frozen embedding that 16 bits don't hold without loss stays float32, and each product would make this copy again.
        """
        layer, head = self.output_layer, self.head
        plain = type(head) is nn.Linear and head.bias is None
        if layer.own_code or layer.cap is not None or layer.slope != 1.0 or not plain:
            return None
        weight = cast(Tensor, head.weight)
        # autocast keeps the copy of a trained weight itself.
        wide = weight.dtype == torch.float32 and self.precision != torch.float32 and not weight.requires_grad
        return packed(weight.to(self.precision)) if wide else None

    def token_entropy(self, hidden: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Return (S,) float32: the entropy of softmax(logits / temperature) for hidden states (S, D), nats.

        Gradients flow into the hidden states and the output layer; the table of logits (S, V) is never held whole.
        """

        def entropy(logits: Tensor) -> Tensor:
            logps = exact_log_softmax(logits / temperature)
            # A token that the model masks has probability 0 and a log-probability of -inf.
            return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(dim=-1)

        return over_vocabulary(entropy, (self.logits, hidden))

    def forward(self, batch: Batch) -> Tensor:
        return self.token_logps(batch)

    @property
    def output_layer(self) -> OutputLayer:
        """What the model computes between its hidden states and its logits, measured once.

        Raises:
            ModelError: the model isn't causal, or hidden states alone don't determine its logits.
        """
        return self.measured(_output_layer_of)

    def check(self) -> None:
        """Measure how the model may be forwarded, and its output layer, so that an unusable model is refused at the start.

        Raises:
            ModelError: the network's hidden states can't be reproduced; or see `output_layer`.
        """
        _ = self.output_layer

    def generate(
        self,
        prompts: Sequence[Any],
        n: int = 1,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        min_new_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        min_confidence: float | None = None,
        confidence_window: int = 32,
        confidence_top: int = 20,
        seed: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, in the order in which they were drawn.

        Args:
            prompts: texts, or lists of chat messages, encoded as in training; rows with a `prompt` and its `tools`; or lists of
                token ids.
            n: completions per prompt.
            max_new_tokens: most tokens in a completion, its end token included; fewer where the model has no more positions.
            temperature: divisor of the logits; 0 takes the most likely token.
            top_p: keep the fewest of the most likely tokens whose probabilities sum to it; 1 keeps all.
            top_k: keep so many of the most likely tokens; 0 keeps all.
            min_p: keep tokens at least this share as likely as the most likely one; 0 keeps all.
            repetition_penalty: larger makes tokens that the prompt or the completion holds less likely; 1 changes nothing.
            min_new_tokens: tokens before any that ends a completion.
            stop: texts that end a completion, whose text is without them.
            stop_ids: ids that end a completion besides its end tokens.
            min_confidence: least mean confidence of the last `confidence_window` tokens, nats; below it a completion ends. 0 only
                reports each token's confidence, None none.
            confidence_window: tokens whose mean confidence decides.
            confidence_top: most likely tokens over which a token's confidence is the mean of -log p.
            seed: makes the draws repeatable; None takes a seed from torch's global random state.
            progress: called with the number of completions that have ended and the number of all, as each ends.

        Raises:
            ConfigError: an option is out of its range.
            DataError: a prompt can't be read, or leaves no room for a completion.
        """
        from rlhf_core.generation.generate import generate

        options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "min_new_tokens": min_new_tokens,
            "stop": stop if isinstance(stop, str) else list(stop),
            "stop_ids": list(stop_ids),
            "min_confidence": min_confidence,
            "confidence_window": confidence_window,
            "confidence_top": confidence_top,
        }
        sampling = SamplingConfig.parse(options, place="generate")
        return generate(self, prompts, n, sampling, seed=seed, progress=progress)


def _output_layer_of(policy: PolicyModel) -> OutputLayer:
    """Measure a policy's output layer; see `PolicyModel.output_layer` for what is refused."""
    probed, kind = policy.probe_result, type(policy.network).__name__
    if not probed.causal:
        raise ModelError(
            "the model is not a causal language model: what it predicts for a token depends on the tokens after it",
            place=policy.source,
            got=f"{kind}: earlier hidden states change by a factor of {probed.leak:.1e} with later tokens",
            fix="use a decoder, or set `is_decoder: true` in its config.json where it was trained as one",
        )
    try:
        return measure_output_layer(policy.network, probed)
    except (LogitsUndetermined, *FAILURES) as error:
        raise ModelError(
            "the model's logits depend on more than its hidden states, so its log-probabilities can't be computed",
            place=policy.source,
            got=f"{kind} {error}".strip(),
            fix="use a model whose logits for a token are a function of its last hidden state",
        ) from None
