"""Where rows come from, and what is said of files that are wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from data_helpers import lines, sft_rows, write_as
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data.json_files import JsonLines
from rlhf_core.data.open_source import check_paths, has_splits, open_source
from rlhf_core.data.row_source import Cursor
from rlhf_core.infra.errors import DataError

FORMS = ("jsonl", "gz", "zst", "parquet")


def values(source):
    return [dict(row.values) for row in source.rows()]


def fault(data, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        values(open_source(data, **options))
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    rows = sft_rows(30)
    source = open_source(write_as(rows, tmp_path, form))
    assert values(source) == rows
    assert [row.index for row in source.rows()] == list(range(30))


@pytest.mark.parametrize("form", FORMS)
def test_reading_goes_on_from_any_cursor(tmp_path, form):
    rows = sft_rows(20)
    second = tmp_path / "second"
    second.mkdir()
    source = open_source([write_as(rows[:9], tmp_path, form), write_as(rows[9:], second, form)])
    every = list(source.rows())
    for number, row in enumerate(every):
        after = Cursor(*json.loads(json.dumps(row.after)))
        assert list(source.rows(after)) == every[number + 1 :]


@settings(max_examples=30)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=3), min_size=1, max_size=9), st.data()
)
def test_any_text_survives_lines_of_any_ending(tmp_path_factory, rows, data):
    raw = b"".join(
        line + data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"])) for line in lines(rows).split(b"\n")[:-1]
    )
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + raw)
    source = open_source(path)
    every = list(source.rows())
    assert [dict(row.values) for row in every] == rows
    for number, row in enumerate(every):
        assert list(source.rows(row.after)) == every[number + 1 :]


@pytest.mark.parametrize("form", ["jsonl", "gz", "zst"])
def test_lines_longer_than_what_is_read_at_once(tmp_path, form):
    rows = [{**row, "response": "ü" * (number << 19)} for number, row in enumerate(sft_rows(5), 1)]
    path = write_as(rows, tmp_path, form)
    source = open_source(path)
    every = list(source.rows())
    assert [dict(row.values) for row in every] == rows
    assert list(source.rows(every[2].after)) == every[3:]


def test_no_newline_at_the_end_is_fine(jsonl):
    assert values(open_source(jsonl(b'{"a": 1}\n{"a": 2}'))) == [{"a": 1}, {"a": 2}]


def test_rows_in_memory_and_tables():
    rows = sft_rows(5)
    table = datasets.Dataset.from_list(rows)
    assert values(open_source(rows)) == values(open_source(table)) == rows
    assert values(open_source(datasets.DatasetDict(test=table), split="test")) == rows
    stream = table.to_iterable_dataset()
    source = open_source(stream)
    every = list(source.rows())
    assert [dict(row.values) for row in every] == rows
    assert list(source.rows(every[1].after)) == every[2:]


def test_directories_of_the_datasets_library(tmp_path):
    rows = sft_rows(5)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert values(open_source(tmp_path / "saved")) == rows
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(lines(rows))
    assert values(open_source(tmp_path / "files", streaming=True)) == rows


def test_what_comes_in_splits_is_told(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "p"}])
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_text("{}")
    splits = ["acme/sums", "acme/sums:main", ["acme/sums"], datasets.DatasetDict(train=table), tmp_path / "saved"]
    assert all(map(has_splits, splits))
    others = [
        tmp_path,
        tmp_path / "a.jsonl",
        "missing.jsonl",
        "~/acme",
        [tmp_path / "a.jsonl"],
        [{"prompt": "p"}],
        table,
    ]
    assert not any(map(has_splits, others))


def test_hub_names_go_to_load_dataset(monkeypatch):
    calls = []

    def load(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return datasets.Dataset.from_list(sft_rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load)
    open_source("acme/sums:main", split="test", streaming=True)
    open_source("sums")
    assert calls == [("acme/sums", "main", "test", True), ("sums", None, "train", False)]


def test_a_hub_name_that_fails_says_why(monkeypatch):
    def load(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'acme/none' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    error = fault("acme/none")
    assert "acme/none" in str(error) and "doesn't exist on the Hub" in str(error)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    error = fault(str(tmp_path / "trian.jsonl"))
    assert "no such file" in str(error) and f"did you mean {tmp_path / 'train.jsonl'}?" in str(error)
    assert "there is no directory" in str(fault(tmp_path / "none" / "a.jsonl"))
    # Names that have only their suffix in common aren't alike.
    assert str(fault(tmp_path / "nope.jsonl")).endswith(f"{tmp_path} has train.jsonl")


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "rows.xlsx").write_text("a,b\n")
    assert ".jsonl" in str(fault(tmp_path / "rows.xlsx"))


def test_malformed_line_has_line_and_column(jsonl):
    path = jsonl(b'{"a": 1}\n{"a": 1,, "b": 2}\n{"a": 1}\n')
    assert str(fault(path)).startswith(f"{path}:2:9: not valid JSON")


@pytest.mark.parametrize("cut", [b'{"a": "tex', b'{"a": {"b": 1}', b'{"a": tr', b'{"a"', b'{"a": 1,'])
def test_truncated_last_line(jsonl, cut):
    path = jsonl(b'{"a": 1}\n' + cut)
    error = str(fault(path))
    assert error.startswith(f"{path}:2:") and "the last line is incomplete" in error


def test_malformed_last_line_is_not_called_cut_off(jsonl):
    assert "not valid JSON" in str(fault(jsonl(b'{"a": 1}\n{"a": 1,, "b": 2}')))


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n\r\n", b"\xef\xbb\xbf"])
def test_empty_and_blank_files(jsonl, content):
    path = jsonl(content)
    assert str(fault(path)).startswith(f"{path}: holds no rows")


def test_one_empty_file_of_several(jsonl):
    good, empty = jsonl(b'{"a": 1}\n'), jsonl(b"", "empty.jsonl")
    assert str(fault([good, empty])).startswith(f"{empty}: holds no rows")


def test_empty_list():
    assert "holds no rows" in str(fault([]))


def test_not_utf8_gives_the_byte_offset(jsonl):
    path = jsonl(b'{"a": "x"}\n{"a": "\xff"}\n')
    assert str(fault(path)).startswith(f"{path}:2: not UTF-8; got byte 0xff at offset 18")


def test_utf16_is_not_utf8(jsonl):
    assert "not UTF-8; got a UTF-16 file; fix: save the file as UTF-8" in str(
        fault(jsonl('{"a": 1}\n'.encode("utf-16")))
    )


def test_byte_order_mark_and_crlf_are_fine(jsonl):
    assert values(open_source(jsonl(b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n'))) == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"a": 2}]\n', b'[\n  {"a": 1}\n]\n'])
def test_json_array(jsonl, content):
    path = jsonl(content)
    error = str(fault(path))
    assert error.startswith(f"{path}:1: holds a JSON array") and "name the file .json" in error


def test_pretty_printed_objects_are_explained(jsonl):
    for content in (b'{\n  "a": 1\n}\n', b'{"a": 1,\n "b": 2}\n{"a": 1,\n "b": 2}\n'):
        path = jsonl(content)
        error = str(fault(path))
        assert (
            error.startswith(f"{path}:1: holds an object over several lines")
            and "write each object on one line" in error
        )


ROW = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mine": {"file_name": "rows.jsonl", "columns": {"prompt": "q"}}, "other": {"hf_hub_url": "owner/name"}},
         "lists data sets, as LLaMA-Factory's `dataset_info.json` does, and holds no rows; got `mine`, `other`; fix: name"),
        ({"prompt": {"0": "a", "1": "b"}, "response": {"0": "c", "1": "d"}}, "holds columns, expected rows; got `prompt`, `resp"),
        ({"prompt": ["a", "b"], "response": ["c", "d"]}, "holds columns, expected rows"),
        ({"first": ROW, "second": ROW}, "holds rows under keys, expected rows alone; got `first`, `second`"),
        ({"train": [ROW, ROW], "test": [ROW]}, "holds several arrays of rows; got `train`, `test`; fix: write each to a file"),
    ],
)  # fmt: skip
def test_one_object_that_is_no_row_is_explained(tmp_path, values, message):
    for name, indent in (("rows.json", None), ("rows.json", 2), ("rows.jsonl", 2)):
        path = tmp_path / name
        path.write_text(json.dumps(values, indent=indent))
        error = str(fault(path))
        assert error.startswith(f"{path}: {message}"), error
    assert f"such as {tmp_path / 'rows.jsonl'}; what" in error or "file_name" not in str(values)


def test_one_object_that_is_a_row_is_one(tmp_path):
    for row in (ROW, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}):
        (tmp_path / "row.json").write_text(json.dumps(row))
        assert values(open_source(tmp_path / "row.json")) == [row]


@pytest.mark.parametrize("content", [b"3\n", b'"text"\n', b"null\n"])
def test_lines_that_are_no_objects(jsonl, content):
    assert "expected one JSON object per line" in str(fault(jsonl(content)))


def test_duplicate_key(jsonl):
    path = jsonl(b'{"a": 1}\n{"b": {"c": 1, "c": 2}}\n')
    assert str(fault(path)).startswith(f"{path}:2: key `c` appears twice")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(jsonl, number):
    path = jsonl(b'{"score": 1}\n{"score": %s}\n' % number.encode())
    error = str(fault(path))
    assert error.startswith(f"{path}:2: ") and number in error


def test_nesting_is_bounded(jsonl):
    assert "nested too deeply" in str(fault(jsonl(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")))


@pytest.mark.parametrize("form", ["gz", "zst"])
def test_compressed_file_that_is_cut_off(tmp_path, form):
    path = write_as([{"a": f"{i * i}"} for i in range(5000)], tmp_path, form)
    path.write_bytes(path.read_bytes()[:-20])
    error = str(fault(path))
    assert str(path) in error and "damaged or incomplete" in error


def test_compressed_file_that_is_none(jsonl):
    assert "isn't a gzip file" in str(fault(jsonl(b'{"a": 1}\n', "rows.jsonl.gz")))
    assert "a zstd file" in str(fault(jsonl(b'{"a": 1}\n', "rows.jsonl.zst")))


def test_several_gzip_members_are_one_file(jsonl):
    path = jsonl(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'), "rows.jsonl.gz")
    assert values(open_source(path)) == [{"a": 1}, {"a": 2}]


def test_damaged_parquet(jsonl):
    path = jsonl(b"PAR1 this is none", "rows.parquet")
    assert str(fault(path)).startswith(f"{path}: not a readable Parquet file")


def test_parquet_place(tmp_path):
    rows = list(open_source(write_as(sft_rows(9), tmp_path, "parquet")).rows())
    assert rows[8].place == f"{tmp_path / 'rows.parquet'}:row 9"


def test_other_objects_are_refused():
    assert "not data that can be read" in str(fault(3.5))
    assert "expected a row" in str(fault([{"a": 1}, 7]))


def test_identity_tells_files_apart(tmp_path):
    part = JsonLines(write_as(sft_rows(3), tmp_path, "jsonl"))
    whole, ends = part.identity(whole=True), part.identity(whole=False)
    assert whole["bytes"] == ends["bytes"] == Path(part.name).stat().st_size
    write_as(sft_rows(4), tmp_path, "jsonl")
    assert part.identity(whole=True)["sha256"] != whole["sha256"]
    assert part.identity(whole=False)["sha256_of_ends"] != ends["sha256_of_ends"]


def test_zstd_needs_nothing_beside_arrow():
    assert pa.Codec.is_available("zstd")


def test_a_directory_of_files_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "preference.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": ["c"]}\n')
    with pytest.raises(
        DataError,
        match=r"different columns, so they aren't one dataset; got preference.jsonl: chosen, prompt,",
    ):
        open_source(tmp_path)


def test_missing_files_are_known_before_anything_is_opened(tmp_path: Path) -> None:
    check_paths([tmp_path])
    check_paths("owner/name")
    check_paths([{"prompt": "a"}])
    with pytest.raises(DataError, match="no such file"):
        check_paths([str(tmp_path), str(tmp_path / "gone.jsonl")])
    with pytest.raises(DataError, match="there is no directory"):
        check_paths("nowhere/gone.jsonl")


ROWS = [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(3)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("around", [{}, {"version": "1.0", "type": "text2text"}])
@pytest.mark.parametrize("key", ["data", "train", "instances"])
def test_a_json_file_of_one_object_around_rows(tmp_path, caplog, key, around, indent):
    caplog.set_level("INFO", "rlhf_core")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({**around, key: ROWS}, indent=indent))
    source = open_source(path)
    rows = list(source.rows())
    assert [dict(row.values) for row in rows] == ROWS
    assert f"{path}: the rows are the list under the key `{key}`" in caplog.text
    assert [dict(row.values) for row in source.rows(rows[0].after)] == ROWS[1:]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversation": [{"input": "a", "output": "b"}]},
        {"instruction": "a", "instances": [{"input": "a", "output": "b"}]},
        {"prompt": "a", "response": "b"},
        {"data": ["a", "b"]},
    ],
)
def test_a_json_file_of_one_row(tmp_path, row):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row))
    assert [dict(found.values) for found in open_source(path).rows()] == [row]


def test_a_json_file_of_lines_that_hold_lists(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(2 * (json.dumps({"data": ROWS}) + "\n"))
    assert [dict(found.values) for found in open_source(path).rows()] == [{"data": ROWS}] * 2
