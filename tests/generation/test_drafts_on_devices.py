"""Speculative decoding over a cache with tables of blocks, as on a GPU, where memory is short: completions stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.drafting import Drafter, DraftRow, Drafts, Guesses
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.native import measure_native
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt than the others", "middling"]


class Known(Drafter):
    """Guesses from known completions, at times wrong."""

    draws = False

    def __init__(self, known: Sequence[Sequence[int]]) -> None:
        self.known = known

    def begin(self, prompt: Sequence[int]) -> None:
        return None

    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        found = []
        for row in rows:
            drawn = row.ids[row.prompt_length :]
            same = next((ids for ids in self.known if list(ids[: len(drawn)]) == drawn), [])
            ids = [
                (token + 1) % 100 if at % 5 == 4 else token
                for at, token in enumerate(same[len(drawn) : len(drawn) + min(most, row.room)], start=len(drawn))
            ]
            found.append(Guesses(ids, [0] * len(ids)))
        return found


class OfSome(Drafts):
    """Verifies guesses of rows chosen at random, often of the last one alone."""

    def __init__(self, drafter: Drafter, seed: int) -> None:
        super().__init__(drafter)
        self.random, self._asked, self.alone = np.random.default_rng(seed), False, 0
        """`alone`: how often all rows with guesses had to leave before they were verified."""

    def look(self, rows: int) -> bool:
        return True

    def choose(self, rows: Sequence[DraftRow], sampling: SamplingConfig, *, waiting: bool = False) -> list[list[int]]:
        self._offered = self.propose(rows, 6, sampling)
        which = self.random.random()
        chosen = [one.ids if which < 0.3 and self.random.random() < 0.5 else [] for one in self._offered]
        if which > 0.5:
            chosen[-1] = self._offered[-1].ids
        self._asked = any(chosen)
        return chosen

    def drawn(self, drawn: Sequence[Sequence[int]], verified: Sequence[Sequence[int]], seconds: float) -> None:
        self.alone += self._asked and not any(verified)
        super().drawn(drawn, verified, seconds)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(tiny_model().requires_grad_(False), tiny_tokenizer())


def test_rows_with_guesses_that_leave_for_want_of_memory(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the only rows with guesses leave, the others have places for one token, and as many are drawn."""
    sampling = SamplingConfig(max_new_tokens=45, top_k=8, min_new_tokens=30)
    batch, left = prompt_batch(policy, PROMPTS), 0
    plain: list[list[Any]] = [
        [one.ids for one in group] for group in Engine(policy, seed=1).generate(batch, 4, sampling)
    ]
    for module in ("native", "native_backend"):
        monkeypatch.setattr(f"rlhf_core.generation.{module}.DEVICES", ("cpu",))
    monkeypatch.setattr("rlhf_core.generation.native_backend.BLOCK_SIZE", {"cpu": 4})
    for blocks in (24, 30, 37):
        drafts = OfSome(Known([ids for group in plain for ids in group]), seed=blocks)
        memory = blocks * 4 * 4 * policy.measured(measure_native).elements
        engine = Engine(policy, seed=1, memory=memory, cuda_graphs=False, drafts=drafts)
        found = engine.generate(batch, 4, sampling)
        assert [[one.ids for one in group] for group in found] == plain
        assert 0 < drafts.counts.accepted < drafts.counts.guessed
        left += drafts.alone
    assert left
