"""Find what a user names for an export: a run's directory, a checkpoint in it, an adapter, or a model's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.files import read_json
from rlhf_core.infra.model_files import is_hub_name, locate, near_model_or_run
from rlhf_core.training.checkpoint import Checkpoint, CheckpointManager

_PIPELINE = "pipeline.json"


@dataclass(frozen=True)
class SavedModel:
    """A model on disk: a directory of its own, or the checkpoint of a run."""

    name: str
    """As the user named it."""
    directory: Path | None
    """The model's directory; None for a checkpoint."""
    checkpoint: Checkpoint | None = None
    run: Path | None = None
    """The run that it belongs to, where it was named by the run or a checkpoint."""

    @property
    def title(self) -> str:
        """What a new directory of it is called by default: the run's name, or the model's."""
        if self.checkpoint is not None and self.run is not None:
            return f"{self.run.resolve().name}-{self.checkpoint.path.name}"
        place = self.run or self.directory
        assert place is not None
        return place.resolve().name


def find_saved_model(name: str | Path) -> SavedModel:
    """Return the model that a user named.

    Raises:
        ModelError: there is none: the run hasn't finished or failed, a pipeline has several, or the files hold no model that can
            be exported, as GGUF.
    """
    path, text = Path(name).expanduser(), str(name)
    if not path.exists():
        if is_hub_name(text) and not path.parent.is_dir():
            fix = f"`hf download {text} --local-dir {Path(text).name}`, then name that directory"
            raise ModelError("is no directory here; models on the hub are exported once they are", place=text, fix=fix)
        raise ModelError("no such run or model", place=text, fix=near_model_or_run(path))
    if _holds_gguf_alone(path):
        raise ModelError(
            "GGUF files are an export's result, and their weights mostly quantised: nothing is made from them here",
            place=text,
            fix="name the model that the file was converted from",
        )
    if path.is_dir():
        if path.name == "checkpoints" and (path.parent / "run.json").is_file():
            raise _many_checkpoints(path)
        if path.parent.name == "checkpoints" and (path.parent.parent / "run.json").is_file():
            step = path.name.removeprefix("step-")
            if step.isdigit():
                checkpoint = CheckpointManager(path.parent).verified(int(step))
                return SavedModel(text, None, checkpoint, path.parent.parent)
        if (path / _PIPELINE).is_file():
            raise _pipeline(path, text)
        if (path / "run.json").is_file() and not (path / "config.json").is_file():
            return SavedModel(text, _model_of(path, text), run=path)
    if path.is_dir() and (runs := sorted(one.parent for one in path.glob("*/run.json"))):
        problem = "is a directory of runs, and no run itself"
        raise ModelError(problem, place=text, fix=f"name one of them: `{runs[-1]}`")
    locate(text)  # says what is wrong with anything that is no model's directory
    run = path.parent if (path.parent / "run.json").is_file() else None
    return SavedModel(text, path, run=run)


def _holds_gguf_alone(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".gguf"
    weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return not weights and any(path.glob("*.gguf")) and not (path / "adapter_config.json").is_file()


def _model_of(run: Path, name: str) -> Path:
    """Return the exported model of a run that is done. Raises ModelError for any other run."""
    try:
        record = read_json(run / "run.json")
        status, step, why = (record.get(key) for key in ("status", "step", "message"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError("the run's record can't be read", place=f"{name}/run.json", got=error) from None
    model = run / "model"
    if status == "done" and model.is_dir():
        return model
    steps = CheckpointManager(run / "checkpoints").steps()
    newest = f"`{run / 'checkpoints' / f'step-{steps[-1]}'}`" if steps else None
    if status == "done":
        fix = f"name its newest checkpoint, {newest}, instead" if newest else "train it again"
        raise ModelError("the run is done, and its `model/` is gone", place=name, fix=fix)
    said = {"running": "is running, or was killed", "stopped": "was stopped", "failed": "failed"}
    got = f"it {said.get(str(status), f'has the status {status}')}" + (f" at step {step}" if step else "")
    got += f": {why}" if status == "failed" and why else ""
    fix = "finish it with `--resume`" + (f", or name a checkpoint: {newest}" if newest else "")
    raise ModelError("the run hasn't finished, so it has no model to export yet", place=name, got=got, fix=fix)


def _many_checkpoints(path: Path) -> ModelError:
    steps = CheckpointManager(path).steps()
    fix = f"name one of them: `{path / f'step-{steps[-1]}'}` is the newest" if steps else "name the run"
    return ModelError("holds a run's checkpoints, and is none itself", place=str(path), fix=fix)


def _pipeline(path: Path, name: str) -> ModelError:
    """Return the error for a pipeline's directory, with the stages that have a model."""
    found = sorted(one.parent for one in path.glob("stages/*/model") if one.is_dir())
    fix = "name a stage's run: " + ", ".join(f"`{one}`" for one in found[-3:]) if found else "name a stage's run"
    return ModelError("is a pipeline's directory, of several runs", place=name, fix=fix)
