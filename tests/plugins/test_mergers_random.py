"""DARE and DELLA: what is dropped, by statistics and by bits; numbers by hand; sums and elections in float64; PEFT's pieces."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergers_helpers import NAME, SHAPES, Array, check_near, doubles, kept_of, make_inputs, merge
from rlhf_plugins.mergers.dare import DAREConfig, drop
from rlhf_plugins.mergers.della import DELLAConfig, keep_bounds, magprune, row_order
from test_mergers_ties import elect64, peft, threshold64
from torch import Tensor

from rlhf_core.infra.errors import ConfigError

METHODS: dict[str, dict[str, Any]] = {"dare": {"density": 0.3}, "della": {"density": 0.4, "epsilon": 0.3}}


def within(found: float, expected: float, sigma: float) -> None:
    assert abs(found - expected) < 5 * sigma, f"{found} is {abs(found - expected) / sigma:.1f} sigma from {expected}"


# What is dropped.


@pytest.mark.parametrize("density", [0.9, 0.5, 0.1, 0.003])
def test_dare_keeps_its_share_and_the_mean(density: float) -> None:
    base = torch.zeros(400_000)
    model = make_inputs((400_000,), 1)[1].abs().clamp_min(1e-3)
    found = merge("dare", base, [model], [1.0], density=density) / model
    share = round(density * 65536) / 65536
    kept = found != 0
    sigma = math.sqrt(share * (1 - share) / found.numel())
    within(float(kept.float().mean()), share, sigma)
    # What is kept is divided by exactly the probability of keeping it.
    assert float((found[kept] * share - 1).abs().max()) < 3e-7
    within(float(found.double().mean()), 1.0, sigma / share)


@pytest.mark.parametrize("shape", [(2000, 200), (400, 3, 333), (199_999,)])
def test_della_keeps_by_rank_and_the_mean_of_each_decile(shape: tuple[int, ...]) -> None:
    density, epsilon = 0.4, 0.5
    base = torch.zeros(shape)
    model = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = merge("della", base, [model], [1.0], density=density, epsilon=epsilon, election="none") / model
    columns = shape[-1]
    order = model.abs().reshape(-1, columns).argsort(dim=-1, stable=True)
    ranks = order.argsort(-1).double()
    probability = (density - epsilon / 2 + epsilon * ranks / (columns - 1)).view(shape)
    kept = found != 0
    decile = (10 * ranks / columns).long().view(shape)
    for part in range(10):
        inside = decile == part
        count = int(inside.sum())
        p = probability[inside]
        within(float(kept[inside].double().mean()), float(p.mean()), math.sqrt(float((p * (1 - p)).mean()) / count))
        within(float(found[inside].double().mean()), 1.0, math.sqrt(float(((1 - p) / p).mean()) / count))
    # Divided by its own probability, whichever it was drawn with.
    assert float((found[kept] * probability[kept] - 1).abs().max()) < 2e-4  # 2⁻¹⁷ / 0.15, the rounding of p


def test_the_probabilities_of_ranks() -> None:
    assert (keep_bounds(5, 0.5, 0.4) / 65536).tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7], abs=2**-17)
    assert keep_bounds(1, 0.25, 0.4).tolist() == [16384]
    assert keep_bounds(3, 1.0, 0.0).tolist() == [65536] * 3
    assert keep_bounds(2, 0.5, 1.0 - 1e-8).tolist() == [1, 65536]


def dropped(delta: Tensor, words: Tensor, density: float) -> list[float]:
    left, factor = drop(delta.clone(), words, density)
    found: list[float] = (left * factor).tolist()
    return found


def test_golden_numbers() -> None:
    words = torch.tensor([-32768, -1, 0, 32767], dtype=torch.int16)
    delta = torch.tensor([1.0, 2.0, -3.0, 4.0])
    # Half of the words, -32768 … -1, keep; what stays is doubled.
    assert dropped(delta, words, 0.5) == [2.0, 4.0, 0.0, 0.0]
    assert dropped(delta, words, 0.75) == pytest.approx([4 / 3, 8 / 3, -4.0, 0.0])
    assert dropped(delta, words, 1.0) == delta.tolist()
    assert dropped(delta, words, 1e-9) == [65536.0, 0.0, 0.0, 0.0]
    # Ranks of (2, -1, 4, 3) are 1, 0, 3, 2, kept below 1/4, 5/12, 7/12, 3/4; words by rank: -1 isn't below 1/4 - 1/2, ….
    row, words = torch.tensor([[2.0, -1.0, 4.0, 3.0]]), torch.tensor([[-1, -32768, 0, 32767]], dtype=torch.int16)
    found = magprune(row.clone(), words, 0.5, 0.5)
    assert found.tolist() == [pytest.approx([2 * 12 / 5, 0.0, 0.0, 3 * 12 / 7], rel=1e-4)]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 1e-40]), min_size=7, max_size=7), min_size=1, max_size=5))
def test_equal_sizes_rank_from_left_to_right(rows: list[list[float]]) -> None:
    sizes = torch.tensor(rows)
    assert row_order(sizes).equal(sizes.sort(dim=-1, stable=True).indices)


def test_density_one_drops_nothing() -> None:
    inputs = make_inputs((40, 33))
    for method in METHODS:
        rest = {"epsilon": 0.0} if method == "della" else {}
        for election, expected in (("none", "task_arithmetic"), ("ties", "ties")):
            options = {"density": 1.0} if expected == "ties" else {}
            found = merge(method, inputs[0], inputs[1:], [0.5, 0.3, 0.7], density=1.0, election=election, **rest)
            assert found.equal(merge(expected, inputs[0], inputs[1:], [0.5, 0.3, 0.7], **options))


def test_della_without_width_is_dare_in_distribution() -> None:
    base, model = make_inputs((500, 400), 1)
    kept = kept_of("della", base, model, density=0.3, epsilon=0.0)
    moved = (model != base).numpy()
    within(float(kept[moved].mean()), 0.3, math.sqrt(0.21 / kept.size))


# What is drawn.


@pytest.mark.parametrize("method", METHODS)
def test_draws_are_a_function_of_seed_name_and_model(method: str) -> None:
    options = METHODS[method]
    base, one, two, _ = make_inputs((300, 70))
    first = kept_of(method, base, one, **options)
    assert (kept_of(method, base, one, **options) == first).all()
    others = [
        kept_of(method, base, one, **options, seed=1),
        kept_of(method, base, two, **options),
        (merge(method, base, [one], [1.0], name="other", **{**options, "election": "none"}) != base).numpy(),
    ]
    share = options["density"]
    for other in others:  # independent: both keep share² of the entries
        both = float((first & other).mean())
        within(both, float(first.mean()) * share, 2 * math.sqrt(share**2 / first.size))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(301, 67), (7, 5, 33), (20_011,)])
def test_chunks_of_any_size_give_the_same_bits(method: str, shape: tuple[int, ...]) -> None:
    base, *models = make_inputs(shape)
    expected = merge(method, base, models, [0.5, 0.3, 0.2], **METHODS[method])
    for chunk in (4, 1000, 4097, 1 << 20):
        assert merge(method, base, models, [0.5, 0.3, 0.2], chunk=chunk, name=NAME, **METHODS[method]).equal(expected)


def test_copies_of_one_model_draw_for_themselves() -> None:
    base, model = make_inputs((300, 300), 1)
    found = merge("dare", base, [model, model], [0.5, 0.5], density=0.5)
    share = (found - base)[model != base] / (model - base)[model != base]
    # 0, 1 or 2 of two independent coins, never only both or none.
    counts = [float(((share - value).abs() < 0.01).float().mean()) for value in (0.0, 1.0, 2.0)]
    for count, expected in zip(counts, (0.25, 0.5, 0.25), strict=True):
        within(count, expected, math.sqrt(expected * (1 - expected) / share.numel()))


# What is made of the rest.


def thinned64(method: str, inputs: list[Tensor], each: list[dict[str, float]], **options: Any) -> list[Array]:
    """Task vectors in float64, without the entries that the method dropped, the rest divided by their probability."""
    base, *models = inputs
    deltas = [model - start for model, start in zip(doubles(models), doubles([base] * len(models)), strict=True)]
    kept = []
    for delta, model, own in zip(deltas, models, each, strict=True):
        given = {**options, **own}
        mask = kept_of(method, base, model, **given)
        share: Any = given["density"]
        if method == "della" and delta.ndim and delta.shape[-1] > 1:
            order = numpy.argsort(numpy.abs(delta), axis=-1, kind="stable")
            ranks = numpy.argsort(order, axis=-1, kind="stable")
            share = share + given["epsilon"] * (ranks / (delta.shape[-1] - 1) - 0.5)
        kept.append(numpy.where(mask, delta / (numpy.round(numpy.asarray(share) * 65536) / 65536), 0.0))
    return kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("election", ["none", "ties"])
@pytest.mark.parametrize("normalize", [None, True, False])
def test_the_paper_in_float64(method: str, shape: tuple[int, ...], election: str, normalize: bool | None) -> None:
    inputs, weights, scale = make_inputs(shape), [1.0, 0.5, 0.25], 0.7
    options = METHODS[method]
    each: list[dict[str, float]] = [{"density": 0.6}, {}, {}]
    deltas = thinned64(method, inputs, each, **options)
    if election == "ties":
        merged, _ = elect64(deltas, weights, normalize=normalize is not False)
    else:
        merged = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
        merged = merged / sum(weights) if normalize else merged
    found = merge(
        method,
        inputs[0],
        inputs[1:],
        weights,
        each=each,
        election=election,
        normalize=normalize,
        scale=scale,
        **options,
    )
    check_near(found, doubles(inputs[:1])[0] + scale * merged)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_the_rounded_float64(method: str) -> None:
    inputs = [tensor.bfloat16().float() for tensor in make_inputs((512, 200))]
    options = {**METHODS[method], "election": "ties"}
    found = merge(method, inputs[0].bfloat16(), [model.bfloat16() for model in inputs[1:]], [1.0] * 3, **options)
    merged, _ = elect64(thinned64(method, inputs, [{}] * 3, **METHODS[method]), [1.0] * 3)
    expected = torch.from_numpy(doubles(inputs[:1])[0] + merged).bfloat16()
    assert float((found.bfloat16() != expected).float().mean()) < 0.002


def test_dare_trims_before_it_drops() -> None:
    base, model = make_inputs((300, 70), 1)
    delta = (model - base).numpy()
    limit = threshold64(delta, 0.2)
    whole, trimmed = (kept_of("dare", base, model, density=0.5, trim=share) for share in (1.0, 0.2))
    assert (trimmed == (whole & (numpy.abs(delta) >= limit))).all()
    own = merge("dare", base, [model], [1.0], each=[{"trim": 0.2}], density=0.5)
    assert own.equal(merge("dare", base, [model], [1.0], density=0.5, trim=0.2))


def test_trimming_alone_equals_peft() -> None:
    deltas, weights = (
        [torch.randn(300, 70, generator=torch.Generator().manual_seed(n)) for n in range(3)],
        [0.5, 0.3, 2.0],
    )
    theirs = peft("magnitude_prune")([delta.double() for delta in deltas], torch.tensor(weights).double(), 0.25)
    check_near(merge("dare", torch.zeros(300, 70), deltas, weights, density=1.0, trim=0.25), theirs.numpy())


@pytest.mark.parametrize(("function", "election", "weights"), [
    ("dare_linear", "none", [0.5, 0.3, 2.0]),
    ("dare_ties", "ties", [1.0, 1.0, 1.0]),  # PEFT elects without weights
])  # fmt: skip
def test_dare_equals_peft_where_it_drops_the_same(
    function: str, election: str, weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = [torch.randn(300, 70, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    base = torch.zeros(300, 70)
    masks = iter([torch.from_numpy(kept_of("dare", base, delta, density=0.25)).double() for delta in deltas])
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(masks))
    theirs = peft(function)([delta.double() for delta in deltas], torch.tensor(weights).double(), 0.25)
    check_near(merge("dare", base, deltas, weights, density=0.25, election=election), theirs.numpy())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DAREConfig, {"density": 0}, "`density`: must be greater than 0"),
        (DAREConfig, {"density": 1.5}, "`density`: must be less than or equal to 1"),
        (DAREConfig, {"trim": 0}, "`trim`: must be greater than 0"),
        (DAREConfig, {"seed": -1}, "`seed`: must be greater than or equal to 0"),
        (DAREConfig, {"election": "sum"}, "`election`: must be 'none' or 'ties'"),
        (DAREConfig, {"epsilon": 0.1}, "unknown option `epsilon`"),
        (DELLAConfig, {"density": 0}, "`density`: must be greater than 0"),
        (DELLAConfig, {"density": 0.1, "epsilon": 0.2}, "density ± epsilon / 2 must lie in (0, 1], and is 0 … 0.2"),
        (
            DELLAConfig,
            {"density": 0.95, "epsilon": 0.2},
            "density ± epsilon / 2 must lie in (0, 1], and is 0.85 … 1.05",
        ),
        (DELLAConfig, {"epsilon": -0.1}, "`epsilon`: must be greater than or equal to 0"),
    ],
)
def test_bad_options_are_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(options)
    assert message in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("method", ["dare", "della", "breadcrumbs"])
def test_weights_are_checked_where_they_divide(method: str) -> None:
    inputs = make_inputs((9,), 2)
    for options in ({"election": "ties"}, {"election": "none", "normalize": True}):
        with pytest.raises(ConfigError, match="mixed signs"):
            merge(method, inputs[0], inputs[1:], [1.0, -0.5], **options)
    for options in ({"election": "none"}, {"election": "ties", "normalize": False}):
        merge(method, inputs[0], inputs[1:], [1.0, -0.5], **options)
