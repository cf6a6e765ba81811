"""Chat templates by name: what each renders, what is in the loss, and what it needs of a tokenizer."""

from __future__ import annotations

import json

import pytest
from data_helpers import in_words
from transformers import PreTrainedTokenizerFast

from rlhf_core.config.training import DatasetConfig
from rlhf_core.data.chat_rendering import ChatTemplate
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.named_templates import ANYWHERE, LAYOUTS, named_template
from rlhf_core.data.open_source import open_source
from rlhf_core.data.text_options import save_text_options
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.testing.tiny import tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
    {"role": "assistant", "content": "B"},
]
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n«B<|im_end|>»",
    "llama3": f"<s>{HEAD.format('system')}S<|eot_id|>{HEAD.format('user')}Q<|eot_id|>{HEAD.format('assistant')}«A<|eot_id|>»"
    f"{HEAD.format('user')}R<|eot_id|>{HEAD.format('assistant')}«B<|eot_id|>»",
    "gemma": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n«A<end_of_turn>»\n"
    "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n«B<end_of_turn>»",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n«A<|end|>»\n<|user|>\nR<|end|>\n<|assistant|>\n«B<|end|>»",
    "mistral": "<s>[INST] S\n\nQ [/INST]« A</s>»[INST] R [/INST]« B</s>»",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n«A</s>»\n<|user|>\nR</s>\n<|assistant|>\n«B</s>»",
    "vicuna": "<s>S\n\nUSER: Q ASSISTANT:« A</s>»USER: R ASSISTANT:« B</s>»",
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\n«A</s>»\n\n### Instruction:\nR\n\n### Response:\n«B</s>»",
}


def tokenizer(*control: str, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A byte tokenizer with `<s>`, an end token and these control tokens, and no template of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>", *control]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate([*special, *letters])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="</s>")


def of(name: str) -> PreTrainedTokenizerFast:
    return tokenizer(*LAYOUTS[name].tokens)


def encoded(name: str, messages, record: str = "sft"):
    encoder = Encoder(of(name), record, chat_template=name)
    (outcome,) = encoder.encode(list(open_source([{"messages": messages}]).rows()))
    return encoder, outcome


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_chat_is_rendered_and_every_answer_is_in_the_loss(name):
    encoder, outcome = encoded(name, MESSAGES)
    assert in_words(encoder.tokenizer, outcome.row) == [RENDERED[name]]
    assert outcome.notes == outcome.lost == outcome.set_aside == ()
    end = LAYOUTS[name].tokens[-1] if LAYOUTS[name].tokens else "</s>"
    assert encoder.template.stops == (encoder.tokenizer.convert_tokens_to_ids(end),)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_prompt_of_generation_begins_what_is_trained(name):
    asked, answered = encoded(name, MESSAGES[:2], "prompt")[1], encoded(name, MESSAGES[:3])[1]
    assert asked.row.prompt_ids == answered.row.prompt_ids


@pytest.mark.parametrize("name", LAYOUTS)
def test_turns_that_a_format_has_not_are_refused(name):
    called = [*MESSAGES[:3], {"role": "tool", "content": "T"}, MESSAGES[2]]
    if LAYOUTS[name].tools is not None:
        assert "T" in encoded(name, called)[0].tokenizer.decode(encoded(name, called)[1].row.responses[0])
        return
    with pytest.raises(DataError, match="has no turns of the role tool"):
        encoded(name, called)


def test_the_text_of_a_template_is_saved_with_the_model():
    kept = of("chatml")
    save_text_options(kept, DatasetConfig(chat_template="chatml"))
    assert kept.chat_template == named_template("chatml")
    assert kept.apply_chat_template(MESSAGES[1:2], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_rows_become_chats_by_name():
    rows = list(open_source([{"prompt": "Q", "response": "A"}]).rows())
    encoder = Encoder(of("alpaca"), "sft", chat_template="alpaca", wrap="chat")
    assert in_words(encoder.tokenizer, encoder.encode(rows)[0].row) == [
        "<s>### Instruction:\nQ\n\n### Response:\n«A</s>»"
    ]


TOOLS = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}}]
F, G = (json.dumps(tool) for tool in TOOLS)
CALLING = [
    {"role": "user", "content": "Q"},
    {
        "role": "assistant", "content": None,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"x": "<1>"}'}}],
    },
    {"role": "tool", "content": "5", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "A"},
]  # fmt: skip
HERMES = (
    f"You can call functions. These are described in JSON:\n<tools>\n{F}\n{G}\n</tools>\nWrite each call as JSON in a block of "
    'its own:\n<tool_call>\n{"name": NAME, "arguments": {NAME: VALUE}}\n</tool_call>'
)
LLAMA = (
    'You can call functions. To call one, answer with JSON and nothing else: {"name": NAME, "parameters": {NAME: VALUE}}'
    f"\n\n{F}\n\n{G}"
)
WITH_TOOLS = {
    "chatml": f"<|im_start|>system\n{HERMES}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n«<tool_call>\n"
    '{"name": "f", "arguments": {"x": "<1>"}}\n</tool_call><|im_end|>»\n<|im_start|>tool\n<tool_response>\n5\n</tool_response>'
    "<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»",
    "llama3": f"<s>{HEAD.format('system')}{LLAMA}<|eot_id|>{HEAD.format('user')}Q<|eot_id|>{HEAD.format('assistant')}"
    f'«{{"name": "f", "parameters": {{"x": "<1>"}}}}<|eot_id|>»{HEAD.format("ipython")}5<|eot_id|>{HEAD.format("assistant")}'
    "«A<|eot_id|>»",
    "mistral": f"<s>[AVAILABLE_TOOLS] [{F}, {G}][/AVAILABLE_TOOLS][INST] Q [/INST]«[TOOL_CALLS] "
    '[{"name": "f", "arguments": {"x": "<1>"}, "id": "abcdefghi"}]</s>»[TOOL_RESULTS] {"content": "5", "call_id": "abcdefghi"}'
    "[/TOOL_RESULTS]« A</s>»",
}


