"""The distance between the weights of two models: by tensor, by layer, and by part of the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.evaluation.image_files import check_image
from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.files import storage_errors
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.open_model import open_model
from rlhf_core.merging.streams import TensorStream
from rlhf_core.merging.tensor_names import GROUPS, in_group, layer_of, natural

PARTS = ("attention", "mlp", "norms", "embeddings", "head", "other")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Distance:
    """Sums over the entries of tensors of two models, a and b; the distances of several tensors add up."""

    count: int = 0
    """Number of entries."""
    squared_difference: float = 0.0
    """Σ (b - a)²."""
    squared_a: float = 0.0
    """Σ a²."""
    squared_b: float = 0.0
    """Σ b²."""
    product: float = 0.0
    """Σ a b."""
    largest: float = 0.0
    """max |b - a|."""

    def __add__(self, other: Distance) -> Distance:
        """Return the distance over the tensors of both."""
        return Distance(
            self.count + other.count,
            self.squared_difference + other.squared_difference,
            self.squared_a + other.squared_a,
            self.squared_b + other.squared_b,
            self.product + other.product,
            max(self.largest, other.largest),
        )

    @property
    def relative(self) -> float:
        """‖b - a‖ / ‖a‖; 0 where both are zero, infinite where only a is."""
        if self.squared_a == 0:
            return 0.0 if self.squared_difference == 0 else math.inf
        return math.sqrt(self.squared_difference / self.squared_a)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between a and b; 1 where they are equal, 0 where one of them is zero."""
        if self.squared_difference == 0:
            return 1.0
        size = math.sqrt(self.squared_a) * math.sqrt(self.squared_b)
        return max(-1.0, min(1.0, self.product / size)) if size > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; an infinite relative distance is None."""
        relative = self.relative if math.isfinite(self.relative) else None
        return {"entries": self.count, "relative": relative, "cosine": self.cosine, "largest": self.largest}


def distance(first: Tensor, second: Tensor) -> Distance:
    """Return the distance between two tensors with the same number of entries, any shape; sums are in float64."""
    a, b = first.reshape(-1).double(), second.reshape(-1).double()
    apart = b - a
    largest = float(apart.abs().max()) if len(apart) else 0.0
    return Distance(len(a), float(apart.dot(apart)), float(a.dot(a)), float(b.dot(b)), float(a.dot(b)), largest)


@dataclass(frozen=True)
class Difference:
    """The distances between two models, a and b."""

    names: tuple[str, str]
    """The models, as they were given."""
    tensors: dict[str, Distance]
    """The distance of each tensor that both have in the same shape, layers in order."""
    only: tuple[Sequence[str], Sequence[str]]
    """Names of the tensors that only a has, and of those that only b has."""
    reshaped: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    """The two shapes of each tensor whose shapes differ; they are left out of the distances."""

    @property
    def total(self) -> Distance:
        """The distance over all tensors."""
        return sum(self.tensors.values(), Distance())

    def by_layer(self) -> dict[str, dict[str, Distance]]:
        """Return for each layer (`embeddings`, 0, 1 …, `head`) the distance of each of its parts, and of the whole as `all`."""
        table: dict[str, dict[str, Distance]] = {}
        rows: list[tuple[tuple[int, int], str, str]] = []
        for name in self.tensors:
            layer, part = layer_of(name), part_of(name)
            order = (1, layer) if layer is not None else (0 if part == "embeddings" else 2, 0)
            rows.append((order, part if layer is None else str(layer), name))
        for _, row, name in sorted(rows, key=lambda entry: entry[0]):
            for column in (part_of(name), "all"):
                cells = table.setdefault(row, {})
                cells[column] = cells.get(column, Distance()) + self.tensors[name]
        return table

    def by_part(self) -> dict[str, Distance]:
        """Return the distance of each part over all layers."""
        table: dict[str, Distance] = {}
        for part in PARTS:
            found = [one for name, one in self.tensors.items() if part_of(name) == part]
            if found:
                table[part] = sum(found, Distance())
        return table

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "first": self.names[0],
            "second": self.names[1],
            "all": self.total.as_dict(),
            "layers": {
                row: {part: one.as_dict() for part, one in cells.items()} for row, cells in self.by_layer().items()
            },
            "parts": {part: one.as_dict() for part, one in self.by_part().items()},
            "tensors": {name: one.as_dict() for name, one in self.tensors.items()},
            "only_first": list(self.only[0]),
            "only_second": list(self.only[1]),
            "reshaped": {name: [list(shape) for shape in shapes] for name, shapes in self.reshaped.items()},
        }


def diff(first: str | Path, second: str | Path, *, progress: Progress | None = None) -> Difference:
    """Compare the weights of two models tensor by tensor, in chunks, so that memory stays small.

    Args:
        first: a directory, an adapter (which is folded into its base), `BASE+ADAPTER`, or a hub name.
        second: the same.
        progress: called with the bytes that are compared and their total.

    Raises:
        ModelError: a model can't be read or holds values that aren't finite, or the two have no tensor in common.
    """
    a, b = open_model(first), open_model(second)
    try:
        return _compare(a, b, progress)
    finally:
        a.close()
        b.close()


def _compare(a: InputModel, b: InputModel, progress: Progress | None) -> Difference:
    """Return the distances between two open models. Raises ModelError where they have no tensor in common."""
    own, others = a.tensors, b.tensors
    shared = sorted(set(own) & set(others), key=natural)
    shapes = {name: (own[name].shape, others[name].shape) for name in shared}
    reshaped = {name: pair for name, pair in shapes.items() if tuple(pair[0]) != tuple(pair[1])}
    names = [name for name in shared if name not in reshaped]
    if not names:
        raise ModelError(
            f"has no tensor in common with {a.name}",
            place=b.name,
            got=f"{len(own)} and {len(others)} tensors, {len(reshaped)} with the same name and different shapes",
            fix="compare models of one architecture",
        )
    total = sum(own[name].nbytes for name in names)
    tensors, done = {}, 0
    with torch.inference_mode():
        for name in names:
            stream = TensorStream(name, a.tensors[name], [b.tensors[name]])
            pieces: Iterable[Distance] = (distance(chunk.origin, chunk.tensors[0]) for chunk in stream.chunks())
            tensors[name] = sum(pieces, Distance())
            done += own[name].nbytes
            if progress is not None:
                progress(done, total)
    only = tuple(sorted(set(one) - set(other), key=natural) for one, other in ((own, others), (others, own)))
    return Difference((a.name, b.name), tensors, (only[0], only[1]), reshaped)


def part_of(name: str) -> str:
    """Return the part of a model that a tensor belongs to, one of `PARTS`."""
    if in_group(name, "norms"):
        return "norms"
    return next((part for part in PARTS if part in GROUPS and in_group(name, part)), "other")


def draw(found: Difference, path: Path) -> None:
    """Write a picture of the relative distances ‖b - a‖ / ‖a‖: layers by parts, and each layer as a whole.

    Args:
        found: what `diff` returned.
        path: the file; its ending says which kind.

    Raises:
        ConfigError: matplotlib isn't installed, or draws no files of that kind.
        StorageError: the file can't be written.
    """
    check_image(path, "--picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = found.by_layer()
    columns = [part for part in PARTS if any(part in cells for cells in table.values())]
    rows = list(table)
    shares = [[_shown(table[row].get(part)) for part in columns] for row in rows]
    figure = Figure(figsize=(4 + 1.1 * len(columns), 2 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    image = left.imshow(shares, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    left.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    left.set_yticks(range(len(rows)), rows)
    left.set_ylabel("layer")
    left.set_title("by part")
    figure.colorbar(image, ax=left, label="‖b - a‖ / ‖a‖")
    right.barh(range(len(rows)), [_shown(table[row]["all"]) for row in rows], color="tab:blue")
    right.set_xlabel("‖b - a‖ / ‖a‖")
    right.set_title("whole layer")
    figure.suptitle(f"a: {found.names[0]}\nb: {found.names[1]}", fontsize="small")
    with storage_errors(path):
        figure.savefig(path, dpi=150)


def _shown(one: Distance | None) -> float:
    """Return a relative distance as it is drawn: not at all (NaN) where there is none, or it is infinite."""
    return one.relative if one is not None and math.isfinite(one.relative) else math.nan
