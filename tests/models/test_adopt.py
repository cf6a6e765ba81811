"""Models in memory become what is trained, models that are only read stay as they are, and other kinds are refused clearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel, ProcessRewardModel, RewardModel
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("causal") / "tiny", hidden=32, heads=2, kv_heads=1)


@pytest.fixture
def policy() -> PolicyModel:
    return PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())


def test_a_model_of_the_kind_is_taken_as_it_is(policy: PolicyModel) -> None:
    assert PolicyModel.adopt(policy) is policy
    for kind in (RewardModel, ProcessRewardModel):
        model: Any = kind.on(policy.without_head())
        assert kind.adopt(model) is model


def test_a_policy_becomes_a_reward_model_on_its_own_backbone(policy: PolicyModel) -> None:
    ours = {id(parameter) for parameter in policy.parameters()}
    reward = RewardModel.adopt(policy, members=3, seed=5)
    assert reward.members == 3 and len(reward.backbones) == 1
    assert {id(p) for p in reward.backbones.parameters()} <= ours
    apart = RewardModel.adopt(policy, members=2, share_backbone=False)
    assert len(apart.backbones) == 2
    process = ProcessRewardModel.adopt(policy, separator="##", seed=5)
    assert process.separator == "##" and {id(p) for p in process.backbone.parameters()} <= ours
    batch = random_batch(2, 2)
    again = RewardModel.adopt(policy, members=3, seed=5)
    assert torch.equal(again.scores(batch), reward.scores(batch))
    assert not torch.equal(RewardModel.adopt(policy, members=3, seed=6).scores(batch), reward.scores(batch))


def test_what_contradicts_the_model_is_refused(policy: PolicyModel) -> None:
    with pytest.raises(ConfigError, match=r"`ensemble\.size` is 3, but the model has"):
        RewardModel.adopt(RewardModel.on(policy.without_head()), members=3)
    with pytest.raises(ConfigError, match="another separator"):
        ProcessRewardModel.adopt(ProcessRewardModel.on(policy.without_head()), separator="##")


def test_other_kinds_are_refused_with_what_can_be_passed(policy: PolicyModel) -> None:
    reward = RewardModel.on(policy.without_head())
    for kind, given, said in (
        (PolicyModel, reward, "can't be used as a PolicyModel; got RewardModel; fix: pass a path, or a PolicyModel"),
        (ProcessRewardModel, reward, "got RewardModel; fix: pass a path, or a PolicyModel or a ProcessRewardModel"),
        (RewardModel, tiny_model(), r"got LlamaForCausalLM; fix: wrap it with its tokenizer: `PolicyModel.in_memory"),
        (PolicyModel, 3, "got int"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=said) as caught:
            kind.adopt(given)  # type: ignore[attr-defined]
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", [PolicyModel, RewardModel, ProcessRewardModel])
def test_a_frozen_model_is_only_read(kind: Any, causal: Path) -> None:
    new = {} if kind is PolicyModel else {"new_head": True}
    model = kind.from_pretrained(causal, frozen=True, precision="bf16", **new)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    matrices = {p.dtype for name, p in model.named_parameters() if "proj" in name}
    assert matrices == {torch.bfloat16}
    wide = kind.from_pretrained(causal, frozen=True, precision="bf16", frozen_precision="float32", **new)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    batch = random_batch(2, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = model(batch), wide(batch)
    pairs = zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ConfigError, match="lora: a model that is only read gets no new adapter"):
        kind.from_pretrained(causal, frozen=True, lora=LoraConfig(), **new)


def test_a_frozen_adapter_keeps_its_place_and_nothing_of_it_is_trained(causal: Path, tmp_path: Path) -> None:
    policy = PolicyModel.from_pretrained(causal, lora=LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    policy.save_pretrained(tmp_path)
    frozen = PolicyModel.from_pretrained(tmp_path, frozen=True)
    assert frozen.has_adapter and not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(frozen.token_logps(random_batch(2, 2)), policy.eval().token_logps(random_batch(2, 2)))


@pytest.mark.parametrize("kind", [PolicyModel, RewardModel, ProcessRewardModel])
def test_a_misspelt_option_is_known_before_anything_is_loaded(kind: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'precison'; did you mean `precision`"):
        kind.from_pretrained("nowhere", precison="bf16")
