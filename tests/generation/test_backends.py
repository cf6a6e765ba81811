"""The seam for other backends: one over transformers' `generate` draws for the same engine, and is refused what it can't do."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.backend import Backend, Capabilities
from rlhf_core.generation.drawn_rows import DrawnCompletion
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.requests import Finished, Request
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.models.dropout import evaluating
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt", [{"role": "user", "content": "hi"}]]


class TransformersBackend(Backend):
    """Draws each completion by itself with transformers' `generate`, sampling and all, seeded through torch."""

    name = "transformers"
    capabilities = Capabilities(
        live_weights=True, exact_logprobs=True, options=frozenset({"top_k", "top_p", "min_p", "stop_ids"})
    )

    def __init__(self, policy: PolicyModel) -> None:
        self.policy = policy

    def run(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, partly: bool = False
    ) -> Generator[Finished]:
        with torch.no_grad(), evaluating(self.policy), self._without_own_options(), torch.random.fork_rng(devices=[]):
            for request in requests:
                torch.manual_seed(request.seed % 2**63)
                yield self._draw(request, sampling)

    @contextlib.contextmanager
    def _without_own_options(self) -> Generator[None]:
        model, own = self.policy.causal_lm, self.policy.causal_lm.generation_config
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = own

    def _draw(self, request: Request, sampling: SamplingConfig) -> Finished:
        ids = torch.tensor([list(request.ids)])
        greedy = sampling.temperature == 0
        truncation: dict[str, Any] = {
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }  # fmt: skip
        made = self.policy.causal_lm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.limit, do_sample=not greedy,
            eos_token_id=[*request.ends, *sampling.stop_ids], pad_token_id=0, return_dict_in_generate=True,
            output_scores=True, output_logits=True, **({} if greedy else truncation),
        )  # fmt: skip
        tokens = made.sequences[0, ids.shape[1] :]
        raw, scores = torch.cat(made.logits).float(), torch.cat(made.scores).float()  # (T, V)
        tempered = (raw if greedy else raw / sampling.temperature).softmax(dim=-1)
        ones = torch.ones(len(tokens))

        def chosen(logits: torch.Tensor) -> list[float]:
            return list(logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].tolist())

        kept = ones if greedy else tempered.where(scores.isfinite(), 0).sum(dim=-1)
        last = int(tokens[-1])
        reason = "end" if last in request.ends else "stop" if last in sampling.stop_ids else "length"
        logprobs = [0.0] * len(tokens) if greedy else chosen(scores)
        drawn = DrawnCompletion(tokens.tolist(), logprobs, chosen(raw), kept.clamp(max=1).tolist(), reason)
        return Finished(request.number, drawn, reason, None, None)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)  # else tokens are nearly equally likely
    return PolicyModel(model, tiny_tokenizer())


@pytest.fixture
def engine(policy: PolicyModel) -> Engine:
    return Engine(policy, seed=1, backend=TransformersBackend(policy))


def test_greedy_completions_are_the_native_ones(engine: Engine, policy: PolicyModel) -> None:
    batch, sampling = prompt_batch(policy, PROMPTS), SamplingConfig(temperature=0, max_new_tokens=10)
    found, native = engine.generate(batch, 1, sampling), Engine(policy).generate(batch, 1, sampling)
    for mine, other in zip(found, native, strict=True):
        assert (mine[0].ids, mine[0].text, mine[0].stop_reason) == (other[0].ids, other[0].text, other[0].stop_reason)
        assert mine[0].raw_logprobs == pytest.approx(other[0].raw_logprobs, abs=1e-4)
        assert (mine[0].logprobs, mine[0].kept_mass) == (other[0].logprobs, other[0].kept_mass)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_what_it_draws_carries_the_log_probabilities_that_it_declares(
    options: dict[str, Any], engine: Engine, policy: PolicyModel
) -> None:
    batch = prompt_batch(policy, PROMPTS)
    sampling = SamplingConfig(max_new_tokens=8, **options)
    made = Batch.from_completions(batch, engine.generate(batch, 4, sampling))
    with torch.no_grad():
        raw = policy.token_logps(made)
        tempered = policy.token_logps(made, temperature=sampling.temperature)
    found = made["sampled_logps"] + made["kept_mass"].log().where(made.loss_mask, 0)
    assert (raw - made["raw_logps"]).abs().max() < 1e-4 and (tempered - found).abs().max() < 1e-4


