"""Frozen weights are held in the precision of the products, which changes nothing; what is saved is as wide as what came."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from batches import random_batch
from safetensors import safe_open
from short_run import short_run
from torch import Tensor, nn

from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, ProcessRewardModel, RewardModel
from rlhf_core.models.precision import DTYPES
from rlhf_core.testing.tiny import VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(4) for b in range(4)]
PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 3)} for a in range(8)]
SHAPE = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
FEW = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 128}
KINDS: dict[str, Any] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**FEW, tie_word_embeddings=True)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=2, n_positions=128)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**FEW | {"vocab_size": 272})),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**FEW, head_dim=16)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**FEW, num_local_experts=4, num_experts_per_tok=2)),
    "gpt-oss": lambda: T.GptOssForCausalLM(T.GptOssConfig(**FEW, head_dim=16, num_local_experts=4)),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(**SHAPE, hidden_size=32, n_layer=2, n_head=2)),
    # Its convolutions leak between packed rows by less than the rounding of bf16, so it must be tried without.
    "lfm2": lambda: T.Lfm2ForCausalLM(T.Lfm2Config(**FEW, layer_types=["conv", "full_attention"])),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**SHAPE, hidden_size=32, num_hidden_layers=2, state_size=8)),
}


def save(model: Any, path: Path, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(layers=1, hidden=32), tmp_path_factory.mktemp("bf16") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("wide") / "model", layers=1, hidden=32)


def types(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def weights(model: nn.Module, *, trained: bool) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in model.named_parameters() if p.requires_grad == trained}


def shake(policy: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def results(policy: PolicyModel, *, autocast: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probabilities and gradients in bf16 products."""
    policy.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logps = policy.token_logps(random_batch(3, 2))
    logps.sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_holding_frozen_weights_in_16_bits_changes_no_result(tmp_path: Path, kind: str, stored: torch.dtype) -> None:
    torch.manual_seed(0)
    path = save(KINDS[kind](), tmp_path / kind, stored)
    lora = LoraConfig(rank=2, exclude_modules=["out_proj"])  # which peft takes for none of Mamba's
    narrow, full = (
        PolicyModel.from_pretrained(path, precision="bf16", lora=lora, frozen_precision=frozen).eval()
        for frozen in ("auto", "float32")
    )
    assert set(weights(narrow, trained=True).values()) == {torch.float32} == set(weights(full, trained=False).values())
    assert narrow.probe_result.arrangement == full.probe_result.arrangement
    held, before = (sum(p.nbytes for p in m.parameters() if not p.requires_grad) for m in (narrow, full))
    assert held < 0.95 * before
    narrow.load_state_dict(full.state_dict())
    for policy in (narrow, full):
        shake(policy)
    (logps, gradients), (expected, wanted) = results(narrow), results(full)
    assert gradients.keys() == wanted.keys()
    if kind in ("mixtral", "gpt-oss"):  # whose experts autocast leaves in float32
        assert float((logps - expected).norm() / expected.norm()) < 1e-2
    else:
        assert torch.equal(logps, expected)
        assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    # Without a caller's autocast they see to their precision themselves.
    assert torch.equal(results(narrow, autocast=False)[0], logps)
    assert narrow.generate(["a"], max_new_tokens=3, temperature=0)[0][0].ids


def test_what_products_do_not_read_stays_float32(bf16: Path) -> None:
    policy = PolicyModel.from_pretrained(bf16, precision="bf16", lora=LoraConfig(rank=2))
    frozen = weights(policy, trained=False)
    assert {name.split(".")[-2] for name, dtype in frozen.items() if dtype == torch.float32} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert frozen["model.base_model.model.model.embed_tokens.weight"] == torch.bfloat16
    assert policy.head.weight is policy.network.get_input_embeddings().weight, "tied still"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert policy.hidden_states(random_batch(2, 1)).values.dtype == torch.float32


def test_embeddings_that_16_bits_do_not_hold_stay_float32(wide: Path) -> None:
    policy = PolicyModel.from_pretrained(wide, precision="bf16", lora=LoraConfig(rank=2))
    assert policy.network.get_input_embeddings().weight.dtype == torch.float32


def test_a_wholly_trained_model_and_one_from_memory_stay_as_wide_as_they_are(bf16: Path) -> None:
    assert set(weights(PolicyModel.from_pretrained(bf16, precision="bf16"), trained=True).values()) == {torch.float32}
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    policy.configure(TrainerConfig(precision="bf16", lora={"rank": 2}))  # type: ignore[arg-type]
    assert set(weights(policy, trained=False).values()) == {torch.float32}


