"""The card of a trained model: what a run made, from what, with which options, and how to load it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.model_card import (
    cell,
    hub_name,
    library_values,
    licence_of,
    loading_lines,
    public_values,
    render,
    root_of,
    shown_name,
)
from rlhf_core.infra.model_files import head_words, is_adapter, is_hub_name
from rlhf_core.infra.redact import redact
from rlhf_core.training.earlier_evaluations import whole_rows
from rlhf_core.training.logger import is_timing
from rlhf_core.training.metric_text import fixed
from rlhf_core.training.run_record import method_origin

if TYPE_CHECKING:
    from rlhf_core.training.run import Run

_CITED = re.compile(r"(?:([A-Z][\w’'\-]+(?: (?:et al\.|and [A-Z][\w\-]+))? \d{4})[,:]? ?\(?)?arXiv (\d{4}\.\d{4,5})")
_NOT_OPTIONS = ("logging", "checkpoint", "distributed", "push_to_hub")
"""Options that don't shape the model, and that a card leaves out."""


def run_card(run: Run, role: str, directory: Path, *, model_step: int | None = None) -> str:
    """Return the card of a model that a run has just saved.

    Args:
        run: the run, after its last evaluation.
        role: the model's.
        directory: where it is saved.
        model_step: the step whose weights it has; None for the last one.
    """
    trainer, step = run.trainer, run.progress.step if model_step is None else model_step
    origin, source = method_origin(trainer), _source_of(trainer, role)
    method = _name_of(origin)
    named = hub_name(root_of(source)) if source else None
    licence = licence_of(source) if source else None
    header = {
        "base_model": named,
        "base_model_relation": _relation(directory) if named else None,
        "datasets": _hub_datasets(trainer),
        **(dict(licence.values) if licence is not None else {}),
        **library_values(directory),
        "tags": list(dict.fromkeys(["rlhf_core", method, *_kind_tags(directory)])),
    }
    base = shown_name(source) if source else type(trainer.model).__name__
    title = f"{base}, trained by {method}" + ("" if role in ("policy", "model") else f" ({head_words(role)})")
    lines = [
        f"# {title}",
        "",
        *_summary(run, directory, role=role, base=base, origin=origin, step=step),
        "",
        *loading_lines(directory),
        "",
        *_data_lines(run),
        *_metric_lines(run),
        *_option_lines(run),
        "## Licence",
        "",
        licence.sentence if licence is not None else "The model was made in Python; nothing states its licence.",
        "",
        *_version_lines(run, origin),
    ]
    return render(header, lines)


def papers(method: type) -> list[tuple[str, str]]:
    """Return the papers that a method's code cites by arXiv number, as (authors and year, number), in their order.

    Read are the module that defines the method and those beside it that its name begins, such as tables of its variants.
    """
    name = method.__module__
    beside = sorted(other for other in sys.modules if other.startswith(f"{name}_"))
    found: dict[str, str] = {}
    for module in (name, *beside):
        try:
            text = " ".join(inspect.getsource(sys.modules[module]).split())
        except (OSError, TypeError, KeyError):  # a class of a notebook
            text = " ".join((inspect.getdoc(method) or "").split())
        for who, number in _CITED.findall(text):
            found[number] = found.get(number) or who
    return [(who or f"arXiv {number}", number) for number, who in found.items()]


def _source_of(trainer: Trainer[Any], role: str) -> str:
    """Return where a role's model was loaded from; '' for one that was made in memory."""
    own = getattr(trainer.models[role], "source", "") if role in trainer.models else ""
    given = str(trainer.model) if isinstance(trainer.model, str | Path) else ""
    return str(own or given)


def _name_of(origin: Mapping[str, Any]) -> str:
    """Return a method's name, or of one that has none its class."""
    return str(origin.get("name") or origin.get("target") or "a method")


def _relation(directory: Path) -> str:
    return "adapter" if is_adapter(str(directory)) else "finetune"


def _kind_tags(directory: Path) -> list[str]:
    heads = [path.stem.removesuffix("_head").replace("_", "-") for path in sorted(directory.glob("*_head.json"))]
    return [f"{one}-model" for one in heads] + (["lora"] if is_adapter(str(directory)) else [])


def _hub_datasets(trainer: Trainer[Any]) -> list[str]:
    """Return the names of the hub's data sets that the rows come from."""
    from rlhf_core.data.open_source import data_files

    found = []
    for source in (trainer.data, trainer.eval_data):
        for path, _ in (data_files(source) or []) if source is not None else []:
            name = str(path).removeprefix("hf://datasets/").removeprefix("hf://").partition(":")[0]
            if not Path(str(path)).expanduser().exists() and is_hub_name(name):
                found.append(name)
    return list(dict.fromkeys(found))


# The sections


