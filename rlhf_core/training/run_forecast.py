"""What a run would take, told before it begins: steps, trained parameters, memory of this device, disk; and every mistake.

Configuration and rows are checked together, so that one look at the list mends all of them. No weights are read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.run_file import grouped_by_share
from rlhf_core.config.training import BYTES_PER_WEIGHT, DatasetConfig, TrainedModelConfig, TrainerConfig, models_beside
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.data_survey import DataSurvey, NotedMistakes, survey_data
from rlhf_core.data.mixture import mixture_text
from rlhf_core.data.open_source import check_paths, data_entries, data_files, entry_names, has_splits
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import RLHFError
from rlhf_core.infra.files import readable_size
from rlhf_core.infra.host_memory import available_bytes
from rlhf_core.infra.hub_access import HubUnreachable
from rlhf_core.infra.model_files import is_adapter
from rlhf_core.models.loading import ModelOutline, check_there, read_outline
from rlhf_core.training.cost_estimate import RunCost, model_size, readable_time, training_cost
from rlhf_core.training.disk_space import DiskNeed, checkpoint_bytes_on_disk, checkpoints_at_once, disk_need_of_files
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.fixed_prompts import open_fixed_prompts
from rlhf_core.training.job import CheckedJob, TrainingJob
from rlhf_core.training.loader import with_length
from rlhf_core.training.optimizer import Schedule
from rlhf_core.training.parameter_counts import ParameterCounts, count_parameters
from rlhf_core.training.setup import check_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_READ = 10_000
"""Rows of each file that are read for a forecast; of more the number is estimated."""


@dataclass
class RunForecast:
    """What is known of a run before it begins. Each figure is None where it can't be known without fetching or loading."""

    mistakes: NotedMistakes = field(default_factory=NotedMistakes)
    surveys: dict[str, DataSurvey] = field(default_factory=dict)
    """Of `data` and `eval_data`, those that are files here."""
    unread: list[str] = field(default_factory=list)
    """Data that aren't here, such as names on the hub."""
    unchecked: list[str] = field(default_factory=list)
    """Models that aren't here, and about which the hub can't be asked."""
    mixture: str | None = None
    """The share of a step's rows that each of several entries of `data` has."""
    steps: int | None = None
    few_rows: str | None = None
    """What is said of rows that don't fill a step."""
    steps_exact: bool = False
    """Whether all rows were read, or `max_steps` is set."""
    parameters: ParameterCounts | None = None
    cost: RunCost = field(default_factory=RunCost)
    device: str = ""
    device_bytes: int = 0
    """Memory of the device: of a GPU all of it, of the computer what is free."""
    disk: DiskNeed | None = None
    disk_free: int | None = None
    prompts: int = 0
    """Fixed prompts that are completed under way."""

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        found = [line for key, survey in self.surveys.items() for line in _rows_lines(key, survey)]
        found += [f"mixture: {self.mixture}"] if self.mixture is not None else []
        found += [f"{name} isn't a local path: its rows weren't read" for name in self.unread]
        found += [
            f"{name} isn't a local path, and the hub can't be reached: it wasn't checked" for name in self.unchecked
        ]
        if self.prompts:
            found.append(f"logging.samples: {self.prompts} prompts, completed at the start, under way and at the end")
        if self.steps is not None:
            about = "" if self.steps_exact else "about "
            found.append(f"steps: {about}{self.steps:,}" + (f"; {self.few_rows}" if self.few_rows else ""))
        if self.parameters is not None:
            found.append(f"parameters: {self.parameters}")
        if self.cost.memory is not None:
            of = f"{readable_size(self.device_bytes)} {'free' if self.device == 'cpu' else 'of it'}"
            short = "; it may not fit" if self.cost.memory > self.device_bytes else ""
            found.append(
                f"memory: roughly {readable_size(self.cost.memory)} on this {self.device.upper()} ({of}){short}"
            )
        if self.cost.seconds is not None:
            found.append(f"time: roughly {readable_time(self.cost.seconds)} on this machine")
        if self.disk is not None and self.disk_free is not None:
            found.append(f"disk: at most {self.disk}; {readable_size(self.disk_free)} are free")
        return found


