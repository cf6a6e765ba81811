"""Decoding ahead of the host gives the completions of a loop step by step: on a CPU, with stand-ins for graphs and kernels."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import make_tiny
from torch import Tensor

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.generation import block_table_attention, device_steps
from rlhf_core.generation.block_table_attention import (
    BlockTables,
    TableChunkAttention,
    attend_plainly,
    paged_kernel,
    paged_kernel_obstacle,
)
from rlhf_core.generation.cached_attention import ChunkAttention
from rlhf_core.generation.device_steps import DeviceRow, DeviceSteps, rounded_rows
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.native import measure_native
from rlhf_core.generation.native_backend import NativeBackend
from rlhf_core.generation.paged_cache import PagedKVCache
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt than the others", "middling"]
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 45},
    {"max_new_tokens": 21, "temperature": 0.7, "repetition_penalty": 1.2, "min_new_tokens": 10},
    {"max_new_tokens": 30, "stop": ["e", "qu"]},
    {"max_new_tokens": 1},
    {"max_new_tokens": 30, "min_confidence": 3.67, "confidence_window": 3},
]


def policy_of(kind: str = "") -> PolicyModel:
    """Return a policy whose distributions are far from even, and whose end token is likely."""
    model = make_tiny(kind) if kind else tiny_model()
    policy = PolicyModel(model, tiny_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        model.get_input_embeddings().weight[policy.tokenizer.eos_token_id] *= 2
    return policy.requires_grad_(False)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return policy_of()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Decode on the CPU as on a GPU, in blocks of 4; a graph runs its step again. Return the shapes whose graphs were run."""
    ran: list[tuple[int, int]] = []

    def capture(step: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
        held = step()

        def replay() -> Tensor:
            ran.append(tuple(held.shape))
            return held.copy_(step())

        return replay

    for module in ("native", "native_backend"):
        monkeypatch.setattr(f"rlhf_core.generation.{module}.DEVICES", ("cpu",))
    monkeypatch.setattr("rlhf_core.generation.native_backend.BLOCK_SIZE", {"cpu": 4})
    monkeypatch.setattr(device_steps, "CAPTURE_AFTER", 8)
    monkeypatch.setattr(device_steps, "REPLACE_AFTER", 16)
    monkeypatch.setattr(device_steps, "capture", capture)
    monkeypatch.setattr(device_steps, "first_wait", lambda step: None)
    monkeypatch.setattr(device_steps, "new_pool", object)
    return ran


def loop_of(engine: Engine) -> Any:
    """Return the loop with its cache, None where nothing is kept."""
    assert isinstance(engine.backend, NativeBackend)
    return engine.backend._native


def drawn(policy: PolicyModel, sampling: SamplingConfig, n: int = 3, **options: Any) -> list[list[tuple[Any, ...]]]:
    """Return ids, stop reasons and texts of completions."""
    groups = Engine(policy, seed=1, **options).generate(prompt_batch(policy, PROMPTS), n, sampling)
    return [[(one.ids, one.stop_reason, one.text) for one in group] for group in groups]


@pytest.fixture(scope="module")
def wanted(policy: PolicyModel) -> Callable[[SamplingConfig], Any]:
    """Return a function that gives the completions of the CPU's own loop; request it before `replays`."""
    known: dict[str, Any] = {}

    def get(sampling: SamplingConfig) -> Any:
        return known[sampling.model_dump_json()]

    for options in OPTIONS:
        sampling = SamplingConfig(**options)
        known[sampling.model_dump_json()] = drawn(policy, sampling)
    return get


@pytest.mark.parametrize("options", OPTIONS)
def test_completions_are_those_of_the_loop_that_goes_step_by_step(
    options: dict[str, Any],
    policy: PolicyModel,
    wanted: Callable[[SamplingConfig], Any],
    replays: list[tuple[int, int]],
) -> None:
    sampling = SamplingConfig(**options)
    assert drawn(policy, sampling) == wanted(sampling)
    before = len(replays)
    assert before or sampling.max_new_tokens < 45
    assert drawn(policy, sampling, cuda_graphs=False) == wanted(sampling) and len(replays) == before


def test_rows_that_join_later_give_way_and_come_back(
    policy: PolicyModel, wanted: Callable[[SamplingConfig], Any], replays: list[tuple[int, int]]
) -> None:
    sampling = SamplingConfig(**OPTIONS[0])
    assert drawn(policy, sampling, most_rows=2) == wanted(sampling)
    engine = Engine(policy, seed=1, memory=30 * 4 * 4 * policy.measured(measure_native).elements)  # 30 blocks
    groups = engine.generate(prompt_batch(policy, PROMPTS), 3, sampling)
    assert [[(one.ids, one.stop_reason, one.text) for one in group] for group in groups] == wanted(sampling)
    assert loop_of(engine) is not None and loop_of(engine).preemptions
    loop_of(engine).prefixes.clear()
    assert loop_of(engine).cache.used_blocks == 0


def test_handles_streams_and_rules(policy: PolicyModel, replays: list[tuple[int, int]]) -> None:
    engine, ids = Engine(policy, seed=1), [5, 6, 7, 8, 9, 10]
    sampling = SamplingConfig(max_new_tokens=20)
    first, second = engine.prefill([ids, ids[:3]])
    handles = [*engine.fork(first, 2), second]
    extended = engine.extend(handles, sampling, seeds=[1, 2, 3])
    early = sampling.model_copy(update={"stop_ids": [extended[0].completion.ids[2]]})
    extended += engine.extend([first], early, seeds=[1])
    assert len(extended[3].completion.ids) <= 3
    for one in extended:
        # What an extension is scored with is in the cache, and nothing beyond it.
        assert one.handle.cached is not None and one.handle.cached.length == len(one.handle.ids) - 1
        (found,) = engine.score([one.handle], [[11, 12]])
        (again,) = engine.prefill([one.handle.ids])
        (expected,) = engine.score([again], [[11, 12]])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        engine.free([again])
    (ruled,) = engine.extend([first], sampling, seeds=[1], rule=lambda drawn: len(drawn) == 3)
    assert ruled.completion.stop_reason == "rule" and ruled.completion.ids == extended[0].completion.ids[:3]
    batch = prompt_batch(policy, ["a"])
    *_, last = (seen := list(Engine(policy, seed=1).stream(batch, sampling)))
    assert last.ids == Engine(policy, seed=1).generate(batch, 1, sampling)[0][0].ids
    assert [len(one.ids) for one in seen[:-1]] == list(range(1, len(last.ids)))


def test_rows_that_have_ended_at_the_last_position(replays: list[tuple[int, int]]) -> None:
    policy = policy_of("gpt2")  # as many positions as a table has rows: one more would fail
    batch = prompt_batch(policy, ["b" * 240, "c" * 248, "a"])
    sampling = SamplingConfig(max_new_tokens=30, min_new_tokens=30)
    engine = Engine(policy, seed=3)
    groups = engine.generate(batch, 1, sampling)
    lengths = [256 - length for length in batch.prompt_lengths.tolist()]
    assert [len(one.ids) for (one,) in groups] == [min(30, length) for length in lengths]
    assert loop_of(engine) is not None
    made = Batch.from_completions(batch, groups)
    assert (policy.token_logps(made) - made["raw_logps"]).abs().max() < 1e-4
    # What is kept of a row that ended before the others isn't overwritten by what is drawn behind it.
    handles = engine.prefill([list(range(20, 247)) + list(range(20, 45)), [5, 6, 7]])
    extended = [one.handle for one in engine.extend(handles, sampling, seeds=[1, 2])]
    assert [len(one.ids) for one in extended] == [256, 33]
    loop_of(engine).prefixes.clear()
    for one, again in zip(extended, engine.prefill([one.ids for one in extended]), strict=True):
        for layer in loop_of(engine).cache.pools:
            kept, read = (
                loop_of(engine).cache.read(layer, list(of.cached.views())) for of in (one, again) if of.cached
            )
            torch.testing.assert_close(kept, read, rtol=0, atol=1e-5)


def test_graphs_are_forgotten_when_weights_move_the_cache_grows_or_a_capture_fails(
    replays: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of()
    sampling = SamplingConfig(max_new_tokens=40, min_new_tokens=40)
    made: list[int] = []
    capture = device_steps.capture

    def counted(step: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
        made.append(len(made))
        return capture(step, device, pool)

    monkeypatch.setattr(device_steps, "capture", counted)
    engine, batch = Engine(policy, seed=1), prompt_batch(policy, PROMPTS)
    for _ in range(4):
        engine.generate(batch, 1, sampling)
    once = len(made)
    engine.generate(batch, 1, sampling)
    assert once and len(made) == once
    steps = loop_of(engine)._device_steps
    assert steps is not None and steps._captured
    loop_of(engine).cache.grow(loop_of(engine).cache.capacity + 50)
    engine.generate(batch, 1, sampling)
    assert len(made) > once
    once = len(made)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data = parameter.data.clone()
    steps.begin()
    assert not steps._captured

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    def holds(step: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
        held = step()  # as a graph of what the host computes from the position
        return lambda: held

    expected = [one.ids for (one,) in Engine(policy, seed=1, cuda_graphs=False).generate(batch, 1, sampling)]
    for wrong, reason in ((fails, "RuntimeError: operation not"), (holds, "the hidden states differ by")):
        monkeypatch.setattr(device_steps, "capture", wrong)
        policy.measured(device_steps._Capturing).obstacle = None
        caplog.clear()
        with caplog.at_level("INFO"):
            for _ in range(2):
                other = Engine(policy, seed=1, most_rows=8)  # which takes over nothing that was captured
                assert [one.ids for (one,) in other.generate(batch, 1, sampling)] == expected
        assert sum(f"can't be captured as CUDA graphs: {reason}" in line for line in caplog.messages) == 1
    monkeypatch.setenv(device_steps.SWITCH, "0")
    assert not DeviceSteps(policy, PagedKVCache(1, 4, policy.device)).graphs


@pytest.mark.parametrize("kind", ["", "gpt2", "qwen3", "phi3"])
def test_a_step_reads_no_value_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`, which has none: what a step's forward pass would wait for can't be captured."""
    policy = policy_of(kind)
    _ = policy.output_layer
    policy.to("meta")
    # Autocast doesn't know the device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    cache = PagedKVCache(9, 256, torch.device("meta"), order="tokens", fills_blocks=True)
    steps, rows = DeviceSteps(policy, cache), [cache.new(), cache.new()]
    for row in rows:
        row.append(300)
    with torch.no_grad():
        hidden = steps.hidden([DeviceRow(1, 299, row) for row in rows])
        assert hidden.shape == (2, policy.width) and policy.next_token_logits(hidden).is_meta


def test_shapes_have_few_rows_too_many() -> None:
    found = [rounded_rows(rows) for rows in range(1, 513)]
    assert sorted({*found[:80]}) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80]
    assert all(rows <= shape and shape - rows < max(8, rows / 4) for rows, shape in enumerate(found, 1))
    assert len(set(found)) < 40


# Kernels over tables of blocks


def stand_in(query: Tensor, keys: Tensor, values: Tensor, tables: BlockTables, scale: float) -> Tensor:
    """Take what a library's kernel takes, in plain products, token by token."""
    found = []
    starts, lengths = tables.query_starts.tolist(), tables.lengths.tolist()
    assert query.dtype == keys.dtype == torch.bfloat16 and tables.blocks.dtype == tables.lengths.dtype == torch.int32
    assert tables.key_starts.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        assert end - begin <= tables.longest_query
        ends = torch.arange(lengths[row] - (end - begin), lengths[row]) + 1
        blocks = tables.blocks[row].expand(len(ends), -1)
        found.append(attend_plainly(query[begin:end], keys, values, ends, blocks, scale=scale))
    return torch.cat(found)


def one_token_too_many(query: Tensor, keys: Tensor, values: Tensor, tables: BlockTables, scale: float) -> Tensor:
    longer = BlockTables.of(tables.query_starts, tables.lengths + 1, tables.blocks, longest_query=tables.longest_query)
    return stand_in(query, keys, values, longer, scale)


def refused(*arguments: Any) -> Tensor:
    raise RuntimeError("Paged KV cache block size must be divisible by 512")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the kernels that a library has."""

    def put(*kernels: Any) -> None:
        paged_kernel.cache_clear()
        monkeypatch.setattr(block_table_attention, "library_kernels", lambda device: list(kernels))

    return put


def test_a_kernel_is_used_where_it_agrees_with_plain_products(
    kernels: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    device, bf16 = torch.device("cpu"), torch.bfloat16
    assert paged_kernel_obstacle(stand_in, device, bf16, 6, 2, 16, 256) is None
    assert "differs by" in str(paged_kernel_obstacle(one_token_too_many, device, bf16, 6, 2, 16, 256))
    assert "divisible by 512" in str(paged_kernel_obstacle(refused, device, bf16, 6, 2, 16, 256))
    kernels(refused, one_token_too_many, stand_in)
    assert paged_kernel(device, bf16, 6, 2, 16, 256) is stand_in
    for dtype, width, size in ((torch.float32, 16, 256), (bf16, 12, 256), (bf16, 264, 256), (bf16, 16, 64)):
        assert paged_kernel(device, dtype, 6, 2, width, size) is None
    kernels(refused, one_token_too_many)
    with caplog.at_level("INFO"):
        assert [paged_kernel(device, bf16, 6, 2, 16, 256) for _ in range(2)] == [None, None]
    (line,) = caplog.messages
    assert (
        "refused: RuntimeError: Paged KV cache" in line
        and "one_token_too_many: its output for 1 new tokens differs" in line
    )
    paged_kernel.cache_clear()


def test_prompts_are_read_through_a_kernel_as_without(kernels: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    module, counts = torch.nn.Identity(), [300, 3, 1, 70]

    def outputs(kind: type[ChunkAttention]) -> list[Tensor]:
        generator.manual_seed(0)
        cache = PagedKVCache(16, 256, torch.device("cpu"), order="tokens", fills_blocks=True)
        found, sequences = [], [cache.new() for _ in range(3)]
        for step in range(2):
            if step:
                sequences = [sequences[0].fork(260), sequences[0], *sequences[1:]]
            more = counts[1:] if not step else counts
            for one, count in zip(sequences, more, strict=True):
                one.append(count)
            total = sum(more)
            query, key, value = (
                torch.randn(1, heads, total, 16, generator=generator).bfloat16() for heads in (6, 2, 2)
            )
            found.append(kind(cache, sequences, more).attend(module, query, key, value, scale=0.25))
        return found

    def shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in tensors]

    counts[1] = 280
    kernels(stand_in)
    found, expected = outputs(TableChunkAttention), outputs(ChunkAttention)
    assert shapes(found) == shapes(expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)
    paged_kernel.cache_clear()


def test_a_policy_in_16_bits_decodes_through_a_kernel(
    kernels: Callable[..., None], replays: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(query: Tensor, keys: Tensor, values: Tensor, tables: BlockTables, scale: float) -> Tensor:
        calls.append(tables.longest_query)
        return stand_in(query, keys, values, tables, scale)

    kernels(counted)
    monkeypatch.setattr("rlhf_core.generation.native_backend.BLOCK_SIZE", {"cpu": 256})
    policy = PolicyModel(tiny_model(hidden=64), tiny_tokenizer()).set_options(precision="bf16")
    batch, sampling = prompt_batch(policy, PROMPTS), SamplingConfig(max_new_tokens=24, min_new_tokens=24)
    engine = Engine(policy, seed=1)
    made = Batch.from_completions(batch, engine.generate(batch, 2, sampling))
    assert 1 in calls and max(calls) > 1 and replays
    assert loop_of(engine) is None  # its weights are trained, so nothing is kept
    with torch.no_grad(), policy.product_precision():
        assert (policy.token_logps(made) - made["raw_logps"]).abs().max() < 0.05
    paged_kernel.cache_clear()
