"""Greedy completions equal those of transformers' own loop, token for token, whatever the architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from architectures import kinds, make_tiny, most_parameters

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation import native, native_backend
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.native import measure_native
from rlhf_core.infra.errors import ModelError
from rlhf_core.models import fast_linears
from rlhf_core.models.backbone import accepted
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.testing.tiny import VOCAB_SIZE, tiny_tokenizer

PROMPTS = [[40, 50, 60, 70, 80, 90, 100], [45, 55], [40, 50, 60, 71, 81, 91, 101, 111, 121, 131, 141, 151]]
"""The first and the last begin alike."""
BLOCK, CHUNK = 8, 12
"""Sizes of the cache's blocks and of what is read of a prompt at once, for tests of what crosses their edges."""
_LONG = [40 + 13 * i % 200 for i in range(33)]
ACROSS = [_LONG, [45, 55], [*_LONG[:21], *(41 + 17 * i % 200 for i in range(9))]]
"""The first and the last begin alike, up to within a block; their tokens and `COUNT` more are within windows of 64."""
COUNT = 22


@pytest.fixture(autouse=True)
def _packed_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have weights packed for completions of any length, whatever is faster on this machine."""
    monkeypatch.setattr(native_backend, "PACK_FOR", 1)
    monkeypatch.setattr(fast_linears, "MARGINS", dict.fromkeys(fast_linears.MARGINS, float("inf")))
    fast_linears._way.cache_clear()
    yield
    fast_linears._way.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the cache made of small blocks, and prompts read in small chunks."""
    monkeypatch.setattr(native_backend, "BLOCK_SIZE", {"cpu": BLOCK})
    monkeypatch.setattr(native, "CHUNK", {"cpu": CHUNK})


def make_policy(kind: str, **options: object) -> PolicyModel:
    policy = PolicyModel(make_tiny(kind, **options), tiny_tokenizer())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)  # random models are nearly indifferent between tokens
    return policy


def ends_of(policy: PolicyModel) -> list[int]:
    """Return the ids that end completions, which aren't drawn before `min_new_tokens`."""
    engine = Engine(policy)
    return [token for token in (*engine._own_ends, *engine._turn_ends) if token < VOCAB_SIZE + 1]


def greedy(policy: PolicyModel, ids: list[int], count: int) -> list[int]:
    """Return `count` tokens that transformers' loop draws greedily behind a prompt, whatever it says about ends."""
    batch = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    options["eos_token_id"] = ends_of(policy)
    made = policy.causal_lm.generate(input_ids=batch, attention_mask=torch.ones_like(batch), **options)
    return list(made[0, len(ids) :].tolist())


@torch.no_grad()
def logits_in_training(policy: PolicyModel, ids: list[int], drawn: Sequence[int]) -> torch.Tensor:
    """Return (T, V) the logits that predict T drawn tokens, from one forward pass over the whole sequence."""
    # Some models compute otherwise with a cache.
    plain = accepted(policy.network.forward, use_cache=False)
    whole = torch.tensor([[*ids, *drawn]])
    return policy.network(input_ids=whole, **plain).logits[0, len(ids) - 1 : -1].float()


def shortfall(policy: PolicyModel, logits: torch.Tensor, drawn: Sequence[int]) -> float:
    """Return by how much the logits of drawn tokens are below the largest that don't end a completion, at most."""
    barred = logits.clone()
    barred[:, ends_of(policy)] = -torch.inf
    return float((barred.amax(1) - barred.gather(1, torch.tensor(drawn)[:, None])[:, 0]).max())


def loop_draws_what_training_computes(kind: str) -> bool:
    """Tell whether transformers' loop draws greedily, across the edges of blocks, what its own forward pass says."""
    policy = make_policy(kind)
    try:
        drawn = [greedy(policy, ids, COUNT) for ids in ACROSS]
    except Exception:  # whatever a model's own code raises in a loop that nobody tried
        return False
    return all(
        shortfall(policy, logits_in_training(policy, ids, own), own) < 1e-4
        for ids, own in zip(ACROSS, drawn, strict=True)
    )


def check_greedy(
    kind: str,
    prompts: list[list[int]] = PROMPTS,
    count: int = 12,
    *,
    by_loop: bool = False,
    by_forward: bool = True,
    **options: object,
) -> PolicyModel:
    """Draw greedily with both; compare, and check the log-probabilities against one forward pass over the whole sequence."""
    policy = make_policy(kind, **options)
    policy.check()
    engine = Engine(policy)
    sampling = SamplingConfig(max_new_tokens=count, min_new_tokens=count, temperature=0)
    drawn = engine.extend(engine.prefill(prompts), sampling, seeds=[0, 0, 0])
    for ids, one in zip(prompts, drawn, strict=True):
        own = list(one.completion.ids)
        if by_loop:
            assert own == greedy(policy, ids, count)
        if not by_forward:
            continue
        logits = logits_in_training(policy, ids, own)
        assert shortfall(policy, logits, own) < 1e-4, kind
        expected = logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None])[:, 0]
        assert (torch.tensor(one.completion.raw_logprobs) - expected).abs().max() < 1e-4, kind
    return policy


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gpt2", "phi3", "olmo2", "mixtral", "qwen3_moe", "gemma", "granite", "cohere"]
)
def test_families_that_decode_over_the_paged_cache(kind: str) -> None:
    assert check_greedy(kind, by_loop=True).measured(measure_native).obstacle is None


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "gpt2", "qwen3_moe"])  # shared key heads, biases, places, experts
def test_sequences_of_several_blocks_and_prompts_of_several_chunks(kind: str, small_blocks: None) -> None:
    assert check_greedy(kind, ACROSS, COUNT, by_loop=True).measured(measure_native).obstacle is None


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_blocks_and_chunks_of_the_size_that_users_get(kind: str) -> None:
    assert native_backend.BLOCK_SIZE["cpu"] < 70 and native.CHUNK["cpu"] < 290
    long = [40 + 13 * i % 200 for i in range(290)]
    prompts = [long, [45, 55], [*long[:200], *(41 + 17 * i % 200 for i in range(60))]]
    options = {"max_position_embeddings": 512, "sliding_window": None}
    policy = check_greedy(kind, prompts, 70, by_loop=True, **options)
    assert policy.measured(measure_native).obstacle is None


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


def skip_unless_tiny(kind: str) -> None:
    try:
        large = most_parameters(kind) > 10_000_000
    except Exception as error:
        pytest.skip(f"can't be made tiny by rules: {type(error).__name__}: {error}")
    if large or kind == "kimi_linear":
        pytest.skip("too slow on a CPU at its smallest here")


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_every_architecture(kind: str, small_blocks: None, caplog: pytest.LogCaptureFixture) -> None:
    """Across blocks and chunks, against the forward pass of training, and transformers' loop where that agrees with it.

    Where transformers' loop is all there is and computes something else than training does, the loop is what counts.
    """
    skip_unless_tiny(kind)
    try:
        check_greedy(kind, ACROSS, COUNT, by_loop=loop_draws_what_training_computes(kind))
    except ModelError as error:
        pytest.skip(f"not a policy here: {error}")
    except AssertionError:
        assert "differ from training logits" in caplog.text  # and the framework says so
        check_greedy(kind, ACROSS, COUNT, by_loop=True, by_forward=False)
