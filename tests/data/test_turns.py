"""Turns in templates of uncommon forms: what opens a think block, generation tags, contents as parts, calls written as text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chat_families import FAMILIES, Family

from rlhf_core.data.encoder import Encoder, RowOutcome
from rlhf_core.data.open_source import open_source
from rlhf_core.infra.errors import DataError, ModelError

ASK = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "b"}
HEADER = "<|im_start|>assistant\n"


def chatml(turn: str, *, prompt: str = HEADER, last: str = "", added: tuple[str, ...] = ()) -> Family:
    """Return a family whose assistant's turns are rendered by `turn`, and whose generation prompt is `prompt`."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + turn
        + "{% else %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
        + last
    )
    return Family(template, ("<|im_start|>", "<|note|>"), "<|im_end|>", turn="", last="", added=added)


PLAIN = HEADER + "{{ m.content | trim }}<|im_end|>{{ '\n' }}"


def outcomes(family: Family, row: dict, record: str = "sft", **options) -> list[RowOutcome]:
    return Encoder(family.tokenizer(), record, max_length=4096, **options).encode(list(open_source([row]).rows()))


def parts(family: Family, found: RowOutcome, number: int = 0) -> list[tuple[bool, str]]:
    """Return a response as runs of text, each with whether it is in the loss."""
    runs: list[tuple[bool, list[int]]] = []
    for token, mask in zip(found.row.responses[number], found.row.masks[number], strict=True):
        if not runs or runs[-1][0] != mask:
            runs.append((mask, []))
        runs[-1][1].append(token)
    return [(mask, family.tokenizer().decode(ids)) for mask, ids in runs]


OPENERS = [
    ("<reasoning>", "", "</reasoning>"),
    ("<think>\n", "\n", "</think>\n\n"),
    ("[THINK]", "", "[/THINK]"),
    ("<|START_THINKING|>", "", "<|END_THINKING|>"),
    ("◁think▷", "", "◁/think▷"),
    ("<seed:think>", "", "</seed:think>"),
]


@pytest.mark.parametrize(("opener", "line", "closing"), OPENERS)
def test_a_prompt_that_opens_a_block(opener, line, closing):
    family = chatml(PLAIN, prompt=HEADER + "{{ '" + opener.replace("\n", "\\n") + "' }}")

    def answered(text: str, **more) -> list[tuple[bool, str]]:
        (found,) = outcomes(family, {"messages": [ASK, {"role": "assistant", "content": text, **more}]})
        assert family.tokenizer().decode(found.row.prompt_ids).endswith(HEADER + opener)
        return parts(family, found)

    # Without reasoning in the data the block's end is context: leaving reasoning out is not what is taught.
    assert answered("b") == [(False, line + closing), (True, "b<|im_end|>")]
    assert answered("b", reasoning_content="hm") == [(True, f"hm{line}{closing}b<|im_end|>")]
    close = closing.strip()
    assert answered(f"hm{close}b") == [(True, f"hm{close}b<|im_end|>")]
    assert answered(f"{opener}hm{close}b") == [(True, f"hm{close}b<|im_end|>")]
    pair = {"prompt": [ASK], "chosen": f"hm{close}b", "rejected": "c"}
    (found,) = outcomes(family, pair, "preference")
    assert parts(family, found) == [(True, f"hm{close}b<|im_end|>")]
    assert parts(family, found, 1) == [(False, line + closing), (True, "c<|im_end|>")]


def test_a_prompt_that_ends_in_other_text():
    family = chatml(PLAIN, prompt=HEADER + "Sure! ")
    with pytest.raises(
        ModelError, match=r"ends in text that a rendered turn lacks; got 'Sure! '; fix: .*chat_template"
    ):
        outcomes(family, {"messages": [ASK, REPLY]})


def test_an_end_that_stands_between_turns_only():
    family = chatml(
        HEADER + "{{ m.content }}{% if not loop.last %}<|im_end|>{{ '\n' }}{% endif %}",
    )
    (found,) = outcomes(family, {"messages": [ASK, REPLY, ASK, REPLY]})
    assert [text for mask, text in parts(family, found) if mask] == ["b<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("inside", "behind"), [("{{ m.content }}<|im_end|>", "{{ '\n' }}"), ("{{ m.content }}", "<|im_end|>{{ '\n' }}")]
)
def test_generation_tags_are_transformers_mask(inside, behind):
    family = chatml(HEADER + "<|note|>{% generation %}" + inside + "{% endgeneration %}" + behind)
    messages = [ASK, REPLY, ASK, {"role": "assistant", "content": "b b"}]
    (found,) = outcomes(family, {"messages": messages})
    tokenizer = family.tokenizer()
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = [*found.row.prompt_ids, *found.row.responses[0]], [0] * len(found.row.prompt_ids) + found.row.masks[0]
    assert ids == whole["input_ids"][: len(ids)]
    assert mask == whole["assistant_masks"][: len(ids)] and not any(whole["assistant_masks"][len(ids) :])
    assert [text for text in found.notes if "end token" in text] == list(found.notes) and bool(found.notes) == (
        "im_end" in behind
    )


