"""What isn't a file of rows is refused with what it is and what may have been meant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest

from rlhf_core.data.data_survey import survey_data
from rlhf_core.data.open_source import open_source
from rlhf_core.data.row_checker import RowChecker
from rlhf_core.data.row_source import Cursor, Row
from rlhf_core.infra.errors import DataError

ROW = '{"prompt": "a", "response": "b"}\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows/train").mkdir(parents=True)
    Path("rows/train/sft.jsonl").write_text(ROW)


def refused(name: str) -> str:
    with pytest.raises(DataError) as caught:
        open_source(name)
    return str(caught.value)


def test_patterns() -> None:
    assert refused("rows/*") == (
        "rows/*: no file matches this pattern; got the folders rows/train; fix: write `rows/*/*.jsonl` for the files in them"
    )
    assert open_source("rows/*/*.jsonl").sources
    assert refused("rows/train/x*.json").startswith("rows/train/x*.json: no file matches this pattern")


def test_folders() -> None:
    Path("empty").mkdir()
    assert refused("empty") == "empty: is an empty folder; fix: name a file of rows, or a folder that has some"
    assert refused("rows") == "rows: holds no files of rows itself; fix: name a folder in it: rows/train"
    Path("model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        Path("model", name).write_text("{}")
    assert refused("model") == "model: is a model's directory, and holds no rows; fix: name a file of rows"


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.txt", b"prompt,response\na,b\n", "its content looks like csv: name it a.csv"),
        ("a.data", b"prompt\tresponse\na\tb\n", "its content looks like tsv: name it a.tsv"),
        ("a.txt", ROW.encode(), "its content looks like jsonl: name it a.jsonl"),
        ("a.dump", b"[\n" + ROW.encode() + b"]", "its content looks like json: name it a.json"),
        ("a.pq", b"PAR1\0\0", "its content looks like parquet: name it a.parquet"),
        ("a.xlsx", b"PK\x03\x04", "is a spreadsheet; fix: save it as CSV"),
        ("a.dat", b"just words\n", "unknown kind of file; fix: files that can be read end in .jsonl"),
        ("a.txt", b"just words\n", 'fix: write each text as a row, `{"text": "…"}` on a line of a file .jsonl'),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a.jsonl: is a pointer of Git LFS, not the file",
        ),
    ],
)
def test_files_of_another_ending(name: str, content: bytes, hint: str) -> None:
    Path(name).write_bytes(content)
    assert hint in refused(name)


def test_a_column_that_the_mapping_names_and_is_null() -> None:
    checker = RowChecker("sft", {"prompt": "question", "response": "answer"})
    with pytest.raises(DataError) as caught:
        checker.check(Row(0, "rows.jsonl:1", {"question": "a", "answer": None}, Cursor()))
    assert str(caught.value) == (
        "rows.jsonl:1: column `answer`, from which `dataset.columns` takes `response`, is null in this row; fix: fill it, or"
        " delete the row; the columns that it fills are `question`"
    )


def test_a_folder_beside_a_mistyped_one() -> None:
    assert refused("./rows/trian").endswith("did you mean rows/train?")
    shutil.copy("rows/train/sft.jsonl", "rows/train/dpo.jsonl")
    assert refused("rows/train/spf.jsonl").endswith("did you mean rows/train/sft.jsonl?")


def test_what_is_named_like_a_compressed_file_and_is_none() -> None:
    Path("a.jsonl.gz").write_text(ROW)
    with pytest.raises(DataError, match=r"isn't a gzip file, though its name says so; .* fix: name it a\.jsonl$"):
        list(open_source("a.jsonl.gz").rows())


def mistakes_of(text: str) -> tuple[list[str], int]:
    """Return the mistakes in a file of that text, a line each, and how many rows can be used."""
    Path("over.jsonl").write_text(text)
    survey = survey_data("over.jsonl", "sft")
    return [str(error) for error in survey.mistakes.kept], survey.report.kept


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            '{\n "prompt": "e",\n "response": "f"\n}',
            "over.jsonl:2: holds an object over several lines, expected one per line",
        ),
        (
            '{"prompt": "e",\n"response": "f"}',
            "over.jsonl:2: holds an object over several lines, expected one per line",
        ),
        ('{\n "prompt": "e"\n "response": "f"\n}', "over.jsonl:4:2: not valid JSON"),
        ('{\n "messages": [\n  {"role": 1},\n  {"role" 2}\n ]\n}', "over.jsonl:5:11: not valid JSON"),
        ('{"prompt": "e", "resp', "over.jsonl:2:17: not valid JSON; got Unterminated string"),
        ('{"prompt": "e", "response":', "over.jsonl:2:28: not valid JSON"),
    ],
)
def test_an_object_over_lines_is_one_mistake(wrong: str, said: str) -> None:
    (error,), kept = mistakes_of(f"{ROW}{wrong}\n{ROW}")
    assert error.startswith(said) and kept == 2
    assert ("the object over several lines that begins in line 2" in error) == (":4:" in said or ":5:" in said)


def test_an_object_over_lines_at_either_end_of_a_file() -> None:
    (error,), kept = mistakes_of(f'{ROW}{{\n "prompt": "e",\n "resp')
    assert error.startswith("over.jsonl:2: an object that begins in this line isn't complete") and kept == 1
    (error,), kept = mistakes_of(f'{{\n "prompt": "e"\n "response": "f"\n}}\n{ROW}')
    assert error.startswith("over.jsonl:3:2: not valid JSON") and kept == 1


@pytest.mark.parametrize(
    ("data", "fix"),
    [
        (({"prompt": "a", "response": "b"} for _ in range(2)), "give `list(…)` of it"),
        ({"prompt": ["a"], "response": ["b"]}, "give `datasets.Dataset.from_dict(…)` of it"),
        (pandas.DataFrame({"prompt": ["a"], "response": ["b"]}), "give `datasets.Dataset.from_pandas(…)` of it"),
        (3, "give a path, several paths, a hub name, a `datasets` object, or a list of rows"),
    ],
    ids=["generator", "columns", "data frame", "number"],
)
def test_an_object_that_holds_rows_in_another_form(data: Any, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(data)
    assert caught.value.fix == fix
