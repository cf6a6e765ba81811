"""The k-th largest of values that stream by, against numpy; and what streams promise: order, random words, options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergers_helpers import NAME, make_inputs, merge, merger_class
from torch import Tensor

from rlhf_core.infra.errors import ModelError
from rlhf_core.merging import Merger, TensorStream, selection, tensor_thresholds
from rlhf_core.merging.selection import kept_count, magnitudes, thresholds
from rlhf_core.merging.streams import Chunk
from rlhf_core.merging.tensor_reader import MemoryTensor


def stream_of(
    *models: Tensor, name: str = NAME, chunk: int = 64, base: Tensor | None = None, **given: Any
) -> TensorStream:
    start = base if base is not None else torch.zeros_like(models[0])
    return TensorStream(name, MemoryTensor(start), [MemoryTensor(m) for m in models], chunk=chunk, **given)


def kth_largest(values: Tensor, share: float) -> float:
    sizes = numpy.abs(values.numpy().ravel())
    place = len(sizes) - max(1, int(share * len(sizes) + 1e-6))
    return float(numpy.partition(sizes, place)[place])


def small(sample: int = 256) -> Any:
    """Take few values for many, so that guesses are made, and are often wrong."""
    return mock.patch.multiple(selection, SMALL=16, SAMPLE_SIZES=(sample, sample))


FEW = st.sampled_from([0.0, 0.25, -0.25, 1.0, -1.0, 3.0])
ANY = st.floats(-1e6, 1e6, width=32)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Values of every kind: few that many share, one, zeros, none alike, in order or not, a few large ones."""
    kind = draw(st.sampled_from(["few", "any", "constant", "zeros", "normal", "sorted", "one apart"]))
    if kind in ("few", "any"):
        return torch.tensor(draw(st.lists(FEW if kind == "few" else ANY, min_size=1, max_size=300)))
    count, seed = draw(st.integers(1, 3000)), draw(st.integers(0, 99))
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    if kind == "sorted":
        return values.abs().sort().values
    if kind == "one apart":
        values = torch.full((count,), 0.5)
        values[seed % count] = -7.0
    return values if kind in ("normal", "one apart") else torch.full((count,), 2.5 * (kind == "constant"))


