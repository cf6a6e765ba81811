"""A sampler with a reward of its own, as a third party would write it: built from paths, it finds better answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from best_of_n import BestOfNConfig, BestOfNSampler

from rlhf_core import registry
from rlhf_core.config.online import SamplingConfig
from rlhf_core.config.training import ModelConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.sampler_models import best_first
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.models import PolicyModel, RewardModel
from rlhf_core.rewards import samples_of
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.arithmetic_task import ArithmeticTask, solve, verify, wrong_solution
from rlhf_core.testing.tiny import save_tiny, tiny_policy

TASK = ArithmeticTask(terms=2, digits=1)
PROMPTS = sorted({*islice(TASK.problems(seed=1), 30)})[:6]
SHORT = SamplingConfig(max_new_tokens=20)


@pytest.fixture(autouse=True)
def best_of_n() -> Iterator[None]:
    registry.register("sampler", "kit-best-of-n", BestOfNSampler)
    yield
    registry.unregister("sampler", "kit-best-of-n")


class TestBestOfN(SamplerContract):
    method = "kit-best-of-n"


def verified(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(verify(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


class Longest(RewardFn):
    """Rewards length."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.completion_ids)) for sample in samples]


def test_whatever_is_a_reward_will_do() -> None:
    config = BestOfNConfig(draws=3, generation=SHORT)
    for reward in (
        Longest,
        Longest(),
        lambda prompts, completions, completion_ids: [len(ids) for ids in completion_ids],
    ):
        sampler = registry.get("sampler", "kit-best-of-n")(config, policy=tiny_policy(), reward=reward)
        ((best, second),) = sampler.sample(["a"], 2, seed=1)
        assert best.score == len(best.ids) >= second.score == len(second.ids)
    both = BestOfNSampler(config, policy=tiny_policy(), reward=[(Longest, 0.5), (Longest, 0.25)])
    assert [one.score for one in both.sample(["a"], 2, seed=1)[0]] == [0.75 * best.score, 0.75 * second.score]


def test_models_by_path(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "policy")
    RewardModel.from_pretrained(path, new_head=True).save_pretrained(tmp_path / "rm")
    config = BestOfNConfig(draws=2, generation=SHORT)
    sampler = BestOfNSampler.load(config, policy=path, reward=tmp_path / "rm")
    assert not any(parameter.requires_grad for parameter in sampler.policy.parameters())
    found = sampler.sample(["1+2=?", "a"], 2, seed=3)
    named = {"name": "reward_model", "options": {"model": str(tmp_path / "rm")}}
    for reward in (str(tmp_path / "rm"), named):
        again = BestOfNSampler.load(config, policy={"path": str(path)}, reward=reward).sample(["1+2=?", "a"], 2, seed=3)
        assert [[one.ids for one in group] for group in again] == [[one.ids for one in group] for group in found]
    reward_model = registry.get("reward", "reward_model")
    reward = reward_model(reward_model.Config(model=str(tmp_path / "rm")))
    samples = samples_of(prompt_batch(sampler.policy, ["1+2=?", "a"]), found)
    assert [one.score for group in found for one in group] == pytest.approx(reward.score(samples), abs=1e-5)


def test_roles_are_checked(tmp_path: Path) -> None:
    policy = tiny_policy()
    with pytest.raises(ConfigError, match=r"role `reward`.*fix: give it a reward: a name, a function"):
        BestOfNSampler(policy=policy)
    with pytest.raises(ConfigError, match=r"no role `rewards`.*did you mean `reward`"):
        BestOfNSampler(policy=policy, rewards=verified)
    with pytest.raises(ConfigError, match=r"must be a PolicyModel.*`BestOfNSampler.load\(policy=PATH\)` loads one"):
        BestOfNSampler(policy=tmp_path, reward=verified)
    with pytest.raises(ConfigError, match=r"load\(policy=…\): .* must be a path, or a PolicyModel; got 3"):
        BestOfNSampler.load(policy=3, reward=verified)
    with pytest.raises(ConfigError, match="unknown reward `reward_modl`"):
        BestOfNSampler(policy=policy, reward="reward_modl")
    with pytest.raises(ConfigError, match="a model alone is not a reward"):
        BestOfNSampler(policy=policy, reward=torch.nn.Linear(1, 1))


