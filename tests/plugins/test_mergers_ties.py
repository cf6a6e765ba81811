"""TIES: numbers by hand, the paper in float64, PEFT's own functions, both majorities and both scopes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergers_helpers import NAME, SHAPES, Array, check_bf16, check_near, doubles, make_inputs, make_merger, merge
from rlhf_plugins.mergers.ties import TIESConfig, trim
from torch import Tensor

from rlhf_core.infra.errors import ConfigError
from rlhf_core.merging import MergeInput, Merger, TensorStream
from rlhf_core.merging.one_tensor import merged_chunks, options_of
from rlhf_core.merging.tensor_reader import MemoryTensor


def threshold64(delta: Array, density: float) -> float:
    """The k-th largest size, k the whole part of the density's share, by sorting."""
    ranked = numpy.sort(numpy.abs(delta).ravel())[::-1]
    return float(ranked[max(1, int(density * ranked.size + 1e-9)) - 1])


def elect64(
    deltas: list[Array], weights: list[float], *, normalize: bool = True, majority: str = "weighted"
) -> tuple[Array, Array]:
    """Return τ as the paper's steps 2 and 3 say, and where rounding decides the sign."""
    moved = numpy.stack(deltas)
    weight = numpy.asarray(weights).reshape(-1, *[1] * (moved.ndim - 1))
    voted = moved * weight if majority == "weighted" else moved
    sums, sizes = voted.sum(0), numpy.abs(voted).sum(0)
    agrees = (numpy.sign(voted) == numpy.sign(sums)) & (sums != 0)
    top = (moved * weight * agrees).sum(0)
    if normalize:
        bottom = (agrees * (weight if majority == "weighted" else 1.0)).sum(0)
        top = numpy.divide(top, bottom, out=numpy.zeros_like(top), where=bottom != 0)
    return top, (numpy.abs(sums) < 1e-6 * sizes) & (sizes > 0)


def ties64(
    inputs: list[Array],
    weights: list[float],
    densities: list[float] | None = None,
    scale: float = 1.0,
    thresholds: list[float] | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    base, *models = inputs
    kept = []
    for number, model in enumerate(models):
        delta = model - base
        limit = thresholds[number] if thresholds else threshold64(delta, (densities or [0.2] * len(models))[number])
        kept.append(numpy.where(numpy.abs(delta) >= limit, delta, 0.0))
    merged, unclear = elect64(kept, weights, **options)
    return base + scale * merged, unclear


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.3, 0.2]])
@pytest.mark.parametrize("majority", ["weighted", "unweighted"])
def test_the_paper_in_float64(shape: tuple[int, ...], weights: list[float], majority: str) -> None:
    inputs = make_inputs(shape)
    for normalize, scale in ((True, 1.0), (False, 0.7)):
        options: dict[str, Any] = {"majority": majority, "normalize": normalize, "scale": scale}
        found = merge("ties", inputs[0], inputs[1:], weights, density=0.3, **options)
        check_near(found, *ties64(doubles(inputs), weights, [0.3] * 3, **options))


def test_each_model_has_a_density_of_its_own() -> None:
    inputs = make_inputs((500, 90))
    each = [{"density": 0.1}, {}, {"density": 0.9}]
    found = merge("ties", inputs[0], inputs[1:], [1.0, 0.5, 0.25], each=each, density=0.4)
    check_near(found, *ties64(doubles(inputs), [1.0, 0.5, 0.25], [0.1, 0.4, 0.9]))


def test_bf16_is_the_rounded_float64() -> None:
    def reference(inputs: list[Array], weights: list[float]) -> Array:
        return ties64(inputs, weights, [0.3] * 3)[0]

    check_bf16("ties", reference, [1.0, 0.5, 0.25], density=0.3)


