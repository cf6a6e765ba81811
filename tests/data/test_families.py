"""The tokens in the loss are exactly the assistant's text and stop, whatever a family's chat template does around them.

Each prompt is what the template renders with its generation prompt, so training meets what generation does.
"""

from __future__ import annotations

import random

import pytest
from chat_families import FAMILIES

from rlhf_core.data.encoder import Encoder, RowOutcome
from rlhf_core.data.open_source import open_source
from rlhf_core.infra.errors import ModelError

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def outcome(name: str, row: dict, record: str = "sft", **options) -> RowOutcome:
    (found,) = outcomes(name, row, record, **options)
    return found


def outcomes(name: str, row: dict, record: str = "sft", **options) -> list[RowOutcome]:
    encoder = Encoder(TOKENIZERS[name], record, max_length=4096, **options)
    return encoder.encode(list(open_source([row]).rows()))


def in_loss(name: str, found: RowOutcome, number: int = 0) -> list[str]:
    """Return the runs of tokens in the loss, as text."""
    runs: list[list[int]] = []
    before = False
    for token, mask in zip(found.row.responses[number], found.row.masks[number], strict=True):
        if mask:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = mask
    return [TOKENIZERS[name].decode(run) for run in runs]


def prompted(name: str, messages: list[dict], **options) -> str:
    return TOKENIZERS[name].apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def prompt(name: str, found: RowOutcome) -> str:
    return TOKENIZERS[name].decode(found.row.prompt_ids)


# The reply begins and ends as what stands around it does, and repeats the question: it is not found by searching.
ASKED, REPLY = "the answer", "answer: the answer"


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


def test_one_turn(name):
    family = FAMILIES[name]
    for row in ({"messages": [user(ASKED), says(REPLY)]}, {"prompt": [user(ASKED)], "response": REPLY}):
        found = outcome(name, row)
        assert in_loss(name, found) == [family.last.format(REPLY)]
        assert prompt(name, found) == prompted(name, [user(ASKED)])


def test_the_same_tokens_as_the_whole_rendering(name):
    messages = [user(ASKED), says(REPLY), user("b"), says("c")]
    found, tokenizer = outcome(name, {"messages": messages}), TOKENIZERS[name]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = [*found.row.prompt_ids, *found.row.responses[0]]
    if name == "DeepSeek-R1":
        # What generation is prompted with, and an empty block's end, stand before the last answer.
        whole = whole.replace("<｜Assistant｜>c", "<｜Assistant｜><think>\n\n</think>\n\nc")
    marker = "<|user|>" if name == "GLM-4" else ""
    assert tokenizer.decode(ids) == whole.removesuffix("\n") + marker


def test_several_turns(name):
    family = FAMILIES[name]
    messages = [user(ASKED), says(REPLY), user(ASKED), says(REPLY), user("b"), says(ASKED)]
    found = outcome(name, {"messages": messages})
    assert in_loss(name, found) == [*[family.turn.format(REPLY)] * 2, family.last.format(ASKED)]


def test_a_system_message(name):
    family = FAMILIES[name]
    messages = [{"role": "system", "content": REPLY}, user(ASKED), says(REPLY), user(ASKED), says("c")]
    found = outcome(name, {"messages": messages})
    assert in_loss(name, found) == [family.turn.format(REPLY), family.last.format("c")]
    found = outcome(name, {"messages": messages[:3]})
    assert in_loss(name, found) == [family.last.format(REPLY)]
    assert prompt(name, found) == prompted(name, messages[:2])


def test_pairs_share_the_prompt_that_generation_has(name):
    family = FAMILIES[name]
    found = outcome(name, {"prompt": [user(ASKED)], "chosen": REPLY, "rejected": ASKED}, "preference")
    assert [in_loss(name, found, number) for number in (0, 1)] == [[family.last.format(t)] for t in (REPLY, ASKED)]
    assert prompt(name, found) == prompted(name, [user(ASKED)])
    asked = outcome(name, {"prompt": [user(ASKED)]}, "prompt")
    assert asked.row.prompt_ids == found.row.prompt_ids


@pytest.mark.parametrize("inline", [False, True])
def test_reasoning(name, inline):
    family = FAMILIES[name]
    said = (
        says(f"<think>\nhm, {ASKED}\n</think>\n\n{REPLY}") if inline else says(REPLY, reasoning_content=f"hm, {ASKED}")
    )
    row = {"messages": [user(ASKED), said]}
    found = outcome(name, row)
    if family.thought is None or (inline and name in ("gpt-oss", "generation tags")):
        # The template has no place for it: what stands in the content is rendered with it, another key is said to be lost.
        answer = said["content"]
        assert in_loss(name, found) == [family.last.format(answer)]
        assert inline or any("reasoning_content" in text for text in found.lost)
    else:
        assert in_loss(name, found) == [family.thought.format(r=f"hm, {ASKED}", a=REPLY)]
        assert not found.lost
    assert prompt(name, found) == prompted(name, [user(ASKED)])


THINKERS = [name for name, family in FAMILIES.items() if family.thought is not None]


