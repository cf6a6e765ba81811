"""Several models that draw each token together: against hand-computed numbers, and full forward passes of each model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import make_tiny
from torch import Tensor

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.ensemble_backend import EnsembleBackend, Pooling, pooled_logits
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.native import measure_native
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, NumbersError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["1+1=?", "17+25=?", [{"role": "user", "content": "hi"}], "b" * 70]
SAMPLING = SamplingConfig(max_new_tokens=12)


def made(seed: int, **options: Any) -> PolicyModel:
    """A frozen model of its own shape, whose tokens aren't nearly equally likely."""
    model = tiny_model(seed, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    return PolicyModel(model, tiny_tokenizer()).requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def policies() -> list[PolicyModel]:
    return [made(0), made(1, layers=1, hidden=32), made(2, heads=2, kv_heads=1)]


def draw(
    backend: EnsembleBackend,
    policy: PolicyModel,
    sampling: SamplingConfig = SAMPLING,
    n: int = 3,
    prompts: Sequence[Any] = PROMPTS,
) -> list[list[Completion]]:
    return Engine(policy, seed=5, backend=backend).generate(prompt_batch(policy, prompts), n, sampling)


def oracle(
    policies: Sequence[PolicyModel],
    weights: Sequence[float],
    pooling: Pooling,
    prompt: Sequence[int],
    ids: Sequence[int],
) -> Tensor:
    """Return (T, V) the log-probabilities of a completion's tokens, from one full forward pass of each model."""
    whole = torch.tensor([[*prompt, *ids]])
    found = []
    with torch.no_grad():
        for policy in policies:
            logits = policy.causal_lm(input_ids=whole).logits[0, len(prompt) - 1 : -1, : len(tiny_tokenizer())].double()
            found.append(logits.log_softmax(dim=-1))
    each = [part.exp() if pooling == "probabilities" else part for part in found]
    total = sum(weight * part for weight, part in zip(weights, each, strict=True))
    assert isinstance(total, Tensor)
    return total.log() if pooling == "probabilities" else total.log_softmax(dim=-1)


def prompt_ids(policy: PolicyModel) -> list[list[int]]:
    batch = prompt_batch(policy, PROMPTS)
    lengths = batch.prompt_lengths.tolist()
    return [ids[:length] for ids, length in zip(batch.prompt_ids.tolist(), lengths, strict=True)]


def check(drawn: Sequence[Sequence[Completion]], wanted: Callable[[int, Completion], Tensor]) -> None:
    """Compare `raw_logprobs` with the log-probabilities (T, V) that `wanted` gives to a prompt's completion."""
    for number, group in enumerate(drawn):
        for one in group:
            own = wanted(number, one).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            assert one.raw_logprobs == pytest.approx(own.tolist(), abs=1e-4)


def test_two_distributions_by_hand() -> None:
    """Of (.5, .3, .2) and (.1, .1, .8): the mean, and the geometric mean √.05, √.03, √.16 divided by their sum 0.79681."""
    both = [torch.tensor([[0.5, 0.3, 0.2]]).log() + 7.0, torch.tensor([[0.1, 0.1, 0.8]]).log() - 3.0]

    def pooled(weights: Sequence[float], pooling: Pooling) -> list[float]:
        return pooled_logits(both, weights, pooling, size=3).softmax(dim=-1)[0].tolist()

    assert pooled([0.5, 0.5], "probabilities") == pytest.approx([0.3, 0.2, 0.5], abs=1e-6)
    assert pooled([0.75, 0.25], "probabilities") == pytest.approx([0.4, 0.25, 0.35], abs=1e-6)
    assert pooled([0.5, 0.5], "logits") == pytest.approx([0.280627, 0.217373, 0.502001], abs=1e-6)
    quarter = [0.5**0.75 * 0.1**0.25, 0.3**0.75 * 0.1**0.25, 0.2**0.75 * 0.8**0.25]
    assert pooled([0.75, 0.25], "logits") == pytest.approx([one / sum(quarter) for one in quarter], abs=1e-6)


def test_what_one_model_rules_out() -> None:
    """A token of probability 0 in one model stays impossible by logits, and has half of the other's by probabilities."""
    both = [torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])]
    assert pooled_logits(both, [0.5, 0.5], "logits", size=2).softmax(dim=-1)[0].tolist() == [1, 0]
    found = pooled_logits(both, [0.5, 0.5], "probabilities", size=2)[0].exp().tolist()
    assert found == pytest.approx([0.75, 0.25])


