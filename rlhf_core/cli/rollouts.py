"""`rlhf rollouts`: what an online run was trained on, group by group, best and worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli.printing import print_json
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.cli.run_texts import clipped, require_run, styled, terminal, warn_of_damage
from rlhf_core.infra.errors import ConfigError
from rlhf_core.training.row_log import length_and_end

if TYPE_CHECKING:
    from rich.console import Console

_PROMPT_LINES, _LINES = 6, 8
"""Most lines that are shown of a prompt and of a completion, unless all of them are asked for."""

Group = list[dict[str, Any]]
"""The rows of one prompt's completions in one rollout."""

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory; the run may be in progress.")]
_Step = Annotated[
    int | None, typer.Option("--step", metavar="S", help="The rollout drawn after step S; without it the newest.")
]
_Row = Annotated[
    int | None, typer.Option("--row", metavar="K", help="Only the groups of row K of the data, in all rollouts.")
]
_Worst = Annotated[bool, typer.Option("--worst", help="Groups of the lowest mean reward first; else the highest.")]
_Page = Annotated[int, typer.Option("--page", metavar="P", min=1, help="Page P of the groups, from 1.")]
_Size = Annotated[int, typer.Option("--groups", metavar="N", min=1, help="Groups per page; more make longer pages.")]
_All = Annotated[
    bool, typer.Option("--all", help="Every completion of a group, whole; else its best and its worst one, shortened.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print rows as JSON: all of them, or those of --step and --row.")]


def add_to(app: typer.Typer) -> None:
    app.command()(rollouts)


def rollouts(
    run: _Run,
    step: _Step = None,
    row: _Row = None,
    worst: _Worst = False,
    page: _Page = 1,
    size: _Size = 5,
    every: _All = False,
    as_json: _Json = False,
) -> None:
    """Page through what an online method was trained on: the groups of a rollout, best or worst first.

    Of each completion its reward with its parts, its advantage, and how far the engine's log-probabilities are from the
    trainer's. `logging.rollouts` says how many groups a run keeps.
    """
    with quick_imports():
        groups = _groups(run)
    steps = sorted({group[0]["step"] for group in groups})
    if step is not None and step not in steps:
        near = sorted(sorted(steps, key=lambda one: abs(one - step))[:8])
        fix = f"use one of {', '.join(map(str, near))}"
        raise ConfigError("no rollout was drawn after this step", place="--step", got=step, fix=fix)
    chosen = [group for group in groups if row in (None, group[0]["row"])]
    if not chosen:
        raise ConfigError("no group of this row is kept", place="--row", got=row, fix="leave it out to see the others")
    if step is not None or (row is None and not as_json):
        wanted = steps[-1] if step is None else step
        chosen = [group for group in chosen if group[0]["step"] == wanted]
        if not chosen:
            raise ConfigError("no group of this row is kept there", place="--row and --step", got=f"{row} and {step}")
    if as_json:
        return print_json([one for group in chosen for one in group])
    if row is None:
        chosen = sorted(chosen, key=lambda group: _mean(group) if worst else -_mean(group))
    return _print(run, chosen, steps, page=page, size=size, every=every)


def _groups(run: Path) -> list[Group]:
    """Return the groups in a run's `rollouts.jsonl`.

    Raises:
        StorageError: it is no run's directory, or the file can't be read.
        ConfigError: the run has kept no rollouts.
    """
    from rlhf_core.training.rollout_log import ROLLOUTS, groups_of, read_rollouts

    require_run(run)
    rows, damaged = read_rollouts(run / ROLLOUTS) if (run / ROLLOUTS).exists() else ([], [])
    warn_of_damage(run / ROLLOUTS, damaged)
    if not rows:
        raise ConfigError(
            "the run has kept no rollouts",
            place=str(run),
            fix="if it has just begun, wait for its first update; only online methods have rollouts, and none are kept with"
            " `logging.rollouts.groups 0`",
        )
    return groups_of(rows)


def _rewards(group: Group) -> list[float]:
    return [row["reward"] for row in group if isinstance(row["reward"], int | float)]


def _mean(group: Group) -> float:
    """Return the group's mean reward; groups without rewards come last of the best."""
    rewards = _rewards(group)
    return sum(rewards) / len(rewards) if rewards else -math.inf


def _print(run: Path, groups: Sequence[Group], steps: Sequence[int], *, page: int, size: int, every: bool) -> None:
    """Print one page of groups, and how to see more."""
    pages = -(-len(groups) // size)
    if page > pages:
        raise ConfigError("there is no such page", place="--page", got=page, fix=f"use 1 to {pages}")
    console = terminal()
    for group in groups[(page - 1) * size : page * size]:
        _print_group(console, group, every=every)
    known = ", ".join(map(str, steps[:4])) + (f" … {steps[-1]}" if len(steps) > 4 else "")
    plural = "s" if len(groups) != 1 else ""
    console.print(
        styled(f"{run}: page {page} of {pages}, {len(groups)} group{plural}; rollouts of steps {known}", "dim")
    )
    more = [f"--page {page + 1}"] * (page < pages) + ["--worst", "--all", "--step S", "--row K", "--json"]
    console.print(styled(f"More: {', '.join(more)}", "dim"))


def _print_group(console: Console, group: Group, *, every: bool) -> None:
    """Print a prompt, and its completions from the best to the worst."""
    from rich.padding import Padding
    from rich.rule import Rule

    from rlhf_core.training.row_log import last_message, prompt_text

    first, rewards = group[0], _rewards(group)
    title = f"step {first['step']}, row {first['row']}: {len(group)} completion{'s' * (len(group) != 1)}"
    if rewards:
        title += f", reward {_mean(group):.3g} ({min(rewards):.3g} to {max(rewards):.3g})"
    line = "-" if console.options.ascii_only else "─"
    console.print(Rule(styled(title, "bold"), align="left", style="dim", characters=line))
    earlier = 0 if every or isinstance(first["prompt"], str) else len(first["prompt"] or ()) - 1
    if earlier > 0:
        console.print(styled(f"  … {earlier} earlier message{'s' * (earlier > 1)}", "dim"))
    prompt = (prompt_text if every else last_message)(first["prompt"]).strip("\n")
    console.print(Padding(clipped(console, prompt, console.width - 2, None if every else _PROMPT_LINES), (0, 0, 0, 2)))
    ordered = sorted(group, key=lambda row: -(row["reward"] if isinstance(row["reward"], int | float) else -math.inf))
    for row in ordered if every else ordered[:1] + ordered[1:][-1:]:
        console.print(styled(_figures(row), "cyan"))
        text = clipped(console, row["completion"], console.width - 4, None if every else _LINES)
        console.print(Padding(text if row["completion"] else styled("(empty)", "dim italic"), (0, 0, 0, 4)))


def _figures(row: dict[str, Any]) -> str:
    """Return a completion's figures as one line."""
    parts = []
    if isinstance(row["reward"], int | float):
        named = [f"{name} {value:.3g}" for name, value in row.get("rewards", {}).items()]
        parts.append(f"reward {row['reward']:.3g}" + (f" ({', '.join(named)})" if named else ""))
    advantage = row.get("advantage")
    parts.append("not trained on" if advantage is None else f"advantage {advantage:+.3g}")
    if isinstance(row.get("logprob_gap"), int | float):
        parts.append(f"gap {row['logprob_gap']:.1e}")
    return f"#{row['sample']}  " + ", ".join([*parts, length_and_end(row)])
