"""A model put together of other models' layers, one run of them on the other, as a checkpoint.

What goes before the layers comes from the model of the first run, what goes after them from that of the last; so does the
configuration from the first, with what it says of each layer put in the layers' new order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_core.infra.errors import ModelError, first_line
from rlhf_core.infra.safetensors_file import TensorEntry
from rlhf_core.merging.checkpoint import Checkpoint, Renamed
from rlhf_core.merging.config import LayerRun
from rlhf_core.merging.streams import Source
from rlhf_core.merging.vocabulary import same_tokens
from rlhf_core.merging.weights import is_head, layer_of, layer_place

log = logging.getLogger(__name__)

_INDICES = ("mlp_only_layers", "attn_layer_indices", "hybrid_layer_ids", "cross_attention_layers", "moe_layers")
"""Settings that list the numbers of layers."""
_BEFORE = ("embed", "wte", "wpe")


class StackedCheckpoint(Checkpoint):
    """Runs of layers of some models as one model.

    Args:
        runs: where each run is from; one without a model is of layers in which this checkpoint takes no part.
        opened: the models by the name that the runs give them.
    """

    def __init__(self, runs: Sequence[LayerRun], opened: dict[str, Checkpoint]) -> None:
        self.name = " + ".join(f"{run.model}[{run.layers[0]}:{run.layers[1]}]" for run in runs if run.model is not None)
        self._runs, self._opened = list(runs), opened
        self._parts = [opened[run.model] if run.model is not None else None for run in runs]
        there = [part for part in self._parts if part is not None]
        self._first, self._last = there[0], there[-1]
        self.path, self.heads = self._first.path, self._last.heads
        self._aliases = {}
        self._froms: dict[str, tuple[Checkpoint, str]] = {}
        self._absent: set[int] = set()
        for part in there:
            _require_one_stack(part)
        self._put_together()
        self._check_layers()
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        """Raise where the embeddings and the head would be of other tokens."""
        head = next((name for name in self._froms if is_head(name)), None)
        table = self.table
        if head is None or table is None:
            return
        rows = [self.tensors[name].shape[0] for name in (table, head)]
        if rows[0] != rows[1] or not same_tokens(self._first, self._last):
            raise ModelError(
                f"its vocabulary differs from that of {self._first.name}, and the result has the head of the one and the"
                " embeddings of the other",
                place=self._last.name,
                got=f"{rows[1]} rows, and {rows[0]}" if rows[0] != rows[1] else "tokens of other numbers",
                fix="let the first and the last run be of models with one vocabulary",
            )

    def _put_together(self) -> None:
        layer = 0
        for run, part in zip(self._runs, self._parts, strict=True):
            start, stop = run.layers
            for number in range(start, stop):
                if part is None:
                    self._absent.add(layer)
                else:
                    found = [name for name in part.tensors if layer_of(name) == number]
                    if not found:
                        depth = 1 + max((layer_of(name) or 0 for name in part.tensors), default=0)
                        raise ModelError(
                            f"has no layer {number}",
                            place=part.name,
                            got=f"layers {start} to {stop} of {depth}",
                            fix="a range counts from 0, and its end is not in it",
                        )
                    self._froms |= {_moved(name, layer): (part, name) for name in found}
                layer += 1
        self.depth = layer
        ends = (
            self._first if self._parts[0] is not None else None,
            self._last if self._parts[-1] is not None else None,
        )
        for part, before in zip(ends, (True, False), strict=True):
            if part is not None:
                outer = (name for name in part.tensors if layer_of(name) is None and _goes_before(name) is before)
                self._froms |= {name: (part, name) for name in outer if before or not is_head(name)}
        self._without = {before for part, before in zip(ends, (True, False), strict=True) if part is None}
        self._put_head()
        self.tensors = {name: part.tensors[own] for name, (part, own) in self._froms.items()}

    def _put_head(self) -> None:
        """Take the head of the last model, unless each end ties its own: then the embeddings are the head of the result too."""
        stored = next((name for name in self._last.tensors if is_head(name)), None)
        if (self._first.tied and self._last.tied) or False in self._without:
            return
        if not self._last.tied and stored is not None:
            self._froms[stored] = (self._last, stored)
        elif self._last.tied and self._last.table is not None:
            self._froms[self._first.head_name()] = (self._last, self._last.table)

    def _check_layers(self) -> None:
        """Raise where a layer is of another make than one of its number is in a model of this configuration."""
        makes = _makes(self._first.tensors, _depth_of(self._first))
        settings = self._first.text_config
        kinds = settings.get("layer_types") or settings.get("layers_block_type") or [None] * len(makes)
        by_kind = {(str(kind), make) for kind, make in zip(kinds, makes, strict=False)}
        # Lists of layers go with them; a rule for numbers stays as it is.
        if len(by_kind) == len(set(map(str, kinds))) or any(settings.get(key) for key in _INDICES):
            return
        for layer, make in enumerate(_makes(self.tensors, self.depth)):
            if layer not in self._absent and make != _by_number(makes, layer):
                raise ModelError(
                    f"layer {layer} would be of another make than the configuration's rule for its number says",
                    place=self.name,
                    fix="choose ranges that keep layers of a kind at their numbers",
                )

    def absent(self, name: str) -> bool:
        layer = layer_of(name)
        return layer in self._absent if layer is not None else _goes_before(name) in self._without

    @classmethod
    def of(cls, runs: Sequence[LayerRun]) -> StackedCheckpoint:
        """Open the models of some runs and put their layers together."""
        opened: dict[str, Checkpoint] = {}
        try:
            for run in runs:
                if run.model is not None and run.model not in opened:
                    opened[run.model] = Checkpoint.open(run.model)
            return cls(runs, opened)
        except BaseException:
            for one in opened.values():
                one.close()
            raise

    def _source(self, name: str) -> Source:
        part, own = self._froms[name]
        return Renamed(part.source(own), self)

    def head_source(self, name: str) -> Source:
        return self._last.head_source(name)

    def close(self) -> None:
        for one in self._opened.values():
            one.close()

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(file for one in self._opened.values() for file in one.files))

    @property
    def places(self) -> list[Path]:
        return self._first.places

    @cached_property
    def config(self) -> dict[str, Any]:
        config = dict(self._first.config)
        inner = config.get("text_config")
        if isinstance(inner, dict):
            config["text_config"] = self._restacked(inner)
        else:
            config = self._restacked(config)
        if self._first.tied and any(is_head(name) for name in self._froms):
            config["tie_word_embeddings"] = False
        return config

    def _restacked(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings with one more or less layer where it says how many there are, and lists by layer in the new order."""
        depth = _depth_of(self._first)
        settings = _spelled_out(settings)
        numbers = [number for run in self._runs for number in range(*run.layers)]
        counts = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        changed: dict[str, Any] = {key: self.depth for key in counts if key in settings}
        for key, value in settings.items():
            if not isinstance(value, list) or key == "architectures" or key.endswith("_token_id"):
                continue
            if key in _INDICES:
                changed[key] = [layer for layer, number in enumerate(numbers) if number in value]
            elif len(value) == depth > 1:
                changed[key] = [value[number] for number in numbers]
        return settings | changed


