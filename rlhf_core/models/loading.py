"""Transformers models and tokenizers from a directory, a GGUF file, an adapter or the hub, and the checks that they must pass.

Weights come from safetensors (or GGUF) only, never from pickles, and a repository's own code runs only when asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, ModelError, RLHFError
from rlhf_core.infra.model_files import (
    ADAPTER_WEIGHTS,
    HEADS,
    adapter_chain,
    check_files,
    check_whole,
    is_adapter,
    kind_of,
    locate,
    lost_base,
)
from rlhf_core.models.load_errors import load_error, other_architecture, tokenizer_error, warn_of_layers
from rlhf_core.models.lora import Targets, wanted_targets
from rlhf_core.models.new_tokens import add_to_tokenizer
from rlhf_core.models.precision import has_narrow_constants
from rlhf_core.models.saved_adapters import (
    AdapterUse,
    describe_adapter,
    fit_vocabulary,
    fold_adapter,
    is_sequence_classifier,
    labels_of,
    local_adapter,
    put_on,
)
from rlhf_core.models.saved_dtypes import SavedDtypes

log = logging.getLogger(__name__)

ModelClass = Literal["causal", "backbone", "classifier"]
"""Which of transformers' classes a checkpoint is loaded with: with its language model head, without a head, or with scores."""
_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "backbone": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
}


@dataclass
class Loaded:
    """A model just loaded, with what must be known about its checkpoint to save it."""

    model: nn.Module
    """A transformers model, or a peft model around one."""
    tokenizer: Any
    dtypes: SavedDtypes
    """Dtypes of the checkpoint's tensors."""
    base_path: str | None = None
    """Path or hub name of the plain checkpoint with the weights under the adapter; None where no such checkpoint exists."""
    embeddings_resized: bool = False
    """Whether the base's embeddings were resized, so that an adapter must be saved with them."""
    adapter_dtypes: SavedDtypes | None = None
    """Dtypes of the adapter's tensors."""


def load_model(
    source: str | Path,
    *,
    frozen_dtype: torch.dtype = torch.float32,
    frozen: bool = False,
    lora: LoraConfig | None = None,
    trust_remote_code: bool = False,
    kind: ModelClass = "causal",
    headless: bool = False,
    adapter: AdapterUse = "continue",
) -> Loaded:
    """Load a model with its tokenizer; an adapter's directory is loaded on its base.

    Args:
        frozen_dtype: the dtype that frozen weights will be held in (`narrow_frozen`): frozen 16-bit weights stay in 16 bits.
        frozen: whether the model is only read.
        lora: options of a new adapter, of which the quantisation of the base counts here, and targets are compared with those
            of the adapter that is loaded.
        kind: the class of transformers to load with.
        headless: whether the output layer isn't used, and may be missing.
        adapter: what happens to an adapter: `continue` leaves it on its base, where it alone is trained; `fold` puts it into the
            base's weights, all of which are trained. Of adapters on adapters the inner ones are always folded.

    Raises:
        ModelError: the model doesn't exist, is damaged or incomplete, has only pickled weights, needs its own code, holds NaN,
            or has another vocabulary than its tokenizer.
    """
    _silence_downloads()
    source = str(source)
    files = _ModelFiles.find(source, trust_remote_code=trust_remote_code)
    folds = len(files.adapters) > 1 or bool(files.adapters and adapter == "fold")
    keeps_narrow = frozen_dtype != torch.float32 and not folds and (frozen or lora is not None or bool(files.adapters))
    with _load_errors(source):
        files.check()
        tokenizer, dtypes = files.tokenizer(), files.dtypes()
        model, missing = _load_base(
            files, kind=kind, dtype=dtypes.lossless if keeps_narrow else torch.float32, quantisation=quantisation(lora)
        )
        check_weights(model, missing, source, base=files.base, headless=headless)
        if files.is_gguf:
            tokenizer = _of_file(tokenizer, model)
        loaded = Loaded(model, tokenizer, dtypes, None if files.is_gguf else _absolute(files.base))
        if files.adapters:
            _put_adapters(loaded, files, use=adapter, lora=lora, classifier=kind == "classifier")
    check_finite(loaded.model, source)
    check_tokenizer(loaded.model, tokenizer, source)
    return loaded


