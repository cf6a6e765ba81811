"""One tensor of every input of a merge, read in float32 chunks.

A chunk is small enough to stay in a core's cache, so a method's arithmetic runs at the cache's speed and a merge's memory
doesn't depend on the size of the models. A stream may be read several times: first to measure, then to merge.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ModelError, PluginError
from rlhf_core.merging.merge_input import MergeInput
from rlhf_core.merging.tensor_reader import TensorReader

CHUNK = 1 << 16
"""Elements of a chunk on a CPU: 256 KiB per input in float32, so that a method's few tensors stay in a core's cache."""
THREADS_CHUNK = 1 << 18
"""Elements of a chunk where several threads of one process merge: with fewer they wait for the interpreter's lock more often, and
take up to twice as long."""
RUN = 128
"""Elements of a run of a sample: few, since a row of large weights is one observation, however much of it is read."""


class Chunk:
    """A run of one tensor's elements from every input, float32, on the device of the merge.

    `tensors`, and `base` where there is one, have the method's `chunk_shape`: (N,), (rows, columns), or the whole tensor's own.
    They are scratch space: a method may overwrite them, and they change with the next chunk. `inputs[i]` is the model of
    `tensors[i]`.
    """

    def __init__(
        self,
        stream: TensorStream,
        start: int,
        base: Tensor | None,
        tensors: list[Tensor],
        runs: numpy.ndarray | None = None,
    ) -> None:
        self.stream, self.start, self.base, self.tensors = stream, start, base, tensors
        self._runs = runs  # start of each run, where the chunk is one of a sample

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.stream.name

    @property
    def inputs(self) -> Sequence[MergeInput]:
        """Name, weight and options of each model, in the order of `tensors`."""
        return self.stream.inputs

    @property
    def weights(self) -> Sequence[float]:
        """Each model's weight, in the order of `tensors`."""
        return self.stream.weights

    @property
    def origin(self) -> Tensor:
        """The base's elements, of a method that declares `needs_base`."""
        assert self.base is not None
        return self.base

    def deltas(self) -> list[Tensor]:
        """Turn the models' values into differences from the base, in place, and return them; call it once per chunk."""
        for tensor in self.tensors:
            tensor.sub_(self.origin)
        return self.tensors

    def cut(self, whole: Tensor) -> Tensor:
        """Return the elements of this chunk of another tensor with as many elements, in the chunk's shape and on its device.

        For values that a method loads itself, such as an importance of each entry: it loads a tensor in `measure`, and cuts it
        in `merge_chunk`.

        Raises:
            ModelError: it has another number of elements than the tensor that is merged.
        """
        if whole.numel() != self.stream.count:
            raise ModelError(
                f"what belongs to tensor `{self.name}` has another size",
                got=f"{list(whole.shape)} for {list(self.stream.shape)}",
            )
        flat, like = whole.reshape(-1), self.tensors[0]
        if self._runs is None:
            part = flat[self.start : self.start + like.numel()]
        else:
            part = flat[torch.from_numpy(self._runs[:, None] + numpy.arange(RUN)).to(flat.device)]
        return part.to(like.device).view(like.shape)

    def random(self, model: int) -> Tensor:
        """Return a uniform whole number in -32768 … 32767 per element, int16, in the chunk's shape.

        They are a function of the seed, the tensor's name and the model's fingerprint, whatever the order of the models, the
        threads and the shards. Call it once per chunk and model.
        """
        return self.stream._words(model, self.tensors[model])


