"""The stream of windows: resumed anywhere, on any number of processes, it is the uninterrupted one."""

from __future__ import annotations

import itertools
import json
import math

import datasets
import pytest
import torch
from data_helpers import sft_rows, write_as
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.config.training import DatasetConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.data import DataStream, PreferenceDataset, SFTDataset, StreamingSFTDataset
from rlhf_core.data.data_stream import shares
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.testing.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FORMS = ("jsonl", "gz", "zst", "parquet", "iterable")
LONG = {"prompt": "p" * 99, "response": "r"}


def mixed(count: int) -> list[dict[str, str]]:
    """Rows of which every fifth is refused."""
    return [LONG if number % 5 == 4 else row for number, row in enumerate(sft_rows(count))]


def opened(data, *, streaming: bool, block: int = 6):
    kind = StreamingSFTDataset if streaming else SFTDataset
    return kind(data, TOKENIZER, max_length=64, options=DatasetConfig(shuffle_block=block))


def source(rows, folder, form):
    return (
        datasets.Dataset.from_list(rows).to_iterable_dataset() if form == "iterable" else write_as(rows, folder, form)
    )


def same(left, right) -> bool:
    return (
        left.rows == right.rows
        and left.prompt_ids.equal(right.prompt_ids)
        and left.response_ids.equal(right.response_ids)
        and left.loss_mask.equal(right.loss_mask)
        and (left.prompts, left.records, left.places) == (right.prompts, right.records, right.places)
    )


def windows(stream) -> list[tuple[int, ...]]:
    return [batch.rows for batch in stream]


@pytest.fixture(scope="module", params=[*FORMS, "map"])
def dataset_maker(request, tmp_path_factory):
    rows, form = mixed(33), request.param
    data = rows if form == "map" else source(rows, tmp_path_factory.mktemp(form), form)
    return lambda: opened(data, streaming=form != "map")


@pytest.mark.parametrize("batch_size", [4, 9])
def test_resume_at_any_point_is_the_uninterrupted_stream(dataset_maker, batch_size):
    options = {"batch_size": batch_size, "epochs": 3, "seed": 5}
    stream = DataStream(dataset_maker(), **options)
    batches, states = [], [stream.state_dict()]
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    assert len(batches) == math.ceil(27 * 3 / batch_size)
    for step, state in enumerate(states):
        resumed = DataStream(dataset_maker(), **options)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        rest = list(resumed)
        assert len(rest) == len(batches) - step and all(map(same, rest, batches[step:]))
        assert resumed.state_dict() == states[-1]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    block=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    streaming=st.booleans(),
    data=st.data(),
)
def test_resume_property(rows, batch_size, block, seed, epochs, shuffle, streaming, data):
    content = mixed(rows)
    options = {"batch_size": batch_size, "epochs": epochs, "seed": seed, "shuffle": shuffle}
    stream = DataStream(opened(content, streaming=streaming, block=block), **options)
    stop = data.draw(st.integers(0, math.ceil((rows - rows // 5) * epochs / batch_size)))
    before = [next(stream) for _ in range(stop)]
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = DataStream(opened(content, streaming=streaming, block=block), **options)
    resumed.load_state_dict(state)
    after = [batch.rows for batch in resumed]
    assert after == windows(stream)
    drawn = [row for window in [*(batch.rows for batch in before), *after] for row in window]
    kept = [number for number in range(rows) if number % 5 != 4]
    for epoch in range(epochs):
        assert sorted(drawn[epoch * len(kept) : (epoch + 1) * len(kept)]) == kept
    assert len(drawn) == epochs * len(kept)
    assert resumed.dataset.report.state_dict() == stream.dataset.report.state_dict()
    assert stream.dataset.report.rows == rows and stream.dataset.report.kept == len(kept)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    per_process=st.integers(1, 4),
    world=st.integers(1, 4),
    epochs=st.integers(1, 2),
    streaming=st.booleans(),
)
def test_processes_together_are_one(rows, per_process, world, epochs, streaming):
    content = mixed(rows)
    kept = rows - rows // 5
    if kept * epochs < world:
        return
    data = opened(content, streaming=streaming)
    if not streaming and kept < world:
        with pytest.raises(ConfigError, match="fewer rows than processes"):
            DataStream(data, batch_size=world, world_size=world)
        return
    options = {"batch_size": per_process * world, "epochs": epochs, "seed": 3}
    alone = windows(DataStream(data, **options))
    streams = [
        DataStream(opened(content, streaming=streaming), **options, rank=rank, world_size=world)
        for rank in range(world)
    ]
    shared = [list(window) for window in zip(*map(list, streams), strict=True)]
    assert all(batch.num_prompts for window in shared[:-1] for batch in window)
    together = [sorted(row for batch in window for row in batch.rows) for window in shared]
    assert together == [sorted(window) for window in alone]
    assert len({json.dumps(stream.state_dict()) for stream in streams}) == 1
    if not streaming:
        assert streams[0].steps == len(alone)


@pytest.mark.parametrize("record", ["sft", "preference"])
def test_an_empty_share_has_the_columns_of_the_others(record):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "margin": i} for i in range(5)]
    kind, rows = (SFTDataset, sft_rows(5)) if record == "sft" else (PreferenceDataset, rows)
    data = kind(rows, TOKENIZER, max_length=64)
    streams = [DataStream(data, batch_size=4, world_size=4, rank=rank) for rank in range(4)]
    last = [list(stream)[-1] for stream in streams]
    assert [batch.num_prompts for batch in last] == [1, 0, 0, 0]
    for empty in last[1:]:
        assert (empty.num_responses, empty.rows, empty.records, empty.num_tokens) == (0, (), (), 0)
        assert empty.per_prompt.keys() == last[0].per_prompt.keys()
        assert empty.per_response.keys() == last[0].per_response.keys()
        assert empty.loss_mask.dtype == torch.bool and empty.prompt_ids.dtype == torch.long


def test_resume_on_another_number_of_processes():
    content, options = mixed(40), {"batch_size": 4, "epochs": 2, "seed": 1}
    alone = DataStream(opened(content, streaming=True), **options)
    every = windows(alone)
    two = [DataStream(opened(content, streaming=True), **options, rank=rank, world_size=2) for rank in (0, 1)]
    for stream in two:
        for _ in range(7):
            next(stream)
    one = DataStream(opened(content, streaming=True), **options)
    one.load_state_dict(two[0].state_dict())
    assert windows(one) == every[7:]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 6))
