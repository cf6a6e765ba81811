"""Models and tokenizers in and out; what may be wrong with them, message and exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from batches import random_batch, relative
from safetensors.torch import load_file, save_file

from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """How far rounding goes depends on an adapter's random start, and mustn't on the tests that ran before."""
    torch.manual_seed(0)


def shake(policy: PolicyModel) -> None:
    """Change what the policy trains, by so little that rounding stays small."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def refusal(source: Path | str, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        PolicyModel.from_pretrained(source, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 4
    line = caught.value.line()
    assert line.startswith("error[model] ") and "\n" not in line
    return line


def test_round_trip(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = PolicyModel.from_pretrained(saved)
    policy.save_pretrained(tmp_path / "again")
    batch = random_batch(3, 2)
    expected = policy.token_logps(batch)
    assert torch.equal(PolicyModel.from_pretrained(tmp_path / "again").token_logps(batch), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(PolicyModel(plain, policy.tokenizer).token_logps(batch), expected)
    assert json.loads((tmp_path / "again/config.json").read_text()).get("_attn_implementation") is None


def test_an_adapter_round_trip_merged_and_not(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=2))
    batch = random_batch(3, 2)
    base = policy.token_logps(batch).detach()
    shake(policy)
    expected = policy.token_logps(batch).detach()
    assert relative(expected, base) > 1e-3
    policy.save_pretrained(tmp_path / "adapter")
    policy.save_pretrained(tmp_path / "merged", merged=True)
    assert torch.equal(policy.token_logps(batch), expected), "saving must not change the model"
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    for path in ("adapter", "merged"):
        found = PolicyModel.from_pretrained(tmp_path / path)
        assert found.has_adapter == (path == "adapter")
        assert relative(found.token_logps(batch), expected) < 1e-4
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / path)
        assert relative(PolicyModel(plain, policy.tokenizer).token_logps(batch), expected) < 1e-4


def test_an_adapter_on_a_folded_one_is_saved_whole(saved: Path, tmp_path: Path) -> None:
    """Its base is the first adapter merged in, which stands nowhere: an adapter alone would lose it silently."""
    first = PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=2))
    batch = random_batch(3, 2)
    shake(first)
    expected = first.token_logps(batch).detach()
    first.save_pretrained(tmp_path / "first")
    second = PolicyModel.from_pretrained(tmp_path / "first", lora=LoraConfig(rank=2), adapter="fold")
    assert second.fresh_adapter
    assert relative(second.token_logps(batch), expected) < 1e-4
    shake(second)
    expected = second.token_logps(batch).detach()
    second.save_pretrained(tmp_path / "second")
    # Merged and unmerged adapters round differently.
    assert relative(PolicyModel.from_pretrained(tmp_path / "second").token_logps(batch), expected) < 1e-4


def test_an_adapter_on_a_model_changed_in_python_is_saved_whole(saved: Path, tmp_path: Path) -> None:
    policy = PolicyModel.from_pretrained(saved)
    shake(policy)
    policy.configure(TrainerConfig(lora={"rank": 2}))  # type: ignore[arg-type]
    shake(policy)
    batch = random_batch(3, 2)
    expected = policy.token_logps(batch).detach()
    policy.save_pretrained(tmp_path / "changed")
    assert relative(PolicyModel.from_pretrained(tmp_path / "changed").token_logps(batch), expected) < 1e-4


def test_an_adapter_finds_its_base_from_anywhere(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    policy = PolicyModel.from_pretrained(saved.name, lora=LoraConfig(rank=2))
    policy.save_pretrained("adapter")
    monkeypatch.chdir("/")
    PolicyModel.from_pretrained(tmp_path / "adapter")


def test_only_adapters_train_and_targets_are_checked(saved: Path) -> None:
    policy = PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=2, target_modules=["q_proj"]))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and "q_proj" in name for name in trained)
    with pytest.raises(ConfigError, match=r"no module `q_prj`.*did you mean `q_proj`") as caught:
        PolicyModel.from_pretrained(saved, lora=LoraConfig(target_modules=["q_prj"]))
    assert caught.value.exit_code == 2