def _silence_downloads() -> None:
    """Show no progress bars of transformers, and no line for each of a dozen attempts to reach the hub: our error says why."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@dataclass(frozen=True)
class _ModelFiles:
    """Where the files of a model are: those of a plain checkpoint, and those of the adapters on it."""

    base: str
    """Directory or hub name of the plain checkpoint."""
    adapters: list[str]
    """Directories of the adapters, the innermost first."""
    options: dict[str, Any]
    """Further arguments of `from_pretrained` for the checkpoint, such as `gguf_file`."""

    @classmethod
    def find(cls, source: str, *, trust_remote_code: bool = False) -> _ModelFiles:
        """Return where the files of the model are that a user names.

        Raises:
            ModelError: there is no such model; of a base, with the adapter's name.
        """
        where, options = locate(source)
        base, adapters = adapter_chain(where, local_adapter)
        if adapters:
            try:
                base, options = locate(base)
            except ModelError as error:
                fix = "set `base_model_name_or_path` in adapter_config.json to where the base is now"
                raise lost_base(adapters[0], base, error, fix=fix) from error
        return cls(base, adapters, options | {"trust_remote_code": trust_remote_code})

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.options

    def check(self) -> None:
        """Raise `ModelError` where a file is missing or damaged, or weights are pickled."""
        for adapter in self.adapters:
            check_whole(adapter)
        if not self.is_gguf:
            check_files(self.base)

    def tokenizer(self) -> Any:
        """Return the tokenizer: that of the outermost adapter that has one, else the base's."""
        from transformers import AutoTokenizer

        last: Exception | None = None
        places = list(dict.fromkeys([*self.adapters[::-1], self.base]))
        for place in places:
            try:
                return AutoTokenizer.from_pretrained(place, **self.options)
            except (OSError, ValueError) as error:
                last = error
        assert last is not None
        raise tokenizer_error(places, last) or last

    def dtypes(self) -> SavedDtypes:
        """Return the dtypes of the base's tensors, from its files, or on the hub from its configuration; float32 for GGUF."""
        from transformers import AutoConfig

        if self.is_gguf:
            return SavedDtypes()
        if Path(self.base).is_dir():
            return SavedDtypes.on_disk(Path(self.base)) or SavedDtypes()
        dtype = getattr(AutoConfig.from_pretrained(self.base, **self.options), "dtype", None)
        return SavedDtypes(dtype) if isinstance(dtype, torch.dtype) else SavedDtypes()


def _load_base(
    files: _ModelFiles, *, kind: ModelClass, dtype: torch.dtype, quantisation: Any
) -> tuple[nn.Module, set[str]]:
    """Load a transformers model without its adapters.

    Args:
        quantisation: transformers' quantisation config, or None.

    Returns:
        The model, and the names of its tensors that the checkpoint lacks and no adapter brings.
    """
    import transformers

    # A classification head that an adapter brings, else the checkpoint's.
    labels = labels_of(files.adapters[-1]) if files.adapters and kind == "classifier" else None
    load = functools.partial(
        getattr(transformers, _CLASSES[kind]).from_pretrained,
        files.base,
        output_loading_info=True,
        **({} if files.is_gguf else {"use_safetensors": True}),
        **({"quantization_config": quantisation} if quantisation else {}),
        **({"num_labels": labels} if labels else {}),
        **files.options,
    )
    model, info = load(dtype=dtype)
    if has_narrow_constants(model):
        # Gemma's scale of embeddings, for one, would be rounded.
        del model
        model, info = load(dtype=torch.float32)
    if files.is_gguf:
        _forget_gguf(model)
    warn_of_layers(files.base, model.config, info["unexpected_keys"])
    return model, {name for name in info["missing_keys"] if not (labels and name.startswith("score."))}


