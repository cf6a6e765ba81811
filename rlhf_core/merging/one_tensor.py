"""One tensor merged by a method: measured, then merged chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import PluginError, RLHFError, describe_error
from rlhf_core.merging.merge_input import MergeInput, check_own
from rlhf_core.merging.streams import CHUNK, TensorStream
from rlhf_core.merging.tensor_reader import MemoryTensor


def merged_chunks(merger: Merger, stream: TensorStream) -> Iterator[tuple[int, Tensor]]:
    """Measure a tensor, then yield its merged chunks, each with where it starts.

    Raises:
        PluginError: the method raised, or returned another shape than the chunk's or another type than float32.
    """
    if stream.count == 0:
        return
    with guarded(merger, f"measuring tensor `{stream.name}`"):
        measured = merger.measure(stream)
    for chunk in stream.chunks():
        with guarded(merger, f"merging tensor `{stream.name}`"):
            merged = merger.merge_chunk(chunk, measured)
        like = chunk.tensors[0]
        if not isinstance(merged, Tensor) or merged.shape != like.shape or merged.dtype != torch.float32:
            raise PluginError(
                f"merging tensor `{stream.name}` gave something else than a chunk's float32 values",
                place=f"merger {type(merger).__name__}",
                got=_described(merged),
                fix=f"return {_described(like)} from `merge_chunk`",
            )
        yield chunk.start, merged


@contextmanager
def guarded(merger: Merger, doing: str) -> Iterator[None]:
    """Turn whatever a method raises into a `PluginError` with its name; known errors and a lack of memory stay what they are."""
    try:
        yield
    except (RLHFError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PluginError(
            f"{doing} raised",
            place=f"merger {type(merger).__name__}",
            got=describe_error(error, lines=2),
            fix="`--debug` shows where",
        ) from error


def merge_tensor(
    merger: Merger,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    base: Tensor | None = None,
    options: Sequence[Mapping[str, Any]] = (),
    inputs: Sequence[MergeInput] = (),
    name: str = "model.layers.0.mlp.up_proj.weight",
    chunk: int = CHUNK,
) -> Tensor:
    """Return one tensor in memory merged by a method, float32: to test a method, or to look at what it does.

    Args:
        merger: the method.
        tensors: the tensor of each model, all of one shape, any floating type; they aren't changed.
        weights: each model's weight; one where left out.
        base: the tensor of the base, where there is one.
        options: each model's own options, as a file may give them.
        inputs: name, path and place of each model, for a method that looks at them; `weights` and `options` are set in them.
        name: the tensor's name.
        chunk: elements of a chunk, about.

    Raises:
        ConfigError: the weights or an option are invalid.
        ModelError: shapes differ, or values aren't finite.
        PluginError: the method raised, or returned something else than values of a chunk.
    """
    known = inputs or [MergeInput(f"model {number}", index=number) for number in range(len(tensors))]
    given = zip(known, weights or [1.0] * len(tensors), options or [{}] * len(tensors), strict=True)
    own = [replace(one, weight=weight, options=options_of(merger, theirs)) for one, weight, theirs in given]
    readers = [MemoryTensor(tensor, one.name) for tensor, one in zip(tensors, own, strict=True)]
    stream = TensorStream(
        name,
        MemoryTensor(base, "base") if base is not None else None,
        readers,
        own,
        merger=merger,
        seed=int(getattr(merger.config, "seed", 0)),
        device=tensors[0].device,
        chunk=chunk,
    )
    return merged_tensors(merger, [stream])[0]


def merged_tensors(merger: Merger, streams: Sequence[TensorStream]) -> list[Tensor]:
    """Return the merged tensors of some streams, float32, in memory."""
    with guarded(merger, "looking at all tensors"):
        surveyed = merger.survey(streams)
    found = []
    for stream in streams:
        merger.check_weights(stream.weights)
        stream.surveyed, merged = surveyed, torch.empty(stream.count, device=stream.device)
        for start, part in merged_chunks(merger, stream):
            merged[start : start + part.numel()] = part.reshape(-1)
        found.append(merged.view(stream.shape))
    return found


def options_of(merger: Merger, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a model's value for each name in `per_model`: its own, else the method's.

    Raises:
        ConfigError: a model may not have its own value of the option, or the value is invalid.
    """
    for key in own:
        check_own(key, type(merger), type(merger).__name__, f"options of a model, `{key}`")
    config = merger.config.updated(**own) if own else merger.config
    return MappingProxyType({name: getattr(config, name) for name in merger.per_model})


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
