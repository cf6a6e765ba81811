"""Fingerprints: what a stage was made from, by content, so that a finished stage is skipped and a changed one is known."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.config.yaml_file import flatten
from rlhf_core.data.open_source import matching_files
from rlhf_core.infra.errors import RLHFError
from rlhf_core.infra.files import sha256_of
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.infra.redact import redact
from rlhf_core.pipeline.stage import Find, Stage

_ALWAYS = ("data", "eval_data", "model", "path", "base", "prompts")
"""Keys whose texts are paths wherever they exist, even without a separator or an ending."""


def made_from(stage: Stage, find: Find) -> dict[str, Any]:
    """Return what decides a stage's result, as JSON values: `options`, `method`, `files` and `products` by their content.

    Args:
        find: gives the paths of products, which exist.
    """
    options = redact(stage.identity())
    files = contents(options)
    products = {str(one): content_of(Path(find(one.stage, one.product))) for one in stage.references}
    plugin = stage.plugin
    method = None if plugin is None else f"{plugin.qualified} {plugin.version}"
    return {"options": options, "method": method, "files": files, "products": products}


def contents(options: Any) -> dict[str, str]:
    """Return the path of each file, model, folder or pattern that some options name → the digest of its content."""
    return {text: digest for text in sorted(named_paths(options)) if (digest := content_of(Path(text).expanduser()))}


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what `made_from` returned."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between what a stage was made from and what it would be made from now, one text each."""
    old, new = flatten(before.get("options", {})), flatten(now["options"])
    found = [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if before.get("method") != now["method"]:
        found.append(f"method: {before.get('method')} → {now['method']}")
    for group, what in (("files", "the content of {}"), ("products", "what {} stands for")):
        was, is_now = before.get(group, {}), now[group]
        # A path that is new is among the options already.
        found += [what.format(key) for key in sorted(was.keys() & is_now.keys()) if was[key] != is_now[key]]
    return found


def content_of(path: Path) -> str | None:
    """Return a digest of the content of a file, a model, a folder, or the files of a pattern; None where there is none."""
    if path.is_file():
        return sha256_of(path).sha256
    if not path.is_dir():
        matching = {str(file): sha256_of(file).sha256 for file in matching_files(path)}
        return fingerprint(matching) if matching else None
    try:
        hashes = file_hashes(str(path)) if _is_model(path) else _folder(path)
    except RLHFError:  # an adapter whose base is gone
        hashes = _folder(path)
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _folder(path: Path) -> dict[str, str]:
    """Return name → SHA-256 of the files in a folder that aren't hidden."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(path)): sha256_of(file).sha256 for file in files}


def named_paths(value: Any, key: str = "") -> Iterator[str]:
    """Yield the texts among some options that may be paths: of a function in a file, the file."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from named_paths(one, str(name))
    elif isinstance(value, list):
        for one in value:
            yield from named_paths(one, key)
    elif isinstance(value, str) and len(value) < 4096 and "\0" not in value:
        file = value.partition(".py:")[0] + ".py" if ".py:" in value else value
        if key in _ALWAYS or os.sep in file or Path(file).suffix:
            yield file
