"""The terminal of a chat: messages in, answers out as they are written, the file kept up to date."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.cli.chat_answers import answer
from rlhf_core.cli.chat_commands import run_command
from rlhf_core.cli.chat_session import ChatSession, Turn, save_chat
from rlhf_core.cli.chat_stops import ChatStops, Terminated
from rlhf_core.cli.printing import print_note, print_wrapped
from rlhf_core.infra.errors import Interrupted, RLHFError, Stopped

_PROMPT, _MORE, _BLOCK = "> ", "… ", '"""'


def run(session: ChatSession, path: Path | None, *, resumed: bool) -> None:
    """Chat until the user leaves.

    Args:
        path: the file that is written after each answer; None for none.
        resumed: whether the chat was continued from it.

    Raises:
        Stopped: SIGTERM came; the chat is saved.
        DataError, ModelError, NumbersError: without a terminal, what went wrong with an answer; with one it is printed.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        _greet(session, path, resumed=resumed)
    try:
        with ChatStops(terminal=terminal) as stops:
            for line in _messages(session, terminal):
                with stops.answering():
                    goes_on = _respond(session, line, path, stops)
                if not goes_on:
                    break
    except Terminated:
        where = None if path is None else str(path)
        raise Stopped("stopped by SIGTERM" + ("" if path is None else "; the chat is saved"), place=where) from None
    except KeyboardInterrupt as error:
        if not terminal:
            raise Interrupted("stopped by Ctrl-C") from error
        print()  # at the prompt: leave
    if terminal and path is not None and path.exists():
        print_note(f"the chat is in {path}; `--resume` continues it")


def _respond(session: ChatSession, line: str, path: Path | None, stops: ChatStops) -> bool:
    """Run a command or answer a message; return whether the chat goes on."""
    terminal = stops.terminal
    try:
        turn: Turn | None = Turn(line.removeprefix("/") if line.startswith("//") else line)
        if line.startswith("/") and not line.startswith("//"):
            result = run_command(session, line)
            if result.say:
                print_wrapped(result.say)
            if result.leave:
                return False
            turn = result.again
        if turn is not None:
            answer(session, turn, stops)
    except RLHFError as error:
        if not terminal:
            raise
        print(error.line(), file=sys.stderr)
    finally:
        if path is not None and (any(session.conversations) or path.exists()):
            save_chat(session, path)
    if terminal:
        print()
    return True


def _messages(session: ChatSession, terminal: bool) -> Iterator[str]:
    """Yield what the user types, message by message; blank ones are left out."""
    if not terminal:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # gives `input` the arrow keys and earlier messages

        for turn in session.turns:
            readline.add_history(turn.user)
    while (message := _message()) is not None:
        if message.strip():
            yield message


def _message() -> str | None:
    """Read one message, which may have several lines; None at the end of input."""
    try:
        line = input(_PROMPT)
        if line.strip() == _BLOCK:
            lines: list[str] = []
            while (line := input(_MORE)).strip() != _BLOCK:
                lines.append(line)
            return "\n".join(lines)
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = input(_MORE)
        return "\n".join([*lines, line])
    except EOFError:
        print()
        return None
    except UnicodeDecodeError as error:
        print(f"error: what was typed isn't {error.encoding}", file=sys.stderr)
        return ""


def _greet(session: ChatSession, path: Path | None, *, resumed: bool) -> None:
    """Print who answers, and how to get help; of a continued chat its last turn."""
    for model in session.models:
        positions = model.policy.max_positions
        room = "" if positions is None else f" · {positions:,} tokens of context"
        precision = str(model.policy.precision).removeprefix("torch.")
        print_note(f"{model.name} · {precision} on {model.policy.device.type}{room}")
    if resumed and session.turns:
        print_note(f"continued: {len(session.turns)} messages; the last one was")
        print_wrapped(f"{_PROMPT}{session.turns[-1].user}")
        for one in session.turns[-1].answers:
            print_wrapped(one.text)
    print_note("/help lists the commands" + ("" if path is not None else "; this chat isn't kept"))
    print()
