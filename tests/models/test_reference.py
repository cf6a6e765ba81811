"""The reference is the policy as it was passed in, however it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch, relative

from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel, Reference, apply_lora
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


def shake(policy: PolicyModel) -> None:
    """Change what the policy trains."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def with_adapter() -> PolicyModel:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    policy.model = apply_lora(policy.model, LoraConfig(rank=2))
    policy.fresh_adapter = True
    return policy


@pytest.mark.parametrize(
    ("mode", "lora"), [("copy", False), ("copy", True), ("adapter_off", True), ("precompute", True)]
)
def test_every_mode_gives_the_policy_as_passed_in(mode: str, lora: bool) -> None:
    policy = with_adapter() if lora else PolicyModel(tiny_model(), tiny_tokenizer())
    batch = random_batch(5, 2)
    expected = policy.response_logps(batch).detach()
    references = [
        Reference.create(policy, mode, cut=cut)  # type: ignore[arg-type]
        for cut in (None, lambda b: b.split(size=2), lambda b: b.split(max_tokens=20))
    ]
    if mode == "precompute":
        for reference in references:
            reference.precompute([batch])
    shake(policy)
    assert not torch.allclose(policy.response_logps(batch), expected, atol=1e-2)
    for reference in references:
        assert relative(reference.response_logps(batch), expected) < 1e-5


def test_the_reference_keeps_to_the_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    reference = Reference.create(policy, "copy", cut=lambda b: b.split(size=2))
    seen: list[int] = []
    forward = PolicyModel.token_logps

    def counting(self: PolicyModel, batch: Batch, **options: Any) -> torch.Tensor:
        seen.append(batch.num_prompts)
        return forward(self, batch, **options)

    monkeypatch.setattr(PolicyModel, "token_logps", counting)
    reference.response_logps(random_batch(5, 2))
    assert seen == [2, 2, 1]


def test_out_of_memory_in_the_reference_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    batch = random_batch(5, 2)
    expected = policy.response_logps(batch).detach()
    reference = Reference.create(policy, "copy")
    forward = PolicyModel.token_logps

    def tight(self: PolicyModel, batch: Batch, **options: Any) -> torch.Tensor:
        if batch.num_prompts > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return forward(self, batch, **options)

    monkeypatch.setattr(PolicyModel, "token_logps", tight)
    assert relative(reference.response_logps(batch), expected) < 1e-5


def test_auto_switches_only_a_fresh_adapter_off() -> None:
    """A trained adapter is part of what was passed in: it is snapshotted, not switched off."""
    assert Reference.create(with_adapter()).mode == "adapter_off"
    trained = with_adapter()
    trained.fresh_adapter = False
    shake(trained)
    batch = random_batch(3, 2)
    expected = trained.response_logps(batch).detach()
    reference = Reference.create(trained)
    assert reference.mode == "copy"
    shake(trained)
    assert relative(reference.response_logps(batch), expected) < 1e-5
    with pytest.raises(ConfigError, match="isn't the model that was passed in"):
        Reference.create(trained, "adapter_off")


def test_dropout_is_off_in_the_reference_and_on_again_after() -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    policy.model = apply_lora(policy.model, LoraConfig(rank=2, dropout=0.5))
    policy.fresh_adapter = True
    policy.train()
    shake(policy)
    batch = random_batch(3, 2)
    for mode in ("adapter_off", "copy"):
        reference = Reference.create(policy, mode)  # type: ignore[arg-type]
        assert torch.equal(reference.response_logps(batch), reference.response_logps(batch))
        assert policy.training


def test_precomputed_values_are_found_in_any_order_and_read_back(tmp_path: Path) -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    batch = random_batch(5, 2)
    path = tmp_path / "reference.safetensors"
    first = Reference.create(policy, "precompute")
    first.precompute([batch.select([0, 1, 2]), batch.select([3, 4])], path)
    shake(policy)
    again = Reference.create(policy, "precompute")
    again.precompute([], path)
    turned = batch.select([4, 2, 0])
    assert torch.equal(first.response_logps(turned), again.response_logps(turned))
    assert torch.equal(first.response_logps(batch).view(5, 2)[[4, 2, 0]].flatten(), first.response_logps(turned))
    with pytest.raises(ModelError, match="reference log-probabilities were precomputed") as caught:
        again.response_logps(random_batch(2, 2, seed=9))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("mode", "lora"), [("copy", False), ("copy", True), ("adapter_off", True)])
def test_every_mode_with_a_model_gives_each_tokens_log_probability_at_any_temperature(mode: str, lora: bool) -> None:
    policy = with_adapter() if lora else PolicyModel(tiny_model(), tiny_tokenizer())
    batch = random_batch(5, 2, masked=True)
    expected = policy.token_logps(batch, temperature=0.7).detach()
    assert relative(policy.token_logps(batch), expected) > 0.05
    cuts = (None, lambda b: b.split(size=2), lambda b: b.split(size=3, divide=True))
    references = [Reference.create(policy, mode, cut=cut) for cut in cuts]  # type: ignore[arg-type]
    shake(policy)
    for reference in references:
        found = reference.token_logps(batch, temperature=0.7)
        assert found.shape == batch.loss_mask.shape and not found[~batch.loss_mask].any()
        assert relative(found, expected) < 1e-5
        assert relative(reference.response_logps(batch, temperature=0.7), expected.sum(dim=1)) < 1e-5


def test_what_was_computed_once_is_sums_at_one_temperature(tmp_path: Path) -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    batch, path = random_batch(3, 2), tmp_path / "reference.safetensors"
    expected = policy.response_logps(batch, temperature=0.5).detach()
    reference = Reference.create(policy, "precompute")
    reference.precompute([batch], path, temperature=0.5)
    assert relative(reference.response_logps(batch, temperature=0.5), expected) < 1e-5
    with pytest.raises(ConfigError, match=r"reference: .*another temperature; got computed with 0.5, needed with 1"):
        reference.response_logps(batch)
    with pytest.raises(ConfigError, match=r"reference: .*sums over responses.*; got precompute; fix: set `reference:"):
        reference.token_logps(batch, temperature=0.5)
    again = Reference.create(policy, "precompute")
    with pytest.raises(ConfigError, match=r"reference.safetensors: .*got computed with 0.5, needed with 1"):
        again.precompute([], path)
    again.precompute([], path, temperature=0.5)
    assert torch.equal(again.response_logps(batch, temperature=0.5), reference.response_logps(batch, temperature=0.5))


@pytest.mark.parametrize("mode", ["copy", "adapter_off"])
def test_a_batch_without_rows_has_no_values(mode: str) -> None:
    reference = Reference.create(with_adapter(), mode)  # type: ignore[arg-type]
    none = random_batch(2, 2).select([])
    assert reference.response_logps(none).shape == (0,)
    assert reference.token_logps(none).shape == (0, 0)
