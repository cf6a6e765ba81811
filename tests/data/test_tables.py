"""CSV and TSV, arrays of JSON and folders: the same rows as from lines of JSON, each with its place, from any cursor on."""

from __future__ import annotations

import csv
import gzip
import io
import json

import datasets
import pyarrow as pa
import pytest
from data_helpers import lines, sft_rows, write_as

from rlhf_core.config.training import TrainerConfig
from rlhf_core.data import open_dataset
from rlhf_core.data.open_source import check_paths, has_splits, open_source
from rlhf_core.data.row_checker import RowChecker
from rlhf_core.data.row_source import Cursor
from rlhf_core.infra.errors import DataError

ODD = [
    {"prompt": 'say "hi", please', "response": "two\nlines\r\nand, a comma"},
    {"prompt": "", "response": "\t'"},
    {"prompt": "é😀", "response": "x" * 200_000},
    *sft_rows(20),
]


def delimited(rows, delimiter: str, end: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


FILES = {
    "rows.csv": delimited(ODD, ","),
    "unix.csv": delimited(ODD, ",", "\n"),
    "marked.csv": b"\xef\xbb\xbf" + delimited(ODD, ","),
    "rows.tsv": delimited(ODD, "\t"),
    "rows.csv.gz": gzip.compress(delimited(ODD, ",")),
    "rows.CSV": delimited(ODD, ","),
    "rows.json": json.dumps(ODD).encode(),
    "indented.json": b"\xef\xbb\xbf\n" + json.dumps(ODD, indent=2, ensure_ascii=False).encode(),
    "lines.json": lines(ODD),
    "rows.json.gz": gzip.compress(json.dumps(ODD).encode()),
    "rows.tsv.zst": delimited(ODD, "\t"),
}


def write(folder, name: str) -> str:
    path = folder / name
    if name.endswith(".zst"):
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(FILES[name])
    else:
        path.write_bytes(FILES[name])
    return str(path)


def fault(data, **options) -> str:
    with pytest.raises(DataError) as caught:
        list(open_source(data, **options).rows())
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_any_cursor_on(tmp_path, name):
    path = write(tmp_path, name)
    source = open_source([path, path])
    every = list(source.rows())
    assert [dict(row.values) for row in every] == ODD * 2
    assert [row.index for row in every] == list(range(2 * len(ODD)))
    for number, row in enumerate(every):
        assert list(source.rows(Cursor(*json.loads(json.dumps(row.after))))) == every[number + 1 :]


def test_places_are_lines(tmp_path):
    path = write(tmp_path, "rows.csv")
    assert [row.place for row in open_source(path).rows()][:4] == [f"{path}:{line}" for line in (2, 5, 6, 7)]
    path = write(tmp_path, "indented.json")
    assert [row.place for row in open_source(path).rows()][:3] == [f"{path}:{line}" for line in (3, 7, 11)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3: has 3 values for 2 columns; fix: put values that hold `,` or a line end in quotes"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', ":2: not a valid CSV record; got unexpected end of data"),
        ("a.csv", b"a,a\n1,2\n", ":1: column 'a' appears twice"),
        ("a.csv", b"a;b\n1;2\n", ":1: the columns aren't separated by ','; got ';' between names"),
        ("a.tsv", b"a,b\n1,2\n", ":1: the columns aren't separated by '\\t'; got ',' between names"),
        ("a.csv", b"a\tb\n1\t2\n", ":1: the columns aren't separated by ','; got '\\t' between names; fix: name the file .tsv"),
        ("a.csv", b"a,b\n1,\xff\n", ":2: not UTF-8; got byte 0xff at offset 6"),
        ("a.csv", b"a,b\n", ": holds no rows"),
        ("a.csv", b"", ": holds no rows"),
        ("a.json", b"[]", ": holds no rows"),
        ("a.json", b'[{"a": 1}, {"a": 2}', ":1:20: the array is incomplete; got Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1},\n{"a": "2', ":2:7: the array is incomplete; got Unterminated string starting at"),
        ("a.json", b'[{"a": 1},\n{"a": 1 2}]', ":2:9: not valid JSON; got Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1},\n]', ":2:1: not valid JSON; got Expecting value"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', ":2:1: not valid JSON; got Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1}] x', ":1:12: not valid JSON; got Extra data"),
        ("a.json", b'[{"a": 1},\n 3]', ":2: expected an array of objects; got int"),
        ("a.json", b'[{"a": 1},\n {"a": NaN}]', ":2: a number isn't finite; got NaN"),
        ("a.json", b'[{"a": 1},\n {"a": 1, "a": 2}]', ":2: key `a` appears twice"),
        ("a.json", b'[{"a": 1},\n {"a": ' + b"9" * 5000 + b"}]", ":2:8: an integer has more than 4,300 digits"),
        ("a.json", b'[{"a": "\xff"}]', ": not UTF-8; got byte 0xff at offset 8"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_its_place(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert fault(path).startswith(f"{path}{expected}")


def test_numbers_and_truth_values_of_csv_are_text_that_is_understood(tiny, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\na,b,True\na,c,False\n")
    config = TrainerConfig(max_length=64)
    assert [row.per_response for row in open_dataset(path, "unpaired", tiny, config=config)] == [
        {"desirable": [True]},
        {"desirable": [False]},
    ]
    path.write_text("prompt,chosen,rejected,margin\na,b,c,0.5\n")
    assert open_dataset(path, "preference", tiny, config=config)[0].per_prompt == {"margin": 0.5}
    path.write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]"\n'
    )
    row = open_dataset(path, "sft", tiny, config=config)[0]
    assert tiny.decode(row.prompt_ids + row.responses[0]) == "<|bos|><|user|>a<|end|><|assistant|>b<|end|>"


def test_a_folder_of_files_of_one_kind(tmp_path):
    rows = sft_rows(9)
    (tmp_path / "a.jsonl").write_bytes(lines(rows[:4]))
    (tmp_path / "b.csv").write_bytes(delimited(rows[4:], ","))
    (tmp_path / "README.md").write_text("about")
    for streaming in (False, True):
        read = list(open_source(tmp_path, streaming=streaming).rows())
        assert [dict(row.values) for row in read] == rows
    assert read[4].place == f"{tmp_path / 'b.csv'}:2"
    assert not has_splits(tmp_path)
    (tmp_path / "c.jsonl").write_bytes(lines([{"text": "t"}]))
    assert (
        "the files in this folder have different columns, so they aren't one dataset; got a.jsonl: prompt, response; b.csv"
        in fault(tmp_path)
    )


def test_a_pattern_of_files(tmp_path, monkeypatch):
    rows = sft_rows(4)
    (tmp_path / "a-1.jsonl").write_bytes(lines(rows[:2]))
    (tmp_path / "a-2.jsonl").write_bytes(lines(rows[2:]))
    (tmp_path / "b.jsonl").write_bytes(lines(rows))
    monkeypatch.chdir(tmp_path)
    for pattern in (str(tmp_path / "a-*.jsonl"), "a-?.jsonl", "a-[12].jsonl", ["a-*.jsonl"]):
        check_paths(pattern)
        assert [dict(row.values) for row in open_source(pattern).rows()] == rows
    assert "no file matches this pattern" in fault("c-*.jsonl") and "no file matches" in fault("***")


def test_a_folder_whose_files_are_named_by_split(tmp_path):
    rows = sft_rows(6)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (
        ("train-00000-of-00002", rows[:2]),
        ("train-00001-of-00002", rows[2:4]),
        ("validation", rows[4:]),
    ):
        write_as(part, folder, "parquet").rename(folder / f"{name}.parquet")
    assert has_splits(tmp_path)
    assert [dict(row.values) for row in open_source(tmp_path).rows()] == rows[:4]
    assert [dict(row.values) for row in open_source(tmp_path, split="validation").rows()] == rows[4:]
    assert "has no files of the split `test`" in fault(tmp_path, split="test")
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    (held_out / "test.jsonl").write_bytes(lines(rows))
    assert has_splits(held_out) and [dict(row.values) for row in open_source(held_out, split="test").rows()] == rows


@pytest.mark.parametrize("split", [None, "test"])
def test_a_folder_that_datasets_saved(tmp_path, split):
    rows = sft_rows(3)
    table = datasets.Dataset.from_list(rows)
    (table if split is None else datasets.DatasetDict({split: table})).save_to_disk(tmp_path / "saved")
    assert [dict(row.values) for row in open_source(tmp_path / "saved", split=split or "train").rows()] == rows
    for file in (tmp_path / "saved").rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])
    assert "cannot be read" in fault(tmp_path / "saved", split=split or "train")


def test_names_in_a_header_lose_the_space_around_them(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt, response \na,b\n")
    assert [dict(row.values) for row in open_source(path).rows()] == [{"prompt": "a", "response": "b"}]


def test_a_column_without_a_name_is_an_index_and_two_are_a_fault(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",prompt,response\n0,a,b\n1,c,d\n")
    assert [dict(row.values) for row in open_source(path).rows()] == [
        {"prompt": "a", "response": "b"},
        {"prompt": "c", "response": "d"},
    ]
    path.write_text(",,prompt\n0,0,a\n")
    with pytest.raises(DataError, match=r"rows.csv:1: 2 columns have no name; fix: name them, or .*`index=False`"):
        list(open_source(path).rows())


def test_line_ends_of_cr_alone_are_a_fault(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,response\ra,b\r")
    with pytest.raises(
        DataError, match=r"rows.csv:1: a carriage return without a line feed, outside quotes; fix: .*LF or CRLF"
    ):
        list(open_source(path).rows())


@pytest.mark.parametrize("name", ["messages", "conversations", "prompt"])
def test_turns_as_python_writes_them_are_a_fault(tmp_path, name):
    path = tmp_path / "rows.csv"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it's"}]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[name], [str(turns)]])
    with pytest.raises(DataError, match=f"rows.csv:2: `{name}` was written by Python's str.*fix: write it as JSON"):
        for row in open_source(path).rows():
            RowChecker("sft").check(row)