def test_ids_that_pad_an_embedding_do_not_count() -> None:
    narrow, wide = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.0, 9.0]])
    for pooling in ("logits", "probabilities"):
        found = pooled_logits([wide, narrow], [0.5, 0.5], pooling, size=2)
        assert torch.equal(found, pooled_logits([wide[:, :2], narrow], [0.5, 0.5], pooling, size=2))
    assert pooled_logits([wide], [1.0], "logits", size=2) is wide


@pytest.mark.parametrize("pooling", ["logits", "probabilities"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 0.5, 1.5]])
def test_log_probabilities_are_those_of_full_forward_passes(
    policies: list[PolicyModel], pooling: Pooling, weights: list[float]
) -> None:
    drawn = draw(EnsembleBackend(policies, weights, pooling), policies[0])
    shares, prompts = [weight / sum(weights) for weight in weights], prompt_ids(policies[0])
    check(drawn, lambda number, one: oracle(policies, shares, pooling, prompts[number], one.ids))
    assert any(len({tuple(one.ids) for one in group}) > 1 for group in drawn)


@pytest.mark.parametrize("pooling", ["logits", "probabilities"])
def test_greedy_and_truncated_draws(policies: list[PolicyModel], pooling: Pooling) -> None:
    backend, prompts, shares = EnsembleBackend(policies, None, pooling), prompt_ids(policies[0]), [1 / 3] * 3
    for number, (one,) in enumerate(draw(backend, policies[0], SAMPLING.updated(temperature=0), n=1)):
        logps = oracle(policies, shares, pooling, prompts[number], one.ids)
        assert one.ids == logps.argmax(dim=-1).tolist() and set(one.logprobs) == {0.0}
    for number, group in enumerate(draw(backend, policies[0], SAMPLING.updated(temperature=0.7, top_k=5))):
        for one in group:
            tempered = (oracle(policies, shares, pooling, prompts[number], one.ids) / 0.7).softmax(dim=-1)
            kept = tempered.topk(5).values.sum(dim=-1)
            assert one.kept_mass == pytest.approx(kept.tolist(), abs=1e-4)
            own = tempered.gather(1, torch.tensor(one.ids)[:, None])[:, 0] / kept
            assert one.logprobs == pytest.approx(own.log().tolist(), abs=1e-4)


@pytest.mark.parametrize("pooling", ["logits", "probabilities"])
def test_one_weight_or_models_alike_are_one_model(policies: list[PolicyModel], pooling: Pooling) -> None:
    first, alike = policies[0], made(0)
    wanted = Engine(first, seed=5).generate(prompt_batch(first, PROMPTS), 3, SAMPLING)
    alone = EnsembleBackend(policies, [2.0, 0.0, 0.0], pooling)
    for backend in (alone, EnsembleBackend([first, alike], [0.3, 0.7], pooling)):
        for group, others in zip(draw(backend, first), wanted, strict=True):
            for one, other in zip(group, others, strict=True):
                assert (one.ids, one.text, one.stop_reason) == (other.ids, other.text, other.stop_reason)
                assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-5)
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_same_completions_in_any_batch_and_in_little_memory(policies: list[PolicyModel]) -> None:
    backend = EnsembleBackend(policies)
    wanted = draw(backend, policies[0])
    alone = [draw(backend, policies[0], prompts=[prompt])[0] for prompt in PROMPTS]
    per_token = max(4 * one.measured(measure_native).elements for one in policies)
    # Room for three blocks in the largest model's cache: the longest prompt has two, and a completion begins its own.
    tight = EnsembleBackend(policies, memory=3 * 64 * 3 * per_token)
    few = EnsembleBackend(policies, most_rows=2)
    for found in (alone, draw(tight, policies[0]), draw(few, policies[0])):
        assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in wanted]
    with pytest.raises(NumbersError, match="doesn't suffice for one completion"):
        draw(EnsembleBackend(policies, memory=3 * 64 * 2 * per_token), policies[0], n=1)