def test_shares_are_whole_and_balanced(lengths, world):
    rows = [EncodedRow(number, [0] * length) for number, length in enumerate(lengths)]
    dealt = shares(rows, world)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(len(rows)))
    assert all(numbers == sorted(numbers) for numbers in dealt)
    if len(rows) >= world:
        assert all(dealt)
    tokens = [sum(lengths[number] for number in numbers) for numbers in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("streaming", [False, True])
def test_order_is_a_function_of_seed_and_epoch(streaming):
    data = opened(sft_rows(30), streaming=streaming)
    orders = [windows(DataStream(data, batch_size=30, epochs=2, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][0] != orders[0][1]
    plain = windows(DataStream(data, batch_size=30, epochs=2, shuffle=False))
    assert plain == [tuple(range(30))] * 2


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), block=st.integers(1, 15), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_block_shuffle_is_a_permutation_of_near_rows(rows, block, seed, epoch):
    data = opened(sft_rows(rows), streaming=True, block=block)
    order = [outcome.row.index for outcome, _ in data.walk(epoch, seed=seed, shuffle=True, position=[])]
    assert sorted(order) == list(range(rows))
    assert all(abs(place - index) < block for place, index in enumerate(order))


def test_block_boundaries_move_from_epoch_to_epoch():
    data = opened(sft_rows(40), streaming=True, block=8)

    def blocks(epoch: int) -> list[int]:
        """Return how many rows the blocks of an epoch have, but for the last."""
        after = [position[0] for _, position in data.walk(epoch, seed=0, shuffle=True, position=[])]
        ends = [number for number, (one, other) in enumerate(itertools.pairwise([0, *after]), 1) if other > one]
        return [end - begin for begin, end in itertools.pairwise([0, *ends[:-1]])]

    assert len({blocks(epoch)[0] for epoch in range(20)}) > 4
    assert blocks(3) == blocks(3) and {*blocks(3)[1:]} == {8}


def test_a_block_that_holds_everything_is_drawn_anew_in_each_epoch():
    stream = DataStream(opened(sft_rows(20), streaming=True, block=10**6), batch_size=20, epochs=4)
    assert len(set(windows(stream))) == 4


def test_resume_reads_one_block_again(monkeypatch, tmp_path):
    data = opened(write_as(sft_rows(100), tmp_path, "jsonl"), streaming=True, block=10)
    stream = DataStream(data, batch_size=5, seed=2)
    for _ in range(15):
        next(stream)
    state, rest = stream.state_dict(), windows(stream)
    again = opened(tmp_path / "rows.jsonl", streaming=True, block=10)
    read = []
    rows = again.source.rows
    monkeypatch.setattr(again.source, "rows", lambda cursor, **parts: (read.append(row) or row for row in rows(cursor)))
    resumed = DataStream(again, batch_size=5, seed=2)
    resumed.load_state_dict(state)
    next(resumed)
    assert len(read) <= 20 and read[0].index >= 60
    assert windows(resumed) == rest[1:]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_an_epoch_leaves_over_begin_the_next(streaming):
    stream = DataStream(opened(sft_rows(5), streaming=streaming), batch_size=2, epochs=3, shuffle=False)
    assert windows(stream) == [(0, 1), (2, 3), (4, 0), (1, 2), (3, 4), (0, 1), (2, 3), (4,)]
    assert stream.steps == 8


@pytest.mark.parametrize(("epochs", "rows"), [(0.5, 5), (0.3, 3), (0.01, 1), (1.25, 13), (2.0, 20), (2.01, 21)])
def test_parts_of_epochs(epochs, rows):
    stream = DataStream(opened(sft_rows(10), streaming=False), batch_size=2, epochs=epochs)
    assert stream.steps == math.ceil(rows / 2)
    drawn = [row for window in windows(stream) for row in window]
    assert len(drawn) == rows
    streamed = opened(sft_rows(10), streaming=True)
    if epochs >= 1:
        stream = DataStream(streamed, batch_size=2, epochs=epochs)
        assert stream.steps is None
        assert sum(map(len, windows(stream))) == rows
        assert stream.steps == math.ceil(rows / 2)
    else:
        with pytest.raises(ConfigError, match="set `max_steps`"):
            DataStream(streamed, batch_size=2, epochs=epochs)


def test_no_end():
    stream = DataStream(opened(sft_rows(3), streaming=True), batch_size=2, epochs=None)
    assert stream.steps is None
    assert sum(next(stream).num_prompts for _ in range(30)) == 60 and stream.epoch == 19


def test_batch_that_processes_cannot_share():
    with pytest.raises(ConfigError) as caught:
        DataStream(opened(sft_rows(9), streaming=False), batch_size=7, world_size=3)
    assert caught.value.exit_code == 2
    assert "7 = 2 × 3 + 1" in str(caught.value) and "use 6 or 9" in str(caught.value)
    with pytest.raises(ConfigError, match=r"use 3$"):
        DataStream(opened(sft_rows(9), streaming=False), batch_size=2, world_size=3)


def test_streamed_rows_fewer_than_processes():
    stream = DataStream(opened(sft_rows(2), streaming=True), batch_size=3, world_size=3)
    with pytest.raises(ConfigError, match="fewer rows than processes"):
        next(stream)


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_on_other_data_is_refused(streaming):
    state = DataStream(opened(sft_rows(9), streaming=streaming), batch_size=3).state_dict()
    with pytest.raises(DataError, match="changed since the checkpoint") as caught:
        DataStream(opened(sft_rows(8), streaming=streaming), batch_size=3).load_state_dict(state)
    assert caught.value.exit_code == 3
    data = opened(sft_rows(9), streaming=streaming)
    with pytest.raises(ConfigError, match="`seed` changed"):
        DataStream(data, batch_size=3, seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match="`shuffle` changed"):
        DataStream(data, batch_size=3, shuffle=False).load_state_dict(state)


def test_a_stream_of_refused_rows_ends_with_an_error():
    stream = DataStream(opened([LONG] * 3, streaming=True), batch_size=2, epochs=None)
    with pytest.raises(DataError, match="none of 3 rows can be used"):
        next(stream)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_rows_places_are_those_of_one_process(processes: int) -> None:
    """No two readings of a row share a place, whoever holds it: seven rows are read about three times here, six at a time."""
    data = opened(sft_rows(7), streaming=False)
    streams = [DataStream(data, batch_size=6, epochs=3.0, rank=r, world_size=processes) for r in range(processes)]
    (whole,) = (
        [*zip(b.places, b.rows, strict=True)] for b in [Batch.cat([*DataStream(data, batch_size=6, epochs=3.0)])]
    )
    found = sorted(
        (place, row) for stream in streams for b in stream for place, row in zip(b.places, b.rows, strict=True)
    )
    assert found == whole and [place for place, _ in whole] == list(range(21))
    batch = next(DataStream(data, batch_size=6, epochs=3.0))
    assert batch.select([4, 1]).places == (4, 1) and batch.take([5, 0]).places == (0, 5) and not batch.select([]).places
