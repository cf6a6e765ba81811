"""`generate`: the contract of samplers, and the completions that the engine draws."""

from __future__ import annotations

from typing import ClassVar

import pytest
from rlhf_plugins.samplers.generate import GenerateConfig, GenerateSampler

from rlhf_core import registry
from rlhf_core.config.online import SamplingConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.tiny import tiny_policy


class TestGenerate(SamplerContract):
    method = "generate"
    options: ClassVar = {"max_new_tokens": 12, "temperature": 0.8}


class TestTruncatedAndStopped(SamplerContract):
    method = "generate"
    options: ClassVar = {"max_new_tokens": 12, "top_p": 0.9, "top_k": 40, "stop": ["3", "7"]}


class TestGreedy(SamplerContract):
    method = "generate"
    options: ClassVar = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 1.2}
    no_effect = ("top_p", "top_k", "min_p")


def test_it_is_found_by_name_with_the_options_of_sampling() -> None:
    assert registry.get("sampler", "generate") is GenerateSampler
    assert set(GenerateConfig.model_fields) == set(SamplingConfig.model_fields)


def test_completions_are_the_engines_in_the_order_of_their_seeds() -> None:
    policy = tiny_policy()
    options = {"max_new_tokens": 8, "temperature": 0.7}
    found = GenerateSampler(GenerateConfig(**options), policy=policy).sample(["1+1=?", "2+2=?"], 3, seed=5)
    own = policy.generate(["1+1=?", "2+2=?"], 3, seed=5, **options)
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in own]
    assert all(one.score is None for group in found for one in group)


@pytest.mark.parametrize("n", [0, -1, True, 1.5])
def test_a_number_of_completions_below_one_is_refused(n: float) -> None:
    with pytest.raises(ConfigError, match="n must be a whole number, at least 1"):
        GenerateSampler(policy=tiny_policy()).sample(["1+1=?"], n)  # type: ignore[arg-type]
