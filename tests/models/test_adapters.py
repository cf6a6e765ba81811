"""A model that is given as an adapter is what peft makes of it: on tied embeddings, on another adapter, with new tokens."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from batches import random_batch
from short_run import short_run
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_core import registry
from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel, ProcessRewardModel, Reference, RewardModel
from rlhf_core.testing.tiny import save_tiny, tiny_tokenizer

ROWS = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(4) for b in range(4)]
PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 3)} for a in range(8)]
IDS = torch.randint(7, 263, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tied") / "model", layers=1, hidden=32)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("untied") / "model", layers=1, hidden=32, tie_embeddings=False)


def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def adapter(model: Any, path: Path, seed: int = 1, **options: Any) -> Path:
    """Save an adapter with random weights on a model as peft does."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4} | options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def rename_base(path: Path, base: str) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


ON_TIED: dict[str, dict[str, Any]] = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "embeddings saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 100]},
    "the embeddings' parameter": {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
    "tied by peft": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("name", ON_TIED)
def test_an_adapter_of_tied_embeddings_is_what_peft_loads(tied: Path, tmp_path: Path, name: str) -> None:
    path = adapter(plain(tied), tmp_path / "adapter", **ON_TIED[name])
    expected = logits(peft.PeftModel.from_pretrained(plain(tied), path))
    assert far(expected, logits(plain(tied))) > 1e-2
    assert far(logits(PolicyModel.from_pretrained(path).network), expected) < 1e-5
    folded = PolicyModel.from_pretrained(path, adapter="fold")
    assert not folded.has_adapter and all(parameter.requires_grad for parameter in folded.parameters())
    assert far(logits(folded.network), expected) < 1e-5
    for number, policy in enumerate((folded, PolicyModel.from_pretrained(path))):
        policy.save_pretrained(tmp_path / f"whole-{number}", merged=True)
        assert far(logits(policy.network), expected) < 1e-5, "saving must not change the model"
        assert far(logits(plain(tmp_path / f"whole-{number}")), expected) < 1e-5
        assert far(logits(PolicyModel.from_pretrained(tmp_path / f"whole-{number}").network), expected) < 1e-5


def test_embeddings_stay_tied_where_a_fold_leaves_them_equal(tied: Path, tmp_path: Path) -> None:
    path = adapter(plain(tied), tmp_path / "adapter", target_modules=["q_proj"])
    folded = PolicyModel.from_pretrained(path, adapter="fold")
    assert folded.network.lm_head.weight is folded.network.get_input_embeddings().weight
    assert folded.network.config.tie_word_embeddings


def test_a_fold_that_makes_another_model_is_refused(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter(plain(tied), tmp_path / "adapter", target_modules=["lm_head"])
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", peft.LoraModel.unload)  # as a library that merges wrongly
    with pytest.raises(
        ModelError, match=r"without changing the model's outputs; got outputs that differ by .*continue"
    ):
        PolicyModel.from_pretrained(path, adapter="fold")


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_what_is_trained_saved_and_loaded_agree(tied: Path, tmp_path: Path, targets: list[str]) -> None:
    trainer = short_run("sft", tied, ROWS, tmp_path / "run", lora={"rank": 4, "target_modules": targets})
    trained = logits(trainer.policy.model)
    assert far(trained, logits(plain(tied))) > 1e-3
    saved = tmp_path / "run/model"
    assert far(logits(peft.PeftModel.from_pretrained(plain(tied), saved)), trained) < 1e-5
    assert far(logits(PolicyModel.from_pretrained(saved).network), trained) < 1e-5


# An adapter as the model


def test_an_adapter_is_trained_on_and_saved_as_one(
    tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = adapter(plain(tied), tmp_path / "first", target_modules=["q_proj"])
    before = {n: p.clone() for n, p in PolicyModel.from_pretrained(first).named_parameters()}
    caplog.set_level(logging.INFO)
    trainer = short_run("sft", first, ROWS, tmp_path / "run")
    changed = {n for n, p in trainer.policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name for name in changed)
    trainable = sum(p.numel() for n, p in trainer.policy.named_parameters() if "lora_" in n)
    assert f"trainable {trainable:,} of " in caplog.text
    assert f"adapter {first} (LoRA of rank 4 on {tied}); its base stays as it is" in caplog.text
    saved = tmp_path / "run/model"
    assert {p.name for p in saved.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (saved / "model.safetensors").exists()
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tied)
    assert far(logits(peft.PeftModel.from_pretrained(plain(tied), saved)), logits(trainer.policy.model)) < 1e-5


def test_a_folded_adapter_trains_every_weight_or_a_new_adapter(
    tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = adapter(plain(tied), tmp_path / "first", target_modules=["q_proj"])
    caplog.set_level(logging.INFO)
    whole = short_run("sft", first, ROWS, tmp_path / "whole", adapter="fold")
    assert f"adapter {first} (LoRA of rank 4): folded into the weights of {tied}" in caplog.text
    assert all(parameter.requires_grad for parameter in whole.policy.parameters())
    fresh = short_run("sft", first, ROWS, tmp_path / "fresh", adapter="fold", lora={"rank": 2})
    assert {n.split(".")[-2] for n, p in fresh.policy.named_parameters() if p.requires_grad} == {"default"}
    for trainer in (whole, fresh):
        expected = logits(trainer.policy.model)
        assert far(logits(plain(trainer.output / "model")), expected) < 1e-5


def test_lora_of_another_shape_than_the_adapters_is_refused(tied: Path, tmp_path: Path) -> None:
    first = adapter(plain(tied), tmp_path / "first", target_modules=["q_proj"], lora_alpha=8)
    assert PolicyModel.from_pretrained(first, lora=LoraConfig(rank=4, alpha=8.0)).has_adapter
    assert PolicyModel.from_pretrained(first, lora=LoraConfig()).has_adapter
    with pytest.raises(ConfigError, match=r"another shape; got rank 4 in the model, 8 in the options.*adapter: fold"):
        PolicyModel.from_pretrained(first, lora=LoraConfig(rank=8))


@pytest.mark.parametrize("reference", ["auto", "copy", "precompute"])
def test_the_reference_of_an_adapter_is_the_adapter_as_passed_in(tied: Path, tmp_path: Path, reference: str) -> None:
    first = adapter(plain(tied), tmp_path / "first", target_modules=["q_proj"])
    trainer = short_run("dpo", first, PAIRS, tmp_path / "run", reference=reference, max_steps=3)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[-1]["loss"] < 0.69
    batch = random_batch(3, 2)
    expected = PolicyModel.from_pretrained(first).eval().response_logps(batch)
    assert not torch.allclose(trainer.policy.response_logps(batch), expected, atol=1e-2)
    if reference != "precompute":
        moved = trainer.policy.response_logps(batch)
        assert torch.allclose(trainer.reference.response_logps(batch), expected, atol=1e-5)
        assert torch.equal(trainer.policy.response_logps(batch), moved), "the policy is as it was"


def test_the_reference_of_an_adapter_copies_the_adapter_alone(tied: Path, tmp_path: Path) -> None:
    policy = PolicyModel.from_pretrained(adapter(plain(tied), tmp_path / "first", target_modules=["q_proj"]))
    reference = Reference.create(policy)
    assert reference.mode == "copy" and reference.model is policy
    assert reference.copied == sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_a_run_that_goes_on_with_an_adapter_resumes_exactly(tied: Path, tmp_path: Path) -> None:
    first = adapter(plain(tied), tmp_path / "first", target_modules=["q_proj"])
    whole = short_run("dpo", first, PAIRS, tmp_path / "whole", max_steps=4)
    killed = tmp_path / "killed"
    short_run("dpo", first, PAIRS, killed, max_steps=4, checkpoint={"every": 2})
    shutil.rmtree(killed / "checkpoints/step-4")
    cls = registry.get("trainer", "dpo")
    resumed = cls(whole.config.updated(checkpoint={"every": 2}), model=first, data=PAIRS, output=killed)
    resumed.train(resume=True)
    theirs = dict(whole.policy.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in resumed.policy.named_parameters())


# Adapters on adapters


def stacked(untied: Path, tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """Return two adapters, the second trained on the first folded in, and what both give."""
    first = adapter(plain(untied), tmp_path / "first", 1, target_modules="all-linear")
    folded = peft.PeftModel.from_pretrained(plain(untied), first).merge_and_unload()
    second = adapter(folded, tmp_path / "second", 2, target_modules="all-linear")
    rename_base(second, str(first))
    both = peft.PeftModel.from_pretrained(
        peft.PeftModel.from_pretrained(plain(untied), first).merge_and_unload(), second
    )
    return first, second, logits(both)


def test_an_adapter_on_an_adapter_has_both(untied: Path, tmp_path: Path) -> None:
    first, second, both = stacked(untied, tmp_path)
    for use in ("continue", "fold"):
        policy = PolicyModel.from_pretrained(second, adapter=use)  # type: ignore[arg-type]
        assert far(logits(policy.network), both) < 1e-5
        assert policy.has_adapter == (use == "continue")
        # Its base, the first adapter folded in, stands nowhere, so it is saved whole.
        policy.save_pretrained(tmp_path / use)
        assert far(logits(plain(tmp_path / use)), both) < 1e-5
    files = PolicyModel.from_pretrained(second).describe()["files"]
    assert {
        "adapter_model.safetensors",
        "base/adapter_model.safetensors",
        "base/base/model.safetensors",
    } <= files.keys()
    # A third on top of them.
    third = adapter(plain(tmp_path / "fold"), tmp_path / "third", 3, target_modules=["q_proj"])
    expected = logits(peft.PeftModel.from_pretrained(plain(tmp_path / "fold"), third))
    rename_base(third, str(second))
    assert far(logits(PolicyModel.from_pretrained(third).network), expected) < 1e-5
    assert first.is_dir()


def test_a_circle_of_adapters_is_refused(untied: Path, tmp_path: Path) -> None:
    first, second, _ = stacked(untied, tmp_path)
    rename_base(first, str(second))
    with pytest.raises(ModelError, match="name each other as their base"):
        PolicyModel.from_pretrained(second)
    rename_base(first, str(first))
    with pytest.raises(ModelError, match="name each other as their base"):
        PolicyModel.from_pretrained(first)


def test_a_base_is_found_beside_its_adapter_and_a_lost_one_is_named(untied: Path, tmp_path: Path) -> None:
    first = adapter(plain(untied), tmp_path / "first", target_modules=["q_proj"])
    expected = logits(PolicyModel.from_pretrained(first).network)
    rename_base(first, os.path.relpath(untied, first))
    assert torch.equal(logits(PolicyModel.from_pretrained(first).network), expected)
    rename_base(first, str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"first: the base that this adapter names isn't there; got .*gone"):
        PolicyModel.from_pretrained(first)


def test_an_adapter_from_the_hub_is_an_adapter(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--acme--adapter/snapshots/0123"
    path = adapter(plain(untied), tmp_path / "first", target_modules=["q_proj"])
    shutil.copytree(path, snapshot)
    (cache / "models--acme--adapter/refs").mkdir()
    (cache / "models--acme--adapter/refs/main").write_text("0123")
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        name = "HF_HUB_CACHE" if "hugging" in module else "TRANSFORMERS_CACHE"
        monkeypatch.setattr(f"{module}.{name}", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    policy = PolicyModel.from_pretrained("acme/adapter")
    assert policy.has_adapter
    assert torch.equal(logits(policy.network), logits(PolicyModel.from_pretrained(path).network))


# A vocabulary that grew


def grown(base: Path, path: Path, *, tokenizer: bool = True, **options: Any) -> tuple[Path, Tensor]:
    model, tokens = plain(base), tiny_tokenizer()
    tokens.add_tokens(["<foo>", "<bar>"])
    model.resize_token_embeddings(len(tokens))
    options = {"target_modules": ["q_proj"]} | options
    saving = options.pop("saving", {})
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(path, **saving)
    if tokenizer:
        tokens.save_pretrained(path)
    return path, logits(adapted)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}],
    ids=["resized", "saved whole", "LoRA"],
)
def test_a_vocabulary_that_grew_is_loaded(
    tied: Path, untied: Path, tmp_path: Path, tie: bool, options: dict[str, Any]
) -> None:
    base = tied if tie else untied
    path, expected = grown(base, tmp_path / "adapter", **options)
    for use in ("continue", "fold"):
        policy = PolicyModel.from_pretrained(path, adapter=use)  # type: ignore[arg-type]
        found = logits(policy.network)
        assert found.shape[-1] == 265 and far(found, expected) < 1e-5
    saved = short_run("sft", path, ROWS, tmp_path / "run").output / "model"
    again = PolicyModel.from_pretrained(saved)
    assert again.network.get_input_embeddings().weight.shape[0] == 265
    resized = plain(base)
    resized.resize_token_embeddings(265)
    assert far(logits(peft.PeftModel.from_pretrained(resized, saved)), logits(again.network)) < 1e-5


def test_new_tokens_without_embeddings_are_named(tied: Path, tmp_path: Path) -> None:
    path, _ = grown(tied, tmp_path / "adapter", saving={"save_embedding_layers": False})
    with pytest.raises(
        ModelError,
        match=r"more tokens than its base.*got 265 tokens, 263 embeddings in the base.*save_embedding_layers",
    ):
        PolicyModel.from_pretrained(path)


# Other kinds of models


def test_a_reward_models_adapter_scores_as_in_peft(tied: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=1, dtype=torch.float32)
    path = adapter(base, tmp_path / "reward", task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    fresh = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=1, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(fresh, path).eval()
    batch = random_batch(3, 1)
    with torch.no_grad():
        expected = torch.cat(
            [
                theirs(input_ids=torch.cat([batch.prompt_ids[i, :p], batch.response_ids[i, :r]])[None]).logits[0]
                for i, (p, r) in enumerate(zip(batch.prompt_lengths, batch.response_lengths, strict=True))
            ]
        )
        for use in ("continue", "fold"):
            found = RewardModel.from_pretrained(path, adapter=use).eval()  # type: ignore[arg-type]
            assert far(found.score(batch), expected) < 1e-5
    model = short_run("reward_model", path, PAIRS, tmp_path / "run").models["reward"].eval()
    with torch.no_grad():
        again = RewardModel.from_pretrained(tmp_path / "run/model").eval()
        assert far(again.score(batch), model.score(batch)) < 1e-5
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("heads.") for name in trained)


@pytest.mark.parametrize("kind", [RewardModel, ProcessRewardModel])
def test_a_reward_model_starts_from_a_policys_adapter(tied: Path, tmp_path: Path, kind: Any) -> None:
    path = adapter(plain(tied), tmp_path / "policy", target_modules=["q_proj", "lm_head"])
    batch = random_batch(3, 1)
    made = [kind.from_pretrained(path, new_head=True, adapter=use).eval() for use in ("continue", "fold")]
    results = [torch.cat([t.flatten() for t in m(batch)]) if kind is ProcessRewardModel else m(batch) for m in made]
    assert far(results[0], results[1]) < 1e-5
    trained = {name for name, parameter in made[0].named_parameters() if parameter.requires_grad}
    assert trained and not any("lm_head" in name for name in trained)
    made[0].save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved").eval()
    after = torch.cat([t.flatten() for t in again(batch)]) if kind is ProcessRewardModel else again(batch)
    assert far(after, results[0]) < 1e-5


def test_adapters_that_are_no_part_of_the_layers_are_refused(tied: Path, tmp_path: Path) -> None:
    made = peft.get_peft_model(plain(tied), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    made.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match=r"this kind of adapter isn't supported.*got PROMPT_TUNING"):
        PolicyModel.from_pretrained(tmp_path / "prompt")


def test_a_classifiers_adapter_as_a_policy_loses_its_head_aloud(
    tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=1, dtype=torch.float32)
    path = adapter(base, tmp_path / "scores", task_type="SEQ_CLS", target_modules=["q_proj"])
    policy = PolicyModel.from_pretrained(path)
    assert caplog.text.count("is an adapter of a sequence classifier") == 1
    policy.save_pretrained(tmp_path / "policy")
    about = json.loads((tmp_path / "policy/adapter_config.json").read_text())
    assert (about["task_type"], about["modules_to_save"]) == ("CAUSAL_LM", None)
    expected = logits(policy.network)
    assert far(expected, logits(plain(tied))) > 1e-3
    assert far(logits(peft.PeftModel.from_pretrained(plain(tied), tmp_path / "policy")), expected) < 1e-5
    caplog.clear()
    RewardModel.from_pretrained(path)
    assert "scores sequences" not in caplog.text
