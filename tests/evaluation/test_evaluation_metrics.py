"""Metrics of an evaluation, each against an independent computation: brute force, another library's forward pass, simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from random import Random
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlhf_core.contracts.batch import Batch
from rlhf_core.evaluation.answer_agreement import majority_at_k
from rlhf_core.evaluation.calibration import brier_score, expected_calibration_error, reliability
from rlhf_core.evaluation.divergence import exact_kl, kl_by_token
from rlhf_core.evaluation.diversity import bleu, distinct_n, mean_cosine_distance, self_bleu, words
from rlhf_core.evaluation.estimate import share_estimate
from rlhf_core.evaluation.win_rate import length_controlled_win_rate, preferences
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import NumbersError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny, tiny_policy
from rlhf_core.training.completion_metrics import pass_at_k

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=7).map(" ".join), min_size=2, max_size=5)


# Diversity


def test_words_are_split_in_any_script() -> None:
    assert words("It's 3.5 %, you_know?") == ["it", "'", "s", "3", ".", "5", "%", ",", "you", "_", "know", "?"]
    assert words("日本 ok") == ["日", "本", "ok"] and words("Ünï") == ["ünï"] and words(" \n") == []


def test_distinct_n_by_hand() -> None:
    """`a b a` and `a b`: words a b a a b, 2 different of 5; bigrams ab ba ab, 2 different of 3."""
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert distinct_n(["a", ""], 2) is None


def brute_bleu(candidate: list[str], references: list[list[str]]) -> float:
    """BLEU by counting each n-gram by itself, as Papineni et al. describe it, with the documented deviations."""
    if not candidate:
        return 1.0 if [] in references else 0.0
    product, orders = 1.0, min(4, len(candidate))
    for n in range(1, orders + 1):
        grams = [candidate[i : i + n] for i in range(len(candidate) - n + 1)]
        matched = 0
        for gram in {tuple(g) for g in grams}:
            own = sum(tuple(g) == gram for g in grams)
            there = max(sum(tuple(r[i : i + n]) == gram for i in range(len(r) - n + 1)) for r in references)
            matched += min(own, there)
        if n == 1 and matched == 0:
            return 0.0
        product *= (matched if matched else 0.1) / len(grams)
    reference = min(references, key=lambda r: (abs(len(r) - len(candidate)), len(r)))
    penalty = 1.0 if len(candidate) > len(reference) else math.exp(1 - len(reference) / len(candidate))
    return penalty * product ** (1 / orders)


@given(TEXTS)
def test_self_bleu_is_the_mean_of_bleu_counted_by_hand(texts: list[str]) -> None:
    table = [text.split() for text in texts]
    expected = fmean(brute_bleu(one, table[:i] + table[i + 1 :]) for i, one in enumerate(table))
    assert self_bleu(texts) == pytest.approx(expected)
    assert 0 <= self_bleu(texts) <= 1 + 1e-12


def test_bleu_by_hand() -> None:
    """`the the the cat` against `the cat sat`: unigrams 2 of 4, bigrams 1 of 3, 3-grams and 4-grams 0.1 of 2 and 1."""
    found = bleu(["the", "the", "the", "cat"], [["the", "cat", "sat"]])
    assert found == pytest.approx((2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25)
    assert bleu(["a", "b"], [["a", "b", "c", "d"]]) == pytest.approx(math.exp(-1))  # all found; 2 words for 4
    assert self_bleu(["x y", "x y", "x y"]) == 1 and self_bleu(["a", "b"]) == 0
    with pytest.raises(ValueError, match="two texts"):
        self_bleu(["alone"])


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 99))
def test_cosine_distance_is_the_mean_over_pairs(count: int, width: int, seed: int) -> None:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    pairs = [1 - float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(rows, 2)]
    assert mean_cosine_distance(rows) == pytest.approx(fmean(pairs), abs=1e-6)
    assert mean_cosine_distance(rows * 3) == pytest.approx(mean_cosine_distance(rows), abs=1e-6)


def test_cosine_distance_by_hand() -> None:
    assert mean_cosine_distance(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])) == pytest.approx(2 / 3)
    assert mean_cosine_distance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(2)
    assert mean_cosine_distance(torch.zeros(2, 3)) == 1


# Verified answers


def brute_majority(keys: list[str | None], right: list[float], k: int) -> float:
    """The vote of every subset of k, each answer that draws level winning as often."""
    values = []
    for subset in itertools.combinations(range(len(keys)), k):
        votes = Counter(keys[i] for i in subset if keys[i] is not None)
        most = max(votes.values(), default=0)
        winners = [key for key, count in votes.items() if count == most]
        marks = [fmean(right[i] for i in range(len(keys)) if keys[i] == key) for key in winners]
        values.append(fmean(marks) if marks else 0.0)
    return fmean(values)


@settings(max_examples=60)
@given(st.data())
def test_majority_is_the_mean_over_all_subsets(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=8))
    right = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(keys), max_size=len(keys)))
    k = data.draw(st.integers(1, len(keys)))
    assert majority_at_k(keys, right, k) == pytest.approx(brute_majority(keys, right, k))


def test_majority_by_hand() -> None:
    """Of a a b, with a right: every pair is aa or ab (twice), which is a draw: (1 + 1/2 + 1/2) / 3."""
    assert majority_at_k(["a", "a", "b"], [1, 1, 0], 2) == pytest.approx(2 / 3)
    assert majority_at_k(["a", "a", "b"], [1, 1, 0], 3) == 1
    assert majority_at_k([None, None], [0, 0], 1) == 0
    with pytest.raises(ValueError, match="majority@4"):
        majority_at_k(["a"] * 3, [1] * 3, 4)


def test_majority_of_many_completions_is_exact_and_quick() -> None:
    """200 completions with 60 % for one answer: the chance that it has most of 101 drawn without replacement."""
    keys, k = ["a"] * 120 + ["b"] * 80, 101
    ways = [math.comb(120, j) * math.comb(80, k - j) for j in range(51, 102) if k - j <= 80]
    assert majority_at_k(keys, [1.0] * 120 + [0.0] * 80, k) == pytest.approx(sum(ways) / math.comb(200, k), rel=1e-9)
    many = majority_at_k(["a"] * 1500 + ["b"] * 1500, [1.0] * 1500 + [0.0] * 1500, 5)  # C(3000, 1500) is no float
    assert many == pytest.approx(0.5, rel=1e-9)


def test_pass_at_k_and_majority_at_k_are_unbiased_for_new_completions() -> None:
    """Answers drawn from known shares: the means over 4,000 prompts of 6 completions agree with the probabilities for k = 3."""
    random, shares = Random(1), {"a": 0.5, "b": 0.3, "c": 0.2}
    truth = 0.0
    for drawn in itertools.product(shares, repeat=3):
        votes = Counter(drawn)
        winners = [key for key in votes if votes[key] == max(votes.values())]
        truth += math.prod(shares[one] for one in drawn) * ("a" in winners) / len(winners)
    passed, voted = [], []
    for _ in range(4000):
        keys = random.choices([*shares], weights=[*shares.values()], k=6)
        right = [float(key == "a") for key in keys]
        passed.append(pass_at_k(6, int(sum(right)), 3))
        voted.append(majority_at_k(keys, right, 3))
    for found, true in ((share_estimate(passed, trials=8000), 1 - 0.5**3), (share_estimate(voted, trials=8000), truth)):
        assert abs(found.value - true) < 3.5 * found.error


def test_intervals_of_pass_at_k_cover_over_prompts_of_different_difficulty() -> None:
    """A Beta(1, 1) solve rate p per prompt: pass@4 is E[1 − (1 − p)⁴] = 4/5; 30 prompts of 8 completions, 2,000 times."""
    random, held = Random(0), 0
    for _ in range(2000):
        values = []
        for _ in range(30):
            rate = random.random()
            values.append(pass_at_k(8, sum(random.random() < rate for _ in range(8)), 4))
        found = share_estimate(values, trials=60)
        held += found.low <= 0.8 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


# Calibration


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=30), st.integers(1, 8))
def test_calibration_is_the_gap_of_each_bin(points: list[tuple[int, bool]], bins: int) -> None:
    sure, right = [p / 40 for p, _ in points], [float(r) for _, r in points]
    total = 0.0
    for low in range(bins):
        of_bin = [(s, r) for s, r in zip(sure, right, strict=True) if low == min(math.floor(s * bins), bins - 1)]
        if of_bin:
            total += abs(sum(r for _, r in of_bin) - sum(s for s, _ in of_bin))
    assert expected_calibration_error(sure, right, bins) == pytest.approx(total / len(points))
    assert sum(one.count for one in reliability(sure, right, bins)) == len(points)


def test_calibration_by_hand() -> None:
    sure, right = [0.9, 0.9, 0.2, 1.0], [1, 0, 0, 1]
    # Bin [0.9, 1]: confidence 2.8/3, accuracy 2/3; bin [0.2, 0.3): 0.2 against 0.
    assert expected_calibration_error(sure, right) == pytest.approx((3 * (2.8 / 3 - 2 / 3) + 0.2) / 4)
    assert brier_score(sure, right) == pytest.approx((0.01 + 0.81 + 0.04 + 0) / 4)
    assert brier_score([1, 0], [1, 0]) == 0 == expected_calibration_error([1, 0], [1, 0])
    with pytest.raises(ValueError, match="0 to 1"):
        reliability([1.2], [1])


# Win rates


def test_preferences_are_those_of_all_pairs() -> None:
    assert preferences([1, 2], [1, 3]) == [0.5, 0, 1, 0]


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=5), st.lists(st.integers(-2, 2), min_size=1, max_size=5))
def test_who_wins_the_other_loses(own: list[int], others: list[int]) -> None:
    assert fmean(preferences(own, others)) == pytest.approx(1 - fmean(preferences(others, own)))
    assert fmean(preferences(own, own)) == 0.5


def simulated(random: np.random.Generator, count: int, theta: float, phi: float) -> tuple[np.ndarray, np.ndarray]:
    longer = random.normal(20, 60, count)
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(longer / longer.std()))))
    return (random.random(count) < chance).astype(float), longer


def lc_rate(wins: Sequence[float], longer: Sequence[float]) -> float:
    """The length-controlled win rate of prompts with one pair each."""
    return length_controlled_win_rate([[pair] for pair in zip(wins, longer, strict=True)]).value


def test_length_control_finds_the_rate_at_equal_length_again() -> None:
    """Judgements that favour length: a plain win rate of 53 %, where at equal length the model loses more often than not."""
    wins, longer = simulated(np.random.default_rng(0), 40_000, -0.4, 2.5)
    expected = 1 / (1 + math.exp(0.4))
    assert wins.mean() > 0.52 and lc_rate(wins, longer) == pytest.approx(expected, abs=0.01)


def test_length_control_is_at_the_maximum_of_the_likelihood() -> None:
    """Torch's own minimiser (L-BFGS on the written-out objective) finds the same rate."""
    wins, longer = simulated(np.random.default_rng(3), 80, 0.3, -1.0)
    wins = (wins + np.random.default_rng(4).random(80)) / 2  # preferences of a judge that isn't sure
    at = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x, y = torch.tanh(torch.tensor(longer) / torch.tensor(longer).std(correction=0)), torch.tensor(wins)
    minimiser = torch.optim.LBFGS(
        [at], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        minimiser.zero_grad()
        logits = at[0] + at[1] * x
        found = (
            torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") + 0.005 * at.square().sum()
        )
        found.backward()
        return found

    minimiser.step(loss)
    assert lc_rate(wins, longer) == pytest.approx(float(at[0].detach().sigmoid()), abs=1e-7)


def test_length_control_without_differences_is_the_plain_rate() -> None:
    assert lc_rate([1, 1, 0, 1] * 200, [0] * 800) == pytest.approx(0.75, abs=1e-4)
    # A prompt counts once, however many pairs it has.
    several = length_controlled_win_rate([[(1.0, 0.0)] * 3, [(0.0, 0.0)]] * 200)
    assert several.value == pytest.approx(0.5) and several.count == 400
    with pytest.raises(ValueError, match="can't be told apart"):
        lc_rate([1, 0], [5, 5])


def test_length_control_mirrors_and_stays_finite() -> None:
    wins, longer = [1, 1, 1, 0.0], [10, 20, 5, -7]
    found = lc_rate(wins, longer)
    assert 0 < found < 1
    mirrored = lc_rate([1 - win for win in wins], [-one for one in longer])
    assert mirrored == pytest.approx(1 - found)
    assert 0.99 < lc_rate([1] * 50, list(range(50))) < 1


def test_errors_of_length_controlled_rates_are_those_between_prompts() -> None:
    """Copies of a prompt's pairs change nothing, and without lengths the error is the mean's: with wins w, √(w(1−w)/(P−1))."""
    rng = np.random.default_rng(7)
    wins, longer = simulated(rng, 60, 0.2, 1.0)
    pairs = [[pair] for pair in zip(wins.tolist(), longer.tolist(), strict=True)]
    once, again = (length_controlled_win_rate([of * copies for of in pairs]) for copies in (1, 5))
    assert (again.value, again.error, again.low) == pytest.approx((once.value, once.error, once.low))
    plain = length_controlled_win_rate([[(win, 0.0)] for win in wins.tolist()])
    assert plain.error == pytest.approx(math.sqrt(wins.mean() * (1 - wins.mean()) / 59), rel=1e-3)


def test_intervals_of_length_controlled_rates_cover() -> None:
    """400 simulated evaluations of 60 prompts with 2 pairs each, which a prompt's difficulty makes dependent."""
    rng, true, held = np.random.default_rng(5), 0.0, 0
    for known in (False, True):
        count = 400 if known else 1
        for _ in range(count):
            prompts = 60 if known else 40_000
            longer = rng.normal(20, 60, (prompts, 2))
            logits = 0.5 + rng.normal(0, 1, (prompts, 1)) + np.tanh(longer / 60)
            wins = (rng.random((prompts, 2)) < 1 / (1 + np.exp(-logits))).astype(float)
            pairs = [list(zip(*of, strict=True)) for of in zip(wins.tolist(), longer.tolist(), strict=True)]
            found = length_controlled_win_rate(pairs)
            if known:
                held += found.low <= true <= found.high
            else:
                true = found.value  # the rate that the model without difficulties has over very many prompts
    assert held / 400 == pytest.approx(0.95, abs=0.03)


# KL


def test_kl_of_logits_by_hand() -> None:
    """(1/2, 1/2) to (1/4, 3/4): ½ log 2 + ½ log ⅔; a column that only one table has is left out."""
    own, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(exact_kl(own, other)) == pytest.approx(expected, abs=1e-6)
    assert float(exact_kl(own, torch.cat([other, torch.tensor([[9.0]])], 1))) == pytest.approx(expected, abs=1e-6)
    assert float(exact_kl(own, own)) == 0


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[PolicyModel, PolicyModel, list[str]]:
    paths = [str(save_tiny(tmp_path_factory.mktemp(f"model{seed}"), seed=seed)) for seed in (0, 1)]
    policy, reference = (PolicyModel.from_pretrained(path, frozen=True) for path in paths)
    return policy, reference, paths


def completed(policy: PolicyModel, n: int = 3) -> Batch:
    prompts = ["one", "a longer prompt"]
    drawn = policy.generate(prompts, n, max_new_tokens=9, seed=3)
    return Batch.from_completions(prompt_batch(policy, prompts), drawn)


def test_kl_is_that_of_transformers_whole_logits(two_models: tuple[PolicyModel, PolicyModel, list[str]]) -> None:
    policy, reference, paths = two_models
    batch = completed(policy)
    found = {kind: kl_by_token(policy, reference, batch, estimator=kind) for kind in ("exact", "k1", "k3")}
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    for row in range(batch.num_responses):
        owner, length = int(batch.owner[row]), int(batch.response_lengths[row])
        prompt = batch.prompt_ids[owner, : int(batch.prompt_lengths[owner])]
        ids = torch.cat([prompt, batch.response_ids[row, :length]])[None]
        with torch.no_grad():
            own, other = (m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in models)
        exact = (own.exp() * (own - other)).sum(-1)
        drawn = batch.response_ids[row, :length, None]
        ratio = (own - other).gather(1, drawn).squeeze(1)
        expected = {"exact": exact, "k1": ratio, "k3": (-ratio).exp() - 1 + ratio}
        for kind, values in expected.items():
            assert torch.allclose(found[kind][row, :length].double(), values, atol=2e-4, rtol=1e-4), kind
            assert not found[kind][row, length:].any()


def test_kl_does_not_depend_on_the_division_into_passes_and_is_zero_to_itself(
    two_models: tuple[PolicyModel, PolicyModel, list[str]],
) -> None:
    policy, reference, _ = two_models
    batch = completed(policy)
    whole = kl_by_token(policy, reference, batch)
    assert torch.allclose(kl_by_token(policy, reference, batch, max_tokens=1), whole, atol=1e-5)
    assert float(kl_by_token(policy, policy, batch).abs().max()) < 1e-6


def test_the_exact_kl_along_samples_agrees_with_the_mean_log_ratio(
    two_models: tuple[PolicyModel, PolicyModel, list[str]],
) -> None:
    """Sums over completions of the exact KL, k1 and k3 estimate one number, the exact one with the least variance."""
    policy, reference, _ = two_models
    drawn = policy.generate(["one"], 400, max_new_tokens=4, seed=0)
    batch = Batch.from_completions(prompt_batch(policy, ["one"]), drawn)
    sums = {kind: kl_by_token(policy, reference, batch, estimator=kind).sum(1) for kind in ("exact", "k1", "k3")}
    errors = {kind: float(values.std()) / 20 for kind, values in sums.items()}
    for kind in ("k1", "k3"):
        assert abs(float(sums[kind].mean() - sums["exact"].mean())) < 3.5 * math.hypot(errors[kind], errors["exact"])
        assert errors["exact"] < errors[kind]


def test_an_infinite_kl_is_refused(two_models: tuple[PolicyModel, PolicyModel, list[str]]) -> None:
    policy = two_models[0]
    masked = tiny_policy(1)
    masked.head.weight.data = masked.head.weight.data.clone()
    with torch.no_grad():
        masked.head.weight[65:70] = 0
    logits = torch.zeros(1, 4)
    never = torch.tensor([[0.0, 0.0, 0.0, -math.inf]])
    assert float(exact_kl(logits, never)) > 1e30 and float(exact_kl(never, logits)) == pytest.approx(
        math.log(4 / 3), abs=1e-6
    )
    batch = completed(policy)
    masked.logits = lambda hidden: policy.logits(hidden).index_fill(1, torch.tensor([70]), -math.inf)
    with pytest.raises(NumbersError, match="infinite"):
        kl_by_token(policy, masked, batch)
