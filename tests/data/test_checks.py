"""Rows that break their contract: the message and the exit code of each."""

from __future__ import annotations

import datasets
import pytest

from rlhf_core.config.training import TrainerConfig
from rlhf_core.data import open_dataset
from rlhf_core.infra.errors import ConfigError, DataError

ASK = [{"role": "user", "content": "hi"}]


def opened(tokenizer, data, record, **dataset):
    return open_dataset(data, record, tokenizer, config=TrainerConfig(max_length=64, dataset=dataset))


def fault(tokenizer, data, record, **dataset) -> str:
    with pytest.raises(DataError) as caught:
        opened(tokenizer, data, record, **dataset)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_key_shows_found_keys_and_a_mapping(tiny, jsonl, streaming):
    path = jsonl([{"frage": "a", "response": "b", "id": 3}])
    error = fault(tiny, path, "sft", streaming=streaming)
    assert error.startswith(f"{path}:1: no column `prompt`")
    assert "columns frage, response, id" in error and "{prompt: frage}" in error


def test_missing_key_prefers_the_nearest_name(tiny):
    error = fault(tiny, [{"promt": "a", "frage": "q", "response": "b"}], "sft")
    assert "did you mean `prompt` by `promt`? rename it, or set `dataset.columns` to `{prompt: promt}`" in error


def test_columns_map_the_data_s_names(tiny):
    data = opened(
        tiny, [{"question": "a", "answer": "b", "id": 3}], "sft", columns={"prompt": "question", "response": "answer"}
    )
    assert data[0].record == {"id": 3}
    swapped = [{"prompt": "a", "chosen": "x", "rejected": "y"}]
    row = opened(tiny, swapped, "preference", columns={"chosen": "rejected", "rejected": "chosen"})[0]
    assert tiny.decode(row.responses[0]) == "y<|end|>"


def test_a_mapped_column_that_is_missing(tiny):
    error = fault(tiny, [{"prompt": "a", "response": "b"}], "sft", columns={"response": "reply"})
    assert "no column `reply`" in error


def test_mapping_of_an_unknown_contract_column(tiny):
    with pytest.raises(ConfigError, match="did you mean `prompt`") as caught:
        opened(tiny, [{"prompt": "a", "response": "b"}], "sft", columns={"promt": "question"})
    assert caught.value.exit_code == 2


def test_a_mapping_that_is_misspelt_names_the_nearest_column(tiny):
    rows = [{"prompt": "a", "response": "b", "sys": "c"}]
    error = fault(tiny, rows, "sft", columns={"prompt": "promt"})
    assert "fix: leave `prompt` out of `dataset.columns`: the row has a column of that name" in error
    rows = [{"frage": "a", "response": "b", "sys": "c"}]
    assert "to `{prompt: frage}`" in fault(tiny, rows, "sft", columns={"prompt": "farge"})


def test_null_column(tiny):
    assert "column `response` is null" in fault(tiny, [{"prompt": "a", "response": None}], "sft")


@pytest.mark.parametrize(
    ("record", "row", "message"),
    [
        ("sft", {"prompt": 3, "response": "b"}, "`prompt` must be text or a list of messages; got int 3"),
        ("sft", {"prompt": "a", "response": ["b"]}, "`response` must be text or a list of messages; got list"),
        ("sft", {"messages": "hi"}, "`messages` must be a list of messages"),
        ("sft", {"messages": []}, "`messages` has no messages"),
        ("sft", {"messages": ASK, "response": "b"}, "has a conversation in `messages` and another response in `response`"),
        ("prompt", {"prompt": ["hi"]}, "`prompt[0]` must be a message"),
        ("prompt", {"prompt": [{"role": "user"}]}, "`prompt[0]` must have `role` and `content`"),
        ("prompt", {"prompt": [{"role": "user", "content": "a", "weight": 0.5}]}, "`prompt[0].weight` must be 0 or 1; got 0.5"),
        ("prompt", {"prompt": [{"role": "sage", "content": "a"}]}, "`prompt[0].role` is unknown; got 'sage'; fix: use system"),
        ("prompt", {"prompt": [{"role": "user", "content": [1]}]}, "`prompt[0].content[0]` must be a part of text; got 1"),
        ("prompt", {"prompt": [{"role": "user", "content": 1}]}, "`prompt[0].content` must be text; got int 1"),
        ("prompt", {"prompt": [*ASK, {"role": "assistant", "content": "a"}]}, "ends on an assistant turn"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "d"}, "`margin` must be a number"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "`margin` must be a number"),
        ("unpaired", {"prompt": "a", "response": "b", "label": "fine"}, "must be `desirable` or `undesirable`, true or false"),
        ("unpaired", {"prompt": "a", "response": "b", "label": 0.5}, "got 0.5; fix: say from which score on an answer is good"),
        ("unpaired", {"prompt": "a", "response": "b", "label": "desireable"}, "fix: did you mean `desirable`?"),
        ("unpaired", {"prompt": "a", "response": "b", "label": [1]}, "got [1]"),
        ("reasoning", {"prompt": "a", "answer": "b", "verifiable": "yes"}, "`verifiable` must be true or false"),
        ("reasoning", {"prompt": "a", "answer": ["b"], "verifiable": True}, "`answer` must be text or a number"),
    ],
)  # fmt: skip
def test_wrong_type(tiny, record, row, message):
    error = fault(tiny, [row], record)
    assert error.startswith("data[0]: ") and message in error


