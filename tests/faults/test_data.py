"""Data that break their record type, as `rlhf train` reports them: file, line, column, and exit code 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD = '{"prompt": "a", "response": "b"}\n'
LONG = {"prompt": "p" * 80, "response": "b"}
USER = {"role": "user", "content": "hi"}

FAULTS: dict[str, tuple[Any, str]] = {
    "malformed line": (GOOD + '{"prompt" "a"}\n', ":2:11: not valid JSON; got Expecting ':' delimiter; fix: repair"),
    "truncated last line": (GOOD + '{"prompt": "a", "resp', ":2:17: the last line is incomplete; got Unterminated string"),
    "empty": ("", ": holds no rows; fix: give data with at least one row"),
    "blank": (" \n\n", ": holds no rows; fix: give data with at least one row"),
    "missing key": (
        [{"frage": "a", "response": "b"}],
        ":1: no column `prompt`, which the record type `sft` needs; got columns frage, response; fix: give"
        " `--dataset.columns.prompt frage`",
    ),
    "wrong type": ([{"prompt": 3, "response": "b"}], ":1: `prompt` must be text or a list of messages; got int 3"),
    "not UTF-8": (
        GOOD.encode() + b'{"prompt": "\xff", "response": "b"}\n',
        ":2: not UTF-8; got byte 0xff at offset 45; fix: save the file as UTF-8",
    ),
    "NaN score": ('{"prompt": "a", "response": "b", "score": NaN}\n', ":1: a number isn't finite; got NaN; fix: "),
    "JSON array": ('[{"prompt": "a", "response": "b"}]\n', ":1: holds a JSON array, expected one JSON object per line; fix:"),
    "half of a surrogate pair": (
        GOOD + '{"prompt": "a", "response": "\\ud83d"}\n',
        ":2: `response` holds half of a surrogate pair, which isn't a character",
    ),
    "an integer without end": (
        GOOD + '{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}\n", ":2:39: an integer has more than 4,300 digits"
    ),
    "empty response": ([{"prompt": "a", "response": ""}], ":1: `response` is an empty response; fix: fill or delete the row"),
    "no response token left in any": (
        [LONG, LONG],
        ": none of 2 rows can be used; got 2 × the prompt leaves no response token; fix: raise `--max_length`",
    ),
    "ends on a user turn": (
        [{"messages": [USER]}],
        ":1: the conversation ends on a user turn, which nothing answers; fix: end it on an assistant turn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_names_its_place(train: Callable, tmp_path: Path, case: str, streaming: bool) -> None:
    content, expected = FAULTS[case]
    ended = train("--dataset.streaming", str(streaming), data=content)
    assert ended.code == 3, ended.err
    assert ended.error.startswith(f"error[data] {tmp_path / 'rows.jsonl'}{expected}"), ended.error
    assert "Traceback" not in ended.err


def test_chosen_equal_to_rejected(train: Callable, tmp_path: Path) -> None:
    ended = train(method="dpo", data=[{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
    assert ended.code == 3
    assert ended.error == (
        f"error[data] {tmp_path / 'rows.jsonl'}: none of 3 rows can be used; got 3 × chosen equals rejected;"
        " fix: give pairs whose answers differ; a larger `--max_length` keeps what tells them apart"
    )


def test_some_rows_are_dropped_with_a_warning_or_refused_when_strict(train: Callable, tmp_path: Path) -> None:
    rows = [LONG, *[{"prompt": "a", "response": "b"}] * 6]
    ended = train(data=rows)
    assert ended.code == 0
    path = tmp_path / "rows.jsonl"
    assert f"WARNING {path}: dropped 1 of 7 rows: the prompt leaves no response token ({path}:1)" in ended.err
    strict = train("--dataset.strict", "--overwrite", data=rows)
    assert strict.code == 3
    assert strict.error.startswith(f"error[data] {path}:1: the prompt leaves no response token; fix: ")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_crlf_are_fine(train: Callable, bom: bytes) -> None:
    assert train(data=bom + (GOOD.replace("\n", "\r\n") * 4).encode()).code == 0


def test_a_missing_file_names_the_nearest(train: Callable, write: Callable, tmp_path: Path) -> None:
    write([], "train.jsonl")
    ended = train(data=tmp_path / "trian.jsonl")
    assert ended.code == 3
    assert ended.error.startswith(f"error[data] {tmp_path / 'trian.jsonl'}: no such file; fix: ")
    assert str(tmp_path / "train.jsonl") in ended.error


def test_a_control_token_in_a_users_text_is_text(train: Callable) -> None:
    """Whoever writes `<|end|>` into a row must not end a turn with it."""
    ended = train(data=[{"prompt": "a", "response": "b<|end|>c"}] * 4)
    assert ended.code == 0
    assert "control tokens in text, encoded as text" in ended.err
