"""The draw of a token: the distribution, what truncation keeps of it, and what is said of both."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation import sampling as drawing
from rlhf_core.generation.sampling import Barred, Drawn, draw_tokens
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


def oracle(
    logits: Tensor, seen: Tensor | None, sampling: SamplingConfig, barred: Sequence[int] = (), *, small: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (V,) float64 the probabilities that transformers' processors leave of logits (V,), and the share that they keep."""
    scores, ids = logits[None].float(), torch.zeros(1, 0, dtype=torch.long)
    if seen is not None:
        ids, scores = seen[None], RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen[None], scores)
    scores = scores / sampling.temperature
    whole = scores.double().softmax(-1)
    scores[:, list(barred)] = -torch.inf
    steps: list[Any] = []
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    for step in steps:
        p = scores.double().softmax(-1)
        reached = p.sort(descending=False).values.cumsum(-1)
        margin = float((reached - (1 - sampling.top_p)).abs().min()) if isinstance(step, TopPLogitsWarper) else 1.0
        assert small or margin > 5e-7, "rounding decides which token is the last: choose another case"
        if small:  # what rounding decides isn't compared
            assume(margin > 1e-5)
            assume(not isinstance(step, MinPLogitsWarper) or float((p / p.max() - sampling.min_p).abs().min()) > 1e-5)
        # The order of equal logits is torch's choice; a stable one is chosen here.
        with mock.patch("torch.sort", functools.partial(torch.sort, stable=True)):
            scores = step(ids, scores)
    kept = whole.where(scores > -torch.inf, 0)[0]
    return kept / kept.sum(), kept.sum()


def assert_drawn_as_by(
    expected: Tensor, share: Tensor, logits: Tensor, sampling: SamplingConfig, **options: Any
) -> None:
    """Draw every token that may be drawn, from the middle of its stretch of the cumulative distribution, and compare."""
    tokens = (expected > 1e-6).nonzero()[:, 0]
    middle = expected.cumsum(0)[tokens] - expected[tokens] / 2
    rows = len(tokens)
    if "seen" in options:
        options["seen"] = options["seen"].expand(rows, -1)
    if "barred" in options:
        ids = torch.tensor(options["barred"])
        options["barred"] = Barred(ids, torch.ones(rows, len(ids), dtype=torch.bool))
    found = draw_tokens(logits.expand(rows, -1), middle, sampling, **options)
    assert found.tokens.tolist() == tokens.tolist()
    assert torch.allclose(found.logprobs.double(), expected[tokens].log(), atol=1e-5)
    assert torch.allclose(found.raw_logprobs.double(), logits.double().log_softmax(-1)[tokens], atol=1e-5)
    assert torch.allclose(found.kept_mass.double(), share, atol=1e-5)


def test_ties_with_the_last_of_top_k_beyond_those_sorted_first_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p is a share of all tokens that top-k keeps, of those that are as likely as the k-th, too."""
    monkeypatch.setattr(drawing, "HEAD", 1)
    logits = torch.tensor([4.0, *[0.0] * 12, *[1.125] * 4])
    sampling = SamplingConfig(temperature=0.6, top_k=2, top_p=0.97)
    expected, share = oracle(logits, None, sampling, (), small=True)
    assert (expected > 0).sum() == 2
    assert_drawn_as_by(expected, share, logits, sampling)


@given(data=st.data())
def test_the_distribution_is_that_of_transformers_processors(data: st.DataObject) -> None:
    """With ties, impossible tokens, seen and barred ones; however few tokens are sorted first, and in both number formats."""
    values = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.5, -torch.inf, -3.0, 1.125, -0.75])
    logits = torch.tensor([4.0, *data.draw(st.lists(values, min_size=1, max_size=40))])
    logits = logits[torch.tensor(data.draw(st.permutations(range(len(logits)))))]
    options: dict[str, Any] = {
        "temperature": data.draw(st.sampled_from([1.0, 0.6, 1.7])),
        "top_k": data.draw(st.integers(0, 14)),
        "top_p": data.draw(st.sampled_from([1.0, 0.97, 0.7, 0.3, 1e-3])),
        "min_p": data.draw(st.sampled_from([0.0, 0.0, 0.013, 0.21])),
    }
    chosen: dict[str, Any] = {}
    token = st.integers(0, len(logits) - 1)
    if data.draw(st.booleans()):
        options["repetition_penalty"] = data.draw(st.sampled_from([0.7, 1.3, 2.0]))
        chosen["seen"] = torch.tensor(data.draw(st.lists(token, min_size=1, max_size=5)))
    possible = logits.isfinite().nonzero()[:, 0].tolist()
    barred = data.draw(st.lists(token, max_size=3, unique=True))
    if barred and set(possible) - set(barred):
        chosen["barred"] = barred
    sampling = SamplingConfig(**options)
    expected, share = oracle(logits, chosen.get("seen"), sampling, chosen.get("barred", ()), small=True)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    before, drawing.HEAD = drawing.HEAD, data.draw(st.integers(1, 12))
    try:
        assert_drawn_as_by(expected, share, logits.to(dtype), sampling, **chosen)
    finally:
        drawing.HEAD = before


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.8, "top_k": 40},
    {"top_p": 0.8, "temperature": 1.5},
    {"top_p": 0.9985},
    {"min_p": 0.05},
    {"top_k": 2000, "top_p": 0.9, "min_p": 0.001, "temperature": 0.9},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8, "temperature": 0.7, "top_p": 0.95, "top_k": 30},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES)
def test_a_real_vocabulary_against_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    """In bf16 many of the logits are equal, at the edge of what is kept too."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(5003, generator=generator) * 2.5).to(dtype)
    seen = torch.randint(5003, (60,), generator=generator)
    sampling = SamplingConfig(**options)
    penalty = {"seen": seen} if sampling.repetition_penalty != 1 else {}
    expected, share = oracle(logits, penalty.get("seen"), sampling)
    assert_drawn_as_by(expected, share, logits, sampling, **penalty)


