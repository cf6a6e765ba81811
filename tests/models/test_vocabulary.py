"""Logits from hidden states are the model's own, and losses over the whole vocabulary are exact in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import make_tiny
from batches import random_batch, relative
from test_own_logprobs import CHANGES, Masked, policy_of, with_head
from torch import Tensor

from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.models import PolicyModel, apply_lora, logprobs
from rlhf_core.models.logprobs import over_vocabulary
from rlhf_core.models.output_layer import OutputLayer
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

LOW_CAPS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
}
"""Near the logits of such small models, so that a cap that is left out shows."""


def own_logits(network: Any, batch: Batch) -> Tensor:
    """Return (S, V) logits that predict the tokens in the loss mask, by transformers alone."""
    rows = []
    for r, (owner, length) in enumerate(zip(batch.owner.tolist(), batch.response_lengths.tolist(), strict=True)):
        prompt = int(batch.prompt_lengths[owner])
        ids = torch.cat([batch.prompt_ids[owner, :prompt], batch.response_ids[r, :length]])
        logits = network(input_ids=ids[None], use_cache=False).logits[0].float()
        rows.append(logits[prompt - 1 : -1][batch.loss_mask[r, :length]])
    return torch.cat(rows)


def gradients(network: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


# Factors, caps, a layer before the output embedding, a bias, and none of these.
@pytest.mark.parametrize(
    "kind", ["granite", "cohere", "minicpm3", "nanochat", "gemma2", "recurrent_gemma", "modernbert-decoder", "phi", "llama"]
)  # fmt: skip
def test_logits_of_hidden_states_are_the_models_own(kind: str) -> None:
    network = make_tiny(kind, **CHANGES.get(kind, {}), **LOW_CAPS.get(kind, {}))
    batch, policy = random_batch(3, 2, masked=True), policy_of(network)
    expected = own_logits(network, batch)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * weights).sum().backward()
    wanted = gradients(network)
    found = policy.logits(policy.hidden_states(batch).predicting())
    assert found.dtype == torch.float32 and relative(found, expected) < 1e-5
    if policy.output_layer != OutputLayer() and not policy.output_layer.own_code:
        with torch.no_grad():
            raw = policy.head(policy.hidden_states(batch).predicting())
        assert relative(raw, expected) > 1e-4, "the factor or cap would be missed"
    (found * weights).sum().backward()
    ours = gradients(network)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative(ours[name], gradient) < 1e-4, name


def test_logits_keep_leading_axes_and_take_nothing() -> None:
    for network in (tiny_model(), make_tiny("modernbert-decoder")):
        policy = policy_of(network)
        hidden = torch.randn(2, 3, policy.width)
        found = policy.logits(hidden)
        assert found.shape[:2] == (2, 3) and torch.allclose(found[1, 2], policy.logits(hidden[1, 2]), atol=1e-5)
        assert policy.logits(hidden[:, :0]).shape == (2, 0, found.shape[2])


def test_logits_see_an_adapter_on_the_output_layer() -> None:
    policy = PolicyModel(tiny_model(tie_embeddings=False), tiny_tokenizer())
    policy.model = apply_lora(policy.model, LoraConfig(rank=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = random_batch(2, 2)
    assert relative(policy.logits(policy.hidden_states(batch).predicting()), own_logits(policy.network, batch)) < 1e-5


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    logps = teacher.log_softmax(-1)
    return (logps.exp() * (logps - student.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "modernbert-decoder"])
def test_a_divergence_over_the_vocabulary_is_exact_in_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = policy_of(make_tiny(kind)), policy_of(make_tiny(kind, seed=1))
    batch = random_batch(4, 2, masked=True)
    weights = torch.rand(batch.num_loss_tokens, generator=torch.Generator().manual_seed(0))
    expected = forward_kl(own_logits(student.network, batch), own_logits(teacher.network, batch).detach())
    (expected * weights).sum().backward()
    wanted = gradients(student.network)
    monkeypatch.setattr(logprobs, "chunk_rows", lambda vocabulary, device: 3)
    widths: list[int] = []

    def noted(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        widths.append(len(one))
        return forward_kl(one, other) * weight

    with torch.no_grad():
        others = teacher.hidden_states(batch).predicting()
    states = student.hidden_states(batch)
    found = over_vocabulary(noted, (student.logits, states.predicting()), (teacher.logits, others), columns=[weights])
    assert relative(found, expected * weights) < 1e-4  # a small difference of larger numbers
    found.sum().backward()
    assert max(widths) == 3 and len(widths) == 2 * -(-batch.num_loss_tokens // 3)
    ours = gradients(student.network)
    for name, gradient in wanted.items():
        assert relative(ours[name], gradient) < 1e-4, name


def test_what_is_not_equally_long_is_refused_and_nothing_gives_nothing() -> None:
    policy = policy_of(tiny_model())
    hidden = torch.randn(4, policy.width)
    with pytest.raises(ValueError, match=r"must have one length, got \[4, 3\]"):
        over_vocabulary(forward_kl, (policy.logits, hidden), (policy.logits, hidden[:3]))
    assert over_vocabulary(forward_kl, (policy.logits, hidden[:0]), (policy.logits, hidden[:0])).shape == (0,)


def test_one_pass_gives_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "chunk_rows", lambda vocabulary, device: 3)
    policy = policy_of(tiny_model())
    hidden = torch.randn(7, policy.width, requires_grad=True)
    peak, total = over_vocabulary(lambda logits: (logits.amax(-1), logits.logsumexp(-1)), (policy.logits, hidden))
    table = policy.logits(hidden)
    assert torch.allclose(peak, table.amax(-1)) and torch.allclose(total, table.logsumexp(-1))
    (ours,) = torch.autograd.grad(peak.sum() + total.square().sum(), hidden)
    (wanted,) = torch.autograd.grad(table.amax(-1).sum() + table.logsumexp(-1).square().sum(), hidden)
    assert relative(ours, wanted) < 1e-5


def test_no_more_than_a_chunk_of_logits_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps for the backward pass, too."""
    policy = policy_of(tiny_model(vocab_size=5000))
    monkeypatch.setattr(logprobs, "CPU_CHUNK_BYTES", 4 * 5000 * 8)
    hidden = torch.randn(64, policy.width, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = policy.token_entropy(hidden)
    assert max(kept, default=0) < 8 * 5000
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_entropy_is_that_of_the_distribution(temperature: float) -> None:
    policy = policy_of(make_tiny("gemma2"))
    batch = random_batch(3, 2)
    hidden = policy.hidden_states(batch).predicting()
    expected = torch.distributions.Categorical(logits=own_logits(policy.network, batch) / temperature).entropy()
    assert relative(policy.token_entropy(hidden, temperature=temperature), expected) < 1e-4


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -torch.inf])
def test_tokens_that_a_model_leaves_out_add_no_entropy_and_no_nan(value: float) -> None:
    network = tiny_model(tie_embeddings=False)
    policy = policy_of(with_head(Masked(network.lm_head, value), network.lm_head, network))
    hidden = policy.hidden_states(random_batch(2, 1)).predicting()
    entropy = policy.token_entropy(hidden)
    left = policy.logits(hidden)[:, :-5]
    assert relative(entropy, torch.distributions.Categorical(logits=left).entropy()) < 1e-5
    entropy.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters() if p.grad is not None)


def test_equal_logits_have_the_logarithm_of_their_number_as_entropy() -> None:
    policy = policy_of(tiny_model())
    found = policy.token_entropy(torch.zeros(2, policy.width))
    assert torch.allclose(found, torch.full((2,), float(policy.head.weight.shape[0])).log(), atol=1e-5)  # type: ignore[union-attr,arg-type,operator]
