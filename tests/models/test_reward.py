"""Reward models: scores at the last token, the hub's format, round trips, and checkpoints that can't be scored with."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch, relative
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel, ProcessRewardModel, RewardModel
from rlhf_core.models.head_files import HeadFiles
from rlhf_core.models.layout import padded_layout
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("causal") / "tiny", hidden=32, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as the hub has them: a decoder with a classification head of one label."""
    path = tmp_path_factory.mktemp("hub") / "classifier"
    config = tiny_model(hidden=32, heads=2, kv_heads=1).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_hub_reward_model_scores_as_in_transformers(classifier: Path) -> None:
    batch = random_batch(4, 2)
    layout = padded_layout(batch)
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        expected = torch.cat(
            [
                theirs(input_ids=ids[None, : int(mask.sum())]).logits[0]
                for ids, mask in zip(layout.input_ids, layout.attention_mask, strict=True)  # type: ignore[arg-type]
            ]
        )
        model = RewardModel.from_pretrained(classifier)
        assert torch.allclose(model.score(batch), expected, rtol=1e-5, atol=1e-6)
        for backbone in model.backbone_list:
            backbone.shared_forward.layout = "padded"
        assert torch.allclose(model.score(batch), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_what_is_saved_scores_the_same(causal: Path, tmp_path: Path, share: bool) -> None:
    model = RewardModel.from_pretrained(causal, members=3, share_backbone=share, new_head=True, seed=4).eval()
    assert len(model.backbones) == (1 if share else 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(tmp_path / "reward")
        batch = random_batch(3, 2)
        again = RewardModel.from_pretrained(tmp_path / "reward").eval()
        assert torch.equal(again.scores(batch), model.scores(batch))
    assert again.members == 3 and again.describe()["members"] == 3


def test_an_adapter_is_merged_into_what_is_saved(causal: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)  # for the adapter's random A matrices, whose size decides how far rounding goes
    model = RewardModel.from_pretrained(causal, new_head=True, lora=LoraConfig(rank=4)).eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("heads.") for name in names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        batch = random_batch(3, 2)
        expected = model.scores(batch)
        model.save_pretrained(tmp_path / "reward")
        found = RewardModel.from_pretrained(tmp_path / "reward").eval().scores(batch)
    # Merged and unmerged adapters round differently.
    assert relative(found, expected) < 1e-4
    assert not list((tmp_path / "reward").glob("adapter*"))


def test_members_start_apart_and_alike_for_a_seed(causal: Path) -> None:
    batch = random_batch(3, 2)

    def scores(seed: int) -> torch.Tensor:
        model = RewardModel.from_pretrained(causal, members=2, new_head=True, seed=seed).eval()
        return model.scores(batch).detach()

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))
    assert scores(1).std(dim=1).min() > 0


def test_scores_do_not_hang_on_padding_or_company(causal: Path) -> None:
    model = RewardModel.from_pretrained(causal, new_head=True).eval()
    batch = random_batch(4, 2)
    with torch.no_grad():
        whole = model.score(batch)
        assert relative(model.score(batch.pad(3, 5, value=9)), whole) < 1e-5
        alone = torch.cat([model.score(batch.select([prompt])) for prompt in range(4)])
    assert relative(alone, whole) < 1e-5


def test_scores_are_float32_under_autocast(causal: Path) -> None:
    model = RewardModel.from_pretrained(causal, new_head=True).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.scores(random_batch(2, 2)).dtype == torch.float32


def test_a_model_without_a_head_gives_no_scores(causal: Path) -> None:
    with pytest.raises(ModelError, match="no reward head, so its scores would be random") as caught:
        RewardModel.from_pretrained(causal)
    assert caught.value.exit_code == 4


def test_a_lost_head_is_told(causal: Path, classifier: Path, tmp_path: Path) -> None:
    RewardModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "reward_head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"would be random.*no reward_head.safetensors"):
        RewardModel.from_pretrained(tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("score")}
    model.save_pretrained(tmp_path / "hub", state_dict=state)
    tiny_tokenizer().save_pretrained(tmp_path / "hub")
    with pytest.raises(ModelError, match=r"would be random.*no `score.weight`"):
        RewardModel.from_pretrained(tmp_path / "hub")


@pytest.mark.parametrize("lost", ["reward_head.json", "reward_head.safetensors"])
def test_half_a_head_is_not_replaced_by_a_new_one(causal: Path, tmp_path: Path, lost: str) -> None:
    RewardModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ModelError, match=rf"would be random; got reward_head\..*, and no {lost}; fix: copy"):
        RewardModel.from_pretrained(tmp_path, new_head=True)


@pytest.mark.parametrize("there", ["reward_head.json", "reward_head.safetensors"])
def test_half_a_head_on_the_hub_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: str) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    def download(source: str, file: str) -> str:
        if file != there:
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("rlhf_core.infra.model_files.ask_hub", lambda name: None)  # the hub is there
    with pytest.raises(ModelError, match=f"acme/reward: .* would be random; got {there}, and no reward_head"):
        HeadFiles.find("acme/reward", "reward_head")
    assert HeadFiles.find("acme/reward", "other_head") is None


