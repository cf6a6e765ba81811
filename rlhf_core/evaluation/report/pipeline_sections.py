"""The sections of the report on a pipeline, or on two of them: stages, evaluations, capability tests, and each stage's own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.evaluation.report.blocks import (
    Block,
    Cell,
    Completions,
    Facts,
    Paragraph,
    Section,
    Source,
    Table,
    duration,
    figure,
    present,
)
from rlhf_core.evaluation.report.chart_data import Bars, Chart, Interval, Intervals, Line, LineChart, Span, Timeline
from rlhf_core.evaluation.report.measured_values import MeasuredValue, measured, metrics_of, suites_of
from rlhf_core.evaluation.report.page_charts import PageCharts
from rlhf_core.evaluation.report.pipeline_files import PipelineHistory, StageHistory, merge_card
from rlhf_core.evaluation.report.run_files import RunHistory, is_number, number_of
from rlhf_core.evaluation.report.run_sections import (
    TONES,
    facts_block,
    moment,
    notes_of,
    options_section,
    run_facts,
    run_sections,
    versions_section,
)
from rlhf_core.evaluation.report.run_texts_shown import completion_text
from rlhf_core.evaluation.report.section_texts import titled
from rlhf_core.evaluation.report.token_shades import find_decoder
from rlhf_core.evaluation.report.tree_drawing import tree_blocks
from rlhf_core.infra.redact import redact
from rlhf_core.training.row_log import prompt_text

Pipelines = Sequence[PipelineHistory]
_COLOURS = {
    "finished": "green", "running": "blue", "failed": "red", "rolled_back": "orange", "skipped": "grey", "waiting": "grey",
}  # fmt: skip
"""Status of a stage → the colour of its span."""
_MOST_EVENTS = 200
_MOST_MERGED = 12


def pipeline_sections(pipelines: Pipelines, drawing: PageCharts) -> list[Section]:
    """Return the sections of a pipeline, or of two beside each other.

    Args:
        pipelines: one, or two to be compared.
        drawing: draws the page's charts.
    """
    named = len(pipelines) > 1
    stages = [
        (one, f"{one.name}: {stage.name}" if named else stage.name, stage) for one in pipelines for stage in one.stages
    ]
    labelled = [(label, stage) for _, label, stage in stages]
    return present(
        titled("Stages", _stage_blocks(pipelines, drawing)),
        titled("Evaluations", _evaluations(labelled, drawing)),
        titled("Capability tests", _capabilities(labelled, drawing)),
        titled("Samplers compared", _comparisons(labelled, drawing)),
        titled("Search trees", _trees(labelled, drawing)),
        titled("Sampled rows", [block for label, stage in labelled for block in _sampled(label, stage)]),
        titled("Merge", [block for label, stage in labelled for block in _merged(label, stage)]),
        Section("Each stage", parts=_each_stage(pipelines, drawing)),
        options_section([(one.name, one.recipe) for one in pipelines], "Recipe"),
        titled("History", [block for one in pipelines for block in _history(one, named=named)], folded=True),
        versions_section([(one.name, one.record) for one in pipelines]),
    )


def pipeline_overview(pipelines: Pipelines) -> Section:
    """Return the first section: how the pipeline ended, and what couldn't be read."""
    blocks = [facts_block([(one.name, _facts(one)) for one in pipelines])]
    for one in pipelines:
        prefix = f"{one.name}: " if len(pipelines) > 1 else ""
        for key in ("message", "reason"):
            if one.record.get(key):
                blocks.append(Paragraph(f"{prefix}{one.record[key]}", "bad"))
        for stage in one.stages:
            if stage.status in ("failed", "rolled_back"):
                how = "was rolled back" if stage.status == "rolled_back" else "failed"
                reason = stage.text("reason") or "no reason is recorded"
                blocks.append(Paragraph(f"{prefix}stage {stage.name} {how}: {reason}", "bad"))
        blocks += [Paragraph(f"{prefix}{note}", "bad") for note in one.notes]
        blocks += [
            Paragraph(f"{prefix}stage {stage.name}: {note}", "bad") for stage in one.stages for note in stage.notes
        ]
    return Section("Overview", blocks)


