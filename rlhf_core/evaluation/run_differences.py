"""What differs between two runs: options, versions and machine, data and models by their hashes, changes at resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf_core.config.fields import default_of, is_group, option_at
from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import TrainerConfig
from rlhf_core.config.yaml_file import flatten
from rlhf_core.evaluation.report.run_files import is_run_directory, read_mapping, read_yaml_mapping, require_readable
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.near_runs import near_run
from rlhf_core.infra.redact import redact

_HASH = 12
"""Characters of a SHA-256 that are shown."""


@dataclass(frozen=True)
class RunDifference:
    """One thing that two runs have with different values; None is one that a run doesn't have."""

    part: str
    """`options`, `data`, `models`, `rewards`, `versions` or `resumes`."""
    name: str
    first: Any
    second: Any

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"part": self.part, "name": self.name, "first": self.first, "second": self.second}


def run_differences(first: Path, second: Path) -> list[RunDifference]:
    """Return what differs between two runs, part by part, but for their directories.

    Raises:
        ConfigError: a directory isn't a run's.
    """
    parts = [_parts(path) for path in (first, second)]
    parts[0]["options"], parts[1]["options"] = _compared(parts[0]["options"], parts[1]["options"])
    found = []
    for part in parts[0]:
        one, other = parts[0][part], parts[1][part]
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) != other.get(name):
                found.append(RunDifference(part, name, one.get(name), other.get(name)))
    return found


def _parts(path: Path) -> dict[str, dict[str, Any]]:
    """Return what is compared of a run: part → name → value."""
    require_readable(path)
    if not is_run_directory(path):
        fix = near_run(path) or "give the directory that a run was started with as `--output`; `rlhf runs` lists them"
        raise ConfigError("is not a run's directory", place=str(path), fix=fix)
    notes: list[str] = []
    record = read_mapping(path / "run.json", notes)
    options = redact(read_yaml_mapping(path / "config.yaml", notes))
    return {
        "options": {name: value for name, value in options.items() if name != "output"},
        "data": _data(read_mapping(path / "data.json", notes)),
        "models": _models(read_mapping(path / "models.json", notes)),
        "rewards": _hashes(flatten(read_mapping(path / "rewards.json", notes))),
        "versions": _versions(record),
        "resumes": _resumes(record),
    }


def _compared(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of two runs by dotted names. A group that one of them lacks is one value: what isn't a default in it."""
    flat: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in dict.fromkeys([*first, *second]):
        dotted, one, other = f"{prefix}{name}", first.get(name), second.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = _compared(one, other, f"{dotted}.")
        else:
            inner = {dotted: _set_in(one, dotted)}, {dotted: _set_in(other, dotted)}
        flat[0].update(inner[0])
        flat[1].update(inner[1])
    return flat


def _set_in(value: Any, name: str) -> Any:
    """Return a value, of a group only what differs from its defaults."""
    if not isinstance(value, Mapping):
        return value
    options = (option_at(config, name) for config in (TrainerConfig, OnlineConfig))
    group = next((kind for option in options if option is not None for kind in option[1] if is_group(kind)), None)
    defaults: dict[str, Any] = {}
    for key, info in {} if group is None else group.model_fields.items():
        default = default_of(info)
        defaults[key] = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    return {key: one for key, one in value.items() if key not in defaults or one != defaults[key]}


def _data(reports: Mapping[str, Any]) -> dict[str, Any]:
    """Return the files of the data with their hashes, and how many rows were read and kept."""
    found: dict[str, Any] = {}
    for part, report in reports.items():
        if not isinstance(report, Mapping):
            continue
        found_files = report.get("files")
        files = found_files if isinstance(found_files, list) else []
        for number, file in enumerate(files, 1):
            if isinstance(file, Mapping):
                name = f"{part}: SHA-256" + (f" of file {number}" if len(files) > 1 else "")
                found[name] = str(file.get("sha256"))[:_HASH]
        for name in ("rows", "kept", "truncated", "template_sha256"):
            value = report.get(name)
            found[f"{part}: {name}"] = value[:_HASH] if isinstance(value, str) else value
    return found


def _models(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the files of every model with their hashes, and what the models are."""
    found: dict[str, Any] = {}
    for role, model in models.items():
        if not isinstance(model, Mapping):
            continue
        files = model.get("files")
        for name, value in files.items() if isinstance(files, Mapping) else ():
            found[f"{role}: {name}"] = str(value)[:_HASH]
        for name in ("architecture", "revision", "parameters", "trainable", "adapter"):
            found[f"{role}: {name}"] = model.get(name)
    return found


def _hashes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with hashes shortened."""
    return {
        name: value[:_HASH] if isinstance(value, str) and len(value) == 64 and name.endswith(("sha256", ".json")) else value
        for name, value in values.items()
    }  # fmt: skip


def _versions(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, the machine and the state of the source."""
    found: dict[str, Any] = {"rlhf-core": record.get("rlhf_core"), "processes": record.get("processes")}
    plugin = record.get("plugin")
    if isinstance(plugin, Mapping):
        found["method from"] = f"{plugin.get('distribution')} {plugin.get('version')}"
    for name in ("versions", "machine", "device", "threads", "git"):
        part = record.get(name)
        if isinstance(part, Mapping):
            found |= {key if name == "versions" else f"{name}: {key}": value for key, value in flatten(part).items()}
        elif part is not None:
            found[name] = part
    return found


def _resumes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what options a run changed when it was resumed, by step."""
    found = {}
    for change in record.get("changes") or []:
        options = change.get("options") if isinstance(change, Mapping) else None
        for name, values in options.items() if isinstance(options, Mapping) else ():
            if isinstance(values, Mapping):
                found[f"{name} after step {change.get('step')}"] = f"{values.get('before')} → {values.get('now')}"
    return found
