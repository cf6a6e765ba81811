"""A model of a merge as its method sees it. Importing this imports no torch."""

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
    """One of the models that are merged: what it is called, where it lies, how much it counts, and its options.

    All of it belongs to the model, wherever the model stands in a list: `chunk.inputs[i]` is that of `chunk.tensors[i]`.
    """

    name: str
    """As it was given: a directory, an adapter, a name on the hub."""
    path: Path | None = None
    """The directory of its files, a hub model's in the cache; None where there is none, such as for runs of several models."""
    weight: float = 1.0
    """Its weight at the tensor that is being merged."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For each name in the method's `per_model` the value that holds for this model, of the type of the configuration's field:
    the model's own, else the method's; at the tensor that is being merged."""
    index: int = 0
    """Its place in the list that was given, from 0."""
    fingerprint: bytes = b""
    """A hash of tensors' names, shapes and some values: the same wherever it is in the list and however its files are cut."""


def check_own(key: str, method: type[Merger], name: str, place: str) -> None:
    """Raise where a model can't have an option of its own.

    Args:
        key: the option.
        method: the method's class.
        name: what the method is called.
        place: where the option stands.

    Raises:
        ConfigError: the option is the same for all models, or there is none of that name.
    """
    if key in method.per_model:
        return
    if key in method.Config.model_fields:
        own = ", ".join(method.per_model) or "none"
        raise ConfigError(f"`{key}` is the same for all models in {name}", place=place, fix=f"may differ: {own}")
    known = ["model", "weight", *method.per_model]
    raise ConfigError(f"unknown key `{key}` of a model", place=place, fix=did_you_mean(key, known))
