"""Surveys of data: every mistake at once, lengths, duplicates, labels, and rows as the model sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.config.training import DatasetConfig
from rlhf_core.data.data_survey import DataSurvey, Lengths, survey_data
from rlhf_core.infra.errors import DataError
from rlhf_core.testing.tiny import tiny_tokenizer

TWELVE = [
    '{"prompt": "one", "response": ""}',
    '{"prompt": "no answer"}',
    '{"prompt": "broken", "response": "x"',
    "[1, 2]",
    '{"prompt": 5, "response": "x"}',
    '{"prompt": "a", "response": null}',
    '{"prompt": "a", "response": ["x"]}',
    '{"prompt": "a", "prompt": "b", "response": "x"}',
    '{"prompt": "a", "response": NaN}',
    '{"prompt": "a", "response": "\\ud800"}',
    '"text"',
    '{"response": "x"}',
]
"""Lines of a file, each with another mistake."""


def _rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_mistake_is_noted_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"prompt": "good", "response": "one"}', *TWELVE, '{"prompt": "a", "response": "b"}']))
    for tokenizer in (None, tiny_tokenizer()):
        survey = survey_data(str(path), "sft", tokenizer=tokenizer)
        places = [str(error.place).removeprefix(f"{path}:").partition(":")[0] for error in survey.mistakes.kept]
        assert places == [str(line) for line in range(2, 14)]
        assert (survey.rows, survey.report.kept) == (14, 2)


def test_a_file_of_another_kind_is_one_mistake(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("prompt,response\na,b\nc,d\n", "[\n" + "{},\n" * 9, "{\n" + '"a": 1\n' * 9):
        path.write_text(text)
        assert len(survey_data(str(path), "sft").mistakes) == 1


def test_a_mistake_in_one_file_hides_none_in_another(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.csv", "c.json")]
    files[0].write_text("prompt,response\na,b\n")
    files[1].write_text("prompt,response\na,b\nc\nd,e,f\n")
    files[2].write_text('[{"prompt": "a", "response": "b"}, 5]')
    survey = survey_data([str(file) for file in files], "sft")
    assert [Path(str(error.place)).name for error in survey.mistakes.kept] == [
        "a.jsonl:1:1",
        "b.csv:3",
        "b.csv:4",
        "c.json:1",
    ]
    assert survey.report.kept == 2


def test_of_many_mistakes_each_kind_is_shown(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a"}] * 50 + [{"prompt": "a", "response": ""}] * 3
    mistakes = survey_data(_rows(tmp_path / "rows.jsonl", rows), "sft").mistakes
    shown, more = mistakes.shown(4)
    assert len(mistakes) == 53 and len(shown) == 4
    assert sorted(more.values()) == [1, 48]
    assert mistakes.shown(60) == (mistakes.kept, {})


def test_a_mistake_of_every_row_is_told_once(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "response": "b"}] * 1200
    path, good = (
        _rows(tmp_path / "rows.jsonl", rows),
        _rows(tmp_path / "good.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]),
    )
    for tokenizer in (None, tiny_tokenizer()):
        survey = survey_data([path, good], "preference", tokenizer=tokenizer)
        (error,) = survey.mistakes.kept
        assert str(error).startswith(
            f"{path}:1: no column `chosen`, which the record type `preference` needs (the same in all 1,200"
        )
        assert (len(survey.mistakes), survey.rows, survey.report.kept) == (1, 1201, 1)
    assert len(survey_data(_rows(tmp_path / "few.jsonl", rows[:3]), "preference").mistakes) == 3


def test_of_many_mistakes_that_are_alike_a_few_are_shown(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}] * 50
    survey = survey_data(_rows(tmp_path / "rows.jsonl", rows))
    assert survey.record == "sft"  # though as many rows have no response
    shown, more = survey.mistakes.shown(20)
    assert [str(error.place).rpartition(":")[2] for error in shown] == ["2", "4", "6"] and [*more.values()] == [47]
    assert len(survey.mistakes.shown(50)[0]) == 50
    numbers = survey_data(_rows(tmp_path / "numbers.jsonl", [{"prompt": "a", "response": n} for n in range(9)]), "sft")
    (error,) = numbers.mistakes.kept
    assert error.got == "int 0" and error.fix == "write it as text, in quotes"


def test_equal_answers_are_seen_without_a_model(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 5
    survey = survey_data(_rows(tmp_path / "rows.jsonl", rows))
    assert survey.report.kept == 0 and "5 × chosen equals rejected" in str(survey.mistakes.kept[0])


def test_what_earlier_rows_have_is_said_of_one_file_alone(tmp_path: Path) -> None:
    good = _rows(tmp_path / "good.jsonl", [{"prompt": "a", "response": "b"}])
    pairs = _rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (error,) = survey_data([good, pairs], "sft").mistakes.kept
    assert str(error.fix).startswith("these look like `preference` rows")
    (error,) = survey_data(
        _rows(tmp_path / "both.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a"}]), "sft"
    ).mistakes.kept
    assert error.fix == "the rows before have it: fill or delete this one"


def test_a_column_is_missed_by_the_name_that_the_rows_before_have(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "a", "answer": "b"},
        {"answer": "b"},
        {"question": None, "answer": "b"},
    ]
    missing, null = survey_data(_rows(tmp_path / "pairs.jsonl", rows), "sft").mistakes.kept
    assert "no column `question`" in str(missing) and "column `question` is null" in str(null)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    threads = _rows(tmp_path / "threads.jsonl", [{"thread": turns}, {"thread": None}, {"other": 1}])
    null, missing = survey_data(threads, "sft").mistakes.kept
    assert "column `thread` is null" in str(null) and "no column `thread`" in str(missing)


@pytest.mark.parametrize(
    ("name", "text", "fix"),
    [
        (
            "a.csv",
            "What is 2+2?,4\nWhat is 3+3?,6\n",
            "the first line of such a file names the columns, as `prompt,response`",
        ),
        (
            "a.jsonl",
            '{"data": {"prompt": "a", "response": "b"}}\n',
            "`data` holds `prompt`, `response`: write what is in it",
        ),
        (
            "a.jsonl",
            "{'prompt': 'a', 'response': 'b'}\n",
            "the line was written by Python's str(): write rows by `json.dumps`",
        ),
        ("a.jsonl", '{"prompt": "a"},\n{"prompt": "b"}\n', "remove the comma behind each object"),
    ],
)
def test_what_is_wrong_with_every_row_is_told(tmp_path: Path, name: str, text: str, fix: str) -> None:
    (tmp_path / name).write_text(text)
    survey = survey_data(str(tmp_path / name), "sft")
    assert str(survey.mistakes.kept[0].fix).startswith(fix)
    if "Python" not in fix and "comma" not in fix:
        with pytest.raises(DataError) as caught:
            survey_data(str(tmp_path / name))
        assert str(caught.value.fix).startswith(fix)


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"question": "a", "answer": "b"}, "sft"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "sft"),
        ({"text": "a whole text"}, "sft"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"prompt": "a", "answer": "4", "verifiable": True}, "reasoning"),
        ({"prompt": "a", "tests": "4"}, "prompt"),
    ],
)
def test_the_record_type_is_recognised(tmp_path: Path, row: dict[str, object], record: str) -> None:
    survey = survey_data(_rows(tmp_path / "rows.jsonl", [row]))
    assert survey.record == record and survey.recognised


def test_columns_that_fit_no_record_type_are_refused(tmp_path: Path) -> None:
    path = _rows(tmp_path / "rows.jsonl", [{"left": "a", "right": "b"}])
    with pytest.raises(DataError, match="fit no record type; got columns left, right"):
        survey_data(path)
    assert survey_data(path, options=DatasetConfig(columns={"prompt": "left", "response": "right"})).record == "sft"


def test_where_no_row_can_be_read_their_mistakes_are_told(tmp_path: Path) -> None:
    path, other = tmp_path / "latin.jsonl", tmp_path / "empty.jsonl"
    path.write_bytes('{"prompt": "caf\xe9", "response": "b"}\n'.encode("latin-1"))
    other.write_text("")
    with pytest.raises(DataError) as caught:
        survey_data(str(path))
    assert str(caught.value).startswith(f"{path}:1: not UTF-8; got byte 0xe9 at offset 15") and not caught.value.also
    with pytest.raises(DataError) as caught:
        survey_data([str(path), str(other)])
    assert caught.value.place == f"{path}:1" and [error.place for error in caught.value.also] == [str(other)]
    path.write_text('{"prompt": "a", "response": NaN}\n' * 25)
    with pytest.raises(DataError, match="a number isn't finite") as caught:
        survey_data(str(path))
    assert len(caught.value.also) == 20 and str(caught.value.also[-1]) == f"{path}: 5 more rows can't be read"


def test_lengths_are_those_before_truncation(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "p" * 9, "response": "r" * number} for number in range(1, 101)]
    survey = survey_data(_rows(tmp_path / "rows.jsonl", rows), "sft", tokenizer=tiny_tokenizer(), max_length=31)
    # A beginning token, the prompt's 9 bytes, the response's, and an end token.
    assert list(survey.lengths.values) == [11 + number for number in range(1, 101)]
    assert survey.cut == 0.8
    assert survey.report.truncated == 80
    assert (survey.lengths.at_most(0.01), survey.lengths.at_most(0.0)) == (110, 111)
    assert survey.lengths.share_above(110) == 0.01


def test_a_histogram_counts_every_row_once() -> None:
    lengths = Lengths("tokens")
    lengths.values.extend([3, 3, 4, 50, 101])
    found = lengths.histogram(10)
    assert sum(rows for *_, rows in found) == 5
    assert (found[0], found[-1]) == ((3, 12, 3), (93, 101, 1))
    lengths.values.extend([10] * 400)
    assert lengths.histogram(4) == [(3, 5, 3), (6, 8, 0), (9, 10, 400), (11, 101, 2)]
    lengths.values = lengths.values[:2]
    assert lengths.histogram() == [(3, 3, 2)]


def test_duplicates_and_labels_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "a", "response": "b", "label": True, "id": 1},
        {"prompt": "a", "response": "b", "label": True, "id": 2},
        {"prompt": "a", "response": "c", "label": False, "id": 3},
        {"prompt": "d", "response": "b", "label": True, "id": 4},
    ]
    path = _rows(tmp_path / "rows.jsonl", rows)
    survey = survey_data(path, "unpaired")
    assert survey.report.labels == {"desirable": 3, "undesirable": 1}
    assert (survey.duplicates, survey.duplicate_places) == (1, [(f"{path}:2", f"{path}:1")])
    assert survey.repeated_prompts == 1


def test_a_limit_ends_the_reading_and_the_rest_is_estimated(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"{number:4}", "response": "b"} for number in range(500)]
    path = _rows(tmp_path / "rows.jsonl", rows)
    survey = survey_data([{"path": path, "weight": 2}], "sft", limit=100)
    assert (survey.rows, survey.whole, survey.epoch_rows) == (100, False, 1000)
    survey = survey_data(path, "sft", limit=500)
    assert (survey.rows, survey.whole, survey.epoch_rows) == (500, True, 500)


def test_rows_are_shown_with_the_tokens_in_the_loss(tmp_path: Path) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    rows: list[dict[str, object]] = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 3
    survey = survey_data(_rows(tmp_path / "rows.jsonl", rows), tokenizer=tiny_tokenizer())
    assert len(survey.pictures) == 2
    parts = survey.pictures[0].parts
    assert parts["prompt"] == [("<|bos|><|user|>one<|end|><|assistant|>", False)]
    assert parts["response"] == [
        ("two<|end|>", True),
        ("<|user|>three<|end|><|assistant|>", False),
        ("four<|end|>", True),
    ]


def test_one_of_the_rows_shown_is_truncated(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "response": "b" * (5 + 30 * (number == 4))} for number in range(9)]
    path = _rows(tmp_path / "rows.jsonl", rows)
    survey = survey_data(path, tokenizer=tiny_tokenizer(), max_length=12)
    assert [picture.truncated for picture in survey.pictures] == [False, True]
    assert survey.pictures[1].place == f"{path}:5"


def test_pairs_are_shown_apart(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    survey: DataSurvey = survey_data(_rows(tmp_path / "rows.jsonl", rows), tokenizer=tiny_tokenizer())
    assert list(survey.pictures[0].parts) == ["prompt", "chosen", "rejected"]
    assert json.loads(json.dumps(survey.as_dict()))["record"] == "preference"