def test_it_draws_with_the_weights_of_the_moment_and_the_same_for_the_same_seed(
    engine: Engine, policy: PolicyModel
) -> None:
    batch, seeds = prompt_batch(policy, PROMPTS[:2]), [[1, 2], [3, 4]]

    def draw() -> list[list[int]]:
        return [
            one.ids
            for group in engine.generate(batch, 2, SamplingConfig(max_new_tokens=8), seeds=seeds)
            for one in group
        ]

    first = draw()
    assert draw() == first
    weight = policy.head.weight
    with torch.no_grad():
        weight.mul_(-1)
        try:
            assert draw() != first
        finally:
            weight.mul_(-1)
    assert draw() == first


def test_each_completion_has_its_own_limit_and_is_reported_as_it_ends(policy: PolicyModel) -> None:
    batch, sampling = prompt_batch(policy, PROMPTS[:2]), SamplingConfig(max_new_tokens=6, temperature=0)
    for engine in (Engine(policy), Engine(policy, backend=TransformersBackend(policy))):
        seen: list[tuple[int, int, int]] = []

        def note(prompt: int, index: int, one: Completion, seen: list[tuple[int, int, int]] = seen) -> None:
            seen.append((prompt, index, len(one.ids)))

        drawn = engine.generate(batch, 2, sampling, limits=[[3, 99], [1, 2]], finished=note)
        assert [[len(one.ids) for one in group] for group in drawn] == [[3, 6], [1, 2]]
        assert sorted(seen) == [(0, 0, 3), (0, 1, 6), (1, 0, 1), (1, 1, 2)]
        assert drawn[0][1].ids[:3] == drawn[0][0].ids


@pytest.mark.parametrize(
    ("limits", "got"), [([[1], [1]], "[1, 1] limits"), ([[1, 2]], "[2] limits"), ([[1, 0], [2, 2]], "0")]
)
def test_limits_that_fit_no_completions_are_refused(limits: list[list[int]], got: str, policy: PolicyModel) -> None:
    with pytest.raises(ConfigError, match=r"limits=…") as raised:
        Engine(policy).generate(prompt_batch(policy, PROMPTS[:2]), 2, limits=limits)
    assert got in str(raised.value)


def test_an_option_that_it_would_ignore_is_refused_by_name(engine: Engine, policy: PolicyModel) -> None:
    batch = prompt_batch(policy, PROMPTS[:1])
    for option, value in {"repetition_penalty": 1.2, "stop": ["."], "min_new_tokens": 3, "min_confidence": 0.0}.items():
        with pytest.raises(ConfigError) as raised:
            engine.generate(batch, 1, SamplingConfig(**{option: value}))
        text = str(raised.value)
        assert "`transformers` doesn't follow this option" in text and f"`{option}`" in text
        assert "it follows max_new_tokens, min_p, stop_ids, temperature, top_k, top_p" in text
    engine.generate(
        batch, 1, SamplingConfig(max_new_tokens=2, repetition_penalty=1.0, stop=[])
    )  # defaults change nothing


def test_handles_streams_and_rules_are_refused_where_they_are_not_declared(engine: Engine, policy: PolicyModel) -> None:
    batch = prompt_batch(policy, PROMPTS[:1])
    with pytest.raises(ConfigError, match="a sequence handle: the generation backend `transformers` can't keep"):
        engine.prefill([[7, 8, 9]])
    with pytest.raises(
        ConfigError, match="a stream: the generation backend `transformers` can't return completions token by token"
    ):
        next(iter(engine.stream(batch, SamplingConfig(max_new_tokens=2))))
    (handle,) = Engine(policy).prefill([[7, 8, 9]])
    with pytest.raises(ConfigError, match="a stopping rule: the generation backend `transformers` can't end"):
        engine.extend([handle], SamplingConfig(max_new_tokens=2), seeds=[1], rule=lambda ids: True)


def test_a_purpose_that_needs_more_is_refused_with_what_is_declared(engine: Engine, policy: PolicyModel) -> None:
    engine.backend.require("live_weights", "exact_logprobs", purpose="a rollout")
    with pytest.raises(ConfigError) as raised:
        engine.backend.require("live_weights", "fork", purpose="tree search")
    text = str(raised.value)
    assert "tree search" in text and "one that declares live_weights, exact_logprobs" in text and "`fork`" in text
    Engine(policy).backend.require("live_weights", "exact_logprobs", "fork", "streaming", "rules", purpose="anything")


def test_options_of_the_native_backend_are_refused_for_another_one(policy: PolicyModel) -> None:
    with pytest.raises(ConfigError, match="is for the native backend"):
        Engine(policy, memory=10**6, backend=TransformersBackend(policy))