def test_margin_in_some_rows_only(tiny):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert "data[1]: some rows have a `margin` and others don't" in fault(
        tiny, [{**row, "margin": 1}, row], "preference"
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scores_must_be_finite(tiny, tmp_path, number):
    rows = [{"prompt": "a", "score": 1.0}, {"prompt": "a", "score": number}]
    assert "data[1]: `score` isn't finite" in fault(tiny, rows, "prompt")
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert f"{path}:row 2: `score` isn't finite" in fault(tiny, path, "prompt")
    nested = [{"prompt": "a", "scores": {"a": [1.0, number]}}]
    assert "`scores.a[1]` isn't finite" in fault(tiny, nested, "prompt")


@pytest.mark.parametrize("empty", ["", "  \n"])
@pytest.mark.parametrize(
    ("record", "row", "column"),
    [
        ("sft", {"prompt": "a", "response": "E"}, "response"),
        ("preference", {"prompt": "a", "chosen": "E", "rejected": "b"}, "chosen"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "E"}, "rejected"),
        ("unpaired", {"prompt": "a", "response": "E", "label": "desirable"}, "response"),
        ("sft", {"messages": [*ASK, {"role": "assistant", "content": "E"}]}, "messages[1]"),
    ],
)
def test_empty_response(tiny, record, row, column, empty):
    def fill(value):
        if isinstance(value, list):
            return [{**turn, "content": turn["content"].replace("E", empty)} for turn in value]
        return empty if value == "E" else value

    error = fault(tiny, [{name: fill(value) for name, value in row.items()}], record)
    assert error.startswith(f"data[0]: `{column}` is an empty response")


def test_conversation_that_ends_on_a_user_turn(tiny):
    turns = [*ASK, {"role": "assistant", "content": "yes"}, *ASK]
    assert "the conversation ends on a user turn" in fault(tiny, [{"messages": ASK}], "sft")
    assert "the conversation ends on turns that nothing answers" in fault(
        tiny, [{"messages": turns}], "sft", strict=True
    )
    assert "begins with an assistant turn" in fault(tiny, [{"messages": turns[1:2]}], "sft")


@pytest.mark.parametrize(("label", "missing"), [("desirable", "undesirable"), ("undesirable", "desirable")])
def test_one_label_only(tiny, label, missing):
    rows = [{"prompt": "a", "response": "b", "label": label}] * 3
    error = fault(tiny, rows, "unpaired")
    assert f"no row has the label `{missing}`" in error and f"3 rows, all `{label}`" in error
    assert f"fix: add rows with the label `{missing}`" in error


def test_columns_that_are_no_json_are_left_out_and_told(tiny):
    data = opened(tiny, [{"prompt": "a", "when": object(), "n": 1}], "prompt")
    assert data[0].record == {"n": 1} and data[0].prompt == "a"
    assert "column `when` is not a JSON value" in data.report.warnings()[0]


def test_unknown_record(tiny):
    with pytest.raises(ConfigError, match="did you mean `preference`"):
        opened(tiny, [{}], "preferences")


# Rows that can't be used but do not break the contract: counted and warned of, or refused with `strict`, or all of them.

LONG = {"prompt": "p" * 80, "response": "b"}
SHORT = {"prompt": "a", "response": "b"}
SAME = {"prompt": "a", "chosen": "b", "rejected": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("record", "bad", "good", "reason"),
    [
        ("sft", LONG, SHORT, "the prompt leaves no response token"),
        ("preference", SAME, PAIR, "chosen equals rejected"),
        ("prompt", {"prompt": "p" * 64}, {"prompt": "p"}, "the prompt leaves no response token"),
    ],
)
def test_unusable_rows(tiny, jsonl, caplog, record, bad, good, reason):
    path = jsonl([good, bad, good])
    data = opened(tiny, path, record)
    assert len(data) == 2 and [row.index for row in (data[0], data[1])] == [0, 2]
    assert data.report.as_dict()["dropped"] == {reason: {"rows": 1, "examples": [f"{path}:2"]}}
    assert f"dropped 1 of 3 rows: {reason} ({path}:2" in caplog.text
    assert fault(tiny, path, record, strict=True).startswith(f"{path}:2: {reason}")
    error = fault(tiny, jsonl([bad, bad], "all.jsonl"), record)
    assert "none of 2 rows can be used" in error and f"2 × {reason}" in error


def test_answers_that_are_equal_once_cut(tiny):
    row = {"prompt": "a", "chosen": "b" * 90 + "x", "rejected": "b" * 90 + "y"}
    assert "chosen equals rejected" in fault(tiny, [row], "preference")


def test_strict_refuses_what_would_be_cut(tiny):
    row = {"prompt": "a", "response": "b" * 90}
    assert opened(tiny, [row], "sft").report.truncated == 1
    assert "would be truncated" in fault(tiny, [row], "sft", strict=True)


def test_a_gap_behind_whole_rows_is_a_gap(tiny):
    whole = {"prompt": "a", "chosen": "b", "rejected": "c"}
    error = fault(tiny, [whole, {"prompt": "a", "chosen": "b"}], "preference")
    assert error.endswith("fix: the rows before have it: fill or delete this one")


def test_rows_of_another_contract_are_recognised(tiny):
    row = {"prompt": "a", "response": "b"}
    for given, name in (
        (row, "sft"),
        ({**row, "label": "desirable"}, "unpaired"),
        ({**row, "label": True}, "unpaired"),
    ):
        error = fault(tiny, [given], "preference")
        assert (
            f"fix: these look like `{name}` rows, for another method; or give each row a `chosen` and a `rejected`"
            in error
        )