def _facts(pipeline: PipelineHistory) -> list[tuple[str, Cell]]:
    record = pipeline.record
    status = str(record.get("status") or "unknown")
    facts = [("status", Cell(status, TONES.get(status, "")))]
    for name, key in (("exit code", "exit_code"), ("seed", "seed")):
        if record.get(key) is not None:
            facts.append((name, Cell(str(record[key]))))
    facts.append(
        (
            "stages",
            Cell(f"{sum(one.status == 'finished' for one in pipeline.stages)} of {len(pipeline.stages)} finished"),
        )
    )
    seconds = [number_of(one.values.get("seconds")) for one in pipeline.stages]
    if known := [one for one in seconds if one is not None]:
        facts.append(("time of the stages", Cell(duration(sum(known)))))
    if tokens := sum(_tokens(one) or 0 for one in pipeline.stages):
        facts.append(("tokens trained on", Cell(f"{tokens:,}")))
    if policy := record.get("policy"):
        facts.append(("last good policy", Cell(str(policy))))
    for name in ("started", "ended"):
        if record.get(name):
            facts.append((name, Cell(str(record[name]).replace("T", " ").removesuffix("Z") + " UTC")))
    return facts


def _tokens(stage: StageHistory) -> int | None:
    """Return the tokens of a stage: as the pipeline recorded them, else of its run's metrics."""
    value = stage.values.get("tokens")
    if is_number(value):
        return int(value)
    return stage.run.tokens or None if stage.run is not None else None


def _stage_blocks(pipelines: Pipelines, drawing: PageCharts) -> list[Block]:
    """Return when stages ran as a chart, and all of them as a table."""
    named = len(pipelines) > 1
    charts: list[Chart] = []
    for one in pipelines:
        times = [
            (stage, moment(stage.values.get("started")), moment(stage.values.get("ended"))) for stage in one.stages
        ]
        begun = [(stage, start, end) for stage, start, end in times if start is not None]
        if begun:
            first = min(start for _, start, _ in begun)
            now = max([end for _, _, end in begun if end is not None] + [start for _, start, _ in begun])
            spans = [
                Span(stage.name, start - first, (end if end is not None else now) - first, stage.status)
                for stage, start, end in begun
            ]
            found = dict.fromkeys(span.state for span in spans)
            states = ", ".join(f"{one.replace('_', ' ')} {_COLOURS.get(one, 'violet')}" for one in found)
            charts.append(Timeline(f"Stages of {one.name}" if named else "Stages", spans, (f"{states.capitalize()}.",)))
    tokens = [
        (f"{one.name}: {stage.name}" if named else stage.name, _tokens(stage))
        for one in pipelines
        for stage in one.stages
    ]
    having = [(label, count) for label, count in tokens if count]
    if len(having) > 1:
        charts.append(
            Bars(
                "Tokens by stage", [label for label, _ in having], {"": [float(count) for _, count in having]}, "tokens"
            )
        )
    rows = []
    for one in pipelines:
        for stage in one.stages:
            seconds, count = number_of(stage.values.get("seconds")), _tokens(stage)
            rows.append(
                [
                    Cell(f"{one.name}: {stage.name}" if named else stage.name),
                    Cell(stage.text("kind") or "–"),
                    Cell(stage.text("method") or (stage.run.method if stage.run else "") or "–"),
                    Cell(stage.status.replace("_", " "), TONES.get(stage.status, "")),
                    Cell("–" if seconds is None else duration(seconds)),
                    Cell("–" if count is None else f"{count:,}"),
                    Cell(stage.text("gain") or _told(stage.values.get("metrics"))),
                    Cell(stage.text("reason")),
                ]
            )
    header = ["stage", "kind", "method", "status", "time", "tokens", "result", "reason"]
    if not any(row[7].text for row in rows):
        header, rows = header[:7], [row[:7] for row in rows]
    table = [Table(header, rows, frozenset({4, 5}), stacked=True)] if rows else []
    return [*drawing.pictures(charts), *table]


def _told(metrics: Any) -> str:
    """Return a few metrics as text."""
    found = metrics_of(metrics) if isinstance(metrics, Mapping) else {}
    texts = [f"{name.removeprefix('eval_')} {value}" for name, value in found.items() if not name.endswith("_se")]
    return ", ".join(texts[:4]) + (" …" if len(texts) > 4 else "") or "–"


