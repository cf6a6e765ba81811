"""`rlhf data`: what rows hold, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli import METHOD_OPTIONS, shell_completion
from rlhf_core.cli.flag_wording import say_in_flags
from rlhf_core.cli.printing import (
    encodable,
    folded,
    print_heading,
    print_json,
    print_note,
    print_rule,
    print_wrapped,
    styled,
    text_width,
)
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.infra.errors import ConfigError, printable

if TYPE_CHECKING:
    from rlhf_core.config.training import TrainerConfig
    from rlhf_core.contracts.trainer import Trainer
    from rlhf_core.data.data_survey import DataSurvey, Lengths, NotedMistakes, RowPicture

_OPTIONS = ("max_length", "trust_remote_code", "new_tokens", "dataset")
"""Options of every method that decide how rows are read."""
_MARKS = ("«", "»")
_SHOWN = 1500
"""Characters of each part of a row that are shown."""


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(data)


def data(
    context: typer.Context,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Files, patterns, folders or hub names, then options of a method."),
    ],
    method: Annotated[
        str | None,
        typer.Option(help="Check the rows as this method's.", autocompletion=shell_completion.trainers),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Encode the rows as for this model; no weights are read.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Most rows to read of each file; 0 reads all.")] = 100_000,
    mistakes: Annotated[int, typer.Option(min=1, help="Most lines of mistakes; of more, some of each kind.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print as JSON, with every mistake up to a thousand.")
    ] = False,
) -> None:
    """Show what data hold: `rlhf data rows.jsonl --method dpo --model M`, before anything is trained on them.

    What was recognised as what, rows, lengths, what `max_length` cuts, duplicates, labels, every mistake with file and line, and
    two rows as the model sees them, with the tokens in the loss. Any option on how rows are read is a flag here, too:
    --max_length 512, --dataset.columns.prompt question, --dataset.wrap chat. Exits with 3 where a row has a mistake.
    """
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.data.data_survey import survey_data

        paths, flags = _paths_and_flags([*files, *context.args])
        kind, config = _method_and_options(method, flags)
        tokenizer, config = (None, config) if model is None else _outline(model, config)
    survey = survey_data(
        paths[0] if len(paths) == 1 else paths,
        None if kind is None else kind.record_type(config),
        tokenizer=tokenizer,
        options=config.dataset,
        max_length=config.length_limit,
        limit=limit or None,
    )
    say_in_flags(survey.mistakes.kept)
    if as_json:
        print_json(survey.as_dict())
    else:
        _print(survey, model, mistakes)
    if survey.mistakes:
        raise typer.Exit(survey.mistakes.kept[0].exit_code)


def _paths_and_flags(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files, and the flags that follow them, which typer takes for files, too."""
    first = next((number for number, token in enumerate(tokens) if token.startswith("--")), len(tokens))
    if not first:
        raise ConfigError("no file is named", place="command line", fix="`rlhf data FILE... --option value`")
    for name in tokens[:first]:
        if name.endswith((".yaml", ".yml")):
            raise ConfigError(
                "is a configuration, not a file of rows", place=name, fix=f"`rlhf validate {name}` reads its rows, too"
            )
    return [*tokens[:first]], [*tokens[first:]]


