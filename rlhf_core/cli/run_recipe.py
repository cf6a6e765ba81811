"""`rlhf run`: a whole pipeline from a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rlhf_core.cli.other_command import refuse_file_of_another
from rlhf_core.cli.printing import print_json, print_table, print_text
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.infra.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from rlhf_core.infra.errors import RLHFError
    from rlhf_core.pipeline.pipeline_plan import PipelinePlan
    from rlhf_core.pipeline.pipeline_run import PipelineResult

_Recipe = Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe: see docs/pipeline.md.")]


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    recipe: _Recipe,
    output: Annotated[str | None, typer.Option(help="Directory of the pipeline, in place of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, in place of the recipe's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe as `rlhf validate` does; run and write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished stages, continue the one that was stopped.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the pipeline in the directory; with --resume the changed stages alone."
        ),
    ] = False,
    logs: Annotated[bool, typer.Option("--logs", help="Show what the stages log, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a pipeline of stages: `rlhf run RECIPE.yaml`, from data to a policy that is tested and guarded.

    The whole recipe is checked first: stages, options, data and models. Each stage runs in a process of its own, in
    OUTPUT/stages/; a line tells its begin, its end and its gain, and another, meanwhile, how it goes. Where a stage fails or
    makes a capability worse, later stages go on with the policy from before, or the pipeline stops, as the recipe says.
    """
    no_bars_in_logs()
    refuse_file_of_another(recipe, "run", checked=dry_run)
    changes = {key: value for key, value in {"output": output, "seed": seed}.items() if value is not None}
    if dry_run:
        return check(recipe, changes, resume=resume, overwrite=overwrite, as_json=as_json)
    with quick_imports():
        from rlhf_core.pipeline.orchestrator import RLHFOrchestrator
        from rlhf_core.pipeline.recipe import RecipeError
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
    show = _to_stderr if logs else None
    tell = _to_stderr if as_json else _tell
    try:
        result = RLHFOrchestrator(recipe, changes, tell=tell, log=show).run_full_pipeline(
            resume=resume, overwrite=overwrite
        )
    except RecipeError as error:
        _refuse(error.errors)
    _report(result, as_json=as_json)
    if result.error is not None:
        raise result.error
    return None


def check(
    recipe: str,
    changes: dict[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """Check a recipe and its directory; print its stages, and `ok` or every mistake.

    Exits with the code of the first kind of mistake.

    Args:
        changes: of the recipe's own keys.
        resume, overwrite: what the pipeline would be started with.
    """
    with quick_imports():
        from rlhf_core.pipeline.orchestrator import pipeline_inputs
        from rlhf_core.pipeline.pipeline_plan import PipelinePlan
        from rlhf_core.pipeline.pipeline_record import output_state, refuse_inputs_inside
        from rlhf_core.pipeline.recipe import RecipeError, read_recipe
        from rlhf_core.pipeline.stage_costs import stage_costs

        try:
            plan = PipelinePlan(read_recipe(recipe, changes))
        except RecipeError as error:
            _refuse(error.errors)
        errors, state = plan.check(), None
        if "output" not in plan.recipe.wrong:
            try:
                state = output_state(plan.output, resume=resume, overwrite=overwrite)
                if overwrite and not resume:
                    refuse_inputs_inside(plan.output, pipeline_inputs(plan))
            except (StorageError, ConfigError) as error:
                errors.append(error)
        costs = [] if errors else stage_costs(plan)
    if as_json:
        rows = plan.as_rows()
        for row, cost in zip(rows, costs, strict=False):
            row["cost"] = cost.as_dict()
        output = None if "output" in plan.recipe.wrong else str(plan.output)
        lines = [error.line() for error in errors]
        print_json({"stages": rows, "errors": lines, "output": output, "output_state": state})
    else:
        _show(plan, [cost.cells() for cost in costs])
    if errors:
        _refuse(errors)
    if not as_json:
        stages = "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"
        print_text(f"output: {plan.recipe.recipe.output} ({state})")
        print_text(f"ok: {recipe} is a valid recipe of {stages}")


def _show(plan: PipelinePlan, costs: list[tuple[str, ...]]) -> None:
    """Print the table of a plan's stages."""
    header = ("#", "stage", "kind", "method", "from", "makes")
    rows = []
    for number, row in enumerate(plan.as_rows()):
        cells = (
            str(number + 1),
            row["stage"],
            row["kind"],
            row["method"] or "",
            _short(row["from"]),
            ", ".join(row["makes"]),
        )
        rows.append((*cells, *costs[number]) if costs else cells)
    print_table((*header, "memory", "time") if costs else header, rows)
    if costs:
        print_text("memory and time are rough: from parameters and tokens, at this machine's measured speed")


def _short(names: list[str]) -> str:
    """Return references and models as a cell has them."""
    return ", ".join(name.removeprefix("${stages.").removesuffix("}") for name in dict.fromkeys(names))


def _refuse(errors: list[RLHFError]) -> NoReturn:
    """Print every mistake as a line of its own and exit: by 2 where one is of the configuration, else by the lowest code."""
    for error in errors:
        print(error.line(), file=sys.stderr)
    raise typer.Exit(min(error.exit_code for error in errors))


def _report(result: PipelineResult, *, as_json: bool) -> None:
    """Print how a pipeline ended."""
    if as_json:
        stages = [
            {"stage": one.name, "status": one.status, "model": one.model and str(one.model), "reason": one.reason}
            for one in result.stages
        ]
        values = {
            "output": str(result.output),
            "policy": result.policy,
            "exit_code": result.exit_code,
            "stages": stages,
        }
        return print_json(values)
    stand = sum(one.status == "finished" for one in result.stages)
    print_text(f"done: {stand} of {len(result.stages)} stages finished")
    print_text(f"policy: {_near(result.policy)}")
    print_text(f"pipeline: {_near(str(result.output))}")
    return None


def _near(path: str) -> str:
    """Return a path relative to the current directory, where it is inside."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _tell(text: str) -> None:
    print_text(text)
    sys.stdout.flush()


def _to_stderr(text: str) -> None:
    print(text.rstrip("\n"), file=sys.stderr, flush=True)
