"""Heads that score hidden states, which reward and value models keep beside their weights: merged as those are, by one method."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.files import read_json, replace_json, storage_errors
from rlhf_core.infra.safetensors_file import TensorEntry
from rlhf_core.merging.checkpoint import Checkpoint
from rlhf_core.merging.layout import MERGED

CENTRED = "centred"
"""The note of a reward head that its members' scores can be compared: true of a merge where it is of all that are merged."""


_LOOK_AT, _ALIKE = 1 << 16, 0.5
"""Values of a head that are compared, and the cosine below which heads aren't of one start: the one of random heads is near zero,
and training from one start leaves it near one."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """A head that every merged model has."""

    name: str
    about: Mapping[str, Any]
    """What `NAME.json` says of it, the same in all models."""
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Type and shape of each tensor in the result, which `dtype` doesn't change: scores are compared by small differences."""

    def describe(self, path: Path) -> None:
        """Write what it is beside its weights."""
        replace_json(path / f"{self.name}.json", self.about)


def common_heads(inputs: Sequence[Checkpoint]) -> list[Head]:
    """Return the heads of models that are merged, of which each must have the same.

    Args:
        inputs: the models, and the base where it takes part.

    Raises:
        ModelError: some have a head and some have none, heads are of several kinds, or members stand on backbones of their own.
    """
    first = inputs[0]
    for other in inputs[1:]:
        if set(other.heads) != set(first.heads):
            raise ModelError(
                "models with a head beside their weights are merged with models of the same head only",
                place=other.name,
                got=f"{_listed(other)}, and {_listed(first)} in {first.name}",
                fix="merge models that all have that head, the base too where differences are taken from it: `linear` and"
                " others need no base",
            )
    return [_common(name, inputs) for name in first.heads]


def _warn_of_other_start(name: str, inputs: Sequence[Checkpoint]) -> None:
    """Say where heads have nothing in common: those that began from other random weights can't be averaged."""
    first = inputs[0]
    key = max(first.heads[name].entries, key=lambda key: first.heads[name].entries[key].count)
    count = min(first.heads[name].entries[key].count, _LOOK_AT)
    values = torch.empty(len(inputs), count)
    for row, one in zip(values, inputs, strict=True):
        one.head_source(f"{name}.{key}").read(0, count, row)
    for row, one in zip(values[1:], inputs[1:], strict=True):
        alike = float(torch.cosine_similarity(values[0], row, dim=0))
        if alike < _ALIKE:
            log.warning(
                "the %ss of %s and %s have a cosine of %.2f: they began from other weights, and what is merged of them ranks"
                " badly; train both from one start",
                name.replace("_", " "), first.name, one.name, alike,
            )  # fmt: skip


def _listed(one: Checkpoint) -> str:
    return " and ".join(one.heads) or "no head"


def _common(name: str, inputs: Sequence[Checkpoint]) -> Head:
    first = inputs[0]
    about, entries = _about(name, first), first.heads[name].entries
    centred = [bool(_about(name, one).get(CENTRED)) for one in inputs]
    for other in inputs:
        own = _about(name, other)
        # A note that a file lacks, since it is older than the note, says the same as false.
        keys = {**about, **own}.keys() - {CENTRED}
        if apart := sorted(key for key in keys if (about.get(key) or False) != (own.get(key) or False)):
            key = apart[0]
            raise ModelError(
                f"its {name} is of another kind than that of {first.name}",
                place=other.name,
                got=f"`{key}` {own.get(key)!r}, and {about.get(key)!r}",
                fix="merge models that were trained with one kind of head",
            )
        _same_tensors(name, other, first)
    kinds = {key: [one.heads[name].entries[key].dtype for one in inputs] for key in entries}
    _warn_of_other_start(name, inputs)
    if CENTRED in about:
        about[CENTRED] = all(centred)
    return Head(name, about, {key: (_widest(kinds[key]), entry.shape) for key, entry in entries.items()})


def _about(name: str, one: Checkpoint) -> dict[str, Any]:
    """Return what a model says of its head."""
    path = one.heads[name].path.with_suffix(".json")
    with storage_errors(path):
        try:
            about = read_json(path)
        except ValueError as error:
            raise ModelError(
                f"{path.name} can't be read", place=one.name, got=error, fix="copy the file again"
            ) from None
    if not isinstance(about, dict):
        raise ModelError(f"{path.name} is no JSON object", place=one.name, fix="save the model again")
    folders = sorted(folder.name for folder in path.parent.glob("member-*"))
    if folders or (about.get("shared") is False and about.get("members", 1) != 1):
        raise ModelError(
            "the members of an ensemble stand on backbones of their own, which are not merged",
            place=one.name,
            got=", ".join(folders) or f"{about['members']} members",
            fix="merge single reward models, or ensembles that share a backbone",
        )
    return about


def _same_tensors(name: str, other: Checkpoint, first: Checkpoint) -> None:
    """Raise where a head's tensors differ in name or shape, or can't be merged."""
    wanted, found = first.heads[name].entries, other.heads[name].entries
    for key in sorted({*wanted, *found}):
        if key not in wanted or key not in found or wanted[key].shape != found[key].shape:
            raise ModelError(
                f"tensor `{key}` of its {name} differs from that of {first.name}",
                place=other.name,
                got=f"{_shape(found.get(key))}, and {_shape(wanted.get(key))}",
                fix="merge models of one architecture and size",
            )
        if found[key].dtype not in MERGED:
            raise ModelError(
                f"tensor `{key}` of its {name} is of a type that isn't merged",
                place=other.name,
                got=str(found[key].dtype).removeprefix("torch."),
                fix="save the model again, with its head in float32",
            )


def _shape(entry: TensorEntry | None) -> str:
    return "none" if entry is None else f"shape {list(entry.shape)}"


def _widest(kinds: Sequence[torch.dtype]) -> torch.dtype:
    wide = kinds[0]
    for kind in kinds[1:]:
        wide = torch.promote_types(wide, kind)
    return wide