def _method_and_options(name: str | None, flags: list[str]) -> tuple[type[Trainer[Any]] | None, TrainerConfig]:
    """Return the method whose rows they are to be, if any, and the options on how rows are read.

    Raises:
        ConfigError: an unknown method or option, or an option on something else than rows.
    """
    from rlhf_core import registry
    from rlhf_core.config.flags import convert_options, lex, spread
    from rlhf_core.config.training import TrainerConfig
    from rlhf_core.config.yaml_file import nest
    from rlhf_core.contracts.trainer import Trainer

    kind: type[Trainer[Any]] | None = None if name is None else registry.get("trainer", name)
    config = TrainerConfig if kind is None else kind.Config
    values, places = convert_options(lex(flags), config, name or "data", ("method", "model"))
    chooses = kind is not None and kind.record_type.__func__ is not Trainer.record_type.__func__  # type: ignore[attr-defined]
    for key in values:
        head = key.partition(".")[0]
        if head not in _OPTIONS and not (chooses and head not in TrainerConfig.model_fields):
            problem = "doesn't decide how rows are read"
            fix = "leave it out" if kind is not None else "leave it out; where it is a method's, give `--method`"
            raise ConfigError(problem, place=places[key], fix=fix)
    given = nest(spread(values, config))
    if not any(info.is_required() and name not in given for name, info in config.model_fields.items()):
        return kind, config.parse(given, place=places)
    # What the method needs for training, such as a teacher, isn't needed here.
    shared = {key: value for key, value in given.items() if key in TrainerConfig.model_fields}
    return kind, config.model_construct(**{**given, **dict(TrainerConfig.parse(shared, place=places))})


def _outline(model: str, config: TrainerConfig) -> tuple[Any, TrainerConfig]:
    """Return a model's tokenizer, and the options with the `max_length` that a run would set from the model."""
    from rlhf_core.models.loading import read_outline
    from rlhf_core.training.loader import with_length

    outline = read_outline(model, trust_remote_code=config.trust_remote_code, new_tokens=config.new_tokens)
    return outline.tokenizer, with_length(config, outline.max_positions)


def _print(survey: DataSurvey, model: str | None, most: int) -> None:
    """Print a survey for people."""
    from rlhf_core.data.encoder import PLAIN

    report = survey.report
    print_heading(", ".join(survey.files[:4]) + (f" and {len(survey.files) - 4} more" if len(survey.files) > 4 else ""))
    how = " (recognised from the columns; `--method` says what they are for)" if survey.recognised else ""
    print_wrapped(f"record type: {survey.record}{how}")
    only = "" if survey.whole else "the first "
    usable = "all" if report.kept == survey.rows else f"{report.kept:,}" if report.kept else "none"
    was = "was" if survey.rows == 1 else "were"
    print_wrapped(f"rows: {only}{survey.rows:,} {was} read, {usable} can be used" + _epoch(survey))
    for shape, tally in report.shapes.items():
        print_wrapped(f"read as: {shape} ({_rows(tally['rows'])})")
    if report.labels:
        total = sum(report.labels.values())
        print_wrapped(
            "labels: " + ", ".join(f"{name} {n:,} ({100 * n / total:.0f} %)" for name, n in report.labels.items())
        )
    print_wrapped(f"duplicates: {_duplicates(survey)}")
    _print_lengths(survey)
    if model is None:
        print_note("Lengths in tokens, what `max_length` cuts and rows as the model sees them need `--model`.")
    for line in report.warnings():
        print_wrapped(f"note: {_short(line, survey)}")
    if survey.plain:
        print_wrapped(f"note: {PLAIN}")
    for picture in survey.pictures:
        _print_picture(picture)
    if survey.pictures:
        what = "in green" if _coloured() else f"between {_MARKS[0]} and {_MARKS[1]}"
        print_note(f"Tokens in the loss are {what}.")
    print_mistakes(survey.mistakes, most)


def _short(line: str, survey: DataSurvey) -> str:
    """Return a line of the report without the name of the file, where there is one alone: rows as `:12`."""
    line = line.removeprefix(f"{survey.report.name}: ")
    return line.replace(f"{survey.files[0]}:", ":") if len(survey.files) == 1 else line


def _epoch(survey: DataSurvey) -> str:
    if survey.whole or survey.epoch_rows is None:
        return "" if survey.whole else "; `--limit 0` reads all"
    return f"; there are about {survey.epoch_rows:,.0f} (`--limit 0` reads all)"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _duplicates(survey: DataSurvey) -> str:
    """Return how many rows are there twice, with examples."""
    if not survey.duplicates and not survey.repeated_prompts:
        return "none"
    places = ", ".join(f"{_near(later, earlier)} = {earlier}" for later, earlier in survey.duplicate_places)
    text = f"{_rows(survey.duplicates) if survey.duplicates else 'no row'} repeat an earlier one"
    text += f" ({places})" if places else ""
    if survey.repeated_prompts:
        text += f"; {_rows(survey.repeated_prompts)} have an earlier row's prompt and another response"
    for one in ("no row", "1 row"):
        text = text.replace(f"{one} repeat ", f"{one} repeats ").replace(f"{one} have ", f"{one} has ")
    return text


