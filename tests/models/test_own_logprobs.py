"""Log-probabilities are the model's own: whatever it does between its backbone and its logits, and whatever shares a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_tiny, own_logps
from batches import random_batch, relative
from torch import Tensor, nn

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel, RewardModel
from rlhf_core.models.output_layer import OutputLayer
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


def policy_of(network: Any) -> PolicyModel:
    return PolicyModel(network.eval(), tiny_tokenizer())


HOW = {
    # Scales and caps, by whatever names: logits_scaling divides, or multiplies; logit_scale; a cap; a width of the hidden states.
    "granite": ("packed", OutputLayer(slope=0.125)),
    "hyperclovax": ("packed", OutputLayer(slope=0.25)),
    "cohere": ("packed", OutputLayer(slope=0.0625)),
    "minicpm3": ("packed", OutputLayer(slope=8.0)),
    "nanochat": ("packed", OutputLayer(cap=15.0)),
    "recurrent_gemma": ("padded", OutputLayer(cap=30.0)),
    # A layer of its own before the output embedding.
    "modernbert-decoder": ("packed", OutputLayer(own_code=True)),
    "bert": ("packed", OutputLayer(own_code=True)),
    # Attention that SDPA can't compute.
    "gpt_oss": ("padded", OutputLayer()),
    "gemma2": ("padded", OutputLayer(cap=30.0)),
    "bloom": ("padded", OutputLayer()),
    # Tokens mixed by something else than attention, or chosen ones attended to.
    "mamba": ("padded", OutputLayer()),
    "lfm2": ("padded", OutputLayer()),
    "deepseek_v32": ("padded", OutputLayer()),
    # A backbone under another name, inside a decoder, or inside a model of text and images.
    "llama4_text": ("packed", OutputLayer()),
    "mllama": ("packed", OutputLayer()),
    "opt": ("packed", OutputLayer()),
    "gemma3": ("packed", OutputLayer()),
}
CHANGES = {"granite": {"logits_scaling": 8.0}, "hyperclovax": {"logits_scaling": 0.25}}


@pytest.mark.parametrize("kind", HOW)
def test_log_probabilities_are_the_models_own(kind: str) -> None:
    network = make_tiny(kind, **CHANGES.get(kind, {}))
    batch = random_batch(3, 2)
    expected = own_logps(network, batch)
    policy = policy_of(network)
    found = policy.token_logps(batch)
    arrangement, layer = HOW[kind]
    assert policy.probe_result.arrangement == arrangement
    assert policy.output_layer == layer
    assert relative(found, expected) < 1e-5
    policy.shared_forward.layout = "padded"
    assert relative(policy.token_logps(batch), expected) < 1e-5


def test_a_cap_that_small_logits_would_hide_is_found() -> None:
    """At initialisation logits are a hundredth of the cap; trained ones are not."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    torch.manual_seed(0)
    config = RecurrentGemmaConfig(vocab_size=263, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                  num_attention_heads=2, head_dim=8, lru_width=16, logits_soft_cap=7.0)  # fmt: skip
    assert policy_of(RecurrentGemmaForCausalLM(config)).output_layer == OutputLayer(cap=7.0)


