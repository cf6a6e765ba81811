"""Greedy completions equal those of transformers' own loop, token for token, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
from architectures import kinds, make_tiny, most_parameters

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.native import measure_native
from rlhf_core.infra.errors import ModelError
from rlhf_core.models.backbone import accepted
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.testing.tiny import tiny_tokenizer

PROMPTS = [[40, 50, 60, 70, 80, 90, 100], [45, 55], [40, 50, 60, 71, 81, 91, 101, 111, 121, 131, 141, 151]]
"""The first and the last begin alike."""


def greedy(policy: PolicyModel, ids: list[int], count: int) -> list[int]:
    """Return `count` tokens that transformers' loop draws greedily behind a prompt, whatever it says about ends."""
    batch = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    made = policy.causal_lm.generate(input_ids=batch, attention_mask=torch.ones_like(batch), **options)
    return list(made[0, len(ids) :].tolist())


def check_greedy(kind: str, *, by_loop: bool = False, by_forward: bool = True, **options: object) -> PolicyModel:
    """Draw greedily with both; compare, and check the log-probabilities against one forward pass over the whole sequence."""
    policy = PolicyModel(make_tiny(kind, **options), tiny_tokenizer())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)  # random models are nearly indifferent between tokens
    policy.check()
    engine = Engine(policy)
    sampling = SamplingConfig(max_new_tokens=12, min_new_tokens=12, temperature=0)
    handles = engine.prefill(PROMPTS)
    drawn = engine.extend(handles, sampling, seeds=[0, 0, 0])
    for ids, one in zip(PROMPTS, drawn, strict=True):
        if by_loop:
            assert list(one.completion.ids) == greedy(policy, ids, 12)
        if not by_forward:
            continue
        whole = torch.tensor([[*ids, *one.completion.ids]])
        plain = accepted(
            policy.network.forward, use_cache=False
        )  # as in training; some models compute otherwise with a cache
        with torch.no_grad():
            logits = policy.network(input_ids=whole, **plain).logits[0, len(ids) - 1 : -1].float()
        barred = logits.clone()
        barred[:, [token for token in (*engine._own_ends, *engine._turn_ends) if token < logits.shape[1]]] = -torch.inf
        chosen = torch.tensor(one.completion.ids)
        best, own = barred.amax(1), barred.gather(1, chosen[:, None])[:, 0]
        assert (best - own).max() < 1e-4, kind
        expected = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        assert (torch.tensor(one.completion.raw_logprobs) - expected).abs().max() < 1e-4, kind
    return policy


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gpt2", "phi3", "olmo2", "mixtral", "qwen3_moe", "gemma", "granite", "cohere"]
)
def test_families_that_decode_over_the_paged_cache(kind: str) -> None:
    assert check_greedy(kind, by_loop=True).measured(measure_native).obstacle is None


@pytest.mark.parametrize(
    "kind, options",
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("gemma2", {}),
        ("bloom", {}),
        ("mamba", {}),
        ("qwen3_next", {}),
        ("lfm2", {}),
    ],
)
def test_windows_caps_states_and_other_biases(kind: str, options: dict[str, object]) -> None:
    check_greedy(kind, by_loop=kind != "mamba", **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_every_architecture(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Against the forward pass of training; against transformers' loop where that is all there is, and counts otherwise."""
    try:
        large = most_parameters(kind) > 10_000_000
    except Exception as error:
        pytest.skip(f"can't be made tiny by rules: {type(error).__name__}: {error}")
    if large or kind == "kimi_linear":
        pytest.skip("too slow on a CPU at its smallest here")
    try:
        check_greedy(kind)
    except ModelError as error:
        pytest.skip(f"not a policy here: {error}")
    except AssertionError:
        assert "differ from training logits" in caplog.text  # and the framework says so
        check_greedy(kind, by_loop=True, by_forward=False)