def open_model(source: str | Sequence[LayerRun]) -> Checkpoint:
    """Open a model by its name, or one that is put together of others' layers."""
    return Checkpoint.open(source) if isinstance(source, str) else StackedCheckpoint.of(source)


def _spelled_out(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the kind of each layer, where it follows from its number by a rule of the architecture."""
    kind = settings.get("model_type")
    if not kind or "layer_types" in settings:
        return settings
    from transformers import AutoConfig

    try:
        types = getattr(AutoConfig.for_model(**settings), "layer_types", None)
    except Exception as error:  # an architecture that transformers doesn't know says all that there is to know itself
        log.debug("kinds of layers of %s aren't known: %s", kind, first_line(error))
        return settings
    return {**settings, "layer_types": list(types)} if types and len(set(types)) > 1 else settings


def _require_one_stack(part: Checkpoint) -> None:
    stacks = {layer_place(name) for name in part.tensors} - {None}
    if len(stacks) > 1:
        raise ModelError(
            "has several stacks of layers, and layers are put together of one only",
            place=part.name,
            got=", ".join(sorted(str(stack) for stack in stacks)),
            fix="merge whole models",
        )


def _depth_of(one: Checkpoint) -> int:
    return 1 + max((layer for name in one.tensors if (layer := layer_of(name)) is not None), default=-1)


def _makes(tensors: Mapping[str, TensorEntry], depth: int) -> list[frozenset[tuple[str, tuple[int, ...]]]]:
    """Return what each layer is made of: its tensors' names and shapes."""
    made: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(depth)]
    for name, entry in tensors.items():
        if (layer := layer_of(name)) is not None:
            made[layer].add((_moved(name, 0), entry.shape))
    return [frozenset(one) for one in made]


def _by_number(makes: Sequence[Any], layer: int) -> Any:
    """Return what a layer is made of by a rule for its number: beyond the last, as they alternate, or as the last."""
    if layer < len(makes):
        return makes[layer]
    for period in range(1, len(makes) // 2 + 1):
        if all(makes[number] == makes[number - period] for number in range(period, len(makes))):
            return makes[layer % period]
    return makes[-1]


def _moved(name: str, layer: int) -> str:
    place = layer_place(name)
    assert place is not None
    return f"{place}{layer}.{name[len(place) :].partition('.')[2]}"


def _goes_before(name: str) -> bool:
    """Tell whether a tensor outside of the layers goes before them: embeddings and what is done to these."""
    return not is_head(name) and any(part in piece for piece in name.split(".")[:-1] for part in _BEFORE)