def _rows_lines(key: str, survey: DataSurvey) -> list[str]:
    """Return what is known of the rows of `data` or `eval_data`."""
    usable = "all can be used" if survey.report.kept == survey.rows else f"{survey.report.kept:,} can be used"
    read = f"{survey.rows:,}"
    if not survey.whole:
        of = "" if survey.epoch_rows is None else f" of about {survey.epoch_rows:,.0f}"
        read = f"the first {survey.rows:,}{of} were read"
    parts = [read, usable]
    if survey.lengths.unit == "tokens":
        parts.append(f"`max_length: {survey.max_length}` cuts {100 * survey.cut:.1f} %")
    if survey.duplicates:
        parts.append(f"{survey.duplicates:,} repeat an earlier one")
    name = "rows" if key == "data" else "held-out rows"
    return [f"{name}: {', '.join(parts)}", *(f"{name} are read as {shape}" for shape in survey.report.shapes)]


def forecast(checked: CheckedJob, *, limit: int | None = ROWS_READ) -> RunForecast:
    """Return what a run would take, and every mistake in its configuration and its rows.

    Args:
        limit: most rows to read of each file.
    """
    found = RunForecast(mistakes=NotedMistakes(checked.mistakes))
    options, job = checked.options, checked.job
    devices = DeviceManager()
    found.device = devices.device.type
    if job is not None:
        with found.mistakes.noted():
            check_config(job.trainer(), Distribution(devices.device), devices)
        with found.mistakes.noted():
            found.prompts = len(open_fixed_prompts(job.trainer()))
    outline = None
    if options is not None:
        outline, options = _outline(checked.given.get("model"), options, found)
    _survey(found, checked, options, outline, limit)
    if job is not None and options is not None and not found.mistakes:
        _measure(found, job, options, outline, devices)
    return found


def _check_model(source: str, role: str, found: RunForecast) -> bool:
    """Return whether a model is there, as far as can be known; else note why not."""
    try:
        check_there(source, role)
    except RLHFError as error:
        # Without a network nothing is known of a name, but that it isn't a slip of one that is here.
        if isinstance(error.__cause__, HubUnreachable) and "did you mean" not in (error.fix or ""):
            found.unchecked.append(source)
        else:
            with found.mistakes.noted():
                raise
            return False
    return True


def _outline(model: Any, options: TrainerConfig, found: RunForecast) -> tuple[ModelOutline | None, TrainerConfig]:
    """Return the outline of a model on the disk, and the options with the `max_length` that it gives."""
    for name, beside in models_beside(options).items():
        _check_model(beside.path, name, found)
    if not isinstance(model, str) or not _check_model(model, "model", found) or not Path(model).expanduser().exists():
        return None, options
    outline = None
    with found.mistakes.noted():
        outline = read_outline(model, trust_remote_code=options.trust_remote_code, new_tokens=options.new_tokens)
        options = with_length(options, outline.max_positions)
    return outline, options


def _survey(
    found: RunForecast,
    checked: CheckedJob,
    options: TrainerConfig | None,
    outline: ModelOutline | None,
    limit: int | None,
) -> None:
    """Read the rows that are here, and note their mistakes."""
    config = options or TrainerConfig()
    try:
        record = checked.method.record_type(config)
    except Exception:  # What a method's own options choose can't be told without them.
        record = checked.method.record
    for key in ("data", "eval_data"):
        data = checked.given.get(key)
        if not isinstance(data, str | Path | list | Mapping):  # What is no data at all is a mistake of the options.
            continue
        if any(re.search(rf"`{key}[.`]", error.problem) for error in checked.mistakes):
            continue  # an entry is wrong, as is said there
        with found.mistakes.noted():
            check_paths(data)
            here, away = _local(data)
            found.unread += [f"{key}: {name}" for name in away]
            if not here:
                continue
            dataset = config.dataset
            if key == "eval_data" and has_splits(here):
                dataset = dataset.model_copy(update={"split": dataset.eval_split})
            tokenizer = None if outline is None else outline.tokenizer
            survey = _survey_of(here, record, tokenizer, dataset, config.length_limit, limit)
            found.surveys[key] = survey
            found.mistakes.add_all(survey.mistakes)
            if key == "data":
                found.mixture = _mixture(data, survey)


def _survey_of(
    data: Any,
    record: str,
    tokenizer: PreTrainedTokenizerBase | None,
    options: DatasetConfig,
    max_length: int,
    limit: int | None,
) -> DataSurvey:
    return survey_data(
        data, record, tokenizer=tokenizer, options=options, max_length=max_length, limit=limit, pictures=0
    )


