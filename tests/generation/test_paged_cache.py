"""The paged cache against a plain model of it: a list of tensors per sequence, copied at each fork."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.generation.paged_cache import CachedSequence, OutOfBlocks, PagedKVCache
from rlhf_core.generation.prefixes import MOST_KEPT, STRIDE, KeptPrefixes

CPU = torch.device("cpu")
LAYERS = {"first": (2, 3, 3), "second": (1, 2, 4)}
"""Layer → key-value heads, width of keys, width of values."""


def values_of(layer: str, tokens: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys (N, K, D) and values (N, K, D') that tell tokens, layers, heads and columns apart."""
    heads, width, out_width = LAYERS[layer]
    base = torch.tensor(tokens, dtype=torch.float64)[:, None, None] * 1000 + (layer == "second") * 500
    inner = torch.arange(heads)[:, None] * 10
    return base + inner + torch.arange(width), -(base + inner + torch.arange(out_width))


def write(cache: PagedKVCache, sequence: CachedSequence, tokens: list[float]) -> None:
    """Append tokens to a sequence, and write their keys and values."""
    sequence.append(len(tokens))
    blocks, places = sequence.places(sequence.length - len(tokens), sequence.length)
    for layer, (heads, *_) in LAYERS.items():
        cache.write(layer, cache.index_of(blocks, places, heads), *values_of(layer, tokens))


class CacheMachine(RuleBasedStateMachine):
    """Random operations on a cache and on plain lists of the tokens that each sequence should hold."""

    order: Any = "heads"
    fills_blocks = False

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 4))
    def make(self, blocks: int, size: int) -> None:
        self.cache = PagedKVCache(blocks, size, CPU, order=self.order, fills_blocks=self.fills_blocks)
        self.sequences: list[tuple[CachedSequence, list[float]]] = []
        self.next = 1.0

    @precondition(lambda self: len(self.sequences) < 7)
    @rule()
    def new(self) -> None:
        self.sequences.append((self.cache.new(), []))

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0), count=st.integers(1, 6))
    def append(self, which: int, count: int) -> None:
        sequence, tokens = self.sequences[which % len(self.sequences)]
        added = [self.next + k for k in range(count)]
        self.next += count
        free = self.cache.free_blocks
        try:
            write(self.cache, sequence, added)
        except OutOfBlocks:
            assert sequence.length == len(tokens) and self.cache.free_blocks == free
            # A new stretch's blocks, and at most one that is copied.
            assert self.cache.blocks_for(count) + 1 > free
        else:
            tokens += added

    @precondition(lambda self: self.sequences and len(self.sequences) < 7)
    @rule(which=st.integers(0), share=st.none() | st.floats(0, 1))
    def fork(self, which: int, share: float | None) -> None:
        sequence, tokens = self.sequences[which % len(self.sequences)]
        length = None if share is None else round(share * len(tokens))
        free = self.cache.free_blocks
        self.sequences.append((sequence.fork(length), tokens[:length]))
        assert self.cache.free_blocks == free
        with pytest.raises(ValueError, match="has no first"):
            sequence.fork(len(tokens) + 1)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0), by_reference=st.booleans())
    def free(self, which: int, by_reference: bool) -> None:
        sequence, _ = self.sequences.pop(which % len(self.sequences))
        if not by_reference:
            sequence.free()
            sequence.free()  # as harmless as closing a file twice
            assert sequence.freed
            with pytest.raises(ValueError, match="was freed"):
                sequence.fork()

    @rule(more=st.integers(-1, 3))
    def grow(self, more: int) -> None:
        capacity = self.cache.capacity
        self.cache.grow(capacity + more)
        assert self.cache.capacity == max(capacity, capacity + more)

    @rule()
    def compact(self) -> None:
        capacity, used = self.cache.capacity, self.cache.used_blocks
        self.cache.compact(sequence for sequence, _ in self.sequences)
        assert self.cache.used_blocks == used and self.cache.capacity in (capacity, max(used, 1))
        self.cache.grow(capacity)

    @invariant()
    def each_sequence_holds_its_own_tokens(self) -> None:
        for sequence, tokens in self.sequences:
            assert sequence.length == len(tokens)
            views = list(sequence.views())
            assert sum(view.tokens for view in views) == len(tokens)
            if self.fills_blocks:
                assert all(view.tokens == self.cache.block_size for view in views[:-1])
            for layer in LAYERS if tokens else ():
                keys, values = self.cache.read(layer, views)
                expected_keys, expected_values = values_of(layer, tokens)
                assert torch.equal(keys.transpose(0, 1), expected_keys)
                assert torch.equal(values.transpose(0, 1), expected_values)

    @invariant()
    def no_block_is_lost_or_held_twice(self) -> None:
        stretches, holders = set(), Counter[int]()
        for sequence, _ in self.sequences:
            stretch = sequence.stretch
            holders[stretch.number] += 1
            while stretch is not None and stretch not in stretches:
                stretches.add(stretch)
                if stretch.parent is not None:
                    holders[stretch.parent.number] += 1
                stretch = stretch.parent
        assert {stretch.number: stretch.holders for stretch in stretches} == dict(holders)
        held = [block for stretch in stretches for block in stretch.blocks]
        assert len(held) == len(set(held)) == self.cache.used_blocks
        assert self.cache.num_sequences == len(self.sequences)

    def teardown(self) -> None:
        for sequence, _ in getattr(self, "sequences", []):
            sequence.free()
        if hasattr(self, "cache"):
            assert self.cache.used_blocks == self.cache.num_sequences == 0


