"""Adapters loaded from a directory or the hub: put on their base as peft does, or folded into its weights.

Both give the model that the adapter was trained as; where folding would give another one, it is refused.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_core.infra.errors import ModelError, first_line
from rlhf_core.infra.model_files import adapter_weights, hub_files, is_adapter
from rlhf_core.infra.safetensors_file import read_header

log = logging.getLogger(__name__)

AdapterUse = Literal["continue", "fold"]
FOLD_TOLERANCE = 1e-4
"""Most relative difference of outputs that folding may make in float32; rounding makes 1e-6 to 1e-5."""
_PEFT_PREFIX = "base_model.model."
"""What peft puts before the names of the base's modules."""
_PROBE_TOKENS = 64
"""Tokens on which a model is compared before and after folding."""


def local_adapter(where: str) -> str:
    """Return the local directory of an adapter given by its hub name, fetched where need be; any other place as it is."""
    if Path(where).expanduser().exists() or (found := hub_files(where, ("adapter_config.json",))[0]) is None:
        return where
    import huggingface_hub

    directory = found.parent
    with contextlib.suppress(Exception):  # offline, the cache must do
        if not any(name.startswith(("model", "pytorch_model")) for name in huggingface_hub.list_repo_files(where)):
            patterns = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*"]
            directory = Path(huggingface_hub.snapshot_download(where, allow_patterns=patterns))
    return str(directory) if is_adapter(str(directory)) and not list(directory.glob("model*")) else where


