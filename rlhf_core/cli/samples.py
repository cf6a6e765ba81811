"""`rlhf samples`: what a run's model says, a prompt's completions side by side over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli.printing import print_json
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.cli.run_texts import clipped, require_run, styled, terminal, warn_of_damage
from rlhf_core.infra.errors import ConfigError
from rlhf_core.training.row_log import length_and_end
from rlhf_core.training.sample_log import PromptSamples, samples_by_prompt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLUMN = 36
"""Least width of a step's column, in characters: two of them fit into 80."""
_PROMPT_LINES, _LINES = 6, 12
"""Most lines that are shown of a prompt and of a completion, unless one prompt is asked for."""
_NAMES = {"prompt": "fixed prompt", "evaluation": "held-out row {row}", "rollout": "rollout of row {row}"}

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory; the run may be in progress.")]
_Prompt = Annotated[
    int | None, typer.Option("--prompt", metavar="K", help="Only prompt number K, from 1: whole texts, at every step.")
]
_Steps = Annotated[
    list[int] | None, typer.Option("--step", metavar="S", help="Only the completions after step S; may be repeated.")
]
_Last = Annotated[bool, typer.Option("--last", help="Only the newest completions of each kind.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the rows as JSON, all of them unless options choose some.")]


def add_to(app: typer.Typer) -> None:
    app.command()(samples)


def samples(
    run: _Run, prompt: _Prompt = None, steps: _Steps = None, last: _Last = False, as_json: _Json = False
) -> None:
    """Show what a run's model says: the completions of its fixed prompts, side by side over the steps.

    A run completes the prompts of `logging.samples.prompts` at its start, at each evaluation (or every
    `logging.samples.every` steps) and at its end. Runs of online methods keep some completions of each rollout and of
    each evaluation, too, with their rewards. As many steps are shown as fit side by side, from the first to the last.
    """
    with quick_imports():
        rows = _rows(run)
    everything = samples_by_prompt(rows)
    if steps and last:
        raise ConfigError("the newest steps and others are asked for", place="--step and --last", fix="choose one")
    chosen = _chosen(everything, prompt, steps, last)
    if as_json:
        return print_json([row for group in chosen for row in group.rows])
    return _print(run, everything, chosen, whole=prompt is not None, spread=prompt is None and not steps)


