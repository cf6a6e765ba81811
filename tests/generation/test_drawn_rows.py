"""Rows of a decoding loop: what one draws doesn't depend on the others, however rows join, leave, wait and come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation import drawn_rows as module
from rlhf_core.generation.drawn_rows import DrawnCompletion, DrawnRows, NewRow
from rlhf_core.generation.sampling import draw_tokens, token_confidence
from rlhf_core.generation.stop_strings import StopStrings
from rlhf_core.testing.tiny import tiny_tokenizer

CPU = torch.device("cpu")
SIZE = 263
TOKENIZER = tiny_tokenizer()
STOPS = StopStrings(["e", "77", "\n\n"], TOKENIZER.decode)
TABLE = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(0)) * 2


def logits_of(prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return (V,) the logits of a model that looks at the last two tokens."""
    last = [*prompt, *ids][-2:]
    return TABLE[sum(last) % 8] + TABLE[(3 * last[-1]) % 8].roll(last[-1])


def alone(new: NewRow, sampling: SamplingConfig) -> DrawnCompletion:
    """Draw one completion by the definition: token after token, each with its own random number, searched whole for stops."""
    numbers = np.random.Generator(np.random.Philox(key=new.seed)).random(new.limit)
    ids: list[int] = []
    values: list[tuple[float, float, float]] = []
    confidence: list[float] = []
    while True:
        ends = list(dict.fromkeys([*new.ends, *sampling.stop_ids]))
        drawn = draw_tokens(
            logits_of(new.prompt_ids, ids)[None],
            torch.from_numpy(numbers[[len(ids)]]),
            sampling,
            seen=torch.tensor([[*new.prompt_ids, *ids]]),
            barred=barred(ends) if ends and len(ids) < sampling.min_new_tokens else None,
        )
        ids.append(int(drawn.tokens))
        values.append((float(drawn.logprobs), float(drawn.raw_logprobs), float(drawn.kept_mass)))
        unsure = False
        if sampling.min_confidence is not None:
            confidence.append(
                float(token_confidence(logits_of(new.prompt_ids, ids[:-1])[None], sampling.confidence_top))
            )
            group = [*new.earlier_confidence, *confidence][-sampling.confidence_window :]
            unsure = len(group) == sampling.confidence_window and sum(group) / len(group) < sampling.min_confidence
        text = reason = None
        if ids[-1] in ends:
            reason = "end" if ids[-1] in new.ends else "stop"
        elif new.stops is not None and len(ids) > sampling.min_new_tokens:
            text = TOKENIZER.decode(ids)
            least = len(TOKENIZER.decode(ids[: sampling.min_new_tokens]))
            found = [text.find(one, max(0, least - len(one) + 1)) for one in new.stops.stop]
            text = text[: min(place for place in found if place >= 0)] if max(found) >= 0 else None
            reason = "stop" if text is not None else None
        reason = reason or ("confidence" if unsure and len(ids) > sampling.min_new_tokens else None)
        reason = reason or ("length" if len(ids) == new.limit else None)
        if reason is not None:
            return DrawnCompletion(ids, *map(list, zip(*values, strict=True)), reason, text, confidence)


def barred(ends: Sequence[int]) -> Any:
    return module.Barred(torch.tensor(ends), torch.ones(1, len(ends), dtype=torch.bool))


class Loop:
    """A decoding loop around rows, of which some wait, and some are put off and come back."""

    def __init__(self, sampling: SamplingConfig, steps: int = 1) -> None:
        self.rows = DrawnRows(sampling, device=CPU)
        self.count, self.steps = 0, steps  # after which it asks which rows have ended
        self.here: list[tuple[int, NewRow, list[int]]] = []
        self.done: dict[int, DrawnCompletion] = {}

    def join(self, numbered: Sequence[tuple[int, NewRow]]) -> None:
        self.rows.join([new for _, new in numbered])
        self.here += [(number, new, list(new.before.ids) if new.before else []) for number, new in numbered]

    def step(self) -> None:
        logits = torch.stack([logits_of(new.prompt_ids, ids) for _, new, ids in self.here])
        before = logits.clone()
        for (_, _, ids), token in zip(self.here, self.rows.draw(logits).tolist(), strict=True):
            ids.append(token)
        assert torch.equal(logits, before)
        self.count += 1
        if self.count % self.steps == 0:
            self.collect(self.rows.ended())

    def collect(self, ended: Sequence[tuple[int, str]]) -> None:
        for index, reason in ended:
            number, _, ids = self.here[index]
            self.done[number] = self.rows.completion(index)
            assert self.done[number].stop_reason == reason
            assert self.done[number].ids == ids[: len(self.done[number].ids)]

    def keep(self, indices: Sequence[int]) -> None:
        self.rows.keep(indices)
        self.here = [self.here[index] for index in indices]
        assert len(self.rows) == len(self.here)

    def put_off(self, index: int) -> tuple[int, NewRow] | None:
        """Take out an unfinished row; return it as it comes back, None where it turns out to have ended."""
        self.collect(self.rows.ended())
        number, new, _ = self.here[index]
        back = None if number in self.done else (number, replace(new, before=self.rows.completion(index)))
        self.keep([other for other in range(len(self.here)) if other != index])
        return back


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_p": 0.9, "stop_ids": [40]},
    {"repetition_penalty": 1.5, "min_new_tokens": 4},
    {
        "temperature": 1.3,
        "top_k": 30,
        "min_p": 0.01,
        "repetition_penalty": 0.9,
        "min_new_tokens": 2,
        "stop_ids": [40, 41],
    },
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"min_confidence": 5.2, "confidence_window": 3, "confidence_top": 9, "min_new_tokens": 2, "stop_ids": [40]},
]


