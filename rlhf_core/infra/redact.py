"""Remove secrets from text and configurations before they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

_KEY = re.compile(r"(^|[_.-])(token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)
_VALUES = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,})"
)
_USERINFO = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_FLAG = re.compile(
    r"((?:^|\s)(?:--?)?[\w.-]*(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|credentials?)(?:=|:[ \t]*|[ \t]+))"
    r"('[^']*'|\"[^\"]*\"|[^\s'\"]+)",
    re.IGNORECASE | re.MULTILINE,
)


def redact_text(text: str) -> str:
    """Return the text without access tokens, keys and passwords, found by their form or after a key or flag that names one."""
    text = _USERINFO.sub(REDACTED, _VALUES.sub(REDACTED, text))
    return _FLAG.sub(lambda match: match.group(1) + REDACTED, text)


def redact(value: Any, key: str = "") -> Any:
    """Return JSON values with every secret replaced, found by its form or by the name of its key; `key` is the value's own."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        if value and _KEY.search(key):
            return REDACTED
        return _USERINFO.sub(REDACTED, _VALUES.sub(REDACTED, value))
    return value