def _rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `samples.jsonl`.

    Raises:
        StorageError: it is no run's directory, or the file can't be read.
        ConfigError: the run has no samples.
    """
    from rlhf_core.training.sample_log import NAME, read_samples

    require_run(run)
    rows, damaged = read_samples(run / NAME) if (run / NAME).exists() else ([], [])
    warn_of_damage(run / NAME, damaged)
    if not rows:
        raise ConfigError(
            "the run has no samples",
            place=str(run),
            fix="if it has just begun, wait for its first ones; else ask for them with `--logging.samples.prompts TEXT` (or a"
            " file of rows), also where the run is resumed",
        )
    return rows


def _chosen(
    groups: Sequence[PromptSamples], prompt: int | None, steps: Sequence[int] | None, last: bool
) -> list[PromptSamples]:
    """Return the groups, and of each the rows, that were asked for.

    Raises:
        ConfigError: there is no such prompt, or nothing was kept at such a step.
    """
    if prompt is not None and not 1 <= prompt <= len(groups):
        raise ConfigError("there is no such prompt", place="--prompt", got=prompt, fix=f"use 1 to {len(groups)}")
    found = [group for group in groups if prompt in (None, group.number)]
    known = sorted({step for group in found for step in group.steps})
    for step in steps or ():
        if step not in known:
            near = sorted(known, key=lambda one: abs(one - step))[:8]
            raise ConfigError(
                "no samples of this step",
                place="--step",
                got=step,
                fix=f"use one of {', '.join(map(str, sorted(near)))}",
            )
    newest = {
        kind: max(step for group in found if group.kind == kind for step in group.steps) for kind in _kinds(found)
    }
    made = []
    for group in found:
        wanted = steps or ([newest[group.kind]] if last else group.steps)
        if (few := group.only(wanted)).rows:
            made.append(few)
    return made


def _kinds(groups: Sequence[PromptSamples]) -> list[str]:
    return list(dict.fromkeys(group.kind for group in groups))


def _print(
    run: Path, everything: Sequence[PromptSamples], chosen: Sequence[PromptSamples], *, whole: bool, spread: bool
) -> None:
    """Print prompts with their completions.

    Args:
        whole: show whole texts, however long.
        spread: show only as many steps as fit side by side, and of the rollouts the newest.
    """
    console = terminal()
    fitting = max(1, console.width // COLUMN)
    rollouts = [group for group in chosen if group.kind == "rollout"]
    newest = max((step for group in rollouts for step in group.steps), default=None)
    left_out = False
    for group in chosen:
        if spread and group.kind == "rollout" and newest not in group.steps:
            left_out = True
            continue
        steps = _spread(group.steps, fitting) if spread else group.steps
        left_out = left_out or len(steps) < len(group.steps)
        _print_group(console, group, steps, fitting, whole=whole)
    every = sorted({row["step"] for group in everything for row in group.rows})
    known = ", ".join(map(str, _spread(every, 8)))
    console.print(styled(f"{run}: {len(everything)} prompts; steps {known}{' …' if len(every) > 8 else ''}", "dim"))
    if left_out:
        console.print(styled("More: --prompt K (one prompt at every step, whole), --step S, --last, --json", "dim"))


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    if most == 1:
        return [steps[-1]]
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def _print_group(console: Console, group: PromptSamples, steps: Sequence[int], fitting: int, *, whole: bool) -> None:
    """Print one prompt, and its completions in columns, one per step, as many bands of them as the steps need."""
    from rich import box
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.table import Table

    from rlhf_core.training.row_log import prompt_text

    first = group.rows[0]
    title = styled(f"{group.number}. {_NAMES[group.kind].format(row=first['row'])}", "bold")
    console.print(Rule(title, align="left", style="dim", characters="-" if console.options.ascii_only else "─"))
    asked = clipped(
        console, prompt_text(first["prompt"]).strip("\n"), console.width - 2, None if whole else _PROMPT_LINES
    )
    console.print(Padding(asked, (0, 0, 0, 2)))
    for start in range(0, len(steps), fitting):
        band = steps[start : start + fitting]
        columns = fitting if len(steps) > fitting else len(band)  # the last band's columns are as wide as the others'
        width = (console.width - 3 * columns - 1) // columns
        table = Table(box=box.ASCII if console.options.ascii_only else box.ROUNDED, padding=(0, 1), show_lines=True)
        for step in band:
            table.add_column(styled(f"step {step}", "bold"), width=width, overflow="fold")
        completions = [group.of(step) for step in band]
        for number in range(max(map(len, completions))):
            cells = [of[number] if number < len(of) else None for of in completions]
            table.add_row(*(_cell(console, row, width, whole=whole) if row else styled("") for row in cells))
        console.print(table)


def _cell(console: Console, row: dict[str, Any], width: int, *, whole: bool) -> Text:
    """Return a completion with its scores and why it ended."""
    text = clipped(console, row["completion"], width, None if whole else _LINES)
    if not row["completion"]:
        text = styled("(empty)", "dim italic")
    return text.append("\n").append_text(styled("\n".join(_facts(row)), "dim"))


def _facts(row: dict[str, Any]) -> Iterator[str]:
    """Yield lines on a completion: its scores, its tokens and why it ended."""
    if isinstance(row.get("reward"), int | float):
        parts = [f"{name} {value:.3g}" for name, value in row.get("rewards", {}).items()]
        yield f"reward {row['reward']:.3g}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
    yield length_and_end(row)