def put_on(model: nn.Module, adapter: str, base: str, *, classifier: bool = False) -> nn.Module:
    """Put a saved adapter on its base; return the peft model, in which the adapter's weights are trained, in float32.

    Args:
        model: the base, its embeddings already of the adapter's size (`fit_vocabulary`).
        adapter: the adapter's directory.
        base: where the base came from, for messages.
        classifier: whether the model scores sequences; of an adapter trained on such a model, another model gets the layers
            without the head.

    Raises:
        ModelError: the adapter doesn't fit, is pickled, or is of a kind that isn't part of the network's layers.
    """
    import peft

    adapter_weights(Path(adapter), adapter)
    try:
        held = peft.PeftConfig.from_pretrained(adapter)
        _check_kind(held, adapter)
        if held.task_type == "SEQ_CLS" and not classifier:
            _drop_classifier(held, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = peft.PeftModel.from_pretrained(model, adapter, config=held, is_trainable=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _misfit(adapter, base, first_line(error)) from error
    # peft only warns about adapter weights that are missing in the file, and would leave them at their random start.
    if lost := next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), None):
        raise _misfit(adapter, base, lost[:300])
    narrow = [p for p in adapted.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        # They had taken the base's dtype, and the values read into them were rounded to it.
        adapted.load_adapter(adapter, adapted.active_adapter, is_trainable=True)
    return adapted


def fit_vocabulary(model: Any, adapter: str, tokens: int) -> bool:
    """Resize a base's embeddings to those that an adapter was saved with, in place; return whether they were resized.

    Args:
        model: the base.
        adapter: the adapter's directory.
        tokens: tokens that the adapter's own tokenizer has; 0 where it has no tokenizer.

    Raises:
        ModelError: the adapter has more tokens than its base, and doesn't hold their embeddings.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    shapes = {name: tuple(entry.shape) for name, entry in read_header(adapter_weights(Path(adapter), adapter)).items()}
    parts = list(_vocabulary_parts(model))
    saved = {part: [n for name, shape in shapes.items() if (n := _token_rows(name, shape, part))] for part, _ in parts}
    wanted = max((n for found in saved.values() for n, _ in found), default=rows)
    if wanted == rows and tokens <= rows:
        return False
    whole = all(any(n == wanted and is_whole for n, is_whole in saved[part]) for part, own in parts if own)
    if max(wanted, tokens) > rows and not (whole and wanted >= tokens):
        raise ModelError(
            "the adapter was trained with more tokens than its base has, and doesn't hold the new tokens' embeddings",
            place=adapter,
            got=f"{max(wanted, tokens)} tokens, {rows} embeddings in the base",
            fix="save it again with peft's `save_embedding_layers=True`, or save the base with its embeddings resized and set"
            " `base_model_name_or_path` in adapter_config.json to that",
        )
    if wanted == rows or not whole:
        return False
    model.resize_token_embeddings(wanted, mean_resizing=False)
    log.info("the base's %d embeddings are resized to %d, which the adapter's file holds", rows, wanted)
    return True


def fold_adapter(adapted: Any, *, place: str) -> nn.Module:
    """Return the network with its adapter added into its own weights, float32; the peft model can't be used any more.

    Tied embeddings are untied first where the adapter changes only one of the two.

    Args:
        adapted: a peft model.
        place: the adapter's name, for the error.

    Raises:
        ModelError: the network's outputs would differ from those with the adapter on it.
    """
    adapted = adapted.float()
    network = adapted.get_base_model()
    ids = _probe_ids(adapted)
    before = _probe(network, ids)
    tied = [config for config in _configs(network) if getattr(config, "tie_word_embeddings", False)]
    untied = _untie_adapted(network)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            merged = adapted.merge_and_unload()
        after = _probe(merged, ids)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise _not_folded(place, first_line(error)) from error
    difference = float((after - before).norm() / before.norm())
    if not difference <= FOLD_TOLERANCE:
        raise _not_folded(
            place, f"outputs that differ by {difference:.1e}, more than the {FOLD_TOLERANCE:g} of rounding"
        )
    if untied:
        _tie_if_equal(merged, tied)
    return merged


def folded_copy(adapted: Any, *, place: str) -> nn.Module:
    """Return `fold_adapter` of a copy; the peft model itself is left as it is."""
    # Layers whose adapters peft ties hold the tied tensors among their arguments, and such tensors can't be copied.
    memo: dict[int, Any] = {}
    for layer in adapted.modules():
        for tensor in (getattr(layer, "kwargs", None) or {}).get("tied_adapter", {}).values():
            memo[id(tensor)] = tensor.detach()
    return fold_adapter(copy.deepcopy(adapted, memo), place=place)


def describe_adapter(adapted: Any) -> str:
    """Return an adapter's kind in words, for a line of the log: `LoRA of rank 8`."""
    held = next(iter(adapted.peft_config.values()))
    kind = str(getattr(held.peft_type, "value", held.peft_type))
    return f"LoRA of rank {held.r}" if kind == "LORA" else kind


def _check_kind(held: Any, adapter: str) -> None:
    """Raise ModelError for an adapter that works only in peft's own forward pass: the backbone is called directly.

    Args:
        held: peft's config of the adapter. adapter: its directory.
    """
    if held.is_prompt_learning or getattr(held, "alora_invocation_tokens", None) or held.peft_type == "XLORA":
        raise ModelError(
            "this kind of adapter isn't supported: it changes the model's inputs or forward pass, not its layers",
            place=adapter,
            got="activated LoRA" if held.peft_type == "LORA" else str(getattr(held.peft_type, "value", held.peft_type)),
            fix="use a LoRA adapter, or merge this one into its base first",
        )


def _drop_classifier(held: Any, model: nn.Module) -> None:
    """Change peft's config of a sequence classifier's adapter, in place, to that of an adapter on a model without that head."""
    held.task_type = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION"
    if getattr(held, "modules_to_save", None):
        held.modules_to_save = [name for name in held.modules_to_save if name not in ("classifier", "score")] or None


def _misfit(adapter: str, base: str, got: str) -> ModelError:
    """Return the error of an adapter that peft can't put on its base; `got` is peft's reason."""
    return ModelError(
        "the adapter doesn't fit its base",
        place=adapter,
        got=f"base {base}: {got}",
        fix="set `base_model_name_or_path` in adapter_config.json to the model that it was trained on",
    )


def _not_folded(place: str, got: str) -> ModelError:
    """Return the error of an adapter whose folding fails or changes the outputs; `got` is the reason."""
    return ModelError(
        "the adapter can't be folded into its base without changing the model's outputs",
        place=place,
        got=got,
        fix="set `adapter: continue`, which keeps the adapter separate",
    )


# An adapter's tensors with one row per token


def _vocabulary_parts(model: Any) -> Iterator[tuple[str, bool]]:
    """Yield (full name, whether its weights are its own) of the embeddings, and of the output layer where there is one."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    yield names[id(first)], True
    if last is not None and id(last) in names:
        yield names[id(last)], last.weight is not first.weight


def _token_rows(name: str, shape: tuple[int, ...], part: str) -> tuple[int, bool] | None:
    """Return for how many tokens an adapter's tensor has rows, and whether it is the whole matrix and no update of it.

    Args:
        name: the tensor's name. shape: its shape.
        part: full name of the embeddings or the output layer; None is returned for tensors of anything else.
    """
    inner = name.removeprefix(_PEFT_PREFIX)
    if not inner.startswith(part + ".") or len(shape) != 2:
        return None
    if inner.endswith("lora_embedding_A"):
        return shape[1], False
    if inner.endswith("lora_B.weight"):
        return shape[0], False
    if inner == f"{part}.token_adapter.base_layer.weight":
        return shape[0], True
    if "lora_" in inner or "token_adapter" in inner or not inner.endswith("weight"):
        return None
    return shape[0], True


# Folding


def _wrapped(module: Any) -> tuple[Any, bool]:
    """Return the base's layer inside the layers that peft put around it, and whether there were any."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = module
    while isinstance(inner, BaseTunerLayer | AuxiliaryTrainingWrapper):
        inner = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner.original_module
    return inner, inner is not module


def _untie_adapted(network: Any) -> bool:
    """Untie output layer and embeddings in place where an adapter is on one of them; return whether they were untied."""
    if not hasattr(network, "get_output_embeddings") or network.get_output_embeddings() is None:
        return False
    (first, around_first), (last, around_last) = map(
        _wrapped, (network.get_input_embeddings(), network.get_output_embeddings())
    )
    if not (around_first or around_last) or last.weight is not first.weight:
        return False
    last.weight = nn.Parameter(first.weight.detach().clone(), requires_grad=first.weight.requires_grad)
    return True


def _tie_if_equal(network: Any, configs: list[Any]) -> None:
    """Tie embeddings and output layer again where they are still equal, and set `tie_word_embeddings` accordingly, in place.

    Args:
        configs: the network's configurations in which it was set.
    """
    first, last = network.get_input_embeddings(), network.get_output_embeddings()
    equal = torch.equal(first.weight, last.weight)
    for config in configs:
        config.tie_word_embeddings = equal
    if equal:
        last.weight = first.weight
        return
    network.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=True)
    log.info(
        "embeddings and output layer were tied, and differ now that the adapter is folded in: each has its own weights"
    )


