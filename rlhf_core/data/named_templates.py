"""Chat templates by name (`dataset.chat_template: chatml`): the formats that base models are most often trained to chat in.

Those of families that document a format of tools write a row's `tools`, calls and results in it; the others write text alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

_EOS = "\0"
"""Stands for the tokenizer's end token in a layout."""


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes definitions of tools, calls and results: parts of a Jinja template."""

    definitions: str
    """All of `tools`."""
    calls: str
    """All of `message.tool_calls`, behind the turn's text."""
    result: str
    """The turn of a tool."""
    in_system: bool = True
    """Whether definitions stand behind the system message, in a turn of their own where there is none; else before the last
    question."""


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
    tools: ToolFormat | None = None
    """None where the format has no tools."""
    bos: bool = False
    """Whether the chat begins with the beginning token."""
    tokens: tuple[str, ...] = ()
    """Control tokens that it is made of, which the tokenizer must have beside its end token."""


def _call(arguments: str, *, more: str = "") -> str:
    """Return the Jinja text of one call as JSON, with its arguments under that name."""
    return (
        "{% set function = call.function if call.function is defined else call %}"
        '{"name": {{ function.name | tojson }}, '
        f'"{arguments}": {{{{ function.arguments | default({{}}) | tojson }}}}{more}}}'
    )


# Nous Research's format of ChatML (Hermes 2 Pro and 3), which Qwen 2.5 shares but for the role of results.
_HERMES = ToolFormat(
    definitions=(
        "{{ 'You can call functions. These are described in JSON:\\n<tools>\\n' }}"
        "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
        "{{ '</tools>\\nWrite each call as JSON in a block of its own:\\n<tool_call>\\n' }}"
        """{{ '{"name": NAME, "arguments": {NAME: VALUE}}\\n</tool_call>' }}"""
    ),
    calls=(
        "{% for call in message.tool_calls %}{{ '\\n' if message.content or not loop.first else '' }}"
        "{{ '<tool_call>\\n' }}" + _call("arguments") + "{{ '\\n</tool_call>' }}{% endfor %}"
    ),
    result="{{ '<|im_start|>tool\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}",
)

# Meta's "JSON based tool calling" of Llama 3.1 and later: one call in a turn, which is its whole text.
_LLAMA = ToolFormat(
    definitions=(
        "{{ 'You can call functions. To call one, answer with JSON and nothing else: ' }}"
        """{{ '{"name": NAME, "parameters": {NAME: VALUE}}\\n\\n' }}"""
        "{% for tool in tools %}{{ ('' if loop.first else '\\n\\n') + tool | tojson }}{% endfor %}"
    ),
    calls=(
        "{% if message.tool_calls | length > 1 or message.content %}"
        "{{ raise_exception('the template `llama3` has turns of one call and no text beside it') }}{% endif %}"
        "{% for call in message.tool_calls %}" + _call("parameters") + "{% endfor %}"
    ),
    result="{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}",
)

# Mistral's third version of its format.
_MISTRAL = ToolFormat(
    definitions=(
        "{{ '[AVAILABLE_TOOLS] [' }}{% for tool in tools %}{{ ('' if loop.first else ', ') + tool | tojson }}{% endfor %}"
        "{{ '][/AVAILABLE_TOOLS]' }}"
    ),
    calls=(
        "{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}{{ '' if loop.first else ', ' }}"
        + _call("arguments", more='{% if call.id is defined %}, "id": {{ call.id | tojson }}{% endif %}')
        + "{% endfor %}{{ ']' }}"
    ),
    result=(
        """{{ '[TOOL_RESULTS] {"content": ' + message['content'] | tojson }}"""
        """{% if message.tool_call_id is defined %}{{ ', "call_id": ' + message.tool_call_id | tojson }}{% endif %}"""
        "{{ '}[/TOOL_RESULTS]' }}"
    ),
    in_system=False,
)

