"""A chat with one model or several: its turns, what each model reads of them, and the file that keeps them."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import PromptTooLong, prompt_batch
from rlhf_core.infra.errors import ConfigError, DataError, StorageError
from rlhf_core.infra.files import read_json, replace_json, storage_errors
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models import PolicyModel

STOPPED = "stopped"
"""The stop reason of an answer that the user stopped."""
FAILED = "failed"
"""The stop reason of an answer that ended with an error; the model that failed isn't shown the turn again."""
_FORMAT = 1


@dataclass
class Answer:
    """One model's answer to a message."""

    text: str
    stop_reason: str
    tokens: int

    @property
    def unwritten(self) -> bool:
        """Whether it was stopped, or failed, before anything was written."""
        return not self.text and self.stop_reason in (STOPPED, FAILED)


@dataclass
class Turn:
    """A message of the user, and the answer of each model."""

    user: str
    answers: list[Answer] = field(default_factory=list)
    attempt: int = 0
    """How often it was answered before; each attempt draws otherwise."""


@dataclass(frozen=True)
class ChatModel:
    """A model that answers."""

    name: str
    """As the user named it."""
    policy: PolicyModel
    template: bool = True
    """Whether messages are rendered by its chat template; else the chat is one text that the model continues."""


class ChatSession:
    """A chat: the conversation so far, and how it is answered.

    Args:
        models: at least one; each sees its own answers.
        sampling: how answers are drawn.
        system: the system message; None for none.
        seed: with the number of the turn and of the attempt it determines an answer.
    """

    def __init__(
        self, models: Sequence[ChatModel], sampling: SamplingConfig, *, system: str | None = None, seed: int = 0
    ) -> None:
        self.models, self.sampling, self.system, self.seed = list(models), sampling, system, seed
        self._engines = [Engine(model.policy) for model in models]
        self.conversations: list[list[Turn]] = [[]]
        """The turns of each conversation; the last one continues."""
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def turns(self) -> list[Turn]:
        """The turns of the conversation that continues."""
        return self.conversations[-1]

    def keep(self, turn: Turn) -> bool:
        """Add an answered turn. A further attempt at the last message replaces it, but no answer by one that is unwritten.

        Returns:
            Whether an earlier answer stays.
        """
        stays = False
        if turn.attempt:
            for number, before in enumerate(self.turns.pop().answers):
                if turn.answers[number].unwritten and not before.unwritten:
                    turn.answers[number], stays = before, True
        self.turns.append(turn)
        return stays

    def reset(self) -> None:
        """Begin a new conversation; the earlier ones stay in the file."""
        if self.turns:
            self.conversations.append([])

    def prompt(self, number: int, new: Turn) -> Any:
        """Return the conversation before a turn, with its message, as a model reads it: chat messages, or one text.

        Args:
            number: of the model.
            new: a further turn, or a further attempt at the last one.
        """
        before = _answered(number, self.turns[:-1] if new.attempt else self.turns)
        if not self.models[number].template:
            return "\n".join([*(f"{turn.user}{turn.answers[number].text}" for turn in before), new.user])
        return [*self._messages(number, before), {"role": "user", "content": new.user}]

    def stream(self, number: int, turn: Turn) -> Generator[Completion]:
        """Yield a model's answer to a new message as it grows; the last one is whole.

        Raises:
            DataError: the conversation leaves no room for an answer among the model's positions.
        """
        model = self.models[number]
        try:
            batch = prompt_batch(model.policy, [self.prompt(number, turn)])
        except PromptTooLong as error:
            raise DataError(
                "the conversation leaves no room for an answer in the model's context",
                place=model.name,
                got=error.got,
                fix="`/undo` takes the last message back, `/reset` begins a new conversation, `/set max_new_tokens N` keeps"
                " answers shorter",
            ) from None
        conversation, place = len(self.conversations) - 1, len(self.turns) - bool(turn.attempt)
        seed = stream_seed(self.seed, "chat", conversation, place, turn.attempt)
        yield from self._engines[number].stream(batch, self.sampling, seed=seed)

    def prompt_tokens(self, number: int) -> int:
        """Return how many tokens a model reads of the conversation before the next message."""
        if not _answered(number, self.turns) and self.system is None:
            return 0
        batch = prompt_batch(self.models[number].policy, [self.prompt(number, Turn(""))])
        return int(batch.prompt_lengths[0])

    def messages(self, number: int) -> list[dict[str, str]]:
        """Return the conversation with one model as chat messages, a row to train on."""
        return self._messages(number, self.turns)

    def _messages(self, number: int, turns: Sequence[Turn]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn in _answered(number, turns):
            messages += [
                {"role": "user", "content": turn.user},
                {"role": "assistant", "content": turn.answers[number].text},
            ]
        return messages

    # The file

    def to_json(self) -> dict[str, Any]:
        """Return the chat as JSON values."""
        return {
            "format": _FORMAT,
            "models": [model.name for model in self.models],
            "started": self.started,
            "system": self.system,
            "seed": self.seed,
            "sampling": self.sampling.model_dump(mode="json"),
            "conversations": [[asdict(turn) for turn in turns] for turns in self.conversations],
        }

    def restore(self, path: Path) -> None:
        """Take the conversations and the system message from a file that `to_json` filled; options stay as they are.

        Raises:
            StorageError: it can't be read as a chat.
            ConfigError: it is a chat with another number of models.
        """
        saved = read_chat(path)
        if len(saved["models"]) != len(self.models):
            raise ConfigError(
                "the chat was with another number of models",
                place=str(path),
                got=", ".join(saved["models"]),
                fix="name as many models, or begin a new chat",
            )
        self.conversations = [
            [Turn(turn["user"], [Answer(**one) for one in turn["answers"]], turn["attempt"]) for turn in turns]
            for turns in saved["conversations"]
        ] or [[]]
        self.started = saved["started"]
        self.system = saved["system"] if self.system is None else self.system


def _answered(number: int, turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns that a model is shown: those that it has answered, if only in part."""
    found = [(turn, turn.answers[number]) for turn in turns]
    return [turn for turn, answer in found if not answer.unwritten and answer.stop_reason != FAILED]


class _SavedChat(BaseConfig):
    """What `to_json` returns, for checking a file."""

    format: int
    models: list[str]
    started: str
    system: str | None
    seed: int
    sampling: dict[str, Any]
    conversations: list[list[dict[str, Any]]]


def read_chat(path: Path) -> dict[str, Any]:
    """Return the JSON values of a chat's file.

    Raises:
        StorageError: it doesn't exist, or isn't a chat's.
    """
    try:
        saved = _SavedChat.parse(read_json(path), place=str(path)).model_dump()
        for turns in saved["conversations"]:
            for turn in turns:
                if not isinstance(turn["user"], str) or len(turn["answers"]) != len(saved["models"]):
                    raise ValueError("a turn has another number of answers than there are models")
                for answer in turn["answers"]:
                    Answer(**answer)
        if saved["format"] != _FORMAT:
            raise ValueError(f"its format is {saved['format']}, not {_FORMAT}")
        return saved
    except FileNotFoundError:
        raise StorageError("no such chat", place=str(path), fix="leave `--resume` out to begin one") from None
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise StorageError("can't be read as a chat", place=str(path), got=error, fix="name another file") from None


def save_chat(session: ChatSession, path: Path) -> None:
    """Write a chat to its file, whole."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, session.to_json())


def chats_directory() -> Path:
    """Return the directory of the user's chats: `rlhf/chats` in `XDG_STATE_HOME`, by default `~/.local/state`."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "rlhf" / "chats"


def new_chat_path() -> Path:
    """Return a path for a new chat in the user's directory, named by the time."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    path, count = chats_directory() / f"{name}.json", 1
    while path.exists():
        count += 1
        path = chats_directory() / f"{name}-{count}.json"
    return path


def last_chat(models: Sequence[str]) -> Path:
    """Return the file of the user's last chat with these models.

    Raises:
        StorageError: there is none.
    """
    for path in sorted(chats_directory().glob("*.json"), key=lambda one: one.stat().st_mtime, reverse=True):
        try:
            if read_chat(path)["models"] == list(models):
                return path
        except StorageError:
            continue
    raise StorageError(
        f"there is no chat with {' and '.join(models)} to continue",
        place=str(chats_directory()),
        fix="leave `--resume` out to begin one, or name a file with `--history`",
    )
