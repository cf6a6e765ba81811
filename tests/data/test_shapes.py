"""The shapes that people's rows have: each is read as what it means, and said once; what could mean two things is refused."""

from __future__ import annotations

import json
import logging

import datasets
import pytest
from data_helpers import in_words

from rlhf_core.config.training import TrainerConfig
from rlhf_core.data import open_dataset
from rlhf_core.data.data_stream import DataStream
from rlhf_core.data.open_source import open_source
from rlhf_core.data.row_checker import RowChecker
from rlhf_core.infra.errors import ConfigError, DataError

U, A, N = ({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("assistant", "no")))
S = {"role": "system", "content": "be"}
SAID = "<|user|>hi<|end|><|assistant|>"
CHAT = f"<|bos|>{SAID}«yo<|end|>»"
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


def opened(tokenizer, rows, record="sft", **dataset):
    return open_dataset(rows, record, tokenizer, config=TrainerConfig(max_length=256, dataset=dataset))


def words(tokenizer, row, record="sft", **dataset):
    data = opened(tokenizer, [row], record, **dataset)
    streamed = list(opened(tokenizer, [row], record, streaming=True, **dataset))
    assert streamed == [data[0]]
    return in_words(tokenizer, data[0])


def fault(tokenizer, rows, record="sft", **dataset) -> str:
    with pytest.raises(DataError) as caught:
        opened(tokenizer, rows if isinstance(rows, list) else [rows], record, **dataset)
    return str(caught.value)


def example(row, record="sft", **options):
    return RowChecker(record, options.pop("columns", None), **options).check(next(open_source([row]).rows()))


