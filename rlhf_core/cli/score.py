"""`rlhf score`: scores of any reward for files of completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli import METHOD_OPTIONS, shell_completion
from rlhf_core.cli.first_argument import refuse_flag
from rlhf_core.cli.printing import print_json, print_text, print_wrapped
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.cli.resumable_output import OverwriteOption, ResumeOption, check_apart, output_path, stoppable
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_core.config.flags import Flag
    from rlhf_core.config.score_run import ScoreRunConfig
    from rlhf_core.data.row_output import RowOutput
    from rlhf_core.evaluation.score_file import ScoreSummary
    from rlhf_core.rewards import Rewards

_Reward = Annotated[
    str,
    typer.Argument(
        metavar="REWARD",
        help="A reward's name, a function (`module:function`, `file.py:function`), or the directory of a reward model or of"
        " the run that trained it; then any of its options.",
        autocompletion=shell_completion.rewards,
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(score)


def score(
    context: typer.Context,
    reward: _Reward,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Score completions: `rlhf score exact_match --data rows.jsonl --output scored.jsonl`, or `rlhf score MODEL_DIR --data D`.

    --data takes files (.jsonl, .json, .csv, .parquet), a folder or a hub name. A row has a `prompt` and a `completion`, or
    `completions` (what `rlhf sample` writes), a `response`, a conversation (`messages`: its last answer is scored), or `chosen`
    and `rejected`, which are both scored. Its other columns reach the reward. --columns.completion NAME says what a column is
    called. Further: --score-column (the new column; `score`), --limit (rows), --split, --batch-size, --time-limit, --runs-in,
    --concurrency, and the reward's own options, which `rlhf show reward:NAME --all` lists; one with a name that is taken is set
    as --options.NAME.

    Rows are written in order, with all of their columns. Ctrl-C or SIGTERM stops; --resume continues. Without --output only the
    summary is printed.
    """
    refuse_flag(reward, "a reward", fix="`rlhf score REWARD --data FILE`")
    with quick_imports():
        from rlhf_core.config.flags import lex
        from rlhf_core.data.row_output import RowOutput
        from rlhf_core.evaluation.score_file import SCORES, ScoreSummary
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
        run, rewards = _opened(reward, lex(context.args))
    output = output_path(run.output, resume=resume, overwrite=overwrite)
    from rlhf_core.data.open_source import check_paths

    check_paths(run.data)
    summary = ScoreSummary()
    if output is None:
        return _finish(run, rewards, None, summary, as_json=as_json)
    check_apart(output, [run.data] if isinstance(run.data, str) else run.data)
    SCORES.check_output(output, resume=resume, overwrite=overwrite)
    record = {"rewards": rewards.describe(), "column": run.score_column}
    with RowOutput(output, SCORES, record, resume=resume, overwrite=overwrite) as file:
        return _finish(run, rewards, file, summary, as_json=as_json)


def _opened(reward: str, flags: Sequence[Flag]) -> tuple[ScoreRunConfig, Rewards]:
    """Return the options of the run, and the reward with its own options."""
    from rlhf_core import registry
    from rlhf_core.config.flags import convert, convert_options, spread
    from rlhf_core.config.score_run import ScoreRunConfig
    from rlhf_core.config.yaml_file import nest, overlay, parse_scalar
    from rlhf_core.infra.model_files import reward_at
    from rlhf_core.rewards import open_rewards
    from rlhf_core.rewards.opening import options_of

    mine: list[Flag] = []
    theirs: list[Flag] = []
    options: dict[str, Any] = {}
    for flag in flags:
        if flag.key.startswith("options."):
            theirs.append(replace(flag, name=flag.name.partition(".")[2]))
        else:
            (mine if flag.key.partition(".")[0] in ScoreRunConfig.model_fields else theirs).append(flag)
    values, places = convert(mine, ScoreRunConfig, owner="score")
    if "data" not in values:
        raise ConfigError("no rows are named", place="command line", fix="give `--data FILE`")
    run = ScoreRunConfig.parse(nest(values), place=places | {"": "command line"})
    name = reward
    if reward not in registry.rewards and Path(reward).expanduser().is_dir():
        model = Path(reward).expanduser()
        if not (model / "config.json").exists() and (model / "model").is_dir():  # a run's directory
            model /= "model"
        name = reward_at(model)
        options = {"model": str(model)}
    config = options_of(name, place="REWARD")
    if config is None:  # a function, whose arguments' annotations are checked when it is opened
        options |= {flag.key: True if flag.text is None else parse_scalar(flag.text) for flag in theirs}
        found = {flag.key: flag.typed for flag in theirs}
    else:
        given, found = convert_options(theirs, config, f"reward:{name}", tuple(ScoreRunConfig.model_fields))
        options = overlay(spread(options, config), nest(spread(given, config)))
        config.parse(options, place=found | {"": "command line"})  # names options as they were typed
    at = {f"rewards.0.options.{key}": place for key, place in found.items()}
    at |= {"rewards.0.name": "REWARD", "rewards.0": "command line", "": "command line"}
    how = {"time_limit": run.time_limit, "runs_in": run.runs_in, "concurrency": run.concurrency}
    return run, open_rewards([{"name": name, "options": options, **how}], place=at)


def _finish(
    run: ScoreRunConfig, rewards: Rewards, file: RowOutput | None, summary: ScoreSummary, *, as_json: bool
) -> None:
    """Score all rows, and print the summary.

    Raises:
        Stopped: by Ctrl-C or SIGTERM; what was scored is in the file.
        Interrupted: by one of these, where there is no file.
    """
    from rlhf_core.data.completion_rows import read_completion_rows
    from rlhf_core.evaluation.score_file import score_file

    rows = read_completion_rows(run.data, columns=run.columns, limit=run.limit, split=run.split)
    with stoppable(file):
        score_file(rewards, rows, file, column=run.score_column, together=run.batch_size, summary=summary)
    found = summary.as_dict() | ({} if file is None else {"output": str(file.path)})
    if as_json:
        return print_json(found)
    print_wrapped(f"{rewards.names[0]}: {found['completions']:,} completions in {found['rows']:,} rows")
    if found["completions"]:
        print_wrapped(
            f"mean {found['mean']:.6g}, standard deviation {found['std']:.6g}, {found['min']:.6g} to {found['max']:.6g}"
        )
        shown = ", ".join(f"{100 * float(q):g}% {value:.6g}" for q, value in found["quantiles"].items())
        print_wrapped(f"quantiles: {shown}")
    if "pairs" in found:
        ties = f", the {found['ties']:,} of equal scores as half right" if found["ties"] else ""
        print_wrapped(f"chosen scores higher than rejected: {found['accuracy']:.1%} of {found['pairs']:,} pairs{ties}")
    print_text(f"seconds: {found['seconds']:.1f}")
    if file is not None:
        print_text(f"rows: {file.path}")
    return None
