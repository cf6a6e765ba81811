"""Attention over the paged cache equals softmax attention over each sequence's own keys and values, however they are shared."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf_core.generation import cached_attention
from rlhf_core.generation.cached_attention import ChunkAttention, DecodingAttention
from rlhf_core.generation.paged_cache import CachedSequence, PagedKVCache

HEADS, KEPT, WIDTH = 4, 2, 8


class Model:
    """One attention layer whose keys and values are remembered, sequence by sequence."""

    def __init__(self, cache: PagedKVCache, generator: random.Random) -> None:
        self.cache, self.layer = cache, nn.Identity()
        self.numbers = torch.Generator().manual_seed(generator.randrange(2**31))
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        """id of a sequence → its keys and values (K, N, D)."""

    def new(self) -> CachedSequence:
        one = self.cache.new()
        empty = torch.zeros(KEPT, 0, WIDTH)
        self.kept[id(one)] = (empty, empty)
        return one

    def fork(self, one: CachedSequence, length: int) -> CachedSequence:
        made = one.fork(length)
        self.kept[id(made)] = tuple(part[:, :length] for part in self.kept[id(one)])  # type: ignore[assignment]
        return made

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.numbers)

    def inputs(self, sequences: list[CachedSequence], counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Append places; return random queries, keys and values, and remember the last two."""
        total = sum(counts)
        query, key, value = self.draw(1, HEADS, total, WIDTH), *(self.draw(1, KEPT, total, WIDTH) for _ in range(2))
        for one, count, k, v in zip(sequences, counts, key[0].split(counts, 1), value[0].split(counts, 1), strict=True):
            one.append(count)
            keys, values = self.kept[id(one)]
            self.kept[id(one)] = (torch.cat([keys, k], 1), torch.cat([values, v], 1))
        return query, key, value

    def expected(self, sequences: list[CachedSequence], counts: list[int], query: Tensor) -> Tensor:
        found = []
        for one, count, q in zip(sequences, counts, query[0].split(counts, 1), strict=True):
            keys, values = (part.double().repeat_interleave(HEADS // KEPT, dim=0) for part in self.kept[id(one)])
            scores = q.double() @ keys.transpose(1, 2) * 0.3
            total = keys.shape[1]
            seen = torch.ones(count, total, dtype=torch.bool).tril(total - count)
            found.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        return torch.cat(found)[None].float()


def check(model: Model, attention: DecodingAttention | ChunkAttention, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = tensors
    found = attention.attend(model.layer, query, key, value, scale=0.3)
    expected = model.expected(list(attention.sequences), list(attention.counts), query)
    assert (found.view_as(expected) - expected).abs().max() < 2e-6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1, 3, 4, 16]), fills=st.booleans())
def test_rows_of_random_trees_of_sequences(seed: int, size: int, fills: bool) -> None:
    generator = random.Random(seed)
    cache = PagedKVCache(400, size, torch.device("cpu"), fills_blocks=fills)
    model = Model(cache, generator)
    alive: list[CachedSequence] = []
    for _ in range(6):
        fresh = [model.new() for _ in range(generator.randint(1, 2))]
        forks = (
            [model.fork(one, generator.randint(0, one.length)) for one in generator.choices(alive, k=3) if alive]
            if alive
            else []
        )
        chosen = [*fresh, *forks]
        counts = [generator.randint(1, 9) for _ in chosen]
        tensors = model.inputs(chosen, counts)
        check(model, ChunkAttention(cache, chosen, counts), tensors)
        alive += chosen
        rows = generator.sample(alive, min(len(alive), generator.randint(1, 9)))
        plan: DecodingAttention | None = None
        for _ in range(generator.randint(1, 6)):
            tensors = model.inputs(rows, [1] * len(rows))
            if plan is None or not plan.step():
                plan = DecodingAttention(cache, rows)
            check(model, plan, tensors)
        for one in generator.sample(alive, len(alive) // 3):
            one.free()
            alive.remove(one)
    for one in alive:
        one.free()
    assert not cache.used_blocks


@pytest.mark.parametrize("way", [torch.bfloat16, torch.float32])
def test_products_of_16_bits_differ_by_their_rounding(monkeypatch: pytest.MonkeyPatch, way: torch.dtype) -> None:
    dtype = torch.bfloat16
    monkeypatch.setattr(cached_attention, "product_dtype", lambda dtype: way)
    cache = PagedKVCache(64, 4, torch.device("cpu"))
    model = Model(cache, random.Random(1))
    first = model.new()
    query, key, value = model.inputs([first], [9])
    ChunkAttention(cache, [first], [9]).attend(model.layer, query, key, value.to(dtype), scale=0.3)
    rows = [model.fork(first, 9) for _ in range(3)]
    query, key, value = model.inputs(rows, [1] * 3)
    found = DecodingAttention(cache, rows).attend(model.layer, query, key, value.to(dtype), scale=0.3)
    assert found.dtype == dtype
    expected = model.expected(rows, [1] * 3, query)
    assert (found.float().view_as(expected) - expected).abs().max() < 2e-2