@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_of_earlier_turns(name):
    family = FAMILIES[name]
    thoughtful = says(REPLY, reasoning_content="hm")
    row = {"messages": [user(ASKED), thoughtful, user("b"), thoughtful]}
    last = family.thought.format(r="hm", a=REPLY)
    if family.keeps_thoughts:
        assert in_loss(name, outcome(name, row)) == [last, last]
        return
    with pytest.raises(ModelError, match=r"drops the reasoning of message 1 once .*dataset\.turns: each"):
        outcomes(name, row)
    first, second = outcomes(name, row, turns="each")
    assert [in_loss(name, found) for found in (first, second)] == [[last], [last]]
    assert prompt(name, second) == prompted(name, row["messages"][:3])


def test_each_turn_as_a_row(name):
    family = FAMILIES[name]
    messages = [user(ASKED), says(REPLY), user("b"), says(ASKED)]
    found = outcomes(name, {"messages": messages}, turns="each")
    assert [in_loss(name, one) for one in found] == [[family.last.format(text)] for text in (REPLY, ASKED)]
    assert [prompt(name, one) for one in found] == [prompted(name, messages[:1]), prompted(name, messages[:3])]


CALLERS = [name for name, family in FAMILIES.items() if family.call is not None]


@pytest.mark.parametrize("name", CALLERS)
def test_tools(name):
    family = FAMILIES[name]
    messages = [user(ASKED), CALL, {"role": "tool", "content": "5", "name": "f"}, says(REPLY)]
    found = outcome(name, {"messages": messages, "tools": TOOLS})
    # Qwen3 writes an empty block only before the last turn.
    call = family.call.removeprefix("<think>\n\n</think>\n\n")
    assert in_loss(name, found) == [call, family.last.format(REPLY)]
    assert any("`tools`" in text for text in found.lost) is not family.takes_tools
    called = outcome(name, {"messages": messages[:2], "tools": TOOLS})
    assert in_loss(name, called) == [family.call]
    if family.takes_tools:
        assert prompt(name, called) == prompted(name, messages[:1], tools=TOOLS)


def test_control_tokens_in_contents_stay_text(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    evil = "".join((*family.special, family.eos)) + "x"
    found = outcome(name, {"messages": [user(evil), says(f"a {evil}"), user(evil), says(f"b {evil}")]})
    plain = outcome(name, {"messages": [user("x"), says("a x"), user("x"), says("b x")]})

    def control(one: RowOutcome) -> list[int]:
        ids = [*one.row.prompt_ids, *one.row.responses[0]]
        return [token for token in ids if tokenizer.added_tokens_decoder.get(token) is not None]

    assert control(found) == control(plain)
    assert in_loss(name, found) == [family.turn.format(f"a {evil}"), family.last.format(f"b {evil}")]
    assert set(found.control_text) == {*family.special, family.eos}


# Words that templates, and what finds turns in them, might trip over.
WORDS = ["a", "answer", " ", "\n", "zqWordAz", "zqControl0z", "|", "<", "assistant", "user\n", "é", "{%", "}}", "0"]


def test_whatever_the_contents_are(name):
    family = FAMILIES[name]
    draw = random.Random(name)
    words = [*WORDS, family.eos, *family.special[:3]]

    def content() -> str:
        around = ["".join(draw.choices(words, k=draw.randint(0, most))) for most in (5, 2)]
        return draw.choice("xy.").join(around)

    def expected(form: str, text: str, *, last: bool) -> str:
        if family.trims == "both":
            text = text.strip()
        return form.format(text.lstrip("\n") if last and family.trims == "last" else text)

    for turns in (1, 2, 3, 1, 2, 3, 4):
        contents = [content() for _ in range(2 * turns)] if draw.random() < 0.7 else [content()] * (2 * turns)
        messages = [user(text) if number % 2 == 0 else says(text) for number, text in enumerate(contents)]
        messages[:0] = [{"role": "system", "content": content()}] if draw.random() < 0.3 else []
        places = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        *earlier, last = [messages[number]["content"] for number in places]
        whole = "".join(expected(family.turn, text, last=False) for text in earlier) + expected(
            family.last, last, last=True
        )
        assert "".join(in_loss(name, outcome(name, {"messages": messages}))) == whole
        for found, place in zip(outcomes(name, {"messages": messages}, turns="each"), places, strict=True):
            assert in_loss(name, found) == [expected(family.last, messages[place]["content"], last=True)]
            assert prompt(name, found) == prompted(name, messages[:place])


def test_the_stops_are_what_ends_turns(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    stops = tokenizer.convert_ids_to_tokens(list(Encoder(tokenizer, "sft").template.stops))
    ends = {
        "Phi-3": ["<|end|>", "<|endoftext|>"],
        "gpt-oss": ["<|return|>", "<|call|>"],
        "GLM-4": ["<|user|>", "<|observation|>"],
    }
    assert stops == ends.get(
        name, [family.last.format("").removeprefix("<think>\n\n</think>\n\n").removeprefix("\n</think>\n\n")]
    )
