"""Speculative decoding: completions are those without a draft, whatever is guessed, and their distribution is the policy's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.draft_model import ModelDrafter
from rlhf_core.generation.drafting import Drafter, DraftRow, Drafts, Guesses
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.lookup_drafts import NgramDrafter, SuffixDrafter
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt than the others", [{"role": "user", "content": "hi"}], "ab ab ab ab ab ab"]


def sharp(model: Any, factor: float = 2) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(sharp(tiny_model()), tiny_tokenizer())


class Eager(Drafts):
    """Verifies all that is guessed, whatever it costs."""

    def choose(self, rows: Sequence[DraftRow], sampling: SamplingConfig, *, waiting: bool = False) -> list[list[int]]:
        self._offered = self.propose(rows, self.most, sampling)
        return [guesses.ids for guesses in self._offered]


class Oracle(Drafter):
    """Guesses from known completions, every k-th guess wrong."""

    draws = False

    def __init__(self, known: Sequence[Sequence[int]], wrong_every: int) -> None:
        self.known, self.wrong_every = known, wrong_every

    def begin(self, prompt: Sequence[int]) -> None:
        return None

    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        found = []
        for row in rows:
            drawn = row.ids[row.prompt_length :]
            same = next((ids for ids in self.known if list(ids[: len(drawn)]) == drawn), [])
            ids = list(same[len(drawn) : len(drawn) + min(most, row.room)])
            ids = [
                (token + 1) % 100 if (len(drawn) + at) % self.wrong_every == 0 else token
                for at, token in enumerate(ids)
            ]
            found.append(Guesses(ids, [0] * len(ids)))
        return found


def drafter(name: str, policy: PolicyModel) -> Drafter:
    if name == "itself":
        return ModelDrafter(policy, policy)
    if name == "other":
        return ModelDrafter(PolicyModel(sharp(tiny_model(seed=1)), tiny_tokenizer()), policy)
    return NgramDrafter() if name == "ngram" else SuffixDrafter()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3},
        {"min_new_tokens": 20, "stop": ["e"]},
    ],
    ids=["greedy", "sampled", "nucleus", "penalty", "stop"],
)
@pytest.mark.parametrize("name", ["itself", "other", "ngram", "suffix"])
def test_completions_are_those_without_a_draft(policy: PolicyModel, name: str, options: dict[str, Any]) -> None:
    sampling = SamplingConfig(**{"max_new_tokens": 40, **options})
    batch = prompt_batch(policy, PROMPTS)
    plain = Engine(policy, seed=1).generate(batch, 3, sampling)
    drafts = Eager(drafter(name, policy), most=5)
    for _ in range(2):
        found = Engine(policy, seed=1, drafts=drafts).generate(batch, 3, sampling)
        for one, other in zip(itertools.chain(*plain), itertools.chain(*found), strict=True):
            assert (list(one.ids), one.text, one.stop_reason) == (list(other.ids), other.text, other.stop_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
            assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=2e-5)
            assert one.kept_mass == pytest.approx(other.kept_mass, abs=2e-5)
    print(name, drafts.counts)
    if name == "itself" and "repetition_penalty" not in options and "min_new_tokens" not in options:
        # Drawing with the same numbers from the same model, every guess is right.
        assert drafts.counts.accepted == drafts.counts.guessed > 0
        assert drafts.counts.passes <= 2 * sum(-(-len(one.ids) // 6) + 1 for one in itertools.chain(*plain))