def _near(place: str, other: str) -> str:
    """Return a place without its file's name, where another place is in the same file: `:12`."""
    file, _, line = place.rpartition(":")
    return f":{line}" if other.startswith(f"{file}:") else place


def _print_lengths(survey: DataSurvey) -> None:
    """Print the histogram of lengths and what `max_length` cuts."""
    lengths = survey.lengths
    if not len(lengths):
        return
    of = "" if survey.record in ("prompt", "reasoning") else " with its longest response"
    known = lengths.as_dict()
    count = f"{survey.words / len(lengths):,.0f}"
    words = f"; {count} word{'s' * (count != '1')} per row" if lengths.unit != "tokens" else ""
    print_wrapped(
        f"{lengths.unit} per prompt{of}: median {known['median']:,}, mean {known['mean']:,.1f}, most {known['most']:,}{words}"
    )
    _print_histogram(lengths)
    if lengths.unit == "tokens":
        few, none = known["cutting_1_percent"], known["cutting_none"]
        others = f"{none:,} would cut none" if few == none else f"{few:,} would cut 1 %, {none:,} none"
        print_wrapped(f"max_length {survey.max_length:,} cuts {100 * survey.cut:.1f} % of the rows; {others}")


def _print_histogram(lengths: Lengths) -> None:
    rows = lengths.histogram()
    labels = [f"{least:,}" if least == most else f"{least:,}–{most:,}" for least, most, _ in rows]
    label, count = max(map(len, labels)), max(len(f"{n:,}") for *_, n in rows)
    room = max(10, min(60, text_width() - label - count - 6))
    largest = max(n for *_, n in rows)
    for text, (*_, n) in zip(labels, rows, strict=True):
        bar = "█" * round(room * n / largest) or ("▏" if n else "")
        print(encodable(f"  {text:>{label}}  {n:>{count},}  {bar}".rstrip()))


def _print_picture(picture: RowPicture) -> None:
    """Print a row as the model sees it: tokens in the loss in green, or between « and » where there are no colours."""
    cut = ", truncated" if picture.truncated else ""
    print_rule(f"{picture.place}, {picture.tokens:,} tokens{cut}")
    coloured = _coloured()
    for name, pieces in picture.parts.items():
        print(styled(f"{name}:", "dim"))
        room = _SHOWN
        for piece in pieces:
            text = encodable(printable(piece.text, lines=True))
            shown, room = text[:room], max(0, room - len(text))
            if shown and piece.in_loss:
                shown = _in_green(shown) if coloured else f"{_MARKS[0]}{shown}{_MARKS[1]}"
            print(shown, end="")
        more = sum(len(piece.text) for piece in pieces) - _SHOWN
        print(f" … {more:,} more characters" if more > 0 else "")


def _coloured() -> bool:
    return styled("x", "green") != "x"


def _in_green(text: str) -> str:
    """Return text in green, line by line, so that a pager shows it, too."""
    return "\n".join(styled(line, "green") if line else "" for line in text.split("\n"))


def print_mistakes(mistakes: NotedMistakes, most: int, *, to_stderr: bool = False) -> None:
    """Print about `most` mistakes, a line each, and how many more of each kind there are."""
    import sys

    stream = sys.stderr if to_stderr else sys.stdout
    shown, more = mistakes.shown(most)
    if mistakes and not to_stderr:
        print_rule(f"{len(mistakes):,} mistake{'s' * (len(mistakes) != 1)}")
    for error in shown:
        for line in [error.line()] if to_stderr else folded(encodable(error.line()), text_width()):
            print(line, file=stream)
    for kind, count in more.items():
        print(f"… and {count:,} more: {printable(kind)}", file=stream)