def unchanged_rows(rows: int, columns: int, share: float) -> Tensor:
    """Task vectors of a model in which a share of the rows was trained."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=generator) * (torch.rand(rows, 1, generator=generator) < share)


def rows_of_two_sizes(rows: int, columns: int) -> Tensor:
    return 0.99 * unchanged_rows(rows, columns, 0.5) + 0.01 * torch.randn(rows, columns)


SHARES = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.1, 0.2, 0.5, 0.9, 0.999, 1.0]))


@settings(max_examples=200, deadline=None)
@given(tensors(), SHARES, st.sampled_from([64, 256, 100_000]))
def test_the_threshold_equals_numpy(values: Tensor, share: float, sample: int) -> None:
    with small(sample):
        (found,) = tensor_thresholds(stream_of(values), [share])
    expected = kth_largest(values, share)
    # Where everything is kept, zero says so too.
    assert found == expected or (found == 0 and kept_count(share, len(values)) == len(values))
    kept, wanted = int((values.abs() >= found).sum()), kept_count(share, len(values))
    assert (kept >= wanted and int((values.abs() > found).sum()) < wanted) or kept == len(values)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(tensors() | st.just(torch.zeros(0)), min_size=1, max_size=4), st.floats(0.01, 1.0), st.floats(0.01, 1.0)
)
def test_thresholds_over_several_tensors(parts: list[Tensor], one: float, two: float) -> None:
    assume(any(part.numel() for part in parts))

    def streams() -> list[TensorStream]:
        return [stream_of(part, name=str(number)) for number, part in enumerate(parts)]

    def measure(chunk: Chunk) -> list[Tensor]:
        (size,) = magnitudes(chunk)
        return [size, 3 * size]

    with small():
        found = thresholds(streams, measure, [one, two])
    together = torch.cat(parts)
    for threshold, share, factor in zip(found, (one, two), (1, 3), strict=True):
        expected = kth_largest(factor * together, share)
        assert threshold == expected or (threshold == 0 and kept_count(share, len(together)) == len(together))


@pytest.mark.parametrize("share", [0.001, 0.2, 0.9])
def test_large_tensors_equal_numpy(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1_500_000, generator=generator)
    values[::3] = (values[::3] * 16).round() / 16  # a third has few values
    rows = values.view(1000, 1500) * torch.rand(1000, 1, generator=generator)  # rows of sizes of their own
    (found,) = tensor_thresholds(stream_of(rows, chunk=65536), [share])
    assert found == kth_largest(rows, share)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.24, 0.26, 0.5])
@pytest.mark.parametrize("kind", ["unchanged rows", "rows of two sizes"])
def test_rows_that_differ_take_one_pass(kind: str, share: float) -> None:
    values = unchanged_rows(2048, 1024, 0.25) if kind == "unchanged rows" else rows_of_two_sizes(4096, 512)
    read = []

    def streams() -> list[TensorStream]:
        return [stream_of(values, chunk=65536)]

    def measure(chunk: Chunk) -> list[Tensor]:
        read.append(chunk.tensors[0].numel())
        return magnitudes(chunk)

    (found,) = thresholds(streams, measure, [share])
    assert found == kth_largest(values, share)
    assert sum(read) < 1.1 * values.numel()


@pytest.mark.parametrize("kind", ["large columns", "second half small"])
def test_layers_that_are_alike_take_one_pass(kind: str) -> None:
    """What is large stands at the same place in every tensor, and each tensor has few of the sample's runs."""
    generator = torch.Generator().manual_seed(2)
    if kind == "large columns":
        scale = 1 + 50 * (torch.rand(576, generator=generator) < 0.05).float()
        parts = [(torch.randn(192, 576, generator=generator) * scale).flatten() for _ in range(30)]
    else:
        scale = torch.where(torch.arange(4096) < 2048, 1.0, 0.001)
        parts = [torch.randn(4096, generator=generator) * scale for _ in range(600)]
    read = []

    def streams() -> list[TensorStream]:
        return [stream_of(part, name=f"layers.{number}.w", chunk=65536) for number, part in enumerate(parts)]

    def measure(chunk: Chunk) -> list[Tensor]:
        read.append(chunk.tensors[0].numel())
        return magnitudes(chunk)

    (found,) = thresholds(streams, measure, [0.2])
    assert found == kth_largest(torch.cat(parts), 0.2)
    assert sum(read) < 1.1 * sum(part.numel() for part in parts)


@pytest.mark.parametrize("kind", ["scales", "few values", "norms"])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_one_pass_is_enough_and_little_is_kept(kind: str, share: float) -> None:
    """Whether tensors differ in size by thousands, values are as few as differences of 16 bits are, or most tensors are short."""
    generator = torch.Generator().manual_seed(1)
    sizes = [576] * 400 + [150_000] * 4 if kind == "norms" else [300_000, 700, 90_000, 30_000, 210_000, 5_000]
    parts = []
    for number, size in enumerate(sizes):
        values = torch.randn(size, generator=generator)
        values *= 10.0 ** (number % 4) if kind != "few values" else 4
        parts.append(values.round() if kind == "few values" else values)
    brackets: list[selection.Bracket] = []

    class Noted(selection.Bracket):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            brackets.append(self)

    def streams() -> list[TensorStream]:
        return [stream_of(part, name=str(number), chunk=65536) for number, part in enumerate(parts)]

    with small(1 << 16), mock.patch.object(selection, "Bracket", Noted):
        (found,) = thresholds(streams, magnitudes, [share])
    assert found == kth_largest(torch.cat(parts), share)
    assert len(brackets) == 1
    assert sum(map(len, brackets[0].inside)) < 0.06 * sum(sizes)


def test_a_sample_that_tells_nothing() -> None:
    # All that is large stands where the sample doesn't look: it has to read again, and finds it.
    values = torch.zeros(100_000)
    values[5:25] = torch.arange(1.0, 21.0)
    with small(64):
        assert tensor_thresholds(stream_of(values), [0.0001]) == [11.0]
        assert tensor_thresholds(stream_of(values), [0.5]) == [0.0]


