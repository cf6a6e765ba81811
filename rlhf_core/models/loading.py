"""Causal language models and tokenizers from a directory, a GGUF file, an adapter or the hub; and what may be wrong with them.

Weights come from safetensors (or GGUF) only, never from pickles, and a repository's own code runs only when asked for.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, ModelError, RLHFError, describe_error
from rlhf_core.infra.model_files import (
    HEADS,
    adapter_chain,
    check_files,
    is_adapter,
    kind_of,
    locate,
    no_such_model,
)
from rlhf_core.models.adapters import (
    WEIGHTS,
    AdapterUse,
    describe_adapter,
    fit_vocabulary,
    fold,
    is_sequence_classifier,
    labels_of,
    local_adapter,
    put_on,
)
from rlhf_core.models.lora import Targets, quantization, wanted_targets
from rlhf_core.models.precision import Stored, has_narrow_constants

log = logging.getLogger(__name__)

Kind = Literal["causal", "backbone", "classifier"]
_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "backbone": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
}


@dataclass
class Loaded:
    """A model as it was loaded, with what has to be known of it to save it."""

    model: nn.Module
    """A transformers model, or a peft model around one."""
    tokenizer: Any
    stored: Stored
    """The types of the checkpoint's tensors."""
    base: str | None = None
    """Where the weights under an adapter stand as a plain checkpoint; None where they stand nowhere as they are."""
    resized: bool = False
    """Whether the base's embeddings were resized, so that an adapter must bring them along."""
    adapter_stored: Stored | None = None
    """The types of an adapter's tensors."""


def load_model(
    source: str | Path,
    *,
    hold: torch.dtype = torch.float32,
    frozen: bool = False,
    lora: LoraConfig | None = None,
    trust_remote_code: bool = False,
    kind: Kind = "causal",
    headless: bool = False,
    adapter: AdapterUse = "continue",
) -> Loaded:
    """Load a model with its tokenizer; an adapter directory is loaded on its base.

    Args:
        hold: the type that frozen weights will be held in (`narrow_frozen`): a checkpoint of 16 bits isn't widened first.
        frozen: whether the model is only read.
        adapter: what is done with an adapter: it is left on its base, where it alone is trained, or folded into it, where all
            weights are. Of adapters on adapters the inner ones are folded in any case.
        kind: a causal language model, the `backbone` without any head, or one that scores sequences (`classifier`).
        headless: whether the output layer isn't used, and may be missing.

    Raises:
        ModelError: it doesn't exist, is damaged or incomplete, has only pickled weights, needs its own code, holds NaN, or
            model and tokenizer don't fit.
    """
    import transformers
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    source = str(source)
    where, options = locate(source)
    base, adapters = adapter_chain(where, local_adapter)
    if adapters:
        base, options = _locate_base(base, adapters[0])
    options |= {"trust_remote_code": trust_remote_code}
    transformers_logging.disable_progress_bar()
    # Each of a dozen attempts to reach the hub would be a line; the last one's reason is in our error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        tokenizer = _load_tokenizer(AutoTokenizer, [*adapters[::-1], base], options)
        check_files(base)
        stored = _stored(base, options)
        folds = len(adapters) > 1 or bool(adapters and adapter == "fold")
        narrow = hold != torch.float32 and not folds and (frozen or lora is not None or bool(adapters))
        labels = labels_of(adapters[-1]) if adapters and kind == "classifier" else None
        load = functools.partial(
            getattr(transformers, _CLASSES[kind]).from_pretrained,
            base,
            output_loading_info=True,
            **({} if "gguf_file" in options else {"use_safetensors": True}),
            **({"quantization_config": settings} if (settings := quantization(lora)) else {}),
            **({"num_labels": labels} if labels else {}),
            **options,
        )
        model, info = load(dtype=stored.loading if narrow else torch.float32)
        if has_narrow_constants(model):
            # Gemma's scale of embeddings, for one, would be rounded.
            del model
            model, info = load(dtype=torch.float32)
        missing = {name for name in info["missing_keys"] if not (labels and name.startswith("score."))}
        check_weights(model, missing, source, base=base, headless=headless)
        if "gguf_file" in options:
            _forget_gguf(model)
        loaded = Loaded(model, tokenizer, stored, None if "gguf_file" in options else _absolute(base))
        if adapters:
            _with_adapters(loaded, adapters, base, use=adapter, lora=lora, classifier=kind == "classifier")
    except RLHFError:
        raise
    except Exception as error:
        raise _load_error(source, error) from error
    check_finite(loaded.model, source)
    check_tokenizer(loaded.model, tokenizer, source)
    return loaded