def test_a_narrowed_model_is_widened_for_float32_products(bf16: Path) -> None:
    policy = PolicyModel.from_pretrained(bf16, precision="bf16", lora=LoraConfig(rank=2))
    policy.configure(TrainerConfig())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    expected = PolicyModel.from_pretrained(bf16).token_logps(random_batch(3, 2))
    assert torch.allclose(policy.token_logps(random_batch(3, 2)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=["whole modules", "embeddings", "DoRA"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_adapters_of_every_form_train_on_16_bits(
    bf16: Path, tmp_path: Path, options: dict[str, Any], precision: str
) -> None:
    trainer = short_run("sft", bf16, ROWS, tmp_path / "run", lora={"rank": 2, **options}, precision=precision)
    assert set(weights(trainer.policy, trained=True).values()) == {torch.float32}
    again = PolicyModel.from_pretrained(tmp_path / "run/model", precision=precision)
    assert torch.equal(results(again)[0], results(trainer.policy.eval())[0])


def test_products_of_float32_need_frozen_weights_of_float32() -> None:
    with pytest.raises(ConfigError, match="frozen_precision bf16 needs `precision: bf16`"):
        TrainerConfig.parse({"frozen_precision": "bf16"})


@pytest.mark.parametrize("source", ["bf16", "wide"])
@pytest.mark.parametrize(
    "options", [{"lora": {"rank": 2}}, {"reference": "copy"}, {"reference": "copy", "lora": {"rank": 2}}]
)
def test_policy_and_reference_are_equal_at_first(
    request: pytest.FixtureRequest, tmp_path: Path, source: str, options: dict[str, Any]
) -> None:
    model = request.getfixturevalue(source)
    trainer = short_run("dpo", model, PAIRS, tmp_path / "run", precision="bf16", **options)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    if "lora" not in options:
        assert torch.bfloat16 in weights(trainer.reference.model, trained=False).values()
    assert set(weights(trainer.policy, trained=True).values()) == {torch.float32}


def test_a_copied_mixture_of_experts_is_equal_at_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save(KINDS["mixtral"](), tmp_path / "mixtral", torch.bfloat16)
    short_run("dpo", model, PAIRS, tmp_path / "run", precision="bf16", max_steps=1, max_length=64)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_a_resumed_run_with_frozen_16_bits_is_the_same(bf16: Path, tmp_path: Path) -> None:
    options = {"precision": "bf16", "lora": {"rank": 2}, "max_steps": 4, "checkpoint": {"every": 2}}
    whole = short_run("dpo", bf16, PAIRS, tmp_path / "whole", **options)
    killed = short_run("dpo", bf16, PAIRS, tmp_path / "killed", **options)
    saved = types(tmp_path / "killed/checkpoints/step-4/model.safetensors")
    assert saved and set(saved.values()) == {"F32"} and all("lora_" in name for name in saved)
    for path in (tmp_path / "killed/checkpoints/step-4").iterdir():
        path.unlink()
    resumed = type(killed)(killed.config, model=bf16, data=PAIRS, output=tmp_path / "killed")
    resumed.train(resume=True)
    theirs = dict(whole.policy.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in resumed.policy.named_parameters())


def test_a_reward_model_that_is_only_read_is_held_in_16_bits(bf16: Path, tmp_path: Path) -> None:
    RewardModel.from_pretrained(bf16, new_head=True).save_pretrained(tmp_path / "reward")
    narrow = RewardModel.from_pretrained(tmp_path / "reward", precision="bf16", frozen=True)
    full = RewardModel.from_pretrained(tmp_path / "reward", precision="bf16").eval()
    assert torch.bfloat16 in weights(narrow, trained=False).values() and not weights(narrow, trained=True)
    assert {p.dtype for p in narrow.heads.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(narrow.score(random_batch(3, 1)), full.score(random_batch(3, 1)))


# What is saved


def test_a_model_is_saved_as_wide_as_it_came(
    bf16: Path, wide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = short_run("sft", bf16, ROWS, tmp_path / "run")
    assert "saved in bfloat16, as it came" in caplog.text
    saved = tmp_path / "run/model"
    assert set(types(saved / "model.safetensors").values()) == {"BF16"}
    assert types(saved / "model.safetensors").keys() == types(bf16 / "model.safetensors").keys(), "tied still"
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    again = T.AutoModelForCausalLM.from_pretrained(saved)
    assert again.dtype == torch.bfloat16
    for name, parameter in trainer.policy.network.named_parameters():
        assert torch.equal(parameter.detach().bfloat16(), again.get_parameter(name))
    assert set(types(tmp_path / "run/checkpoints/step-2/model.safetensors").values()) == {"F32"}
    caplog.clear()
    short_run("sft", wide, ROWS, tmp_path / "wide")
    assert set(types(tmp_path / "wide/model/model.safetensors").values()) == {"F32"} and "saved in" not in caplog.text


def test_the_width_that_is_asked_for_is_saved(bf16: Path, wide: Path, tmp_path: Path) -> None:
    short_run("sft", bf16, ROWS, tmp_path / "more", save_precision="float32")
    short_run("sft", wide, ROWS, tmp_path / "less", save_precision="fp16")
    short_run("sft", wide, ROWS, tmp_path / "lora", save_precision="bf16", lora={"rank": 2})
    assert set(types(tmp_path / "more/model/model.safetensors").values()) == {"F32"}
    assert set(types(tmp_path / "less/model/model.safetensors").values()) == {"F16"}
    assert set(types(tmp_path / "lora/model/adapter_model.safetensors").values()) == {"BF16"}
    assert json.loads((tmp_path / "less/model/config.json").read_text())["dtype"] == "float16"


def test_tensors_of_another_type_keep_it(tmp_path: Path) -> None:
    model = tiny_model(layers=1, hidden=32).bfloat16()
    model.model.norm.float()
    path = save_mixed(model, tmp_path / "mixed")
    assert set(types(path / "model.safetensors").values()) == {"BF16", "F32"}
    short_run("sft", path, ROWS, tmp_path / "run")
    assert types(tmp_path / "run/model/model.safetensors") == types(path / "model.safetensors")
    short_run("reward_model", path, PAIRS, tmp_path / "reward")
    saved = types(tmp_path / "reward/model/model.safetensors")
    assert saved["norm.weight"] == "F32" and set(saved.values()) == {"BF16", "F32"}


def save_mixed(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_an_adapter_is_saved_as_wide_as_it_came(bf16: Path, tmp_path: Path) -> None:
    short_run("sft", bf16, ROWS, tmp_path / "first", lora={"rank": 2}, precision="bf16")
    first = tmp_path / "first/model"
    assert set(types(first / "adapter_model.safetensors").values()) == {"F32"}, "a new one, as it was trained"
    short_run("sft", bf16, ROWS, tmp_path / "narrow", lora={"rank": 2}, save_precision="bf16")
    for name, width in ((first, "F32"), (tmp_path / "narrow/model", "BF16")):
        trainer = short_run("sft", name, ROWS, tmp_path / f"again-{width}", precision="bf16")
        assert set(types(tmp_path / f"again-{width}/model/adapter_model.safetensors").values()) == {width}
        assert set(weights(trainer.policy, trained=True).values()) == {torch.float32}
        assert torch.bfloat16 in weights(trainer.policy, trained=False).values()


def test_an_adapter_on_16_bits_is_folded_in_float32_and_rounded_once(bf16: Path, tmp_path: Path) -> None:
    policy = PolicyModel.from_pretrained(bf16, precision="bf16", lora=LoraConfig(rank=2))
    shake(policy)
    policy.save_pretrained(tmp_path / "whole", merged=True)
    layer = policy.network.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    found = T.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").model.layers[0].self_attn.q_proj.weight
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("kind", [PolicyModel, RewardModel, ProcessRewardModel])
def test_frozen_weights_narrower_than_products_are_refused_as_in_a_run(kind: Any) -> None:
    with pytest.raises(ConfigError) as of_run:
        TrainerConfig.parse({"frozen_precision": "bf16"})
    options = {"new_head": True} if kind is not PolicyModel else {}
    with pytest.raises(ConfigError) as of_model:
        kind.from_pretrained("nowhere", lora=LoraConfig(), frozen_precision="bf16", **options)
    assert of_model.value.line() == of_run.value.line()


@pytest.mark.parametrize("own", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("around", ["float32", "bf16"])
@pytest.mark.parametrize("frozen", ["auto", "float32"])
@torch.no_grad()
def test_a_model_beside_the_policy_keeps_its_own_precision(own: str, around: str, frozen: Any, wide: Path) -> None:
    """A float32 teacher beside a bf16 policy, and a teacher of 16 bits beside a float32 policy."""
    hold = "float32" if own == "float32" else frozen
    teacher = PolicyModel.from_pretrained(wide, frozen=True, precision=own, frozen_precision=hold)
    batch = random_batch(3, 2)
    plain = PolicyModel.from_pretrained(wide, precision=own)
    with torch.autocast("cpu", dtype=DTYPES[own], enabled=own != "float32"):
        own_states = plain.hidden_states(batch)
        expected, again = plain.token_logps(batch), plain.token_logps(batch, states=own_states)
        logits = plain.logits(own_states.predicting())
    with torch.autocast("cpu", dtype=DTYPES[around], enabled=around != "float32"):
        states = teacher.hidden_states(batch)
        assert torch.equal(teacher.token_logps(batch), expected)
        assert torch.equal(teacher.token_logps(batch, states=states), again)
        assert torch.equal(teacher.logits(states.predicting()), logits)
        assert torch.is_autocast_enabled("cpu") == (around != "float32")