def quantisation(lora: LoraConfig | None) -> Any | None:
    """Return transformers' quantisation config for the frozen base under an adapter (QLoRA); None where it isn't quantised.

    Raises:
        ConfigError: bitsandbytes isn't installed.
    """
    if lora is None or lora.quantize == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`lora.quantize: {lora.quantize}` needs the package bitsandbytes",
            place="lora.quantize",
            fix='pip install "rlhf-core[qlora]", or set `lora.quantize: none`',
        )
    from transformers import BitsAndBytesConfig

    if lora.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _put_adapters(
    loaded: Loaded, files: _ModelFiles, *, use: AdapterUse, lora: LoraConfig | None, classifier: bool
) -> None:
    """Put adapters on a loaded base, the innermost first, in place; fold all but one that is to be trained.

    Args:
        files: where the base was loaded from, and the adapters are.
        use: what happens to the outermost.
        lora: options whose targets must be those of the adapter that is to be trained; None wants nothing.
        classifier: whether the model scores sequences.

    Raises:
        ConfigError: the adapter that is to be trained has other targets.
    """
    base = files.base
    for adapter in files.adapters:
        outermost = adapter == files.adapters[-1]
        loaded.embeddings_resized |= fit_vocabulary(loaded.model, adapter, len(loaded.tokenizer) if outermost else 0)
        trained = use == "continue" and outermost
        wanted = wanted_targets(loaded.model, lora) if trained and lora is not None else None
        if not classifier and is_sequence_classifier(adapter):
            log.warning(
                "%s is an adapter of a sequence classifier: its layer updates are used, its head is ignored",
                adapter,
            )
        adapted = put_on(loaded.model, adapter, base, classifier=classifier)
        about = describe_adapter(adapted)
        if wanted is not None and (difference := Targets.of(adapted).difference(wanted)) is not None:
            raise ConfigError(
                "the adapter isn't on the modules that the options name",
                place="lora",
                got=difference,
                fix="leave `lora` out to continue training the adapter, or set `adapter: fold` to train a new one on top of it",
            )
        if trained:
            loaded.model, loaded.adapter_dtypes = adapted, SavedDtypes.on_disk(Path(adapter), ADAPTER_WEIGHTS)
            log.info("adapter %s (%s on %s); its base stays as it is", adapter, about, base)
            return
        loaded.model, loaded.base_path, loaded.embeddings_resized = fold_adapter(adapted, place=adapter), None, False
        for parameter in loaded.model.parameters():
            # peft froze the base; quantised weights are integers and can't be trained.
            parameter.requires_grad_(parameter.is_floating_point())
        log.info("adapter %s (%s): folded into the weights of %s", adapter, about, base)
        base = adapter


# Checks


def check_there(source: str, role: str = "model") -> None:
    """Check that a model is there, its files whole or the hub ready to deliver it, before anything is done. No weight is read.

    Args:
        role: the option that names it, for messages where it isn't `model`.

    Raises:
        ModelError: it isn't.
    """
    try:
        where, options = locate(source)
        base, adapters = adapter_chain(where, local_adapter)
        for one in adapters:
            check_whole(one)
        if not options:
            check_files(base)
    except ModelError as error:
        if role == "model":
            raise
        raise ModelError(error.problem, place=f"{role}: {error.place}", got=error.got, fix=error.fix) from (
            error.__cause__
        )


def check_weights(model: nn.Module, missing: Iterable[str], source: str, *, base: str, headless: bool = False) -> None:
    """Raise ModelError where the checkpoint lacks tensors of the model, which would have random values.

    Args:
        missing: names of the tensors that it lacks.
        source: what the user named. base: the directory or hub name that was loaded.
        headless: whether the output layer may be missing.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    free = {
        f"{name}.{kind}" for name, module in model.named_modules() if module is output for kind in ("weight", "bias")
    }
    absent = sorted(name for name in missing if not (headless and name in free))
    if not absent:
        return
    if head := next((name for name in HEADS if (Path(base) / f"{name}.json").is_file()), None):
        fix = "name the model that it was made from"
        raise ModelError(f"the checkpoint is a {kind_of(head)}, not a language model", place=source, fix=fix)
    if absent[0].startswith(("score", "classifier")):
        raise ModelError(
            "the checkpoint has no reward head, so its scores would be random",
            place=source,
            got=f"no `{absent[0]}`",
            fix="use a reward model's checkpoint, or train one: `rlhf train reward_model`",
        )
    if (kind := other_architecture(model)) is not None:
        raise ModelError(
            f"the checkpoint is a {kind}, and no language model",
            place=source,
            got=f"no `{absent[0]}`",
            fix="name the language model that it was made from",
        )
    raise ModelError(
        "the checkpoint lacks weights, which would be random",
        place=source,
        got=f"no `{absent[0]}`" + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""),
        fix="copy the whole checkpoint again",
    )


def check_finite(model: nn.Module, source: str) -> None:
    """Raise ModelError where a weight is NaN or infinite, naming the tensor."""
    for name, parameter in model.named_parameters():
        # One reduction per tensor; where the sum overflows, each value is looked at.
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
    """Raise ModelError where a tokenizer has ids without an embedding, or no end token; set a padding token where it has none."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    rows = network.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ModelError(
            "the tokenizer has more tokens than the model has embeddings",
            place=source,
            got=f"{len(tokenizer)} tokens and {rows} embeddings",
            fix="use the model's own tokenizer, or resize the embeddings and save the model",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token", place=source, fix="set `eos_token` in tokenizer_config.json"
        )
    _set_padding(tokenizer)


