"""Values that JSON, CSV, Parquet and Python allow and nothing can use: a fault with its place, never another error."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import lines, write_as
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.config.training import TrainerConfig
from rlhf_core.data import open_dataset
from rlhf_core.data.open_source import open_source
from rlhf_core.infra.errors import DataError
from rlhf_core.testing.tiny import tiny_tokenizer

TINY = tiny_tokenizer()
GOOD = b'{"prompt": "a", "response": "b"}\n'


def opened(data, record="sft", **dataset):
    return open_dataset(data, record, TINY, config=TrainerConfig(max_length=64, dataset=dataset))


def fault(data, record="sft", **dataset) -> str:
    with pytest.raises(DataError) as caught:
        opened(data, record, **dataset)
    str(caught.value).encode()  # A message that can't be printed is another fault.
    return str(caught.value)


LINES = {
    "half of a surrogate pair": (rb'{"prompt": "a", "response": "b \ud83d c"}', ":2: `response` holds half of a surrogate pair"),
    "the other half": (rb'{"prompt": "\ude00", "response": "b"}', ":2: `prompt` holds half of a surrogate pair"),
    "one in a message": (
        rb'{"messages": [{"role": "user", "content": "\udcff"}, {"role": "assistant", "content": "b"}]}',
        ":2: `messages[0].content` holds half of a surrogate pair, which isn't a character; got \\udcff at character 1",
    ),
    "one in a key": (rb'{"prompt": "a", "response": "b", "x\ud83d": 1}', ":2: a column's name holds half of a surrogate"),
    "one in a nested key": (rb'{"prompt": "a", "response": "b", "x": {"\ud83d": 1}}', ":2: a key of `x` holds half"),
    "one in a key that stands twice": (rb'{"\ud83d": 1, "\ud83d": 1}', ":2: key '\\ud83d' appears twice"),
    "one in a column that nothing reads": (rb'{"prompt": "a", "response": "b", "id": "\ud83d"}', ":2: `id` holds half"),
    "an integer of 5,000 digits": (
        b'{"prompt": "a", "response": "b", "id": ' + b"9" * 5000 + b"}",
        ":2:40: an integer has more than 4,300 digits; fix: write it as text",
    ),
    "a number too large for a float": (b'{"prompt": "a", "response": "b", "id": 1e999}', ":2: `id` isn't finite; got inf"),
    "nested 100,000 deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":2: nested too deeply"),
    "nested 500 deep": (b'{"prompt": "a", "response": "b", "x": ' + b"[" * 500 + b"]" * 500 + b"}", ":2: `x` is nested more"),
    "a number for text": (b'{"prompt": "a", "response": 5}', ":2: `response` must be text; got int 5"),
    "a truth value for text": (b'{"prompt": true, "response": "b"}', ":2: `prompt` must be text or a list of messages; got bool"),
    "a mapping for text": (b'{"prompt": {"a": 1}, "response": "b"}', ":2: `prompt` must be text or a list of messages; got dict"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", LINES)
def test_a_line_names_its_place(jsonl, case, streaming):
    line, expected = LINES[case]
    path = jsonl(GOOD + line + b"\n")
    assert fault(path, streaming=streaming).startswith(f"{path}{expected}")


def test_an_integer_that_python_can_write_is_fine(jsonl):
    row = opened(jsonl(b'{"prompt": "a", "id": ' + b"9" * 4300 + b"}"), "prompt")[0]
    assert row.record["id"] == 10**4300 - 1


def test_nul_characters_are_text(jsonl):
    row = opened(jsonl(rb'{"prompt": "a\u0000", "response": "\u0000b"}'))[0]
    assert TINY.decode(row.prompt_ids + row.responses[0]) == "<|bos|>a\x00\x00b<|end|>"


def test_rows_in_memory_are_held_to_the_same():
    nested: list = []
    nested.append(nested)
    good = {"prompt": "a", "response": "b"}
    for bad, expected in (
        ({"id": "\ud83d"}, "`id` holds half of a surrogate pair"),
        ({"id": 10**5000}, "`id` is an integer of more than 4,300 digits"),
        ({"id": nested}, "`id` is nested more than 100 levels deep"),
        ({3: "x"}, "a column's name isn't text; got 3"),
    ):
        for streaming in (False, True):
            assert fault([good, {**good, **bad}], streaming=streaming).startswith(f"data[1]: {expected}")
    odd = {
        **good,
        "when": datetime.date(2020, 1, 1),
        "price": decimal.Decimal("1.5"),
        "raw": b"\xff",
        "keys": {1: 2, "b": 3},
    }
    data = opened([odd])
    assert data[0].record == {}
    assert [line.split(": ")[2] for line in data.report.warnings()] == [
        f"column `{name}` is not a JSON value and is left out (data[0])" for name in ("when", "price", "raw", "keys")
    ]


@pytest.mark.parametrize("odd", [r'"\ud83d"', "NaN", "1e999", "[" * 300 + "]" * 300])
def test_json_in_a_text_is_held_to_the_same(odd):
    turn = f'{{"role": "user", "content": "a", "x": {odd}}}, {{"role": "assistant", "content": "b"}}'
    call = f'{{"name": "f", "arguments": {{"x": {odd}}}}}'
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for row, column in (
        ({"messages": f"[{turn}]"}, "messages"),
        ({"messages": [user, answer], "tools": f"[{call}]"}, "tools"),
        ({"messages": [user, {**answer, "tool_calls": f"[{call}]"}]}, "messages"),
        ({"messages": [user, {**answer, "tool_calls": [{"name": "f", "arguments": f'{{"x": {odd}}}'}]}]}, "messages"),
        ({"messages": [user, {"role": "function_call", "content": call}]}, "messages"),
    ):
        assert fault([row]).startswith(f"data[0]: `{column}")


def test_margin_must_fit_a_float():
    assert "`margin` must be a number" in fault(
        [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}], "preference"
    )


def table(tmp_path, **columns):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_values_of_parquet(tmp_path):
    text = {"prompt": ["a", "b"], "response": ["c", "d"]}
    for value, got in (
        (pa.array([datetime.date(2020, 1, 1)] * 2), "date"),
        (pa.array([decimal.Decimal("1.5")] * 2), "Decimal"),
        (pa.array([b"a", b"b"]), "bytes b'a'"),
        (pa.array([1, 2]), "int 1"),
    ):
        path = table(tmp_path, **{**text, "prompt": value})
        assert f"{path}:row 1: `prompt` must be text or a list of messages; got {got}" in fault(path)
        assert len(opened(table(tmp_path, **text, more=value))) == 2
    path = table(tmp_path, **text, when=pa.array([0, 10**15], pa.timestamp("ms")))
    assert fault(path).startswith(f"{path}:row 2: `when` can't be read; got timestamp[ms]: ")
    path = table(tmp_path, **text, score=pa.array([1.0, float("nan")]))
    assert fault(path).startswith(f"{path}:row 2: `score` isn't finite")


def test_text_of_parquet_that_is_no_utf8(tmp_path):
    bad = pa.array([b"a", b"\xff"]).view(pa.string())
    path = table(tmp_path, prompt=bad, response=["c", "d"])
    assert fault(path).startswith(f"{path}:row 2: `prompt` can't be read; got string: ")


def test_a_column_of_parquet_that_stands_twice(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    assert fault(path).startswith(f"{path}: column 'prompt' appears twice")


def test_damaged_parquet_is_a_data_fault(tmp_path):
    whole = write_as(
        [{"prompt": f"p{i}" * 9, "response": f"r{i}"} for i in range(60)], tmp_path, "parquet"
    ).read_bytes()
    draws = random.Random(0)
    path = tmp_path / "bad.parquet"
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draws.randrange(1, 9)):
            damaged[draws.randrange(len(damaged))] = draws.randrange(256)
        path.write_bytes(damaged[: draws.choice([len(damaged), draws.randrange(len(damaged))])])
        only_rows_or_faults(path)


def test_a_file_under_a_wrong_name(jsonl):
    path = jsonl(gzip.compress(GOOD))
    assert fault(path) == f"{path}:1: not UTF-8; got a gzip file; fix: name it by what it holds"
    assert "can't be read" in fault(jsonl(GOOD, "rows.parquet")) or "not a readable Parquet file" in fault(
        path.parent / "rows.parquet"
    )
    assert "isn't a gzip file, though its name says so" in fault(jsonl(GOOD, "rows.csv.gz"))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", '{"prompt": "a"}', "~nobody-of-this-name/rows.jsonl"])
def test_a_name_that_no_file_can_have(name):
    assert "no such file" in fault(name)


def test_whatever_a_library_raises_is_a_data_fault(monkeypatch):
    class Broken(list):
        def __iter__(self):
            yield {"prompt": "a", "response": "b"}
            raise ZeroDivisionError("from within")

    for streaming in (False, True):
        error = fault(Broken([1]), streaming=streaming)
        assert error == "data: cannot be read; got ZeroDivisionError: from within"


def only_rows_or_faults(path) -> None:
    """Read and encode a file; anything but rows or a `DataError` that can be printed fails the test."""
    for streaming in (False, True):
        try:
            list(opened(path, streaming=streaming))
        except DataError as error:
            assert str(path) in str(error)
            error.line().encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "nobody", "", None, 3])
TURN = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("role", "from"), ROLES),
        **dict.fromkeys(("content", "value", "tool_calls", "weight"), JSON),
    },
)
NAMES = (
    "prompt",
    "response",
    "messages",
    "text",
    "conversations",
    "system",
    "tools",
    "input",
    "instruction",
    "output",
    "history",
)
ROW = st.fixed_dictionaries(
    {}, optional={name: JSON | st.lists(TURN, max_size=3) | st.text(max_size=4) for name in NAMES}
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=3), st.data())
def test_mutated_lines_give_rows_or_faults(tmp_path_factory, rows, data):
    raw = bytearray("".join(json.dumps(row) + "\n" for row in rows).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path = tmp_path_factory.mktemp("fuzz") / data.draw(
        st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
    )
    path.write_bytes(bytes(raw))
    only_rows_or_faults(path)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.zst"]))
def test_random_bytes_give_rows_or_faults(tmp_path_factory, raw, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"rows.{suffix}"
    path.write_bytes(raw)
    only_rows_or_faults(path)


PREFERENCE = ("prompt", "chosen", "rejected", "margin", "label", "completion", "question", "system")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={name: JSON | st.lists(TURN, max_size=3) | st.text(max_size=4) for name in PREFERENCE}
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["preference", "unpaired", "prompt", "reasoning"]),
    st.sampled_from(["auto", "columns", "messages", "sharegpt", "pairs", "dialogue", "alpaca", "text"]),
)
def test_any_rows_of_any_type_give_rows_or_faults(rows, record, format):
    for streaming in (False, True):
        try:
            list(opened(rows, record, streaming=streaming, format=format))
        except DataError as error:
            error.line().encode()


def test_lines_are_written_as_they_are_read(jsonl):
    rows = [{"prompt": "é😀", "response": "\u2028"}]
    assert [dict(row.values) for row in open_source(jsonl(lines(rows))).rows()] == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", GOOD.decode()), ("a.csv", "prompt,response\na,b\n")])
def test_utf_16_is_called_so(tmp_path, encoding, name, text):
    path = tmp_path / name
    path.write_bytes(("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding))
    assert fault(path) == f"{path}:1: not UTF-8; got a UTF-16 file; fix: save the file as UTF-8"


def test_rows_of_token_ids_are_called_so():
    assert fault([{"input_ids": [1], "labels": [1]}]).endswith(
        "fix: these rows are token ids already: give the texts that they were made from"
    )
