"""Relative paths in a configuration file: looked for in the working directory first, then beside the file.

Importing this imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.infra.found_paths import exists_or_matches, note_search

_PATHS = frozenset(
    (
        "data",
        "eval_data",
        "model",
        "models",
        "path",
        "base",
        "base_model",
        "teacher",
        "prompts",
        "suites",
        "preferences",
    )
) | {"compressor", "chat_template", "fisher", "replay", "include_path"}
"""Keys whose texts are paths wherever they exist, even without a separator or an ending."""
_OTHER = frozenset(
    ("output", "method", "kind", "name", "columns", "push_to_hub", "new_tokens", "special_tokens", "stop", "freeze")
)
"""Keys whose texts aren't paths of what is read."""


def find_beside(values: Mapping[str, Any], file: str | Path, *, names: Collection[str] = ()) -> dict[str, Any]:
    """Return a file's values in which each path that exists beside the file, but not in the working directory, leads there.

    Where nothing of a name exists at either place, the value stays, and the message that it can't be read says where it was
    looked for (`rlhf_core.infra.found_paths`). The paths in what a run recorded of itself stay as they are: they started at
    the directory where it ran, and its own files beside them aren't meant.

    Args:
        names: what stands for something else wherever it is written, such as the stages of a recipe.
    """
    folder = Path(file).parent
    if (folder / "run.json").is_file():
        return dict(values)
    return {key: _found(value, str(key), folder, names) for key, value in values.items()}


def _found(value: Any, key: str, folder: Path, names: Collection[str]) -> Any:
    if key in _OTHER:
        return value
    if isinstance(value, Mapping):
        return {name: _found(one, str(name), folder, names) for name, one in value.items()}
    if isinstance(value, list):
        return [_found(one, key, folder, names) for one in value]
    if not isinstance(value, str) or value in names or not _may_be_path(value, key):
        return value
    # Of a function in a file, the file: `rewards.py:score`.
    path, colon, function = value.partition(".py:")
    name = path + ".py" if colon else value
    if Path(name).is_absolute() or exists_or_matches(name):
        return value
    beside = os.path.normpath(folder / name)
    if exists_or_matches(beside):
        return f"{beside}:{function}" if colon else beside
    note_search(name, folder)
    return value


def _may_be_path(text: str, key: str) -> bool:
    if not text or len(text) > 1000 or not text.isprintable() or "://" in text or "${" in text:
        return False
    return key in _PATHS or "/" in text or os.sep in text or bool(Path(text.partition(":")[0]).suffix)
