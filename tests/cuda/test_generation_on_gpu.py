"""Generation on a GPU: the tokens and log-probabilities of the CPU, whatever is captured, kept or swapped in for speed."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_tiny

from rlhf_core.config.online import SamplingConfig
from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.models import PolicyModel
from rlhf_core.models.fast_adapters import fast_adapters
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = "cuda"
PROMPTS = ["a", "a longer prompt than the others", [{"role": "user", "content": "hi"}], "middling"]
SAMPLING = SamplingConfig(max_new_tokens=24, temperature=0.8)


def sharp(model: Any, factor: float = 2.0) -> Any:
    """Return a model whose distributions are far from even, so that rounding changes no choice."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def both(model: Any) -> tuple[PolicyModel, PolicyModel]:
    """Return a model as a policy on the GPU and on the CPU."""
    here = PolicyModel(copy.deepcopy(model), tiny_tokenizer())
    here.to(DEVICE)
    return here, PolicyModel(model, tiny_tokenizer())


@pytest.fixture(scope="module")
def policies() -> tuple[PolicyModel, PolicyModel]:
    return both(sharp(tiny_model()))


def draw(
    policy: PolicyModel, n: int = 3, sampling: SamplingConfig = SAMPLING, **options: Any
) -> list[list[Completion]]:
    engine = Engine(policy, seed=1, **options)
    return engine.generate(prompt_batch(policy, PROMPTS), n, sampling)


def ids(drawn: Sequence[Sequence[Completion]]) -> list[list[int]]:
    return [one.ids for group in drawn for one in group]


def largest_gap(policy: PolicyModel, drawn: list[list[Completion]]) -> float:
    """Return how far raw log-probabilities are from those of the path that trains."""
    made = Batch.from_completions(prompt_batch(policy, PROMPTS), drawn)
    with torch.no_grad():
        return float((policy.token_logps(made) - made["raw_logps"]).abs().max())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma", "mixtral", "phi3", "olmo2"])
def test_greedy_completions_of_a_family_are_those_of_the_cpu(kind: str) -> None:
    here, there = both(sharp(make_tiny(kind), 1.5))
    sampling = SamplingConfig(max_new_tokens=12, min_new_tokens=12, temperature=0)
    found, wanted = draw(here, 1, sampling), draw(there, 1, sampling)
    for mine, other in zip(found, wanted, strict=True):
        # Where two tokens are equally likely up to rounding, either may be drawn, and all that follows differs.
        same = next((k for k, (a, b) in enumerate(zip(mine[0].ids, other[0].ids, strict=True)) if a != b), 12)
        assert mine[0].raw_logprobs[:same] == pytest.approx(other[0].raw_logprobs[:same], abs=1e-3)
        if same < 12:
            assert mine[0].raw_logprobs[same] == pytest.approx(other[0].raw_logprobs[same], abs=1e-3)
    assert largest_gap(here, found) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.8},
        {"top_k": 7},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"stop": ["e", "th"]},
        {"min_confidence": 3.7, "confidence_window": 3},
    ],
)
def test_a_seed_draws_the_same_on_both(options: dict[str, Any], policies: tuple[PolicyModel, PolicyModel]) -> None:
    sampling = SAMPLING.model_copy(update=options)
    found, wanted = draw(policies[0], 8, sampling), draw(policies[1], 8, sampling)
    same = [a == b for a, b in zip(ids(found), ids(wanted), strict=True)]
    assert sum(same) >= 0.9 * len(same)  # rounding moves a draw only where it falls on the border of two tokens
    for mine, other, equal in zip(chain(*found), chain(*wanted), same, strict=True):
        if equal:
            assert (mine.text, mine.stop_reason) == (other.text, other.stop_reason)
            assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-3)
            assert mine.kept_mass == pytest.approx(other.kept_mass, abs=1e-3)
            assert mine.confidence == pytest.approx(other.confidence, abs=1e-3)


def test_a_completion_is_the_same_alone_in_a_small_cache_and_in_few_rows(
    policies: tuple[PolicyModel, PolicyModel],
) -> None:
    policy, _ = policies
    batch, whole = prompt_batch(policy, PROMPTS), draw(policy, 6)
    for number in range(len(PROMPTS)):
        (alone,) = Engine(policy, seed=1).generate(batch.select([number]), 6, SAMPLING)
        assert ids([alone]) == ids([whole[number]])
    assert ids(draw(policy, 6, most_rows=3)) == ids(whole)
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert ids(draw(policy, 6, memory=per_token * 64 * 6)) == ids(whole)


def test_rows_of_their_own_length_leave_and_others_join(policies: tuple[PolicyModel, PolicyModel]) -> None:
    policy, _ = policies
    batch = prompt_batch(policy, PROMPTS)
    sampling = SamplingConfig(max_new_tokens=40, min_new_tokens=40, temperature=0.8)
    limits = [[1 + (7 * p + 3 * k) % 40 for k in range(5)] for p in range(len(PROMPTS))]
    cut = Engine(policy, seed=1, most_rows=7).generate(batch, 5, sampling, limits=limits)
    whole = Engine(policy, seed=1).generate(batch, 5, sampling)
    for p, group in enumerate(cut):
        for k, one in enumerate(group):
            assert one.ids == whole[p][k].ids[: limits[p][k]] and one.stop_reason == "length"