def check_weights(model: nn.Module, missing: Iterable[str], source: str, *, base: str, headless: bool = False) -> None:
    """Raise where the checkpoint lacks weights of the model, which would be made up at random."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    free = {
        f"{name}.{kind}" for name, module in model.named_modules() if module is output for kind in ("weight", "bias")
    }
    absent = sorted(name for name in missing if not (headless and name in free))
    if not absent:
        return
    if head := next((name for name in HEADS if (Path(base) / f"{name}.json").is_file()), None):
        fix = "name the model that it was made from"
        raise ModelError(f"is a {kind_of(head)}, not a language model", place=source, fix=fix)
    if absent[0].startswith(("score", "classifier")):
        raise ModelError(
            "the checkpoint has no reward head, so its scores would be random",
            place=source,
            got=f"no `{absent[0]}`",
            fix="use a reward model's checkpoint, or train one: `rlhf train reward_model`",
        )
    raise ModelError(
        "the checkpoint lacks weights, which would be random",
        place=source,
        got=f"no `{absent[0]}`" + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""),
        fix="copy the whole checkpoint again",
    )


def architecture(source: str | Path, *, trust_remote_code: bool = False) -> str:
    """Return the class that a checkpoint says it holds, such as `LlamaForCausalLM`; empty where it doesn't say."""
    from transformers import AutoConfig

    where, options = locate(str(source))
    where = local_adapter(where)
    if is_adapter(where):
        return "ForSequenceClassification" if is_sequence_classifier(where) else ""
    if options:
        return ""
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _load_error(str(source), error) from error
    return str((getattr(config, "architectures", None) or [""])[0])


def kind_of_backbone(source: str | Path, *, trust_remote_code: bool = False) -> Kind:
    """Return how the backbone is loaded that a model with a head of its own was saved with: by itself, or inside a whole model.

    It was saved whole where it can't be loaded by itself. An adapter knows its layers by their names in a whole model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where, _ = locate(str(source))
    whole = is_adapter(where) or architecture(source, trust_remote_code=trust_remote_code) in (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
    return "causal" if whole else "backbone"


def check_finite(model: nn.Module, source: str) -> None:
    """Raise where a weight is NaN or infinite, naming the tensor."""
    for name, parameter in model.named_parameters():
        # One reduction a tensor; a sum that overflows is looked at again, value by value.
        if (
            parameter.is_floating_point()
            and not math.isfinite(float(parameter.detach().sum(dtype=torch.float32)))
            and not bool(parameter.detach().isfinite().all())
        ):
            bad = int((~parameter.detach().isfinite()).sum())
            raise ModelError(
                f"weight `{name}` is not finite",
                place=source,
                got=f"{bad} of {parameter.numel()} values NaN or infinite",
                fix="use another checkpoint of this model",
            )


def check_tokenizer(model: nn.Module, tokenizer: Any, source: str) -> None:
    """Raise where the tokenizer knows ids that the model has no embedding for; give it a padding token if it has none."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    rows = network.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ModelError(
            "the tokenizer is longer than the model's embeddings",
            place=source,
            got=f"{len(tokenizer)} tokens and {rows} embeddings",
            fix="use the model's own tokenizer, or resize the embeddings and save the model",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token", place=source, fix="set `eos_token` in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # Padding is told by lengths alone, so sharing the end token's id is harmless here.
        tokenizer.pad_token = tokenizer.eos_token


