"""The sections of the report on one run of a trainer, or on two beside each other. A section without data is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rlhf_core.config.yaml_file import dump_yaml, flatten
from rlhf_core.evaluation.report.blocks import (
    Block,
    Cell,
    Facts,
    Paragraph,
    Section,
    Source,
    Table,
    Tone,
    duration,
    figure,
    present,
)
from rlhf_core.evaluation.report.chart_data import Chart
from rlhf_core.evaluation.report.curve_charts import (
    Runs,
    further_charts,
    loss_charts,
    reward_against_kl,
    reward_charts,
    signal_charts,
    stability_charts,
    time_charts,
)
from rlhf_core.evaluation.report.page_charts import PageCharts
from rlhf_core.evaluation.report.run_evaluations import evaluation_section
from rlhf_core.evaluation.report.run_files import RunHistory, is_number, number_of
from rlhf_core.evaluation.report.run_texts_shown import rollout_blocks, sample_blocks
from rlhf_core.evaluation.report.section_texts import titled
from rlhf_core.infra.redact import redact

TONES: Mapping[str, Tone] = {
    "done": "good",
    "finished": "good",
    "failed": "bad",
    "stopped": "bad",
    "rolled_back": "bad",
}
"""Status of a run or a stage → its tone."""
_ROUTINE = {"run_started", "evaluated", "checkpoint_saved", "logprob_gap_measured", "window_skipped"}
"""Events that are no more than counted."""
_MOST_EVENTS = 40


def run_sections(runs: Runs, drawing: PageCharts) -> list[Section]:
    """Return the sections of a run, or of two overlaid.

    Args:
        runs: one, or two to be compared.
        drawing: draws the page's charts.
    """
    by_title: dict[str, list[Chart]] = {
        "Loss and reward": [*loss_charts(runs), *reward_charts(runs)],
        "Reward against KL": reward_against_kl(runs),
        "Stability": stability_charts(runs),
        "Learning signal": signal_charts(runs),
    }
    further = further_charts(runs, [chart for charts in by_title.values() for chart in charts])
    return present(
        evaluation_section(runs, drawing),
        *(titled(title, drawing.pictures(charts)) for title, charts in by_title.items()),
        time_section(runs, drawing),
        titled("Further metrics", drawing.pictures(further), folded=True),
        *text_sections(runs),
        *record_sections(runs),
    )


def overview(runs: Runs) -> Section:
    """Return the first section: what ran, how it ended, and what couldn't be read."""
    blocks = [facts_block([(run.name, run_facts(run)) for run in runs])]
    for run in runs:
        if message := run.record.get("message"):
            who = run.name if len(runs) > 1 else "It"
            blocks.append(Paragraph(f"{who} ended with: {message}", "bad"))
        blocks += notes_of(run, named=len(runs) > 1)
    return Section("Overview", blocks)


def facts_block(named: Sequence[tuple[str, list[tuple[str, Cell]]]]) -> Block:
    """Return the figures at the top of what is reported: of one as a list, of several beside each other, under their names."""
    if len(named) == 1:
        return Facts(named[0][1])
    columns = [dict(facts) for _, facts in named]
    names = list(dict.fromkeys(name for one in columns for name in one))
    rows = [[Cell(name), *(one.get(name, Cell("–", "muted")) for one in columns)] for name in names]
    return Table(["", *(name for name, _ in named)], rows)


def notes_of(run: RunHistory, *, named: bool) -> list[Block]:
    """Return what couldn't be read of a run's files, as notes."""
    return [Paragraph(f"{run.name}: {note}" if named else note, "bad") for note in dict.fromkeys(run.notes)]