def test_golden_numbers() -> None:
    base = torch.zeros(4)
    one, two = torch.tensor([4.0, -3.0, 1.0, 0.5]), torch.tensor([2.0, 5.0, -0.5, 0.25])
    # The two largest of each stay: (4, -3) and (2, 5). Signs: +, + (2 > 0). Means of what agrees: 3 and 5.
    assert merge("ties", base, [one, two], [1.0, 1.0], density=0.5).tolist() == [3.0, 5.0, 0.0, 0.0]
    # Weights 3 and 1 turn the second sign: -9 + 5 < 0. (12 + 2) / 4 and -3.
    assert merge("ties", base, [one, two], [3.0, 1.0], density=0.5).tolist() == [3.5, -3.0, 0.0, 0.0]
    # Without weights in the vote + stays elected, and 5 · 1 is divided by the number that agrees; (12 + 2) / 2.
    found = merge("ties", base, [one, two], [3.0, 1.0], density=0.5, majority="unweighted")
    assert found.tolist() == [7.0, 5.0, 0.0, 0.0]
    found = merge("ties", base, [one, two], [3.0, 1.0], density=0.5, normalize=False, scale=2.0)
    assert found.tolist() == [28.0, -18.0, 0.0, 0.0]


def test_limits() -> None:
    base, one, two, _ = make_inputs((30, 40))
    assert merge("ties", base, [one], [0.5], density=1.0).equal(one)
    assert merge("ties", base, [base + 1, base - 1], [1.0, 1.0], density=1.0).equal(base)
    assert merge("ties", base, [base, base], [1.0, 1.0]).equal(base)
    # An entry that all share stays as it is, whatever the density.
    assert merge("ties", base, [base + 0.5, base + 0.5], [0.9, 0.1], density=0.01).equal(base + 0.5)
    assert merge("ties", base, [one, two], [1.0, 1.0], density=1e-9).ne(base).sum() <= 2  # one entry of each


def test_entries_at_the_threshold_are_all_kept() -> None:
    base, model = torch.zeros(8), torch.tensor([1.0, -1.0, 1.0, 2.0, 0.5, 0.5, -1.0, 0.0])
    found = merge("ties", base, [model], [1.0], density=0.25)  # the second largest size is 1, five times
    assert found.tolist() == [1.0, -1.0, 1.0, 2.0, 0.0, 0.0, -1.0, 0.0]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_trimming_leaves_the_largest(values: list[float], share: float) -> None:
    delta = torch.tensor(values)
    threshold = threshold64(delta.double().numpy(), share)
    kept = trim(delta.clone(), threshold)
    assert kept.tolist() == [value if abs(value) >= threshold else 0.0 for value in delta.tolist()]


@settings(max_examples=60)
@given(st.data())
def test_any_deltas_equal_float64(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    quarter = st.integers(-32, 32).map(lambda n: n / 4)
    rows = data.draw(st.lists(st.lists(quarter, min_size=count, max_size=count), min_size=1, max_size=20))
    weights = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=count, max_size=count))
    majority, normalize = data.draw(st.sampled_from(["weighted", "unweighted"])), data.draw(st.booleans())
    models = list(torch.tensor(rows).T.contiguous())
    base = torch.zeros(len(rows))
    found = merge("ties", base, models, weights, density=1.0, majority=majority, normalize=normalize)
    expected, _ = elect64(doubles(models), weights, majority=majority, normalize=normalize)
    assert numpy.abs(found.double().numpy() - expected).max() <= 5e-7 * max(1.0, numpy.abs(expected).max())


# PEFT's own functions, on task vectors.


def peft(name: str) -> Callable[..., Tensor]:
    return getattr(pytest.importorskip("peft.utils.merge_utils"), name)


