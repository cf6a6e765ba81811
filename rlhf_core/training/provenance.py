"""What a run was made from and how it ended, written into its directory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.environment import describe_environment
from rlhf_core.infra.errors import LostProcess, ModelError, PluginError, RLHFError, Stopped, StorageError
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.rewards import rewards_changed
from rlhf_core.training.run_directory import RunDirectory, Status, note_fault
from rlhf_core.training.settings import run_inputs, run_plugin

if TYPE_CHECKING:
    from rlhf_core.training.loader import Loader
    from rlhf_core.training.loop import Run

log = logging.getLogger(__name__)

STREAMS = ("model", "training", "evaluation")
"""The named random streams whose seeds the record shows."""


def note_inputs(run: Run, loader: Loader) -> None:
    """Write the configuration, the environment, the models, the rewards and the data, before the first step.

    Raises:
        ModelError: the run is continued with other model files than it was started with.
        PluginError: or with other rewards.
    """
    trainer, directory = run.trainer, run.directory
    inputs = run_inputs(trainer)
    directory.update(
        **describe_environment(),
        device=run.devices.describe(),
        processes=run.distribution.world_size,
        plugin=run_plugin(trainer),
        stage=str(trainer.stage),
        seeds={"seed": run.config.seed} | {name: stream_seed(run.config.seed, name) for name in STREAMS},
    )
    given = {} if any(model is loader.given for model in trainer.models.values()) else {"model": loader.given}
    built = {role: model for role, model in trainer.models.items() if callable(getattr(model, "describe", None))}
    models = {role: model.describe() for role, model in {**given, **built}.items()}
    rewards = run.rewards.describe()
    run.distribution.on_main(lambda: _same_inputs(directory, models, rewards))
    directory.write_inputs(run.settings, inputs, run.explicit)
    directory.write("models.json", models)
    if rewards:
        directory.write("rewards.json", rewards)
    note_data(run)


def _same_inputs(directory: RunDirectory, models: dict[str, Any], rewards: dict[str, Any]) -> None:
    before = directory.read("models.json") if directory.continued else None
    for role, model in models.items() if before is not None else ():
        _same_files(directory, role, before, model)
    known = directory.read("rewards.json") if directory.continued else None
    if known is not None and (changed := rewards_changed(known, rewards)):
        raise PluginError(
            "the rewards changed since the run was started",
            place=str(directory.path),
            got="; ".join(changed[:5]),
            fix="resume with the same rewards, or start a new run in another directory",
        )


def _same_files(directory: RunDirectory, role: str, before: Any, model: dict[str, Any]) -> None:
    try:
        old, new = before[role].get("files"), model.get("files")
        if old is not None and not isinstance(old, dict):
            raise TypeError("`files` is no mapping")
    except (AttributeError, KeyError, TypeError) as error:
        place = f"{directory.path}/models.json"
        fix = "put a whole copy of it back, or start a new run in another directory"
        raise StorageError("can't be read as what the run was made from", place=place, got=error, fix=fix) from None
    if old is not None and new is not None and old != new:
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        raise ModelError(
            f"the files of the model `{role}` changed since the run was started",
            place=str(directory.path),
            got=", ".join(changed[:5]),
            fix="resume with the same model, or start a new run in another directory",
        )


def note_data(run: Run) -> None:
    """Write what reading the data did so far; a stream knows it all only at its end."""
    reports = {"data": run.dataset.report.as_dict()}
    if run.eval_dataset is not None:
        reports["eval_data"] = run.eval_dataset.report.as_dict()
    run.directory.write("data.json", reports)


def note_failure(run: Run, error: BaseException) -> None:
    """Write how the run ended; what goes wrong here must not hide the error itself."""
    code = error.exit_code if isinstance(error, RLHFError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    text = str(error) if isinstance(error, RLHFError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    status: Status = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    # A run that hadn't resumed yet is where it was.
    step = run.progress.step if run.started else run.directory.record.get("step") or 0
    consequence = code == 1 or isinstance(error, LostProcess)
    try:
        if run.distribution.is_main:
            run.directory.end(status, code, step=step, message=text, consequence=consequence)
        elif (
            run.trainer.output is not None
            and status == "failed"
            and not (consequence and run.directory.fault_noted(run.trainer.output))
        ):
            note_fault(run.trainer.output, rank=run.distribution.rank, code=code, step=step, message=text)
        if run.started:
            run.logger.event(f"run_{status}", step=step, exit_code=code, message=text)
            run.hooks.emit("run_failed", run=run.trainer, error=error)
    except RLHFError as also:
        log.warning("the run's record could not be written: %s", also)
