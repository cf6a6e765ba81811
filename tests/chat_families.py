"""Chat templates of the forms that model families have, written for tests, with tokenizers that know their control tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A template, and what of a conversation is in the loss."""

    template: str
    special: tuple[str, ...]
    eos: str
    turn: str
    """An earlier answer `{}` with its stop."""
    last: str
    """The last answer with its stop."""
    thought: str | None = None
    """The last answer `{a}` behind the reasoning `{r}`, as the model writes both; None where the template has no place for it."""
    added: tuple[str, ...] = ()
    """Tokens of their own that are not special."""
    call: str | None = None
    """A call of `f` with the argument `{"x": 1}` and its stop; None where the template renders none."""
    keeps_thoughts: bool = False
    """Whether earlier turns keep their reasoning."""
    bos: str | None = None
    trims: str = ""
    """What the template strips from a content: `both` sides of every one, or the blank lines that the `last` begins with."""
    takes_tools: bool = True
    """Whether the template renders what may be called."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        names = dict.fromkeys((*self.special, self.eos, *([self.bos] if self.bos else [])))
        backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in self.added])
        tokenizer.eos_token = tokenizer.pad_token = self.eos
        if self.bos:
            tokenizer.bos_token = self.bos
        tokenizer.chat_template = self.template
        return tokenizer


_CALLS_AS_XML = (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
)

CHATML = Family(
    template=(
        "{%- if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
        "{% endif %}# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{{ '<|im_end|>\n' }}"
        "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}"
        + _CALLS_AS_XML
        + "{{ '<|im_end|>\n' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{% elif m.role == 'user' or not loop.first %}{{ '<|im_start|>' + m.role + '\n' "
        "+ m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    special=("<|im_start|>", "<|endoftext|>"),
    added=("<tool_call>", "</tool_call>"),
    eos="<|im_end|>",
    turn="{}<|im_end|>",
    last="{}<|im_end|>",
    call='<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
)

QWEN3 = Family(
    template=(
        "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endif %}{% set ns = namespace(asked=messages|length - 1, found=false) %}"
        "{% for m in messages[::-1] %}{% if not ns.found and m.role == 'user' and not m.content.startswith('<tool_response>') %}"
        "{% set ns.found = true %}{% set ns.asked = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}"
        "{% if m.role in ('user', 'system') %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{% else %}{% set said = namespace(text=m.content, thought='') %}"
        "{% if m.reasoning_content is string %}{% set said.thought = m.reasoning_content %}"
        "{% elif '</think>' in m.content %}"
        "{% set said.thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set said.text = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > ns.asked and (loop.last or said.thought) %}"
        "{{ '<think>\n' + said.thought.strip('\n') + '\n</think>\n\n' + said.text.lstrip('\n') }}"
        "{% else %}{{ said.text }}{% endif %}" + _CALLS_AS_XML + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    special=("<|im_start|>", "<|endoftext|>"),
    added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
    trims="last",
    eos="<|im_end|>",
    turn="{}<|im_end|>",
    last="<think>\n\n</think>\n\n{}<|im_end|>",
    thought="<think>\n{r}\n</think>\n\n{a}<|im_end|>",
    call='<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
)

# The prompt opens the block, and the whole has it too: Qwen3's reasoning models of 2025.
QWEN3_THINKING = Family(
    template=QWEN3.template.replace(
        "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
    special=QWEN3.special,
    added=QWEN3.added,
    trims="last",
    eos="<|im_end|>",
    turn="{}<|im_end|>",
    last="\n</think>\n\n{}<|im_end|>",
    thought="{r}\n</think>\n\n{a}<|im_end|>",
)

LLAMA3 = Family(
    template=(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}"
        "{% else %}{% set first = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n' + first + '<|eot_id|>' }}"
        "{% if tools %}{{ '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n' }}"
        "{% for t in tools %}{{ t | tojson(indent=4) }}"
        "{% endfor %}{{ messages[0].content | trim + '<|eot_id|>' }}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% if m.tool_calls %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
        "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}"
        "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
        "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    special=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    bos="<|begin_of_text|>",
    trims="both",
    eos="<|eot_id|>",
    turn="{}<|eot_id|>",
    last="{}<|eot_id|>",
    call='{"name": "f", "parameters": {"x": 1}}<|eot_id|>',
)

MISTRAL = Family(
    template=(
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set turns = messages[1:] %}{% else %}"
        "{% set turns = messages %}{% endif %}{% set ns = namespace(last=0) %}"
        "{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
        "{% for m in turns %}{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        "{% if loop.index0 == ns.last and first is defined %}{{ '[INST]' + first + '\n\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
        "{% endfor %}{{ ']' + eos_token }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]{\"content\": ' + m.content + '}[/TOOL_RESULTS]' }}"
        "{% else %}{{ raise_exception('only user, assistant and tool may follow') }}{% endif %}{% endfor %}"
    ),
    special=(
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    bos="<s>",
    eos="</s>",
    turn="{}</s>",
    last="{}</s>",
    call='[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]</s>',
)

DEEPSEEK_R1 = Family(
    template=(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.tool_calls %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}{% for c in m.tool_calls %}"
        "{{ '<｜tool▁call▁begin｜>' + c.function.name + '\n' + c.function.arguments + '<｜tool▁call▁end｜>' }}{% endfor %}"
        "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
        "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
        "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
    special=(
        "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ),
    added=("<think>", "</think>"),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    turn="{}<｜end▁of▁sentence｜>",
    last="{}<｜end▁of▁sentence｜>",
    thought="{r}\n</think>\n\n{a}<｜end▁of▁sentence｜>",
    call=(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f\n"
        '{"x": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    ),
    takes_tools=False,
)  # fmt: skip

PHI3 = Family(
    template=(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos="<|endoftext|>",
    turn="{}<|end|>",
    last="{}<|end|>\n<|endoftext|>",
)

GPT_OSS = Family(
    template=(
        "{{ '<|start|>system<|message|>You are a model.\nChannels: analysis, commentary, final.<|end|>' }}"
        "{% if messages[0].role == 'system' or tools %}{{ '<|start|>developer<|message|>' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for t in tools or [] %}{{ 'type ' + t.function.name }}{% endfor %}{{ '<|end|>' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
        "{% elif m.role == 'tool' %}{{ '<|start|>functions.f to=assistant<|channel|>commentary<|message|>' "
        "+ m.content + '<|end|>' }}"
        "{% elif m.role == 'assistant' %}{% if m.tool_calls %}"
        "{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}"
        "{% elif loop.last and not add_generation_prompt %}"
        "{% if m.thinking is defined %}{{ '<|start|>assistant<|channel|>analysis<|message|>' "
        "+ m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
        "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|endoftext|>"),
    eos="<|return|>",
    turn="<|channel|>final<|message|>{}<|end|>",
    last="<|channel|>final<|message|>{}<|return|>",
    thought="<|channel|>analysis<|message|>{r}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|return|>",
    call=' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>',
)

GLM4 = Family(
    template=(
        "[gMASK]<sop>{% if tools %}{{ '<|system|>\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
        "{% elif m.tool_calls %}{{ '<|assistant|>' + m.tool_calls[0].function.name + '\n' }}"
        "{{ m.tool_calls[0].function.arguments | tojson }}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    eos="<|endoftext|>",
    turn="\n{}<|user|>",
    last="\n{}<|user|>",
    call='f\n{"x": 1}<|observation|>',
)

# A word is not a control token here: OLMo's roles are plain text.
OLMO = Family(
    template=(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    special=(),
    bos="<|startoftext|>",
    eos="<|endoftext|>",
    turn="{}",
    last="{}<|endoftext|>",
)

OLMO2 = Family(
    template=(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% if not (m.role == 'assistant' and loop.last) %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    special=(),
    bos="<|endoftext|>",
    eos="<|endoftext|>",
    turn="{}<|endoftext|>",
    last="{}<|endoftext|>",
)

GEMMA = Family(
    template=(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set turns = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    special=("<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    trims="both",
    eos="<eos>",
    turn="{}<end_of_turn>",
    last="{}<end_of_turn>",
)

# Tags say what is in the loss, here all but the newline that ends a turn; reasoning is kept in every turn.
TAGGED = Family(
    template=(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    special=("<|im_start|>",),
    added=("<think>", "</think>"),
    eos="<|im_end|>",
    turn="{}<|im_end|>",
    last="{}<|im_end|>",
    thought="<think>{r}</think>{a}<|im_end|>",
    keeps_thoughts=True,
)

FAMILIES = {
    "ChatML": CHATML,
    "Qwen3": QWEN3,
    "Qwen3-thinking": QWEN3_THINKING,
    "Llama-3": LLAMA3,
    "Mistral": MISTRAL,
    "DeepSeek-R1": DEEPSEEK_R1,
    "Phi-3": PHI3,
    "gpt-oss": GPT_OSS,
    "GLM-4": GLM4,
    "OLMo": OLMO,
    "OLMo-2": OLMO2,
    "Gemma": GEMMA,
    "generation tags": TAGGED,
}
