"""`rlhf init`: a commented configuration file of a method, and the schema by which an editor checks and completes it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli import shell_completion
from rlhf_core.cli.printing import print_text
from rlhf_core.infra.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from rlhf_core.config.training import TrainerConfig
    from rlhf_core.registry.discovery import Plugin

_SHARED = {
    "How long and how fast": (
        "learning_rate",
        "batch_size",
        "epochs",
        "max_steps",
        "max_length",
        "lr_schedule",
        "warmup_ratio",
    ),
    "What fits into memory": ("precision", "micro_batch_size", "gradient_checkpointing"),
    "Measured on the way": ("eval_steps", "seed"),
}
"""Options of every trainer that most people set, under their headings."""
_EXAMPLES: Mapping[str, tuple[str, str]] = {
    "lora": ("{rank: 16, alpha: 32}", "Train adapters alone, at about ten times the learning rate: far less memory."),
    "dataset": (
        "{columns: {prompt: question}, wrap: chat}",
        "How rows are read, where their columns have other names.",
    ),
    "checkpoint": ("{every: 200, keep: 2}", "When state is saved, from which `--resume` continues exactly."),
    "logging": ("{trackers: [tensorboard]}", "Where metrics are mirrored; `metrics.jsonl` has them in any case."),
    "early_stopping": ("{metric: eval_loss, patience: 3}", "Stop when held-out rows get no better."),
}
"""Groups of every trainer that most people set: what is written, commented out, and why."""
_ONLINE = {
    "rewards": (
        "[numeric_answer]",
        "What is rewarded, here the number that the column `answer` has: `rlhf list rewards`, or `package.module:function`, or"
        " several with weights.",
    ),
    "generation": ("{max_new_tokens: 256, temperature: 1.0}", "How completions are drawn."),
}
_PLACEHOLDER = "path/to/{}"
_WIDTH = 100


def add_to(app: typer.Typer) -> None:
    app.command()(init)


def init(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="A trainer, as `rlhf list trainers` shows it.",
            autocompletion=shell_completion.trainers,
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where it is written; METHOD.yaml by default.")
    ] = None,
) -> None:
    """Write a commented configuration of a method with the options that matter, and its schema beside it.

    Editors that know YAML schemas check and complete the file as it is written. The paths of model and rows are to be filled in:
    `rlhf validate FILE` says what is missing, `rlhf train FILE` trains.
    """
    from rlhf_core import registry
    from rlhf_core.cli.file_schemas import schema_of

    plugin = registry.lookup(method, "trainer")
    cls: Any = registry.get("trainer", plugin.qualified)
    target = file or Path(f"{plugin.name}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError("a configuration's name ends in .yaml", place=str(target), fix=f"{target}.yaml")
    schema = target.with_name(f"{target.stem}.schema.json")
    for path in (target, schema):
        if path.exists():
            raise StorageError("the file exists", place=str(path), fix="give another name, or remove it")
    text = "\n".join(_lines(plugin, cls, target, schema)) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        schema.write_text(
            json.dumps(schema_of(f"trainer:{method}"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError("can't be written", place=str(target), got=error.strerror) from None
    print_text(f"wrote {target}, and {schema} for editors")
    print_text(f"fill in its paths, then: rlhf validate {target}")


def _lines(plugin: Plugin, cls: Any, target: Path, schema: Path) -> Iterator[str]:
    """Yield the lines of the file."""
    from rlhf_core.config.online import OnlineConfig

    config: type[TrainerConfig] = cls.Config
    yield f"# yaml-language-server: $schema={schema.name}"
    yield from _comment(plugin.summary)
    yield "#"
    yield f"#   rlhf validate {target}     checks it and its rows, and says what the run takes"
    yield f"#   rlhf train {target}"
    yield f"#   rlhf show {plugin.name} --all     every option"
    yield "#"
    yield "# Relative paths are looked for in the working directory, then beside this file; `${NAME}` is an environment variable."
    yield f"method: {plugin.name if plugin.distribution == 'rlhf-core' else plugin.qualified}"
    yield f"model: {_PLACEHOLDER.format('model')}    # a directory, or a name on the hub"
    yield f"data: {_PLACEHOLDER.format('rows.jsonl')}    # rows of the record type `{plugin.record}`; `rlhf data FILE` shows them"
    yield f"# eval_data: {_PLACEHOLDER.format('heldout.jsonl')}    # rows held out, which are never trained on"
    yield f"output: runs/{plugin.name}"
    shown = {"method", "model", "data", "eval_data", "output"}
    own = [name for name in config.model_fields if _is_own(name, config)]
    online = {
        name: about
        for name, about in _ONLINE.items()
        if issubclass(config, OnlineConfig) and name in config.model_fields
    }
    if own or online:
        yield from _heading("The method's own")
    for name, (value, why) in online.items():
        yield from _option(name, value, why, off=not config.needs_rewards)  # type: ignore[attr-defined]
        shown.add(name)
    for name in [*(["group_size"] if online else []), *own]:
        if name not in shown:
            yield from _field(name, config)
            shown.add(name)
    for heading, names in _SHARED.items():
        yield from _heading(heading)
        for name in names:
            if name not in shown:
                yield from _field(name, config)
    yield from _heading("Further groups, with other values than their defaults")
    for name, (value, why) in _EXAMPLES.items():
        if config.model_fields[name].default is None or config.model_fields[name].default_factory is not None:
            yield from _option(name, value, why, off=True)


def _is_own(name: str, config: type[TrainerConfig]) -> bool:
    """Tell whether an option is a method's own: neither every trainer's, nor every online method's."""
    from rlhf_core.config.online import OnlineConfig
    from rlhf_core.config.training import TrainerConfig

    shared = OnlineConfig if issubclass(config, OnlineConfig) else TrainerConfig
    return name not in shared.model_fields


def _field(name: str, config: type[TrainerConfig]) -> Iterator[str]:
    """Yield an option with its meaning and its default; one that is null, empty or a group is commented out."""
    from pydantic import BaseModel

    from rlhf_core.config.fields import alternatives, default_of
    from rlhf_core.config.yaml_file import dump_yaml

    info = config.model_fields[name]
    meaning = (info.description or "").strip()
    if info.is_required():
        kinds = alternatives(info.annotation)
        named = str in kinds or any(getattr(kind, "alone", None) is not None for kind in kinds)
        return (
            yield from _option(name, _PLACEHOLDER.format(name) if named else "…", f"Required. {meaning}", off=not named)
        )
    default = default_of(info)
    if isinstance(default, BaseModel) or default in ([], {}):
        return None  # `rlhf show METHOD --all` has it
    flow = isinstance(default, list | tuple | dict)  # on one line, where a comment can switch it off
    written = (
        json.dumps(default, ensure_ascii=False) if flow else dump_yaml({name: default}).rstrip("\n").partition(": ")[2]
    )
    return (yield from _option(name, written or "null", meaning, off=default is None))


def _option(name: str, value: str, meaning: str, *, off: bool = False) -> Iterator[str]:
    yield from _comment(meaning)
    yield f"{'# ' if off else ''}{name}: {value}"


def _heading(text: str) -> Iterator[str]:
    yield ""
    yield f"# --- {text} ---"


def _comment(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
