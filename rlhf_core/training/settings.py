"""What a run was asked to do, as plain values: written beside it, and compared when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core import registry
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.sources import data_files
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.redact import redact

MAY_CHANGE = ("output", "logging", "checkpoint", "distributed", "micro_batch_size", "batching.micro_batch_tokens")
"""Options that a resumed run may change. None of them changes what is learned, beyond rounding."""


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the run's settings in the shape of a configuration file, secrets redacted."""
    plugin = run_plugin(trainer)
    settings: dict[str, Any] = {
        "method": plugin["name"] if "name" in plugin else plugin["target"],
        "model": _source(trainer.model),
        "data": _source(trainer.data),
        "eval_data": None if trainer.eval_data is None else _source(trainer.eval_data),
        "output": None if trainer.output is None else str(trainer.output),
    }
    return redact({**settings, **trainer.config.model_dump(mode="json")})


def run_inputs(trainer: Trainer) -> Mapping[str, Any]:
    """Return what the command line noted on the trainer: `config_input` (text), `command` (text) and `plugin`."""
    return getattr(trainer, "run_inputs", None) or {}


def run_plugin(trainer: Trainer) -> dict[str, Any]:
    """Return where the method comes from: what the command line noted, else its entry point, else its class alone."""
    if noted := run_inputs(trainer).get("plugin"):
        return dict(noted)
    target = f"{type(trainer).__module__}:{type(trainer).__qualname__}"
    found = next((plugin for plugin in registry.find("trainer") if plugin.target == target), None)
    return found.as_dict() if found is not None else {"target": target}


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], *, place: str) -> list[str]:
    """Return the changes that a resume may make, one text each.

    Raises:
        ConfigError: something else changed; the difference is shown.
    """
    old, new = _flat(before), _flat(now)
    if new.get("max_length") is None:
        new["max_length"] = old.get("max_length")  # compared once the model is known, and with it this number
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    lines = {name: f"{name}: {old.get(name)!r} → {new.get(name)!r}" for name in changed}
    refused = [name for name in changed if not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)]
    if refused:
        raise ConfigError(
            "the configuration changed since the run was started",
            place=place,
            got=", ".join(lines[name] for name in refused),
            fix="resume with the run's own configuration, or start a new run in another directory, from this one's `model/` to"
            " train on",
        )
    return [lines[name] for name in changed if name != "output"]


def _source(source: Any) -> Any:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, list | tuple | Mapping) and source and (files := data_files(source)) is not None:
        return [str(path) if weight == 1 else {"path": str(path), "weight": weight} for path, weight in files]
    if hasattr(source, "__len__"):
        return f"<{type(source).__name__} of {len(source)}>"
    return f"<{type(source).__name__}>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