SFT = {
    "ShareGPT": ({"conversations": TURNS}, CHAT, "ShareGPT conversations: column `conversations`"),
    "ShareGPT under `messages`": ({"messages": TURNS}, CHAT, "ShareGPT conversations: column `messages`"),
    "ShareGPT under any name": ({"foo": TURNS, "id": 3}, CHAT, "ShareGPT conversations: column `foo`"),
    "a system turn of ShareGPT": (
        {"conversations": [{"from": "system", "value": "be"}, *TURNS]},
        CHAT.replace("<|user|>", "<|system|>be<|end|><|user|>"),
        "ShareGPT conversations: column `conversations`",
    ),
    "roles in capitals": ({"messages": [{**U, "role": "User"}, {**A, "role": "ASSISTANT"}]}, CHAT, None),
    "messages": ({"messages": [U, A]}, CHAT, None),
    "messages under another name": ({"conversations": [U, A]}, CHAT, "chat messages: column `conversations`"),
    "messages under any name": ({"foo": [U, A]}, CHAT, "chat messages: column `foo`"),
    "messages under a prompt's name": ({"prompt": [U, A]}, CHAT, "chat messages: column `prompt`"),
    "messages under a text's name": ({"text": [U, A]}, CHAT, "chat messages: column `text`"),
    "messages with their first question beside them": ({"prompt": "hi", "prompt_id": 3, "messages": [U, A]}, CHAT, None),
    "messages as JSON in a text": ({"messages": json.dumps([U, A])}, CHAT, None),
    "pairs of question and answer": (
        {"conversation": [{"input": "hi", "output": "yo"}]}, CHAT,
        "conversations of questions with their answers: column `conversation`",
    ),
    "prompt and completion": (
        {"prompt": "hi ", "completion": "yo"}, "<|bos|>hi «yo<|end|>»", "columns: `completion` as response",
    ),
    "prompt and completion as messages": (
        {"prompt": [U], "completion": [A]}, CHAT, "chat messages: `prompt`, `completion` as response",
    ),
    "prompt as messages, completion as text": (
        {"prompt": [U], "completion": "yo"}, CHAT, "chat messages: `prompt`, `completion` as response",
    ),
    "a completion of one message": ({"prompt": [U], "response": A}, CHAT, None),
    "question and answer": (
        {"question": "hi ", "answer": "yo"}, "<|bos|>hi «yo<|end|>»", "columns: `question` as prompt, `answer` as response",
    ),
    "problem and solution": ({"problem": "hi ", "solution": "yo"}, "<|bos|>hi «yo<|end|>»", None),
    "input and output": ({"input": "hi ", "output": "yo"}, "<|bos|>hi «yo<|end|>»", None),
    "alpaca": (
        {"instruction": "do", "input": "hi", "output": "yo", "text": "do this: hi\n\nyo"}, "<|bos|>do\n\nhi«yo<|end|>»",
        "instructions with their input: `instruction` as prompt, `input`, `output` as response",
    ),
    "alpaca without an input": ({"instruction": "do", "input": "", "output": "yo"}, "<|bos|>do«yo<|end|>»", None),
    "alpaca with system and history": (
        {"instruction": "do", "input": "x", "output": "yo", "system": "be", "history": [["hi", "no"]]},
        "<|bos|><|system|>be<|end|><|user|>hi<|end|><|assistant|>no<|end|><|user|>do\n\nx<|end|><|assistant|>«yo<|end|>»", None,
    ),
    "dolly": (
        {"instruction": "do", "context": "hi", "response": "yo", "category": "x"}, "<|bos|>do\n\nhi«yo<|end|>»",
        "instructions with their input: `instruction` as prompt, `context` as input, `response`",
    ),
    "orca": (
        {"id": 1, "system_prompt": "be", "question": "hi", "response": "yo"},
        CHAT.replace("<|user|>", "<|system|>be<|end|><|user|>"), None,
    ),
    "a system column that is empty": ({"system": "", "question": "hi", "response": "yo"}, CHAT, None),
    "a system column beside messages": (
        {"system": "be", "messages": [U, A]}, CHAT.replace("<|user|>", "<|system|>be<|end|><|user|>"), None,
    ),
    "a system column that repeats the system turn": (
        {"system": "be", "messages": [S, U, A]}, CHAT.replace("<|user|>", "<|system|>be<|end|><|user|>"), None,
    ),
    "text": ({"text": "some text"}, "<|bos|>«some text<|end|>»", "text without a prompt, all of it in the loss: column `text`"),
    "text with where it is from": ({"text": "some text", "url": "x", "id": "3"}, "<|bos|>«some text<|end|>»", None),
    "a dialogue in one text": (
        {"text": "\n\nHuman: hi\n\nAssistant: yo"}, CHAT, "dialogues of `Human:` and `Assistant:`: column `text`",
    ),
    "a dialogue under any name": (
        {"transcript": "\n\nHuman: hi\n\nAssistant: yo", "tags": ["a", "b"]}, CHAT,
        "dialogues of `Human:` and `Assistant:`: column `transcript`",
    ),
    "names in capitals": (
        {"Question": "hi ", "Answer": "yo"}, "<|bos|>hi «yo<|end|>»", "columns: `Question` as prompt, `Answer` as response",
    ),
    "own names in capitals": ({"Prompt": "hi ", "RESPONSE": "yo"}, "<|bos|>hi «yo<|end|>»", None),
    "messages in capitals": ({"Messages": [U, A], "System Prompt": ""}, CHAT, None),
    "texts in turn": (
        {"conversations": ["hi", "yo"], "source": ""}, CHAT,
        "texts of the user and the assistant in turn: column `conversations`",
    ),
    "a system column in parts": ({"system": [{"text": "be"}], "messages": [U, A]},
        CHAT.replace("<|user|>", "<|system|>be<|end|><|user|>"), None,
    ),
    "content in parts": (
        {"messages": [{**U, "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, A]}, CHAT, None,
    ),
    "a turn kept out of the loss": (
        {"messages": [U, {**N, "weight": 0}, U, {**A, "weight": 1}]},
        f"<|bos|>{SAID}no<|end|>{SAID}«yo<|end|>»", None,
    ),
    "turns kept out of the loss by other switches": (
        {"messages": [U, {**N, "train": False}, U, {**N, "loss": False}, U, {**A, "loss": True}]},
        f"<|bos|>{SAID}no<|end|>{SAID}no<|end|>{SAID}«yo<|end|>»", None,
    ),
    "a later turn kept out of the loss": (
        {"messages": [U, A, U, {**N, "weight": 0}, U, A]}, f"<|bos|>{SAID}«yo<|end|>»{SAID}no<|end|>{SAID}«yo<|end|>»", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SFT)
def test_rows_to_imitate(tiny, case):
    row, expected, said = SFT[case]
    assert words(tiny, row) == [expected]
    if said is not None or case in ("messages", "roles in capitals", "a completion of one message"):
        assert example(row).read_as == said


CHOSEN = [f"<|bos|>{SAID}«yo<|end|>»", f"<|bos|>{SAID}«no<|end|>»"]
SYSTEM = [text.replace("<|user|>", "<|system|>be<|end|><|user|>") for text in CHOSEN]
TEXT = ["<|bos|>hi«yo<|end|>»", "<|bos|>hi«no<|end|>»"]
LONG = [f"<|bos|>{SAID}yo<|end|>{SAID}«yo<|end|>»", f"<|bos|>{SAID}yo<|end|>{SAID}«no<|end|>»"]

PAIRS = {
    "texts": ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, TEXT, None),
    "answers as messages": ({"prompt": [U], "chosen": [A], "rejected": [N]}, CHOSEN, None),
    "answers as one message each": ({"prompt": [U], "chosen": A, "rejected": N}, CHOSEN, None),
    "a prompt of text, answers as messages": ({"prompt": "hi", "chosen": [A], "rejected": [N]}, CHOSEN, None),
    "the prompt inside": (
        {"chosen": [U, A], "rejected": [U, N]}, CHOSEN, "chat messages, with their prompts inside: `chosen`, `rejected`",
    ),
    "the prompt inside and beside": ({"prompt": [U], "chosen": [U, A], "rejected": [U, N]}, CHOSEN, None),
    "UltraFeedback": (
        {"prompt": "hi", "prompt_id": 3, "chosen": [U, A], "rejected": [U, N], "messages": [U, A], "score_chosen": 9.0,
         "score_rejected": 1.0},
        CHOSEN, None,
    ),
    "several turns inside": ({"chosen": [U, A, U, A], "rejected": [U, A, U, N]}, LONG, None),
    "several turns of which the last prompt is given": (
        {"prompt": "again", "chosen": [U, A, U, A], "rejected": [U, A, U, N]}, LONG, None,
    ),
    "a system turn inside": ({"chosen": [S, U, A], "rejected": [S, U, N]}, SYSTEM, None),
    "a system turn inside, a prompt beside": ({"prompt": "hi", "chosen": [S, A], "rejected": [S, N]}, SYSTEM, None),
    "a system column": ({"system": "be", "question": "hi", "chosen": "yo", "rejected": "no"}, SYSTEM, None),
    "answers that go on": (
        {"chosen": [U, A, U, A], "rejected": [U, N]},
        [f"<|bos|>{SAID}«yo<|end|>»{SAID}«yo<|end|>»", CHOSEN[1]], None,
    ),
    "equal up to the last answer": ({"chosen": [U, A, U, A], "rejected": [U, A, U, {**A, "content": "no"}]}, LONG, None),
    "ShareGPT": (
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "no"}}, CHOSEN, None,
    ),
    "dialogues": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no"}, CHOSEN,
        "dialogues of `Human:` and `Assistant:`, with their prompts inside: `chosen`, `rejected`",
    ),
    "dialogues of several turns": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: hi\n\nAssistant: yo",
         "rejected": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: hi\n\nAssistant: no"},
        LONG, None,
    ),
    "turns with numbers of their own": (
        {"chosen": [{**U, "id": 1}, {**A, "id": 2}], "rejected": [{**U, "id": 3}, {**N, "id": 4}]}, CHOSEN, None,
    ),
    "OpenAI's request with two outputs": (
        {"input": {"messages": [U], "tools": []}, "preferred_output": [A], "non_preferred_output": [N]}, CHOSEN, None,
    ),
    "other names": (
        {"instruction": "hi", "chosen_response": "yo", "rejected_response": "no"}, TEXT,
        "columns: `instruction` as prompt, `chosen_response` as chosen, `rejected_response` as rejected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(tiny, case):
    row, expected, said = PAIRS[case]
    assert words(tiny, row, "preference") == expected
    if said is not None:
        assert example(row, "preference").read_as == said


@pytest.mark.parametrize(
    ("good", "bad", "form"),
    [
        ("desirable", "undesirable", None),
        (True, False, "true or false"),
        (1, 0, "1 or 0"),
        (1.0, 0.0, "1 or 0"),
        ("True", "false", "in words"),
        ("good", "bad", "in words"),
        ("1", "0", "in words"),
        ("1.0", "0.0", "in words"),
        ("+1", "-1", "in words"),
        (1, -1, "1 or 0"),
        (1.0, -1.0, "1 or 0"),
        ("Y", "n", "in words"),
        ("t", "F", "in words"),
        ("accepted", "rejected", "in words"),
        ("thumbs_up", "Thumbs Down", "in words"),
        ("thumbs-up", "thumbs-down", "in words"),
        ("like", "dislike", "in words"),
    ],
)
def test_labels(tiny, good, bad, form):
    rows = [{"prompt": "a", "response": "b", "label": label} for label in (good, bad)]
    data = opened(tiny, rows, "unpaired")
    assert [row.per_response["desirable"] for row in data] == [[True], [False]]
    said = None if form is None else f"columns: `label` ({form})"
    assert example(rows[0], "unpaired").read_as == said


def test_unpaired_rows_of_other_shapes(tiny):
    for row in (
        {"prompt": [U], "completion": [A], "label": True},
        {"messages": [U, A], "label": 1},
        {"conversations": TURNS, "kto_tag": True},
    ):
        data = opened(tiny, [row, {**row, **dict.fromkeys({"label", "kto_tag"} & {*row}, False)}], "unpaired")
        assert in_words(tiny, data[0]) == [CHAT]
    longer = {"messages": [U, A, U, A], "label": True}
    assert [turn["content"] for turn in example(longer, "unpaired").prompt] == ["hi", "yo", "hi"]


def test_prompts(tiny):
    for row in ({"prompt": [U]}, {"messages": [U]}, {"conversations": TURNS[:1]}, {"prompt": [{**U, "name": None}]}):
        assert words(tiny, row, "prompt") == [f"<|bos|>{SAID}"]
        assert example(row, "prompt").asked == [U]
    row = opened(tiny, [{"question": "hi", "answer": 3, "level": "easy"}], "prompt")[0]
    assert row.prompt == "hi" and row.record == {"answer": 3, "level": "easy"}
    data = opened(tiny, [{"problem": "hi", "answer": "4", "verifiable": "true"}], "reasoning")
    assert data[0].record["answer"] == "4" and not data.report.notes


def test_tool_calls_and_tool_turns_keep_their_keys():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            U,
            {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
            {**A, "reasoning_content": "hm"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int", "enum": None}}}}],
    }
    read = example(row)
    assert read.prompt == [U]
    assert read.responses[0] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {**A, "reasoning_content": "hm"},
    ]
    assert read.tools == [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}]
    assert example({**row, "tools": json.dumps(read.tools)}).tools == read.tools
    assert example({**row, "tools": [json.dumps(read.tools[0])]}).tools == read.tools
    assert [example({**row, "tools": none}).tools for none in (None, [], "")] == [None] * 3