def continuous(shape: tuple[int, ...] = (300, 70)) -> list[Tensor]:
    """Task vectors without two entries of one size, for PEFT keeps any of those at the threshold."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).float() for _ in range(3)]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.3, 0.2]])
def test_ties_equals_peft(density: float, weights: list[float]) -> None:
    deltas = continuous()
    theirs = peft("ties")([delta.double() for delta in deltas], torch.tensor(weights).double(), density)
    found = merge("ties", torch.zeros_like(deltas[0]), deltas, weights, density=density, majority="unweighted")
    check_near(found, theirs.numpy())
    if weights[0] == 1.0:  # where the two ways of weighing are one
        check_near(merge("ties", torch.zeros_like(deltas[0]), deltas, weights, density=density), theirs.numpy())


def test_task_arithmetic_equals_peft() -> None:
    deltas, weights = continuous(), [0.5, -0.3, 0.2]
    theirs = peft("task_arithmetic")([delta.double() for delta in deltas], torch.tensor(weights).double())
    check_near(merge("task_arithmetic", torch.zeros_like(deltas[0]), deltas, weights), theirs.numpy())


# Trimming over the whole model.


class Streams:
    """The tensors of a model, as new streams each time."""

    surveyed: Any = None

    def __init__(
        self, merger: Merger, tensors: dict[str, list[Tensor]], weights: list[float], each: list[dict[str, float]]
    ) -> None:
        self.merger, self.tensors, self.weights, self.each = merger, tensors, weights, each

    def __iter__(self) -> Iterator[TensorStream]:
        for name, (base, *models) in self.tensors.items():
            readers = [MemoryTensor(model, f"model {number}") for number, model in enumerate(models)]
            # Each model has one fingerprint for all of its tensors.
            inputs = [
                MergeInput(
                    reader.place,
                    weight=weight,
                    options=options_of(self.merger, own),
                    fingerprint=reader.place.encode(),
                )
                for reader, weight, own in zip(readers, self.weights, self.each, strict=True)
            ]
            yield TensorStream(
                name, MemoryTensor(base), readers, inputs, merger=self.merger, surveyed=self.surveyed, chunk=1000
            )


def test_the_global_scope_ranks_all_but_the_embeddings_together() -> None:
    tensors = {
        "model.embed_tokens.weight": make_inputs((50, 16), 2, seed=1),
        "model.layers.0.mlp.up_proj.weight": make_inputs((64, 33), 2, seed=2),
        "model.layers.1.mlp.up_proj.weight": [tensor * 3 for tensor in make_inputs((40, 16), 2, seed=3)],
        "model.norm.weight": make_inputs((16,), 2, seed=4),
        "lm_head.weight": make_inputs((50, 16), 2, seed=5),
    }
    weights, densities = [1.0, 0.5], [0.3, 0.05]
    merger = make_merger("ties", trim_scope="global", density=0.3)
    streams = Streams(merger, tensors, weights, [{}, {"density": 0.05}])
    streams.surveyed = merger.survey(streams)
    ranked = [name for name in tensors if "embed" not in name and "head" not in name]
    together = [
        numpy.concatenate([doubles([tensors[name][model] - tensors[name][0]])[0].ravel() for name in ranked])
        for model in (1, 2)
    ]
    limits = [threshold64(delta, density) for delta, density in zip(together, densities, strict=True)]
    for stream in streams:
        found = torch.cat([part.reshape(-1).clone() for _, part in merged_chunks(merger, stream)])
        inputs = doubles(tensors[stream.name])
        thresholds = limits if stream.name in ranked else None
        expected, _ = ties64(inputs, weights, densities, thresholds=thresholds)
        check_near(found, expected.ravel())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "`density`: must be greater than 0"),
        ({"density": 1.01}, "`density`: must be less than or equal to 1"),
        ({"majority": "frequency"}, "`majority`: must be 'weighted' or 'unweighted'"),
        ({"trim_scope": "row"}, "`trim_scope`: must be 'tensor' or 'global'"),
        ({"densty": 0.5}, "unknown option `densty`; fix: did you mean `density`?"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TIESConfig.parse(options)
    assert message in str(caught.value) and caught.value.exit_code == 2


def test_weights_that_would_blow_up_are_refused() -> None:
    with pytest.raises(ConfigError, match="mixed signs"):
        make_merger("ties").check_weights([1.0, -0.9])
    make_merger("ties", normalize=False).check_weights([1.0, -0.9])
    make_merger("ties", majority="unweighted").check_weights([1.0, -0.9])


def test_chunks_of_any_size_give_the_same_bits() -> None:
    base, *models = make_inputs((300, 70))
    expected = merge("ties", base, models, [0.5, 0.3, 0.2])
    for chunk in (64, 1000, 4096):
        assert merge("ties", base, models, [0.5, 0.3, 0.2], chunk=chunk, name=NAME).equal(expected)