@pytest.mark.parametrize("fills_blocks", [False, True])
@pytest.mark.parametrize("order", ["heads", "tokens"])
def test_a_cache_holds_what_lists_of_tensors_hold(order: str, fills_blocks: bool) -> None:
    machine = type("Machine", (CacheMachine,), {"order": order, "fills_blocks": fills_blocks})
    test = machine.TestCase
    test.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
    test().runTest()


class _Counted(TorchDispatchMode):
    """Counts the tensor operations inside it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def steps(work: Callable[[], object]) -> tuple[int, int]:
    """Return how many lines of Python and tensor operations some work takes; of it no more than a few objects may remain."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()
    with _Counted() as counted:
        objects = sys.getallocatedblocks()
        sys.settrace(trace)
        try:
            made = work()
        finally:
            sys.settrace(before)
        objects = sys.getallocatedblocks() - objects
    gc.enable()
    assert objects < 20
    del made
    return lines, counted.count


@pytest.mark.parametrize("fills_blocks", [False, True])
def test_forking_and_freeing_take_the_same_work_at_any_length(fills_blocks: bool) -> None:
    cache = PagedKVCache(600, 16, CPU, fills_blocks=fills_blocks)
    short, long = cache.new(), cache.new()
    write(cache, short, [1.0])
    write(cache, long, [float(k) for k in range(4096)])
    used = cache.used_blocks
    assert steps(long.fork) == steps(short.fork)
    lines, operations = steps(long.fork)
    assert 0 < lines < 20 and operations == 0
    assert steps(lambda: long.fork(4000)) == steps(lambda: short.fork(0))
    forks = short.fork(), long.fork()
    assert steps(forks[1].free) == steps(forks[0].free)
    assert cache.used_blocks == used
    # What a fork appends is in blocks of its own: one, whatever the length, or two where a partly filled one is copied.
    fork = long.fork(4000 + 1)
    write(cache, fork, [1.0])
    assert cache.used_blocks == used + 1
    # A long chain of forks is freed without recursion.
    chain = [cache.new()]
    for number in range(400):
        chain.append(chain[-1].fork())
        if number % 2:
            write(cache, chain[-1], [1.0])
    for one in chain[:-1]:
        one.free()
    assert list(chain[-1].views())
    chain[-1].free()
    fork.free()
    assert cache.used_blocks == used


def test_a_cache_reserves_no_more_than_it_may() -> None:
    cache = PagedKVCache(2, 4, CPU)
    sequence = cache.new()
    write(cache, sequence, [1.0] * 8)
    with pytest.raises(OutOfBlocks):
        sequence.append(1)
    assert sequence.length == 8 and cache.free_blocks == 0
    assert all(len(pool) == 2 for pools in cache.pools.values() for pool in pools)
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="a cache of"):
            PagedKVCache(*wrong, CPU)


def test_freed_blocks_are_taken_again_lowest_first() -> None:
    cache = PagedKVCache(8, 2, CPU)
    first, second, third = cache.new(), cache.new(), cache.new()
    for sequence in (first, second, third):
        sequence.append(4)
    second.free()
    first.free()
    fourth = cache.new()
    fourth.append(6)
    assert fourth.stretch.blocks == [0, 1, 2] and third.stretch.blocks == [4, 5]


# Kept prompts


