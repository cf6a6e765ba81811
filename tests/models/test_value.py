"""Value models: a value before each token and one at the end, whatever the layout; shared backbones; from disk to disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_tiny
from batches import random_batch, relative, with_empty
from safetensors.torch import load_file
from torch import Tensor

from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel, ProcessRewardModel, RewardModel, ValueModel
from rlhf_core.models.batch_values import batch_values
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer

SMALL: dict[str, Any] = {"hidden": 32, "heads": 2, "kv_heads": 1}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("causal") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def reward(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "model"
    RewardModel.from_pretrained(causal, new_head=True, seed=3).save_pretrained(path)
    return path


def shaken(model: Any, seed: int = 0, size: float = 0.1) -> Any:
    """Change whatever is trained: a new head's values are all 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def own_values(model: ValueModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (R, T) and (R,) by transformers alone, each response in a forward pass of its own."""
    tokens, ends = torch.zeros(batch.loss_mask.shape), torch.zeros(batch.num_responses)
    for r, (owner, length) in enumerate(zip(batch.owner.tolist(), batch.response_lengths.tolist(), strict=True)):
        prompt = int(batch.prompt_lengths[owner])
        ids = torch.cat([batch.prompt_ids[owner, :prompt], batch.response_ids[r, :length]])
        values = model.head(model.backbone.backbone(input_ids=ids[None]).last_hidden_state[0])[:, 0]
        tokens[r, :length], ends[r] = values[prompt - 1 : -1], values[-1]
    return tokens, ends


# Packed rows, padded rows, and sequences that are forwarded one by one.
@pytest.mark.parametrize("kind", ["llama", "bloom", "doge"])
@torch.no_grad()
def test_each_value_is_of_the_state_in_which_its_token_is_chosen(kind: str) -> None:
    network = make_tiny(kind, **({"keep_window_size": 16} if kind == "doge" else {}))
    model = shaken(ValueModel.on(PolicyModel(network, tiny_tokenizer())))
    batch = with_empty(random_batch(4, 2, masked=True, longest=30 if kind == "doge" else 9), 3)
    tokens, ends = own_values(model, batch)
    inside = torch.arange(batch.response_ids.shape[1]) < batch.response_lengths[:, None]
    found, last = model.values(batch)
    assert found.dtype == last.dtype == torch.float32
    assert relative(found, tokens * batch.loss_mask) < 1e-5 and relative(last, ends) < 1e-5
    assert not found[~batch.loss_mask].any() and int((found != 0).sum()) == batch.num_loss_tokens
    assert relative(model.token_values(batch, where=inside), tokens) < 1e-5
    assert relative(model.end_values(batch), ends) < 1e-5


@torch.no_grad()
def test_values_do_not_hang_on_padding_packing_or_micro_batches(causal: Path) -> None:
    model = shaken(ValueModel.from_pretrained(causal, new_head=True))
    batch = random_batch(4, 3, masked=True)
    tokens, ends = model.values(batch)
    padded = batch.pad(3, 5, value=9)
    assert relative(model.token_values(padded)[:, : tokens.shape[1]], tokens) < 1e-5
    assert relative(model.end_values(padded), ends) < 1e-5
    for cut in (lambda b: b.split(size=1), lambda b: b.split(size=2, divide=True), lambda b: b.split(max_tokens=25)):
        parts: Any = {"cut": cut, "device": model.device}
        assert relative(batch_values(batch, model.token_values, axis="token", **parts), tokens) < 1e-5
        assert relative(batch_values(batch, model.end_values, axis="response", **parts), ends) < 1e-5
    for changed in ({"layout": "padded"}, {"share_prompts": False}):
        for name, value in changed.items():
            setattr(model.backbone, name, value)
        assert relative(model.token_values(batch), tokens) < 1e-5
    none = model.values(batch.select([]))
    assert none[0].shape == (0, 0) and none[1].shape == (0,)


def test_a_new_heads_values_are_zero_and_its_first_gradient_is_its_last_layers(causal: Path) -> None:
    model = ValueModel.from_pretrained(causal, new_head=True)
    batch = random_batch(2, 2)
    values = model.token_values(batch)
    assert not values.any()
    (values - 1.0).square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"head.outer.weight", "head.outer.bias"}


