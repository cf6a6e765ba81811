"""Reasoning in a message, and the tags that open and close a block of it (`<think>…</think>`, `[THINK]…[/THINK]` …)."""

from __future__ import annotations

import re

_REASONING = ("reasoning_content", "reasoning", "thinking")
_NAMES = "think|thinking|thought|reasoning"
OPENS = re.compile(rf"\s*(?:<((?:\w+:)?(?:{_NAMES}))>|\[(THINK)\]|◁(think)▷|<\|START_(THINKING)\|>)\s*", re.IGNORECASE)
CLOSES = re.compile(rf"</(?:\w+:)?(?:{_NAMES})>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>", re.IGNORECASE)


def reasoning_of(message: dict[str, object]) -> tuple[str, str]:
    """Return the key of a message that holds its reasoning (`content` where it is in tags), and the reasoning; "" for none."""
    for key in _REASONING:
        if isinstance(value := message.get(key), str) and value.strip():
            return key, value
    content = str(message["content"])
    closing = CLOSES.search(content)
    if closing is None:
        return "content", ""
    said = content[: closing.start()]
    opened = OPENS.match(said)
    return "content", (said[opened.end() :] if opened else said).strip()


def closing_tag(opener: str) -> str | None:
    """Return the tag that closes the think block which `opener` opens; None where `opener` isn't such a tag."""
    opened = OPENS.fullmatch(opener)
    if opened is None:
        return None
    tag = opener.strip()
    if tag.startswith("<|"):
        return tag.replace("START", "END")
    return f"{tag[0]}/{tag[1:]}"