def run_facts(run: RunHistory) -> list[tuple[str, Cell]]:
    """Return the figures at the top of a run."""
    status = str(run.record.get("status") or "unknown")
    total = run.options.get("max_steps")
    facts = [("status", Cell(status, TONES.get(status, "")))]
    facts += [("method", Cell(run.method))] if run.method else []
    for name in ("model", "data", "eval_data"):
        if (value := run.options.get(name)) is not None:
            facts.append((name.replace("_", " "), Cell(str(value))))
    if run.steps:
        facts.append(("steps", Cell(f"{run.steps:,}" + (f" of {total:,}" if is_number(total) else ""))))
        facts.append(("tokens trained on", Cell(f"{run.tokens:,}")))
        facts.append(("time of the steps", Cell(duration(run.seconds))))
    if (wall := wall_seconds(run.record)) is not None:
        facts.append(("from start to end", Cell(duration(wall))))
    for name in ("started", "ended"):
        if run.record.get(name):
            facts.append((name, Cell(str(run.record[name]).replace("T", " ").removesuffix("Z") + " UTC")))
    device, memory = run.record.get("device"), run.record.get("peak_memory_bytes")
    if isinstance(device, Mapping):
        facts.append(("device", Cell(str(device.get("name", "")))))
    if is_number(memory):
        facts.append(("peak memory", Cell(f"{memory / 2**30:.2f} GiB")))
    if run.options.get("seed") is not None:
        facts.append(("seed", Cell(str(run.options["seed"]))))
    return facts


def wall_seconds(record: Mapping[str, Any]) -> float | None:
    """Return the seconds from a record's start to its end; None where it has one of them only, or was resumed between."""
    if record.get("resumed"):
        return None
    began, ended = (moment(record.get(name)) for name in ("started", "ended"))
    return ended - began if began is not None and ended is not None and ended >= began else None


def moment(value: Any) -> float | None:
    """Return a time of a record, in ISO 8601 or seconds since 1970, as the latter; None where it is none."""
    if is_number(value):
        return float(value)
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def time_section(runs: Runs, drawing: PageCharts) -> Section:
    """Return where the time went: of the steps by phase, and besides them."""
    rows = []
    for run in runs:
        wall = wall_seconds(run.record)
        if wall is not None and run.seconds:
            rest = max(0.0, wall - run.seconds)
            rows.append(
                [
                    Cell(run.name),
                    Cell(duration(run.seconds)),
                    Cell(duration(rest)),
                    Cell(f"{run.tokens / run.seconds:,.0f}"),
                ]
            )
    blocks: list[Block] = [*drawing.pictures(time_charts(runs))]
    if rows:
        header = ["run", "steps", "besides the steps", "tokens/s of the steps"]
        caption = "Besides the steps: loading, evaluations, samples, checkpoints, export."
        blocks.append(Table(header, rows, frozenset({1, 2, 3}), caption))
    return titled("Time", blocks)


def text_sections(runs: Runs) -> list[Section]:
    """Return what the model said."""
    return present(
        titled("Samples", sample_blocks(runs, "prompt")),
        titled("Held-out samples", sample_blocks(runs, "evaluation")),
        titled("Rollouts", rollout_blocks(runs) or sample_blocks(runs, "rollout")),
    )


def record_sections(runs: Runs) -> list[Section]:
    """Return what the runs were made from: data, models, events, options, versions."""
    made = [
        Section("Data", [block for run in runs for block in _data_blocks(run, named=len(runs) > 1)], folded=True),
        Section("Models", [block for run in runs for block in _model_blocks(run, named=len(runs) > 1)], folded=True),
        Section("Events", [block for run in runs for block in _event_blocks(run, named=len(runs) > 1)], folded=True),
        options_section([(run.name, run.options) for run in runs]),
        versions_section([(run.name, run.record) for run in runs]),
    ]
    return present(*made)


def options_section(named: Sequence[tuple[str, Mapping[str, Any]]], title: str = "Configuration") -> Section:
    """Return the resolved options of one run, or the differences of two and then each of them."""
    having = [(name, redact(dict(options))) for name, options in named if options]
    blocks: list[Block] = []
    if len(having) == 2:
        (first, old), (second, new) = ((name, flatten(options)) for name, options in having)
        keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        rows = [[Cell(key), Cell(_option(old, key)), Cell(_option(new, key))] for key in keys]
        what = "The options that differ:" if rows else "All options are equal."
        blocks.append(Paragraph(what))
        blocks += [Table(["option", first, second], rows)] if rows else []
    parts = [Section(f"All options of {name}", [Source(dump_yaml(options))], folded=True) for name, options in having]
    if len(having) == 1:
        return Section(
            title, [Source(dump_yaml(having[0][1]))], "Every option with its value, secrets redacted.", folded=True
        )
    return Section(title, blocks, parts=parts)