def _evaluations(stages: Sequence[tuple[str, StageHistory]], drawing: PageCharts) -> list[Block]:
    """Return every metric that an evaluation measured, stage by stage."""
    by_stage = {label: found for label, stage in stages if (found := metrics_of(stage.evaluation))}
    names = list(dict.fromkeys(name for found in by_stage.values() for name in found))
    if not names:
        return []
    rows = [
        [Cell(name), *(Cell(str(found[name]) if name in found else "–") for found in by_stage.values())]
        for name in names
    ]
    charts: list[Chart] = []
    for name in names:
        items = [
            Interval(label, "", one.value, one.low, one.high)
            for label, found in by_stage.items()
            if (one := found.get(name))
        ]
        if len(items) > 1:
            charts.append(Intervals(name, items))
    if not charts:
        items = [
            Interval(name, "", one.value, one.low, one.high)
            for found in by_stage.values()
            for name, one in found.items()
            if one.a_share
        ]
        charts += [Intervals("Values from 0 to 1, with 95 % intervals", items)] if items else []
    table = Table(["metric", *by_stage], rows, frozenset(range(1, len(by_stage) + 1)))
    return [*drawing.pictures(charts[:24]), table, *_references(stages), *_differences(stages), *_notes(stages)]


def _references(stages: Sequence[tuple[str, StageHistory]]) -> list[Block]:
    """Say what each KL is measured to, where that isn't the same everywhere."""
    found = {}
    for label, stage in stages:
        settings = stage.evaluation.get("settings")
        models = settings.get("models") if isinstance(settings, Mapping) else None
        reference = models.get("reference") if isinstance(models, Mapping) else None
        if isinstance(reference, Mapping):
            found[label] = str(reference.get("source"))
    if len(set(found.values())) < 2:
        return []
    text = "; ".join(f"{label} to {source}" for label, source in found.items())
    return [
        Paragraph(f"The KL is to another reference in each, so these values can't be set against each other: {text}.")
    ]


def _notes(stages: Sequence[tuple[str, StageHistory]]) -> list[Block]:
    """Return what evaluations note of their metrics."""
    blocks: list[Block] = []
    for label, stage in stages:
        metrics = stage.values.get("metrics")
        notes = metrics.get("notes") if stage.evaluation and isinstance(metrics, Mapping) else None
        blocks += [Paragraph(f"{label}: {note}", "muted") for note in (notes if isinstance(notes, list) else [])]
    return blocks


def _differences(stages: Sequence[tuple[str, StageHistory]]) -> list[Block]:
    """Return by how much stages differ from the evaluations that they were compared with, prompt by prompt."""
    by_stage: dict[str, dict[str, MeasuredValue]] = {}
    for label, stage in stages:
        metrics = stage.values.get("metrics")
        found = metrics.get("differences") if isinstance(metrics, Mapping) else None
        if isinstance(found, Mapping) and (measured_ones := metrics_of(found)):
            by_stage[f"{label}{_compared_with(stage)}"] = measured_ones
    if not by_stage:
        return []
    names = dict.fromkeys(name for found in by_stage.values() for name in found)
    cells = {name: [found.get(name) for found in by_stage.values()] for name in names}
    rows = [[Cell(name), *(Cell("–" if one is None else one.signed) for one in found)] for name, found in cells.items()]
    caption = "Paired differences of the same prompts, to the evaluation that the recipe compares each stage with."
    return [Table(["difference of", *by_stage], rows, frozenset(range(1, len(by_stage) + 1)), caption)]


def _compared_with(stage: StageHistory) -> str:
    """Return ` − NAME`, the earlier evaluation that a stage's is compared with; nothing where that isn't recorded."""
    inputs = stage.values.get("inputs")
    options = inputs.get("options") if isinstance(inputs, Mapping) else None
    given = options.get("compare") if isinstance(options, Mapping) else None
    name = re.fullmatch(r"\$\{stages\.([\w-]+)\.evaluation\}", given) if isinstance(given, str) else None
    return "" if name is None else f" − {name[1]}"


