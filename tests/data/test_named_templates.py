"""Chat templates by name: what each renders, what is in the loss, and what it needs of a tokenizer."""

from __future__ import annotations

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
    if LAYOUTS[name].tool is not None:
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


def test_what_a_tokenizer_lacks_is_said():
    with pytest.raises(ConfigError, match=r"lacks `<\|im_start\|>`, `<\|im_end\|>`") as caught:
        ChatTemplate(tiny_tokenizer(), "chatml")
    assert "mistral, zephyr, vicuna, alpaca" in str(caught.value) and ANYWHERE[0] == "mistral"
    with pytest.raises(ConfigError, match="no end token"):
        ChatTemplate(tokenizer(eos=None), "zephyr")
    with pytest.raises(ConfigError, match="did you mean `chatml`"):
        ChatTemplate(tiny_tokenizer(), "chat-ml")
