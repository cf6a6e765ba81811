"""`rlhf chat`: talk with a model, or with two beside each other, in a terminal or line by line through a pipe."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli import METHOD_OPTIONS
from rlhf_core.cli.model_options import ModelArgument, PrecisionOption, TrustRemoteCodeOption
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.infra.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rlhf_core.cli.chat_session import ChatModel
    from rlhf_core.config.online import SamplingConfig

OWN_DEFAULTS = {"max_new_tokens": 1024, "temperature": 0.7}
"""Options of a chat where neither a flag nor the model's generation_config.json sets them."""
_OF_MODELS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Options that a model's generation_config.json may set."""

_Beside = Annotated[
    str | None, typer.Option("--beside", metavar="MODEL", help="A second model, which answers every message, too.")
]
_Template = Annotated[
    str | None,
    typer.Option("--template", metavar="FILE", help="Chat template (Jinja), in place of the tokenizer's own."),
]
_NoTemplate = Annotated[
    bool,
    typer.Option("--no-template", help="Continue the chat as one plain text, for models that aren't chat models."),
]
_History = Annotated[
    Path | None,
    typer.Option(
        "--history", metavar="FILE", help="File of the chat; by default a new one in ~/.local/state/rlhf/chats."
    ),
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the chat in --history, or the last one with the model.")
]
_Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed that makes answers repeatable; by default another each time."),
]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(chat)


def chat(
    context: typer.Context,
    model: ModelArgument,
    beside: _Beside = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    template: _Template = None,
    no_template: _NoTemplate = False,
    history: _History = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="Write the chat to no file.")] = False,
    resume: _Resume = False,
    seed: _Seed = None,
    precision: PrecisionOption = "auto",
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Chat with a model: `rlhf chat runs/sft/model`, `rlhf chat A --beside B`, `echo "Who are you?" | rlhf chat MODEL`.

    Options of sampling are flags too: --temperature 0.7, --top-p, --top-k,
    --min-p, --repetition-penalty, --max-new-tokens, --stop TEXT … By default they
    are what the model's generation_config.json says, else a temperature of 0.7
    and 1,024 new tokens. In the chat, /help lists the commands: /set temperature
    0.2, /system TEXT, /undo, /retry, /reset, /save FILE.jsonl, /show, /exit.

    Ctrl-C stops an answer and keeps what was written of it; at the prompt it
    leaves, as Ctrl-D does. The chat is saved after each answer. Without a
    terminal, every line of standard input is a message.
    """
    if context.args and not context.args[0].startswith("-"):
        fix = f"`echo TEXT | rlhf chat {model}`; or `rlhf chat {model}`, and write it there"
        raise ConfigError("a message isn't an argument", place="command line", got=f"`{context.args[0]}`", fix=fix)
    given = _sampling_flags(context.args)
    _check(precision, template=template, no_template=no_template, history=history, no_history=no_history, system=system)
    names = [model, *([beside] if beside is not None else [])]
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.cli import chat_session, chat_terminal
        from rlhf_core.cli.model_argument import check_model
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging(logging.WARNING)
    for name in names:
        check_model(name)
    path = _history_path(names, history, no_history=no_history, resume=resume)
    models = [
        _open(name, template=template, plain=no_template, precision=precision, trust=trust_remote_code)
        for name in names
    ]
    sampling = _sampling(given, models[0])
    session = chat_session.ChatSession(
        models, sampling, system=system, seed=secrets.randbelow(2**31) if seed is None else seed
    )
    if resume and path is not None:
        session.restore(path)
    chat_terminal.run(session, path, resumed=resume)


def _check(
    precision: str,
    *,
    template: str | None,
    no_template: bool,
    history: Path | None,
    no_history: bool,
    system: str | None,
) -> None:
    """Refuse flags that contradict each other, or have no such value."""
    known = ("auto", "float32", "bf16", "fp16")
    if precision not in known:
        raise ConfigError(
            "no such precision", place="--precision", got=f"`{precision}`", fix=did_you_mean(precision, known)
        )
    if no_template and template is not None:
        raise ConfigError("a chat has a template or none", place="--template and --no-template", fix="choose one")
    if no_template and system is not None:
        fix = "write it into the first message"
        raise ConfigError("plain text has no system message", place="--system and --no-template", fix=fix)
    if template is not None and "{" not in template and not Path(template).expanduser().is_file():
        raise ConfigError(
            "no such file",
            place="--template",
            got=f"`{template}`",
            fix="name a file that holds a chat template (Jinja)",
        )
    if no_history and history is not None:
        raise ConfigError("a chat is kept or it isn't", place="--history and --no-history", fix="choose one")


def _sampling_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the sampling options that were given as flags.

    Raises:
        ConfigError: there is no such flag (the message has the nearest), or a value is wrong.
    """
    from rlhf_core.config.fields import option_at
    from rlhf_core.config.flags import convert, lex
    from rlhf_core.config.online import SamplingConfig

    flags = lex(arguments)
    for flag in flags:
        if option_at(SamplingConfig, flag.name) is None:
            own = ("beside", "system", "template", "history", "resume", "seed", "precision")
            known = [name.replace("_", "-") for name in (*SamplingConfig.model_fields, *own)]
            near = did_you_mean(flag.typed, [f"--{name}" for name in known])
            raise ConfigError(f"unknown option `{flag.name}`", place=flag.typed, fix=f"{near}; see `rlhf chat --help`")
    values, places = convert(flags, SamplingConfig, owner="chat")
    SamplingConfig.parse(values, place=places)
    return values


