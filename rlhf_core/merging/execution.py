"""The execution of a planned merge: tensors, several at a time, are merged by the method or copied, and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.devices import one_thread
from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.forked_calls import may_fork
from rlhf_core.merging.merge_input import MergeInput
from rlhf_core.merging.one_tensor import guarded, merged_chunks
from rlhf_core.merging.output import Output
from rlhf_core.merging.plan import Plan, PlannedTensor
from rlhf_core.merging.streams import CHUNK, THREADS_CHUNK, TensorStream
from rlhf_core.merging.workers import Advance, spread

_GPU_CHUNK = 1 << 24
_COPIED = 1 << 22
"""Elements that are copied at once."""


@dataclass
class MergeExecution:
    """One pass over all tensors of a plan.

    Args:
        plan: what is merged.
        output: where it is written.
        merger: the method.
        merger_at: the method with the options that it has at a tensor, by the tensor's name.
        inputs_at: all models with their weights and options at a tensor, in the order of the plan.
        chosen: numbers of the models that are merged.
        seed: of random methods.
        device: where values are computed.
        threads: tensors at once.
        progress: called with bytes of output that are done, and their total.
    """

    plan: Plan
    output: Output
    merger: Merger
    merger_at: Callable[[str], Merger]
    inputs_at: Callable[[str], Sequence[MergeInput]]
    chosen: Sequence[int]
    seed: int
    device: torch.device
    threads: int
    progress: Callable[[int, int], None] | None = None
    _surveyed: Any = field(default=None, init=False)
    _chunk: int = field(default=CHUNK, init=False)

    def run(self) -> None:
        """Merge and write every tensor that the output doesn't have yet."""
        tensors = [one for one in self.plan.tensors if one.name not in self.output.done]
        total = sum(one.nbytes for one in self.plan.tensors)
        done = total - sum(one.nbytes for one in tensors)
        with one_thread(), torch.inference_mode():
            with guarded(self.merger, "looking at all tensors"):
                self._surveyed = self.merger.survey(_Streams(self))
            self._report(done, total)
            forked = self.threads > 1 and self.device.type == "cpu" and may_fork()
            self._chunk = CHUNK if forked or self.threads == 1 else THREADS_CHUNK
            # The largest first, so that no worker is left alone with it at the end.
            tensors.sort(key=lambda one: -one.count)
            work = spread(tensors, self._one, self.threads, forked=forked, enter=self.output.leave_to_parent)
            with closing(work) as events:
                for tensor, nbytes in events:
                    if nbytes is None:
                        self.output.finish(tensor)
                    else:
                        done += nbytes
                        self._report(done, total)

    def stream(self, tensor: PlannedTensor, merger: Merger) -> TensorStream:
        """Return a tensor of the models that are merged and take part in it."""
        inputs = self.inputs_at(tensor.name)
        present = [(reader, inputs[number]) for number in self.chosen if (reader := tensor.models[number]) is not None]
        return TensorStream(
            tensor.name,
            tensor.base,
            [reader for reader, _ in present],
            [one for _, one in present],
            merger=merger,
            surveyed=self._surveyed,
            seed=int(getattr(merger.config, "seed", self.seed)),
            device=self.device,
            chunk=_GPU_CHUNK if self.device.type == "cuda" else self._chunk,
        )

    def _one(self, tensor: PlannedTensor, advance: Advance) -> None:
        """Merge or copy one tensor, in a process or thread beside others."""
        chunks = self._merged(tensor) if tensor.merged else _copied(tensor)
        for start, values in chunks:
            self.output.write(tensor, start, values)
            advance(values.numel() * tensor.dtype.itemsize)

    def _merged(self, tensor: PlannedTensor) -> Iterator[tuple[int, torch.Tensor]]:
        merger = self.merger_at(tensor.name)
        return merged_chunks(merger, self.stream(tensor, merger))

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


@dataclass(frozen=True)
class _Streams:
    """The streams of all merged tensors; each iteration starts again."""

    execution: MergeExecution

    def __iter__(self) -> Iterator[TensorStream]:
        for tensor in self.execution.plan.tensors:
            if tensor.merged:
                yield self.execution.stream(tensor, self.execution.merger)


def _copied(tensor: PlannedTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the values of a tensor that isn't merged, having checked that all inputs agree on them."""
    first, *others = tensor.readers
    for start in range(0, tensor.count, _COPIED):
        stop = min(start + _COPIED, tensor.count)
        values, other_values = torch.empty(2, stop - start, dtype=tensor.dtype)
        first.read(start, stop, values)
        for other in others:
            other.read(start, stop, other_values)
            if not other_values.equal(values):
                raise ModelError(
                    f"tensor `{tensor.name}` holds whole numbers that differ, which can't be averaged",
                    place=other.place,
                    got=f"other values than {first.place}",
                    fix="store the same values in every model, or merge models that have them",
                )
        yield start, values