def _summary(run: Run, directory: Path, *, role: str, base: str, origin: Mapping[str, Any], step: int) -> list[str]:
    """Return a table of what was done: method, papers, base, parameters, steps, rewards."""
    trainer, progress = run.trainer, run.progress
    summary = str(origin.get("summary") or (inspect.getdoc(type(trainer)) or "").split("\n")[0])
    rows = {"method": f"`{origin.get('qualified') or _name_of(origin)}`: {cell(summary)}"}
    if cited := papers(type(trainer)):
        links = ", ".join(f"[{cell(who)}](https://arxiv.org/abs/{number})" for who, number in cited)
        rows["papers that its code cites"] = links
    rows["base model"] = f"`{base}`"
    models = run.directory.read("models.json") or {}
    described = models.get(role) or next((one for one in models.values() if isinstance(one, dict)), {})
    for name, sha in list((described.get("files") or {}).items()):
        if name.endswith(".safetensors"):
            rows[f"its `{cell(name)}`"] = f"SHA-256 `{sha}`"
    if described.get("trainable"):
        kind = "a low-rank adapter" if is_adapter(str(directory)) else "weights"
        rows["trained"] = f"{described['trainable']:,} of {described['parameters']:,} parameters ({kind})"
    best = f" of {progress.step}, the best" if step != progress.step else ""
    seconds = f", {progress.seconds:,.0f} s on {cell(run.setup.devices.describe()['kind'])}"
    rows["steps"] = f"{step:,}{best}; {progress.tokens:,} tokens{seconds}"
    rewards = run.directory.read("rewards.json") or {}
    if rewards:
        rows["rewards"] = ", ".join(f"`{cell(name)}`" for name in rewards)
    rows["run"] = f"`{run.directory.record['id']}`, begun {run.directory.record['started']}"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _data_lines(run: Run) -> list[str]:
    """Return the section on data: each file with its rows and hash."""
    reports = run.directory.read("data.json") or {}
    lines = ["## Data", "", "| used for | data | rows | used | SHA-256 |", "|---|---|---|---|---|"]
    for key, use in (("data", "training"), ("eval_data", "evaluation")):
        report = reports.get(key)
        if not isinstance(report, dict):
            continue
        files = [one for one in report.get("files") or [] if isinstance(one, dict)]
        counts = f"{report.get('rows', 0):,} | {report.get('kept', 0):,}"
        if len(files) <= 1:
            name, sha = (files[0].get("name", report.get("name")), files[0].get("sha256")) if files else ("", None)
            lines.append(f"| {use} | {cell(name or report.get('name'))} | {counts} | {_hash(sha)} |")
            continue
        lines.append(f"| {use} | {len(files)} files | {counts} | |")
        lines += [f"| | {cell(one.get('name'))} | | | {_hash(one.get('sha256'))} |" for one in files]
    return [*lines, ""]


def _hash(sha: object) -> str:
    return f"`{cell(sha)}`" if sha else ""


def _metric_lines(run: Run) -> list[str]:
    """Return the section on metrics: the first evaluation beside that of the model, and the first step beside the last."""
    lines: list[str] = []
    first, last = _first_evaluation(run), run.progress.eval_metrics
    if last:
        step, before = first if first is not None and first[1] != last else (None, {})
        head = "before training" if step == 0 else f"step {step}" if step is not None else "before"
        lines += ["## Evaluation", "", f"| metric | {head} | this model |", "|---|---|---|"]
        shown = [name for name in last if not name.endswith("_se")]
        lines += [f"| {cell(name)} | {_value(before, name)} | {_value(last, name)} |" for name in shown]
        lines.append("")
    rows = _first_row(run), run.progress.metrics
    names = [n for n, v in rows[1].items() if isinstance(v, int | float) and not is_timing(n)]
    names = [n for n in names if n not in ("step", "learning_rate", "tokens") and not n.startswith("eval_")][:12]
    if names:
        lines += ["## Training", "", "| metric | first step | last step |", "|---|---|---|"]
        lines += [f"| {cell(name)} | {_value(rows[0], name)} | {_value(rows[1], name)} |" for name in names]
        lines.append("")
    return lines


def _value(metrics: Mapping[str, Any], name: str) -> str:
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if not isinstance(value, int | float):
        return "–"
    return fixed(value) + (f" ± {error:.4f}" if isinstance(error, int | float) else "")


def _first_evaluation(run: Run) -> tuple[int, Mapping[str, Any]] | None:
    """Return the run's first evaluation, step and metrics; None where there is none."""
    for row in _rows(run, "events.jsonl"):
        if row.get("event") == "evaluated" and isinstance(row.get("metrics"), dict):
            return int(row.get("step") or 0), row["metrics"]
    return None


def _first_row(run: Run) -> Mapping[str, Any]:
    return next(iter(_rows(run, "metrics.jsonl")), {})


def _rows(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Return the whole rows of one of the run's logs."""
    return iter(()) if run.directory.path is None else whole_rows(run.directory.path / name)


def _option_lines(run: Run) -> list[str]:
    """Return the section on the options that were set, without those that don't shape the model."""
    given = {name: value for name, value in run.explicit_options.items() if name not in _NOT_OPTIONS}
    if not given:
        return ["## Options", "", "Every option has its default.", ""]
    text = dump_yaml(public_values(redact(given))).rstrip()
    return ["## Options that were set", "", "```yaml", *text.splitlines(), "```", ""]


def _version_lines(run: Run, origin: Mapping[str, Any]) -> list[str]:
    versions = dict(run.directory.record.get("versions") or {})
    if (distribution := origin.get("distribution")) and distribution not in versions and origin.get("version"):
        versions[str(distribution)] = origin["version"]
    return ["## Versions", "", ", ".join(f"{cell(name)} {cell(number)}" for name, number in versions.items())]
