"""Rows drawn by shares: each step's rows are a function of seed and step, the shares hold, and a resume goes on exactly."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import lines, write_as
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.config.run_file import DataFile, RunConfig, grouped_by_share
from rlhf_core.config.training import TrainerConfig
from rlhf_core.data import DataStream, open_dataset
from rlhf_core.data.data_source import DataSource, ListRows, SourcePart
from rlhf_core.data.mixture import chosen_part, mixture_text
from rlhf_core.data.open_source import entry_names, open_source
from rlhf_core.data.row_source import Cursor
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.testing.tiny import tiny_tokenizer

SIZES = {"a": 300, "b": 40, "c": 7}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder, paths = tmp_path_factory.mktemp("mixture"), {}
    for name, size in SIZES.items():
        path = folder / f"{name}.jsonl"
        path.write_bytes(lines([{"prompt": f"{name} {i}?", "response": f"{name}{i}"} for i in range(size)]))
        paths[name] = str(path)
    return paths


def mixed(files, **amounts) -> list:
    return [{"path": files[name], **amount} for name, amount in amounts.items()]


SHARES = {"a": {"share": 0.6}, "b": {"share": 0.3}, "c": {"share": 0.1}}


def opened(data, **dataset):
    config = TrainerConfig(max_length=64, dataset={"wrap": "none", **dataset})
    return open_dataset(data, "sft", tiny_tokenizer(), config=config)


def stream_of(data, *, streaming, batch_size=8, epochs=None, seed=1, block=16, **options) -> DataStream:
    data = opened(data, streaming=streaming, shuffle_block=block)
    return DataStream(data, batch_size=batch_size, epochs=epochs, seed=seed, **options)


def asked(batch) -> list[str]:
    """The prompts of a batch, whose first letter says which file each is of."""
    return [str(prompt) for prompt in batch.prompts]


def steps(stream, count=None) -> list[list[str]]:
    return [asked(batch) for batch in itertools.islice(stream, count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_shares_are_within_sampling_error_over_1000_steps(files, streaming):
    drawn = Counter(
        prompt[0] for step in steps(stream_of(mixed(files, **SHARES), streaming=streaming), 1000) for prompt in step
    )
    expected = {name: 8000 * amount["share"] for name, amount in SHARES.items()}
    chi_square = sum((drawn[name] - expected[name]) ** 2 / expected[name] for name in expected)
    assert sum(drawn.values()) == 8000 and chi_square < 13.8  # the 99.9th percentile with two degrees of freedom


def test_the_rest_is_shared_by_entries_without_a_share(files):
    drawn = Counter(
        prompt[0]
        for step in steps(stream_of(mixed(files, a={}, b={}, c={"share": 0.5}), streaming=False), 500)
        for prompt in step
    )
    assert abs(drawn["c"] - 2000) < 4 * 4000**0.5 / 2
    assert drawn["a"] / drawn["b"] == pytest.approx(300 / 40, rel=0.35)  # one after the other, as if they were one file


@pytest.mark.parametrize("streaming", [False, True])
def test_each_row_of_a_part_comes_once_before_any_comes_twice(files, streaming):
    drawn = [prompt for step in steps(stream_of(mixed(files, **SHARES), streaming=streaming), 200) for prompt in step]
    for name, size in SIZES.items():
        of_part = [prompt for prompt in drawn if prompt[0] == name]
        rounds = [of_part[at : at + size] for at in range(0, len(of_part) - size + 1, size)]
        assert all(len({*one}) == size for one in rounds)
    assert len(rounds) > 10 and rounds[0] != rounds[1]  # in another order each time


@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_is_a_function_of_seed_and_step_alone(files, streaming):
    def taken(seed=1, **options):
        return steps(stream_of(mixed(files, **SHARES), streaming=streaming, seed=seed, **options), 20)

    whole = taken()
    assert whole == taken() != taken(seed=2)
    halves = [taken(rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(one + two) for one, two in zip(*halves, strict=True)] == [sorted(step) for step in whole]
    in_twos = taken(batch_size=16)
    flat = list(itertools.chain(*whole))
    assert list(itertools.chain(*in_twos))[: len(flat)] == flat


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("every", [1, 7])
def test_a_stream_that_is_killed_and_resumed_goes_on_exactly(files, streaming, every):
    data = mixed(files, a={"share": 0.5}, b={"rows": 25}, c={"weight": 1.5})
    whole = steps(stream_of(data, streaming=streaming), 63)
    taken, state = [], None
    while len(taken) < len(whole):
        stream = stream_of(data, streaming=streaming)
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        taken += steps(stream, every)
        state = stream.state_dict()
    assert taken == whole


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    raw=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    stop=st.integers(1, 12),
    world=st.sampled_from([1, 2, 4]),
    streaming=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_mixture_resumes_exactly_with_any_number_of_processes(
    tmp_path_factory, sizes, raw, seed, stop, world, streaming
):
    folder, data = tmp_path_factory.mktemp("any"), []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.jsonl"
        path.write_bytes(lines([{"prompt": f"{number} {i}?", "response": "r"} for i in range(size)]))
        data.append({"path": str(path), "share": raw[number] / sum(raw[: len(sizes)])})
    whole = steps(stream_of(data, streaming=streaming, batch_size=4, seed=seed, block=3), 16)
    first = stream_of(data, streaming=streaming, batch_size=4, seed=seed, block=3)
    assert steps(first, stop) == whole[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    ranks = []
    for rank in range(world):
        resumed = stream_of(data, streaming=streaming, batch_size=4, seed=seed, block=3, rank=rank, world_size=world)
        resumed.load_state_dict(state)
        ranks.append(steps(resumed, 16 - stop))
    together = [sorted(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]
    assert together == [sorted(step) for step in whole[stop:]]


def test_an_epoch_holds_as_many_rows_as_there_are(files):
    stream = stream_of(mixed(files, **SHARES), streaming=False, epochs=2)
    assert stream.steps == -(-2 * sum(SIZES.values()) // 8)
    taken = steps(stream)
    assert len(taken) == stream.steps and stream.epoch == 1
    assert taken == [*steps(stream_of(mixed(files, **SHARES), streaming=False), len(taken) - 1), taken[-1]]
    half = steps(stream_of(mixed(files, **SHARES), streaming=False, epochs=0.5))
    assert half[:-1] == taken[: len(half) - 1]


def test_a_mixed_stream_needs_a_number_of_steps(files):
    with pytest.raises(ConfigError, match="have no end") as caught:
        stream_of(mixed(files, **SHARES), streaming=True, epochs=1)
    assert "max_steps" in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pass_of_a_mixture_still_takes_every_row_once(files, streaming):
    stream = stream_of(mixed(files, **SHARES), streaming=streaming, epochs=1, shuffle=False, once=True)
    batches = list(stream)
    seen = Counter(prompt for batch in batches for prompt in asked(batch))
    assert len(seen) == sum(SIZES.values()) and {*seen.values()} == {1}
    numbers = {row: prompt for batch in batches for row, prompt in zip(batch.rows, asked(batch), strict=True)}
    drawn = stream_of(mixed(files, **SHARES), streaming=streaming)
    for batch in itertools.islice(drawn, 30):  # a row has the same number however it is reached
        assert [numbers[row] for row in batch.rows] == asked(batch)
    report = stream.dataset.report.as_dict()
    assert {name: entry["kept"] for name, entry in report["entries"].items()} == SIZES


def test_rows_that_are_read_again_are_counted_once(files):
    stream = stream_of(mixed(files, **SHARES), streaming=True)
    steps(stream, 60)
    entries = stream.dataset.report.entries
    assert entries["c"]["rows"] == 7 and entries["b"]["rows"] == 40 and 200 < entries["a"]["rows"] <= 300


@pytest.mark.parametrize("streaming", [False, True])
def test_other_shares_are_another_run(files, streaming):
    first = stream_of(mixed(files, a={"share": 0.6}, b={"share": 0.4}), streaming=streaming)
    other = stream_of(mixed(files, a={"share": 0.5}, b={"share": 0.5}), streaming=streaming)
    with pytest.raises(DataError, match="changed since the checkpoint"):
        other.load_state_dict(first.state_dict())


def test_a_part_without_a_usable_row_is_an_error(files, tmp_path):
    (tmp_path / "long.jsonl").write_bytes(lines([{"prompt": "x" * 500, "response": "y"}] * 3))
    data = [{"path": files["a"], "share": 0.5}, {"path": str(tmp_path / "long.jsonl"), "share": 0.5}]
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"long.*no row that can be used"):
            steps(stream_of(data, streaming=streaming), 50)


# Counts


@pytest.mark.parametrize("count", [1, 6, 7, 8, 20])
def test_a_count_takes_the_first_rows_and_begins_again_where_there_are_fewer(files, count):
    source = open_source([{"path": files["c"], "rows": count}, files["b"]])
    rows = list(source.rows())
    assert [row.values["response"] for row in rows[:count]] == [f"c{i % 7}" for i in range(count)]
    assert len(rows) == count + 40 and [row.index for row in rows] == list(range(len(rows)))
    for number in range(len(rows)):
        after = Cursor(*json.loads(json.dumps(rows[number].after)))
        assert list(itertools.islice(source.rows(after), 3)) == rows[number + 1 : number + 4]


def test_a_count_is_over_all_files_of_a_pattern(files):
    rows = list(open_source({"path": str(Path(files["a"]).parent / "[bc].jsonl"), "rows": 45}).rows())
    assert Counter(row.values["response"][0] for row in rows) == {"b": 40, "c": 5}


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    count=st.integers(1, 25),
    weight=st.sampled_from([0.5, 1, 2.5]),
)
@settings(max_examples=40, deadline=None)
def test_reading_goes_on_from_any_cursor(sizes, count, weight):
    sources = [ListRows([{"n": i} for i in range(size)], name=f"s{number}") for number, size in enumerate(sizes)]
    parts = [
        SourcePart(sources, rows=count),
        SourcePart([ListRows([{"n": -1}] * 4)], weight=weight),
        SourcePart(sources[:1]),
    ]
    for groups in ((), [(0.5, (0, 1)), (0.5, (2,))], [(0.25, (0,)), (0.25, (1,)), (0.5, (2,))]):
        source = DataSource(parts, groups)
        rows = list(source.rows())
        assert len({row.index for row in rows}) == len(rows)
        for number, row in enumerate(rows):
            assert list(source.rows(row.after)) == rows[number + 1 :]


def test_twins_read_the_same_counted_rows(files):
    data = mixed(files, c={"rows": 10}, b={"rows": 3})
    assert list(opened(data)) == list(opened(data, streaming=True))


# Each entry read in its own way


def test_entries_have_columns_formats_and_splits_of_their_own(tmp_path):
    (tmp_path / "one.csv").write_text("frage,antwort\n1 + 1?,2\n")
    (tmp_path / "two.tsv").write_text('query\treply\n"a\tb"\tc\n')
    (tmp_path / "parts").mkdir()
    for split in ("train", "test"):
        (tmp_path / "parts" / f"{split}.jsonl.gz").write_bytes(
            gzip.compress(lines([{"prompt": split, "response": split}]))
        )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    write_as([{"messages": chat, "prompt": "p", "response": "r"}], tmp_path, "parquet")
    data = [
        {"path": str(tmp_path / "one.csv"), "columns": {"prompt": "frage", "response": "antwort"}},
        {"path": str(tmp_path / "two.tsv"), "columns": {"response": "reply"}},
        {"path": str(tmp_path / "parts"), "split": "test"},
        {"path": str(tmp_path / "parts")},
        {"path": str(tmp_path / "rows.parquet"), "format": "messages"},
    ]
    for streaming in (False, True):
        dataset = opened(data, streaming=streaming)
        prompts = [row.prompt for row in dataset]
        assert prompts == ["1 + 1?", "a\tb", "test", "train", chat[:1]]
        assert [name.rpartition("_")[2] for name in dataset.report.entries] == ["one", "two", "parts", "2", "rows"]
    assert opened(data).report.files[0]["columns"] == {"prompt": "frage", "response": "antwort"}


def test_a_column_that_no_row_of_its_entry_has_is_an_error(tmp_path, files):
    (tmp_path / "one.jsonl").write_bytes(lines([{"prompt": "p", "response": "r", "system": "s"}]))
    data = [files["a"], {"path": str(tmp_path / "one.jsonl"), "columns": {"system": "sistem"}}]
    with pytest.raises(ConfigError, match="`sistem`") as caught:
        opened(data)
    assert "entry `one`" in str(caught.value) and "did you mean `system`" in str(caught.value)
    with pytest.raises(ConfigError, match="no column `promt`"):
        opened([files["a"], {"path": files["b"], "columns": {"promt": "prompt"}}])


def test_names_of_entries_are_short_and_different(tmp_path):
    def names(*paths, **own):
        return entry_names([DataFile(path=path) for path in paths] + [DataFile(path="x.jsonl", name=own.get("name"))])

    assert names("a/rows.jsonl.gz", "owner/name:main", "b/*.csv", "hf://datasets/o/n/f.parquet") == [
        "rows", "name_main", "b", "f", "x",
    ]  # fmt: skip
    assert names("gsm8k/test.jsonl", "math/test.jsonl", name="hard") == ["gsm8k_test", "math_test", "hard"]
    assert names("a/x.jsonl", "a/x.jsonl") == ["a_x", "a_x_2", "x"]
    with pytest.raises(ConfigError, match="two entries have one name"):
        entry_names([DataFile(path="a", name="n"), DataFile(path="b", name="n")])


# What is refused


def test_groups_of_shares():
    def groups(*shares):
        return grouped_by_share([DataFile(path="f", **({} if share is None else {"share": share})) for share in shares])

    assert groups(None, None) == [(1.0, [0, 1])]
    assert groups(0.75, 0.25) == [(0.75, [0]), (0.25, [1])]
    assert groups(None, 0.25, None) == [(0.75, [0, 2]), (0.25, [1])]
    assert len(groups(*[1 / 3] * 3)) == 3
    for wrong, problem in (((0.5, 0.4), "add up to 1"), ((0.7, 0.6), "add up to 1"), ((None, 1.0), "leave nothing")):
        with pytest.raises(ConfigError, match=problem):
            groups(*wrong)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([{"path": "a", "share": 0.5}, {"path": "b", "share": 0.3}], "add up to 1"),
        ([{"path": "a", "share": 1.5}], r"data\.0\.share"),
        ([{"path": "a", "share": 0}], r"data\.0\.share"),
        ([{"path": "a", "rows": 0}], r"data\.0\.rows"),
        ([{"path": "a", "rows": 2.5}], r"data\.0\.rows"),
        ([{"path": "a", "weight": 2, "rows": 5}], "leave one out"),
        ([{"path": "a", "weight": 2, "share": 0.5}, "b"], "leave one out"),
        ([{"path": "a", "format": "allpaca"}], "did you mean `alpaca`"),
        ([{"path": "a", "shares": 0.5}], "did you mean `share`"),
        ([{"share": 0.5}], "path"),
    ],
)
def test_a_wrong_entry_is_named(data, problem):
    with pytest.raises(ConfigError, match=problem):
        RunConfig.parse({"method": "sft", "model": "m", "data": data})


@pytest.mark.parametrize("amount", [{"weight": 2}, {"share": 0.5}])
def test_held_out_rows_have_no_weight_and_no_share(amount):
    with pytest.raises(ConfigError, match="scored once each"):
        RunConfig.parse({"method": "sft", "model": "m", "data": "a", "eval_data": [{"path": "b", **amount}]})
    run = RunConfig.parse(
        {"method": "sft", "model": "m", "data": "a", "eval_data": [{"path": "b", "rows": 5, "name": "hard"}]}
    )
    assert run.model_dump()["eval_data"] == [{"path": "b", "rows": 5, "name": "hard"}]


def test_the_part_of_a_draw_depends_on_seed_and_number_alone():
    shares = [0.2, 0.8]
    drawn = [chosen_part(draw, shares, 3) for draw in range(9000)]
    assert drawn == [chosen_part(draw, shares, 3) for draw in reversed(range(9000))][::-1]
    assert drawn != [chosen_part(draw, shares, 4) for draw in range(9000)]


def test_entries_are_the_same_for_any_number_of_processes_that_encode(tmp_path, files):
    (tmp_path / "one.csv").write_text("frage,antwort\n1 + 1?,2\n")
    own = {"prompt": "frage", "response": "antwort"}
    data = [
        {"path": files["a"], "rows": 1100},
        {"path": str(tmp_path / "one.csv"), "columns": own, "rows": 1200},
        {"path": files["b"], "share": 0.5},
    ]
    one, two = (opened(data, processes=processes) for processes in (1, 2))
    assert list(one) == list(two) and one.fingerprint == two.fingerprint
    assert one.report.as_dict() == two.report.as_dict()
    assert {name: entry["kept"] for name, entry in two.report.entries.items()} == {"a": 1100, "one": 1200, "b": 40}
    taken = (steps(DataStream(dataset, batch_size=8, epochs=None, seed=1), 20) for dataset in (one, two))
    assert len({str(found) for found in taken}) == 1


def test_rows_that_are_kept_are_those_of_the_same_groups(tmp_path):
    """Two files by shares number their rows otherwise than one after the other: neither may take the other's from the cache."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        rows = [{"prompt": f"{path.stem} {i}?", "response": path.stem * 60} for i in range(3000)]
        path.write_bytes(lines(rows))
    by_share = [{"path": str(path), "share": 0.5} for path in paths]
    in_a_row = [str(path) for path in paths]

    def numbers(data) -> list[int]:
        return [row.index for row in opened(data).rows([0, 1, 2, 3000, 3001])]

    assert numbers(by_share) == [0, 2, 4, 1, 3] and numbers(in_a_row) == [0, 1, 2, 3000, 3001]
    assert numbers(by_share) == [0, 2, 4, 1, 3]