def test_rows_that_leave_continue_with_the_same_tokens(policies: list[PolicyModel]) -> None:
    """Completions grow until no block is free; those that joined last leave all models, and are read again later."""
    longer = SamplingConfig(max_new_tokens=90, min_new_tokens=80)
    prompts = ["a", "bc", "def"]
    wanted = draw(EnsembleBackend(policies), policies[0], longer, prompts=prompts)
    per_token = max(4 * one.measured(measure_native).elements for one in policies)
    counts = [0, 0, 0]

    def counted(number: int, tokens: int) -> None:
        counts[number] += tokens

    tight = EnsembleBackend(policies, memory=3 * 64 * 10 * per_token, counted=counted)
    found = draw(tight, policies[0], longer, prompts=prompts)
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in wanted]
    for group, others in zip(found, wanted, strict=True):
        for one, other in zip(group, others, strict=True):
            assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-4)
    least = sum(len(one.ids) for group in found for one in group)
    assert counts[0] == counts[1] == counts[2] > least + 100


def test_each_model_reads_a_prompt_once(policies: list[PolicyModel]) -> None:
    counts = [0, 0, 0]

    def counted(number: int, tokens: int) -> None:
        counts[number] += tokens

    backend = EnsembleBackend(policies, [1, 0, 1], counted=counted)
    drawn = draw(backend, policies[0], n=5)
    tokens = sum(len(one.ids) for group in drawn for one in group)
    prompts = sum(len(ids) - 1 for ids in prompt_ids(policies[0]))
    assert counts == [prompts + tokens, 0, prompts + tokens]
    draw(backend, policies[0], n=5)
    assert counts == [prompts + 2 * tokens, 0, prompts + 2 * tokens]  # prompts are kept between calls


