"""Tasks of the library lm-eval, answered by a policy's own engine: `run_lm_eval_tasks`.

The package is needed where tasks are run (the extra `lm-eval`), and imported there.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_core.config.lm_eval_run import FEWSHOT_SEED, LmEvalConfig
from rlhf_core.evaluation.estimate import Estimate
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, describe_error
from rlhf_core.infra.files import replace_json
from rlhf_core.infra.seeds import RandomState

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel


@dataclass(frozen=True)
class TaskScore:
    """What one task, or a group of them, came to."""

    task: str
    metrics: Mapping[str, Estimate]
    """lm-eval's name of a metric and its filter, such as `exact_match,strict-match` → its value over the rows."""
    by_row: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The same names → one value per row, in the order of the data; of a group, and of a metric over the whole data, none."""
    not_finite: Mapping[str, str] = field(default_factory=dict)
    """Metrics without a finite value → what lm-eval found, such as the perplexity `inf`."""
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    """A metric's name without its filter → whether a larger value is better, where the task says."""
    version: str | None = None
    """Of the task: numbers of different versions aren't comparable."""
    num_fewshot: int | None = None
    """Examples in each prompt."""

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "version": self.version,
            "num_fewshot": self.num_fewshot,
            "metrics": {name: estimate.as_json() for name, estimate in self.metrics.items()},
            "not_finite": dict(self.not_finite),
            "higher_is_better": dict(self.higher_is_better),
            "by_row": {name: list(values) for name, values in self.by_row.items()},
        }


@dataclass(frozen=True)
class TaskReport:
    """What `run_lm_eval_tasks` found."""

    tasks: Mapping[str, TaskScore]
    """Task → its scores. Groups that were asked for are among them."""
    options: Mapping[str, Any]
    """With which options, as JSON values."""
    seconds: float

    @property
    def metrics(self) -> dict[str, Estimate]:
        """Every estimate, under `task/metric,filter`."""
        return {
            f"{score.task}/{name}": estimate
            for score in self.tasks.values()
            for name, estimate in score.metrics.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        tasks = {name: score.as_json() for name, score in self.tasks.items()}
        return {"tasks": tasks, "options": dict(self.options), "seconds": round(self.seconds, 3)}

    def write(self, path: Path) -> None:
        """Write the report as JSON.

        Raises:
            StorageError: writing failed.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(path, self.as_json())

    def lines(self) -> list[str]:
        """Return the report for people: one line per metric."""
        found = [f"{name}: {estimate} (n = {estimate.count:,})" for name, estimate in self.metrics.items()]
        return found + [
            f"{score.task}/{name}: {value}" for score in self.tasks.values() for name, value in score.not_finite.items()
        ]


def run_lm_eval_tasks(
    policy: PolicyModel,
    tasks: Sequence[str],
    *,
    include_path: str | Path | Sequence[str | Path] | None = None,
    config: LmEvalConfig | None = None,
    **options: Any,
) -> TaskReport:
    """Return how well a policy does lm-eval's tasks, drawn and scored by an engine with the weights that it has.

    Texts are tokenised as by lm-eval's Hugging Face backend (`hf`), so both give the same numbers but for rounding, of which
    greedy texts at a tie and sampled texts (whose random numbers differ) are the exceptions. Prompts that begin alike are read
    once.

    Args:
        tasks: names of tasks, groups or tags, or paths of task files (.yaml).
        include_path: directories with further task files, of which a name comes before lm-eval's own.
        config: the options; or give them by name, such as `limit=8, num_fewshot=5`.

    Raises:
        ConfigError: lm-eval isn't installed, an unknown task or option (with the nearest names), an option out of its range, no
            tasks, generation options that the engine doesn't know, or a task that runs code without `allow_code`.
        DataError: a task's data can't be had.
        ModelError: the model has no chat template, though one is asked for.
        NumbersError: logits aren't finite, or memory doesn't suffice.
    """
    require_lm_eval()
    config = LmEvalConfig.given(config, options, place="run_lm_eval_tasks")
    if not tasks:
        raise ConfigError("no tasks are named", place="tasks", fix="name some, such as `gsm8k`")
    if config.apply_chat_template and not policy.tokenizer.chat_template:
        raise ModelError(
            "the model has no chat template", place=str(policy.source), fix="leave out `apply_chat_template`"
        )
    manager = _task_manager(include_path)
    check_tasks(tasks, manager)
    began = time.monotonic()
    with _seeded_as_lm_eval():
        found = _evaluated(policy, _loaded(manager, tasks, config), config)
    return TaskReport(_scores(found), _recorded(policy, config), time.monotonic() - began)


@contextlib.contextmanager
def _seeded_as_lm_eval() -> Iterator[None]:
    """Seed the global generators as lm-eval's command line does, for tasks that draw from them; afterwards they are as before."""
    before = RandomState.capture()
    try:
        random.seed(0)
        np.random.seed(FEWSHOT_SEED)
        torch.manual_seed(FEWSHOT_SEED)
        yield
    finally:
        before.restore()


def _loaded(manager: Any, tasks: Sequence[str], config: LmEvalConfig) -> Any:
    """Return tasks with their data and the options applied, as `lm_eval.evaluate` takes them.

    Raises:
        DataError: a task's data can't be had.
        ConfigError: a task runs code, and that isn't allowed.
    """
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # whatever datasets, the hub or a task's own code raise
        fix = "see that its data can be downloaded, or is where the task file says"
        raise DataError(
            "lm-eval can't load a task", place=", ".join(tasks), got=describe_error(error, lines=1), fix=fix
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not config.allow_code:
            problem = f"the task `{name}` runs code that the model writes"
            raise ConfigError(problem, place="tasks", fix="set `allow_code` where that is safe")
        _set_up(task, config)
    return loaded


def _set_up(task: Any, config: LmEvalConfig) -> None:
    """Apply options to a task as lm-eval's command line does: one that has 0 examples by itself keeps to that."""
    if config.generation and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(config.generation), update=True)
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and config.num_fewshot is not None):
        task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
    task.set_fewshot_seed(seed=config.fewshot_seed)