@pytest.mark.parametrize("role", ["tool", "ipython", "function", "observation", "environment"])
def test_tool_roles(role):
    assert example({"messages": [U, A, {"role": role, "content": "5"}, A]}).responses[0][1] == {
        "role": "tool",
        "content": "5",
    }


def test_calls_of_other_forms():
    function = {"name": "f", "arguments": {"x": 1}}
    calls = [{"type": "function", "function": function}]
    for turn in (
        {"from": "function_call", "value": json.dumps(function)},
        {"role": "assistant", "content": None, "function_call": {**function, "arguments": '{"x": 1}'}},
        {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)},
    ):
        read = example({"conversations": [U if "role" in turn else TURNS[0], turn]})
        assert read.responses[0] == [{"role": "assistant", "content": "", "tool_calls": calls}]
    bare = {"name": "f", "description": "d", "parameters": {}}
    assert example({"messages": [U, A], "functions": [bare]}).tools == [{"type": "function", "function": bare}]


def test_arrow_fills_in_what_other_rows_have(tiny):
    rows = [
        {"messages": [U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1"}}}]}]},
        {"messages": [{**U, "name": "n"}, A]},
        {"messages": [U, {**A, "tool_calls": [{"function": {"name": "g", "arguments": {"y": "2"}}}]}]},
    ]
    table = datasets.Dataset.from_list(rows)
    assert table[1]["messages"][1]["tool_calls"] is None
    for number, row in enumerate(rows):
        assert example(table[number]) == example(row)


@pytest.mark.parametrize(
    ("record", "row", "message"),
    [
        ("sft", {"problem": "a", "question": "b", "answer": "c"}, "`question` and `problem` could each be the `prompt`"),
        ("sft", {"problem": "a", "answer": "b", "solution": "c"}, "fix: say which by `dataset.columns`, such as `{response: "),
        ("sft", {"one": [U, A], "two": [U, A]}, "`one` and `two` could each be the `messages`"),
        ("sft", {"prompt": "a", "text": "b"}, "no column `response`"),
        ("sft", {"conversations": "hi"}, "no column `prompt`, which the record type `sft` needs; got columns"),
        ("sft", {"tags": ["hi", "yo"]}, "no column `prompt`"),
        ("sft", {"query": "a", "verdict": "b"}, "fix: set `dataset.columns` to `{response: verdict}`"),
        ("sft", {"body": "some text", "id": 3}, "set `dataset.columns` to `{text: body}` to train on all of it"),
        ("preference", {"a": "x", "b": "y", "c": "z"}, "rejected: COLUMN}`, each COLUMN one of a, b, c"),
        ("sft", {"article": "a", "summary": "b"}, "to `{prompt: COLUMN, response: COLUMN}`, each COLUMN one of article, summary"),
        ("sft", {"prompt": "a", "score": 3}, "got columns prompt, score; fix: give each row a `response`"),
        ("sft", {"chosen": [U, A], "rejected": [U, N]}, "these look like `preference` rows"),
        ("sft", {"messages": [U, {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}]},
         "`messages[1].content[0]` must be a part of text; got a part of type 'image_url'; fix: only text can be read"),
        ("sft", {"messages": [U, {"role": "assistant", "content": None}]}, "`messages[1].content` is null; fix: fill it"),
        ("sft", {"messages": [{"role": None, "content": "hi"}, A]}, "`messages[0].role` is null"),
        ("sft", {"conversations": [{"from": "human", "value": None}, A]}, "`conversations[0].value` is null"),
        ("sft", {"messages": [U, {"role": "assistant", "contents": "a"}]}, "got role, contents; fix: write `content` for"),
        ("sft", {"conversations": None, "id": "3"},
         "column `conversations` is null in this row; fix: fill it, or delete the row; the columns that it fills are `id`"),
        ("sft", {"instruction": "a", "output": None}, "column `output` is null in this row"),
        ("preference", {"question": None, "chosen": "a", "rejected": "b"}, "column `question` is null in this row"),
        ("sft", {"instruction": None, "input": "", "output": "b"}, "column `instruction` is null in this row; fix: fill it"),
        ("sft", {"instruction": None, "input": "a", "output": "b"},
         "is null in this row; fix: fill it, or set `dataset.columns` to `{prompt: input}` if that is the whole prompt, or"),
        ("sft", {"messages": [U, {**A, "weight": 0}]}, "every assistant turn has weight 0"),
        ("sft", {"messages": [S, U, A], "system": "other"}, "has both a system turn and a column `system`, which differ"),
        ("sft", {"messages": [U, A], "tools": "not JSON"}, "`tools` must be a list of mappings, or the JSON of one; got str"),
        ("sft", {"prompt": [U], "completion": [{**U, "content": "ho"}, A]},
         "`completion` must begin with an assistant turn; got `completion[0]`"),
        ("preference", {"chosen": [U, A], "rejected": [{**U, "content": "ho"}, N]},
         "differ in message 0, which isn't the assistant's; got `chosen[0]` is user: 'hi', `rejected[0]` is user: 'ho'"),
        ("preference", {"chosen": [U, A, U, A], "rejected": [U, A, {**U, "content": "ho"}, N]},
         "in message 2, which isn't the assistant's; got `chosen[2]`"),
        ("preference", {"prompt": [{**U, "content": "ho"}], "chosen": [U, A], "rejected": [U, N]},
         "the responses contain another prompt than `prompt`; got user: 'hi', `prompt` ends user: 'ho'"),
        ("preference", {"chosen": [U, A, U], "rejected": [U, N]}, "`chosen` must end with an assistant turn"),
        ("preference", {"chosen": [A], "rejected": [N]}, "no column `prompt`"),
        ("preference", {"chosen": "yo", "rejected": "no"}, "no column `prompt`"),
        ("preference", {"prompt": "hi", "chosen": [A], "rejected": ["no"]}, "`rejected` must be text or a list of messages"),
        ("unpaired", {"prompt": "a", "response": "b", "score": 0.3}, "no column `label`"),
        ("reasoning", {"question": "a", "answer": "b"}, "or give each row a `verifiable`"),
        ("reasoning", {"question": "a", "answer": "b", "checkable": True}, "set `dataset.columns` to `{verifiable: checkable}`"),
        ("unpaired", {"prompt": "a", "response": "b", "thumbs_up": True, "n": 1},
         "fix: set `dataset.columns` to `{label: thumbs_up}`; or these look like `sft` rows"),
        ("sft", {"source": "a", "target": "b"}, "fix: set `dataset.columns` to `{prompt: source}`"),
        # Columns about a row, and those that are known as another field, are never suggested.
        ("sft", {"prompt": "a", "id": "7", "category": "math"}, "columns prompt, id, category; fix: give each row a `response`"),
        ("sft", {"id": "1", "url": "b"}, "fix: give each row a `prompt` and a `response`"),
        ("sft", {"response": "a", "created_at": "2024"}, "fix: give each row a `prompt`"),
        ("preference", {"prompt": "a", "response": "b"}, "another method; or give each row a `chosen` and a `rejected`"),
        ("preference", {"prompt": "a", "chosen": "b", "source": "wiki"}, "fix: give each row a `rejected`"),
        ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "method; or set `dataset.columns` to `{response: chosen}`"),
        ("prompt", {"id": "1", "answer": "2"}, "fix: give each row a `prompt`"),
        ("unpaired", {"prompt": "a", "response": "b", "score": 0.3}, "`undesirable`; `score` may decide it, by a threshold"),
        ("reasoning", {"question": "a", "solution": "b"}, "set `dataset.columns` to `{answer: solution}`"),
        # What each row holds instead is said.
        ("sft", {"promt": "a", "respons": "b"}, "set `dataset.columns` to `{prompt: promt, response: respons}`"),
        ("sft", {"the prompt: ": "a", "response": "b"}, 'set `dataset.columns` to `{prompt: "the prompt: "}`'),
        ("sft", {"prompt": "a", "candidates": ["b", "c"]}, "`candidates` is a list: write one of its texts as `response`"),
        ("preference", {"prompt": "a", "completions": ["b", "c"]}, "`completions` is a list of answers: write the better one as"),
        ("preference", {"prompt": "a", "response_a": "b", "response_b": "c", "winner": "a"},
         "`winner` says which answer is the better one: write that one as `chosen`, the other as `rejected`"),
        ("sft", {"turns": [{"who": "a", "what": "b"}]},
         "got columns turns (a list of mappings with `who`, `what`, which aren't known turns)"),
    ],
)  # fmt: skip
def test_what_could_mean_two_things_or_nothing_is_refused(tiny, record, row, message):
    error = fault(tiny, row, record)
    assert error.startswith("data[0]: ") and message in error


def test_the_format_is_fixed_by_an_option(tiny):
    dialogue = {"text": "Human: hi\n\nAssistant: yo"}
    assert words(tiny, dialogue, format="text") == ["<|bos|>«Human: hi\n\nAssistant: yo<|end|>»"]
    both = {"instruction": "do", "input": "hi", "output": "yo", "text": "all"}
    assert words(tiny, both, format="text") == ["<|bos|>«all<|end|>»"]
    assert words(tiny, both, format="columns") == ["<|bos|>do«yo<|end|>»"]
    assert words(tiny, {"prompt": "do", "input": "hi", "response": "yo"}, format="alpaca") == [
        "<|bos|>do\n\nhi«yo<|end|>»"
    ]
    error = fault(tiny, {"messages": [U, A]}, format="sharegpt")
    assert error.startswith(
        "data[0]: isn't a row of the format `sharegpt`; got `messages` (`messages` (a list of chat messages))"
    )
    assert "isn't a row of the format `text`" in fault(tiny, {"prompt": "a", "response": "b"}, format="text")
    assert words(tiny, {"conversations": TURNS}, format="sharegpt") == [CHAT]
    pair = {"chosen": "Human: hi\n\nAssistant: yo", "rejected": "Human: hi\n\nAssistant: no"}
    assert words(tiny, pair, "preference", format="dialogue") == CHOSEN
    assert words(tiny, {"prompt": "hi", **pair}, "preference", strict=True) == CHOSEN
    other = {"prompt": "a", **pair, "rejected": "Human: ho\n\nAssistant: no"}
    assert words(tiny, other, "preference")[0] == "<|bos|>a«Human: hi\n\nAssistant: yo<|end|>»"


def test_columns_name_what_the_shape_leaves_open(tiny):
    row = {"one": TURNS, "two": TURNS[:1], "body": "some text"}
    assert words(tiny, row, columns={"messages": "one"}) == [CHAT]
    assert words(tiny, {"body": "some text", "title": "t"}, columns={"text": "body"}) == ["<|bos|>«some text<|end|>»"]
    alpaca = {"instruction": "do", "input": "hi", "output": "yo"}
    assert words(tiny, alpaca, columns={"prompt": "instruction", "response": "output"}) == [
        "<|bos|>do\n\nhi«yo<|end|>»"
    ]
    mapped = {"prompt": "do", "response": "yo", "extra": "hi"}
    assert words(tiny, mapped, columns={"input": "extra"}) == ["<|bos|>do\n\nhi«yo<|end|>»"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_taken_for_what_is_said_once(tiny, caplog, streaming):
    caplog.set_level(logging.INFO, "rlhf_core")
    data = opened(tiny, [{"conversations": TURNS}] * 5, streaming=streaming)
    list(data)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["data: rows read as ShareGPT conversations: column `conversations`"]
    assert data.report.as_dict()["shapes"]["ShareGPT conversations: column `conversations`"]["rows"] == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_nothing_uses_is_named_once_and_refused_when_strict(tiny, caplog, streaming):
    rows = [
        {"prompt": "a", "response": "b", "note": "c", "why": "d", "score": 3, "id": "identity_0", "user_id": "u"}
    ] * 4
    data = opened(tiny, rows, streaming=streaming, wrap="none")
    list(data)
    told = "data: 4 of 4 rows: columns that aren't used: `note`, `why` (data[0], data[1], data[2], data[3])"
    assert [record.getMessage() for record in caplog.records] == [told]
    with pytest.raises(DataError, match=r"data\[0\]: has columns that aren't used; got `note`, `why`"):
        list(opened(tiny, rows, streaming=streaming, strict=True))
    list(opened(tiny, rows, streaming=streaming, strict=True, ignore_columns=["note", "why"]))
    mapped = opened(tiny, rows, strict=True, columns={"prompt": "note"}, ignore_columns=["why"])
    assert tiny.decode(mapped[0].prompt_ids) == "<|bos|>c"


def test_what_a_method_or_a_reward_may_use_is_no_waste(tiny):
    assert example({"prompt": "a", "solution": "b"}, "prompt").unused == ()
    steps = {"prompt": "a", "chosen": "b", "rejected": "c", "steps": "x", "labels": "y"}
    assert example(steps, "preference").unused == ()
    repeated = {"messages": [U, A], "prompt": "hi", "chosen": [U, A], "text": "so: hi, yo"}
    assert example(repeated).unused == ()
    assert example({**repeated, "rejected": [U, N]}).unused == ("rejected",)
    held = {"messages": [U, A], "images": [{"path": "x.png"}], "videos": [], "documents": [{"a": 1}], "count": "3"}
    assert example(held).unused == ("images", "documents")


def test_several_shapes_in_one_file(tiny):
    rows = [{"conversations": TURNS}, {"messages": [U, A]}, {"prompt": "hi ", "completion": "yo"}, {"text": "t"}]
    data = opened(tiny, rows)
    assert [in_words(tiny, row)[0] for row in data] == [CHAT, CHAT, "<|bos|>hi «yo<|end|>»", "<|bos|>«t<|end|>»"]
    assert len(data.report.shapes) == 3


def test_a_text_that_holds_the_answer_alone_is_no_copy(tiny):
    row = {"prompt": "What is the capital?", "context": "The capital is Paris.", "response": "Paris"}
    assert example(row).unused == ("context",)
    assert "has columns that aren't used; got `context`" in fault(tiny, row, strict=True)
    rendered = {**row, "context": "### Question: What is the capital?\n### Answer: Paris"}
    assert example(rendered).unused == ()
    assert example({"prompt": "Double it.", "input": "21", "response": "42", "id": "7"}).unused == ("input",)


def test_lists_of_text_that_nothing_uses_are_named():
    row = {"prompt": "a", "response": "b", "docs": ["d1", "d2"], "one": ["d"], "scores": [1, 2], "ids": ["1", "2"]}
    assert example(row).unused == ("docs", "one")
    assert example({**row, "docs": [{"title": "t"}], "one": ["a", "b"]}).unused == ("docs",)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mapped_column_that_no_row_has_is_refused(tiny, streaming):
    rows = [{"prompt": "a", "response": "b", "system": "be"}] * 3
    with pytest.raises(ConfigError, match="no row has a column `sytem`") as caught:
        data = opened(tiny, rows, columns={"system": "sytem"}, streaming=streaming)
        list(DataStream(data, batch_size=1, shuffle=False))
    assert "`dataset.columns.system`: did you mean `system`?" in str(caught.value)
    some = [*rows, {"prompt": "a", "response": "b", "sytem": "be"}]
    list(DataStream(opened(tiny, some, columns={"system": "sytem"}, streaming=streaming), batch_size=1))


ASKED = "\n\nHuman: hi\n\nAssistant:"


def test_a_prompt_at_the_beginning_of_the_answers_is_cut(tiny):
    row = {"prompt": ASKED, "chosen": ASKED + " yo", "rejected": ASKED + " no"}
    assert words(tiny, row, "preference", strict=True) == CHOSEN
    row = {"prompt": "What is 2 + 3?", "chosen": "What is 2 + 3? It is 5.", "rejected": "What is 2 + 3? It is 6."}
    assert words(tiny, row, "preference") == [f"<|bos|>What is 2 + 3?« It is {n}.<|end|>»" for n in (5, 6)]
    said = "columns, without the prompt that the answers begin with"
    assert example(row, "preference").read_as == said
    assert example({**row, "rejected": "It is 6."}, "preference").responses[0] == row["chosen"]
    assert example({"prompt": "Yes", "chosen": "Yes, sir", "rejected": "Yes"}, "preference").read_as is None
    one = {"prompt": row["prompt"], "response": row["chosen"]}
    assert words(tiny, one) == ["<|bos|>What is 2 + 3?« It is 5.<|end|>»"] and example(one).read_as == said
    assert example({**one, "system": "be"}).responses[0] == [{"role": "assistant", "content": "It is 5."}]


def test_a_prompt_of_messages_at_the_beginning_of_an_answer_is_cut(tiny):
    for prompt in ([U], "hi"):
        assert words(tiny, {"prompt": prompt, "completion": [U, A], "label": True}) == [CHAT]
        assert example({"prompt": prompt, "completion": [U, A], "label": True}, "unpaired").prompt == [U]
    assert example({"prompt": [U], "completion": [S, U, A]}).prompt == [S, U]


def test_a_prompt_beside_answers_that_hold_another_is_named(tiny):
    row = {"prompt": "what?", "chosen": [U, A], "rejected": [U, N]}
    assert words(tiny, row, "preference") == CHOSEN
    assert example(row, "preference").unused == ("prompt",)
    assert "has columns that aren't used; got `prompt`" in fault(tiny, row, "preference", strict=True)
    assert example({**row, "prompt": "hi"}, "preference").unused == ()
    dialogues = {"prompt": ASKED, "chosen": ASKED + " yo", "rejected": ASKED + " no"}
    assert example(dialogues, "preference").unused == ()
    assert example({**dialogues, "prompt": "ho"}, "preference").unused == ("prompt",)


FEW = [{"input": "x", "output": "y"}]


def test_turns_beside_a_question_and_its_answer(tiny):
    row = {"instruction": "Add 1", "output": "ok 1", "examples": FEW}
    assert words(tiny, row) == ["<|bos|>Add 1«ok 1<|end|>»"] and example(row).unused == ("examples",)
    assert words(tiny, {"query": "q", "answer": "a", "history": [U, A]}) == [
        f"<|bos|>{SAID}yo<|end|><|user|>q<|end|><|assistant|>«a<|end|>»"
    ]
    error = fault(tiny, {"query": "q", "history": [U, A]})
    assert "no column `response`" in error


def test_magpie_rows_are_conversations_that_say_it_twice(tiny):
    row = {"instruction": "hi", "response": "yo", "conversations": TURNS}
    assert words(tiny, row, strict=True) == [CHAT]
    assert words(tiny, {"messages": [U, A], "response": "yo"}, strict=True) == [CHAT]
    assert words(tiny, {"prompt": "hi", "response": "yo", "conversations": TURNS}, strict=True) == [
        "<|bos|>hi«yo<|end|>»"
    ]
    other = {**row, "response": "other"}
    error = fault(tiny, other)
    assert (
        "has a conversation in `conversations` and another response in `response`" in error
        and "`dataset.ignore_columns`" in error
    )
    assert words(tiny, other, format="sharegpt") == [CHAT]
    assert words(tiny, other, format="columns") == ["<|bos|>hi«other<|end|>»"]
    assert words(tiny, other, ignore_columns=["response", "instruction"], strict=True) == [CHAT]
    assert words(tiny, other, ignore_columns=["conversations"], strict=True) == ["<|bos|>hi«other<|end|>»"]


@pytest.mark.parametrize(
    "history",
    [[["hi", "yo"]], [{"user": "hi", "assistant": "yo"}], [U, A], TURNS, ["hi", "yo"]],
)
@pytest.mark.parametrize("asked", ["prompt", "instruction"])
def test_history_goes_before_any_text_prompt(tiny, history, asked):
    row = {asked: "q", "response": "a", "history": history}
    expected = [f"<|bos|>{SAID}yo<|end|><|user|>q<|end|><|assistant|>«a<|end|>»"]
    assert words(tiny, row, strict=True) == expected
    assert example({asked: "q", "chat_history": history}, "prompt").prompt[:-1] == [U, A]


def test_alpaca_rows_without_an_input_are_alpaca(tiny):
    for row in ({"instruction": "do", "input": None, "output": "yo"}, {"instruction": "do", "output": "yo"}):
        assert words(tiny, row, format="alpaca") == ["<|bos|>do«yo<|end|>»"]


@pytest.mark.parametrize(
    ("who", "what", "user", "assistant"),
    [
        ("speaker", "utterance", "USER", "ASSISTANT"),
        ("speaker", "text", "human", "bot"),
        ("sender", "text", "human", "assistant"),
        ("author", "content", "user", "assistant"),
        ("role", "message", "user", "assistant"),
    ],
)
def test_turns_of_other_keys(tiny, who, what, user, assistant):
    turns = [{who: user, what: "hi"}, {who: assistant, what: "yo"}]
    assert words(tiny, {"log": turns}, strict=True) == [CHAT]


def test_persons_names_are_no_roles():
    comments = [{"author": "Ann", "text": "a"}, {"author": "Bob", "text": "b"}]
    read = example({"prompt": "hi", "response": "yo", "comments": comments})
    assert read.prompt == "hi" and read.unused == ("comments",)


def test_calls_as_a_text_of_functions_stand_in_place_of_content():
    turn = {"role": "assistant", "content": None, "function_calls": "f(x=1)"}
    read = example({"messages": [U, turn, {"role": "environment", "content": "5"}, A]})
    assert read.responses[0][0]["function_calls"] == "f(x=1)" and read.responses[0][1]["role"] == "tool"
    assert example({"messages": [U, turn]}).responses[0][0]["function_calls"] == "f(x=1)"


@pytest.mark.parametrize("streaming", [False, True])
def test_turns_that_nothing_asks_for_or_answers_are_no_lesson(tiny, caplog, streaming):
    row = {"conversations": [{"from": "gpt", "value": "no"}, *TURNS, {"from": "human", "value": "ho"}]}
    data = opened(tiny, [row, {"conversations": TURNS}], streaming=streaming)
    found = list(data)
    assert in_words(tiny, found[0]) == [f"<|bos|><|assistant|>no<|end|>{SAID}«yo<|end|>»"]
    assert in_words(tiny, found[1]) == [CHAT]
    assert "1 of 2 rows: the conversation begins with an assistant turn, which answers nothing" in caplog.text
    assert "1 of 2 rows: the conversation ends on turns that nothing answers, which are left out" in caplog.text
    for part in (row["conversations"][:-1], row["conversations"][1:]):
        with pytest.raises(DataError, match=r"data\[0\]: the conversation (begins|ends).*unset `dataset.strict`"):
            list(opened(tiny, [{"conversations": part}], streaming=streaming, strict=True))
    assert example({"messages": [A, U, A, U], "label": True}, "unpaired").prompt == [A, U]


@pytest.mark.parametrize(
    ("record", "row", "columns"),
    [
        (
            "sft",
            {"messages": [U, A]},
            {"messages": {"role": ["user", "assistant"], "content": [U["content"], A["content"]]}},
        ),
        (
            "sft",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
        ),
        (
            "preference",
            {"chosen": [U, A], "rejected": [U, {**A, "content": "no"}]},
            {
                key: {"role": ["user", "assistant"], "content": [U["content"], answer]}
                for key, answer in (("chosen", A["content"]), ("rejected", "no"))
            },
        ),
    ],
)
def test_messages_as_columns_are_the_messages(tiny, record, row, columns):
    assert words(tiny, columns, record) == words(tiny, row, record)
