"""The report of a run's or pipeline's directory as one HTML page, and the file that it is written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_core.evaluation.report.blocks import Paragraph, Section, present
from rlhf_core.evaluation.report.html_page import html_page
from rlhf_core.evaluation.report.page_charts import PageCharts
from rlhf_core.evaluation.report.pipeline_files import is_pipeline_directory, read_pipeline
from rlhf_core.evaluation.report.pipeline_sections import pipeline_overview, pipeline_sections
from rlhf_core.evaluation.report.run_files import is_run_directory, read_run, require_readable
from rlhf_core.evaluation.report.run_sections import overview, run_sections
from rlhf_core.evaluation.report.section_texts import UNCERTAINTY
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.files import replace_file, storage_errors
from rlhf_core.infra.near_runs import near_run

REPORT = "report.html"
"""Name of the page in the directory that it is about."""


def write_report(directory: str | Path, other: str | Path | None = None, *, output: str | Path | None = None) -> Path:
    """Write the report of a run or a pipeline, in whatever state it is, and return the path of the page.

    Args:
        directory: of a trainer's run or of a pipeline; one in progress will do.
        other: another of the same kind, to be shown beside it.
        output: the file, whose folder is made; without it `report.html` in the directory, and for two of them in the current
            directory.

    Raises:
        ConfigError: a directory is neither a run's nor a pipeline's, or one is of each kind.
        StorageError: the page can't be written.
    """
    directory, second = Path(directory), None if other is None else Path(other)
    if output is None:
        output = directory / REPORT if second is None else Path(REPORT)
    path = Path(output)
    if path.is_dir():
        raise ConfigError(
            "is a directory, not a file", place="--output", got=str(path), fix="name the file, such as report.html"
        )
    page = report_page(directory, second)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page.encode("utf-8", "replace"))
    return path


def report_page(directory: Path, other: Path | None = None) -> str:
    """Return the page that `write_report` writes."""
    directories = [directory] if other is None else [directory, other]
    pipelines = [_is_pipeline(one) for one in directories]
    if len(set(pipelines)) > 1:
        raise ConfigError(
            "a run and a pipeline can't be compared",
            place=str(directories[pipelines.index(False)]),
            fix="give two runs, or two pipelines; a pipeline's stages are runs, in its `stages/`",
        )
    names = distinct_names(directories)
    drawing = PageCharts.create()
    if pipelines[0]:
        found = [read_pipeline(one, name) for one, name in zip(directories, names, strict=True)]
        sections = pipeline_sections(found, drawing)
        first, kind, measures = pipeline_overview(found), "Pipeline", True
    else:
        runs = [read_run(one, name) for one, name in zip(directories, names, strict=True)]
        sections = run_sections(runs, drawing)
        first, kind, measures = overview(runs), "Run", any(run.evaluations for run in runs)
    notes = [Paragraph(note, "bad") for note in drawing.notes]
    legend = [Paragraph(UNCERTAINTY, "muted")] if measures else []
    first = Section(first.title, [*first.blocks, *notes, *legend])
    return html_page(_title(kind, names, directories[0]), present(first, *sections))


def _title(kind: str, names: Sequence[str], directory: Path) -> str:
    """Return the page's title: `Pipeline arithmetic`; with the folder above where the name says no more than the kind."""
    (first, *others), above = names, directory.resolve().parent.name
    if above and not others and first.lower().rstrip("s") == kind.lower():
        first = f"{above}/{first}"
    return f"{kind} {' and '.join([first, *others])}"


def _is_pipeline(path: Path) -> bool:
    """Return whether a directory is a pipeline's, or else a run's.

    Raises:
        ConfigError: it is neither.
    """
    require_readable(path)
    if is_pipeline_directory(path):
        return True
    if is_run_directory(path):
        return False
    raise ConfigError(
        "is neither a run's nor a pipeline's directory",
        place=str(path),
        fix=near_run(path, pipelines=True)
        or "give the directory that a run or a pipeline was started with as `--output`",
    )


def distinct_names(directories: Sequence[Path]) -> list[str]:
    """Return what tells directories apart: their names, or as many of the folders above as it takes."""
    parts = [one.resolve().parts for one in directories]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    names = ["/".join(each[-depth:]) or "/" for each in parts]
    return [f"{name} ({number})" for number, name in enumerate(names, 1)] if len(set(names)) < len(names) else names
