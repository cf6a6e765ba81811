"""Weights of models and values by layer: one number, a list over depth, or by a part of the tensor's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy
from pydantic import Field, model_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.model_files import HEADS

LM_HEAD = ("lm_head", "embed_out")
"""What the head that predicts tokens is called; it has a row a token."""
GROUPS = {
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "experts"),
    "embeddings": ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"),
    "head": (*LM_HEAD, *HEADS),
    "norms": ("norm", "ln_1", "ln_2", "ln_f"),
}
"""Names that stand for several parts of tensors' names, whatever the architecture calls them."""
_TOKEN_ROWS = {*GROUPS["embeddings"], *LM_HEAD, "shared", "output_layer"} - {"wpe"}
_LAYER = re.compile(r"((?:^|.*?\.)(?:layers|layer|h|blocks|block)\.)(\d+)\.")
_NUMBER = float | list[float]


class RunValue(BaseConfig):
    """A value of a run of layers."""

    count: int = Field(ge=1, description="How many layers it is of.")
    value: float | list[float] | LayerValues = Field(
        description="A value, a gradient from the first of these layers to their last, or values by place."
    )


class LayerValues(BaseConfig):
    """A value by a tensor's place in the model."""

    layers: list[float] | None = Field(None, description="One value a layer; their number must be the model's.")
    gradient: list[float] | None = Field(
        None,
        description="Values at even distances over the depth, the first at the first layer; straight lines between.",
    )
    filters: dict[str, float | list[float] | LayerValues] = Field(
        default_factory=dict,
        description="Part of a tensor's name (or attention, mlp, embeddings, head, norms; or a pattern with `*` for the whole"
        " name) → a value, a gradient, or values by place in turn. The first that fits counts.",
    )
    runs: list[RunValue] | None = Field(
        None,
        description="Values of runs of layers, one after the other, as `{count, value}`: a gradient goes over its own run. What"
        " lies before the layers takes the first's, what lies after them the last's.",
    )
    default: float | None = Field(
        None,
        description="Value of tensors that nothing else fits; null takes the first layer's before it, the last's after.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> LayerValues:
        if sum(one is not None for one in (self.layers, self.gradient, self.runs)) > 1:
            raise ValueError("`layers`, `gradient` and `runs` say the same in several ways: give one of them")
        for values in (self.layers, self.gradient, self.runs, *self.filters.values()):
            if values == []:
                raise ValueError("a list over the layers needs at least one value")
        if not any((self.layers, self.gradient, self.runs, self.filters)) and self.default is None:
            raise ValueError("give `layers`, `gradient`, `runs`, `filters` or `default`")
        return self


RunValue.model_rebuild()

Value = float | list[float] | LayerValues
"""One value, a gradient over the depth, or a value by place."""


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to, from its name; None outside the layers."""
    found = _LAYER.match(name)
    return int(found[2]) if found else None


def depth_of(names: Iterable[str]) -> int:
    """Return the number of layers that tensors of these names belong to; 0 where there are none."""
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def layer_place(name: str) -> str | None:
    """Return what stands before the layer's number in a tensor's name; None outside the layers."""
    found = _LAYER.match(name)
    return found[1] if found else None


def is_embedding(name: str) -> bool:
    """Tell whether a tensor maps tokens to vectors or back, by its name."""
    return is_head(name) or any(part in name.split(".") for part in GROUPS["embeddings"])


def is_head(name: str) -> bool:
    """Tell whether a tensor is the matrix of the head that predicts tokens, by its name: not a bias, nor a layer before it."""
    return name.split(".")[-2:] in ([module, "weight"] for module in LM_HEAD)


def score_head_of(name: str) -> str | None:
    """Return the head beside the weights that a tensor is of, `reward_head` for `reward_head.0.outer.weight`; else None."""
    head = name.partition(".")[0]
    return head if head in HEADS else None


def has_token_rows(name: str, tensor: Any) -> bool:
    """Tell whether a tensor (anything with shape and dtype) is a matrix with a row per token: embeddings or an output head."""
    module, last = name.split(".")[-2:] if "." in name else ("", name)
    matrix = len(tensor.shape) == 2 and tensor.dtype.is_floating_point
    return matrix and last == "weight" and module in _TOKEN_ROWS


def value_at(value: Value, name: str, depth: int, *, what: str = "weight") -> float:
    """Return a value for one tensor of a model with `depth` layers.

    A list is a gradient: its values stand at even distances from the first layer to the last, and layers between two of them
    lie on the straight line; a list of `depth` values gives each layer its own. Tensors outside the layers take the value
    of the first layer (embeddings) or the last (the final norm, the head), or `default` where one is set.

    Raises:
        ConfigError: `layers` has another length than the model, or nothing fits the tensor. `what` names the option in it.
    """
    return _at(value, name, layer_of(name), depth, what)


def _at(value: Value, name: str, layer: int | None, depth: int, what: str) -> float:
    """Return a value at a layer of so many, None being outside of them."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list):
        return _along(value, name, layer, depth, what)
    for part, inner in value.filters.items():
        if _fits(part, name):
            return _at(inner, name, layer, depth, what)
    if layer is None and value.default is not None:
        return value.default
    if value.layers is not None:
        if len(value.layers) != depth:
            raise ConfigError(
                f"`{what}.layers` has {len(value.layers)} values, the model {depth} layers",
                place=what,
                fix=f"give {depth} values, or use `gradient`",
            )
        return _along(value.layers, name, layer, depth, what)
    if value.gradient is not None:
        return _along(value.gradient, name, layer, depth, what)
    if value.runs is not None:
        return _in_runs(value.runs, name, layer, depth, what)
    if value.default is None:
        raise ConfigError(
            f"no filter of `{what}` fits tensor `{name}`",
            place=what,
            fix="add a `default`, for all that no filter fits",
        )
    return value.default


def _in_runs(runs: Sequence[RunValue], name: str, layer: int | None, depth: int, what: str) -> float:
    if (total := sum(run.count for run in runs)) != depth:
        raise ConfigError(
            f"the runs of `{what}` have {total} layers, the model {depth}",
            place=what,
            fix=f"let them add up to {depth}",
        )
    if layer is None:
        run = runs[0] if _first_in(name) else runs[-1]
        return _at(run.value, name, None, run.count, what)
    for run in runs:
        if layer < run.count:
            return _at(run.value, name, layer, run.count, what)
        layer -= run.count
    raise AssertionError(name)


def unused_filters(value: Value, names: Sequence[str]) -> list[str]:
    """Return the filters of a value that fit none of the tensors."""
    if not isinstance(value, LayerValues):
        return []
    below = [*value.filters.values(), *(run.value for run in value.runs or ())]
    inner = [part for one in below for part in unused_filters(one, names)]
    return [part for part in value.filters if not any(_fits(part, name) for name in names)] + inner


def _first_in(name: str) -> bool:
    return any(part in name.split(".") for part in GROUPS["embeddings"])


def _along(values: Sequence[float], name: str, layer: int | None, depth: int, what: str) -> float:
    if not values:
        raise ConfigError(f"`{what}` is an empty list", place=what, fix="give at least one value")
    if layer is None:
        layer = 0 if _first_in(name) else max(0, depth - 1)
    if depth <= 1:
        return float(values[0])
    return float(numpy.interp(layer / (depth - 1), numpy.linspace(0, 1, len(values)), values))


def _fits(part: str, name: str) -> bool:
    if "*" in part:
        return fnmatchcase(name, part)
    parts = GROUPS.get(part)
    if parts is None:
        # `layers.1` is no part of `layers.10`.
        left, right = (r"(?<!\d)" if part[:1].isdigit() else ""), (r"(?!\d)" if part[-1:].isdigit() else "")
        return re.search(left + re.escape(part) + right, name) is not None
    pieces = name.split(".")
    if part == "norms":
        return any("norm" in piece or piece in parts for piece in pieces)
    return any(piece in parts for piece in pieces)


def share_of_weights(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum.

    Raises:
        ConfigError: they sum to zero or have mixed signs, so that shares would be large numbers that almost cancel.
    """
    require_one_sign(weights)
    total = sum(weights)
    return [weight / total for weight in weights]


def require_one_sign(weights: Sequence[float]) -> None:
    """Raise where weights that are to be normalised sum to zero, have mixed signs, or are negative."""
    listed = ", ".join(f"{weight:g}" for weight in weights)
    if sum(weights) == 0:
        raise ConfigError(
            "weights that are normalised sum to zero",
            place="weight",
            got=listed,
            fix="raise one, or where the method has `normalize`, set it to false",
        )
    if max(weights) < 0:
        raise ConfigError(
            "weights that are normalised are all negative, which would turn every difference round",
            place="weight",
            got=listed,
            fix="give positive weights, or where the method has `normalize`, set it to false",
        )
    if min(weights) < 0 < max(weights):
        raise ConfigError(
            "weights that are normalised have mixed signs, which blows the result up",
            place="weight",
            got=listed,
            fix="give weights of one sign, or where the method has `normalize`, set it to false",
        )