@pytest.mark.parametrize("options", CASES)
def test_frequencies_fit_the_distribution(options: dict[str, Any]) -> None:
    """Pearson's chi-square test, at a level of one in a million."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, generator=generator) * 2
    seen = torch.randint(300, (40,), generator=generator)
    sampling = SamplingConfig(**options)
    penalty = {"seen": seen} if sampling.repetition_penalty != 1 else {}
    expected, _ = oracle(logits, penalty.get("seen"), sampling)
    count = 40_000
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=7)).random(count))
    rows = {name: ids.expand(count, -1) for name, ids in penalty.items()}
    found = draw_tokens(logits.expand(count, -1), uniform, sampling, **rows).tokens
    assert (expected[found] > 0).all()
    times, wanted = torch.bincount(found, minlength=300).double(), expected * count
    common = wanted >= 5  # the rarer ones together
    times = torch.cat([times[common], times[~common].sum()[None]])
    wanted = torch.cat([wanted[common], wanted[~common].sum()[None]])
    times, wanted = times[wanted > 0], wanted[wanted > 0]
    statistic = float(((times - wanted) ** 2 / wanted).sum())
    # The chance of a larger statistic, from the chi-square distribution's survival function.
    freedom = torch.tensor((len(wanted) - 1) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)) > 1e-6


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(3, 1000, dtype=torch.bfloat16)
    logits[0, [700, 900]] = 2.0
    logits[1, [5, 999]] = 3.0
    found = draw_tokens(logits, torch.zeros(3), SamplingConfig(temperature=0))
    assert found.tokens.tolist() == [700, 5, 0]
    assert found.logprobs.tolist() == [0, 0, 0] and found.kept_mass.tolist() == [1, 1, 1]
    wanted = logits.double().log_softmax(-1)[range(3), found.tokens]
    assert torch.allclose(found.raw_logprobs.double(), wanted, atol=1e-5)
    # A penalty and barred tokens are before the choice.
    seen, barred = torch.tensor([[700]] * 3), Barred(torch.tensor([900, 5]), torch.tensor([[False, True]] * 3))
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.5)
    assert draw_tokens(logits, torch.zeros(3), sampling, seen=seen, barred=barred).tokens.tolist() == [900, 999, 0]


def test_extreme_logits() -> None:
    """Nothing overflows at low temperatures, and the raw log-probability of an all but impossible token is finite."""
    logits = torch.tensor([[30000.0, -30000.0, 29999.0]])
    for temperature in (1e-300, 1e-30, 1e-3):
        found = draw_tokens(logits, torch.tensor([0.999]), SamplingConfig(temperature=temperature))
        assert (found.tokens.tolist(), found.logprobs.tolist(), found.kept_mass.tolist()) == ([0], [0.0], [1.0])
    hot = draw_tokens(logits, torch.tensor([0.4]), SamplingConfig(temperature=1e6))
    assert hot.tokens.tolist() == [1] and float(hot.raw_logprobs) == pytest.approx(-60000.313, abs=0.01)
    # All of the mass is on a barred token.
    only = draw_tokens(
        logits,
        torch.tensor([0.5]),
        SamplingConfig(temperature=0.01),
        barred=Barred(torch.tensor([0, 2]), torch.tensor([[True, True]])),
    )
    assert only.tokens.tolist() == [1] and float(only.logprobs) == 0 and 0 < float(only.kept_mass) < 1e-37


def test_rows_are_drawn_alike_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, uniform = torch.randn(9, 1111, generator=generator) * 3, torch.rand(9, generator=generator)
    for options in CASES:
        sampling = SamplingConfig(**options)
        seen = torch.randint(1111, (9, 7), generator=generator)
        monkeypatch.setattr(drawing, "ENTRIES", 2**20)
        together = draw_tokens(logits, uniform, sampling, seen=seen)
        monkeypatch.setattr(drawing, "ENTRIES", 2500)
        parts = draw_tokens(logits, uniform, sampling, seen=seen)
        alone = [draw_tokens(logits[[k]], uniform[[k]], sampling, seen=seen[[k]]) for k in range(9)]
        for name in Drawn._fields:
            values = getattr(together, name)
            assert torch.equal(values, getattr(parts, name)) and torch.equal(
                values, torch.cat([getattr(a, name) for a in alone])
            )


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


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 100}])
def test_log_probabilities_are_exact_in_a_large_vocabulary(options: dict[str, Any]) -> None:
    """PyTorch's softmax divides by a sum that is off by 1e-5 and more where 50,000 tokens share the probability."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50_000, generator=generator) * 0.1
    logits[:, 0] = 15.0  # beside which a sum in float32 rounds each of the others
    uniform = torch.tensor([0.1, 0.3, 0.7, 0.99999])
    found = draw_tokens(logits, uniform, SamplingConfig(**options))
    picked = found.tokens[:, None]
    exact = logits.double().log_softmax(-1).gather(1, picked)[:, 0]
    assert (found.raw_logprobs - exact).abs().max() < 1e-6
    if temperature := options.get("temperature", 1):
        tempered = (logits.double() / temperature).log_softmax(-1).gather(1, picked)[:, 0]
        assert (found.logprobs.double() + found.kept_mass.double().log() - tempered).abs().max() < 1e-6
