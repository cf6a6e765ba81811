"""What every model over sequences shares: options, adapters, attention, and the forward pass that computes each prompt once."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from rlhf_core.batch import Batch
from rlhf_core.config import LoraConfig, TrainerConfig
from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.models.attention import Kernel, OptimizedAttention
from rlhf_core.models.compile import compile_model
from rlhf_core.models.layout import Layout, packed_layout, padded_layout
from rlhf_core.models.lora import apply_lora
from rlhf_core.models.packing import packing_obstacle

log = logging.getLogger(__name__)

LayoutName = Literal["auto", "packed", "padded"]


class SequenceModel(nn.Module):
    """A transformers model with its tokenizer, forwarded over batches; what stands on its hidden states is a subclass's.

    Args:
        model: a transformers model, or a peft model around one.
        tokenizer: its tokenizer.
        source: where it came from, for messages and provenance.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, source: str = "in memory") -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.loaded = False
        """Whether its weights are those of `source` still, as far as this class knows."""
        self.base: str | None = None
        """Where the weights under the adapter stand as a plain checkpoint; None where they stand nowhere as they are."""
        self.layout: LayoutName = "auto"
        self.share_prompts = True
        self.fresh_adapter = False
        """True while the adapter was made here and not trained yet: without it the model is the one passed in."""
        self.attention = self._select_attention("auto", torch.float32)
        self._packs: bool | None = None

    def configure(self, config: TrainerConfig) -> Self:
        """Apply a trainer's options (attention, adapters, checkpointing, layout) to this model, in place; return it."""
        self.loaded = False
        if not self.has_adapter:
            # Its weights may have been changed since it was loaded, so no adapter may point at where it came from.
            self.base = None
            if config.lora is not None and config.lora.quantize != "none":
                raise ConfigError(
                    "a model that is loaded already can't be quantised",
                    place="lora.quantize",
                    got=config.lora.quantize,
                    fix=f"pass its path instead of the model, or `{type(self).__name__}.from_pretrained(path, lora=...)`",
                )
        return self.set_options(
            attention=config.attention,
            precision=config.precision,
            lora=config.lora,
            gradient_checkpointing=config.gradient_checkpointing,
            compile=config.compile,
            layout=config.batching.layout,
            share_prompts=config.batching.share_prompts,
        )

    def set_options(
        self,
        *,
        attention: Kernel = "auto",
        precision: str = "float32",
        lora: LoraConfig | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        layout: LayoutName = "auto",
        share_prompts: bool = True,
    ) -> Self:
        """Apply options, in place; see `TrainerConfig` for what they do."""
        dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.attention = self._select_attention(attention, dtype)
        log.info("attention: %s (%s)", self.attention.kernel, self.attention.reason)
        self.share_prompts = share_prompts
        if layout == "packed" and (compile or self.attention.kernel == "eager"):
            raise ConfigError(
                "packed rows need replaceable attention and no compilation",
                place="batching.layout",
                got="compile: true" if compile else "attention: eager",
                fix="set `batching.layout: padded`",
            )
        # A compiled block would be compiled anew for every list of segments.
        self.layout = "padded" if compile or self.attention.kernel == "eager" else layout
        if lora is not None:
            self._adapt(lora)
        if gradient_checkpointing:
            _checkpointing(self.network, "enable")({"use_reentrant": False})
        elif any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules()):
            _checkpointing(self.network, "disable")()
        if compile:
            compile_model(self.network)
        return self

    def _adapt(self, lora: LoraConfig) -> None:
        if not self.has_adapter:
            self.model = apply_lora(self.model, lora)
            self.fresh_adapter = True
            return
        held = next(iter(self.model.peft_config.values()))  # type: ignore[operator]
        if (held.r, held.lora_alpha, held.lora_dropout) != (lora.rank, lora.alpha, lora.dropout):
            raise ConfigError(
                "the model has an adapter of another shape already",
                place="lora",
                got=f"rank {held.r}, alpha {held.lora_alpha} in the model; rank {lora.rank}, alpha {lora.alpha} asked for",
                fix="leave `lora` out to go on training its adapter, or merge it (`model.merge_and_unload()`) to train a new one",
            )

    def _select_attention(self, wanted: Kernel, dtype: torch.dtype) -> OptimizedAttention:
        choice = OptimizedAttention.select(wanted, device=self.device, dtype=dtype)
        if choice.kernel == "sdpa" and not getattr(self.network, "_supports_sdpa", False):
            # Under a name of ours transformers would not notice, and what SDPA leaves out (sinks, caps) would be lost.
            choice = OptimizedAttention("eager", "the model has no attention through SDPA")
        try:
            self.network.set_attn_implementation(choice.implementation)
        except (ValueError, ImportError) as error:
            # A model without replaceable attention keeps its own, and takes padded rows.
            choice = OptimizedAttention("eager", f"the model's attention can't be replaced: {error}")
        return choice

    # What it is made of

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config") and hasattr(self.model, "disable_adapter")

    @property
    def network(self) -> Any:
        """The transformers model, adapters inside it."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    @property
    def backbone(self) -> nn.Module:
        """The stack that maps token ids to hidden states."""
        return cast(nn.Module, getattr(self.network, self.network.base_model_prefix, self.network))

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self._text_config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """Most tokens in a sequence that the model has positions for, where it says."""
        return getattr(self._text_config, "max_position_embeddings", None)

    @property
    def _text_config(self) -> Any:
        return self.network.config.get_text_config()

    def without_head(self) -> SequenceModel:
        """Return the model's backbone as a model of its own, sharing its weights."""
        if self.has_adapter:
            raise ConfigError(
                "a backbone can't be taken out from under an adapter",
                place="model",
                got=self.source,
                fix="merge the adapter first (`model.merge_and_unload()`), or pass the path of what was saved",
            )
        made = SequenceModel(self.backbone, self.tokenizer, source=self.source)
        made.loaded = self.loaded
        return made

    # The forward pass

    def hidden_states(self, batch: Batch, *, drop_last: bool = False) -> tuple[Tensor, Layout]:
        """Forward a batch with each prompt computed once; return hidden states (N, D), flattened, and where each one stands.

        With `drop_last`, each response's last token is left out where the layout allows: it predicts nothing.
        """
        packed = self._packs_batch(batch)
        layout = (
            packed_layout(batch, share_prompts=self.share_prompts, drop_last=drop_last)
            if packed
            else padded_layout(batch)
        )
        return self._forward(layout), layout

    def _forward(self, layout: Layout) -> Tensor:
        extra: dict[str, Any] = {} if layout.segments is None else {"segments": layout.segments}
        if layout.segments is not None:
            # A mask of four dimensions is taken as it is, so none is built over the whole row; segments say who sees whom.
            extra["attention_mask"] = layout.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
        else:
            extra["attention_mask"] = layout.attention_mask
        out = self.backbone(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **extra)
        return out.last_hidden_state.flatten(0, 1)

    def _packs_batch(self, batch: Batch) -> bool:
        if self.layout == "padded" or self.attention.kernel == "eager":
            return False
        if self._packs is None:
            self._packs = self._check_packing()
        window = getattr(self._text_config, "sliding_window", None)
        # Segments know no window; a sequence that doesn't fill it is attended in the same way with and without.
        return self._packs and (window is None or int(batch.prompt_tokens().max()) <= window)

    def _check_packing(self) -> bool:
        obstacle = packing_obstacle(
            self._forward,
            self.backbone,
            vocabulary=self._text_config.vocab_size,
        )
        if obstacle is None:
            return True
        if self.layout == "packed":
            raise ModelError(
                "this model can't keep packed sequences apart",
                place="batching.layout",
                got=obstacle,
                fix="set `batching.layout: padded`",
            )
        log.warning("packed rows don't give this model's own hidden states (%s): rows are padded instead", obstacle)
        return False

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Read the model without its adapter."""
        if not self.has_adapter:
            raise ModelError("the model has no adapter to switch off", place=self.source)
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    # In and out

    def save_pretrained(self, directory: str | Path, *, merged: bool = False) -> None:
        """Write a plain Hugging Face directory with the tokenizer.

        That is the whole model; or, of a model with an adapter, the adapter alone, which names its base. Where the base stands
        nowhere as it is (an adapter merged on loading, a GGUF file, a model made in Python), or where `merged`, the adapter is
        merged into what is written. The model itself is left as it is.
        """
        directory, model = Path(directory), self.model
        if self.has_adapter:
            if merged or self.base is None:
                model = copy.deepcopy(self.model).merge_and_unload()  # type: ignore[operator]
            else:
                for adapter in self.model.peft_config.values():  # type: ignore[operator]
                    adapter.base_model_name_or_path = self.base
        model.save_pretrained(directory)  # type: ignore[operator]
        self.tokenizer.save_pretrained(directory)

    def describe(self) -> dict[str, Any]:
        """Return what this model is, for a run's record."""
        config = self.network.config
        return {
            "source": self.source,
            "files": model_hashes(self, [self]),
            "architecture": type(self.network).__name__,
            "revision": getattr(config, "_commit_hash", None),
            "parameters": sum(p.numel() for p in self.parameters()),
            "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "vocabulary": config.get_text_config().vocab_size,
            "attention": {"kernel": self.attention.kernel, "reason": self.attention.reason},
            "adapter": self.has_adapter,
        }


def _checkpointing(network: Any, action: str) -> Callable[..., None]:
    """Return transformers' switch under its new name, or its old one where it has no other."""
    return cast(
        "Callable[..., None]",
        getattr(network, f"activation_checkpointing_{action}", None)
        or getattr(network, f"gradient_checkpointing_{action}"),
    )


def model_hashes(model: nn.Module, parts: Sequence[SequenceModel]) -> dict[str, str]:
    """Return SHA-256 of the files that a model was loaded from, or, of one in memory, of its weights as they are.

    Args:
        model: the whole.
        parts: what was loaded, the first from where the rest stands too.
    """
    if all(part.loaded for part in parts) and (files := file_hashes(parts[0].source)) is not None:
        return files
    digest = hashlib.sha256()
    fresh = any(part.fresh_adapter for part in parts)
    for name, tensor in model.state_dict().items():
        if not (fresh and "lora_" in name):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"weights in memory": digest.hexdigest()}