def test_weights_changed_between_two_calls_count() -> None:
    """What was captured or kept for the old weights isn't used for the new ones."""
    policy, _ = both(sharp(tiny_model()))
    engine, batch = Engine(policy, seed=1), prompt_batch(policy, PROMPTS)
    seeds = [[1, 2]] * len(PROMPTS)
    before = engine.generate(batch, 2, SAMPLING, seeds=seeds)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    after = engine.generate(batch, 2, SAMPLING, seeds=seeds)
    assert ids(after) == ids(Engine(policy, seed=1).generate(batch, 2, SAMPLING, seeds=seeds)) != ids(before)
    assert largest_gap(policy, after) < 1e-3


def test_handles_score_and_extend_as_on_the_cpu(policies: tuple[PolicyModel, PolicyModel]) -> None:
    prompts, tokens = [[7, 8, 9, 10], [7, 8, 9, 30, 31, 32]], [[40, 41], [50, 51, 52]]
    greedy = SamplingConfig(max_new_tokens=8, min_new_tokens=8, temperature=0)
    found = []
    for policy in policies:
        engine = Engine(policy)
        handles = engine.prefill(prompts)
        forked = engine.fork(handles[0], 3)
        extended = engine.extend([*forked, handles[1]], greedy, seeds=[0, 1, 2, 3])
        scores = engine.score(handles, tokens)
        engine.free([*handles, *forked, *(one.handle for one in extended)])
        found.append(([one.completion.ids for one in extended], [each.cpu() for each in scores]))
    (mine, scored), (other, wanted) = found
    assert mine == other and mine[0] == mine[1] == mine[2]
    for a, b in zip(scored, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_stream_ends_in_the_completion_of_its_seed(policies: tuple[PolicyModel, PolicyModel]) -> None:
    policy, _ = policies
    batch = prompt_batch(policy, PROMPTS[1:2])
    parts = list(Engine(policy).stream(batch, SAMPLING, seed=5))
    ((whole,),) = Engine(policy).generate(batch, 1, SAMPLING, seeds=[[5]])
    assert parts[-1] == whole
    assert all(whole.ids[: len(part.ids)] == part.ids for part in parts) and len(parts) >= len(whole.ids)


def test_in_bf16_the_engine_is_as_near_to_training_as_transformers_is_to_itself(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", layers=4, hidden=128)
    policy = PolicyModel.from_pretrained(tmp_path / "tiny", device=DEVICE, precision="bf16")
    sampling = SamplingConfig(max_new_tokens=32, min_new_tokens=32)
    made = Batch.from_completions(prompt_batch(policy, PROMPTS), draw(policy, 8, sampling))
    with torch.no_grad():
        gap = (policy.token_logps(made) - made["raw_logps"])[made.loss_mask].abs().mean()
    model = copy.deepcopy(policy.causal_lm).to(torch.bfloat16)
    batch = torch.randint(7, 263, (16, 12), device=DEVICE)
    drawn = model.generate(
        batch, attention_mask=torch.ones_like(batch), do_sample=True, top_k=0, max_new_tokens=32, min_new_tokens=32,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    with torch.no_grad():
        again = model(drawn.sequences).logits[:, 11:-1].float().log_softmax(-1)
    tokens = drawn.sequences[:, 12:, None]
    told = torch.stack(drawn.logits, dim=1).float().log_softmax(-1).gather(2, tokens)
    assert gap < max(2 * float((again.gather(2, tokens) - told).abs().mean()), 2e-3)


# Adapters


def adapted(directory: Path, **options: Any) -> PolicyModel:
    policy = PolicyModel.from_pretrained(directory, device=DEVICE, lora=LoraConfig(rank=4, **options))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return policy


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", layers=2, hidden=64)


@torch.no_grad()
def test_fused_adapters_compute_what_pefts_do(directory: Path) -> None:
    policy = adapted(directory)
    tokens = torch.randint(7, 263, (3, 9), device=DEVICE)
    ordinary = policy.network(input_ids=tokens).logits
    with fast_adapters(policy) as fused:
        found = [policy.network(input_ids=tokens).logits for _ in range(2)]
    assert fused == 14
    for each in found:
        torch.testing.assert_close(each, ordinary, rtol=1e-4, atol=1e-4)


def test_an_updated_adapter_is_drawn_from(directory: Path) -> None:
    policy = adapted(directory)
    engine, batch, seeds = Engine(policy), prompt_batch(policy, PROMPTS), [[3]] * len(PROMPTS)
    kept = {name: parameter.clone() for name, parameter in policy.named_parameters() if "lora_" not in name}
    first = engine.generate(batch, 1, SAMPLING, seeds=seeds)
    assert largest_gap(policy, first) < 1e-3
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.mul_(-2)
    second = engine.generate(batch, 1, SAMPLING, seeds=seeds)
    assert largest_gap(policy, second) < 1e-3 and ids(first) != ids(second)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in policy.named_parameters() if name in kept)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantised_base_generates_and_keeps_its_bits(quantize: str, directory: Path) -> None:
    policy = adapted(directory, quantize=quantize)
    kept = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.is_floating_point()}
    with torch.no_grad(), fast_adapters(policy) as fused:
        assert fused == 14
    drawn = draw(policy)
    assert kept and all(torch.equal(p, kept[name]) for name, p in policy.named_parameters() if name in kept)
    made = Batch.from_completions(prompt_batch(policy, PROMPTS), drawn)
    with torch.no_grad():
        gap = (policy.token_logps(made) - made["raw_logps"])[made.loss_mask].abs().mean()
    assert gap < 0.05