@pytest.mark.parametrize("name", ["../evil", "a b/c", "-a", ""])
def test_names_of_entries_are_plain(name):
    with pytest.raises(ConfigError, match="name"):
        DataFile.parse({"path": "p", "name": name}, place="data")


@pytest.mark.parametrize(
    ("rows", "groups", "text"),
    [
        ((30, 10), (), "a 75 % (30 rows); b 25 % (10 rows)"),
        ((30, None), (), None),
        ((0, 0), (), None),
        ((30, 10), [(0.5, [0]), (0.5, [1])],
         "a 50 % (30 rows, each 0.67 times in an epoch); b 50 % (10 rows, each 2 times in an epoch)"),
        ((30, None), [(0.1, [0]), (0.9, [1])], "a 10 %; b 90 %"),
        ((8, 3, 1), [(0.2, [0]), (0.8, [1, 2])],
         "a 20 % (8 rows, each 0.3 times in an epoch); b 60 % (3 rows, each 2.4 times in an epoch); c 20 % (1 rows, each 2.4"),
        ((8, 3, None), [(0.2, [0]), (0.8, [1, 2])], "a 20 %; b and c together 80 %"),
    ],
)  # fmt: skip
def test_shares_in_words(rows, groups, text):
    said = mixture_text("abc"[: len(rows)], rows, groups)
    assert said == text if text is None else said is not None and said.startswith(text)
