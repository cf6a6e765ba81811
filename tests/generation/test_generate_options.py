"""The options of a completion: greedy ones are those of transformers' `generate`, those of many seeds fit the distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.drawn_rows import DrawnRows, NewRow
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt, a longer one", "middling"]


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return PolicyModel(model, tiny_tokenizer())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "min_new_tokens": 7},
        {"repetition_penalty": 2.0, "stop": ["e", "3"], "stop_ids": [40, 90]},
    ],
)
def test_greedy_completions_are_those_of_transformers(policy: PolicyModel, options: dict[str, Any]) -> None:
    batch = prompt_batch(policy, PROMPTS)
    sampling = SamplingConfig(temperature=0, max_new_tokens=24, **options)
    drawn = Engine(policy).generate(batch, 1, sampling)
    ends = [policy.tokenizer.eos_token_id, *sampling.stop_ids]
    for number, (one,) in enumerate(drawn):
        ids = batch.prompt_ids[number, : batch.prompt_lengths[number]][None]
        (wanted,) = policy.causal_lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=ends,
            pad_token_id=0,
            repetition_penalty=sampling.repetition_penalty,
            min_new_tokens=sampling.min_new_tokens or None,
            stop_strings=sampling.stop or None,
            tokenizer=policy.tokenizer,
        )
        assert list(one.ids) == wanted[ids.shape[1] :].tolist()
        assert set(one.logprobs) == {0.0} and set(one.kept_mass) == {1.0}
    assert not sampling.stop or {one.stop_reason for (one,) in drawn} >= {"stop"}


def test_draws_of_many_seeds_fit_the_distribution() -> None:
    """Pearson's chi-square test at a level of one in a million, of the first and a later position's random numbers."""
    logits = torch.randn(200, generator=torch.Generator().manual_seed(3)) * 2
    options = {"temperature": 0.8, "top_k": 120, "top_p": 0.95, "min_p": 0.002}
    scores = logits[None] / 0.8
    for processor in (TopKLogitsWarper(120), TopPLogitsWarper(0.95), MinPLogitsWarper(0.002)):
        scores = processor(torch.empty(1, 0, dtype=torch.long), scores)
    expected = scores[0].double().softmax(-1)
    rows = DrawnRows(SamplingConfig(**options), device=torch.device("cpu"))
    rows.join([NewRow(seed=seed, limit=4) for seed in range(20_000)])
    steps = [rows.draw(logits.expand(20_000, -1)) for _ in range(3)]
    for tokens in (steps[0], steps[2]):
        times = torch.bincount(tokens, minlength=200).double()
        assert (times[expected == 0] == 0).all()
        wanted = expected[expected > 0] * 20_000
        statistic = float(((times[expected > 0] - wanted) ** 2 / wanted).sum())
        freedom = torch.tensor((len(wanted) - 1) / 2)
        assert float(wanted.min()) > 5
        assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)) > 1e-6
    # One position's numbers tell nothing of another's.
    again = (steps[0] == steps[2]).double().mean()
    assert float(again) == pytest.approx(float((expected**2).sum()), abs=0.01)


def test_a_stop_id_that_the_model_lacks(policy: PolicyModel) -> None:
    with pytest.raises(ConfigError, match="the model's vocabulary has 263 tokens") as caught:
        policy.generate(["a"], stop_ids=[263])
    assert "263" in caught.value.line() and caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="`stop`: an empty text"):
        policy.generate(["a"], stop="")
    with pytest.raises(ConfigError, match="`min_new_tokens`"):
        policy.generate(["a"], min_new_tokens=5, max_new_tokens=4)


def test_options_of_the_policys_own_method(policy: PolicyModel) -> None:
    options: dict[str, Any] = {"min_p": 0.2, "repetition_penalty": 1.2, "min_new_tokens": 2, "stop_ids": [90]}
    found = policy.generate(PROMPTS, 2, seed=4, max_new_tokens=9, stop="e", **options)
    sampling = SamplingConfig(max_new_tokens=9, stop=["e"], **options)
    assert found == Engine(policy, seed=4).generate(prompt_batch(policy, PROMPTS), 2, sampling)
