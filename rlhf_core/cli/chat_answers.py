"""How the models of a chat answer a message: one below the other, or two beside each other on a wide terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from rlhf_core.cli.chat_session import FAILED, STOPPED, Answer, ChatSession, Turn
from rlhf_core.cli.chat_stops import ChatStops
from rlhf_core.cli.printing import WrappedWriter, print_note, print_rule, text_width
from rlhf_core.cli.two_columns import TwoColumns
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.suspended_thread import handed_over
from rlhf_core.infra.errors import RLHFError

_WIDE = 100
"""Columns of a terminal from which on two answers stand beside each other."""


@dataclass
class _Growing:
    """An answer that grows, and what ended it."""

    stream: Generator[Completion]
    stops: ChatStops
    last: Completion | None = None
    seconds: float = 0.0
    """That drawing its tokens took."""
    running: bool = True
    error: Exception | None = None

    def advance(self) -> bool:
        """Draw one more token; return whether there was one. An error is kept in `error`."""
        began = time.monotonic()
        try:
            with self.stops.drawing():
                self.last = next(self.stream)
        except StopIteration:
            self.running = False
        except Exception as error:
            self.running, self.error = False, error
        self.seconds += time.monotonic() - began
        return self.running

    @property
    def text(self) -> str:
        return "" if self.last is None else self.last.text

    def answer(self) -> Answer:
        """Return the answer as far as it was written."""
        tokens = 0 if self.last is None else len(self.last.ids)
        if self.error is not None:
            return Answer(self.text, FAILED, tokens)
        stopped = self.running or self.last is None
        return Answer(self.text, STOPPED if stopped or self.last is None else self.last.stop_reason, tokens)


def answer(session: ChatSession, turn: Turn, stops: ChatStops) -> None:
    """Have every model answer a message, print the answers as they grow, and keep the turn; a stop keeps what was written.

    A model that fails keeps none of the others from answering: its answer is marked as failed, and the turn is kept where
    anything was answered. Of a further attempt that wrote nothing, the earlier answer stays.

    Raises:
        DataError, ModelError, NumbersError: why a model gave no answer; of two that failed the first one's.
        KeyboardInterrupt: what stopped the answers, where the chat ends with it.
    """
    terminal = stops.terminal
    both = terminal and len(session.models) == 2 and text_width() >= _WIDE and _moves_cursor()
    growing, ended = (_beside if both else _below)(session, turn, stops)
    turn.answers = [one.answer() for one in growing]
    turn.answers += [Answer("", STOPPED, 0) for _ in session.models[len(growing) :]]  # those after one that was stopped
    if any(one.stop_reason != FAILED or one.text for one in turn.answers) and session.keep(turn) and terminal:
        print_note("the earlier answer is kept")
    if ended is not None and not (terminal and type(ended) is KeyboardInterrupt):
        raise ended
    failed = [(number, one.error) for number, one in enumerate(growing) if one.error is not None]
    for number, error in failed:
        if len(session.models) > 1 and terminal:
            print_note(f"{_name(number, session)} failed:")
        if error is failed[-1][1] or not terminal or not isinstance(error, RLHFError):
            raise error
        print(error.line(), file=sys.stderr)


def _below(session: ChatSession, turn: Turn, stops: ChatStops) -> tuple[list[_Growing], KeyboardInterrupt | None]:
    """Print the models' answers one below the other; return them, and the interrupt that stopped one, if one did."""
    found: list[_Growing] = []
    for number in range(len(session.models)):
        if len(session.models) > 1:
            print_rule(_name(number, session))
        found.append(one := _Growing(session.stream(number, turn), stops))
        writer = WrappedWriter()
        try:
            with contextlib.closing(one.stream):
                while one.advance():
                    writer.show(one.text)
        except KeyboardInterrupt as error:
            _finish(writer, one, session, stops)
            return found, error
        _finish(writer, one, session, stops)
    return found, None


def _finish(writer: WrappedWriter, one: _Growing, session: ChatSession, stops: ChatStops) -> None:
    """End the last line of an answer, and print what it took."""
    if one.last is None and one.error is not None:
        return
    writer.end()
    if stops.terminal:
        print_note(_facts(one, session))


def _beside(session: ChatSession, turn: Turn, stops: ChatStops) -> tuple[list[_Growing], KeyboardInterrupt | None]:
    """Print two models' answers in two columns, drawn in turn; return them, and the interrupt that stopped them, if one did."""
    # In threads, since one model's autocast and gradients hold while its stream is suspended.
    found = [
        _Growing(handed_over(_handing(session, number, turn), session.models[number].policy.device), stops)
        for number in range(len(session.models))
    ]
    columns = TwoColumns([model.name for model in session.models])
    ended = None
    try:
        with contextlib.ExitStack() as stack:
            for one in found:
                stack.enter_context(contextlib.closing(one.stream))
            for one in found:  # before anything is drawn, so that a warning stands above the answers
                one.advance()
            while any(one.running for one in found):
                for number, one in enumerate(found):
                    if one.running and (columns.may_grow(number) or not found[1 - number].running) and one.advance():
                        columns.show(number, one.text)
    except KeyboardInterrupt as error:
        ended = error
    for number, one in enumerate(found):
        columns.show(number, one.text)
    columns.end([_facts(one, session) for one in found])
    return found, ended


def _handing(session: ChatSession, number: int, turn: Turn) -> Callable[[Callable[[Completion], None]], None]:
    """Return a function that hands over a model's answer as it grows."""

    def run(hand_over: Callable[[Completion], None]) -> None:
        with contextlib.closing(session.stream(number, turn)) as growing:
            for completion in growing:
                hand_over(completion)

    return run


def _name(number: int, session: ChatSession) -> str:
    return f"{'AB'[number]}: {session.models[number].name}"


def _facts(one: _Growing, session: ChatSession) -> str:
    """Return why an answer ended, where that isn't its end token, how many tokens it has, and their speed."""
    answer = one.answer()
    full = answer.tokens < session.sampling.max_new_tokens
    words = {
        STOPPED: "stopped",
        FAILED: "failed",
        "length": "the context is full, /undo or /reset" if full else "cut at max_new_tokens (see /set)",
        "stop": "stop text",
        "confidence": "cut for too little confidence",
    }
    parts: Sequence[str] = [words[answer.stop_reason]] if answer.stop_reason in words else []
    if answer.tokens:
        parts = [*parts, f"{answer.tokens:,} tokens", f"{answer.tokens / max(one.seconds, 1e-9):.1f} tokens/s"]
    return " · ".join(parts)


def _moves_cursor() -> bool:
    """Tell whether stdout is a terminal that can write into a line above."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