def _evaluated(policy: PolicyModel, loaded: Any, config: LmEvalConfig) -> Mapping[str, Any]:
    """Return what lm-eval finds about a policy on loaded tasks."""
    from lm_eval import evaluate

    from rlhf_core.evaluation.lm_eval_model import EngineLM

    found: Mapping[str, Any] = evaluate(
        EngineLM(Engine(policy, seed=config.seed), template_options=config.template_options),
        loaded,
        limit=config.limit,
        bootstrap_iters=config.bootstrap,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        confirm_run_unsafe_code=config.allow_code,
    )
    return found


def _recorded(policy: PolicyModel, config: LmEvalConfig) -> dict[str, Any]:
    """Return what the report records of how the tasks were run: whatever numbers may depend on."""
    options = config.model_dump(include={*LmEvalConfig.model_fields} - {"allow_code"})
    return {"lm_eval": importlib.metadata.version("lm-eval"), "model": str(policy.source), **options}


def require_lm_eval() -> None:
    """Raise `ConfigError`, with the extra to install, where lm-eval isn't installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval isn't installed", place="tasks", fix="pip install 'rlhf-core[lm-eval]'")


def _task_manager(include_path: str | Path | Sequence[str | Path] | None) -> Any:
    """Return what finds tasks by name.

    Raises:
        ConfigError: a path that is no directory.
    """
    from lm_eval.tasks import TaskManager

    given = [include_path] if isinstance(include_path, str | Path) else list(include_path or [])
    for path in given:
        if not Path(path).expanduser().is_dir():
            raise ConfigError("no such directory", place="include_path", got=str(path))
    return TaskManager(include_path=[Path(path).expanduser() for path in given] or None)


def find_tasks(tasks: Sequence[str], include_path: str | Path | Sequence[str | Path] | None = None) -> None:
    """Look for tasks by name; no data is loaded.

    Raises:
        ConfigError: lm-eval isn't installed, a directory isn't there, or lm-eval knows no such task (with the nearest names).
    """
    require_lm_eval()
    check_tasks(tasks, _task_manager(include_path))


def check_tasks(tasks: Sequence[str], manager: Any) -> None:
    """Raise `ConfigError`, with the nearest names, for a task that lm-eval doesn't know and that is no task file."""
    known = manager.all_tasks
    for task in tasks:
        if task in known or (task.endswith((".yaml", ".yml")) and Path(task).is_file()):
            continue
        near = difflib.get_close_matches(task, known, 3, cutoff=0.5)
        raise ConfigError(
            "lm-eval has no such task", place="tasks", got=f"`{task}`",
            fix=f"did you mean {', '.join(f'`{one}`' for one in near)}?" if near else "see `lm-eval ls tasks`",
        )  # fmt: skip


def _scores(found: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Return lm-eval's results by task."""
    return {task: _score(task, values, found) for task, values in (found["results"] | found.get("groups", {})).items()}


def _score(task: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> TaskScore:
    """Return one task's results.

    Args:
        values: lm-eval's for it: `acc,none` and `acc_stderr,none`, say.
        found: all that lm-eval returned.
    """
    count = _count(task, found)
    metrics: dict[str, Estimate] = {}
    not_finite: dict[str, str] = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or not count:
            not_finite[key] = str(value)
            continue
        error = values.get(f"{name}_stderr,{chosen}")  # `N/A` where there is none
        known = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
        metrics[key] = Estimate(float(value), known, count)
    higher = found.get("higher_is_better", {}).get(task) or {}
    shots = found.get("n-shot", {}).get(task)
    version = found.get("versions", {}).get(task)
    return TaskScore(
        task=task,
        metrics=metrics,
        by_row=_by_row(found.get("samples", {}).get(task, []), metrics),
        not_finite=not_finite,
        higher_is_better={name: bool(value) for name, value in higher.items() if value is not None},
        version=None if version in (None, "N/A") else str(version),
        num_fewshot=shots if isinstance(shots, int) else None,
    )


def _count(task: str, found: Mapping[str, Any]) -> int:
    """Return over how many rows a task, or a group's tasks together, was measured."""
    counts = found.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_count(one, found) for one in found.get("group_subtasks", {}).get(task, []))


def _by_row(samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Estimate]) -> dict[str, list[float]]:
    """Return the value of each metric for each row, where lm-eval has one number per row."""
    found: dict[str, list[float]] = {}
    for key in metrics:
        name, _, chosen = key.partition(",")
        rows = [row for row in samples if row.get("filter") == chosen and isinstance(row.get(name), int | float)]
        rows.sort(key=lambda row: int(row["doc_id"]))
        if rows:
            found[key] = [float(row[name]) for row in rows]
    return found