def test_values_are_float32_under_autocast(causal: Path) -> None:
    model = shaken(ValueModel.from_pretrained(causal, new_head=True))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {value.dtype for value in model.values(random_batch(2, 2))} == {torch.float32}


# A backbone that is shared with a policy


def objective(policy: PolicyModel, value: ValueModel, batch: Batch, shared: bool) -> tuple[Tensor, Tensor]:
    states = policy.hidden_states(batch) if shared else None
    logps = policy.token_logps(batch, temperature=0.8, states=states)
    tokens, ends = value.values(batch, states=states)
    return logps.sum(), (tokens - 0.3).square().sum() + ends.square().sum()


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_one_forward_pass_gives_the_sum_of_both_gradients(lora: bool) -> None:
    policy = PolicyModel(tiny_model(**SMALL), tiny_tokenizer())
    if lora:
        policy.configure(TrainerConfig(lora=LoraConfig(rank=2, target_modules=["q_proj", "lm_head"])))
        shaken(policy)
    value = ValueModel.on(policy, seed=1)
    shaken(value.head)
    both = torch.nn.ModuleDict({"policy": policy, "value": value})
    assert {id(p) for p in both.parameters()} == {id(p) for p in (*policy.parameters(), *value.head.parameters())}
    batch = random_batch(3, 2, masked=True)
    apart = []
    for number in (0, 1):
        objective(policy, value, batch, shared=False)[number].backward()
        apart.append(gradients(both))
    calls: list[int] = []
    policy.backbone.register_forward_hook(lambda *_: calls.append(1))
    sum(objective(policy, value, batch, shared=True)).backward()  # type: ignore[union-attr]
    assert len(calls) == 1
    together = gradients(both)
    assert together.keys() == apart[0].keys() | apart[1].keys()
    for name, gradient in together.items():
        wanted = sum((one[name] for one in apart if name in one), torch.zeros(gradient.shape))
        assert relative(gradient, wanted) < 1e-5, name
    if lora:
        assert any("lm_head" in name for name in together), "the policy's output layer is trained still"


def test_detached_states_leave_the_policy_alone() -> None:
    policy = PolicyModel(tiny_model(**SMALL), tiny_tokenizer())
    value = ValueModel.on(policy)
    batch = random_batch(2, 2)
    shaken(value.head)
    value.token_values(batch, states=policy.hidden_states(batch).detach()).sum().backward()
    assert not gradients(policy) and gradients(value.head)


def test_states_of_another_batch_are_refused() -> None:
    policy = PolicyModel(tiny_model(**SMALL), tiny_tokenizer())
    states = policy.hidden_states(random_batch(2, 2))
    with pytest.raises(ValueError, match="another batch"):
        ValueModel.on(policy).token_values(random_batch(2, 2), states=states)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, target_modules=["q_proj", "lm_head"])])
def test_a_shared_backbone_is_saved_without_the_policys_output_layer(lora: LoraConfig | None, tmp_path: Path) -> None:
    policy = PolicyModel(tiny_model(**SMALL, tie_embeddings=False), tiny_tokenizer())
    policy.configure(TrainerConfig(lora=lora))
    value = ValueModel.on(policy)
    shaken(policy), shaken(value.head)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    batch = random_batch(3, 2)
    expected = value.values(batch)
    value.save_pretrained(tmp_path / "value")
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
    assert not any("lm_head" in name for name in load_file(tmp_path / "value/model.safetensors"))
    found = ValueModel.from_pretrained(tmp_path / "value").eval().values(batch)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if lora is None else relative(one, other) < 1e-4


def test_the_adapter_of_a_quantised_policy_is_saved_alone(causal: Path, tmp_path: Path) -> None:
    """Merged into 4 or 8 bits it would be rounded; whether the base is quantised is what the network says."""
    policy = PolicyModel.from_pretrained(causal, lora=LoraConfig(rank=2))
    policy.network.is_quantized = True
    value = ValueModel.on(policy)
    shaken(policy), shaken(value.head)
    value.save_pretrained(tmp_path / "value")
    assert not (tmp_path / "value/model.safetensors").exists()
    batch = random_batch(3, 2)
    found = ValueModel.from_pretrained(tmp_path / "value").eval()
    assert torch.equal(found.token_values(batch), value.token_values(batch))
    assert all("lora_" in name or name.startswith("head.") for name, p in found.named_parameters() if p.requires_grad)


