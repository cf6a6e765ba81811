"""Breadcrumbs and SCE: numbers by hand, limits, and the papers in float64."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergers_helpers import SHAPES, Array, check_bf16, check_near, doubles, make_inputs, merge
from rlhf_plugins.mergers.breadcrumbs import BreadcrumbsConfig, limit_ranks
from rlhf_plugins.mergers.sce import SCEConfig, erase_and_merge, variances
from test_mergers_ties import elect64

from rlhf_core.infra.errors import ConfigError

# Breadcrumbs.


def crumbs64(delta: Array, density: float, gamma: float, scope: str) -> Array:
    """Drop the largest share γ of each row, then keep the largest share β of the row's entries; ties at a limit stay."""
    rows = delta.reshape(-1, delta.shape[-1]) if scope == "row" and delta.ndim else delta.reshape(1, -1)
    kept = numpy.zeros_like(rows)
    for row, out in zip(rows, kept, strict=True):
        ranked = numpy.sort(numpy.abs(row))[::-1]
        rest = ranked[int(gamma * len(ranked) + 1e-9) :]
        rest = rest[: max(1, int(density * len(ranked) + 1e-9))]
        inside = (numpy.abs(row) >= rest[-1]) & (numpy.abs(row) <= rest[0])
        out[inside] = row[inside]
    return kept.reshape(delta.shape)


def breadcrumbs64(
    inputs: list[Array],
    weights: list[float],
    pairs: list[tuple[float, float]],
    scope: str = "row",
    election: str = "none",
) -> Array:
    base, *models = inputs
    kept = [crumbs64(model - base, *pair, scope) for model, pair in zip(models, pairs, strict=True)]
    if election == "ties":
        return base + elect64(kept, weights)[0]
    return base + sum(weight * delta for weight, delta in zip(weights, kept, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("election", ["none", "ties"])
def test_breadcrumbs_equal_float64(shape: tuple[int, ...], scope: str, election: str) -> None:
    inputs, weights = make_inputs(shape), [1.0, 0.5, 0.25]
    for density, gamma in ((0.6, 0.05), (0.98, 0.1), (1.0, 0.0), (0.1, 0.0)):
        options: dict[str, Any] = {"density": density, "gamma": gamma, "scope": scope, "election": election}
        found = merge("breadcrumbs", inputs[0], inputs[1:], weights, **options)
        check_near(found, breadcrumbs64(doubles(inputs), weights, [(density, gamma)] * 3, scope, election))


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_each_model_has_shares_of_its_own(scope: str) -> None:
    inputs, weights = make_inputs((400, 70)), [1.0, -0.5, 0.25]
    each = [{"density": 0.2, "gamma": 0.0}, {"gamma": 0.2}, {}]
    found = merge("breadcrumbs", inputs[0], inputs[1:], weights, each=each, density=0.5, scope=scope)
    check_near(found, breadcrumbs64(doubles(inputs), weights, [(0.2, 0.0), (0.5, 0.2), (0.5, 0.01)], scope))


def test_breadcrumbs_in_bf16_are_the_rounded_float64() -> None:
    def reference(inputs: list[Array], weights: list[float]) -> Array:
        return breadcrumbs64(inputs, weights, [(0.9, 0.01)] * 3)

    check_bf16("breadcrumbs", reference, [1.0, 0.5, 0.25])


def test_breadcrumbs_by_hand() -> None:
    model = torch.tensor([[1.0, -9.0, 3.0, 0.5, 2.0], [5.0, 5.0, 5.0, -5.0, 0.1]])
    # One of five is left out at the top, and the two largest of the rest stay. The second row has four of one size: all stay.
    found = merge("breadcrumbs", torch.zeros(2, 5), [model], [1.0], density=0.4, gamma=0.2)
    assert found.tolist() == [[0.0, 0.0, 3.0, 0.0, 2.0], [5.0, 5.0, 5.0, -5.0, 0.0]]
    # Two of ten, and four of the rest: 9 goes, 5 (five places, of which the first would go) stays, nothing smaller does.
    found = merge("breadcrumbs", torch.zeros(2, 5), [model], [1.0], density=0.4, gamma=0.2, scope="tensor")
    assert found.tolist() == [[0.0, 0.0, 3.0, 0.0, 0.0], [5.0, 5.0, 5.0, -5.0, 0.0]]


def test_a_row_and_a_tensor_of_one_dimension_are_the_same() -> None:
    base, *models = make_inputs((30_011,))
    row, tensor = (merge("breadcrumbs", base, models, [1.0] * 3, scope=scope) for scope in ("row", "tensor"))
    assert row.equal(tensor)


@given(st.integers(1, 10_000), st.floats(0, 0.499), st.floats(1e-6, 1))
def test_the_ranks_that_are_kept(count: int, gamma: float, density: float) -> None:
    first, last = limit_ranks(count, gamma, density)
    assert 1 <= first <= last <= count
    assert abs((first - 1) - gamma * count) <= 1
    assert last == count or abs((last - first + 1) - max(1, density * count)) <= 1


# SCE.


def sce64(inputs: list[Array], weights: list[float], density: float) -> tuple[Array, Array]:
    """Return the merge, and where rounding decides what is selected or which sign is elected."""
    base, *models = inputs
    deltas = numpy.stack([model - base for model in models])
    spread = deltas.var(axis=0)
    limit = numpy.sort(spread.ravel())[::-1][max(1, int(density * spread.size + 1e-9)) - 1]
    selected = deltas * (spread >= limit * (1 - 1e-12))
    sizes = numpy.asarray(weights) * (selected**2).reshape(len(models), -1).mean(axis=1)
    shares = (sizes / sizes.sum() if sizes.sum() else sizes).reshape(-1, *[1] * base.ndim)
    sums = numpy.tensordot(weights, selected, axes=1)
    agrees = (numpy.sign(selected) == numpy.sign(sums)) & (sums != 0)
    bottom = (agrees * shares).sum(0)
    merged = numpy.divide((agrees * shares * selected).sum(0), bottom, out=numpy.zeros_like(sums), where=bottom != 0)
    unclear = (numpy.abs(spread - limit) < 1e-5 * limit) & (spread != limit)
    return base + merged, unclear


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.5, 2.0, 1.0, 0.25]])
def test_sce_equals_float64(shape: tuple[int, ...], weights: list[float]) -> None:
    # Few bits: variances of two or four models are exact in float32 too, and many are at the threshold.
    inputs = make_inputs(shape, len(weights), bits=8)
    inputs = [inputs[0], *(inputs[0] + (number + 1) * (model - inputs[0]) for number, model in enumerate(inputs[1:]))]
    for density in (0.1, 0.5, 1.0):
        found = merge("sce", inputs[0], inputs[1:], weights, density=density)
        check_near(found, sce64(doubles(inputs), weights, density)[0])