def _capabilities(stages: Sequence[tuple[str, StageHistory]], drawing: PageCharts) -> list[Block]:
    """Return the suites before and after each stage that was tested."""
    rows, charts = [], list[Chart]()
    for label, stage in stages:
        found = stage.values.get("capabilities")
        if not isinstance(found, Mapping):
            continue
        before, after = suites_of(found.get("before")), suites_of(found.get("after"))
        regressed, changes = _regressed(found), _changes(found)
        items = []
        for suite in dict.fromkeys([*before, *after]):
            then, now = before.get(suite), after.get(suite)
            items += [
                Interval(suite, when, one.value, one.low, one.high)
                for when, one in (("before", then), ("after", now))
                if one
            ]
            change = "–" if then is None or now is None else f"{now.value - then.value:+.4g}"
            change = changes.get(suite, change)
            verdict = Cell("regression", "bad") if suite in regressed else Cell("–" if now is None else "kept", "muted")
            rows.append([Cell(label), Cell(suite), Cell(_or_dash(then)), Cell(_or_dash(now)), Cell(change), verdict])
        charts += [Intervals(f"Suites around {label}", items)] if items else []
    header = ["stage", "suite", "before", "after", "change", "verdict"]
    return [*drawing.pictures(charts), Table(header, rows, frozenset({2, 3, 4}))] if rows else []


def _changes(capabilities: Mapping[str, Any]) -> dict[str, str]:
    """Return the paired change of each suite with its interval and p-value, as text, where they are recorded."""
    changes = capabilities.get("changes")
    found = {}
    for one in changes if isinstance(changes, list) else []:
        difference = measured(one.get("difference")) if isinstance(one, Mapping) else None
        if difference is not None:
            p_value = number_of(one.get("adjusted_p_value"))
            p_text = "" if p_value is None else f", p = {p_value:.2g}"
            found[str(one.get("suite"))] = difference.signed + p_text
    return found


def _regressed(capabilities: Mapping[str, Any]) -> set[str]:
    """Return the names of the suites that got worse."""
    names: set[str] = set()
    lists = [one for key in ("regressions", "changes") if isinstance(one := capabilities.get(key), list)]
    for one in itertools.chain.from_iterable(lists):
        if isinstance(one, Mapping) and one.get("regressed", True):
            names.add(str(one.get("suite", one.get("name", ""))))
        elif isinstance(one, str):
            names.add(one)
    return names


def _or_dash(value: MeasuredValue | None) -> str:
    return "–" if value is None else str(value)


def _comparisons(stages: Sequence[tuple[str, StageHistory]], drawing: PageCharts) -> list[Block]:
    """Return samplers on the same prompts: accuracy against tokens."""
    blocks: list[Block] = []
    for label, stage in stages:
        found = stage.comparison.get("samplers")
        samplers = (
            [one for one in found if isinstance(one, Mapping) and is_number(one.get("accuracy"))]
            if isinstance(found, list)
            else []
        )
        if not samplers:
            continue
        lines, rows = [], []
        for number, one in enumerate(samplers):
            name, tokens = str(one.get("name", one.get("sampler", "?"))), number_of(one.get("tokens_per_prompt"))
            accuracy = measured({"value": one["accuracy"], "error": one.get("error")})
            more = measured({"value": one.get("difference"), "error": one.get("difference_error")})
            assert accuracy is not None
            if tokens is not None:
                errors = None if accuracy.high is None else [accuracy.high - accuracy.value]
                lines.append(Line(name, [tokens], [accuracy.value], number, errors=errors, marks=True))
            rows.append(
                [
                    Cell(name),
                    Cell(str(accuracy)),
                    Cell(figure(tokens)),
                    Cell("–" if more is None else more.signed),
                    Cell(figure(number_of(one.get("seconds")))),
                ]
            )
        chart = (
            [LineChart(f"Accuracy against tokens: {label}", lines, "tokens per prompt", "accuracy")] if lines else []
        )
        header = ["sampler", "accuracy", "tokens per prompt", "more than the first", "seconds"]
        blocks += [*drawing.pictures(chart), Table(header, rows, frozenset({1, 2, 3, 4}))]
    return blocks


def _trees(stages: Sequence[tuple[str, StageHistory]], drawing: PageCharts) -> list[Block]:
    return [
        block
        for label, stage in stages
        for place, tree in stage.trees
        for block in tree_blocks(tree, f"{label}: {place}", drawing.prefix())
    ]