def _set_padding(tokenizer: Any) -> None:
    """Give a tokenizer a padding token where it has none."""
    if tokenizer.pad_token_id is None:
        # Masks come from lengths alone, so sharing the end token's id is harmless here.
        tokenizer.pad_token = tokenizer.eos_token


# What a checkpoint is


class ModelOutline(NamedTuple):
    """What encoding rows needs of a model, read without its weights."""

    tokenizer: Any
    max_positions: int | None
    """Most tokens in a sequence; None where its configuration names no limit."""
    config: Any
    """Its configuration, a transformers `PretrainedConfig`: of an adapter that of its base."""


def read_outline(
    source: str | Path, *, trust_remote_code: bool = False, new_tokens: Sequence[str] = ()
) -> ModelOutline:
    """Return a model's tokenizer and configuration, from the files that `load_model` takes them from; no weights are read.

    Args:
        new_tokens: tokens that are added to the tokenizer, as a run that trains them does.

    Raises:
        ModelError: there is no such model, or either can't be read.
    """
    from transformers import AutoConfig

    source = str(source)
    files = _ModelFiles.find(source, trust_remote_code=trust_remote_code)
    with _load_errors(source):
        tokenizer = files.tokenizer()
        config = AutoConfig.from_pretrained(files.base, **files.options)
    if tokenizer.eos_token_id is not None:
        _set_padding(tokenizer)
    if new_tokens:
        add_to_tokenizer(tokenizer, new_tokens)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ModelOutline(tokenizer, positions if isinstance(positions, int) else None, config)


def architecture(source: str | Path, *, trust_remote_code: bool = False) -> str:
    """Return the class that a checkpoint's configuration names, such as `LlamaForCausalLM`; empty where it names none.

    Raises:
        ModelError: the configuration can't be read.
    """
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
        raise load_error(str(source), error) from error
    return str((getattr(config, "architectures", None) or [""])[0])


def kind_of_backbone(source: str | Path, *, trust_remote_code: bool = False) -> ModelClass:
    """Return how to load the backbone of a model that was saved with head files: by itself, or inside a causal model.

    It was saved inside one where transformers can't load it by itself. An adapter knows its layers by their names in one.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where, _ = locate(str(source))
    whole = is_adapter(where) or architecture(source, trust_remote_code=trust_remote_code) in (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
    return "causal" if whole else "backbone"


def saved_dtype(source: str | Path) -> torch.dtype:
    """Return the dtype that most of a model's weights were saved in, that of an adapter's base; float32 where it isn't known.

    Raises:
        ModelError: there is no such model.
    """
    files = _ModelFiles.find(str(source))
    try:
        return files.dtypes().main
    except (OSError, ValueError):  # loading it says what is wrong
        return torch.float32


def _absolute(where: str) -> str:
    return str(Path(where).resolve()) if Path(where).is_dir() else where


def _of_file(tokenizer: Any, model: Any) -> Any:
    """Return the tokenizer of a GGUF file without tokens behind the model's embeddings, which the file doesn't hold.

    transformers adds GPT-2's `<|endoftext|>` to every byte-level vocabulary that lacks it, as Llama 3's does.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    rows = model.get_input_embeddings().weight.shape[0]
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    surplus = {token["content"] for token in spec["added_tokens"] if token["id"] >= rows}
    if not surplus or len(tokenizer) - len(surplus) > rows:
        return tokenizer
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in surplus]
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if token not in surplus}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _forget_gguf(model: Any) -> None:
    """Mark a model loaded from GGUF as what it is, plain float tensors: transformers refuses to save what it calls quantised."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, False if name == "is_quantized" else None)


@contextlib.contextmanager
def _load_errors(source: str) -> Iterator[None]:
    """Raise whatever transformers raises inside as a `ModelError` of this model."""
    try:
        yield
    except RLHFError:
        raise
    except Exception as error:
        raise load_error(source, error) from error