def _configs(network: Any) -> list[Any]:
    """Return a network's configuration, and that of its text model where it is another object."""
    return list({id(config): config for config in (network.config, network.config.get_text_config())}.values())


def _probe_ids(adapted: Any) -> Tensor:
    """Return (1, S) token ids from all over the vocabulary, and those whose embeddings an adapter trains one by one."""
    network = adapted.get_base_model()
    rows = network.get_input_embeddings().weight.shape[0]
    spread = torch.linspace(0, rows - 1, min(_PROBE_TOKENS, rows)).long().tolist()
    own = [token for held in adapted.peft_config.values() for token in _trained_tokens(held)]
    return torch.tensor([spread + own], device=next(network.parameters()).device)


@torch.no_grad()
def _probe(network: Any, ids: Tensor) -> Tensor:
    """Return float32 logits (1, S, V) for token ids (1, S), or hidden states (1, S, D) where there is no output layer."""
    training = network.training
    network.eval()
    try:
        out = network(input_ids=ids, use_cache=False)
    finally:
        network.train(training)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float()


def _trained_tokens(held: Any) -> list[int]:
    """Return the ids of tokens whose embeddings an adapter trains one by one, by peft's config of it."""
    given = getattr(held, "trainable_token_indices", None) or getattr(held, "token_indices", None) or []
    groups = given.values() if isinstance(given, dict) else [given]
    return sorted({int(token) for group in groups for token in group})[:_PROBE_TOKENS]


def trained_module(module: nn.Module | None) -> nn.Module | None:
    """Return the copy of a module that an adapter trains instead of it, or the module itself where there is none."""
    copies = getattr(module, "modules_to_save", None)
    return copies[module.active_adapter] if copies is not None else module  # type: ignore[union-attr]


def labels_of(adapter: str) -> int | None:
    """Return how many labels the classification head in an adapter's file has; None where the file holds no such head."""
    for name, entry in read_header(adapter_weights(Path(adapter), adapter)).items():
        if name.endswith(("score.weight", "score.modules_to_save.weight")):
            return int(entry.shape[0])
    return None


def is_sequence_classifier(adapter: str) -> bool:
    """Tell whether an adapter was trained on a transformers sequence classifier, by its `adapter_config.json`."""
    try:
        return json.loads((Path(adapter) / "adapter_config.json").read_bytes()).get("task_type") == "SEQ_CLS"
    except (ValueError, AttributeError):
        return False