def _mixture(data: Any, survey: DataSurvey) -> str | None:
    """Return what share of a step's rows each of several entries has."""
    entries = data_entries(data) or []
    if len(entries) < 2:
        return None
    read = iter(survey.entry_rows)
    rows = [None if _is_away(str(entry.path)) else next(read) for entry in entries]
    groups = grouped_by_share(entries)
    return mixture_text(entry_names(entries), rows, groups if len(groups) > 1 else ())


def _is_away(name: str) -> bool:
    """Return whether data of that name would be fetched."""
    return not Path(name).expanduser().exists() and not set(name) & {*"*?["}


def _local(data: Any) -> tuple[list[Any], list[str]]:
    """Return the entries of data that are files here, and the names of those that would be fetched."""
    items: Sequence[Any] = data if isinstance(data, list) else [data]
    here, away = [], []
    for item in items:
        named = [str(path) for path, _ in data_files([item]) or []]
        if fetched := [name for name in named if _is_away(name)]:
            away += fetched
        else:
            # Shares are checked already, and those of the others would be missing.
            whole = isinstance(item, Mapping)
            here.append({key: value for key, value in item.items() if key != "share"} if whole else item)
    return here, away


def _measure(
    found: RunForecast, job: TrainingJob, options: TrainerConfig, outline: ModelOutline | None, devices: DeviceManager
) -> None:
    """Add the figures of a run without mistakes."""
    rows = _epoch_rows(found)
    trainer = job.trainer()
    found.steps = _steps(trainer, options, rows)
    if rows is not None and 0 < rows < options.batch_size:
        found.few_rows = f"there are fewer rows than the `batch_size` of {options.batch_size:,}"
    found.steps_exact = options.max_steps is not None or all(survey.whole for survey in found.surveys.values())
    with found.mistakes.noted():
        if found.steps is not None and found.steps_exact:
            Schedule.create(options, found.steps)
    with found.mistakes.noted():
        if outline is not None:
            found.parameters = None if is_adapter(job.run.model) else count_parameters(outline, options)
    found.device_bytes = _device_bytes(devices)
    size = model_size(job.run.model)
    survey = found.surveys.get("data")
    if size is not None and survey is not None and len(survey.lengths):
        found.cost = training_cost(
            size,
            options,
            {**job.method.roles},
            rows=rows,
            prompt_tokens=sum(survey.lengths.values) / len(survey.lengths),
            trained_parameters=None if found.parameters is None else found.parameters.trained,
        )
    found.disk = _disk_need(job, options, found)
    if found.disk is not None:
        output = Path(str(job.run.output))
        with found.mistakes.noted():
            found.disk_free = found.disk.require(output, already_there=checkpoint_bytes_on_disk(output))


def _epoch_rows(found: RunForecast) -> float | None:
    """Return how many rows an epoch has; None where some of the data weren't read."""
    survey = found.surveys.get("data")
    return None if survey is None or any(name.startswith("data: ") for name in found.unread) else survey.epoch_rows


def _steps(trainer: Trainer[Any], options: TrainerConfig, rows: float | None) -> int | None:
    """Return how many optimiser steps a run has; None where the data or the method decide that under way."""
    if options.max_steps is not None:
        return options.max_steps
    windows = trainer.windows_per_batch()
    if rows is None or windows is None:
        return None
    total = max(1, math.ceil(round((options.epochs or 1.0) * rows, 6)))
    return -(-total // options.batch_size) * windows


def _device_bytes(devices: DeviceManager) -> int:
    if devices.device.type != "cuda":
        return available_bytes()
    import torch

    return int(torch.cuda.get_device_properties(devices.device).total_memory)


def _disk_need(job: TrainingJob, options: TrainerConfig, found: RunForecast) -> DiskNeed | None:
    """Return what the run would write; None where the model's files don't show it."""
    per_weight = 4 + BYTES_PER_WEIGHT[options.optimizer.name]
    if options.lora is None:
        need = disk_need_of_files(job.run.model, options)
        if need is None or not options.freeze or found.parameters is None:
            return need
        return dataclasses.replace(need, checkpoint_bytes=round(per_weight * found.parameters.trained))
    beside = [one for one in models_beside(options).values() if isinstance(one, TrainedModelConfig)]
    if found.parameters is None or beside:
        return None
    trained = 4 * found.parameters.trained
    return DiskNeed(checkpoints_at_once(options, found.steps), round(per_weight * found.parameters.trained), trained)