def with_tools(name: str, messages):
    encoder = Encoder(of(name), "sft", chat_template=name)
    return encoder, encoder.encode(list(open_source([{"messages": messages, "tools": TOOLS}]).rows()))[0]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_are_written_as_the_family_does(name):
    assert [name for name, layout in LAYOUTS.items() if layout.tools is not None] == list(WITH_TOOLS)
    encoder, outcome = with_tools(name, CALLING)
    assert in_words(encoder.tokenizer, outcome.row) == [WITH_TOOLS[name]]
    assert outcome.notes == outcome.lost == ()
    # Definitions stand behind a system message.
    said = in_words(*(lambda found: (found[0].tokenizer, found[1].row))(with_tools(name, [*MESSAGES[:1], *CALLING])))[0]
    between = "][/AVAILABLE_TOOLS][INST] S\n\nQ" if name == "mistral" else "S\n\nYou can call functions."
    assert between in said
    # Rows without tools are as they were.
    assert in_words(encoder.tokenizer, encoded(name, MESSAGES)[1].row) == [RENDERED[name]]


def test_mistral_defines_tools_before_the_last_question():
    encoder, outcome = with_tools("mistral", [*MESSAGES[1:3], *CALLING])
    (text,) = in_words(encoder.tokenizer, outcome.row)
    assert text.startswith("<s>[INST] Q [/INST]« A</s>»[AVAILABLE_TOOLS] [")
    assert any("isn't the prompt that generation would have" in note for note in outcome.notes)


def test_several_calls_and_the_text_before_them():
    calls = [{"function": {"name": name, "arguments": {}}} for name in "fg"]
    messages = [*CALLING[:1], {"role": "assistant", "content": "Hm.", "tool_calls": calls}]
    texts = {name: in_words(of(name), with_tools(name, messages)[1].row)[0] for name in ("chatml", "mistral")}
    call = '<tool_call>\n{{"name": "{}", "arguments": {{}}}}\n</tool_call>'
    assert texts["chatml"].endswith(f"«Hm.\n{call.format('f')}\n{call.format('g')}<|im_end|>»")
    assert texts["mistral"].endswith(
        '« Hm.[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</s>»'
    )
    with pytest.raises(DataError, match="the template `llama3` has turns of one call and no text beside it"):
        with_tools("llama3", messages)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in WITH_TOOLS])
def test_a_format_without_tools_says_what_it_leaves_out(name):
    assert "the chat template doesn't render the row's `tools`" in with_tools(name, MESSAGES)[1].lost
    calling = [CALLING[0], {**CALLING[1], "content": "Hm."}]
    assert "the chat template doesn't render `tool_calls`" in with_tools(name, calling)[1].lost


def test_what_a_tokenizer_lacks_is_said():
    with pytest.raises(ConfigError, match=r"lacks `<\|im_start\|>`, which") as caught:
        ChatTemplate(tokenizer("<|im_end|>"), "chatml")
    assert str(caught.value).endswith(
        'fix: a training adds them by `new_tokens: ["<|im_start|>"]`; or take a template that ends turns with the end token: '
        "mistral, zephyr, vicuna, alpaca"
    )
    assert ANYWHERE[0] == "mistral"
    with pytest.raises(ConfigError, match="no end token"):
        ChatTemplate(tokenizer(eos=None), "zephyr")
    ordinary = tokenizer("<|im_end|>")
    ordinary.add_tokens(["<|im_start|>"])
    with pytest.raises(ConfigError, match=r"`<\|im_start\|>` of the template `chatml` are ordinary tokens") as caught:
        ChatTemplate(ordinary, "chatml")
    assert 'fix: `dataset.special_tokens: ["<|im_start|>"]` lets every text write them, too' in str(caught.value)
    ChatTemplate(ordinary, "chatml", allowed=["<|im_start|>"])
    with pytest.raises(ConfigError, match="did you mean `chatml`"):
        ChatTemplate(tiny_tokenizer(), "chat-ml")