def test_a_folded_adapter_can_be_trained_on_whole(saved: Path, tmp_path: Path) -> None:
    """peft leaves the base frozen when it merges an adapter into it."""
    PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=2)).save_pretrained(tmp_path / "adapter")
    policy = PolicyModel.from_pretrained(tmp_path / "adapter", adapter="fold")
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_quantisation_without_its_package(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes.*qlora"):
        PolicyModel.from_pretrained(saved, lora=LoraConfig(quantize="4bit"))


def test_configure_a_model_in_memory(saved: Path) -> None:
    policy = PolicyModel.from_pretrained(saved)
    policy.configure(TrainerConfig(lora={"rank": 2}, batching={"layout": "padded"}, attention="eager"))  # type: ignore[arg-type]
    assert policy.has_adapter and policy.shared_forward.layout == "padded" and policy.attention.kernel == "eager"
    with pytest.raises(ConfigError, match="packed rows need an attention that can be replaced"):
        policy.configure(TrainerConfig(batching={"layout": "packed"}, attention="eager"))  # type: ignore[arg-type]


def test_an_adapter_that_is_there_is_not_passed_over(saved: Path) -> None:
    policy = PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=4))
    policy.configure(TrainerConfig(lora={"rank": 4}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"already has an adapter of another shape"):
        policy.configure(TrainerConfig(lora={"rank": 16}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="can't be quantised"):
        PolicyModel.from_pretrained(saved).configure(TrainerConfig(lora={"quantize": "4bit"}))  # type: ignore[arg-type]


def test_gradient_checkpointing_can_be_switched_off_again(saved: Path) -> None:
    policy = PolicyModel.from_pretrained(saved, gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in policy.modules())
    policy.configure(TrainerConfig())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in policy.modules())


def test_what_it_was_loaded_from_is_known_by_its_hashes(saved: Path, tmp_path: Path) -> None:
    first = PolicyModel.from_pretrained(saved).describe()["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= first.keys()
    assert PolicyModel.from_pretrained(saved).describe()["files"] == first
    policy = PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=2))
    policy.save_pretrained(tmp_path / "adapter")
    assert "base/model.safetensors" in PolicyModel.from_pretrained(tmp_path / "adapter").describe()["files"]
    # In memory the weights themselves count: changed ones are another model.
    policy = PolicyModel.from_pretrained(saved)
    policy.configure(TrainerConfig())
    before = policy.describe()["files"]
    shake(policy)
    assert policy.describe()["files"] != before


def test_a_home_directory_is_expanded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert PolicyModel.from_pretrained("~/model").describe()["files"]


def test_pickled_adapters_are_refused(saved: Path, tmp_path: Path) -> None:
    PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=2)).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter/adapter_model.bin")
    weights.unlink()
    line = refusal(tmp_path / "adapter")
    assert "pickled weights can run code" in line and "adapter_model.bin" in line


def test_missing_directory_names_the_nearest(saved: Path) -> None:
    assert f"did you mean {saved}?" in refusal(saved.with_name("modle"))
    assert "doesn't exist either" in refusal("/nowhere/at/all/model")


def test_neither_directory_nor_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub's client has read the environment by now.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no local directory, and no model that could be fetched from the hub" in refusal("acme/no-such-model")


def test_directory_without_a_model(tmp_path: Path) -> None:
    assert "is an empty directory, and no model" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "isn't a model: it has no config.json" in refusal(tmp_path)


def test_missing_shard(saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    model.save_pretrained(saved, max_shard_size="50KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert f"shard {shards[1].name} is missing" in refusal(saved)


def test_nan_weights_name_the_tensor(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    line = refusal(saved)
    assert "`model.layers.1.mlp.up_proj.weight` is not finite; got 1 of" in line


def test_pickles_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    line = refusal(saved)
    assert "only pickled weights" in line and "pytorch_model.bin" in line and "save_pretrained" in line


def test_remote_code_is_refused_by_name(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "acme", "auto_map": {"AutoConfig": "conf.C", "AutoModelForCausalLM": "conf.M"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "conf.py").write_text("raise SystemExit('this code must not run')")
    line = refusal(saved)
    assert "needs code that its repository ships" in line and "trust_remote_code: true" in line


def test_a_tokenizer_longer_than_the_embeddings(saved: Path) -> None:
    policy = PolicyModel.from_pretrained(saved)
    policy.tokenizer.add_tokens(["extra"])
    policy.tokenizer.save_pretrained(saved)
    line = refusal(saved)
    assert "got 264 tokens and 263 embeddings" in line


def test_padding_may_share_the_end_token(saved: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = saved / name
        if path.is_file():
            kept = json.loads(path.read_text())
            kept.pop("pad_token", None)
            path.write_text(json.dumps(kept))
    policy = PolicyModel.from_pretrained(saved)
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id


def test_no_tokenizer(saved: Path) -> None:
    for path in saved.glob("*token*"):
        path.unlink()
    assert str(saved) in refusal(saved)


def test_an_adapter_for_another_base(saved: Path, tmp_path: Path) -> None:
    PolicyModel.from_pretrained(saved, lora=LoraConfig(rank=2)).save_pretrained(tmp_path / "adapter")
    other = tmp_path / "other"
    save_tiny(other, hidden=32)
    shutil.rmtree(saved)
    other.rename(saved)
    assert "the adapter doesn't fit its base" in refusal(tmp_path / "adapter")


def test_a_damaged_weights_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "model.safetensors is cut off" in refusal(saved)
    path.write_bytes(b"\x08" + bytes(7) + b"not JSON" + bytes(100))
    assert "can't be loaded" in refusal(saved)