def kept(cache: PagedKVCache, prefixes: KeptPrefixes, ids: list[int]) -> CachedSequence:
    """Read a prompt, sharing what is kept, and keep it; return its sequence."""
    sequence = prefixes.fork_longest(ids)
    if missing := ids[sequence.length :]:
        write(cache, sequence, [float(one) for one in missing])
    prefixes.keep(ids, sequence)
    return sequence


def content(cache: PagedKVCache, sequence: CachedSequence) -> list[int]:
    keys, _ = cache.read("first", list(sequence.views()))
    return [int(one) for one in (keys[0, :, 0] / 1000).tolist()]


def test_prompts_share_what_they_begin_with() -> None:
    cache = PagedKVCache(400, 4, CPU)
    prefixes = KeptPrefixes(cache)
    head = list(range(1, 2 * STRIDE + 4))
    first = kept(cache, prefixes, [*head, 90, 91])
    used = cache.used_blocks
    second = prefixes.fork_longest([*head, 80])
    # All that is common, not only whole strides.
    assert second.length == len(head) and cache.used_blocks == used
    write(cache, second, [80.0])
    prefixes.keep([*head, 80], second)
    assert content(cache, second) == [*head, 80] and content(cache, first) == [*head, 90, 91]
    assert prefixes.fork_longest(head[: STRIDE + 3]).length == STRIDE + 3
    assert prefixes.fork_longest([7, *head]).length == 0
    assert prefixes.fork_longest(head[: STRIDE - 1]).length == 0
    short = kept(cache, prefixes, [5, 6])
    assert prefixes.fork_longest([5, 6]).length == 2  # a short prompt that comes again as it is
    for one in (first, second, short):
        one.free()
    while prefixes.drop_oldest():
        pass
    assert len(prefixes) == cache.used_blocks == cache.num_sequences == 0


def test_a_beginning_outlives_the_prompt_that_brought_it() -> None:
    cache = PagedKVCache(400, 4, CPU)
    prefixes = KeptPrefixes(cache)
    head = list(range(1, STRIDE + 1))
    first, second = kept(cache, prefixes, [*head, 90]), kept(cache, prefixes, [*head, 80])
    second.free()
    first.free()
    assert prefixes.drop_oldest()
    assert len(prefixes) == 1
    assert prefixes.fork_longest([*head, 70]).length == len(head)


def test_few_prompts_are_kept_those_in_use_not_counted() -> None:
    cache = PagedKVCache(4000, 4, CPU)
    prefixes = KeptPrefixes(cache)
    in_use = [kept(cache, prefixes, [number]) for number in range(1, MOST_KEPT + 10)]
    assert len(prefixes) == len(in_use) and not prefixes.drop_oldest()
    for one in in_use:
        one.free()
    kept(cache, prefixes, [5000]).free()
    assert len(prefixes) == MOST_KEPT
    assert prefixes.fork_longest([1]).length == 0 and prefixes.fork_longest([5000]).length == 1
    prefixes.clear()
    assert cache.used_blocks == cache.num_sequences == 0


def test_places_of_appended_tokens() -> None:
    cache = PagedKVCache(8, 3, CPU)
    sequence = cache.new()
    sequence.append(2)
    sequence.append(3)
    blocks, places = sequence.places(2, 5)
    assert np.array_equal(blocks, [0, 1, 1]) and np.array_equal(places, [2, 0, 1])


def test_copies_of_blocks_are_made_together_and_in_time() -> None:
    cache = PagedKVCache(8, 4, CPU, order="tokens", fills_blocks=True)
    prompt = cache.new()
    write(cache, prompt, [1.0, 2.0])
    first, second = prompt.fork(), prompt.fork()
    first.append(1)  # a copy that isn't made yet
    again = first.fork(2)
    again.append(1)  # a copy of it
    first.free()
    second.append(1)  # into the block that was freed
    for number, one in enumerate((prompt, again, second)):
        blocks, places = one.places(one.length - 1, one.length)
        for layer, (heads, *_) in LAYERS.items():
            cache.write(layer, cache.index_of(blocks, places, heads), *values_of(layer, [3.0 + number]))
    for number, (one, tokens) in enumerate(((prompt, [1.0]), (again, [1.0, 2.0]), (second, [1.0, 2.0]))):
        keys, _ = cache.read("first", list(one.views()))
        assert torch.equal(keys.transpose(0, 1), values_of("first", [*tokens, 3.0 + number])[0])
