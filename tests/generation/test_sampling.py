"""The draw of a token: the distribution, what truncation keeps of it, and what is said of both."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation import sampling as drawing
from rlhf_core.generation.sampling import draw_tokens, kept
from rlhf_core.infra.seeds import completion_seeds, stream_seed

P = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def drawn_at(uniform: float, **options: float) -> tuple[int, float, float, float]:
    found = draw_tokens(P.log(), torch.tensor([uniform], dtype=torch.float64), SamplingConfig(**options))
    return int(found.tokens), float(found.logprobs), float(found.raw_logprobs), float(found.kept_mass)


def test_by_hand() -> None:
    """Cumulative sums in the vocabulary's order: 0.1, 0.5, 0.7, 1."""
    assert [drawn_at(u)[0] for u in (0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 1 - 1e-12)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert drawn_at(0.3)[1:] == pytest.approx((np.log(0.4), np.log(0.4), 1.0), abs=1e-6)
    # The two most likely: 0.4 and 0.3 of 0.7, so 4/7 and 3/7.
    assert [drawn_at(u, top_k=2)[0] for u in (0.0, 0.57, 0.58, 1 - 1e-12)] == [1, 1, 3, 3]
    assert drawn_at(0.3, top_k=2)[1:] == pytest.approx((np.log(4 / 7), np.log(0.4), 0.7), abs=1e-6)
    # 0.4 + 0.3 reach 0.65; of the three most likely (0.9), 0.4 is 0.44 and 0.7 is 0.78.
    assert drawn_at(0.9, top_p=0.65)[1:] == pytest.approx((np.log(3 / 7), np.log(0.3), 0.7), abs=1e-6)
    assert drawn_at(0.9, top_k=3, top_p=0.75)[1:] == pytest.approx((np.log(3 / 7), np.log(0.3), 0.7), abs=1e-6)
    # At temperature 1/2 the weights are squares: 1, 16, 4, 9 of 30.
    assert drawn_at(0.9, temperature=0.5)[1:] == pytest.approx((np.log(9 / 30), np.log(0.3), 1.0), abs=1e-6)
    assert drawn_at(0.9, temperature=0.5, top_k=2)[1:] == pytest.approx(
        (np.log(9 / 25), np.log(0.3), 25 / 30), abs=1e-6
    )
    assert drawn_at(0.9, temperature=0)[:2] == (1, 0.0)
    assert drawn_at(0.9, temperature=1e-300)[:2] == (1, 0.0)


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.5, -torch.inf, -3.0]), min_size=1, max_size=12),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.999, 0.7, 0.3, 1e-6]),
    st.integers(1, 12),
)
def test_truncation_keeps_what_sorting_keeps(logits: list[float], top_k: int, top_p: float, head: int) -> None:
    """Against the plain rule, ties and impossible tokens included, however few tokens are sorted first."""
    logps = torch.tensor([[4.0, *logits]]).log_softmax(-1)
    p = logps[0].double().exp()
    order = sorted(range(len(p)), key=lambda token: (-float(logps[0, token]), token))
    order = order[: top_k or None]
    total = float(p[order].sum()) if top_k else 1.0
    expected, mass = [], 0.0
    for token in order:
        if expected and mass >= top_p * total:
            break
        expected.append(token)
        mass += float(p[token])
    before, drawing.HEAD = drawing.HEAD, head
    try:
        found = kept(logps, top_k, top_p)
    finally:
        drawing.HEAD = before
    if found is None:
        assert top_p == 1 and (top_k == 0 or top_k >= len(p))
        return
    possible = [token for token in expected if p[token] > 0]
    assert [token for token in found[0].nonzero()[:, 0].tolist() if p[token] > 0] == sorted(possible)


@given(st.integers(1, 3 * drawing.SPAN + 1), st.integers(0, 999), st.sampled_from([0.0, 0.5, 0.98]))
def test_the_inverse_is_that_of_one_long_sum(size: int, seed: int, empty: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, size, generator=generator) * (torch.rand(1, size, generator=generator) >= empty)
    weights[0, seed % size] = 1e-3  # one at least can be drawn
    uniform = torch.tensor([0.0, 1 - 2**-53, *torch.rand(20, generator=generator).tolist()], dtype=torch.float64)
    tokens, mass = drawing.invert_cumulative(weights.expand(len(uniform), -1), uniform)
    ends = weights[0].double().cumsum(0)
    assert torch.allclose(mass, ends[-1], rtol=1e-6)
    assert (weights[0, tokens] > 0).all()
    target = uniform * ends[-1]
    slack = 1e-5 * ends[-1]  # what lies this near to a token's end may fall to its neighbour
    assert (target < ends[tokens] + slack).all() and (target > ends[tokens] - weights[0, tokens] - slack).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8, "temperature": 1.5}])
def test_frequencies_are_the_probabilities(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 20, generator=generator) * 2
    count = 40_000
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    found = draw_tokens(logits.expand(count, -1), uniform, SamplingConfig(**options))
    share = torch.bincount(found.tokens, minlength=20) / count
    told = torch.zeros(20).scatter_(0, found.tokens, found.logprobs.exp())
    assert float(told.sum()) == pytest.approx(1, abs=1e-3)
    # Three standard deviations of a share; all were drawn but the rarest.
    assert ((share - told).abs() < 3.5 * (told * (1 - told) / count).sqrt() + 1e-4).all()


def test_seeds_are_functions_of_row_occurrence_and_sample() -> None:
    one, two, again = completion_seeds(3, "rollout", 5, rows=[7, 8, 7], n=2)
    assert one == [stream_seed(3, "rollout", 5, 7, 0, 0), stream_seed(3, "rollout", 5, 7, 0, 1)]
    assert again == [stream_seed(3, "rollout", 5, 7, 1, 0), stream_seed(3, "rollout", 5, 7, 1, 1)]
    assert completion_seeds(3, "rollout", 5, rows=[8], n=3)[0][:2] == two
    assert len({seed for each in (one, two, again) for seed in each}) == 6
    assert completion_seeds(3, "rollout", 6, rows=[7], n=2) != [one]
    # A row at two places draws apart, whichever process holds it, and again where it is drawn for a second time.
    met: Counter[tuple[int, ...]] = Counter()
    first, second = completion_seeds(3, "rollout", 5, rows=[7, 7], places=[2, 9], n=1, met=met)
    assert [first] == completion_seeds(3, "rollout", 5, rows=[7], places=[2], n=1) != [second]
    assert [second] == completion_seeds(3, "rollout", 5, rows=[7], places=[9], n=1)
    assert completion_seeds(3, "rollout", 5, rows=[7], places=[9], n=1, met=met) != [second]
