"""What every model over sequences shares: options, adapters, attention, and the forward pass that computes each prompt once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError, describe_error
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.models.adapters import folded_copy
from rlhf_core.models.attention import Kernel, OptimizedAttention
from rlhf_core.models.backbone import accepted, hidden_of, loads_alone, plain_ids, without_head
from rlhf_core.models.compile import compile_model
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.fused_norms import fuse_norms
from rlhf_core.models.hidden_states import HiddenStates
from rlhf_core.models.layout import Layout, empty_layout, joined, of_responses, packed_layout, padded_layout
from rlhf_core.models.loading import Loaded
from rlhf_core.models.lora import apply_lora, lora_difference
from rlhf_core.models.precision import (
    DTYPES,
    Precision,
    Stored,
    cast_for_saving,
    frozen_dtype,
    narrow_frozen,
    note_dtype,
    widen_unless_it_runs,
    within_products,
)
from rlhf_core.models.probe import FAILURES, Findings, Unexplained, examine, odd_company
from rlhf_core.models.rope import LengthClasses

log = logging.getLogger(__name__)

LayoutName = Literal["auto", "packed", "padded"]
MeasuredT = TypeVar("MeasuredT")


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
        self.resized = False
        """Whether the base's embeddings were resized since, so that an adapter must bring them along."""
        self.headless = False
        """Whether the network has a head that isn't used, and is left out where the model is saved."""
        self.stored, self.adapter_stored = Stored.in_memory(model), Stored()
        """The types that weights came in, and those of an adapter: they are saved in these."""
        self.save_precision: Precision = "auto"
        self.layout: LayoutName = "auto"
        self.share_prompts = True
        self.fresh_adapter = False
        """True while the adapter was made here and not trained yet: without it the model is the one passed in."""
        self.precision = torch.float32
        """Of matrix products, once options were set; until then they run in the precision of whatever is around them."""
        self._set_up = False
        self.attention = self._select_attention("auto")
        self._findings: Findings | None = None
        self._measured: tuple[Findings, dict[Callable[..., Any], Any]] | None = None
        self._attention_name: str | None = None
        self._lengths = LengthClasses(self.network)
        self._tried = 0
        """Tokens of the longest sequence that was tried together with others."""
        self._compiled = False

    @classmethod
    def of(cls, loaded: Loaded, source: str | Path) -> Self:
        """Return what was loaded just now, as it lies on disk."""
        made = cls(loaded.model, loaded.tokenizer, source=str(source))
        made.base, made.resized, made.loaded = loaded.base, loaded.resized, True
        made.stored, made.adapter_stored = loaded.stored, loaded.adapter_stored or Stored()
        return made

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
        frozen_precision: Precision = "float32",
        save_precision: Precision = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        layout: LayoutName = "auto",
        share_prompts: bool = True,
    ) -> Self:
        """Apply options, in place; see `TrainerConfig` for what they do. `float32` leaves frozen weights as they are."""
        self.precision, self.save_precision, self._set_up = DTYPES[precision], save_precision, True
        self.attention = self._select_attention(attention)
        self._findings = None
        self.share_prompts = share_prompts
        if layout == "packed" and (compile or self.attention.kernel == "eager"):
            raise ConfigError(
                "packed rows need replaceable attention and no compilation",
                place="batching.layout",
                got="compile: true" if compile else f"attention: eager ({self.attention.reason})",
                fix="set `batching.layout: padded`",
            )
        # A compiled block would be compiled again for every list of segments.
        self.layout = "padded" if compile else layout
        if lora is not None:
            self._adapt(lora)
        narrow_frozen(self.network, frozen_dtype(precision, frozen_precision), products=self.precision)
        if gradient_checkpointing:
            _checkpointing(self.network, "enable")({"use_reentrant": False})
        elif any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules()):
            _checkpointing(self.network, "disable")()
        if not compile:
            fuse_norms(self.network)
        with evaluating(self.network):
            widen_unless_it_runs(self.network, plain_ids(self.network, 8))
        self.check()
        self._compiled = compile
        if compile:
            compile_model(self.network)
        return self

    def check(self) -> None:
        """Try the model, so that what can't be used is known before anything is trained.

        Raises:
            ModelError: see `findings`.
        """
        _ = self.findings

    def _adapt(self, lora: LoraConfig) -> None:
        if not self.has_adapter:
            if any(hasattr(module, "adapter_layer_names") for module in self.network.modules()):
                raise ConfigError(
                    "the network has adapters already, put on it through another model that shares it",
                    place="lora",
                    got=self.source,
                    fix="pass that model, or load the network a second time",
                )
            self.model = apply_lora(self.model, lora)
            self.fresh_adapter = True
            return
        held = next(iter(self.model.peft_config.values()))  # type: ignore[operator]
        if (difference := lora_difference(held, lora)) is not None:
            raise ConfigError(
                "the model has an adapter of another shape already",
                place="lora",
                got=difference,
                fix="leave `lora` out to go on training its adapter, or set `adapter: fold` to train a new one on top of it",
            )

    def _select_attention(self, wanted: Kernel) -> OptimizedAttention:
        network = self.network
        choice = OptimizedAttention.select(wanted, device=self.device, dtype=self.precision)
        if choice.kernel == "flash" and not getattr(network, "_supports_flash_attn", False):
            if wanted == "flash":
                raise ConfigError(
                    "flash attention can't be used",
                    place="attention",
                    got=f"{type(network).__name__} has no attention through flash-attn",
                    fix="use `attention: auto`",
                )
            choice = OptimizedAttention("sdpa", "the model has no attention through flash-attn")
        if choice.kernel != "eager" and not getattr(network, "_supports_sdpa", False):
            # Under a name of ours transformers would not notice, and what SDPA leaves out (sinks, caps) would be lost.
            choice = OptimizedAttention("eager", "the model has no attention through SDPA")
        return choice

    def _switch_attention(self, segments: bool) -> None:
        """Give the model attention that knows segments, or its plain one."""
        plain = "eager" if self.attention.kernel == "eager" else "sdpa"
        with contextlib.suppress(ValueError, ImportError):  # a model without replaceable attention keeps its own
            self.network.set_attn_implementation(self.attention.implementation if segments else plain)

    def _settle_attention(self) -> None:
        """Give the model the attention that its arrangement needs, and remember what that is called."""
        self._switch_attention(self.findings.arrangement == "packed")
        self._attention_name = self.network.config._attn_implementation

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
        return self.findings.backbone

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.findings.width

    @property
    def findings(self) -> Findings:
        """What was found by trying the model, once: how it may be forwarded, and what it gives.

        Raises:
            ModelError: its own hidden states can't be reproduced, or not in the layout that was asked for.
        """
        if self._findings is None:
            self._findings, self._tried = self._examine(), 0
            self._settle_attention()
        return self._findings

    def measured(self, measure: Callable[[Self], MeasuredT]) -> MeasuredT:
        """Return `measure(self)`, computed once for as long as options and `findings` stay the same; copies keep the result."""
        if self._measured is None or self._measured[0] is not self.findings:
            self._measured = (self.findings, {})
        results = self._measured[1]
        if measure not in results:
            results[measure] = measure(self)
        return cast(MeasuredT, results[measure])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """Most tokens in a sequence that the model has positions for, where it says."""
        return getattr(self._text_config, "max_position_embeddings", None)

    @property
    def has_length_classes(self) -> bool:
        """Whether some positions are encoded in a way that depends on the longest sequence of a forward pass."""
        return bool(self._lengths)

    @property
    def compiled(self) -> bool:
        return self._compiled

    @property
    def _text_config(self) -> Any:
        return self.network.config.get_text_config()

    def without_head(self, *, freeze: bool = True) -> SequenceModel:
        """Return the model's backbone as a model of its own, sharing its weights.

        The whole network is kept under an adapter, which knows its layers by their names in it, and where the backbone couldn't
        be loaded by itself; its head isn't used, and with `freeze` isn't trained either.
        """
        inner = without_head(self.network)
        whole = self.has_adapter or not loads_alone(inner)
        made = SequenceModel(self.model if whole else inner, self.tokenizer, source=self.source)
        made.loaded, made.base, made.resized, made.headless = self.loaded, self.base, self.resized, whole
        made.stored, made.adapter_stored = self.stored, self.adapter_stored
        made.save_precision = self.save_precision
        inside = {id(parameter) for parameter in inner.parameters()}
        for parameter in made.parameters():
            if freeze and id(parameter) not in inside:
                parameter.requires_grad_(False)
        return made

    # The forward pass

    def hidden_states(self, batch: Batch, *, drop_last: bool = False) -> HiddenStates:
        """Forward a batch with each prompt computed once; return its last hidden states.

        With `drop_last`, each response's last token is left out where the layout allows: it predicts nothing.
        """
        if not batch.num_responses:
            return HiddenStates(torch.zeros(0, self.width, device=batch.device), empty_layout(batch), batch)
        with self.own_precision():
            return self._forward_groups(batch, drop_last=drop_last)

    def own_precision(self) -> AbstractContextManager[Any]:
        """Return the context for this model's matrix products: its own precision, whatever the models around it run in."""
        kind = self.device.type
        around = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if not self._set_up or around == self.precision:
            return within_products(self.network)
        return torch.autocast(kind, dtype=self.precision, enabled=self.precision != torch.float32)

    def _forward_groups(self, batch: Batch, *, drop_last: bool) -> HiddenStates:
        groups = self._groups(batch)
        if batch.longest > self._tried and self._check_company(batch, groups):
            groups = self._groups(batch)
        if len(groups) == 1:
            return HiddenStates(*self._forward_together(batch, drop_last=drop_last), batch)
        parts = [self._forward_together(of_responses(batch, group), drop_last=drop_last) for group in groups]
        hidden, layouts = zip(*parts, strict=True)
        return HiddenStates(torch.cat(hidden), joined(layouts, groups), batch)

    def _check_company(self, batch: Batch, groups: list[Tensor]) -> bool:
        """Try sequences longer than any before, together and alone; forward them alone from now on where that differs.

        Returns whether it does. Only a new longest sequence is tried, so that it happens a few times in a run.
        """
        self._tried = batch.longest
        if self.findings.arrangement == "alone" or self._compiled or batch.device.type == "meta":
            return False
        lengths = (batch.prompt_lengths[batch.owner] + batch.response_lengths).tolist()
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        group = next(group for group in groups if longest in group).tolist()
        # The longest, the next shorter one, which is padded and long, and the shortest.
        shorter = max(
            (one for one in group if lengths[one] < lengths[longest]), key=lengths.__getitem__, default=longest
        )
        chosen = sorted({longest, shorter, min(group, key=lengths.__getitem__)})
        few = of_responses(batch, torch.tensor(chosen, device=batch.device))
        together = functools.partial(self._forward_together, drop_last=False)
        precision = self.precision if self.attention.kernel == "flash" else None
        odd = odd_company(self.network, self.findings.backbone, together, few, precision)
        self._settle_attention()
        if not odd:
            return False
        obstacles = {**self.findings.obstacles, self.findings.arrangement: f"sequences of {self._tried} tokens differ"}
        self._findings = dataclasses.replace(self.findings, arrangement="alone", obstacles=obstacles)
        self._settle_attention()
        self._report(self._findings)
        return True

    def _groups(self, batch: Batch) -> list[Tensor]:
        """Return which responses may share a forward pass: all, unless what the model computes depends on their company."""
        if self.findings.arrangement == "alone":
            return list(torch.arange(batch.num_responses, device=batch.device)[:, None])
        if not self._lengths:
            return [torch.arange(batch.num_responses, device=batch.device)]
        return self._lengths.groups(batch.prompt_lengths[batch.owner] + batch.response_lengths)

    def _forward_together(self, batch: Batch, *, drop_last: bool) -> tuple[Tensor, Layout]:
        if self._lengths:
            self._lengths.reset()
            drop_last = False  # the last token counts in the length that decides
        if self._packs_batch(batch):
            layout = packed_layout(batch, share_prompts=self.share_prompts, drop_last=drop_last)
        else:
            layout = padded_layout(batch)
        return self._forward(self.backbone, layout), layout

    def _forward(self, backbone: nn.Module, layout: Layout) -> Tensor:
        """Return hidden states (N, D), flattened, under a backbone."""
        inputs: dict[str, Any] = {"use_cache": False}
        if self._findings is not None and self.network.config._attn_implementation != self._attention_name:
            # Whoever shares the network has given it another attention, which may not see the segments.
            self._settle_attention()
        if layout.segments is not None:
            # A mask of four dimensions is taken as it is, so none is built over the whole row; segments say who sees whom.
            inputs["attention_mask"] = layout.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
            inputs |= {"position_ids": layout.position_ids, "segments": layout.segments}
        else:
            if layout.attention_mask is not None:
                inputs["attention_mask"] = layout.attention_mask
            inputs = accepted(backbone.forward, **inputs)
        with within_products(self.network):
            return hidden_of(backbone(input_ids=layout.input_ids, **inputs)).flatten(0, 1)

    def _packs_batch(self, batch: Batch) -> bool:
        if self.findings.arrangement != "packed" or self.layout == "padded":
            return False
        if (limit := self.findings.longest_row) is not None and batch.longest * batch.num_responses >= limit:
            return False
        # Segments know no window; a sequence that doesn't fill it is attended in the same way with and without.
        window = self.findings.window
        return window is None or batch.longest <= window

    def _examine(self) -> Findings:
        self._lengths = LengthClasses(self.network)
        try:
            findings = examine(
                self.network,
                self._forward,
                switch=self._switch_attention,
                packs=self.attention.kernel != "eager",
                precision=self.precision if self.attention.kernel == "flash" else None,
            )
        except Unexplained as error:
            raise ModelError(
                "the model's own hidden states can't be reproduced, so it can't be trained here",
                place=self.source,
                got=f"{type(self.network).__name__}: {error}",
                fix="report it with the model's configuration",
            ) from None
        except FAILURES as error:
            raise ModelError(
                "the model can't be run on plain token ids",
                place=self.source,
                got=f"{type(self.network).__name__}: {describe_error(error, lines=2)}",
                fix="use a causal language model over text",
            ) from error
        reason = findings.obstacles.get("packed")
        if reason is not None and self.layout == "packed":
            raise ModelError(
                "this model can't keep packed sequences apart",
                place="batching.layout",
                got=reason,
                fix="set `batching.layout: padded`",
            )
        if reason is not None:
            self.attention = OptimizedAttention("sdpa", "packed rows don't give this model's own hidden states")
        self._report(findings)
        return findings

    def _report(self, findings: Findings) -> None:
        log.info("attention: %s (%s)", self.attention.kernel, self.attention.reason)
        slower = {"padded": "rows are padded", "alone": "each sequence has a forward pass of its own, which is slow"}
        if findings.obstacles and self.layout != "padded":
            reasons = "; ".join(f"{name}: {reason}" for name, reason in findings.obstacles.items())
            log.warning("%s, since faster layouts don't suit this model (%s)", slower[findings.arrangement], reasons)
        if self._lengths:
            log.info("positions depend on length: sequences are forwarded with those of the same frequencies")

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Read the model without its adapter."""
        if not self.has_adapter:
            raise ModelError("the model has no adapter to switch off", place=self.source)
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    # In and out

    def add_stops(self, ids: Sequence[int]) -> None:
        """Let `generation_config.json`, which engines read, say that these tokens end an answer too."""
        settings = getattr(self.network, "generation_config", None)
        if settings is None:
            return
        own = settings.eos_token_id
        own = [self.tokenizer.eos_token_id] if own is None else [own] if isinstance(own, int) else own
        if missing := [token for token in ids if token not in own]:
            settings.eos_token_id = [*own, *missing]

    def save_pretrained(self, directory: str | Path, *, merged: bool = False) -> None:
        """Write a plain Hugging Face directory with the tokenizer.

        That is the whole model; or, of a model with an adapter, the adapter alone, which names its base. Where the base stands
        nowhere as it is (an adapter folded on loading, a GGUF file, a model made in Python), or where `merged`, the adapter is
        folded into what is written. The model itself is left as it is.
        """
        directory, model = Path(directory), self.model
        options: dict[str, Any] = {}
        if self.has_adapter:
            if merged or self.base is None:
                if not merged:
                    log.info("the adapter's base stands nowhere on disk as it is: saved whole, the adapter folded in")
                model = folded_copy(self.model, place=self.source)
                if self.headless and loads_alone(inner := without_head(model)):
                    model = inner
            else:
                if self.resized:
                    options["save_embedding_layers"] = True
                for adapter in self.model.peft_config.values():  # type: ignore[operator]
                    adapter.base_model_name_or_path = self.base
        with warnings.catch_warnings():
            # peft says that it saves embeddings along, and that it can't ask the hub for the base's configuration.
            warnings.simplefilter("ignore", UserWarning)
            self._write(model, directory, **options)
        self.tokenizer.save_pretrained(directory)

    def _write(self, model: Any, directory: Path, **options: Any) -> None:
        """Write a model, or an adapter, in the types that it came in unless told otherwise."""
        adapter = hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
        stored = self.adapter_stored if adapter else self.stored
        if self.save_precision != "auto":
            stored = Stored(DTYPES[self.save_precision])
        state = model.state_dict()
        kept = {name for name, p in model.named_parameters() if p.requires_grad} if adapter else state.keys()
        wrong = [
            n for n in kept & state.keys() if state[n].is_floating_point() and state[n].dtype != stored.dtype_of(n)
        ]
        if not wrong or (not adapter and getattr(model, "is_quantized", False)):
            model.save_pretrained(directory, **options)
            return
        cast = cast_for_saving({name: state[name] for name in state if name in kept}, stored)
        model.save_pretrained(directory, state_dict=state | cast, **options)
        if not adapter:
            note_dtype(directory / "config.json", stored.main)
        if any(state[name].itemsize > stored.dtype_of(name).itemsize for name in wrong):
            why = ", as it came: `save_precision: float32` keeps every bit" if self.save_precision == "auto" else ""
            log.info("saved in %s%s", str(stored.main).removeprefix("torch."), why)

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