def test_stop_strings_limits_and_options_hold(policies: list[PolicyModel]) -> None:
    backend = EnsembleBackend(policies)
    free = draw(backend, policies[0], n=1)
    texts = [one.text for (one,) in free]
    text = max(texts, key=len)
    stop = text[len(text) // 2 :][:1]
    (cut,) = draw(backend, policies[0], SAMPLING.updated(stop=[stop]), n=1)[texts.index(text)]
    assert cut.stop_reason == "stop" and cut.text == text[: text.index(stop)]
    batch = prompt_batch(policies[0], PROMPTS)
    limited = Engine(policies[0], seed=5, backend=backend).generate(batch, 1, SAMPLING, limits=[[1], [2], [3], [4]])
    for most, (one,), (whole,) in zip((1, 2, 3, 4), limited, free, strict=True):
        assert one.ids == whole.ids[:most]
    with pytest.raises(ConfigError, match="`ensemble` doesn't follow this option"):
        draw(backend, policies[0], SAMPLING.updated(draft="ngram"))
    with pytest.raises(ConfigError, match="can't keep sequences and fork them"):
        Engine(policies[0], backend=backend).prefill([[1, 2]])
    with pytest.raises(ConfigError, match="can't return completions token by token"):
        next(Engine(policies[0], backend=backend).stream(batch.select([0])))


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_a_model_that_only_its_own_loop_decodes(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Attention that can't be replaced, and states that run along the row, beside a model with cached keys and values."""
    policies = [made(0), PolicyModel(make_tiny(kind), tiny_tokenizer())]
    assert policies[1].measured(measure_native).obstacle is not None
    backend, prompts = EnsembleBackend(policies, [0.6, 0.4]), prompt_ids(policies[0])
    with caplog.at_level(logging.INFO):
        drawn = draw(backend, policies[0])
        few = draw(EnsembleBackend(policies, [0.6, 0.4], most_rows=5), policies[0])
    check(drawn, lambda number, one: oracle(policies, [0.6, 0.4], "logits", prompts[number], one.ids))
    assert [[one.ids for one in group] for group in few] == [[one.ids for one in group] for group in drawn]
    said = [record for record in caplog.records if "through transformers' own loop" in record.getMessage()]
    assert len(said) == 1


def test_the_model_with_the_fewest_positions_limits(policies: list[PolicyModel]) -> None:
    short = made(3, max_positions=80)
    backend = EnsembleBackend([policies[0], short])
    sampling = SamplingConfig(max_new_tokens=40, min_new_tokens=40)
    lengths = list(map(len, prompt_ids(policies[0])))
    for length, (one,) in zip(lengths, draw(backend, policies[0], sampling, n=1), strict=True):
        assert len(one.ids) == min(40, 80 - length) and one.stop_reason == "length"
    with pytest.raises(DataError, match="no room for a completion among a model's positions; got 91 tokens for 80"):
        draw(backend, policies[0], prompts=["c" * 90])


def test_models_in_training_keep_their_modes_and_precision() -> None:
    """Two precisions in one ensemble: each model computes in its own, and nothing of it stays."""
    policies = [made(0), made(1).set_options(precision="bf16")]
    for policy in policies:
        policy.train()
    backend, prompts = EnsembleBackend(policies), prompt_ids(policies[0])
    drawn = draw(backend, policies[0])
    assert all(policy.training for policy in policies) and not torch.is_autocast_enabled("cpu")
    exact = [made(0), made(1)]
    for number, group in enumerate(drawn):
        for one in group:
            own = oracle(exact, [0.5, 0.5], "logits", prompts[number], one.ids)
            found = own.gather(1, torch.tensor(one.ids)[:, None])[:, 0].tolist()
            assert one.raw_logprobs == pytest.approx(found, abs=0.05)
            assert one.raw_logprobs != pytest.approx(found, abs=1e-6)


def test_weights_that_changed_are_seen(policies: list[PolicyModel]) -> None:
    changing = made(1, layers=1, hidden=32)
    backend = EnsembleBackend([policies[0], changing])
    before = draw(backend, policies[0])
    with torch.no_grad():
        changing.head.weight.mul_(-2)
    prompts = prompt_ids(policies[0])
    after = draw(backend, policies[0])
    check(after, lambda number, one: oracle([policies[0], changing], [0.5, 0.5], "logits", prompts[number], one.ids))
    assert [[one.ids for one in group] for group in before] != [[one.ids for one in group] for group in after]


def test_numbers_that_are_not_finite_are_said(policies: list[PolicyModel]) -> None:
    broken = made(4)
    backend = EnsembleBackend([policies[0], broken])
    draw(backend, policies[0], n=1)
    with torch.no_grad():
        broken.head.weight.fill_(math.nan)
    with pytest.raises(NumbersError, match="logits aren't finite"):
        draw(backend, policies[0])


def test_models_that_do_not_suit_each_other(policies: list[PolicyModel]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    other = PolicyModel(tiny_model(0, vocab_size=264), tokenizer)
    with pytest.raises(ModelError, match=r"the `members\[1\]` has another vocabulary.*id 263 is '<think>', no token"):
        EnsembleBackend([*policies[:2], other])
    with pytest.raises(ModelError, match=r"no logits for all tokens.*256 logits, 7 fewer"):
        EnsembleBackend([policies[0], PolicyModel(tiny_model(0, vocab_size=256), tiny_tokenizer())])
    with pytest.raises(ConfigError, match=r"the same model is given twice.*larger weight"):
        EnsembleBackend([policies[0], policies[1], policies[0]])
    with pytest.raises(ConfigError, match=r"must be on one device.*got meta, and cpu for the policy"):
        EnsembleBackend([policies[0], made(1).to("meta")])
    for weights, message in (
        ([1.0], "one weight per model.*got 1 for 2 models"),
        ([1.0, -1.0], "at least 0, and not all 0; got 1, -1"),
        ([0.0, 0.0], "not all 0; got 0, 0"),
        ([math.nan, 1.0], "got nan, 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            EnsembleBackend(policies[:2], weights)


def test_a_padded_embedding_is_no_other_vocabulary(policies: list[PolicyModel]) -> None:
    padded = made(1, vocab_size=320)
    drawn = draw(EnsembleBackend([padded, policies[0]], [0.9, 0.1]), padded)
    assert max(token for group in drawn for one in group for token in one.ids) < 263
