"""Chat templates by name (`dataset.chat_template: chatml`): the formats that base models are most often trained to chat in.

They write text turns alone: tools and tool calls are left to the templates of models that know them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

_EOS = "\0"
"""Stands for the tokenizer's end token in a layout."""


@dataclass(frozen=True)
class ChatLayout:
    """What stands around the contents of a chat's turns; `{}` is a content."""

    user: str
    assistant: str
    """After the generation prompt, with which it begins."""
    system: str | None
    """None puts the system message before the first question, with an empty line between them."""
    answer: str
    """The generation prompt: the beginning of an assistant's turn."""
    tool: str | None = None
    """None where the format has no turns of tools."""
    bos: bool = False
    """Whether the chat begins with the beginning token."""
    tokens: tuple[str, ...] = ()
    """Control tokens that it is made of, which the tokenizer must have beside its end token."""


LAYOUTS: dict[str, ChatLayout] = {
    "chatml": ChatLayout(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n",
        assistant="<|im_start|>assistant\n{}<|im_end|>\n",
        tool="<|im_start|>tool\n{}<|im_end|>\n",
        answer="<|im_start|>assistant\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": ChatLayout(
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        tool="<|start_header_id|>ipython<|end_header_id|>\n\n{}<|eot_id|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        bos=True,
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": ChatLayout(
        system=None,
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        assistant="<start_of_turn>model\n{}<end_of_turn>\n",
        answer="<start_of_turn>model\n",
        bos=True,
        tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi3": ChatLayout(
        system="<|system|>\n{}<|end|>\n",
        user="<|user|>\n{}<|end|>\n",
        assistant="<|assistant|>\n{}<|end|>\n",
        answer="<|assistant|>\n",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "mistral": ChatLayout(system=None, user="[INST] {} [/INST]", assistant=f" {{}}{_EOS}", answer="", bos=True),
    "zephyr": ChatLayout(
        system=f"<|system|>\n{{}}{_EOS}\n",
        user=f"<|user|>\n{{}}{_EOS}\n",
        assistant=f"<|assistant|>\n{{}}{_EOS}\n",
        answer="<|assistant|>\n",
    ),
    "vicuna": ChatLayout(
        system="{}\n\n", user="USER: {} ", assistant=f"ASSISTANT: {{}}{_EOS}", answer="ASSISTANT:", bos=True
    ),
    "alpaca": ChatLayout(
        system="{}\n\n",
        user="### Instruction:\n{}\n\n",
        assistant=f"### Response:\n{{}}{_EOS}\n\n",
        answer="### Response:\n",
        bos=True,
    ),
}
"""Name → layout. The first four need control tokens of their own; the others end turns with the tokenizer's end token."""

ANYWHERE = tuple(name for name, layout in LAYOUTS.items() if not layout.tokens)
"""Names of those that any tokenizer with an end token can write."""


def named_template(name: str) -> str:
    """Return the Jinja text of the template of that name, a key of `LAYOUTS`."""
    layout = LAYOUTS[name]
    begin = "{{ bos_token if bos_token is defined and bos_token else '' }}" if layout.bos else ""
    turns = [("user", _turn(layout.user, "opening.text + message['content']"))]
    turns.append(("assistant", _turn(layout.assistant, "message['content']")))
    if layout.tool is not None:
        turns.append(("tool", _turn(layout.tool, "message['content']")))
    if layout.system is not None:
        turns.append(("system", _turn(layout.system, "message['content']")))
    else:
        turns.append(("system", "{% set opening.text = message['content'] + '\\n\\n' %}"))
    cases = "".join(
        f"{{% {'elif' if number else 'if'} message['role'] == '{role}' %}}{text}"
        + ("{% set opening.text = '' %}" if role == "user" else "")
        for number, (role, text) in enumerate(turns)
    )
    refusal = f"raise_exception('the template `{name}` has no turns of the role ' + message['role'])"
    unknown = f"{{% else %}}{{{{ {refusal} }}}}{{% endif %}}"
    answer = f"{{% if add_generation_prompt %}}{{{{ {_quoted(layout.answer)} }}}}{{% endif %}}"
    return (
        "{% set opening = namespace(text='') %}"
        + begin
        + f"{{% for message in messages %}}{cases}{unknown}{{% endfor %}}"
        + (answer if layout.answer else "")
    )


def _turn(layout: str, content: str) -> str:
    """Return the Jinja text of one turn."""
    before, after = layout.split("{}")
    parts = [_quoted(before)] if before else []
    parts.append(content)
    text, end, rest = after.partition(_EOS)
    parts += [*([_quoted(text)] if text else []), *(["eos_token"] if end else []), *([_quoted(rest)] if rest else [])]
    return "{{ " + " + ".join(parts) + " }}"


def _quoted(text: str) -> str:
    """Return a text as Jinja writes it."""
    return json.dumps(text)