def _sampling(given: dict[str, Any], model: ChatModel) -> SamplingConfig:
    """Return the sampling options: the chat's defaults, those of the model's generation_config.json, and the flags."""
    from rlhf_core.config.online import SamplingConfig

    own = model.policy.causal_lm.generation_config
    said = {name: getattr(own, name, None) for name in _OF_MODELS} if getattr(own, "do_sample", False) else {}
    return SamplingConfig.parse(
        {**OWN_DEFAULTS, **{name: value for name, value in said.items() if value is not None}, **given},
        place=f"generation_config.json of {model.name}",
    )


def _history_path(names: Sequence[str], history: Path | None, *, no_history: bool, resume: bool) -> Path | None:
    """Return the file that keeps the chat, checked before a model is loaded; None where none does.

    Raises:
        StorageError: the file exists and isn't to be continued, or there is none to continue.
    """
    from rlhf_core.cli.chat_session import last_chat, new_chat_path, read_chat
    from rlhf_core.infra.errors import StorageError

    if resume:
        if no_history:
            raise ConfigError("a chat that is continued has a file", place="--no-history", fix="leave it out")
        path = last_chat(names) if history is None else history.expanduser()
        read_chat(path)
        return path
    if history is not None:
        path = history.expanduser()
        if path.is_dir():
            raise StorageError("is a directory, not a file", place=str(path), fix="name a file")
        if path.exists():
            fix = "`--resume` continues the chat in it; or choose another file"
            raise StorageError("the file exists", place=str(path), fix=fix)
        return path
    # What a script pipes through isn't kept unasked.
    return None if no_history or not sys.stdin.isatty() else new_chat_path()


def _open(name: str, *, template: str | None, plain: bool, precision: str, trust: bool) -> ChatModel:
    """Load a model to chat with.

    Raises:
        ModelError: it can't be loaded, or has no chat template and none is given.
    """
    from rlhf_core.cli.chat_session import ChatModel
    from rlhf_core.cli.model_argument import open_policy
    from rlhf_core.config.training import DatasetConfig, ModelConfig
    from rlhf_core.data.chat_rendering import ChatTemplate
    from rlhf_core.data.text_options import save_text_options
    from rlhf_core.infra.errors import ModelError

    policy = open_policy(ModelConfig(path=name, trust_remote_code=trust), precision=precision)
    # Without a template a message is a text that is continued, however the model was trained.
    save_text_options(policy.tokenizer, DatasetConfig(chat_template=template, wrap="none" if plain else None))
    if not plain and ChatTemplate(policy.tokenizer).source is None:
        raise ModelError(
            "the model has no chat template, so it can't read a conversation",
            place=name,
            fix="give one with `--template FILE`, or `--no-template` to have plain text continued",
        )
    return ChatModel(name, policy, template=not plain)
