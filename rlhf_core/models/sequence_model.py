"""A transformers model with its tokenizer: its options, adapter and files, and its hidden states for batches."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.models.attention import Kernel, OptimizedAttention
from rlhf_core.models.backbone import loads_alone, plain_ids, without_head
from rlhf_core.models.compile import compile_model
from rlhf_core.models.cpu_products import speed_up_linears
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.embedding_noise import noisy_hidden_states
from rlhf_core.models.fused_norms import fuse_norms
from rlhf_core.models.gradient_sums import sum_embeddings_in_place
from rlhf_core.models.hidden_states import HiddenStates
from rlhf_core.models.layout import empty_layout
from rlhf_core.models.loading import Loaded
from rlhf_core.models.lora import apply_lora, lora_difference
from rlhf_core.models.new_tokens import add_embeddings, add_to_tokenizer, has_embeddings, rows_to_train
from rlhf_core.models.precision import (
    DTYPES,
    Precision,
    frozen_dtype_of,
    narrow_frozen,
    widen_unless_it_runs,
    within_products,
)
from rlhf_core.models.probe import ProbeResult
from rlhf_core.models.saved_adapters import folded_copy
from rlhf_core.models.saved_dtypes import SavedDtypes, save_in_dtypes
from rlhf_core.models.shared_forward import LayoutName, SharedForward

log = logging.getLogger(__name__)

MeasuredT = TypeVar("MeasuredT")


class SequenceModel(nn.Module):
    """A transformers model with its tokenizer, whose hidden states for a batch are computed with each prompt once.

    Subclasses and heads compute something from these hidden states: log-probabilities, scores, values.

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
        self.is_as_loaded = False
        """Whether its weights are still those of the files at `source`, as far as this class knows."""
        self.base_path: str | None = None
        """Path or hub name of the plain checkpoint with the weights under the adapter; None where no such checkpoint exists."""
        self.embeddings_resized = False
        """Whether the base's embeddings were resized after loading, so that an adapter must be saved with them."""
        self.has_unused_head = False
        """Whether the network has an output layer that isn't used, and is left out where the model is saved."""
        self.saved_dtypes, self.adapter_saved_dtypes = SavedDtypes.in_memory(model), SavedDtypes()
        """The dtypes in which the model and its adapter are saved: those that they came in."""
        self.save_precision: Precision = "auto"
        self.fresh_adapter = False
        """Whether the adapter was made here and isn't trained yet: without it the model is the one that was passed in."""
        self.precision = torch.float32
        """Dtype of matrix products once options were set; until then they run in the dtype of whatever autocast is on."""
        self._options_set = False
        self.shared_forward = SharedForward(self.network, source=source)
        self._measured: tuple[ProbeResult, dict[Callable[..., Any], Any]] | None = None

    @classmethod
    def of(cls, loaded: Loaded, source: str | Path) -> Self:
        """Return the model that `load_model` just loaded from a source, with no options set."""
        made = cls(loaded.model, loaded.tokenizer, source=str(source))
        made.base_path, made.embeddings_resized, made.is_as_loaded = loaded.base_path, loaded.embeddings_resized, True
        made.saved_dtypes, made.adapter_saved_dtypes = loaded.dtypes, loaded.adapter_dtypes or SavedDtypes()
        return made

    # Options

    def configure(self, config: TrainerConfig) -> Self:
        """Apply a trainer's options (attention, LoRA, gradient checkpointing, layout …) to a model in memory; return it.

        Raises:
            ConfigError: an option doesn't suit the model, such as a quantised base, which must be loaded as one.
        """
        self.is_as_loaded = False
        if not self.has_adapter:
            # Its weights may have been changed since it was loaded, so no adapter may name where it came from as its base.
            self.base_path = None
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
            new_tokens=config.new_tokens,
            save_precision=config.save_precision,
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
        new_tokens: Sequence[str] = (),
        frozen_precision: Precision = "float32",
        save_precision: Precision = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        layout: LayoutName = "auto",
        share_prompts: bool = True,
    ) -> Self:
        """Apply options in place, try the model with them, and return it; `TrainerConfig` says what each option does.

        Args:
            frozen_precision: here `float32` leaves frozen weights as they are.

        Raises:
            ConfigError: options don't suit each other or the model.
            ModelError: the model can't be used; see `check`.
        """
        self.precision, self.save_precision, self._options_set = DTYPES[precision], save_precision, True
        self.shared_forward = SharedForward(
            self.network,
            attention,
            dtype=self.precision,
            layout=layout,
            share_prompts=share_prompts,
            compiled=compile,
            source=self.source,
        )
        added = self._add_tokens(new_tokens) if new_tokens else None
        if lora is not None:
            self._put_adapter(lora, rows_to_train(self.network, added) if added is not None else None)
        frozen_dtype = frozen_dtype_of(precision, frozen_precision)
        narrow_frozen(self.network, frozen_dtype, product_dtype=self.precision)
        if gradient_checkpointing:
            _checkpointing(self.network, "enable")({"use_reentrant": False})
        elif any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules()):
            _checkpointing(self.network, "disable")()
        if not compile:
            fuse_norms(self.network)
            speed_up_linears(self.network)
            sum_embeddings_in_place(self.network)
        with evaluating(self.network):
            widen_unless_it_runs(self.network, plain_ids(self.network, 8))
        self.check()
        if compile:
            compile_model(self.network)
        return self

    def check(self) -> None:
        """Measure how the model may be forwarded, so that an unusable model is refused before anything is trained.

        Raises:
            ModelError: the network's hidden states can't be reproduced, or not in the layout of the options.
        """
        _ = self.probe_result

    def _add_tokens(self, tokens: Sequence[str]) -> range:
        """Add tokens to the tokenizer and embeddings of them to the network; return their ids.

        Raises:
            ConfigError: the tokenizer has one of them, or the model an adapter.
        """
        ids = add_to_tokenizer(self.tokenizer, tokens)
        if has_embeddings(self.network, ids):
            return ids  # trained in an earlier run already
        if self.has_adapter:
            raise ConfigError(
                "a model that has an adapter can't get new tokens: its base stays as it is",
                place="new_tokens",
                got=self.source,
                fix="set `adapter: fold`, or add them where the adapter is new",
            )
        add_embeddings(self.network, ids)
        self.embeddings_resized = True
        return ids

    def _put_adapter(self, lora: LoraConfig, rows: Mapping[str, list[int]] | None = None) -> None:
        """Add a new LoRA adapter, or keep the existing one if it matches the options.

        Args:
            rows: rows of embeddings that are trained beside it, by the full name of their module.

        Raises:
            ConfigError: another model put an adapter on the network, or the options differ from the existing adapter's.
        """
        if not self.has_adapter:
            if any(hasattr(module, "adapter_layer_names") for module in self.network.modules()):
                raise ConfigError(
                    "the network already has adapters, put on it through another model that shares it",
                    place="lora",
                    got=self.source,
                    fix="pass that model, or load the network a second time",
                )
            self.model = apply_lora(self.model, lora, rows=rows)
            self.fresh_adapter = True
            return
        held = next(iter(self.model.peft_config.values()))  # type: ignore[operator]
        if (difference := lora_difference(held, lora)) is not None:
            raise ConfigError(
                "the model already has an adapter of another shape",
                place="lora",
                got=difference,
                fix="leave `lora` out to continue training its adapter, or set `adapter: fold` to train a new one on top of it",
            )

    # Its parts and what was measured about them

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config") and hasattr(self.model, "disable_adapter")

    @property
    def network(self) -> Any:
        """The transformers model, adapters inside it."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    @property
    def backbone(self) -> nn.Module:
        """The part of the network that maps token ids to hidden states."""
        return self.probe_result.backbone

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.probe_result.width

    @property
    def probe_result(self) -> ProbeResult:
        """How the network may be forwarded, measured once after options were set.

        Raises:
            ModelError: see `check`.
        """
        return self.shared_forward.probed

    def measured(self, measure: Callable[[Self], MeasuredT]) -> MeasuredT:
        """Return `measure(self)`, computed once until options or `probe_result` change; copies of the model keep the result."""
        if self._measured is None or self._measured[0] is not self.probe_result:
            self._measured = (self.probe_result, {})
        results = self._measured[1]
        if measure not in results:
            results[measure] = measure(self)
        return cast(MeasuredT, results[measure])

    @property
    def attention(self) -> OptimizedAttention:
        return self.shared_forward.attention

    @property
    def compiled(self) -> bool:
        return self.shared_forward.compiled

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """Most tokens in a sequence that the model has positions for; None where its configuration names no limit."""
        return getattr(self.network.config.get_text_config(), "max_position_embeddings", None)

    def without_head(self, *, freeze: bool = True) -> SequenceModel:
        """Return the model's backbone as a model that shares its weights.

        The whole network is kept under an adapter, which knows its layers by their names in it, and where transformers couldn't
        load the backbone by itself.

        Args:
            freeze: whether an output layer that is kept, and isn't used, needs no gradients.
        """
        inner = without_head(self.network)
        whole = self.has_adapter or not loads_alone(inner)
        made = SequenceModel(self.model if whole else inner, self.tokenizer, source=self.source)
        made.is_as_loaded, made.base_path, made.embeddings_resized = (
            self.is_as_loaded,
            self.base_path,
            self.embeddings_resized,
        )
        made.has_unused_head, made.save_precision = whole, self.save_precision
        made.saved_dtypes, made.adapter_saved_dtypes = self.saved_dtypes, self.adapter_saved_dtypes
        inside = {id(parameter) for parameter in inner.parameters()}
        for parameter in made.parameters():
            if freeze and id(parameter) not in inside:
                parameter.requires_grad_(False)
        return made

    # Computing

    def hidden_states(self, batch: Batch, *, drop_last: bool = False) -> HiddenStates:
        """Forward a batch with each prompt computed once; return its last hidden states.

        Args:
            drop_last: leave out each response's last token where the layout allows: its state predicts nothing.
        """
        if not batch.num_responses:
            return HiddenStates(torch.zeros(0, self.width, device=batch.device), empty_layout(batch), batch)
        with self.product_precision():
            return self.shared_forward.hidden_states(batch, drop_last=drop_last)

    def noisy_hidden_states(
        self, batch: Batch, alpha: float, seeds: Tensor, *, drop_last: bool = False
    ) -> HiddenStates:
        """Return `hidden_states` with noise on the embeddings (NEFTune): alpha / √(tokens · width) · uniform(-1, 1).

        The noise of a sequence depends on its seed and length alone. A prompt has one response.

        Args:
            seeds: (P,) long, one per prompt.
        """
        return noisy_hidden_states(self, batch, alpha, seeds, drop_last=drop_last)

    def product_precision(self) -> AbstractContextManager[Any]:
        """Return a context in which matrix products run in this model's precision, whatever autocast is on around it."""
        kind = self.device.type
        around = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if not self._options_set or around == self.precision:
            return within_products(self.network)
        return torch.autocast(kind, dtype=self.precision, enabled=self.precision != torch.float32)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Compute without the adapter inside the context.

        Raises:
            ModelError: the model has no adapter.
        """
        if not self.has_adapter:
            fix = "use a model with a LoRA adapter, or call it without `adapter_off`"
            raise ModelError("the model has no adapter to switch off", place=self.source, fix=fix)
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    # Files

    def add_stops(self, ids: Sequence[int]) -> None:
        """Add token ids that end a response to the model's `generation_config.json`, which inference engines read."""
        options = getattr(self.network, "generation_config", None)
        if options is None:
            return
        own = options.eos_token_id
        own = [self.tokenizer.eos_token_id] if own is None else [own] if isinstance(own, int) else own
        if missing := [token for token in ids if token not in own]:
            options.eos_token_id = [*own, *missing]

    def save_pretrained(self, directory: str | Path, *, merged: bool = False) -> None:
        """Write a plain Hugging Face directory with the tokenizer; the model in memory is left as it is.

        A model with an adapter is saved as the adapter alone, which names its base. The adapter is folded into the weights that
        are written instead where no checkpoint of the base exists (an adapter folded on loading, a GGUF file, a model made in
        Python), or with `merged`.
        """
        directory, model = Path(directory), self.model
        options: dict[str, Any] = {}
        if self.has_adapter:
            if merged or self.base_path is None:
                if not merged:
                    log.info(
                        "no checkpoint of the adapter's base exists: the model is saved whole, its adapter folded in"
                    )
                model = folded_copy(self.model, place=self.source)
                if self.has_unused_head and loads_alone(inner := without_head(model)):
                    model = inner
            else:
                if self.embeddings_resized:
                    options["save_embedding_layers"] = True
                for adapter in self.model.peft_config.values():  # type: ignore[operator]
                    adapter.base_model_name_or_path = self.base_path
        alone = hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
        dtypes = self.adapter_saved_dtypes if alone else self.saved_dtypes
        if self.save_precision != "auto":
            dtypes = SavedDtypes(DTYPES[self.save_precision])
        with warnings.catch_warnings():
            # peft warns that it saves embeddings too, and that it can't ask the hub for the base's configuration.
            warnings.simplefilter("ignore", UserWarning)
            narrowed = save_in_dtypes(model, directory, dtypes, **options)
        if narrowed:
            why = ", as it came: `save_precision: float32` keeps every bit" if self.save_precision == "auto" else ""
            log.info("the model is saved in %s%s", str(dtypes.main).removeprefix("torch."), why)
        self.tokenizer.save_pretrained(directory)

    def describe(self) -> dict[str, Any]:
        """Return what this model is, for a run's record: JSON values."""
        config = self.network.config
        return {
            "source": self.source,
            "files": model_hashes(self, [self]),
            "architecture": type(self.network).__name__,
            "revision": getattr(config, "_commit_hash", None),
            **parameter_counts(self),
            "vocabulary": config.get_text_config().vocab_size,
            "attention": {"kernel": self.attention.kernel, "reason": self.attention.reason},
            "adapter": self.has_adapter,
        }


def _checkpointing(network: Any, action: str) -> Callable[..., None]:
    """Return transformers' switch for gradient checkpointing (`enable` or `disable`) under its new name or its old one."""
    return cast(
        "Callable[..., None]",
        getattr(network, f"activation_checkpointing_{action}", None)
        or getattr(network, f"gradient_checkpointing_{action}"),
    )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return how many parameters a model has, and how many of them are trained."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"parameters": sum(n for n, _ in counts), "trainable": sum(n for n, trained in counts if trained)}


def model_hashes(model: nn.Module, backbones: Sequence[SequenceModel]) -> dict[str, str]:
    """Return the SHA-256 of each file that a model was loaded from, or of its weights where it was changed since or made here.

    Args:
        model: the whole model, heads included.
        backbones: its backbones; heads and further backbones were loaded from the source of the first.
    """
    if all(one.is_as_loaded for one in backbones) and (files := file_hashes(backbones[0].source)) is not None:
        return files
    digest = hashlib.sha256()
    fresh = any(one.fresh_adapter for one in backbones)
    for name, tensor in model.state_dict().items():
        if not (fresh and "lora_" in name):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return {"weights in memory": digest.hexdigest()}
