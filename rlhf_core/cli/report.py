"""`rlhf report`: a run, a pipeline, or two of them beside each other, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_core.cli.printing import print_json, print_text
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.infra.files import readable_size

_Run = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run or of a pipeline; it may be in progress.")
]
_Other = Annotated[
    Path | None,
    typer.Argument(metavar="RUN_DIR_B", help="Another one of the same kind, to be shown beside the first."),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where the page is written; without it report.html in RUN_DIR, and of two in the current directory.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the page's path and size as JSON.")]


def add_to(app: typer.Typer) -> None:
    app.command()(report)


def report(run: _Run, other: _Other = None, output: _Output = None, as_json: _Json = False) -> None:
    """Write a run or a pipeline as one HTML page: `rlhf report runs/grpo`, or `rlhf report runs/a runs/b --output ab.html`.

    The page needs no network and no other file. It shows loss and reward curves, stability, learning signal, time, evaluations
    before and after, samples and rollouts with token probabilities, configuration and versions; of a pipeline its stages,
    capability tests, search trees and merges, too. Of two runs curves are overlaid, and options and samples stand beside each
    other. A run that is in progress, was killed or has damaged files is shown as far as it goes, and the page says what is
    missing. Charts need matplotlib (the extra `plot`).
    """
    with quick_imports():
        from rlhf_core.evaluation.report import write_report
    path = write_report(run, other, output=output)
    size = path.stat().st_size
    if as_json:
        return print_json({"report": str(path), "bytes": size})
    return print_text(f"{path}  {readable_size(size)}")