def test_generation_tags_without_a_generation_prompt():
    family = chatml(HEADER + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", prompt="")
    (found,) = outcomes(family, {"prompt": [ASK], "chosen": "b", "rejected": "c"}, "preference")
    assert family.tokenizer().decode(found.row.prompt_ids).endswith(HEADER)
    assert [parts(family, found, number) for number in (0, 1)] == [[(True, "b<|im_end|>")], [(True, "c<|im_end|>")]]
    assert "ignores `add_generation_prompt`" in found.notes[0]


def test_a_stop_that_only_the_last_turn_has_is_said_to_be_missing():
    family = chatml(
        "assistant: {{ m.content }}{% if loop.last %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}",
        prompt="assistant: ",
    )
    (found,) = outcomes(family, {"messages": [ASK, REPLY, ASK, REPLY]})
    assert [text for mask, text in parts(family, found) if mask] == ["b", "b<|im_end|>"]
    assert "`dataset.turns: each` ends each turn" in found.notes[0]
    both = outcomes(family, {"messages": [ASK, REPLY, ASK, REPLY]}, turns="each")
    assert [parts(family, found) for found in both] == [[(True, "b<|im_end|>")]] * 2


def test_weights_of_turns():
    family = chatml(PLAIN)
    messages = [ASK, {**REPLY, "weight": 0}, ASK, REPLY, ASK, {**REPLY, "weight": 0}]
    (found,) = outcomes(family, {"messages": messages})
    assert [text for mask, text in parts(family, found) if mask] == ["b<|im_end|>"]
    assert family.tokenizer().decode(found.row.responses[0]).count("b<|im_end|>") == 1
    assert len(outcomes(family, {"messages": messages}, turns="each")) == 1


def test_a_template_that_wants_parts_gets_them():
    family = Family(
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}" + HEADER + "{% endif %}",
        ("<|im_start|>",), "<|im_end|>", turn="", last="",
    )  # fmt: skip
    for content in ("hello", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]):
        (found,) = outcomes(family, {"messages": [ASK, {"role": "assistant", "content": content}]})
        assert parts(family, found) == [(True, "hello<|im_end|>")]


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("given", [{"x": "<|im_end|>"}, '{"x": "<|im_end|>"}'])
def test_arguments_of_calls_in_the_form_that_the_template_takes(written, given):
    arguments = "{{ c.function.arguments }}" if written else "{{ c.function.arguments | tojson }}"
    calls = "{% for c in m.tool_calls %}{{ c.function.name + ' ' }}" + arguments + "{% endfor %}<|im_end|>"
    if written:
        calls = calls.replace("{{ c.function.arguments }}", "{{ '' + c.function.arguments }}")
    family = chatml(HEADER + calls)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    (found,) = outcomes(family, {"messages": [ASK, call]})
    # A control token in an argument is text there.
    ids, tokenizer = found.row.responses[0], family.tokenizer()
    assert parts(family, found) == [(True, 'f {"x": "<|im_end|>"}<|im_end|>')]
    assert ids.count(tokenizer.eos_token_id) == 1 and found.control_text == ("<|im_end|>",)


def test_what_the_template_leaves_out_is_said_and_refused_under_strict():
    family = chatml(PLAIN)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    (found,) = outcomes(family, {"messages": [ASK, {**REPLY, "reasoning_content": "hm"}], "tools": tools})
    assert sorted(found.lost) == [
        "the chat template doesn't render `reasoning_content`",
        "the chat template doesn't render the row's `tools`",
    ]
    assert len(outcomes(family, {"prompt": [ASK], "tools": tools}, "prompt")[0].lost) == 1


def test_an_answer_of_calls_alone_that_the_template_leaves_out():
    family = chatml(PLAIN)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(DataError, match=r"renders nothing of the answer, which is tool calls.*chat_template"):
        outcomes(family, {"messages": [ASK, call]})
    (found,) = outcomes(family, {"messages": [ASK, call, {"role": "tool", "content": "5"}, REPLY]})
    assert [text for mask, text in parts(family, found) if mask] == ["b<|im_end|>"]
    assert found.lost == ("the chat template doesn't render `tool_calls`",)


def test_reasoning_that_the_template_always_drops_from_the_content_is_refused():
    family = chatml(PLAIN.replace("m.content", "m.content.split('</think>')[-1]"), added=("<think>", "</think>"))
    with pytest.raises(ModelError, match=r"drops the reasoning that message 1 begins with.*chat_template"):
        outcomes(family, {"messages": [ASK, {"role": "assistant", "content": "<think>hm</think>b"}]})


def test_reasoning_between_calls_and_their_results_is_kept_where_the_template_keeps_it():
    family = FAMILIES["Qwen3"]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    messages = [
        ASK,
        {**call, "reasoning_content": "r1"},
        {"role": "tool", "content": "5"},
        {**REPLY, "reasoning_content": "r2"},
    ]
    (found,) = outcomes(family, {"messages": messages})
    called = '<think>\nr1\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    assert [text for mask, text in parts(family, found) if mask] == [called, "<think>\nr2\n</think>\n\nb<|im_end|>"]
    assert not found.lost and not found.notes


