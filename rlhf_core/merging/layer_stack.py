"""Runs of layers of several models, one after the other, as one input model.

The tensors before the layers (embeddings) are those of the first run's model, the tensors after them those of the last run's. The
configuration is the first model's; its lists by layer are put in the new order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.infra.errors import ModelError, first_line
from rlhf_core.merging.config import LayerRun
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.tensor_names import depth_of, is_head, layer_of, layer_prefix, score_head_of
from rlhf_core.merging.tensor_reader import TensorReader
from rlhf_core.merging.vocabulary import same_tokens

log = logging.getLogger(__name__)

_INDICES = ("mlp_only_layers", "attn_layer_indices", "hybrid_layer_ids", "cross_attention_layers", "moe_layers")
"""Keys of a configuration that list numbers of layers."""
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_BEFORE = ("embed", "wte", "wpe")

Tensors = Mapping[str, TensorReader]


def stacked_model(runs: Sequence[LayerRun], opened: Mapping[str, InputModel]) -> InputModel:
    """Return runs of layers as one model.

    Args:
        runs: the model and the layers of each run; the result takes no part in layers of a run without a model.
        opened: the models by their names in the runs.

    Raises:
        ModelError: a model lacks such layers, or the result would be no model of the first one's configuration.
    """
    models = [opened[run.model] if run.model is not None else None for run in runs]
    present = [model for model in models if model is not None]
    for one in present:
        _require_one_stack(one)
    tensors: dict[str, TensorReader] = {}
    absent_layers: set[int] = set()
    depth = 0
    for run, model in zip(runs, models, strict=True):
        numbers = range(*run.layers)
        if model is None:
            absent_layers |= {*range(depth, depth + len(numbers))}
        else:
            for layer, number in enumerate(numbers, depth):
                tensors |= _layer(model, number, layer, run)
        depth += len(numbers)
    first, last = present[0], present[-1]
    absent_ends = set()
    for end, before in ((models[0], True), (models[-1], False)):
        if end is None:
            absent_ends.add(before)
        else:
            outer = {name: tensor for name, tensor in end.tensors.items() if layer_of(name) is None}
            tensors |= {n: t for n, t in outer.items() if _goes_before(n) is before and not is_head(n)}
    tensors |= {name: tensor for name, tensor in last.tensors.items() if score_head_of(name) is not None}
    if False not in absent_ends:
        tensors |= _output_head(first, last)
    name = " + ".join(f"{run.model}[{run.layers[0]}:{run.layers[1]}]" for run in runs if run.model is not None)
    _require_layers_by_rule(name, first, tensors, depth, absent_layers)
    _require_one_vocabulary(first, last, tensors)

    def absent(name: str) -> bool:
        layer = layer_of(name)
        return layer in absent_layers if layer is not None else _goes_before(name) in absent_ends

    files = list(dict.fromkeys(file for model in opened.values() for file in model.files))
    config = _config(first, runs, depth, untied=first.tied and any(is_head(name) for name in tensors))
    return InputModel(name, None, tensors, config, files, first.directories, last.heads, absent=absent)


def _layer(model: InputModel, number: int, layer: int, run: LayerRun) -> dict[str, TensorReader]:
    """Return the tensors of a model's layer under the names that they have as another layer."""
    found = {_moved(name, layer): tensor for name, tensor in model.tensors.items() if layer_of(name) == number}
    if not found:
        raise ModelError(
            f"has no layer {number}",
            place=model.name,
            got=f"layers {run.layers[0]} to {run.layers[1]} of {depth_of(model.tensors)}",
            fix="a range counts from 0, and its end is not in it",
        )
    return found


def _output_head(first: InputModel, last: InputModel) -> dict[str, TensorReader]:
    """Return the last model's output head; none where both models tie theirs: then the result ties its own to its embeddings."""
    if first.tied and last.tied:
        return {}
    if not last.tied:
        stored = last.output_head
        return {stored: last.tensors[stored]} if stored is not None else {}
    return {first.untied_head(): last.tensors[last.embeddings]} if last.embeddings is not None else {}


def _require_layers_by_rule(
    name: str, first: InputModel, tensors: Tensors, depth: int, absent_layers: set[int]
) -> None:
    """Raise where a layer has other tensors than the layer of that number in a model of this configuration."""
    makes = _contents(first.tensors, depth_of(first.tensors))
    kinds = (first.text_config.get(key) for key in ("layer_types", "layers_block_type"))
    listed = [str(kind) for kind in next(filter(None, kinds), [None] * len(makes))]
    # Lists by layer are put in the new order; a rule for numbers can't be.
    if len(set(zip(listed, makes, strict=False))) == len(set(listed)) or any(map(first.text_config.get, _INDICES)):
        return
    for layer, make in enumerate(_contents(tensors, depth)):
        if layer not in absent_layers and make != _by_number(makes, layer):
            raise ModelError(
                f"layer {layer} would have other tensors than the configuration's rule for its number says",
                place=name,
                fix="choose ranges that keep layers of each kind at their numbers",
            )