def test_a_head_of_the_other_kind_is_not_replaced_without_a_word(
    causal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: tuple[Any, Any] = (RewardModel, ProcessRewardModel)
    for kind, other, said in zip(kinds, kinds[::-1], ("reward head", "process reward head"), strict=True):
        place = tmp_path / kind.__name__
        kind.from_pretrained(causal, new_head=True).save_pretrained(place)
        assert not _ours(caplog)
        other.from_pretrained(place, new_head=True)
        assert f"{place} has a {said}, which another method trained and which isn't used" in _ours(caplog)[0]
        caplog.clear()


def test_a_policy_from_a_reward_model_is_told_of(
    causal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RewardModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path)
    assert not _ours(caplog)
    PolicyModel.from_pretrained(tmp_path)
    assert _ours(caplog) == [f"{tmp_path} is a reward model: its backbone is used, and its reward head isn't"]


def _ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the core warned of: it says other things, too, and so do the libraries below."""
    ours = (one for one in caplog.records if one.name.startswith("rlhf_core") and one.levelno >= logging.WARNING)
    return [record.getMessage() for record in ours]


def test_a_head_of_another_width_is_told(causal: Path, tmp_path: Path) -> None:
    RewardModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "reward_head.json").read_text())
    (tmp_path / "reward_head.json").write_text(json.dumps(about | {"width": 64}))
    with pytest.raises(ModelError, match="a head of width 64 for a backbone of 32"):
        RewardModel.from_pretrained(tmp_path)


def test_other_numbers_of_labels_and_members_are_told(causal: Path, tmp_path: Path) -> None:
    config = tiny_model(hidden=32, heads=2, kv_heads=1).config
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    tiny_tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="one label to be used as a reward model; got 3 labels"):
        RewardModel.from_pretrained(tmp_path / "three")
    RewardModel.from_pretrained(causal, new_head=True, members=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match="is 5, but the model has"):
        RewardModel.from_pretrained(tmp_path / "two", members=5)


def test_a_policys_backbone_is_shared() -> None:
    policy = PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())
    model = RewardModel.on(policy.without_head())
    ours = {id(parameter) for parameter in model.parameters()}
    assert ours & {id(parameter) for parameter in policy.parameters()}


def test_an_empty_response_is_scored_at_its_prompts_end(causal: Path) -> None:
    model = RewardModel.from_pretrained(causal, new_head=True).eval()
    batch = random_batch(3, 2)
    lengths = batch.response_lengths.clone()
    lengths[1] = 0
    inside = torch.arange(batch.response_ids.shape[1]) < lengths[:, None]
    empty = replace(batch, response_lengths=lengths, loss_mask=inside)
    with torch.no_grad():
        found = model.score(empty)
        states = model.backbone_list[0].hidden_states(empty.select([0]))
        assert relative(model.heads[0](states.values[states.layout.prompt_end])[1], found[1:2]) < 1e-5
        assert relative(found[[0, 2, 3, 4, 5]], model.score(batch)[[0, 2, 3, 4, 5]]) < 1e-5
        none = replace(
            batch, response_ids=batch.response_ids[:, :0], loss_mask=inside[:, :0], response_lengths=lengths * 0
        )
        assert model.score(none).isfinite().all()


def test_damaged_notes_on_the_head_are_told(causal: Path, tmp_path: Path) -> None:
    RewardModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path)
    notes = tmp_path / "reward_head.json"
    good = json.loads(notes.read_text())
    for text, said in (
        ("{", "reward_head.json can.t be read"),
        (json.dumps({**good, "format": 2}), "`format` must be 1; got 2"),
        (json.dumps({**good, "members": 10**9}), "the head's description isn't supported"),
        (json.dumps({name: value for name, value in good.items() if name != "shared"}), "lacks `shared`"),
    ):
        notes.write_text(text)
        with pytest.raises(ModelError, match=said):
            RewardModel.from_pretrained(tmp_path)


def test_notes_written_before_centring_was_noted_are_read(causal: Path, tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(causal, new_head=True, members=2)
    model.centred = True
    model.save_pretrained(tmp_path)
    assert RewardModel.from_pretrained(tmp_path).centred
    notes = tmp_path / "reward_head.json"
    notes.write_text(
        json.dumps({name: value for name, value in json.loads(notes.read_text()).items() if name != "centred"})
    )
    assert not RewardModel.from_pretrained(tmp_path).centred


def test_every_members_files_count(causal: Path, tmp_path: Path) -> None:
    RewardModel.from_pretrained(causal, new_head=True, members=2, share_backbone=False).save_pretrained(tmp_path)
    before = RewardModel.from_pretrained(tmp_path).describe()["files"]
    assert {"model.safetensors", "member-1/model.safetensors", "reward_head.safetensors"} <= before.keys()


@pytest.mark.parametrize("kind", [RewardModel, ProcessRewardModel])
def test_an_unknown_option_is_told_before_a_model_is_loaded(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"from_pretrained\(\) got an unexpected keyword argument 'bogus'"):
        kind.from_pretrained("nowhere", new_head=True, bogus=1)


def test_a_quantised_base_is_refused(causal: Path) -> None:
    with pytest.raises(ConfigError, match="can't be trained on a quantised base"):
        RewardModel.from_pretrained(causal, new_head=True, lora=LoraConfig(quantize="4bit"))


def test_a_reward_model_is_no_policy_and_lost_weights_are_told(causal: Path, tmp_path: Path) -> None:
    whole = save_tiny(tmp_path / "untied", hidden=32, heads=2, kv_heads=1, tie_embeddings=False)
    RewardModel.from_pretrained(whole, new_head=True).save_pretrained(tmp_path / "reward")
    with pytest.raises(ModelError, match="is a reward model, not a language model"):
        PolicyModel.from_pretrained(tmp_path / "reward")
    weights = whole / "model.safetensors"
    tensors = load_file(weights)
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp" not in n}, weights, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks weights, which would be random; got no `model.layers.1.mlp.* and 2 more"
    ):
        PolicyModel.from_pretrained(whole)
    with pytest.raises(ModelError, match="lacks weights"):
        RewardModel.from_pretrained(whole, new_head=True)
