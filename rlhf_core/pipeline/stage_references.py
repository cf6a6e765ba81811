"""References of a stage to what earlier stages make: `${stages.NAME.model}` in a text, or the bare name where a model stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TEXT = re.compile(r"\$\{\s*stages\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_]+)\s*\}")
_ANY = re.compile(r"\$\{[^}]*\}?")
MODEL, ROWS = "model", "rows"
_MODELS = ("path", "model", "compressor")
"""Keys of a group that are models."""


@dataclass(frozen=True)
class StageReference:
    """What a stage takes from an earlier one."""

    stage: str
    product: str
    """`model`, `model_ROLE` of a method that trains several, or `rows`."""
    key: str
    """The dotted key in whose value it stands."""

    def __str__(self) -> str:
        return written(self.stage, self.product)


def written(stage: str, product: str = MODEL) -> str:
    """Return the text of a reference."""
    return f"${{stages.{stage}.{product}}}"


def spelled_out(value: Any, names: Collection[str]) -> Any:
    """Return a value in which the bare name of a stage, alone, in a list, or as a model of a group, is a reference."""
    if isinstance(value, str):
        return written(value) if value in names else value
    if isinstance(value, list):
        return [spelled_out(one, names) for one in value]
    if isinstance(value, Mapping):
        return {key: spelled_out(one, names) if key in _MODELS else one for key, one in value.items()}
    return value


def references(value: Any, key: str = "") -> Iterator[StageReference]:
    """Yield the references in a value's texts, those in groups and lists too."""
    if isinstance(value, str):
        for stage, product in _TEXT.findall(value):
            yield StageReference(stage, product, key)
    for part, one in _items(value):
        yield from references(one, f"{key}.{part}" if key else str(part))


def malformed(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the text of each `${…}` that is no reference."""
    if isinstance(value, str):
        yield from ((key, text) for text in _ANY.findall(_TEXT.sub("", value)))
    for part, one in _items(value):
        yield from malformed(one, f"{key}.{part}" if key else str(part))


def resolved(value: Any, find: Callable[[str, str], str]) -> Any:
    """Return a value with each reference replaced by what `find(stage, product)` returns."""
    if isinstance(value, str):
        return _TEXT.sub(lambda match: find(match[1], match[2]), value)
    if isinstance(value, list):
        return [resolved(one, find) for one in value]
    if isinstance(value, Mapping):
        return {key: resolved(one, find) for key, one in value.items()}
    return value


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a group or list with their keys or numbers."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