def _sampled(label: str, stage: StageHistory) -> list[Block]:
    """Return some sampled rows, all completions of a row beside each other."""
    decode = find_decoder(*([stage.path / "model"] if stage.path else []))
    blocks: list[Block] = []
    for row in stage.samples:
        items = []
        for number, one in enumerate(itertools.islice(_completions(row), 4), 1):
            items.append(completion_text(f"no. {number}", one, decode))
        prompt = row.get("prompt", row.get("question", ""))
        text = prompt if isinstance(prompt, str) else _chat(prompt)
        blocks.append(Completions(f"{label}: {row['_place']}", text[:2_000], items))
    if blocks and stage.sampled > len(stage.samples):
        blocks.append(Paragraph(f"{len(stage.samples)} rows are shown.", tone="muted"))
    return blocks


def _chat(prompt: Any) -> str:
    return prompt_text(prompt) if isinstance(prompt, list) else str(prompt)


def _completions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the completions of a sampled row, one mapping each."""
    if isinstance(row.get("completions"), list):
        several = {"completions": "completion", "stop_reasons": "stop_reason", "scores": "score"}
        lists = {several.get(key, key): value for key, value in row.items() if isinstance(value, list)}
        count = len(row["completions"])
        return [{key: value[number] for key, value in lists.items() if len(value) == count} for number in range(count)]
    return [dict(row)]


def _merged(label: str, stage: StageHistory) -> list[Block]:
    """Return what was merged, and how."""
    recipe = stage.merge
    if not recipe:
        return []
    models = recipe.get("models")
    rows = []
    for one in (models if isinstance(models, list) else [])[:_MOST_MERGED]:
        if isinstance(one, Mapping):
            others = {key: value for key, value in one.items() if key not in ("path", "model", "weight")}
            rows.append(
                [
                    Cell(str(one.get("path", one.get("model", "?")))),
                    Cell(str(one.get("weight", "–"))),
                    Cell(_pairs(others)),
                ]
            )
        else:
            rows.append([Cell(str(one)), Cell("–"), Cell("")])
    rest = {key: value for key, value in recipe.items() if key not in ("models", "output")}
    blocks: list[Block] = [
        Facts([("stage", Cell(label)), *((str(key), Cell(str(value))) for key, value in rest.items())])
    ]
    columns = 3 if any(row[2].text for row in rows) else 2
    blocks += [Table(["model", "weight", "options"][:columns], [row[:columns] for row in rows])] if rows else []
    metrics = stage.values.get("metrics")
    if isinstance(metrics, Mapping) and metrics:
        blocks.append(
            Table(
                ["metric", "value"],
                [[Cell(str(key)), Cell(str(measured(value) or value))] for key, value in metrics.items()],
            )
        )
    if card := merge_card(stage):
        blocks.append(Source(card))
    return blocks


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _each_stage(pipelines: Pipelines, drawing: PageCharts) -> list[Section]:
    """Return a folded section for each run of a trainer; those of the same stage in two pipelines are overlaid."""
    together: dict[str, list[tuple[str, StageHistory, RunHistory]]] = {}
    for pipeline in pipelines:
        for stage in pipeline.stages:
            for run in [*([] if stage.run is None else [stage.run]), *stage.rounds]:
                together.setdefault(run.name, []).append((pipeline.name, stage, run))
    made = []
    for title, found in together.items():
        if len(pipelines) > 1:
            for name, _, run in found:
                run.name = name
        runs, status = [run for _, _, run in found], found[0][1].status
        blocks: list[Block] = [Facts(run_facts(run)) for run in runs]
        blocks += [note for run in runs for note in notes_of(run, named=len(runs) > 1)]
        parts = run_sections(runs, drawing)
        note, tone = status.replace("_", " "), TONES.get(status, "")
        made.append(Section(title, blocks, parts=parts, folded=True, note=note, tone=tone))
    return made


def _history(pipeline: PipelineHistory, *, named: bool) -> list[Block]:
    """Return the pipeline's events, the last ones of many."""
    if not pipeline.events:
        return []
    rows = []
    for event in pipeline.events[-_MOST_EVENTS:]:
        rest = {name: value for name, value in redact(dict(event)).items() if name not in ("time", "event")}
        rows.append([Cell(str(event.get("time", ""))), Cell(str(event.get("event", ""))), Cell(_pairs(rest)[:400])])
    more = len(pipeline.events) - len(rows)
    caption = f"{more} earlier ones are left out." if more else ""
    title = [Paragraph(pipeline.name)] if named else []
    return [*title, Table(["time", "event", "details"], rows, caption=caption, stacked=True)]