# From disk to disk


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_what_is_saved_has_the_same_values(causal: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    model = shaken(ValueModel.from_pretrained(causal, new_head=True, lora=lora))
    if lora is not None:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in name or name.startswith("head.") for name in names)
    model.save_pretrained(tmp_path / "value")
    files = {path.name for path in (tmp_path / "value").iterdir()}
    assert {"value_head.json", "value_head.safetensors", "tokenizer.json"} <= files
    again = ValueModel.from_pretrained(tmp_path / "value", new_head=True, seed=9).eval()
    batch = random_batch(3, 2)
    for found, expected in zip(again.values(batch), model.values(batch), strict=True):
        assert torch.equal(found, expected) if lora is None else relative(found, expected) < 1e-4
    about = again.describe()
    assert about["head"] == "two_layer" and {"model.safetensors", "value_head.safetensors"} <= about["files"].keys()


@pytest.mark.parametrize("kind", ["bert", "bart", "trocr"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "adapter"])
@pytest.mark.parametrize("made", [ValueModel, RewardModel, ProcessRewardModel])
def test_a_backbone_that_transformers_cannot_load_by_itself_is_saved_in_its_model(
    made: Any, kind: str, lora: LoraConfig | None, tmp_path: Path
) -> None:
    """A decoder without its encoder, or without a pooling layer that its kind has elsewhere."""
    model = made.adopt(PolicyModel(make_tiny(kind), tiny_tokenizer()))
    if lora is not None:
        model.configure(TrainerConfig(lora=lora))
    shaken(model)
    model.save_pretrained(tmp_path)
    batch = random_batch(2, 2)
    again = made.from_pretrained(tmp_path).eval()
    found, expected = (out if isinstance(out, tuple) else (out,) for out in (again(batch), model(batch)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if lora is None else relative(one, other) < 1e-4


@torch.no_grad()
def test_a_critic_begins_where_the_reward_model_stands(reward: Path, tmp_path: Path) -> None:
    batch = random_batch(3, 2)
    judge = RewardModel.from_pretrained(reward).eval()
    for model in (
        ValueModel.from_pretrained(reward, new_head=True, head="reward"),
        ValueModel.adopt(judge, head="reward"),
    ):
        assert torch.equal(model.eval().end_values(batch), judge.score(batch))
    model.save_pretrained(tmp_path / "value")
    assert torch.equal(ValueModel.from_pretrained(tmp_path / "value").eval().end_values(batch), judge.score(batch))
    fresh = ValueModel.from_pretrained(reward, new_head=True)
    assert not fresh.end_values(batch).any()
    backbone = fresh.backbone.hidden_states(batch).last()
    assert torch.equal(backbone, judge.backbone_list[0].hidden_states(batch).last())


@torch.no_grad()
def test_a_classifier_of_the_hub_is_a_start_too(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    config = tiny_model(**SMALL).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "hub")
    tiny_tokenizer().save_pretrained(tmp_path / "hub")
    batch = random_batch(3, 2)
    model = ValueModel.from_pretrained(tmp_path / "hub", new_head=True, head="reward").eval()
    expected = RewardModel.from_pretrained(tmp_path / "hub").eval().score(batch)
    assert torch.equal(model.end_values(batch), expected)
    model.save_pretrained(tmp_path / "value")
    again = ValueModel.from_pretrained(tmp_path / "value").eval()
    assert torch.equal(again.end_values(batch), expected) and again.describe()["head"] == "linear"


def test_what_can_be_no_start_is_refused(causal: Path, reward: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no value head.*would be random; got no value_head.json; fix: train one"):
        ValueModel.from_pretrained(causal)
    with pytest.raises(ModelError, match="no reward head"):
        ValueModel.from_pretrained(causal, new_head=True, head="reward")
    RewardModel.from_pretrained(causal, new_head=True, members=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"starts with one head.*got 2 members"):
        ValueModel.from_pretrained(tmp_path / "two", new_head=True, head="reward")
    policy = PolicyModel.from_pretrained(causal)
    with pytest.raises(ModelError, match="as a ValueModel; got PolicyModel; fix: pass a path, or a RewardModel"):
        ValueModel.adopt(policy, head="reward")
    with pytest.raises(ModelError, match="got ProcessRewardModel"):
        ValueModel.adopt(ProcessRewardModel.adopt(policy))
    with pytest.raises(ConfigError, match="can't be trained on a quantised base"):
        ValueModel.from_pretrained(causal, new_head=True, lora=LoraConfig(quantize="4bit"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        ValueModel.from_pretrained("nowhere", bogus=1)  # type: ignore[call-arg]


def test_a_damaged_head_is_told(causal: Path, tmp_path: Path) -> None:
    ValueModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path)
    notes = tmp_path / "value_head.json"
    good = json.loads(notes.read_text())
    for changed, said in (
        ({"width": 64}, "the value head doesn't fit the backbone.*a head of width 64 for a backbone of 32"),
        ({"head": "odd"}, "the head's description isn't supported; got head odd"),
        ({"format": 2}, "`format` must be 1; got 2"),
    ):
        notes.write_text(json.dumps(good | changed))
        with pytest.raises(ModelError, match=said):
            ValueModel.from_pretrained(tmp_path)
    notes.unlink()
    with pytest.raises(
        ModelError, match=r"value head is not whole.*got value_head.safetensors, and no value_head.json"
    ):
        ValueModel.from_pretrained(tmp_path, new_head=True)


def test_an_adopted_model_is_its_own_and_a_value_model_stays_as_it_is() -> None:
    policy = PolicyModel(tiny_model(**SMALL, tie_embeddings=False), tiny_tokenizer())
    model = ValueModel.adopt(policy, seed=1)
    assert ValueModel.adopt(model) is model
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    assert torch.equal(ValueModel.adopt(policy, seed=1).head.inner.weight, model.head.inner.weight)  # type: ignore[union-attr,arg-type]
    model.configure(TrainerConfig(lora=LoraConfig(rank=2)))
    assert model.backbone.has_adapter and model.max_positions == 2048 and model.tokenizer is policy.tokenizer


def test_a_frozen_value_model_is_only_read(causal: Path) -> None:
    model = ValueModel.from_pretrained(causal, new_head=True, frozen=True, precision="bf16")
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert {p.dtype for name, p in model.named_parameters() if "proj" in name} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}


def test_a_head_stands_where_its_backbone_does() -> None:
    policy = PolicyModel(tiny_model(**SMALL), tiny_tokenizer())
    _ = policy.width
    policy.to("meta")
    for model in (ValueModel.on(policy), RewardModel.on(policy), ProcessRewardModel.on(policy)):
        assert {p.device.type for p in model.parameters()} == {"meta"}


# Other kinds of models


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = (one for one in caplog.records if one.name.startswith("rlhf_core") and one.levelno >= logging.WARNING)
    said = [record.getMessage() for record in ours]
    caplog.clear()
    return said


def test_heads_that_are_lost_are_named(causal: Path, reward: Path, tmp_path: Path, caplog: Any) -> None:
    ValueModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path)
    ValueModel.from_pretrained(tmp_path)
    assert not warnings_of(caplog)
    PolicyModel.from_pretrained(tmp_path)
    assert warnings_of(caplog) == [f"{tmp_path} is a value model: its backbone is used, and its value head isn't"]
    for kind in (RewardModel, ProcessRewardModel):
        kind.from_pretrained(tmp_path, new_head=True)
        assert f"{tmp_path} has a value head, which another method trained" in warnings_of(caplog)[0]
    ValueModel.from_pretrained(reward, new_head=True)
    assert f"{reward} has a reward head, which another method trained" in warnings_of(caplog)[0]
    ValueModel.from_pretrained(reward, new_head=True, head="reward")
    assert not warnings_of(caplog)


def test_a_value_model_of_an_untied_policy_is_no_policy(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path / "untied", **SMALL, tie_embeddings=False)
    ValueModel.from_pretrained(whole, new_head=True).save_pretrained(tmp_path / "value")
    with pytest.raises(ModelError, match="is a value model, not a language model"):
        PolicyModel.from_pretrained(tmp_path / "value")
