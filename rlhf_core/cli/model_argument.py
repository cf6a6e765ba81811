"""Load what a user names as a model: a directory, an adapter, a run's directory, a checkpoint, a GGUF file or a hub name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf_core.config.training import ModelConfig
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.files import read_json
from rlhf_core.infra.model_files import locate
from rlhf_core.models import PolicyModel
from rlhf_core.models.loading import saved_dtype
from rlhf_core.training.checkpoint import Checkpoint, CheckpointManager
from rlhf_core.training.checkpoint_policy import base_of, checkpoint_policy

log = logging.getLogger(__name__)


def open_policy(model: ModelConfig, *, precision: str = "auto") -> PolicyModel:
    """Load a policy that is only read, on this process's device.

    Of a run's directory the exported model is loaded where the run is done, else its best checkpoint where early stopping keeps
    one, else its newest.

    Args:
        model: its `path` is any of the above; its own `precision` counts before the general one.
        precision: of matrix products; `auto` takes on a GPU the 16 bits that the model was saved in, and else float32.

    Raises:
        ModelError: there is no such model, it can't be loaded, or the run has none yet.
        ConfigError: the device doesn't support the precision.
    """
    device = DeviceManager()
    path = Path(model.path).expanduser()
    found = _in_run(path) if path.is_dir() else path
    if isinstance(found, Checkpoint):
        chosen = _precision_of(model, precision, base_of(found), device)
        return checkpoint_policy(found, chosen, device, trust=model.trust_remote_code)
    if found != path:
        log.info("%s is a run's directory: its exported model is loaded", path)
    source = str(found) if path.is_dir() else model.path
    return PolicyModel.from_pretrained(
        source,
        precision=_precision_of(model, precision, source, device),
        trust_remote_code=model.trust_remote_code,
        frozen=True,
        device=device.device,
    )


def check_model(name: str) -> None:
    """Refuse a local model that doesn't exist or can't be one, before anything expensive is done. The hub isn't asked.

    Raises:
        ModelError: there is no such directory or file, it holds no model, or the run has none yet.
    """
    path = Path(name).expanduser()
    if _is_run(path):
        if not (path / "model").is_dir() and not CheckpointManager(path / "checkpoints").steps():
            raise _no_model_yet(path, [])
    elif not _is_checkpoint(path):
        locate(name)


def _precision_of(model: ModelConfig, general: str, source: str, device: DeviceManager) -> str:
    """Return the precision of a model's matrix products; see `open_policy`.

    Args:
        source: where the dtype is looked up that it was saved in.

    Raises:
        ConfigError: the device doesn't support it.
    """
    chosen = model.precision or general
    if chosen == "auto":
        narrow = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        chosen = narrow.get(saved_dtype(source), "float32") if device.kind == "cuda" else "float32"
        if not device.supports(chosen):
            chosen = "fp16"
    device.check(chosen)
    return chosen


# Runs


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() and not (path / "config.json").is_file()


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and path.name.startswith("step-") and (path / "manifest.json").is_file()


def _no_model_yet(path: Path, reasons: list[str]) -> ModelError:
    """Return the error for a run without a model; `reasons` say why its checkpoints can't be used."""
    return ModelError(
        "the run has no model yet: neither an exported one nor a whole checkpoint",
        place=str(path),
        got="; ".join(reasons) or None,
        fix="wait for its first checkpoint, or name the model that it started from",
    )


def _in_run(path: Path) -> Path | Checkpoint:
    """Return what is to be loaded of a directory: of a run its exported model or a checkpoint, else the directory itself.

    Raises:
        ModelError: it is a run's, and holds neither; or it is a checkpoint that is damaged.
    """
    if _is_checkpoint(path):
        return CheckpointManager(path.parent).verified(int(path.name.removeprefix("step-")))
    if not _is_run(path):
        return path
    exported = path / "model"
    if exported.is_dir() and _status(path) == "done":
        return exported
    reasons: list[str] = []
    for step, why in _steps(path, reasons):
        try:
            checkpoint = CheckpointManager(path / "checkpoints").verified(step)
        except ModelError as error:
            reasons.append(f"step {step}: {error.got}")
            continue
        log.info("%s is a run's directory: the %s checkpoint is loaded, that of step %d", path, why, step)
        return checkpoint
    if exported.is_dir():
        return exported
    raise _no_model_yet(path, reasons)


def _status(run: Path) -> str:
    """Return the status in a run's record; '' where it can't be read."""
    try:
        return str(read_json(run / "run.json").get("status"))
    except (OSError, ValueError, AttributeError):
        return ""


def _steps(run: Path, reasons: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the steps of a run's checkpoints to try in order, each with which it is: the best, then the newest ones."""
    manager = CheckpointManager(run / "checkpoints")
    steps = manager.steps()[::-1]
    for step in steps[:1]:
        try:
            state = manager.open(step).state
            stopping = state.get("keep_best") or state.get("early_stopping")
        except ModelError as error:
            reasons.append(f"step {step}: {error.got}")
            continue
        if stopping and stopping.get("best") is not None and stopping.get("best_step") in steps:
            yield stopping["best_step"], "best"
    yield from ((step, "newest whole" if reasons else "newest") for step in steps)