class Odd(nn.Module):
    """An output layer that nobody wrote before."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.asinh(self.inner(hidden)) * 3


def test_an_output_layer_that_nobody_knows_is_the_models_own() -> None:
    network = tiny_model(tie_embeddings=False)
    plain = network.lm_head
    network.get_output_embeddings = lambda: plain
    network.lm_head = Odd(plain)
    batch = random_batch(3, 2)
    policy = policy_of(network)
    assert policy.output_layer == OutputLayer(own_code=True)
    found = policy.token_logps(batch)
    assert relative(found, own_logps(network, batch)) < 1e-5
    found.sum().backward()
    gradient = plain.weight.grad
    assert gradient is not None
    network.zero_grad()
    with torch.enable_grad():
        ids = torch.cat([batch.prompt_ids[0, : int(batch.prompt_lengths[0])], batch.response_ids[0]])[None]
        assert network(ids).logits.requires_grad
    assert gradient.abs().sum() > 0


def test_a_gradient_through_the_models_own_code_is_autograds() -> None:
    network = make_tiny("modernbert-decoder")
    batch = random_batch(2, 2)
    policy = policy_of(network)
    policy.token_logps(batch).sum().backward()
    ours = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    total = torch.zeros(())
    for r in range(batch.num_responses):
        owner, length = int(batch.owner[r]), int(batch.response_lengths[r])
        prompt = int(batch.prompt_lengths[owner])
        ids = torch.cat([batch.prompt_ids[owner, :prompt], batch.response_ids[r, :length]])
        logps = network(input_ids=ids[None]).logits[0].log_softmax(-1)
        total = total + logps[prompt - 1 : -1].gather(1, ids[prompt:, None]).sum()
    total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and relative(ours[name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_an_encoder_is_refused_as_a_policy(scale: float) -> None:
    """Fresh from initialisation too, where attention is so weak that it sees the tokens it predicts only a little."""
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=263, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    for network in (BertForMaskedLM(config), BertLMHeadModel(config)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(scale if parameter.dim() > 1 else 1)
        with pytest.raises(ModelError, match="not a causal language model") as caught:
            policy_of(network).token_logps(random_batch(1, 1))
        assert caught.value.exit_code == 4


def test_an_encoder_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=263, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        PolicyModel.from_pretrained(tmp_path)


def test_hidden_states_narrower_than_the_configuration_says_make_a_reward_model(tmp_path: Path) -> None:
    """OPT-350m's layers are 32 wide here, its hidden states 16."""
    network = make_tiny("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    model = RewardModel.on(policy_of(network).without_head())
    batch = random_batch(3, 2)
    scores = model.eval().score(batch)
    assert scores.shape == (6,) and bool(scores.isfinite().all())
    model.save_pretrained(tmp_path / "reward")
    again = RewardModel.from_pretrained(tmp_path / "reward").eval()
    assert relative(again.score(batch), scores) < 1e-6


def test_a_long_packed_row_of_a_model_that_counts_along_it_is_padded() -> None:
    """Llama 4 scales queries by their place in the row, from a number of tokens on."""
    policy = policy_of(make_tiny("llama4_text", floor_scale=24, no_rope_layers=[0, 0], attn_scale=2.0))
    assert policy.probe_result.longest_row == 24 and policy.probe_result.arrangement == "packed"
    for batch in (random_batch(1, 1, longest=6), random_batch(4, 2)):
        assert relative(policy.token_logps(batch), own_logps(policy.network, batch)) < 1e-5


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_what_only_longer_sequences_show_is_found_when_they_come(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    """Doge attends to chosen tokens only from a length on, and chooses others for a padded row than for one alone."""
    policy = policy_of(make_tiny("doge", keep_window_size=16))
    policy.shared_forward.layout = layout  # type: ignore[assignment]
    for longest, arrangement in ((6, "padded"), (30, "alone"), (6, "alone")):
        batch = random_batch(3, 2, longest=longest, seed=3)
        assert relative(policy.token_logps(batch), own_logps(policy.network, batch)) < 1e-5
        assert policy.probe_result.arrangement == arrangement


class ByPlace(nn.Module):
    """Logits that depend on where in the row a token stands, on top of a plain output layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) * torch.linspace(1, 2, hidden.shape[1])[:, None]


class Masked(nn.Module):
    """Tokens that a model never gives, left out in the way that models do, on top of an output layer of its own."""

    def __init__(self, inner: nn.Linear, value: float) -> None:
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, hidden: Tensor) -> Tensor:
        logits = torch.asinh(self.inner(hidden))
        logits[..., -5:] = self.value
        return logits


def with_head(head: nn.Module, plain: nn.Linear, network: Any) -> Any:
    network.get_output_embeddings = lambda: plain
    network.lm_head = head
    return network


def test_logits_that_hidden_states_alone_dont_decide_are_refused() -> None:
    network = tiny_model(tie_embeddings=False)
    policy = policy_of(with_head(ByPlace(network.lm_head), network.lm_head, network))
    with pytest.raises(ModelError, match="depend on more than its hidden states") as caught:
        policy.token_logps(random_batch(1, 1))
    assert caught.value.fix is not None


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e30, -torch.inf])
def test_tokens_that_a_model_leaves_out_hide_nothing(value: float) -> None:
    network = tiny_model(tie_embeddings=False)
    batch = random_batch(2, 2)
    policy = policy_of(with_head(Masked(network.lm_head, value), network.lm_head, network))
    assert relative(policy.token_logps(batch), own_logps(network, batch)) < 1e-5
    assert policy.output_layer == OutputLayer(own_code=True)


def test_a_network_with_anothers_adapters_takes_no_more() -> None:
    network = tiny_model()
    PolicyModel(network, tiny_tokenizer()).set_options(lora=LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="already has adapters"):
        PolicyModel(network, tiny_tokenizer()).set_options(lora=LoraConfig(rank=2))


# Positions that depend on how long the sequence is


def longrope() -> Any:
    parameters = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4,
                  "original_max_position_embeddings": 16}  # fmt: skip
    return make_tiny("phi3", original_max_position_embeddings=16, rope_parameters=parameters)


def dynamic() -> Any:
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return make_tiny("llama", max_position_embeddings=12, rope_parameters=parameters)


@pytest.mark.parametrize("make", [longrope, dynamic])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_company_in_a_batch_changes_no_position(make: Any, layout: str) -> None:
    """Responses of one prompt stand on both sides of the length from which on frequencies differ."""
    network = make()
    batch = random_batch(4, 3, longest=14)
    totals = batch.prompt_lengths[batch.owner] + batch.response_lengths
    assert int(totals.min()) <= 12 and int(totals.max()) > 16
    # Each from a model without a past: dynamic frequencies are kept after a long sequence.
    alone = [policy_of(make()).token_logps(batch.select([p])) for p in range(4)]
    policy = policy_of(network)
    policy.shared_forward.layout = layout  # type: ignore[assignment]
    found = policy.token_logps(batch)
    expected = torch.zeros(found.shape)
    for r in range(batch.num_responses):
        owner, length = int(batch.owner[r]), int(batch.response_lengths[r])
        one = batch.select([owner])
        expected[r, :length] = own_logps(make(), one)[r % 3, :length]
    assert relative(found, expected) < 1e-5
    for p in range(4):
        width = alone[p].shape[1]
        assert relative(found[3 * p : 3 * p + 3, :width], alone[p]) < 1e-5
