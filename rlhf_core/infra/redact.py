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
_PARAMETER = re.compile(
    r"(?<=[?&])([\w.%-]*(?:token|secret|password|passwd|key|credentials?|signature|sig)=)[^\s&#'\"]+", re.IGNORECASE
)
"""A secret among the parameters of an address."""


_VARIABLE = re.compile(r"(token|secret|passw(or)?d|passphrase|(^|_)pass|_key|credentials?)$", re.IGNORECASE)
"""How names of environment variables end that hold secrets."""
_SPECIAL_TOKEN = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")
"""A text that stands for a token of a model, such as `<|end|>`: `STOP_TOKEN` is the name of one, and no secret."""
_REMEMBERED: set[str] = set()


def remember_secret(name: str, value: str) -> None:
    """Note the value of an environment variable whose name is that of a secret, so that it is redacted wherever it stands."""
    if len(value) >= 4 and _VARIABLE.search(name) and not _SPECIAL_TOKEN.fullmatch(value):
        _REMEMBERED.add(value)


def redact_text(text: str) -> str:
    """Return the text without access tokens, keys and passwords, found by their form or after a key or flag that names one."""
    text = _redact_form(text)
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
        return _redact_form(value)
    return value


def secret_parameter(address: str) -> str | None:
    """Return the name of the first parameter of an address that holds a secret, judged by the name; None without one."""
    found = _PARAMETER.search(address)
    return None if found is None else found.group(1).removesuffix("=")


def _redact_form(text: str) -> str:
    """Return the text without the secrets that are recognised by their form, or by their place in an address."""
    for secret in sorted(_REMEMBERED, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    text = _USERINFO.sub(REDACTED, _VALUES.sub(REDACTED, text))
    return _PARAMETER.sub(lambda match: match.group(1) + REDACTED, text)


def redact_part_of(secret: str, text: str, least: int = 8) -> str:
    """Return the text without any `least` or more characters in a row that the secret holds in this order."""
    parts = {secret[start : start + least] for start in range(len(secret) - least + 1)}
    kept, start, at = [], 0, 0
    while at <= len(text) - least:
        if text[at : at + least] not in parts:
            at += 1
            continue
        end = at + least
        while end < len(text) and text[end - least + 1 : end + 1] in parts:
            end += 1
        kept += [text[start:at], REDACTED]
        start = at = end
    return "".join(kept) + text[start:]
