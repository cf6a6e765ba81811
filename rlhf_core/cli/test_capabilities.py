"""`rlhf test-capabilities`: suites of prompts that a policy answers, and whether it got worse than a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.cli.other_command import refuse_file_of_another
from rlhf_core.cli.printing import print_json, print_table, print_text
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports

if TYPE_CHECKING:
    from rlhf_core.improvement.capability_tests import CapabilityResult


def add_to(app: typer.Typer) -> None:
    app.command("test-capabilities")(test_capabilities)


def test_capabilities(
    suites: Annotated[str, typer.Argument(metavar="SUITES.yaml", help="The suites, and what counts as a regression.")],
    model: Annotated[str, typer.Option(metavar="PATH", help="Policy to test: a directory, an adapter or a hub name.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of completions, where they are drawn.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Where the result is written.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="An earlier result, which this one is compared with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Test what a policy can do: `rlhf test-capabilities suites.yaml --model M --output after.json --baseline before.json`.

    The file has `suites`, each with `name`, `prompts`, `validator` and how completions are drawn, and `alpha` and `threshold`,
    which say what a regression is. Where there is one against the baseline, the exit code is 8.
    """
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.improvement.capability_tests import CapabilityResult, CapabilityTester
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
        refuse_file_of_another(suites, "test-capabilities")
        tester = CapabilityTester.load(suites)
        before = None if baseline is None else CapabilityResult.load(baseline)
    result = tester.run(model, seed)
    if output is not None:
        result.save(output)
    if as_json:
        print_json(result.as_json())
    else:
        _show(result)
    if before is not None:
        for change in tester.check(before, result):
            print_text(str(change))


def _show(result: CapabilityResult) -> None:
    """Print each suite's value."""
    rows = []
    for name, suite in result.suites.items():
        error = "" if suite.estimate.error is None else f" ± {suite.estimate.error:.3f}"
        rows.append((name, suite.task, f"{suite.estimate.value:.3f}{error}", str(suite.estimate.count)))
    print_table(("suite", "task", "value", "prompts"), rows)
