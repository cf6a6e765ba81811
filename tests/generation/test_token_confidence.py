"""Token confidence: by hand, against full logits in both decoding loops, and where it ends completions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import make_tiny

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.drawn_rows import DrawnRows, NewRow
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.native import measure_native
from rlhf_core.generation.sampling import token_confidence
from rlhf_core.generation.step_trees import StepSearchConfig, StepTrees
from rlhf_core.generation.transformers_loop import forward_logits
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt, a longer one", "middling"]
CPU = torch.device("cpu")


def sharp(model: Any) -> PolicyModel:
    """Return a policy whose distributions are far from even."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return PolicyModel(model, tiny_tokenizer()).requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return sharp(tiny_model())


@pytest.fixture(scope="module", params=["native", "plain"])
def either(request: pytest.FixtureRequest, policy: PolicyModel) -> PolicyModel:
    """A policy that is decoded by each of the two loops."""
    if request.param == "native":
        assert policy.measured(measure_native).obstacle is None
        return policy
    other = sharp(make_tiny("mamba"))
    assert other.measured(measure_native).obstacle is not None
    return other


def drawn(policy: PolicyModel, n: int = 4, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[list[Completion]]:
    sampling = SamplingConfig(**{"max_new_tokens": 14, "temperature": 0.8, **options})
    return Engine(policy, seed=1).generate(prompt_batch(policy, prompts), n, sampling)


def flat(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    return list(itertools.chain(*groups))


def defined(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Return (T,) the token confidence by its definition, float64, from logits (T, V)."""
    logps = logits.double().log_softmax(dim=-1).sort(dim=-1, descending=True).values[:, :k]
    return -logps.mean(dim=-1)


def first_below(confidence: Sequence[float], least: float, window: int, begin: int = 0) -> int | None:
    """Return how many tokens there are where the mean over the last `window` is first below `least`; None where it never is.

    Args:
        begin: tokens before those that may be the last one.
    """
    for end in range(max(window, begin + 1), len(confidence) + 1):
        if sum(confidence[end - window : end]) / window < least:
            return end
    return None


def middle(completions: Sequence[Completion], window: int) -> float:
    """Return a bound that about half of some completions fall below, not within rounding of any group's confidence."""
    groups = sorted(
        sum(one.confidence[end - window : end]) / window
        for one in completions
        for end in range(window, len(one.ids) + 1)
    )
    low, high = max(itertools.pairwise(groups[len(groups) // 8 : len(groups) // 3]), key=lambda two: two[1] - two[0])
    return (low + high) / 2


def test_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.125, 0.25, 0.125]])
    for k, halvings in ((1, 1.0), (2, 1.5), (3, 2.0), (4, 2.25), (20, 2.25)):
        found = token_confidence(probabilities.log() + 7, k)
        assert found.dtype == torch.float32 and float(found) == pytest.approx(halvings * math.log(2), rel=1e-6)
    assert float(token_confidence(torch.zeros(1, 1000), 20)) == pytest.approx(
        math.log(1000), rel=1e-6
    )  # the least sure
    sure = torch.zeros(1, 1000).index_fill(1, torch.tensor([5]), 30.0)
    assert float(token_confidence(sure, 20)) == pytest.approx(30 * 19 / 20, rel=1e-5)
    assert token_confidence(torch.empty(0, 9), 3).shape == (0,)
    # What the model rules out counts as the least likely that float32 has; what isn't finite shows.
    ruled_out = torch.full((1, 9), -torch.inf).index_fill(1, torch.tensor([4]), 0.0)
    assert float(token_confidence(ruled_out, 4)) == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) * 3 / 4)
    assert token_confidence(ruled_out.index_fill(1, torch.tensor([2]), torch.nan), 4).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_independent_and_as_defined(dtype: torch.dtype) -> None:
    logits = (torch.randn(9, 50_001, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    found = token_confidence(logits, 20)
    torch.testing.assert_close(found.double(), defined(logits, 20), atol=1e-5, rtol=0)
    assert torch.equal(found, torch.cat([token_confidence(one[None], 20) for one in logits]))


def test_a_window_of_scripted_logits_ends_a_row() -> None:
    """Token confidences 3, 3, 1, 1, … halvings (k = 1): the mean of the last two is 3, then 2, then 1."""
    options = {"min_confidence": 1.9 * math.log(2), "confidence_window": 2, "confidence_top": 1}
    rows = DrawnRows(SamplingConfig(**options), device=CPU)
    # The first row continues tokens; the third has another limit, the fourth an end token.
    rows.join(
        [NewRow(0, 9, earlier_confidence=[9.0, 0.5 * math.log(2)]), NewRow(1, 9), NewRow(2, 3), NewRow(3, 9, (0, 1))]
    )
    for halvings in (3, 3, 1, 1, 1):
        rows.draw(torch.tensor([0.0] * 2**halvings + [-torch.inf] * (8 - 2**halvings)).expand(4, 8))
    reasons = dict(rows.ended())
    assert reasons[0] == "confidence" and len(rows.completion(0).ids) == 1  # (0.5 + 3) / 2 < 1.9
    assert reasons[1] == "confidence" and len(rows.completion(1).ids) == 4
    assert reasons[2] == "length" and len(rows.completion(2).ids) == 3
    ended = rows.completion(3)
    assert reasons[3] == ("end" if ended.ids[-1] < 2 else "confidence")
    assert rows.completion(1).confidence == pytest.approx([halvings * math.log(2) for halvings in (3, 3, 1, 1)])


def test_against_full_logits_in_both_loops(either: PolicyModel) -> None:
    """Each token's confidence, and the first token where a group's is below: those of one forward pass over the whole text."""
    window, k = 4, 7
    options = {"confidence_window": window, "confidence_top": k}
    free = drawn(either, min_confidence=0, **options)
    least = middle(flat(free), window)
    ended = drawn(either, min_confidence=least, **options)
    batch = prompt_batch(either, PROMPTS)
    cut = 0
    for prompt, (group, stopped) in enumerate(zip(free, ended, strict=True)):
        ids = batch.prompt_ids[prompt, : batch.prompt_lengths[prompt]].tolist()
        for one, other in zip(group, stopped, strict=True):
            with torch.no_grad():
                expected = defined(forward_logits(either, ids, list(one.ids)), k).tolist()
            assert list(one.confidence) == pytest.approx(expected, abs=1e-5)
            end = first_below(expected, least, window)
            assert list(other.ids) == list(one.ids)[:end]
            assert other.confidence == pytest.approx(one.confidence[:end], abs=1e-5)
            if end is not None and one.ids[end - 1] != either.tokenizer.eos_token_id:
                assert other.stop_reason == "confidence" and other.truncated
                cut += 1
            else:
                assert other.stop_reason == one.stop_reason
    assert 3 <= cut < 12


def test_without_it_nothing_changes(policy: PolicyModel) -> None:
    plain, reported = drawn(policy), drawn(policy, min_confidence=0)
    for one, other in zip(flat(plain), flat(reported), strict=True):
        assert one.confidence == () and len(other.confidence) == len(other.ids)
        assert (one.ids, one.text, one.stop_reason) == (other.ids, other.text, other.stop_reason)
        for name in ("logprobs", "raw_logprobs", "kept_mass"):
            assert getattr(one, name) == getattr(other, name)


def test_whatever_the_batch_and_the_memory(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.generation.native_backend.BLOCK_SIZE", {"cpu": 4})
    options: dict[str, Any] = {"confidence_window": 3, "confidence_top": 5, "max_new_tokens": 12, "min_new_tokens": 2}
    least = middle(flat(drawn(policy, min_confidence=0, **options)), 3)
    sampling = SamplingConfig(min_confidence=least, **options)
    batch, seeds = prompt_batch(policy, PROMPTS), [[prompt * 10 + k for k in range(4)] for prompt in range(3)]
    whole = Engine(policy).generate(batch, 4, sampling, seeds=seeds)
    assert any(one.stop_reason == "confidence" for one in flat(whole))
    found = [Engine(policy).generate(batch.select([at]), 1, sampling, seeds=[seeds[at][:1]])[0][0] for at in range(3)]
    assert [one.ids for one in found] == [group[0].ids for group in whole]
    small = Engine(policy, memory=policy.measured(measure_native).elements * 4 * 4 * 14)
    again = small.generate(batch, 4, sampling, seeds=seeds)
    assert small.backend._native.preemptions > 0
    for one, other in zip(flat(again), flat(whole), strict=True):
        assert (one.ids, one.stop_reason) == (other.ids, other.stop_reason)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)


def test_a_sequence_extended_twice_is_the_one_extended_once(policy: PolicyModel) -> None:
    options: dict[str, Any] = {"confidence_window": 4, "max_new_tokens": 12}
    engine, seeds = Engine(policy), list(range(8))
    handles = engine.prefill([[20 + k, 30, 40] for k in range(8)])
    free = engine.extend(handles, SamplingConfig(min_confidence=0, **options), seeds=seeds)
    sampling = SamplingConfig(min_confidence=middle([one.completion for one in free], 4), **options)
    once = engine.extend(handles, sampling, seeds=seeds)
    first = engine.extend(handles, sampling, seeds=seeds, limits=[3] * 8)
    left = [at for at, one in enumerate(first) if one.completion.stop_reason == "length"]
    then = engine.extend([first[at].handle for at in left], sampling, seeds=left, limits=[9] * len(left))
    early = 0
    for at, one in zip(left, then, strict=True):
        assert one.handle.ids == once[at].handle.ids and one.completion.stop_reason == once[at].completion.stop_reason
        assert one.handle.confidence == pytest.approx(once[at].handle.confidence, abs=1e-5)
        early += one.completion.stop_reason == "confidence" and len(one.completion.ids) < 4
    assert early  # some end where the window reaches back to the first part
    # Given tokens have no confidence, so another window begins behind them.
    (given,) = engine.append([first[left[0]].handle], [[50]])
    assert given.confidence == ()


def test_steps_of_a_search_end_for_too_little_confidence(policy: PolicyModel) -> None:
    """A window reaches over the steps of a path, and a path that it ends gets no more children."""
    window, options = 5, {"max_new_tokens": 12, "max_step_tokens": 2, "confidence_window": 5, "separator": "\n\n"}

    def paths(least: float) -> list[Completion]:
        trees = StepTrees(
            Engine(policy, seed=0),
            prompt_batch(policy, PROMPTS * 3),
            None,
            StepSearchConfig(min_confidence=least, **options),
        )
        here, found = list(trees.roots), []
        while here:
            grown = trees.grow(here)
            found += [trees.completion(one) for one in grown if one.ended]
            here = [one for one in grown if not one.ended]
        return found

    free = paths(0)
    least = middle(free, window)
    found = {tuple(one.ids): one for one in paths(least)}
    reasons = set()
    for one in free:
        end = first_below(one.confidence, least, window)
        other = found.pop(tuple(one.ids[:end]))
        assert other.confidence == pytest.approx(one.confidence[:end], abs=1e-5)
        ended = end is not None and one.ids[end - 1] != policy.tokenizer.eos_token_id
        assert other.stop_reason == ("confidence" if ended else one.stop_reason)
        reasons.add(other.stop_reason)
    assert not found and reasons >= {"confidence", "length"}


def test_it_counts_as_truncated(policy: PolicyModel) -> None:
    groups = drawn(policy, min_confidence=100, confidence_window=3)
    assert {len(one.ids) for one in flat(groups) if one.stop_reason == "confidence"} == {3}
    made = Batch.from_completions(prompt_batch(policy, PROMPTS), groups)
    assert made["truncated"].tolist() == [one.stop_reason == "confidence" for one in flat(groups)]


def test_each_prompt_may_have_its_own_bound(either: PolicyModel) -> None:
    batch, seeds = prompt_batch(either, PROMPTS), [[prompt * 10 + k for k in range(3)] for prompt in range(3)]
    options: dict[str, Any] = {"confidence_window": 3, "max_new_tokens": 9}
    bounds = [0.0, 100.0, middle(flat(drawn(either, min_confidence=0, **options)), 3)]
    engine, sampling = Engine(either), SamplingConfig(min_confidence=0, **options)
    found = engine.generate(batch, 3, sampling, seeds=seeds, min_confidences=bounds)
    for at, (group, bound) in enumerate(zip(found, bounds, strict=True)):
        alone = SamplingConfig(min_confidence=bound, **options)
        (wanted,) = engine.generate(batch.select([at]), 3, alone, seeds=[seeds[at]])
        assert [(one.ids, one.stop_reason) for one in group] == [(one.ids, one.stop_reason) for one in wanted]
    refused: list[tuple[dict[str, Any], list[float], str]] = [
        ({"min_confidence": 0}, bounds[:2], "3 prompts need one least confidence each; got 2 numbers"),
        ({"min_confidence": 0}, [0, 1, -1], "must be a finite number, at least 0; got -1"),
        ({"min_confidence": 0}, [0, 1, math.nan], "must be a finite number, at least 0; got nan"),
        ({}, bounds, "without the option `min_confidence` no confidence is computed; fix: set it, to 0"),
    ]
    for given, values, message in refused:
        with pytest.raises(ConfigError) as caught:
            engine.generate(batch, 1, SamplingConfig(**given), min_confidences=values)
        assert message in caught.value.line() and caught.value.exit_code == 2
