"""The commands of a chat that begin with a slash."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.cli.chat_session import ChatSession, Turn
from rlhf_core.config.fields import option_rows, shown
from rlhf_core.config.flags import Flag, convert
from rlhf_core.config.online import SamplingConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean
from rlhf_core.infra.files import storage_errors


@dataclass(frozen=True)
class Result:
    """What a command leaves to be done."""

    say: str = ""
    """What is printed."""
    leave: bool = False
    """Whether the chat ends."""
    again: Turn | None = None
    """The last turn, to be answered otherwise."""


@dataclass(frozen=True)
class _Command:
    usage: str
    help: str
    run: Callable[[ChatSession, str], Result]


def run_command(session: ChatSession, line: str) -> Result:
    """Run a command of a chat: a line that begins with a slash.

    Raises:
        ConfigError: there is no such command (the message has the nearest), or its arguments are wrong.
        StorageError: a file can't be written.
    """
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None and (option := name.replace("-", "_")) in {*SamplingConfig.model_fields, "seed"}:
        return _set(session, f"{option} {rest.strip()}")
    if command is None:
        hint = did_you_mean(name, COMMANDS).replace("`", "`/", 1) if name else "`/help` lists them"
        raise ConfigError(f"unknown command `/{name}`", fix=hint)
    return command.run(session, rest.strip())


def _help(session: ChatSession, rest: str) -> Result:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"/{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    lines += [
        "",
        'A line that ends in \\ is continued by the next; """ begins and ends a message of several lines.',
        "Ctrl-C stops an answer and keeps what was written; at the prompt it leaves, as Ctrl-D does.",
    ]
    return Result("\n".join(lines))


def _set(session: ChatSession, rest: str) -> Result:
    """Set one option: `temperature 0.7`, or `temperature=0.7`; without arguments show all."""
    if not rest:
        return Result(_options(session))
    name, _, text = rest.replace("=", " ", 1).partition(" ")
    text = text.strip()
    if not text:
        raise ConfigError("needs a value", place=f"/set {name}", fix=f"write `/set {name} VALUE`")
    if name == "seed":
        if not text.isdigit():
            raise ConfigError("must be a whole number", place="/set seed", got=f"`{text}`")
        session.seed = int(text)
        return Result(f"seed: {session.seed}")
    try:
        values, _ = convert([Flag(name, text)], SamplingConfig, owner="a chat")
    except ConfigError as error:
        known = [*SamplingConfig.model_fields, "seed"]
        raise ConfigError(f"unknown option `{name}`", place="/set", fix=did_you_mean(name, known)) from error
    changed = {**session.sampling.model_dump(), **values}
    session.sampling = SamplingConfig.parse(changed, place="/set")
    (key,) = values
    return Result(f"{key}: {shown(getattr(session.sampling, key))}")


def _options(session: ChatSession) -> str:
    """Return the sampling options with their values and meanings, as text."""
    rows = [(row.name, shown(getattr(session.sampling, row.name))) for row in option_rows(SamplingConfig)]
    rows.append(("seed", str(session.seed)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _show(session: ChatSession, rest: str) -> Result:
    lines = []
    for number, model in enumerate(session.models):
        policy = model.policy
        used = session.prompt_tokens(number)
        room = "no limit known" if policy.max_positions is None else f"{policy.max_positions:,}"
        lines.append(f"model     {model.name}: {used:,} tokens of {room} used, {policy.device}")
    lines.append(f"system    {'none' if session.system is None else session.system}")
    lines.append(f"messages  {len(session.turns)}")
    return Result("\n".join(lines) + "\n\n" + _options(session))


def _system(session: ChatSession, rest: str) -> Result:
    """Set the system message; `none` removes it; without arguments show it."""
    if not all(model.template for model in session.models):
        raise ConfigError("a model without a chat template reads no system message", place="/system")
    if rest:
        session.system = None if rest == "none" else rest
    return Result(f"system: {'none' if session.system is None else session.system}")


def _reset(session: ChatSession, rest: str) -> Result:
    session.reset()
    return Result("a new conversation")


def _undo(session: ChatSession, rest: str) -> Result:
    if not session.turns:
        raise ConfigError("there is no message to take back", place="/undo")
    removed = session.turns.pop()
    text = " ".join(removed.user.split())
    return Result(f"took back: {text if len(text) <= 60 else text[:59] + '…'}")


def _retry(session: ChatSession, rest: str) -> Result:
    if not session.turns:
        raise ConfigError("there is no message to answer again", place="/retry")
    last = session.turns[-1]
    return Result(again=Turn(last.user, attempt=last.attempt + 1))


def _save(session: ChatSession, rest: str) -> Result:
    """Append the conversation to a .jsonl file: a row of chat messages per model, which can be trained on."""
    try:
        words = shlex.split(rest)
    except ValueError:
        words = []
    if len(words) != 1 or not words[0].endswith(".jsonl"):
        raise ConfigError(
            "needs one file, *.jsonl", place="/save", got=f"`{rest}`" if rest else None, fix="/save chat.jsonl"
        )
    if not session.turns:
        raise ConfigError("there is no message to save yet", place="/save")
    path = Path(words[0]).expanduser()
    found = [(session.messages(number), model.name) for number, model in enumerate(session.models)]
    # A model that failed at every message, or was stopped before it wrote, has no answer to train on.
    rows = [{"messages": turns, "model": name} for turns, name in found if any(t["role"] == "assistant" for t in turns)]
    if not rows:
        raise ConfigError("there is no answer to save yet", place="/save")
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Result(f"appended {len(rows)} row{'s' * (len(rows) > 1)} to {path}")


def _exit(session: ChatSession, rest: str) -> Result:
    return Result(leave=True)


COMMANDS = {
    "help": _Command("help", "show this list", _help),
    "set": _Command(
        "set NAME VALUE", "set an option of sampling, or the seed; alone: show them; `/NAME VALUE` for short", _set
    ),
    "system": _Command("system TEXT", "set the system message; `none` removes it", _system),
    "show": _Command("show", "show the model, the room that is left, and the options", _show),
    "undo": _Command("undo", "take the last message and its answer back", _undo),
    "retry": _Command("retry", "answer the last message again, otherwise", _retry),
    "reset": _Command("reset", "begin a new conversation", _reset),
    "save": _Command("save FILE.jsonl", "append the conversation as a row of chat messages", _save),
    "exit": _Command("exit", "leave", _exit),
    "quit": _Command("quit", "leave", _exit),
}
"""The commands by name, in the order of `/help`."""
