"""Norms take one kernel on a GPU and give the same numbers; what isn't such a norm, and every CPU, keeps the model's own code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from batches import random_batch, relative

from rlhf_core.models import PolicyModel
from rlhf_core.models.fused_norms import fuse_norms
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each call of PyTorch's kernel, which a CPU has too."""
    calls: list[int] = []
    kernel = torch.nn.functional.rms_norm

    def counted(*given: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*given)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", counted)
    return calls


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a norm's, which begins as ones or zeros
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def family(name: str) -> Any:
    import transformers

    shape = {
        "vocab_size": 263, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**shape)
    torch.manual_seed(0)
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config).eval())


@pytest.mark.parametrize(("name", "fuses"), [("Llama", True), ("Qwen3", True), ("Mistral", True), ("Gemma", False)])
def test_a_familys_numbers_stay(name: str, fuses: bool, kernel_calls: list[int]) -> None:
    """Gemma's norms multiply by 1 + w, and so keep their own code."""
    plain, fused = family(name), family(name)
    norms = fuse_norms(fused, devices=("cpu",))
    assert norms >= 5
    ids = torch.arange(40).view(2, 20)
    losses = [model(ids).logits.log_softmax(-1)[..., 0].sum() for model in (plain, fused)]
    assert relative(losses[1].detach(), losses[0].detach()) < 1e-5
    for loss in losses:
        loss.backward()
    for mine, own in zip(fused.parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, own.grad) < 1e-4
    compared = len(kernel_calls)
    assert compared == (2 * norms if fuses else norms)  # each was tried once, and used where it agreed
    fused(ids)
    assert len(kernel_calls) == compared + norms * fuses


def test_a_cpu_computes_the_same_bits_as_before(kernel_calls: list[int]) -> None:
    plain, fused = tiny_model(), tiny_model()
    assert fuse_norms(fused) == 5
    ids = torch.arange(20)[None]
    assert torch.equal(plain(ids).logits, fused(ids).logits) and not kernel_calls


def test_a_copy_has_norms_of_its_own() -> None:
    model = tiny_model()
    fuse_norms(model, devices=("cpu",))
    policy = PolicyModel(model, tiny_tokenizer()).set_options()
    batch = random_batch(2, 2)
    before = policy.token_logps(batch).detach()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.mul_(2)
    assert torch.equal(reference.token_logps(batch), before)
    assert not torch.equal(policy.token_logps(batch), before)


def test_a_model_can_still_be_pickled() -> None:
    model = tiny_model()
    fuse_norms(model)
    again = pickle.loads(pickle.dumps(model))
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_sixteen_bits_and_mixed_ones(kernel_calls: list[int]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = randomised(LlamaRMSNorm(64))
    fuse_norms(norm, devices=("cpu",))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    own = LlamaRMSNorm.forward(norm, x.bfloat16())
    assert (
        norm(x.bfloat16()).dtype == own.dtype == torch.float32 and not kernel_calls
    )  # weights are wider: its own code
    norm.bfloat16()
    narrow = norm(x.bfloat16())
    assert narrow.dtype == torch.bfloat16 and len(kernel_calls) == 2  # compared, then used
    norm(x.bfloat16())
    assert len(kernel_calls) == 3
    assert relative(narrow.float(), LlamaRMSNorm.forward(norm, x.bfloat16()).float()) < 1e-2