LAYOUTS: dict[str, ChatLayout] = {
    "chatml": ChatLayout(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n",
        assistant="<|im_start|>assistant\n{}<|im_end|>\n",
        tools=_HERMES,
        answer="<|im_start|>assistant\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": ChatLayout(
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        tools=_LLAMA,
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
    "mistral": ChatLayout(
        system=None, user="[INST] {} [/INST]", assistant=f" {{}}{_EOS}", answer="", bos=True, tools=_MISTRAL
    ),
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

CONTROL_TOKENS = frozenset(token for layout in LAYOUTS.values() for token in layout.tokens)
"""All control tokens that templates by name are made of."""


def named_template(name: str) -> str:
    """Return the Jinja text of the template of that name, a key of `LAYOUTS`."""
    layout = LAYOUTS[name]
    cases = "".join(
        f"{{% {'elif' if number else 'if'} message['role'] == '{role}' %}}{text}"
        for number, (role, text) in enumerate(_turns(layout))
    )
    refusal = f"raise_exception('the template `{name}` has no turns of the role ' + message['role'])"
    unknown = f"{{% else %}}{{{{ {refusal} }}}}{{% endif %}}"
    answer = f"{{% if add_generation_prompt %}}{{{{ {_quoted(layout.answer)} }}}}{{% endif %}}"
    return (
        "{% set opening = namespace(text='') %}"
        + _definitions(layout)
        + ("{{ bos_token if bos_token is defined and bos_token else '' }}" if layout.bos else "")
        + _definitions_alone(layout)
        + f"{{% for message in messages %}}{cases}{unknown}{{% endfor %}}"
        + (answer if layout.answer else "")
    )


def _turns(layout: ChatLayout) -> list[tuple[str, str]]:
    """Return the Jinja text of a turn by its role."""
    tools, content = layout.tools, "message['content']"
    asked = _turn(layout.user, f"opening.text + {content}") + "{% set opening.text = '' %}"
    if tools is not None and not tools.in_system:
        asked = "{% if loop.index0 == last.question %}{{ definitions }}{% endif %}" + asked
    turns = [("user", asked), ("assistant", _answer(layout))]
    if tools is not None:
        turns.append(("tool", tools.result))
    if layout.system is None:
        turns.append(("system", f"{{% set opening.text = {content} + '\\n\\n' %}}"))
    else:
        defined = " + ('\\n\\n' + definitions if definitions and loop.first else '')" if tools is not None else ""
        turns.append(("system", _turn(layout.system, content + defined)))
    return turns


def _answer(layout: ChatLayout) -> str:
    """Return the Jinja text of an assistant's turn, calls of tools included."""
    content = "message['content']"
    if layout.tools is None:
        return _turn(layout.assistant, content)
    # What stands before an answer's text (a blank, in some formats) doesn't stand before calls.
    before, after = layout.assistant.split("{}")
    lead = before.removeprefix(layout.answer)
    calls = f"{{% set calls %}}{{% if message.tool_calls %}}{layout.tools.calls}{{% endif %}}{{% endset %}}"
    text = f"(({_quoted(lead)} if {content} or not calls else '') + ({content} or '') + calls)"
    return calls + _turn(f"{layout.answer}{{}}{after}", text)


def _definitions(layout: ChatLayout) -> str:
    """Return the Jinja text that sets `definitions`, empty without tools, and where they stand."""
    if layout.tools is None:
        return ""
    text = f"{{% set definitions %}}{{% if tools %}}{layout.tools.definitions}{{% endif %}}{{% endset %}}"
    if layout.tools.in_system:
        return text
    last = "{% if message['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    return f"{text}{{% set last = namespace(question=0) %}}{{% for message in messages %}}{last}{{% endfor %}}"


def _definitions_alone(layout: ChatLayout) -> str:
    """Return the Jinja text of a system turn of definitions, where the chat has no system message."""
    if layout.tools is None or not layout.tools.in_system or layout.system is None:
        return ""
    missing = "definitions and messages[0]['role'] != 'system'"
    return f"{{% if {missing} %}}{_turn(layout.system, 'definitions')}{{% endif %}}"


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
