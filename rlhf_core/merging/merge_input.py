"""An input model as a method sees it. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rlhf_core.contracts.merger import Merger


@dataclass(frozen=True)
class MergeInput:
    """What a method may know of an input model: its name, directory, weight and options.

    `chunk.inputs[i]` is that of `chunk.tensors[i]`, also where the models are sorted.
    """

    name: str
    """As it was given: a directory, an adapter, a name on the hub."""
    path: Path | None = None
    """The directory of its files, in the cache for a model on the hub; None for layers of several models."""
    weight: float = 1.0
    """Its weight at the tensor that is being merged."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For each name in the method's `per_model`, the model's value at the tensor that is being merged, else the method's; of the
    type of the configuration's field."""
    index: int = 0
    """Its index in the list that was given."""
    fingerprint: bytes = b""
    """A hash of its tensors' names, shapes and some values, whatever its index and its shards."""


def check_own(key: str, method: type[Merger], name: str, place: str) -> None:
    """Raise where a model may not have its own value of an option.

    Args:
        key: the option.
        method: the method's class.
        name: the method's name.
        place: where the option was set.

    Raises:
        ConfigError: the option is the same for all models, or there is none of that name.
    """
    if key in method.per_model:
        return
    if key in method.Config.model_fields:
        own = ", ".join(method.per_model) or "none"
        raise ConfigError(
            f"`{key}` can't be set for one model in {name}",
            place=place,
            fix=f"set it for the whole merge; a model may have its own: {own}",
        )
    known = ["model", "weight", *method.per_model]
    raise ConfigError(f"unknown key `{key}` of a model", place=place, fix=did_you_mean(key, known))
