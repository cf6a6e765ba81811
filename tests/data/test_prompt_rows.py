"""Prompts as people give them: texts, chats, rows, and files of rows of any record type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.data.prompt_rows import read_prompts
from rlhf_core.infra.errors import ConfigError, DataError

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Yo"}
MORE = {"role": "user", "content": "And?"}


def prompts(given: Any, **options: Any) -> list[Any]:
    return [row.prompt for row in read_prompts(given, **options)]


def test_one_prompt_or_several_of_any_form() -> None:
    assert prompts("Hi there") == ["Hi there"]
    assert prompts([ASK]) == prompts(ASK) == prompts([[ASK]]) == [[ASK]]
    assert prompts(["a", [ASK, SAY, MORE], {"prompt": "p", "answer": 3}]) == ["a", [ASK, SAY, MORE], "p"]
    # The system message, an instruction's input and earlier turns are part of the prompt.
    assert prompts({"instruction": "Add", "input": "2 3", "output": "5"}) == ["Add\n\n2 3"]
    assert prompts({"prompt": "p", "system": "s"}) == [
        [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    ]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p"),
        ({"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "No"}]}, [ASK]),
        ({"messages": [ASK, SAY]}, [ASK]),
        ({"messages": [ASK, SAY, MORE, SAY]}, [ASK, SAY, MORE]),
        ({"messages": [ASK, SAY, MORE]}, [ASK, SAY, MORE]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, [ASK]),
        ({"question": "q", "answer": "a"}, "q"),
        ({"prompt": "p", "response": "r", "label": True}, "p"),
    ],
)
def test_a_file_may_have_rows_of_any_record_type(jsonl: Callable[..., Path], row: dict[str, Any], prompt: Any) -> None:
    path = jsonl([row, row])
    found = list(read_prompts(path))
    assert [one.prompt for one in found] == [prompt] * 2
    assert [one.place for one in found] == [f"{path}:1", f"{path}:2"] and found[0].columns == row
    assert prompts([str(path), "b"], limit=1) == [prompt, "b"]  # the limit is that of a file
    assert prompts({"path": str(path.parent)}) == [prompt] * 2


def test_columns_of_other_names(jsonl: Callable[..., Path]) -> None:
    path = jsonl([{"ask": "p", "say": "r"}])
    assert prompts(path, columns={"prompt": "ask", "response": "say"}) == ["p"]
    with pytest.raises(DataError, match="no column `prompt`"):
        prompts(path)


def test_a_text_that_ends_like_a_file_is_a_text_where_it_has_blanks(tmp_path: Path) -> None:
    assert prompts("Write me a config.json") == ["Write me a config.json"]
    with pytest.raises(DataError, match="no such file"):
        prompts(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("given", "kind", "place", "problem"),
    [
        ("", DataError, "prompts", "the prompt is empty"),
        (["a", " \n"], DataError, "prompts[1]", "the prompt is empty"),
        ([[{"role": "user", "content": ""}]], DataError, "prompts[0]", "the prompt is empty"),
        ([], ConfigError, "prompts", "no prompts are given"),
        (["a", 3], ConfigError, "prompts[1]", "isn't a prompt"),
        ({"text": "a"}, DataError, "prompts", "no column `prompt`"),
        ([[ASK, SAY]], DataError, "prompts[0]", "ends on an assistant turn"),
        ([[{"role": "user"}]], DataError, "prompts[0]", "must have `role` and `content`"),
    ],
)
def test_what_is_no_prompt_is_named(given: Any, kind: type, place: str, problem: str) -> None:
    with pytest.raises(kind, match=problem) as caught:
        prompts(given)
    assert caught.value.place == place


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    file = tmp_path / "asked.txt"
    file.write_bytes("\ufeffWhat is 2+2?\r\n\n  \nWhat is it called? Über\n".encode())
    rows = list(read_prompts(str(file)))
    assert [row.prompt for row in rows] == ["What is 2+2?", "What is it called? Über"]
    assert [row.place for row in rows] == [f"{file}:1", f"{file}:4"]
