"""All tensors of a merge, several at a time, past the method and into the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ModelError
from rlhf_core.merging.checkpoint import FileSource
from rlhf_core.merging.layout import Item
from rlhf_core.merging.output import Output
from rlhf_core.merging.plan import Plan
from rlhf_core.merging.streams import CHUNK, THREADS_CHUNK, TensorStream
from rlhf_core.merging.tensor import guarded, merged_chunks, stream_for
from rlhf_core.merging.workers import Advance, may_fork, spread

if TYPE_CHECKING:
    from rlhf_core.merging.merge import ModelMerger

_GPU_CHUNK = 1 << 24
_COPY = 1 << 22


class Pass:
    """One pass of all tensors past a method."""

    def __init__(self, owner: ModelMerger, plan: Plan, merger: Merger, chosen: Sequence[int], output: Output) -> None:
        self.owner, self.plan, self.merger, self.chosen, self.output = owner, plan, merger, chosen, output
        self._written = 0
        self._surveyed: Any = None
        self._chunk = CHUNK
        self._total = sum(item.nbytes for item in plan.items)

    def go(self) -> None:
        todo = [item for item in self.plan.items if item.name not in self.output.done]
        merged = [item for item in self.plan.items if item.merged]
        with _one_thread_an_operation(), torch.inference_mode():
            with guarded(self.merger, "looking at all tensors"):
                self._surveyed = self.merger.survey(_Streams(self, merged))
            # The largest first, so that none is left alone with it at the end.
            self._spread(sorted(todo, key=lambda item: -item.count))

    def stream(self, item: Item, merger: Merger) -> TensorStream:
        base, models = self.plan.sources(item)
        inputs = self.owner.inputs_at(item.name, self.merger)
        present = [(model, inputs[number]) for number in self.chosen if (model := models[number]) is not None]
        return stream_for(
            merger,
            item.name,
            base,
            [model for model, _ in present],
            [one for _, one in present],
            surveyed=self._surveyed,
            seed=int(getattr(merger.config, "seed", self.owner.config.seed)),
            device=self.owner.device,
            chunk=_GPU_CHUNK if self.owner.device.type == "cuda" else self._chunk,
        )

    def _spread(self, items: Sequence[Item]) -> None:
        self._count(self._total - sum(item.nbytes for item in items))
        threads = self.owner.threads
        forked = threads > 1 and self.owner.device.type == "cpu" and may_fork()
        self._chunk = CHUNK if forked or threads == 1 else THREADS_CHUNK
        with closing(spread(items, self._one, threads, forked=forked, enter=self.output.leave_to_parent)) as events:
            for item, nbytes in events:
                if nbytes is None:
                    self.output.finish(item)
                else:
                    self._count(nbytes)

    def _one(self, item: Item, advance: Advance) -> None:
        if not item.merged:
            self._copy(item, advance)
        else:
            merger = self.owner.method.for_tensor(self.merger, item.name, self.plan.depth)
            stream = self.stream(item, merger)
            merger.check_weights(stream.weights)
            for start, values in merged_chunks(merger, stream):
                self.output.write(item, start, values)
                advance(values.numel() * item.dtype.itemsize)

    def _copy(self, item: Item, advance: Advance) -> None:
        """Copy what isn't merged, having looked that all inputs agree on it."""
        base, models = self.plan.sources(item)
        sources = [source for source in (base, *models) if source is not None]
        for start in range(0, item.count, _COPY):
            stop = min(start + _COPY, item.count)
            first = _raw(sources[0], start, stop).clone()
            for source in sources[1:]:
                if not _raw(source, start, stop).equal(first):
                    raise ModelError(
                        f"tensor `{item.name}` holds whole numbers that differ, which can't be averaged",
                        place=source.place,
                        got=f"other values than {sources[0].place}",
                        fix="store the same values in every model, or merge models that have them",
                    )
            self.output.write(item, start, first)
            advance(first.numel() * item.dtype.itemsize)

    def _count(self, nbytes: int) -> None:
        self._written += nbytes
        if self.owner.progress is not None:
            self.owner.progress(self._written, self._total)


class _Streams:
    """The streams of all merged tensors, made anew each time that they are gone through."""

    def __init__(self, run: Pass, items: Sequence[Item]) -> None:
        self._run, self._items = run, items

    def __iter__(self) -> Iterator[TensorStream]:
        for item in self._items:
            yield self._run.stream(item, self._run.merger)


def _raw(source: Any, start: int, stop: int) -> torch.Tensor:
    while not isinstance(source, FileSource):
        source = source.base
    return source.raw(start, stop)


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Keep torch from splitting single operations: tensors are merged side by side instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