@settings(max_examples=30)
@given(data=st.data())
def test_a_row_draws_what_it_draws_alone(data: st.DataObject) -> None:
    sampling = SamplingConfig(**data.draw(st.sampled_from(OPTIONS)))
    number = st.integers(0, SIZE - 1)
    waiting = [
        (
            k,
            NewRow(
                seed=data.draw(st.integers(0, 2**63 - 1)),
                limit=data.draw(st.integers(1, 14)),
                ends=data.draw(st.lists(st.integers(0, 60), max_size=4)),
                stops=data.draw(st.sampled_from([None, STOPS])),
                prompt_ids=data.draw(st.lists(number, min_size=1, max_size=9)),
                earlier_confidence=data.draw(st.lists(st.floats(4, 6), max_size=4)),
            ),
        )
        for k in range(data.draw(st.integers(1, 7)))
    ]
    expected = {k: alone(new, sampling) for k, new in waiting}
    loop = Loop(sampling, steps=data.draw(st.sampled_from([1, 1, 3])))
    block, module.BLOCK = module.BLOCK, data.draw(st.sampled_from([2, 5, 256]))
    try:
        loop.rows = DrawnRows(sampling, device=CPU)
        while waiting or loop.here:
            joining = data.draw(st.integers(0 if loop.here else 1, len(waiting))) if waiting else 0
            loop.join(waiting[:joining])
            del waiting[:joining]
            loop.step()
            if loop.here and data.draw(st.integers(0, 4)) == 0:
                back = loop.put_off(data.draw(st.integers(0, len(loop.here) - 1)))
                waiting += [back] if back is not None else []
            left = [k for k, (number, _, _) in enumerate(loop.here) if number not in loop.done]
            # Ended rows may stay for a while, and rows may change places.
            loop.keep(
                data.draw(st.permutations(left)) if data.draw(st.booleans()) or not left else range(len(loop.here))
            )
    finally:
        module.BLOCK = block
    assert loop.done.keys() == expected.keys()
    for k, one in expected.items():
        found = loop.done[k]
        assert (found.ids, found.stop_reason, found.text) == (one.ids, one.stop_reason, one.text)
        for name in ("logprobs", "raw_logprobs", "kept_mass", "confidence"):
            assert getattr(found, name) == pytest.approx(getattr(one, name), abs=1e-5)


def test_memory_is_reused() -> None:
    """A thousand rows that come and go need no more places than were ever here together."""
    rows = DrawnRows(SamplingConfig(repetition_penalty=1.1), device=CPU)
    for k in range(250):
        rows.join([NewRow(seed=4 * k + j, limit=1 + j, prompt_ids=[1]) for j in range(4)])
        for _ in range(4):
            rows.draw(torch.zeros(len(rows), 20))
            ended = {index for index, _ in rows.ended()}
            rows.keep([index for index in range(len(rows)) if index not in ended])
        assert len(rows) == 0
    assert rows._tokens.shape[0] <= 8 and rows._seen.shape[1] <= 16


def test_a_wider_row_changes_no_other() -> None:
    """A prompt with more different ids widens the table of ids that the penalty is for: other rows don't get id 0 by it."""
    sampling = SamplingConfig(temperature=0, repetition_penalty=10)
    rows = DrawnRows(sampling, device=CPU)
    logits = torch.full((1, 300), 1.0)
    logits[0, 0] = 1.5
    rows.join([NewRow(seed=0, limit=1, prompt_ids=[7])])
    rows.join([NewRow(seed=1, limit=1, prompt_ids=range(299, 0, -1))])
    assert rows.draw(logits.expand(2, -1)).tolist() == [0, 0]


def test_logits_that_are_not_finite_show_in_the_log_probabilities() -> None:
    for options in OPTIONS[:4]:
        for value in (torch.nan, torch.inf):
            rows = DrawnRows(SamplingConfig(**options), device=CPU)
            rows.join([NewRow(seed=k, limit=3, prompt_ids=[1], ends=[2]) for k in range(2)])
            logits = torch.zeros(2, 5000)
            logits[0, 17] = value
            assert rows.draw(logits).lt(5000).all()
            bad, good = rows.completion(0), rows.completion(1)
            assert not np.isfinite(bad.raw_logprobs[0]) and np.isfinite(good.raw_logprobs[0])


def test_no_rows() -> None:
    for options in OPTIONS:
        rows = DrawnRows(SamplingConfig(**options), device=CPU)
        assert rows.draw(torch.empty(0, SIZE)).shape == (0,) and rows.ended() == []
        rows.join([])
        rows.join([NewRow(seed=0, limit=1, prompt_ids=[5])])
        rows.draw(torch.zeros(1, SIZE))
        rows.keep([])
        assert rows.draw(torch.empty(0, SIZE)).tolist() == []


def test_the_host_waits_where_it_asks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal polls
            polls += 1
            return function(*arguments, **options)

        return wrapped

    rows = DrawnRows(SamplingConfig(), device=CPU)
    rows.join([NewRow(seed=0, limit=6), NewRow(seed=1, limit=8)])
    monkeypatch.setattr(Tensor, "tolist", counted(Tensor.tolist))
    assert rows.ended() == [] and polls == 0
    for _ in range(8):
        rows.draw(torch.zeros(2, 9))
    assert polls == 0
    assert rows.ended() == [(0, "length"), (1, "length")] and polls == 1
    assert rows.ended() == [] and polls == 1
    assert [len(rows.completion(k).ids) for k in (0, 1)] == [6, 8]
