"""`rlhf compare-samplers`: several samplers on the same prompts, accuracy against tokens forwarded."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.cli import METHOD_OPTIONS
from rlhf_core.cli.printing import print_json, print_table, print_text
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_core.config.training import ModelConfig
    from rlhf_core.contracts.sampler import Sampler
    from rlhf_core.evaluation.sampler_comparison import SamplerScore
    from rlhf_core.generation.sampling_job import SamplingJob
    from rlhf_core.models import PolicyModel
    from rlhf_core.rewards import Rewards

log = logging.getLogger(__name__)

_SHARED = ("model", "prompts", "limit", "seed", "batch_size", "precision", "dataset", "compress")
"""Options of a sampling run that the samplers of a comparison must have in common."""
_UNUSED = {"output": None, "n": 1, "ids": False, "logprobs": False}
"""Those that a comparison doesn't use."""


def add_to(app: typer.Typer) -> None:
    app.command("compare-samplers", context_settings=METHOD_OPTIONS)(compare)


def compare(
    context: typer.Context,
    check: Annotated[
        str,
        typer.Option(
            metavar="REWARD",
            help="What tells right answers from wrong ones: a reward's name, `module:function`, or `{name: …, options: {…}}`;"
            " its mean is the accuracy.",
        ),
    ] = "numeric_answer",
    repeats: Annotated[
        int, typer.Option(min=1, help="Answers of each sampler to each prompt; more make the errors smaller.")
    ] = 1,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against tokens, as .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare samplers: `rlhf compare-samplers "generate --temperature 0" "best_of_n --choose majority" --model M --prompts P`.

    Each sampler is a text in quotes: what would follow `rlhf sample`, a name or a file with options of its own. The options after
    the last one hold for all: --model, --prompts (rows with an `answer`), --limit, --seed, --batch-size, --max-new-tokens and
    others of `rlhf sample`.

    Printed are, for each sampler, the accuracy of its first completions, the tokens that models were run on per prompt, and the
    difference to the first sampler on the same prompts, each with its standard error over prompts.
    """
    texts, flags = _texts_and_flags(context.args)
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.config.yaml_file import parse_scalar
        from rlhf_core.evaluation.sampler_comparison import check_plot, plot_comparison
        from rlhf_core.generation.sampling_job import load_sampling_job
        from rlhf_core.registry.plugin_logs import setup_logging
        from rlhf_core.rewards import open_rewards

        setup_logging()
        jobs: dict[str, SamplingJob] = {}
        for text in texts:
            name, *own = _split(text)
            jobs[text] = load_sampling_job(name, flags=[*flags, *own])
    _check_alike(jobs)
    if plot is not None:
        check_plot(plot)
    results = _compared(jobs, open_rewards(parse_scalar(check), place="--check"), repeats)
    if plot is not None:
        plot_comparison(results, plot)
    if as_json:
        return print_json({"samplers": [one.as_dict() for one in results], "plot": None if plot is None else str(plot)})
    answers = f"{repeats} answer{'s' * (repeats > 1)} each"
    print_text(f"{len(results[0].by_prompt):,} prompts, {answers}, checked by {check}; ± standard error")
    print_table(
        ("sampler", "accuracy", "tokens/prompt", "more than the first", "seconds"), [_cells(one) for one in results]
    )
    if plot is not None:
        print_text(f"plot: {plot}")
    return None


def _compared(jobs: Mapping[str, SamplingJob], check: Rewards, repeats: int) -> list[SamplerScore]:
    """Load the models and compare the samplers, showing how far they are."""
    from rlhf_core.evaluation.sampler_comparison import compare_samplers
    from rlhf_core.generation.watching import watching
    from rlhf_core.infra.devices import DeviceManager
    from rlhf_core.infra.progress import RowBar

    first = next(iter(jobs.values()))
    rows, samplers = first.prompts(), _loaded(jobs)
    with RowBar(total=len(samplers) * len(rows) * repeats) as bar, watching(bar.add_tokens):
        return compare_samplers(
            samplers,
            rows,
            check=check,
            repeats=repeats,
            seed=first.run.seed,
            together=first.run.rows_together(DeviceManager().kind),
            found=_log,
            answered=bar.update,
        )


def _texts_and_flags(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the samplers, which come first, and the flags behind them."""
    begin = next((number for number, token in enumerate(tokens) if token.startswith("-")), len(tokens))
    texts = list(tokens[:begin])
    fix = 'rlhf compare-samplers "generate --temperature 0" "best_of_n --choose majority" --model M --prompts FILE'
    if not texts:
        raise ConfigError("no samplers are named", place="command line", fix=fix)
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise ConfigError("a sampler is named twice with the same options", place="command line", got=f"`{twice[0]}`")
    return texts, list(tokens[begin:])


def _split(text: str) -> list[str]:
    try:
        tokens = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"a sampler can't be read: {error}", place="command line", got=f"`{text}`") from None
    if not tokens:
        raise ConfigError("a sampler has no name", place="command line", got=repr(text), fix="write its name first")
    return tokens


def _check_alike(jobs: Mapping[str, SamplingJob]) -> None:
    """Refuse samplers that would answer other prompts, or by another model, and options without a meaning here."""
    first = next(iter(jobs.values())).run
    for text, job in jobs.items():
        for key, value in _UNUSED.items():
            if getattr(job.run, key) != value:
                raise ConfigError(
                    f"`{key}` has no meaning in a comparison, which checks one completion per answer",
                    place=f"`{text}`",
                    fix="leave it out",
                )
        for key in _SHARED:
            if getattr(job.run, key) != getattr(first, key):
                raise ConfigError(
                    f"samplers that are compared must have the same `{key}`",
                    place=f"`{text}`",
                    fix=f"give `--{key.replace('_', '-')}` once, behind the samplers",
                )


def _loaded(jobs: Mapping[str, SamplingJob]) -> dict[str, Sampler]:
    """Return the samplers; a model that several use is loaded once."""
    from rlhf_core.cli.model_argument import check_model, open_policy
    from rlhf_core.generation.sampling_job import PolicyPreparation

    for job in jobs.values():
        for model in (model for models in job.policies().values() for model in models):
            check_model(model.path)
    rewards = {text: job.rewards() for text, job in jobs.items()}
    opened: dict[str, PolicyModel] = {}
    samplers = {}
    prepared = PolicyPreparation(next(iter(jobs.values())).run)  # they share the options of reading prompts
    for text, job in jobs.items():

        def load(model: ModelConfig, job: SamplingJob = job) -> PolicyModel:
            key = model.model_dump_json()
            if key not in opened:
                opened[key] = prepared(open_policy(model, precision=job.run.precision))
            return opened[key]

        samplers[text] = job.sampler(job.options, **job.loaded_with(load), **rewards[text])
    return samplers


def _log(one: SamplerScore) -> None:
    log.info("%s: accuracy %.3f, %.0f tokens per prompt", one.name, one.accuracy, one.tokens_per_prompt)


def _cells(one: SamplerScore) -> tuple[str, ...]:
    more = "" if one.difference is None else _with_error(f"{one.difference[0]:+.3f}", one.difference[1])
    return (
        one.name,
        _with_error(f"{one.accuracy:.3f}", one.error),
        f"{one.tokens_per_prompt:,.1f}",
        more,
        f"{one.seconds:.1f}",
    )


def _with_error(text: str, error: float | None) -> str:
    return text if error is None else f"{text} ± {error:.3f}"
