"""Methods of packages of their own are stages as any other: a trainer, a reward, a sampler and a merger, each installed apart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core import RLHFOrchestrator
from rlhf_core.infra.errors import RLHFError
from rlhf_core.pipeline.pipeline_plan import PipelinePlan
from rlhf_core.pipeline.recipe import read_recipe

TRAINER = '''
from pydantic import Field

from rlhf_core.plugin import Loss, Trainer, TrainerConfig, TrainingStage


class GentleConfig(TrainerConfig):
    """Options of gentle imitation."""

    share: float = Field(0.5, gt=0, le=1, description="Factor of the loss; larger learns faster.")


class GentleTrainer(Trainer[GentleConfig]):
    """Imitates the chosen responses alone, at a share of the loss."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = GentleConfig

    def weights(self, batch):
        return {"nll": batch.num_loss_tokens}

    def loss(self, batch):
        return Loss({"nll": -self.config.share * (self.policy.token_logps(batch) * batch.loss_mask).sum()})
'''
REWARD = '''
from rlhf_core.plugin import BaseConfig, RewardFn


class DigitsConfig(BaseConfig):
    """It has none."""


class DigitsReward(RewardFn):
    """Share of digits in a completion."""

    api = 1
    Config = DigitsConfig

    def score(self, samples):
        return [sum(c.isdigit() for c in one.completion) / max(1, len(one.completion)) for one in samples]
'''
SAMPLER = '''
from dataclasses import replace

from rlhf_core.plugin import Sampler, SamplingConfig, best_first, prompt_batch, samples_of


class PickyConfig(SamplingConfig):
    """Options of each completion."""


class PickySampler(Sampler):
    """Draws twice as many as are asked for, and returns those that the reward prefers."""

    api = 1
    Config = PickyConfig
    roles = {"policy": "policy", "reward": "reward"}

    def sample(self, prompts, n=1, *, seed=None):
        batch = prompt_batch(self.policy, prompts)
        drawn = [list(group) for group in self.engine(seed).generate(batch, 2 * n, self.config)]
        scores = self.models["reward"].score(samples_of(batch, drawn)).total.tolist()
        return best_first(drawn, scores, n)
'''
MERGER = '''
from rlhf_core.plugin import Merger


class MiddleMerger(Merger):
    """Mean of the smallest and the largest value of each entry."""

    api = 1
    commutative = True
    ignores_base = True

    def merge_chunk(self, chunk, measured):
        import torch

        stacked = torch.stack(list(chunk.tensors))
        return (stacked.amin(0) + stacked.amax(0)) / 2
'''


@pytest.fixture
def packages(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four packages, installed for this process and for those that it starts."""
    roots = [
        install("acme-gentle", {"acme_gentle.py": TRAINER}, trainers={"gentle": "acme_gentle:GentleTrainer"}),
        install("acme-digits", {"acme_digits.py": REWARD}, rewards={"digits": "acme_digits:DigitsReward"}),
        install("acme-picky", {"acme_picky.py": SAMPLER}, samplers={"picky": "acme_picky:PickySampler"}),
        install("acme-middle", {"acme_middle.py": MERGER}, mergers={"middle": "acme_middle:MiddleMerger"}),
    ]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, roots)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def recipe() -> dict[str, Any]:
    drawn = {"max_new_tokens": 6, "limit": 3}
    return {
        "model": "model",
        "output": "out",
        "defaults": {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "dataset": {"wrap": "none"}},
        "stages": [
            {"method": "gentle", "data": "preference.jsonl", "share": 0.25},
            {"name": "drawn", "kind": "sample", "method": "picky", "reward": "digits", "prompts": "prompt.jsonl", **drawn},
            {"method": "grpo", "data": "prompt.jsonl", "rewards": ["acme-digits:digits"], "group_size": 2,
             "rollout_sampler": {"name": "picky", "roles": {"reward": "digits"}}, "generation": {"max_new_tokens": 6}},
            {"name": "middle", "kind": "merge", "method": "acme-middle:middle", "models": ["gentle", "grpo"]},
        ],
    }  # fmt: skip


def errors_of(stages: list[dict[str, Any]]) -> list[RLHFError]:
    return PipelinePlan(read_recipe({**recipe(), "stages": stages})).check()


def test_their_options_and_data_are_checked(folder: Path, packages: None) -> None:
    assert errors_of(recipe()["stages"]) == []
    (unknown,) = errors_of([{"method": "gentle", "data": "preference.jsonl", "shares": 0.25}])
    assert "did you mean `share`?" in str(unknown)
    (wrong,) = errors_of([{"method": "gentle", "data": "sft.jsonl"}])
    assert "`gentle` consumes rows of the record type `preference`" in str(wrong)


@pytest.mark.slow
def test_a_recipe_of_theirs_runs_through(folder: Path, packages: None) -> None:
    told: list[str] = []
    result = RLHFOrchestrator(recipe(), tell=told.append).run_full_pipeline()
    assert result.exit_code == 0 and [one.status for one in result.stages] == ["finished"] * 4, told
    record = json.loads((folder / "out/pipeline.json").read_text())
    assert [stage["method"] for stage in record["stages"]] == [
        "acme-gentle:gentle", "acme-picky:picky", "rlhf-core:grpo", "acme-middle:middle",
    ]  # fmt: skip
    one, other, merged = (
        load_file(folder / f"out/stages/{name}/model/model.safetensors")
        for name in ("01-gentle", "03-grpo", "04-middle")
    )
    assert all(torch.allclose(merged[name], (one[name] + other[name]) / 2, atol=1e-6) for name in merged)
    assert json.loads((folder / "out/stages/03-grpo/run.json").read_text())["plugin"]["qualified"] == "rlhf-core:grpo"
    rows = [json.loads(line) for line in (folder / "out/stages/02-drawn/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(0 <= row["score"] <= 1 for row in rows)