def _option(options: Mapping[str, Any], key: str) -> str:
    return str(options[key]) if key in options else "–"


def versions_section(named: Sequence[tuple[str, Mapping[str, Any]]]) -> Section:
    """Return versions and machine, side by side."""
    columns = []
    for _, record in named:
        found: dict[str, str] = {}
        versions = record.get("versions")
        found |= {str(name): str(value) for name, value in versions.items()} if isinstance(versions, Mapping) else {}
        for name in ("machine", "device", "threads", "git", "seeds"):
            part = record.get(name)
            if isinstance(part, Mapping):
                found |= {f"{name}: {key}": str(value) for key, value in part.items() if value is not None}
        found |= {"processes": str(record["processes"])} if record.get("processes") is not None else {}
        plugin = record.get("plugin")
        if isinstance(plugin, Mapping) and plugin.get("distribution"):
            found["method from"] = f"{plugin['distribution']} {plugin.get('version', '')}"
        columns.append(found)
    names = list(dict.fromkeys(name for found in columns for name in found))
    rows = []
    for name in names:
        values = [found.get(name, "–") for found in columns]
        tone: Tone = "bad" if len(set(values)) > 1 else ""
        rows.append([Cell(name), *(Cell(value, tone) for value in values)])
    header = ["", *(name for name, _ in named)] if len(named) > 1 else ["", "value"]
    return Section("Versions and machine", [Table(header, rows)] if rows else [], folded=True)


def _data_blocks(run: RunHistory, *, named: bool) -> list[Block]:
    names = ("rows", "kept", "truncated", "prompt_tokens", "response_tokens", "loss_tokens")
    rows = []
    for part, report in run.data.items():
        if not isinstance(report, Mapping):
            continue
        dropped = report.get("dropped")
        lost = (
            ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) if isinstance(dropped, Mapping) else ""
        )
        cells = [Cell(figure(number_of(report.get(name)))) for name in names]
        source = f"{run.name}: {report.get('name', part)}" if named else str(report.get("name", part))
        rows.append([Cell(source), *cells, Cell(lost or "–")])
    header = ["data", "rows", "kept", "truncated", "prompt tokens", "response tokens", "tokens in the loss", "dropped"]
    return [Table(header, rows, frozenset(range(1, 7)))] if rows else []


def _model_blocks(run: RunHistory, *, named: bool) -> list[Block]:
    rows = []
    for role, model in run.models.items():
        if isinstance(model, Mapping):
            rows.append(
                [
                    Cell(f"{run.name}: {role}" if named else str(role)),
                    Cell(str(model.get("source", "–"))),
                    Cell(str(model.get("architecture", "–"))),
                    Cell(figure(number_of(model.get("parameters")))),
                    Cell(figure(number_of(model.get("trainable")))),
                ]
            )
    header = ["role", "source", "architecture", "parameters", "trainable"]
    return [Table(header, rows, frozenset({3, 4}))] if rows else []


def _event_blocks(run: RunHistory, *, named: bool) -> list[Block]:
    """Return how often each event came, and those that aren't routine, one by one."""
    if not run.events:
        return []
    counts = Counter(str(event.get("event", "?")) for event in run.events)
    said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    blocks: list[Block] = [Paragraph(f"{run.name}: {said}" if named else said)]
    telling = [event for event in run.events if event.get("event") not in _ROUTINE]
    rows = []
    for event in telling[:_MOST_EVENTS]:
        rest = {name: value for name, value in event.items() if name not in ("time", "event", "metrics")}
        text = ", ".join(f"{name} {value}" for name, value in rest.items())
        rows.append([Cell(str(event.get("time", ""))), Cell(str(event.get("event", ""))), Cell(text[:500])])
    if rows:
        more = len(telling) - len(rows)
        blocks.append(Table(["time", "event", "details"], rows, caption=f"{more} more are left out." if more else ""))
    return blocks
