"""Slerp and the Karcher mean: numbers by hand, limits, and both on whole vectors in float64."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergers_helpers import SHAPES, Array, check_bf16, check_near, doubles, make_inputs, make_merger, merge
from rlhf_plugins.mergers.karcher import karcher
from rlhf_plugins.mergers.slerp import slerp
from torch import Tensor

from rlhf_core.infra.errors import ConfigError


def slerp64(one: Array, two: Array, t: float) -> Array:
    sizes = numpy.linalg.norm(one) * numpy.linalg.norm(two)
    cosine = float((one.ravel() / numpy.linalg.norm(one)) @ (two.ravel() / numpy.linalg.norm(two))) if sizes else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    angle = numpy.arccos(cosine)
    return (numpy.sin((1 - t) * angle) * one + numpy.sin(t * angle) * two) / numpy.sin(angle)


def karcher64(models: list[Array], weights: list[float]) -> Array:
    """The fixed point of m ← exp_m(Σ wᵢ log_m(uᵢ)), on whole vectors."""
    shares = numpy.asarray(weights) / sum(weights)
    norms = [numpy.linalg.norm(model) for model in models]
    units = [model.ravel() / norm for model, norm in zip(models, norms, strict=True)]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    mean /= numpy.linalg.norm(mean)
    for _ in range(500):
        step = numpy.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            across = unit - (unit @ mean) * mean
            length = numpy.linalg.norm(across)
            if length > 0:
                step += share * numpy.arctan2(length, unit @ mean) * across / length
        angle = numpy.linalg.norm(step)
        if angle < 1e-14:
            break
        mean = numpy.cos(angle) * mean + numpy.sin(angle) * step / angle
        mean /= numpy.linalg.norm(mean)
    return (mean * (shares @ norms)).reshape(models[0].shape)


def spread_inputs(shape: tuple[int, ...], models: int, apart: float) -> list[Tensor]:
    """Vectors around a common one, each at an angle of about arctan(apart) to it, and of norms of their own."""
    base, *moved = make_inputs(shape, models, bits=12)
    return [(base + 10 * apart * (model - base)) * (1 + number / 4) for number, model in enumerate(moved)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.9], [1.0, 0.0]])
@pytest.mark.parametrize("apart", [0.001, 0.1, 3.0])
def test_slerp_equals_float64(shape: tuple[int, ...], weights: list[float], apart: float) -> None:
    models = spread_inputs(shape, 2, apart)
    expected = slerp64(*doubles(models), weights[1] / sum(weights))
    check_near(merge("slerp", None, models, weights), expected)
    # Where there are two models, a base plays no part.
    check_near(merge("slerp", models[0] + 1, models, weights), expected)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_from_the_base(t: float) -> None:
    base, model = spread_inputs((300, 70), 2, 0.5)
    check_near(merge("slerp", base, [model], [t]), slerp64(*doubles([base, model]), t))


def test_slerp_by_hand() -> None:
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert merge("slerp", None, [one, two], [1.0, 1.0]).tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert merge("slerp", None, [one, two], [2.0, 1.0]).tolist() == pytest.approx([math.sqrt(3) / 2, 0.5])
    # Lengths stay as they are: the vectors, not their directions, are interpolated.
    found = merge("slerp", None, [2 * one, 4 * two], [1.0, 1.0])
    assert found.tolist() == pytest.approx([2 * math.sqrt(0.5), 4 * math.sqrt(0.5)])


def test_slerp_is_a_line_where_there_is_no_arc() -> None:
    one, *_ = make_inputs((33,))
    zero = torch.zeros(33)
    assert merge("slerp", None, [one, zero], [0.5, 0.5]).equal(one / 2)
    assert merge("slerp", None, [zero, zero], [0.5, 0.5]).equal(zero)
    assert merge("slerp", None, [one, -one], [0.75, 0.25]).equal(one / 2)
    assert merge("slerp", None, [one, one], [0.75, 0.25]).equal(one)
    for cosine, factor in ((0.9996, 0.5), (0.9994, math.sin(math.acos(0.9994) / 2) / math.sin(math.acos(0.9994)))):
        assert slerp(numpy.array([[1.0, cosine], [cosine, 1.0]]), [0.5, 0.5]) == pytest.approx([factor] * 2, rel=1e-12)


def test_what_slerp_refuses() -> None:
    one = torch.ones(3)
    with pytest.raises(ConfigError, match="`slerp` needs two models, or a base and one model"):
        merge("slerp", None, [one], [0.5])
    with pytest.raises(ConfigError, match=r"from 0 \(the base\) to 1 \(the model\); got 1.5"):
        make_merger("slerp").check_weights([1.5])
    with pytest.raises(ConfigError, match="mixed signs"):
        make_merger("slerp").check_weights([1.0, -0.5])
    assert make_merger("slerp").models == (1, 2)


@pytest.mark.parametrize("shape", SHAPES[:-2])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 0.7, 0.1, 0.4]])
@pytest.mark.parametrize("apart", [0.001, 0.1, 1.0, 10.0])
def test_the_karcher_mean_equals_float64(shape: tuple[int, ...], weights: list[float], apart: float) -> None:
    models = spread_inputs(shape, len(weights), apart)
    check_near(merge("karcher", None, models, weights), karcher64(doubles(models), weights))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.2, 0.8]])
def test_the_karcher_mean_of_two_of_one_norm_is_slerp(weights: list[float]) -> None:
    one, two = doubles(spread_inputs((300, 70), 2, 0.5))
    two = two * (numpy.linalg.norm(one) / numpy.linalg.norm(two))
    models = [torch.from_numpy(one).float(), torch.from_numpy(two).float()]
    found, other = merge("karcher", None, models, weights), merge("slerp", None, models, weights)
    check_near(found, other.double().numpy())


def test_the_karcher_mean_by_hand() -> None:
    x, y, z = torch.eye(3)
    # Thirds of a right-angled triangle on the sphere: its centre.
    assert merge("karcher", None, [x, y, z], [1.0] * 3).tolist() == pytest.approx([1 / math.sqrt(3)] * 3, rel=1e-6)
    assert merge("karcher", None, [x, y], [2.0, 1.0]).tolist() == pytest.approx([math.sqrt(3) / 2, 0.5, 0.0], rel=1e-6)
    # The norm is the mean of 1 and 3, the direction the middle.
    assert merge("karcher", None, [x, 3 * y], [1.0, 1.0]).tolist() == pytest.approx(
        [math.sqrt(2)] * 2 + [0.0], rel=1e-6
    )


def test_the_karcher_mean_at_its_limits() -> None:
    base, one, two, _ = make_inputs((33,))
    zero = torch.zeros(33)
    assert merge("karcher", None, [zero, zero], [1.0, 1.0]).equal(zero)
    check_near(merge("karcher", None, [one, one, one], [0.5, 0.3, 0.2]), one.double().numpy())
    check_near(merge("karcher", None, [one, two], [1.0, 0.0]), one.double().numpy())
    check_near(merge("karcher", None, [one, two, zero], [-1.0, -1.0, -0.0]), karcher64(doubles([one, two]), [1.0, 1.0]))
    # A zero vector has no direction, and its norm counts.
    check_near(merge("karcher", None, [one, zero], [0.75, 0.25]), 0.75 * one.double().numpy())
    # Opposite directions have no mean: the straight line.
    check_near(merge("karcher", None, [base, -base], [0.75, 0.25]), 0.5 * base.double().numpy())
    assert merge("karcher", None, [base, -base], [0.5, 0.5]).equal(zero)
    check_near(merge("karcher", None, [torch.tensor([2.0]), torch.tensor([-1.0])], [0.5, 0.5]), numpy.array([0.5]))
    check_near(merge("karcher", None, [torch.tensor([2.0]), torch.tensor([1.0])], [0.5, 0.5]), numpy.array([1.5]))


@pytest.mark.parametrize("count", [2, 5])
def test_the_norm_is_the_mean_of_norms_in_bf16_too(count: int) -> None:
    models = [model.bfloat16() for model in spread_inputs((400, 300), count, 1.0)]
    found = merge("karcher", None, models, [1.0] * count)
    norms = [float(model.double().norm()) for model in models]
    assert float(found.double().norm()) == pytest.approx(sum(norms) / count, rel=1e-6)


def test_bf16_is_the_rounded_float64() -> None:
    check_bf16("slerp", lambda inputs, weights: slerp64(*inputs[1:], 0.3), [0.7, 0.3])
    check_bf16("karcher", lambda inputs, weights: karcher64(inputs[1:], weights), [0.5, 0.3, 0.2])


@given(
    st.lists(
        st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 4), st.floats(0.05, 1)), min_size=1, max_size=6
    ),
    st.sampled_from([1.0, 1e-9]),
)
def test_any_directions_of_a_half_space(rows: list[tuple[float, float, float, float]], size: float) -> None:
    vectors = [numpy.array(row[:3]) * size * (number + 1) for number, row in enumerate(rows)]
    weights = [row[3] for row in rows]
    stacked = numpy.stack(vectors)
    factors = karcher(stacked @ stacked.T, (numpy.asarray(weights) / sum(weights)).tolist())
    expected = karcher64(vectors, weights)
    assert numpy.abs(factors @ stacked - expected).max() <= 1e-6 * numpy.abs(expected).max()