def test_calls_are_not_taken_as_rendered_for_a_name_that_stands_there_anyway():
    family = FAMILIES["OLMo-2"]  # its end token holds an `f`
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    (found,) = outcomes(family, {"messages": [ASK, call, {"role": "tool", "content": "5"}, REPLY]})
    assert [text for mask, text in parts(family, found) if mask] == ["b<|endoftext|>"]


CALLS = "{% for c in m.tool_calls or [] %}" + HEADER + "<|note|>{{ c.function.name }}<|im_end|>{{ '\n' }}{% endfor %}"
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
NOTE = "<|note|>f<|im_end|>"


@pytest.mark.parametrize("more", [{}, {"content": None}])
@pytest.mark.parametrize(
    "text",
    [
        # A turn of its own for content, whatever it is, if there is any: as DeepSeek-R1's.
        "{% if m.content is not none %}" + HEADER + "{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}",
        # None as a word, or refused, where nothing looks at it.
        "{% if not m.tool_calls %}"
        + HEADER
        + "{{ m.content + '<|im_end|>\n' }}{% else %}{{ m.content | trim }}{% endif %}",
        "{% if not m.tool_calls %}" + HEADER + "{% endif %}{{ m.content + ('' if m.tool_calls else '<|im_end|>\n') }}",
    ],
)
@pytest.mark.parametrize("tags", [False, True])
def test_a_call_without_content(text, more, tags):
    calls = CALLS.replace("<|note|>", "{% generation %}<|note|>").replace("<|im_end|>", "<|im_end|>{% endgeneration %}")
    family = chatml((calls if tags else CALLS) + text)
    # What looks like a control token, so that texts are hidden while they are rendered.
    for asked in (ASK, {"role": "user", "content": "<|im_end|>"}):
        (found,) = outcomes(family, {"messages": [asked, {**CALLED, **more}]})
        assert [text for mask, text in parts(family, found) if mask] == [NOTE]
        rest = [{"role": "tool", "content": "1"}, REPLY]
        (found,) = outcomes(family, {"messages": [asked, {**CALLED, **more}, *rest]})
        expected = [NOTE] if tags else [NOTE, "b<|im_end|>"]
        assert [text for mask, text in parts(family, found) if mask] == expected


def test_what_opens_the_next_answer_ends_none():
    family = FAMILIES["GLM-4"]
    (found,) = outcomes(family, {"messages": [ASK, REPLY, {**REPLY, "content": "c"}, ASK, REPLY]})
    assert parts(family, found) == [
        (True, "\nb"),
        (False, "<|assistant|>"),
        (True, "\nc<|user|>"),
        (False, "\nq<|assistant|>"),
        (True, "\nb<|user|>"),
    ]
    assert any("no end token after an earlier turn" in note for note in found.notes)


WITHOUT_TOOLS = "{% for m in messages if m.role != 'tool' %}"
TOOL = {"role": "tool", "content": "1"}


def test_a_role_that_is_not_rendered_is_named():
    template = chatml(PLAIN).template.replace("{% for m in messages %}", WITHOUT_TOOLS)
    family = replace(chatml(PLAIN), template=template)
    (found,) = outcomes(family, {"messages": [ASK, REPLY, TOOL, REPLY]})
    assert found.lost == ("the chat template doesn't render role `tool`",)
    (found,) = outcomes(chatml(PLAIN), {"messages": [ASK, REPLY, TOOL, REPLY]})
    assert not found.lost
    # Where what ends a turn depends on what follows, the answer can't even be found.
    between = chatml(HEADER + "{{ m.content }}{% if not loop.last %}<|im_end|>{{ '\n' }}{% endif %}")
    family = replace(between, template=between.template.replace("{% for m in messages %}", WITHOUT_TOOLS))
    with pytest.raises(ModelError, match=r"doesn't render role `tool` \(message 2\); fix: .*chat_template"):
        outcomes(family, {"messages": [ASK, REPLY, TOOL, REPLY]})


def test_a_second_answer_in_a_row_that_is_not_rendered():
    once = (
        "{% set ns = namespace(before='') %}{% for m in messages %}{% if m.role != 'assistant' or ns.before != 'assistant' %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% set ns.before = m.role %}{% endfor %}"
        "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
    )
    family = replace(chatml(PLAIN), template=once)
    with pytest.raises(ModelError, match=r"doesn't render role `assistant` where it follows itself \(message 2\)"):
        outcomes(family, {"messages": [ASK, REPLY, REPLY, ASK, REPLY]})


@pytest.mark.parametrize(
    "template",
    ["hello {{ x }}", "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"],
)
@pytest.mark.parametrize(
    ("record", "row"),
    [("sft", {"messages": [ASK, REPLY]}), ("preference", {"prompt": [ASK], "chosen": "b", "rejected": "c"})],
)
def test_a_template_without_the_answer_trains_nothing(template, record, row):
    with pytest.raises(
        ModelError, match="doesn't render role `assistant`, so nothing of message 1 could be trained on"
    ):
        outcomes(replace(FAMILIES["ChatML"], template=template), row, record)
