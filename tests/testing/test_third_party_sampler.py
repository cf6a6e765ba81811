"""A sampler of a package of its own gets a draft model and a reward model by role, from Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rlhf_plugins.rewards.reward_model import RewardModelReward

from rlhf_core import registry
from rlhf_core.cli import main
from rlhf_core.config.sampling_options import SamplingConfig
from rlhf_core.contracts.reward import Sample
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, RewardModel
from rlhf_core.testing.tiny import save_tiny

PACKAGE = '''
from dataclasses import replace

from rlhf_core.plugin import Sampler, SamplingConfig, best_first, prompt_batch, samples_of


class EitherConfig(SamplingConfig):
    """Options of each completion."""


class EitherSampler(Sampler):
    """Draws from the policy and from the draft model, and returns what the reward prefers."""

    api = 1
    Config = EitherConfig
    roles = {"policy": "policy", "draft": "policy", "reward": "reward"}

    def sample(self, prompts, n=1, *, seed=None):
        batch = prompt_batch(self.policy, prompts)
        drawn = [[] for _ in prompts]
        for role in ("policy", "draft"):
            for group, found in zip(drawn, self.engine(seed, role).generate(batch, n, self.config)):
                group += [replace(one, details={"by": role}) for one in found]
        scores = self.models["reward"].score(samples_of(batch, drawn)).total.tolist()
        return best_first(drawn, scores, n)
'''
PROMPT = "17+25=?"


@pytest.fixture
def paths(install: Any, tmp_path: Path) -> dict[str, str]:
    """The package, installed, and its models by role."""
    install("acme-either", {"acme_either.py": PACKAGE}, samplers={"either": "acme_either:EitherSampler"})
    policy, draft = (save_tiny(tmp_path / name, layers=1, seed=seed) for name, seed in (("policy", 0), ("draft", 9)))
    RewardModel.from_pretrained(policy, new_head=True, seed=3).save_pretrained(tmp_path / "reward")
    return {"policy": str(policy), "draft": str(draft), "reward": str(tmp_path / "reward")}


def wanted(paths: dict[str, str]) -> list[tuple[float, str, str]]:
    """Return the score, the text and the model of the completion of each model, the best first."""
    reward, found = RewardModelReward(RewardModelReward.Config(model=paths["reward"])), []
    for role in ("policy", "draft"):
        model = PolicyModel.from_pretrained(paths[role])
        batch = prompt_batch(model, [PROMPT])
        ((one,),) = Engine(model, seed=5).generate(batch, 1, SamplingConfig(max_new_tokens=6))
        sample = Sample(PROMPT, one.text, completion_ids=one.ids, stop_reason=one.stop_reason)
        found.append((reward.score([sample])[0], one.text, role))
    assert found[0][1] != found[1][1]
    return sorted(found, reverse=True)


def test_python_gives_it_both_by_path(paths: dict[str, str]) -> None:
    Either = registry.get("sampler", "either")
    sampler = Either.load(Either.Config(max_new_tokens=6), **paths)
    ((first, second),) = sampler.sample([PROMPT], 2, seed=5)
    assert first.score >= second.score and sampler.forwarded["policy"] > 0 and sampler.forwarded["draft"] > 0
    ((best,),) = sampler.sample([PROMPT], 1, seed=5)
    score, text, role = wanted(paths)[0]
    assert (best.text, best.details["by"]) == (text, role) and best.score == pytest.approx(score, abs=1e-5)
    with pytest.raises(ConfigError, match="no model is given for the sampler's role `draft`"):
        Either.load(Either.Config(), policy=paths["policy"], reward=paths["reward"])


def test_the_command_line_gives_it_both_by_path(
    paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["sample", "either", "--model", paths["policy"], "--prompts", PROMPT, "--max-new-tokens", "6", "--seed", "5"]
    reward = ["--reward", paths["reward"], "--output", str(tmp_path / "out.jsonl")]
    assert main([*own, *reward]) == 2
    assert "`draft` is missing, the sampler's role `draft`" in capsys.readouterr().err
    assert main([*own, *reward, "--draft", paths["draft"]]) == 0, capsys.readouterr().err
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    score, text, role = wanted(paths)[0]
    assert (row["completion"], row["details"]["by"]) == (text, role) and row["score"] == pytest.approx(score, abs=1e-5)
