"""The record of a run: the options it was asked for, what it was made from, and how it ended."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core import registry
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.open_source import data_entries
from rlhf_core.infra.environment import describe_environment
from rlhf_core.infra.errors import (
    ConfigError,
    DataError,
    LostProcess,
    ModelError,
    PluginError,
    RLHFError,
    Stopped,
    StorageError,
)
from rlhf_core.infra.measured_choices import measured_choices, take_recorded
from rlhf_core.infra.redact import redact
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.fast_linears import measure_products
from rlhf_core.rewards import rewards_changed
from rlhf_core.training.run_directory import RunDirectory, RunStatus, record_fault

if TYPE_CHECKING:
    from rlhf_core.training.run import Run

log = logging.getLogger(__name__)

_REFUSALS = (ConfigError, DataError, ModelError)
"""Errors that a resume may end with before anything of the run is read on: the run is what it was before."""

STREAMS = ("model", "training", "evaluation")
"""The named random streams whose seeds the record shows."""


def resolved_options(trainer: Trainer) -> dict[str, Any]:
    """Return every option of the run with its value, in the shape of a configuration file, secrets redacted."""
    origin = method_origin(trainer)
    asked: dict[str, Any] = {
        "method": origin["name"] if "name" in origin else origin["target"],
        "model": _described(trainer.model[0] if isinstance(trainer.model, tuple) else trainer.model),
        "data": _described(trainer.data),
        "eval_data": None if trainer.eval_data is None else _described(trainer.eval_data),
        "output": None if trainer.output is None else str(trainer.output),
    }
    return redact({**asked, **trainer.config.model_dump(mode="json")})


def method_origin(trainer: Trainer) -> dict[str, Any]:
    """Return where the method comes from: what the command line noted, else its entry point, else its class alone."""
    if noted := (trainer.run_inputs or {}).get("plugin"):
        return dict(noted)
    target = f"{type(trainer).__module__}:{type(trainer).__qualname__}"
    found = next((plugin for plugin in registry.find("trainer") if plugin.target == target), None)
    return found.as_dict() if found is not None else {"target": target}


def _described(source: Any) -> Any:
    """Return a model or data as plain values: a path or hub name, paths with their use, or an object's class and length."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, list | tuple | Mapping) and source and (entries := data_entries(source)) is not None:
        written = [{**entry.model_dump(mode="json"), "path": str(entry.path)} for entry in entries]
        return [entry["path"] if len(entry) == 1 else entry for entry in written]
    if hasattr(source, "__len__"):
        return f"<{type(source).__name__} of {len(source)}>"
    return f"<{type(source).__name__}>"


def check_inputs(run: Run) -> dict[str, Any]:
    """Return what the run is made from, by the names of the files for `record_inputs`; write where it is computed.

    Raises:
        ModelError: the run is continued with other model files than it was started with.
        PluginError: or with other rewards.
    """
    trainer, setup, directory = run.trainer, run.setup, run.directory
    directory.update(
        **describe_environment(),
        device=setup.devices.describe(),
        processes=run.distribution.world_size,
        plugin=method_origin(trainer),
        stage=str(trainer.stage),
        seeds={"seed": setup.config.seed} | {name: stream_seed(setup.config.seed, name) for name in STREAMS},
    )
    main = setup.loader.main_model
    # The main model may be part of another role's model only, such as the backbone of a value model.
    unnamed = {} if any(model is main for model in trainer.models.values()) else {"model": main}
    built = {role: model for role, model in trainer.models.items() if callable(getattr(model, "describe", None))}
    models = {role: model.describe() for role, model in {**unnamed, **built}.items()}
    rewards, samplers = setup.rewards.describe(), setup.run_samplers.describe()

    def check() -> None:
        _check_same_models(directory, models)
        if "rewards" not in run.allow_change:
            _check_same_rewards(directory, rewards)
        _check_same_samplers(directory, samplers)
        _check_same_earlier_tasks(directory, setup.earlier_tasks)
        if setup.replay is not None:
            setup.replay.check_model(models)

    run.distribution.on_main(check)
    found = {"rewards.json": rewards, "samplers.json": samplers, "ewc.json": setup.earlier_tasks}
    return {"models.json": models} | {name: content for name, content in found.items() if content}


def record_inputs(run: Run, files: Mapping[str, Any], step: int) -> None:
    """Write what the run is made from: the configuration with what a resume changes in it, models, rewards and data.

    Args:
        files: what `check_inputs` returned.
        step: that of the checkpoint which the run continues from; 0 where there is none.
    """
    run.recorded = True
    if run.changes:
        # Before the new options replace the old ones on the disk, so that no kill loses what the difference was.
        options = {change.name: {"before": change.before, "now": change.now} for change in run.changes}
        earlier = run.directory.record.get("changes") or []
        run.directory.update(changes=[*earlier, {"step": step, "options": options}])
    run.directory.write_inputs(run.options, run.trainer.run_inputs or {}, run.explicit_options)
    for name, content in files.items():
        run.directory.write(name, content)
    record_data(run)


def _check_same_models(directory: RunDirectory, models: dict[str, Any]) -> None:
    """Refuse to continue a run with other model files than its record holds."""
    before = directory.read("models.json") if directory.continued else None
    for role, model in models.items() if before is not None else ():
        _check_same_files(directory, role, before, model)


