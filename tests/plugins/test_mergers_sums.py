"""Linear, uniform soup, task arithmetic and model stock: numbers by hand, limits, and the papers' formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergers_helpers import SHAPES, Array, check_bf16, check_near, doubles, make_inputs, make_merger, merge
from rlhf_plugins.mergers.gram import cosines, gram_matrix
from rlhf_plugins.mergers.model_stock import stock_ratio

from rlhf_core.infra.errors import ConfigError, ModelError

WEIGHTS = [0.5, 0.3, 0.7]


def linear64(inputs: list[Array], weights: list[float]) -> Array:
    return numpy.average(inputs[1:], axis=0, weights=weights)


def tasks64(inputs: list[Array], weights: list[float], scale: float = 0.4) -> Array:
    base, *models = inputs
    return base + scale * sum(weight * (model - base) for weight, model in zip(weights, models, strict=True))


def stock64(inputs: list[Array], weights: list[float]) -> Array:
    base, *models = inputs
    moved = [(model - base).ravel() for model in models]
    count, pairs = len(moved), []
    for i in range(count):
        for j in range(i):
            size = numpy.linalg.norm(moved[i]) * numpy.linalg.norm(moved[j])
            pairs.append(moved[i] @ moved[j] / size if size else 0.0)
    cosine = max(0.0, sum(pairs) / len(pairs))
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * numpy.mean(models, axis=0) + (1 - t) * base


REFERENCES: dict[str, tuple[Any, list[float], dict[str, Any]]] = {
    "linear": (linear64, WEIGHTS, {}),
    "uniform_soup": (linear64, [1.0, 1.0, 1.0], {}),
    "task_arithmetic": (tasks64, [0.5, -0.3, 1.7], {"scale": 0.4}),
    "model_stock": (stock64, [1.0, 1.0, 1.0], {}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", REFERENCES)
def test_the_formula_in_float64(method: str, shape: tuple[int, ...]) -> None:
    reference, weights, options = REFERENCES[method]
    inputs = make_inputs(shape)
    # Models that share a direction, as those trained alike do: only then is there something between the base and their mean.
    if method == "model_stock":
        common = make_inputs(shape, 1, seed=9)
        inputs = [inputs[0], *(model + (common[1] - common[0]) for model in inputs[1:])]
    found = merge(method, inputs[0], inputs[1:], weights, **options)
    check_near(found, reference(doubles(inputs), weights))


@pytest.mark.parametrize("method", REFERENCES)
def test_bf16_is_the_rounded_float64(method: str) -> None:
    reference, weights, options = REFERENCES[method]
    check_bf16(method, reference, weights, **options)


def test_golden_numbers() -> None:
    base, one, two = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5.0])
    # (3 + 3 · 1) / 4 and (1 + 3 · 5) / 4
    assert merge("linear", None, [one, two], [1.0, 3.0]).tolist() == [1.5, 4.0]
    assert merge("linear", None, [one, two], [1.0, 3.0], normalize=False).tolist() == [6.0, 16.0]
    assert merge("uniform_soup", None, [one, two], [0.5, 0.5]).tolist() == [2.0, 3.0]
    # 1 + 0.5 · 2 and 1 + 0.5 · 0.25 · 4
    assert merge("task_arithmetic", base, [one, two], [1.0, 0.25], scale=0.5).tolist() == [2.0, 1.5]
    # Task vectors (2, 0) and (2, 2): c = 1/√2, t = 2c / (1 + c) = 2 / (1 + √2); the mean is 1 + (2, 1).
    t = 2 / (1 + 2**0.5)
    found = merge("model_stock", base, [one, torch.tensor([3.0, 3.0])], [1.0, 1.0])
    assert found.tolist() == pytest.approx([1 + 2 * t, 1 + t], rel=1e-6)


def test_a_negative_weight_takes_a_task_away() -> None:
    base, model = make_inputs((50,), 1)
    found = merge("task_arithmetic", base, [model, model], [1.0, -1.0])
    assert found.equal(base)


def test_model_stock_at_its_limits() -> None:
    base, one, *_ = make_inputs((4, 50))
    move = one - base
    assert merge("model_stock", base, [base, base], [1.0, 1.0]).equal(base)
    # Right angles and opposite directions leave nothing; one direction leaves the mean.
    left, right = move.clone(), move.clone()
    left[:2], right[2:] = 0, 0
    assert merge("model_stock", base, [base + left, base + right], [1.0, 1.0]).equal(base)
    assert merge("model_stock", base, [base + move, base - move], [1.0, 1.0]).equal(base)
    assert merge("model_stock", base, [base + move, base - 0.5 * move, base], [1.0, 1.0, 1.0]).equal(base)
    check_near(merge("model_stock", base, [one] * 3, [1.0] * 3), one.double().numpy())
    check_near(
        merge("model_stock", base, [base + move, base + 3 * move], [1.0] * 2), (base + 2 * move).double().numpy()
    )


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8, 1e-12])
def test_model_stock_knows_no_absolute_size(size: float) -> None:
    base = torch.zeros(3, 70)
    common, *others = make_inputs((3, 70), 2, seed=3)
    moves = [(common + other) * size for other in others]
    expected = stock64(doubles([base, *moves]), [1.0, 1.0])
    check_near(merge("model_stock", base, moves, [1.0, 1.0]), expected)


@given(st.integers(2, 6), st.floats(0.0, 1.0))
def test_the_ratio_of_equal_angles(count: int, cosine: float) -> None:
    gram = numpy.full((count, count), cosine) + (1 - cosine) * numpy.eye(count)
    assert stock_ratio(gram * 1e-20) == pytest.approx(count * cosine / (1 + (count - 1) * cosine), abs=1e-12)


def test_inner_products_equal_float64() -> None:
    vectors = make_inputs((200_003,), 3)
    chunks = [[vector[start : start + 65536].clone() for vector in vectors] for start in range(0, 200_003, 65536)]
    stacked = numpy.stack(doubles(vectors))
    expected = stacked @ stacked.T
    assert numpy.abs(gram_matrix(chunks) - expected).max() < 1e-8 * expected.max()
    assert numpy.abs(cosines(expected) - numpy.corrcoef(stacked)).max() < 0.01
    assert cosines(numpy.array([[4.0, 0.0], [0.0, 0.0]])).tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("method", ["uniform_soup", "model_stock"])
def test_weights_that_differ_are_refused(method: str) -> None:
    merger = make_merger(method)
    merger.check_weights([2.0, 2.0, 2.0])
    with pytest.raises(
        ConfigError,
        match=f"`{method}` doesn't take weights: all models count equally; got 1, 0.5; fix: leave the weights out",
    ):
        merger.check_weights([1.0, 0.5])


@pytest.mark.parametrize(("weights", "message"), [([1.0, -1.0], "sum to zero"), ([2.0, -0.5], "mixed signs")])
def test_weights_that_have_no_mean_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_merger("linear").check_weights(weights)
    make_merger("linear", normalize=False).check_weights(weights)
    make_merger("task_arithmetic").check_weights(weights)


def test_a_tensor_of_another_shape_is_named() -> None:
    with pytest.raises(ModelError, match=r"tensor `w` has another shape .* got \(3, 2\), not \(2, 3\)"):
        merge("linear", None, [torch.ones(2, 3), torch.ones(3, 2)], [1.0, 1.0], name="w")
    with pytest.raises(ModelError, match=r"got \(6,\), not \(2, 3\)"):
        merge("task_arithmetic", torch.ones(6), [torch.ones(2, 3)], [1.0], name="w")


def test_unknown_options_are_refused() -> None:
    for method in ("uniform_soup", "model_stock", "slerp", "karcher"):
        with pytest.raises(ConfigError, match="unknown option `density`"):
            make_merger(method, density=0.5)