@given(st.integers(1, 10**9), st.integers(1, 1000))
def test_shares_written_in_decimals_mean_what_they_say(count: int, thousandths: int) -> None:
    assert kept_count(thousandths / 1000, count) == max(1, thousandths * count // 1000)


# Streams.

OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.4},
    "dare": {"density": 0.4, "election": "ties"},
    "della": {"density": 0.4},
    "breadcrumbs": {"density": 0.4, "election": "ties"},
    "sce": {"density": 0.4},
    "model_stock": {},
    "slerp": {},
    "karcher": {},
    "uniform_soup": {},
}
"""Every method of several models, with options that make it do all that it does."""


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("shape", [(300, 70), (1,)])
def test_the_order_of_models_changes_no_bit(method: str, shape: tuple[int, ...]) -> None:
    count = 2 if method == "slerp" else 3
    base, *models = make_inputs(shape, count, bits=20)
    weights = [1.0] * count if method in ("uniform_soup", "model_stock") else [0.5, 0.3, 0.7][:count]
    has = "density" in merger_class(method).per_model
    each: list[dict[str, float]] = [{"density": 0.3 + 0.1 * number} if has else {} for number in range(count)]
    expected = merge(method, base, models, weights, each=each, **OPTIONS[method])
    for order in itertools.permutations(range(count)):
        moved, theirs, own = ([values[number] for number in order] for values in (models, weights, each))
        assert merge(method, base, moved, theirs, each=own, **OPTIONS[method]).equal(expected)


@pytest.mark.parametrize("method", OPTIONS)
def test_threads_change_no_bit(method: str) -> None:
    base, *models = make_inputs((600, 333), 2)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(merge(method, base, models, [1.0, 1.0], **OPTIONS[method]))
    finally:
        torch.set_num_threads(threads)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("method", OPTIONS)
def test_a_tensor_without_elements_stays_one(method: str) -> None:
    empty = torch.empty(0, 5)
    assert merge(method, empty, [empty] * 2, [1.0, 1.0], **OPTIONS[method]).shape == (0, 5)
    empty = torch.empty(3, 0)
    assert merge(method, empty, [empty] * 2, [1.0, 1.0], **OPTIONS[method]).shape == (3, 0)


class ByRow(Merger):
    """Takes chunks of whole rows."""

    chunk_shape = "rows"


def words_of(stream: TensorStream, model: int = 0) -> Tensor:
    return torch.cat([chunk.random(model).reshape(-1) for chunk in stream.chunks()])


def test_random_words_are_uniform_and_repeat() -> None:
    values = make_inputs((400, 250), 1)[1]
    stream = stream_of(values, chunk=4096)
    words = words_of(stream)
    assert words.dtype == torch.int16 and words_of(stream).equal(words)
    counts = torch.histc(words.double(), 64, -32768, 32767)
    # χ² of 63 degrees has mean 63 and variance 126.
    assert abs(float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) - 63) < 5 * 126**0.5
    together = torch.corrcoef(torch.stack([words[:-1].double(), words[1:].double()]))
    assert abs(float(together[0, 1])) < 5 / 100_000**0.5
    for merger, chunk in itertools.product((Merger, ByRow), (4, 999, 100_000)):
        assert words_of(stream_of(values, chunk=chunk, merger=merger)).equal(words)
    assert not words_of(stream_of(values, seed=1)).equal(words)
    assert not words_of(stream_of(values, name="other")).equal(words)


def chunks_of(stream: TensorStream) -> Iterator[tuple[int, Tensor]]:
    for chunk in stream.chunks():
        yield chunk.start, chunk.tensors[0].clone()


def test_rows_are_never_cut() -> None:
    values = torch.arange(7.0 * 5 * 9).view(7, 5, 9)
    parts = list(chunks_of(stream_of(values, chunk=50, merger=ByRow)))
    assert [tuple(part.shape) for _, part in parts] == [(4, 9)] * 8 + [(3, 9)]
    assert torch.cat([part for _, part in parts]).equal(values.view(-1, 9))
    assert [start for start, _ in parts] == list(range(0, 315, 36))
    for shape in ((5,), (), (1,)):
        (part,) = chunks_of(stream_of(torch.ones(shape), merger=ByRow))
        assert part[1].shape == (1, shape[0] if shape else 1)


def test_values_that_are_not_finite_are_named() -> None:
    values = torch.ones(300)
    values[170] = float("nan")
    with pytest.raises(
        ModelError, match=rf"tensor `{NAME}` holds values that are not finite; got nan at position 170 of 300"
    ):
        list(stream_of(values).chunks())