def _check_same_rewards(directory: RunDirectory, rewards: dict[str, Any]) -> None:
    """Refuse to continue a run with other rewards than its record holds."""
    known = directory.read("rewards.json") if directory.continued else None
    if known is not None and (changed := rewards_changed(known, rewards)):
        raise PluginError(
            "the rewards changed since the run was started",
            place=str(directory.path),
            got="; ".join(changed[:5]),
            fix="resume with the same rewards, start a new run in another directory, or `--allow-change rewards`",
        )


def _check_same_samplers(directory: RunDirectory, samplers: dict[str, Any]) -> None:
    """Refuse to continue a run whose samplers have other models or rewards than its record holds."""
    before = directory.read("samplers.json") if directory.continued and samplers else None
    before = before if isinstance(before, dict) else {}
    for key, now in samplers.items():
        known = before.get(key)
        if not isinstance(known, dict):
            continue
        for role, model in now["models"].items():
            _check_same_files(directory, role, known.get("models"), model)
        for role, rewards in now["rewards"].items():
            old = known.get("rewards", {}).get(role)
            if old is not None and (changed := rewards_changed(old, rewards)):
                raise PluginError(
                    f"the rewards of `{key}` changed since the run was started",
                    place=str(directory.path),
                    got="; ".join(changed[:5]),
                    fix="resume with the same rewards, or start a new run in another directory",
                )


def _check_same_earlier_tasks(directory: RunDirectory, now: dict[str, Any]) -> None:
    """Refuse to continue a run that holds on to other Fisher information than its record says."""
    before = directory.read("ewc.json") if directory.continued and now else None
    if before is not None and before != now:
        changed = [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]
        raise ModelError(
            "the Fisher information changed since the run was started",
            place=str(directory.path),
            got=", ".join(changed[:5]),
            fix="resume with the same files, or start a new run in another directory",
        )


def _check_same_files(directory: RunDirectory, role: str, before: Any, model: dict[str, Any]) -> None:
    """Compare the hashes of a model's files with those that the record (`models.json`) holds for its role."""
    try:
        old, new = before[role].get("files"), model.get("files")
        if old is not None and not isinstance(old, dict):
            raise TypeError("`files` is no mapping")
    except (AttributeError, KeyError, TypeError) as error:
        place = f"{directory.path}/models.json"
        fix = "restore a whole copy of it, or start a new run in another directory"
        raise StorageError("can't be read as the run's record of its models", place=place, got=error, fix=fix) from None
    if old is not None and new is not None and old != new:
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        raise ModelError(
            f"the files of the model `{role}` changed since the run was started",
            place=str(directory.path),
            got=", ".join(changed[:5]),
            fix="resume with the same model, or start a new run in another directory",
        )


def record_data(run: Run) -> None:
    """Write what was read, dropped and truncated of the training and held-out data so far; a stream's counts end with it."""
    reports = {"data": run.setup.dataset.report.as_dict()}
    if run.setup.eval_dataset is not None:
        reports["eval_data"] = run.setup.eval_dataset.report.as_dict()
    run.directory.write("data.json", reports)


def share_choices(run: Run) -> None:
    """Let every process compute with what the record of a resumed run says, or the first process measures now, to be faster."""

    def choices() -> dict[str, Any]:
        if run.directory.continued:
            return run.directory.record.get("choices") or {}
        if run.distribution.world_size > 1 and run.setup.devices.device.type == "cpu":
            measure_products()
            return measured_choices()
        return {}

    take_recorded(run.distribution.on_main(choices))


def record_choices(run: Run) -> None:
    """Write which implementations this process chose by measuring; warn where a resumed run chose others than before."""
    made, before = measured_choices(), run.directory.record.get("choices") or {}
    if made == before or not made:
        return
    taken = {what: one.get("taken") if isinstance(one, dict) else None for what, one in before.items()}
    if changed := sorted(what for what in made if what in taken and made[what]["taken"] != taken[what]):
        log.warning(
            "%s: computed by %s now, and by %s before the run was resumed: the last bits of what it computes differ",
            changed[0],
            made[changed[0]]["taken"],
            taken[changed[0]],
        )
    run.directory.update(choices=made)


def record_failure(run: Run, error: BaseException) -> None:
    """Write how the run ended; a fault in here is a warning, so that it doesn't hide the error itself."""
    code = error.exit_code if isinstance(error, RLHFError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    text = str(error) if isinstance(error, RLHFError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    status: RunStatus = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    # A run that hadn't resumed yet is at the step where it ended before.
    step = run.progress.step if run.started else run.directory.record.get("step") or 0
    lost = isinstance(error, LostProcess)
    consequence = code == 1 or lost
    # A silent `LostProcess` is for another process to report, which a fault recorded here would silence, too.
    silent = isinstance(error, LostProcess) and error.silent
    known = silent or (consequence and run.directory.fault_recorded(run.trainer.output))
    try:
        if run.distribution.is_main and run.directory.continued and not run.recorded and isinstance(error, _REFUSALS):
            run.directory.end_refused(code, text)
        elif run.distribution.is_main:
            run.directory.end(status, code, step=step, message=text, consequence=consequence)
        elif run.trainer.output is not None and status == "failed" and not known:
            record_fault(run.trainer.output, rank=run.distribution.rank, code=code, step=step, message=text)
        if run.started:
            run.logger.event(f"run_{status}", step=step, exit_code=code, message=text)
            run.hooks.emit("run_failed", run=run.trainer, error=error)
    except RLHFError as also:
        log.warning("how the run ended couldn't be written to its run directory: %s", also)