def _require_one_vocabulary(first: InputModel, last: InputModel, tensors: Tensors) -> None:
    """Raise where the embeddings and the output head would be of other tokens."""
    head = next((name for name in tensors if is_head(name)), None)
    table = first.embeddings
    if head is None or table is None or table not in tensors:
        return
    rows = [tensors[name].shape[0] for name in (table, head)]
    if rows[0] != rows[1] or not same_tokens(first, last):
        raise ModelError(
            f"its vocabulary differs from that of {first.name}, and the result has the head of the one and the"
            " embeddings of the other",
            place=last.name,
            got=f"{rows[1]} rows, and {rows[0]}" if rows[0] != rows[1] else "tokens of other numbers",
            fix="let the first and the last run be of models with one vocabulary",
        )


def _require_one_stack(model: InputModel) -> None:
    stacks = {layer_prefix(name) for name in model.tensors} - {None}
    if len(stacks) > 1:
        raise ModelError(
            "has several stacks of layers; layers are taken from models with one only",
            place=model.name,
            got=", ".join(sorted(str(stack) for stack in stacks)),
            fix="merge whole models",
        )


def _config(first: InputModel, runs: Sequence[LayerRun], depth: int, *, untied: bool) -> dict[str, Any]:
    """Return the first model's configuration for the layers in their new order."""
    config, inner = dict(first.config), first.config.get("text_config")
    if isinstance(inner, dict):
        config["text_config"] = _restacked(inner, first, runs, depth)
    else:
        config = _restacked(config, first, runs, depth)
    return config | ({"tie_word_embeddings": False} if untied else {})


def _restacked(settings: Mapping[str, Any], first: InputModel, runs: Sequence[LayerRun], depth: int) -> dict[str, Any]:
    settings = _with_layer_types(settings)
    numbers = [number for run in runs for number in range(*run.layers)]
    changed: dict[str, Any] = {key: depth for key in _COUNTS if key in settings}
    for key, value in settings.items():
        if not isinstance(value, list) or key == "architectures" or key.endswith("_token_id"):
            continue
        if key in _INDICES:
            changed[key] = [layer for layer, number in enumerate(numbers) if number in value]
        elif len(value) == depth_of(first.tensors) > 1:
            changed[key] = [value[number] for number in numbers]
    return {**settings, **changed}


def _with_layer_types(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with the kind of each layer, where it follows from its number by a rule of the architecture."""
    if not settings.get("model_type") or "layer_types" in settings:
        return settings
    from transformers import AutoConfig

    try:
        types = getattr(AutoConfig.for_model(**settings), "layer_types", None)
    except (
        Exception
    ) as error:  # the configuration of an architecture that transformers doesn't know says all there is to know
        log.debug("kinds of layers of %s aren't known: %s", settings["model_type"], first_line(error))
        return settings
    return {**settings, "layer_types": list(types)} if types and len(set(types)) > 1 else settings


def _contents(tensors: Tensors, depth: int) -> list[frozenset[tuple[str, tuple[int, ...]]]]:
    """Return the names and shapes of each layer's tensors."""
    made: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(depth)]
    for name, tensor in tensors.items():
        if (layer := layer_of(name)) is not None:
            made[layer].add((_moved(name, 0), tensor.shape))
    return [frozenset(one) for one in made]


def _by_number(makes: Sequence[Any], layer: int) -> Any:
    """Return the tensors of a layer by a rule for its number: beyond the last, as layers alternate, or the last's."""
    if layer < len(makes):
        return makes[layer]
    for period in range(1, len(makes) // 2 + 1):
        if all(makes[number] == makes[number - period] for number in range(period, len(makes))):
            return makes[layer % period]
    return makes[-1]


def _moved(name: str, layer: int) -> str:
    """Return the name that a layer's tensor has in another layer."""
    place = layer_prefix(name)
    assert place is not None
    return f"{place}{layer}.{name[len(place) :].partition('.')[2]}"


def _goes_before(name: str) -> bool:
    """Tell whether a tensor outside of the layers is before them: embeddings and their norms or projections."""
    return not is_head(name) and any(part in piece for piece in name.split(".")[:-1] for part in _BEFORE)