def _with_adapters(
    loaded: Loaded, adapters: list[str], base: str, *, use: AdapterUse, lora: LoraConfig | None, classifier: bool
) -> None:
    """Put adapters on a base, the innermost first, and fold all but the one that is to be trained.

    Raises:
        ConfigError: the one that is to be trained is on other modules than options for one say.
    """
    for depth, adapter in enumerate(adapters):
        own_tokenizer = depth == len(adapters) - 1
        resized = fit_vocabulary(loaded.model, adapter, len(loaded.tokenizer) if own_tokenizer else 0)
        loaded.resized |= resized
        trained = use == "continue" and depth == len(adapters) - 1
        wanted = wanted_targets(loaded.model, lora) if trained and lora is not None else None
        if not classifier and is_sequence_classifier(adapter):
            log.warning(
                "%s was trained on a model that scores sequences: its layers' updates are taken, and its head isn't",
                adapter,
            )
        adapted = put_on(loaded.model, adapter, base, classifier=classifier)
        about = describe_adapter(adapted)
        if wanted is not None and (difference := Targets.of(adapted).difference(wanted)) is not None:
            raise ConfigError(
                "the adapter has other targets than were set",
                place="lora",
                got=difference,
                fix="leave `lora` out to go on training the adapter, or set `adapter: fold` to train a new one on top of it",
            )
        if trained:
            loaded.model, loaded.adapter_stored = adapted, Stored.on_disk(Path(adapter), WEIGHTS)
            log.info("adapter %s (%s on %s): it is trained on, and its base stays as it is", adapter, about, base)
            return
        loaded.model, loaded.base, loaded.resized = fold(adapted, place=adapter), None, False
        for parameter in loaded.model.parameters():
            # peft froze the base; of quantised weights, which are whole numbers, none can learn.
            parameter.requires_grad_(parameter.is_floating_point())
        log.info("adapter %s (%s): folded into the weights of %s", adapter, about, base)
        base = adapter


def _stored(base: str, options: dict[str, Any]) -> Stored:
    """Return the types of a checkpoint's tensors: what its files say, or of one on the hub, its configuration."""
    from transformers import AutoConfig

    if "gguf_file" in options:
        return Stored()
    if Path(base).is_dir():
        return Stored.on_disk(Path(base)) or Stored()
    dtype = getattr(AutoConfig.from_pretrained(base, **options), "dtype", None)
    return Stored(dtype) if isinstance(dtype, torch.dtype) else Stored()


def _locate_base(base: str, adapter: str) -> tuple[str, dict[str, Any]]:
    try:
        return locate(base)
    except ModelError as error:
        raise ModelError(
            "the base that this adapter names isn't there",
            place=adapter,
            got=f"{base}: {error.problem}",
            fix="set `base_model_name_or_path` in adapter_config.json to where it lies now",
        ) from error


def _absolute(where: str) -> str:
    return str(Path(where).resolve()) if Path(where).is_dir() else where


def _load_tokenizer(auto: Any, places: list[str], options: dict[str, Any]) -> Any:
    """Take the tokenizer beside an adapter, else the base's."""
    last: Exception | None = None
    for place in dict.fromkeys(places):
        try:
            return auto.from_pretrained(place, **options)
        except (OSError, ValueError) as error:
            last = error
    assert last is not None
    raise last


def _forget_gguf(model: Any) -> None:
    """GGUF weights are plain float tensors once loaded; transformers still refuses to save what it calls quantised."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, False if name == "is_quantized" else None)


def _load_error(source: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            "the model needs code that its repository ships",
            place=source,
            fix="set `trust_remote_code: true` where you trust that code",
        )
    if not Path(source).exists():
        return no_such_model(source, error)
    return ModelError("can't be loaded", place=source, got=describe_error(error, lines=2))