class TensorStream:
    """One tensor of every input, to be read chunk by chunk, as often as a method wants.

    Args:
        name: the tensor's name.
        base: the base's tensor, where there is a base.
        models: each model's tensor.
        inputs: each model's name, weight and options; models of weight one where left out.
        merger: the method. It declares what a chunk is (`chunk_shape`), whether the base is read (`ignores_base`), and whether
            the models are sorted by their values (`commutative`), since a sum in another order would round differently; the
            order is the same for every tensor of a merge.
        seed: seed of random words.
        surveyed: what the method's `survey` returned.
        device: where chunks are put.
        chunk: elements of a chunk, about.
    """

    def __init__(
        self,
        name: str,
        base: TensorReader | None,
        models: Sequence[TensorReader],
        inputs: Sequence[MergeInput] = (),
        *,
        merger: Merger | type[Merger] = Merger,
        seed: int = 0,
        surveyed: Any = None,
        device: torch.device | str = "cpu",
        chunk: int = CHUNK,
    ) -> None:
        self.name, self.seed, self.surveyed, self.chunk_shape = name, seed, surveyed, merger.chunk_shape
        self.base = None if merger.ignores_base else base
        self.shape, self.count = models[0].shape, models[0].count
        for reader in (*models, *([self.base] if self.base is not None else [])):
            if reader.shape != self.shape:
                raise ModelError(
                    f"tensor `{name}` has another shape than in the first model",
                    place=reader.place,
                    got=f"{reader.shape}, not {self.shape}",
                    fix="merge models of one architecture and vocabulary",
                )
        self.columns = max(1, self.shape[-1]) if self.chunk_shape == "rows" and self.shape else 1
        self.device, self._chunk = torch.device(device), chunk
        given = inputs or [MergeInput(model.place, index=number) for number, model in enumerate(models)]
        pairs = [
            (model, one if one.fingerprint else replace(one, fingerprint=model.fingerprint()))
            for model, one in zip(models, given, strict=True)
        ]
        if merger.commutative:
            pairs.sort(key=lambda pair: (pair[1].fingerprint, pair[1].weight, _ranked(pair[1].options), pair[1].name))
        self.models = [model for model, _ in pairs]
        self.inputs: Sequence[MergeInput] = tuple(one for _, one in pairs)
        self.weights: Sequence[float] = tuple(float(one.weight) for one in self.inputs)
        self._generators: list[numpy.random.SFC64] = []
        self._finite = False

    def option(self, name: str) -> list[Any]:
        """Return an option's value for each model.

        Raises:
            PluginError: it is none of the method's `per_model`.
        """
        if any(name not in one.options for one in self.inputs):
            raise PluginError(f"`{name}` is none of the merger's `per_model`", place="TensorStream.option")
        return [one.options[name] for one in self.inputs]

    def chunks(self) -> Iterator[Chunk]:
        """Read the tensor from its start to its end. One reading at a time; buffers are reused."""
        self._generators = [self._generator(number) for number in range(len(self.models))]
        # A multiple of four, as many words as a generator draws at once: so they are the same for chunks of any size.
        size = max(4, self._chunk // self.columns // 4 * 4) * self.columns
        if self.chunk_shape == "tensor":
            size = max(1, self.count)
        sources = [*self.models, *([self.base] if self.base is not None else [])]
        parts = [torch.empty(min(size, self.count), device=self.device) for _ in sources]
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            if stop - start < len(parts[0]):
                parts = [part[: stop - start] for part in parts]
            for part, source in zip(parts, sources, strict=True):
                self._read(source, start, stop, part)
            shaped = [self._shaped(part) for part in parts]
            base = shaped.pop() if self.base is not None else None
            yield Chunk(self, start, base, shaped)
        self._finite = True

    def _shaped(self, part: Tensor) -> Tensor:
        if self.chunk_shape == "tensor":
            return part.view(self.shape)
        return part.view(-1, self.columns) if self.chunk_shape == "rows" else part

    def sample(self, runs: int) -> Iterator[Chunk]:
        """Read some runs of `RUN` elements spread over the tensor, to estimate a quantile; a shorter tensor is read whole."""
        run = RUN
        sources = [*self.models, *([self.base] if self.base is not None else [])]
        if self.count <= run:
            yield from self.chunks()
            return
        runs = min(runs, self.count // run)
        # Spread evenly, each with a random shift, so that no period of the rows is met each time. The shifts differ between
        # tensors: layers are alike, and what is at one place in all of them would else be sampled in all or in none.
        shifts = numpy.random.default_rng(zlib.crc32(self.name.encode())).random(runs)
        places = ((numpy.arange(runs) + shifts) * (self.count - run) / runs).astype(int)
        for group in numpy.array_split(places, -(-runs * run // CHUNK)):
            parts = []
            for source in sources:
                values = torch.empty(len(group), run, device=self.device)
                source.read_runs(group.tolist(), values)
                parts.append(values.view(-1))
            base = parts.pop() if self.base is not None else None
            yield Chunk(self, 0, base, parts, runs=group)

    def _read(self, source: TensorReader, start: int, stop: int, out: Tensor) -> None:
        source.read(start, stop, out)
        # One reduction per chunk; where the sum overflows, every value is checked.
        if not self._finite and not math.isfinite(float(out.sum())) and not bool(out.isfinite().all()):
            where = int((~out.isfinite()).nonzero()[0]) + start
            raise ModelError(
                f"tensor `{self.name}` holds values that are not finite",
                place=source.place,
                got=f"{float(out[where - start])} at position {where:,} of {self.count:,}",
                fix="use another version of this model",
            )

    def _generator(self, model: int) -> numpy.random.SFC64:
        # Models with the same values get different words; which gets which makes no difference.
        key = self.inputs[model].fingerprint
        twin = [one.fingerprint for one in self.inputs[:model]].count(key)
        text = f"{self.seed}\0{self.name}\0{twin}\0".encode() + key
        seed = hashlib.blake2b(text, digest_size=16).digest()
        return numpy.random.SFC64(int.from_bytes(seed, "little"))

    def _words(self, model: int, like: Tensor) -> Tensor:
        count = like.numel()
        raw = self._generators[model].random_raw(-(-count // 4))
        words = raw.view(numpy.int16)[:count]
        return torch.from_numpy(words).to(self.device).view(like.shape)


def _ranked(options: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return a sort key of models with the same values: numbers by size, all other options by their repr."""
    return [
        (name, float(value), "") if isinstance(value, int | float) else (name, 0.0, repr(value))
        for name, value in sorted(options.items())
    ]
