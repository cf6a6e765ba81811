"""Heads beside a model's weights (reward, process reward and value heads): when those of several models may be merged.

Their tensors are an input model's like any other, under the head's name, and are merged by the same method; only what their
description says is looked at here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.model_files import HEADS, head_description, head_pair, head_words
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.tensor_names import score_head_of
from rlhf_core.merging.tensor_reader import TensorReader, WeightFile

log = logging.getLogger(__name__)

CENTRED = "centred"
"""Key of a reward head's description: its members' scores can be compared. True of a merge where it is true of all models."""
_COMPARED, _ALIKE = 1 << 16, 0.5
"""Values of a head that are compared, and the cosine below which heads began from different weights: that of random heads is near
zero, and that of heads trained from the same weights near one."""


def heads_beside(name: str, path: Path) -> dict[str, WeightFile]:
    """Open the weights of the heads in a model's directory, by their names.

    Raises:
        ModelError: of a head only the description or only the weights are there, or a file is damaged.
    """
    found = {}
    for head in HEADS:
        if (files := head_pair(path, head, name)) is not None:
            found[head] = WeightFile(files[1], name)
    return found


def head_tensors(heads: Mapping[str, WeightFile]) -> dict[str, TensorReader]:
    """Return the tensors of heads by their names in an input model, `HEAD.NAME`."""
    return {f"{head}.{key}": tensor for head, file in heads.items() for key, tensor in file.tensors.items()}


def common_heads(inputs: Sequence[InputModel]) -> dict[str, dict[str, Any]]:
    """Return the heads that all of some models have, and the description that each has in their merge.

    Args:
        inputs: the models that are merged, and the base where it takes part.

    Raises:
        ModelError: some have a head and some have none, heads are of several kinds, or an ensemble has several backbones.
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
    return {head: _common_description(head, inputs) for head in first.heads}


def _common_description(head: str, inputs: Sequence[InputModel]) -> dict[str, Any]:
    first = inputs[0]
    descriptions = [_description(head, one) for one in inputs]
    common = dict(descriptions[0])
    for other, own in zip(inputs, descriptions, strict=True):
        # A key that a file lacks, since it was written before there was that key, means the same as false.
        for key in sorted({**common, **own}.keys() - {CENTRED}):
            if (common.get(key) or False) != (own.get(key) or False):
                raise ModelError(
                    f"its {head} is of another kind than that of {first.name}",
                    place=other.name,
                    got=f"`{key}` {own.get(key)!r}, and {common.get(key)!r}",
                    fix="merge models that were trained with one kind of head",
                )
    _warn_of_other_start(head, inputs)
    if CENTRED in common:
        common[CENTRED] = all(own.get(CENTRED) for own in descriptions)
    return common


def _description(head: str, one: InputModel) -> dict[str, Any]:
    found = head_description(one.heads[head], head)
    folders = sorted(folder.name for folder in one.heads[head].glob("member-*"))
    if folders or (found.get("shared") is False and found.get("members", 1) != 1):
        raise ModelError(
            "the members of an ensemble have different backbones, which are not merged",
            place=one.name,
            got=", ".join(folders) or f"{found['members']} members",
            fix="merge single reward models, or ensembles that share a backbone",
        )
    return found


def _warn_of_other_start(head: str, inputs: Sequence[InputModel]) -> None:
    """Warn of heads that have nothing in common: those that began from other random weights can't be averaged."""
    first = inputs[0]
    largest = max((n for n in first.tensors if score_head_of(n) == head), key=lambda name: first.tensors[name].count)
    shape = first.tensors[largest].shape
    tensors = [one.tensors[largest] for one in inputs if largest in one.tensors and one.tensors[largest].shape == shape]
    if len(tensors) < len(inputs):
        return  # that is an error, as of any tensor
    values = torch.empty(len(inputs), min(first.tensors[largest].count, _COMPARED))
    for row, tensor in zip(values, tensors, strict=True):
        tensor.read(0, len(row), row)
    for row, one in zip(values[1:], inputs[1:], strict=True):
        alike = float(torch.cosine_similarity(values[0], row, dim=0))
        if alike < _ALIKE:
            log.warning(
                "the %ss of %s and %s have a cosine of %.2f: they began from other weights, and what is merged of them ranks"
                " badly; train both from one start",
                head_words(head), first.name, one.name, alike,
            )  # fmt: skip


def _listed(one: InputModel) -> str:
    return " and ".join(one.heads) or "no head"