def test_sce_of_three_equals_float64() -> None:
    inputs = make_inputs((500, 90))
    found = merge("sce", inputs[0], inputs[1:], [1.0] * 3, density=0.3)
    check_near(found, *sce64(doubles(inputs), [1.0] * 3, 0.3))


def test_sce_in_bf16_is_the_rounded_float64() -> None:
    check_bf16("sce", lambda inputs, weights: sce64(inputs, weights, 0.3)[0], [1.0] * 4, density=0.3)


def test_sce_by_hand() -> None:
    base = torch.zeros(4)
    one, two = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([-1.0, 1.0, 1.0, 4.0])
    # Differences 4, 0, 1, 4: two are selected, (3, 0) and (-1, 4). Shares 9 : 17. Signs of 2 and 4; alone in each.
    assert merge("sce", base, [one, two], [1.0, 1.0], density=0.5).tolist() == [3.0, 0.0, 0.0, 4.0]
    # Three: (3, 2, 0) and (-1, 1, 4), shares 13 : 18, and (13 · 2 + 18 · 1) / 31 where both agree.
    found = merge("sce", base, [one, two], [1.0, 1.0], density=0.75)
    assert found.tolist() == pytest.approx([3.0, 0.0, 44 / 31, 4.0], rel=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8, 1e-12])
def test_sce_knows_no_absolute_size(size: float) -> None:
    models = [model * size * factor for model, factor in zip(make_inputs((30, 70), 2)[1:], (1.0, 3.0), strict=True)]
    inputs = [torch.zeros(30, 70), *models]
    check_near(
        merge("sce", *(inputs[0], inputs[1:]), [1.0, 1.0], density=0.5), *sce64(doubles(inputs), [1.0, 1.0], 0.5)
    )


def test_sce_at_its_limits() -> None:
    base, one, two, _ = make_inputs((30, 40))
    assert merge("sce", base, [base, base], [1.0, 1.0]).equal(base)
    # Nothing varies, so all is at the threshold, and is kept: even what rounding would tell apart.
    noisy = one / 3
    check_near(merge("sce", base, [noisy] * 5, [1.0] * 5, density=0.01), noisy.double().numpy())
    check_near(merge("sce", base, [one], [0.3], density=0.01), one.double().numpy())
    check_near(merge("sce", base, [one, two], [1.0, 0.0], density=1.0), one.double().numpy())
    # Opposite votes cancel.
    assert merge("sce", torch.zeros(3), [torch.ones(3), -torch.ones(3)], [1.0, 1.0], density=1.0).tolist() == [0.0] * 3
    with pytest.raises(ConfigError, match="all negative"):
        merge("sce", base, [one, two], [-1.0, -0.5])


def test_a_small_share_that_agrees_is_divided_by_itself() -> None:
    found = erase_and_merge([torch.tensor([-1.0]), torch.tensor([3.0])], [1.0 - 1e-6, 1e-6], [1.0, 1.0])
    assert found.tolist() == pytest.approx([3.0], rel=1e-6)


@given(st.lists(st.lists(st.floats(-4, 4, width=16), min_size=3, max_size=3), min_size=1, max_size=6))
def test_variances_equal_float64(rows: list[list[float]]) -> None:
    tensors = [torch.tensor(row) for row in rows]
    expected = numpy.var(numpy.asarray(rows), axis=0) * len(rows)
    assert variances(tensors).tolist() == pytest.approx(expected.tolist(), rel=2e-6, abs=1e-30)
    assert variances(tensors[:1] * 4).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (BreadcrumbsConfig, {"density": 0}, "`density`: must be greater than 0"),
        (BreadcrumbsConfig, {"density": 1.1}, "`density`: must be less than or equal to 1"),
        (BreadcrumbsConfig, {"gamma": 0.5}, "`gamma`: must be less than 0.5"),
        (BreadcrumbsConfig, {"gamma": -0.1}, "`gamma`: must be greater than or equal to 0"),
        (BreadcrumbsConfig, {"scope": "global"}, "`scope`: must be 'row' or 'tensor'"),
        (SCEConfig, {"density": 0}, "`density`: must be greater than 0"),
        (SCEConfig, {"density": 2}, "`density`: must be less than or equal to 1"),
        (SCEConfig, {"tau": 0.1}, "unknown option `tau`"),
    ],
)
def test_bad_options_are_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(options)
    assert message in str(caught.value) and caught.value.exit_code == 2


def test_weights_of_mixed_sign_are_refused() -> None:
    base, *models = make_inputs((9,), 2)
    with pytest.raises(ConfigError, match="mixed signs"):
        merge("sce", base, models, [1.0, -0.5])
