"""`speculative`: the contract of samplers, and completions that are `generate`'s own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rlhf_plugins.samplers.generate import GenerateConfig, GenerateSampler
from rlhf_plugins.samplers.speculative import SpeculativeConfig, SpeculativeDecoder

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_policy, tiny_tokenizer

PROMPTS = ["1+1=?", "2+2=?", "17+25=?"]


class TestByModel(SamplerContract):
    method = "speculative"
    options: ClassVar = {"max_new_tokens": 12, "temperature": 0.8}
    no_effect = ("draft_tokens",)


class TestByNgrams(SamplerContract):
    method = "speculative"
    options: ClassVar = {"max_new_tokens": 12, "draft": "ngram"}
    no_effect = ("draft_tokens",)


class TestBySuffixes(SamplerContract):
    method = "speculative"
    options: ClassVar = {"max_new_tokens": 12, "draft": "suffix", "top_p": 0.9}
    no_effect = ("draft_tokens",)


@pytest.mark.parametrize("draft", ["model", "ngram", "suffix"])
def test_completions_are_those_of_generate(draft: Any) -> None:
    policy = tiny_policy()
    models = {"draft_model": tiny_policy(1)} if draft == "model" else {}
    options: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 12, "top_k": 8}
    sampler = SpeculativeDecoder(SpeculativeConfig(draft=draft, draft_tokens=4, **options), policy=policy, **models)
    for seed in (1, 2):
        found = sampler.sample(PROMPTS, 2, seed=seed)
        plain = GenerateSampler(GenerateConfig(**options), policy=policy).sample(PROMPTS, 2, seed=seed)
        assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in plain]
    for one in (one for group in found for one in group):
        assert one.details.keys() == {"acceptance_rate", "tokens_per_pass"}
        assert one.details["tokens_per_pass"] >= 1


def test_a_good_draft_saves_passes_and_both_models_count() -> None:
    """Most of what the policy's own copy guesses is verified, once it was measured what guesses cost."""
    policy = PolicyModel(tiny_model(layers=4, max_positions=512), tiny_tokenizer())
    draft = copy.deepcopy(policy)
    sampler = SpeculativeDecoder(
        SpeculativeConfig(max_new_tokens=200, min_new_tokens=200), policy=policy, draft_model=draft
    )
    sampler.sample(["1+1=?"], seed=1)
    counts = sampler.drafts.counts
    assert counts.tokens == 200 and counts.accepted == counts.guessed > 0
    prompt = len(policy.tokenizer("1+1=?")["input_ids"])
    assert sampler.forwarded["policy"] == prompt - 1 + counts.passes + counts.guessed
    assert sampler.forwarded["draft_model"] >= prompt - 1 + counts.guessed


def test_any_samplers_engine_takes_a_draft_without_a_model() -> None:
    policy = tiny_policy()
    options: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 12, "top_k": 8}
    found, plain = (
        GenerateSampler(GenerateConfig(draft=draft, **options), policy=policy).sample(PROMPTS, 3, seed=1)
        for draft in ("suffix", None)
    )
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in plain]


def test_a_draft_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|another|>"])
    other = save_tiny(tmp_path / "other", tokenizer=tokenizer, vocab_size=264)
    with pytest.raises(ModelError, match=r"`draft_model` has another vocabulary.*264 tokens, 263"):
        SpeculativeDecoder.load(policy=save_tiny(tmp_path / "policy"), draft_model=other)


@pytest.mark.parametrize(
    ("options", "models", "message"),
    [
        ({}, {}, "no model is given for the sampler's role `draft_model`"),
        ({"draft": "ngram"}, {"draft_model": tiny_policy()}, "doesn't use its role `draft_model` with these options"),
    ],
)
def test_a_draft_model_is_given_where_it_is_used(options: dict[str, Any], models: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeDecoder(SpeculativeConfig(**options), policy=tiny_policy(), **models)