def test_the_best_stand_first_and_equals_in_their_order() -> None:
    group = [Completion(text, [1], [-1.0], "end") for text in "abcd"]
    best = best_first([group, group[:2]], [1.0, 3.0, 3.0, 2.0, 0.0, 5.0], 2)
    assert [[(one.text, one.score) for one in found] for found in best] == [
        [("b", 3.0), ("c", 3.0)],
        [("b", 5.0), ("a", 0.0)],
    ]
    with pytest.raises(ValueError, match="2 completions, fewer than n = 3"):
        best_first([group, group[:2]], [0.0] * 6, 3)
    with pytest.raises(ValueError, match="5 scores for 6 completions"):
        best_first([group, group[:2]], [0.0] * 5, 1)


class Drafted(Sampler):
    """Has a second policy."""

    api = 1
    roles: ClassVar = {"policy": "policy", "draft": "policy"}

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        raise NotImplementedError


def test_a_sampler_may_have_several_policies_and_kinds_are_checked(tmp_path: Path) -> None:
    path, draft = save_tiny(tmp_path / "draft", layers=1), tiny_policy()
    sampler = Drafted.load(policy=draft, draft=ModelConfig(path=str(path), precision="bf16"))
    assert sampler.policy is draft and sampler.models["draft"].precision == torch.bfloat16
    with pytest.raises(ConfigError, match="role `draft`"):
        Drafted(policy=draft)
    odd = type("Odd", (Drafted,), {"roles": {"policy": "polcy"}})
    with pytest.raises(PluginError, match="names an unknown kind of model, `polcy`"):
        odd(policy=draft)


def accuracy(sampler: BestOfNSampler) -> float:
    found = [sampler.sample(PROMPTS, 1, seed=seed) for seed in range(10)]
    return (
        sum(verify(p, one.text) for every in found for p, (one,) in zip(PROMPTS, every, strict=True))
        / 10
        / len(PROMPTS)
    )


@pytest.mark.slow
def test_the_best_of_eight_by_a_verifier_and_by_a_reward_model(tmp_path: Path) -> None:
    """A policy that is wrong half of the time is right almost always, chosen by who knows."""
    from rlhf_plugins.trainers.reward_model import RewardModelConfig, RewardModelTrainer
    from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer

    path, rng = save_tiny(tmp_path / "base"), Random(0)
    right = {prompt: "\n".join(solve(prompt)) for prompt in PROMPTS}
    wrong = {prompt: "\n".join(wrong_solution(prompt, rng)) for prompt in PROMPTS}
    rows = [{"prompt": prompt, "response": text} for answers in (right, wrong) for prompt, text in answers.items()]
    pairs = [{"prompt": p, "chosen": right[p], "rejected": wrong[p]} for p in PROMPTS]
    options = {"batch_size": 12, "learning_rate": 3e-3, "max_steps": 120, "warmup_ratio": 0.0}
    SFTTrainer(SFTConfig(**options), model=path, data=rows, output=tmp_path / "sft").train()
    RewardModelTrainer(
        RewardModelConfig(**{**options, "batch_size": 6}), model=path, data=pairs, output=tmp_path / "rm"
    ).train()
    policy = PolicyModel.from_pretrained(tmp_path / "sft" / "model", frozen=True)
    one = accuracy(BestOfNSampler(BestOfNConfig(draws=1, generation=SHORT), policy=policy, reward=verified))
    assert 0.25 < one < 0.75
    config = BestOfNConfig(draws=8, generation=SHORT)
    by_verifier = accuracy(BestOfNSampler(config, policy=policy, reward=verified))
    by_model = accuracy(BestOfNSampler(config, policy=policy, reward=tmp_path / "rm" / "model"))
    assert by_verifier > 0.95 and by_model > 0.9
