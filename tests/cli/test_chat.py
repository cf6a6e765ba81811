"""`rlhf chat`: answers as they grow, commands, a file that loses nothing, two models beside each other, and pipes."""

from __future__ import annotations

import builtins
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.cli.chat_session import ChatSession, save_chat
from rlhf_core.cli.chat_stops import ChatStops, Terminated
from rlhf_core.cli.printing import WrappedWriter
from rlhf_core.cli.two_columns import TwoColumns
from rlhf_core.contracts.completion import Completion
from rlhf_core.testing.tiny import save_tiny, tiny_tokenizer

Rlhf = Callable[..., tuple[int, str, str]]
Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("chat") / "model", layers=1, max_positions=256))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a chat template."""
    path = tmp_path_factory.mktemp("chat") / "plain"
    return str(save_tiny(path, layers=1, max_positions=256, tokenizer=tiny_tokenizer(chat_template=False)))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "rlhf" / "chats"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Return a function that chats in a terminal: the lines that are typed, then the arguments; the end of input leaves."""

    def run(typed: list[str], *arguments: str) -> tuple[int, str, str]:
        lines = iter(typed)

        def read(prompt: str = "") -> str:
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(sys, "stdin", Terminal())
        return rlhf("chat", *arguments, "--seed=0", "--max-new-tokens=6")

    return run


def chat_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def users(path: Path) -> list[list[str]]:
    return [[turn["user"] for turn in turns] for turns in chat_of(path)["conversations"]]


def test_every_line_of_a_pipe_is_a_message(
    rlhf: Rlhf, model: str, monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n/set temperature 0\nhi\n"))
    code, out, err = rlhf("chat", model, "--seed", "1", "--max-new-tokens", "5")
    assert (code, err) == (0, "") and "temperature: 0" in out and "tokens/s" not in out and ">" not in out[:2]
    assert not state.exists()  # a pipe isn't kept unasked
    monkeypatch.setattr(sys, "stdin", io.StringIO("/sett\n"))
    code, _, err = rlhf("chat", model)
    assert code == 2 and "unknown command `/sett`" in err and "`/set`" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/temperature 0\n/max-new-tokens 5\n/seed 3\n/top_p 2\n"))
    code, out, err = rlhf("chat", model)
    assert code == 2 and "temperature: 0" in out and "max_new_tokens: 5" in out and "seed: 3" in out
    assert "`top_p`: must be less than or equal to 1" in err
    for typed, told in (("/set temperature abc", "must be a number"), ("/min_p", "write `/set min_p VALUE`")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed + "\n"))
        assert told in rlhf("chat", model)[2]


def test_a_chat_is_kept_and_continued(talk: Talk, model: str, state: Path) -> None:
    code, out, _ = talk(["one", "two"], model)
    (path,) = state.glob("*.json")
    assert code == 0 and model in out and str(path) in out and users(path) == [["one", "two"]]
    first = chat_of(path)
    code, out, _ = talk(["three"], model, "--resume")
    assert code == 0 and "continued: 2 messages" in out and users(path) == [["one", "two", "three"]]
    assert chat_of(path)["conversations"][0][:2] == first["conversations"][0]
    assert [*state.glob("*.json")] == [path]
    code, _, err = talk([], "some/other", "--resume")
    assert code == 7 and "no chat with some/other to continue" in err


def test_a_seed_repeats_a_chat_whether_it_was_left_or_not(talk: Talk, model: str, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole.json", tmp_path / "parted.json"
    talk(["one", "two"], model, "--history", str(whole))
    talk(["one"], model, "--history", str(parted))
    talk(["two"], model, "--history", str(parted), "--resume")
    assert chat_of(whole)["conversations"] == chat_of(parted)["conversations"]
    before = whole.read_bytes()
    code, _, err = talk(["x"], model, "--history", str(whole))
    assert code == 7 and "the file exists" in err and "--resume" in err and whole.read_bytes() == before
    code, _, err = talk(["x"], model, "--history", str(tmp_path))
    assert code == 7 and "is a directory, not a file" in err
    whole.write_text("{}")
    code, _, err = talk(["x"], model, "--history", str(whole), "--resume")
    assert code == 7 and "can't be read as a chat" in err


def test_commands_change_the_chat(talk: Talk, model: str, tmp_path: Path) -> None:
    path, rows = tmp_path / "chat.json", tmp_path / "rows.jsonl"
    typed = [
        "/system Be brief.",
        "one",
        "two",
        "/undo",
        "/retry",
        f"/save {rows}",
        "/reset",
        "three",
        "//slash",
        "/exit",
        "no",
    ]
    code, out, err = talk(typed, model, "--history", str(path))
    assert (code, err) == (0, "")
    assert users(path) == [["one"], ["three", "/slash"]] and chat_of(path)["system"] == "Be brief."
    assert chat_of(path)["conversations"][0][0]["attempt"] == 1
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"] and row["model"] == model
    assert "took back: two" in out and "a new conversation" in out


def test_retries_draw_otherwise_and_keep_their_place(talk: Talk, model: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    texts = set()
    for typed in (["one"], ["/retry"], ["/retry"]):
        talk(typed, model, "--history", str(path), *(["--resume"] if path.exists() else []))
        ((turn,),) = chat_of(path)["conversations"]
        texts.add(turn["answers"][0]["text"])
    assert len(texts) == 3 and turn["attempt"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/retri", "did you mean `/retry`"),
        ("/set temprature 1", "did you mean `temperature`"),
        ("/set temperature -1", "/set: `temperature`: must be greater than or equal to 0"),
        ("/set temperature warm", "/set: `temperature`: must be a number"),
        ("/set temperature", "needs a value"),
        ("/set seed x", "must be a whole number"),
        ("/undo", "there is no message to take back"),
        ("/retry", "there is no message to answer again"),
        ("/save", "needs one file, *.jsonl"),
        ("/save a.jsonl", "there is no message to save yet"),
        ("x" * 300, "/reset"),
    ],
)
def test_a_mistake_in_a_chat_is_one_line_and_the_chat_goes_on(talk: Talk, model: str, line: str, message: str) -> None:
    code, out, err = talk([line, "/set top_k=7", "/set stop ab"], model, "--no-history")
    assert code == 0 and len(err.splitlines()) == 1 and message in err and "top_k: 7" in out and "['ab']" in out


def test_a_message_may_have_several_lines(talk: Talk, model: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    talk(["one \\", "two", '"""', "three", "", "  four", '"""'], model, "--history", str(path))
    assert users(path) == [["one \ntwo", "three\n\n  four"]]


def test_two_models_answer_beside_each_other(talk: Talk, model: str, tmp_path: Path) -> None:
    other = str(save_tiny(tmp_path / "other", seed=1, layers=1, max_positions=256))
    path, rows = tmp_path / "chat.json", tmp_path / "rows.jsonl"
    code, out, _ = talk(["one", "two", f"/save {rows}"], model, "--beside", other, "--history", str(path))
    assert code == 0 and out.count(f"── A: {model}") == 2 and out.count(f"── B: {other}") == 2
    for turn in chat_of(path)["conversations"][0]:
        assert len(turn["answers"]) == 2 and turn["answers"][0] != turn["answers"][1]
    # Each sees its own answers.
    saved = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    alone = tmp_path / "alone.json"
    talk(["one", "two"], other, "--history", str(alone))
    assert [turn["answers"][0]["text"] for turn in chat_of(alone)["conversations"][0]] == [
        turn["content"] for turn in saved[1] if turn["role"] == "assistant"
    ]
    code, _, err = talk([], model, "--history", str(path), "--resume")
    assert code == 2 and "another number of models" in err


def test_a_full_context_names_the_model_and_what_to_do(talk: Talk, model: str) -> None:
    code, out, err = talk(["a" * 130, "b" * 130, "/undo", "c"], model, "--no-history")
    assert code == 0 and len(err.splitlines()) == 1 and out.count("tokens/s") == 2
    assert f"error[data] {model}: the conversation leaves no room" in err and "for 256 positions" in err
    assert all(command in err for command in ("/undo", "/reset", "/set max_new_tokens N"))
    _, out, _ = talk(["a" * 200, "/set max_new_tokens 500", "/retry"], model, "--no-history")
    assert "the context is full, /undo or /reset" in out


def test_an_answer_is_kept_where_the_other_model_fails(talk: Talk, model: str, tmp_path: Path) -> None:
    small = str(save_tiny(tmp_path / "small", seed=1, layers=1, max_positions=64))
    path, rows = tmp_path / "chat.json", tmp_path / "rows.jsonl"
    for pair in ((model, small), (small, model)):
        path.unlink(missing_ok=True)
        typed = ["a" * 80, "b", f"/save {rows}"]
        code, out, err = talk(typed, pair[0], "--beside", pair[1], "--history", str(path))
        (error,) = err.splitlines()
        assert code == 0 and small in error and "leaves no room" in error and f"{small} failed" in out
        first, second = chat_of(path)["conversations"][0]
        at = pair.index(small)
        assert first["answers"][at] == {"text": "", "stop_reason": "failed", "tokens": 0}
        assert first["answers"][1 - at]["tokens"] == 6
        # The model that failed isn't shown what it failed at, and answers the next message.
        assert [one["tokens"] for one in second["answers"]] == [6, 6]
    saved = {row["model"]: row["messages"] for row in map(json.loads, rows.read_text().splitlines())}
    assert [turn["content"] for turn in saved[small] if turn["role"] == "user"] == ["b"]
    assert len(saved[model]) == 4


def test_on_a_wide_terminal_the_answers_are_the_same_in_two_columns(
    talk: Talk, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(save_tiny(tmp_path / "other", seed=1, layers=1, max_positions=128))
    below, beside = tmp_path / "below.json", tmp_path / "beside.json"
    typed = ["one", "a" * 130, "two"]  # of which the second is too long for the other model
    talk(typed, model, "--beside", other, "--history", str(below))
    for name in ("chat_answers", "two_columns"):
        monkeypatch.setattr(f"rlhf_core.cli.{name}.text_width", lambda: 120)
    monkeypatch.setattr("rlhf_core.cli.chat_answers._moves_cursor", lambda: True)
    before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    code, out, err = talk(typed, model, "--beside", other, "--history", str(beside), "--precision", "bf16")
    assert code == 0 and len(err.splitlines()) == 1 and "──" not in out and out.count(" │ B: ") == 3
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == before
    beside.unlink()
    talk(typed, model, "--beside", other, "--history", str(beside))
    assert chat_of(beside)["conversations"] == chat_of(below)["conversations"]


def test_a_pipe_ends_with_the_error_of_the_model_that_failed(
    rlhf: Rlhf, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, path = str(save_tiny(tmp_path / "small", seed=1, layers=1, max_positions=64)), tmp_path / "chat.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 80 + "\nb\n"))
    arguments = ("--beside", small, "--history", str(path), "--max-new-tokens=4", "--seed=0")
    code, _, err = rlhf("chat", model, *arguments)
    assert code == 3 and small in err and len(err.splitlines()) == 1
    ((turn,),) = chat_of(path)["conversations"]
    assert [one["stop_reason"] for one in turn["answers"]] == ["length", "failed"]


def test_a_model_without_a_template_needs_one_or_none(talk: Talk, plain: str, model: str, tmp_path: Path) -> None:
    code, _, err = talk(["one"], plain)
    assert code == 4 and "no chat template" in err and "--template FILE" in err and "--no-template" in err
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    path = tmp_path / "chat.json"
    assert talk(["one"], plain, "--template", str(template), "--history", str(path))[0] == 0
    code, _, err = talk(["1+1=", "/system x"], plain, "--no-template")
    assert code == 0 and "reads no system message" in err
    code, _, err = talk([], plain, "--no-template", "--system", "x")
    assert code == 2 and "plain text has no system message" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["./gone"], 4, "no such model directory or file"),
        (["MODEL", "--beside", "./gone"], 4, "./gone: no such model directory or file"),
        (["MODEL", "--temprature", "1"], 2, "did you mean `--temperature`"),
        (["MODEL", "--temperature", "-1"], 2, "--temperature: must be greater"),
        (["MODEL", "--top-p", "0"], 2, "--top-p: must be greater"),
        (["MODEL", "--precision", "fp32"], 2, "use one of: auto"),
        (["MODEL", "--template", "x", "--no-template"], 2, "choose one"),
        (["MODEL", "--template", "gone.jinja"], 2, "--template: no such file"),
        (["MODEL", "--history", "x", "--no-history"], 2, "kept or it isn't"),
        (["MODEL", "2 + 3?"], 2, "a message isn't an argument; got `2 + 3?`; fix: `echo TEXT | rlhf chat MODEL`"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    rlhf: Rlhf, arguments: list[str], code: int, message: str
) -> None:
    found, _, err = rlhf("chat", *arguments)
    assert found == code and message in err and len(err.splitlines()) == 1


def growing(*texts: str, interrupt: bool = False) -> Callable[..., Iterator[Completion]]:
    """Return a stand-in for a model's answer: these texts, then Ctrl-C if asked for."""

    def stream(*_: Any) -> Iterator[Completion]:
        for number, text in enumerate(texts, 1):
            yield Completion(text=text, ids=[5] * number, logprobs=[0.0] * number, stop_reason="length")
        if interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    return stream


def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(
    talk: Talk, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.json"
    monkeypatch.setattr(ChatSession, "stream", growing("Once", "Once upon", "Once upon a", interrupt=True))
    code, out, _ = talk(["one", "/show"], model, "--beside", model, "--history", str(path))
    assert code == 0 and "Once upon a\nstopped · 3 tokens" in out and "messages  1" in out
    ((turn,),) = chat_of(path)["conversations"]
    assert turn["answers"][0] == {"text": "Once upon a", "stop_reason": "stopped", "tokens": 3}
    assert turn["answers"][1]["text"] == ""  # the model after it didn't begin
    monkeypatch.undo()


def test_a_stopped_chat_goes_on(talk: Talk, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.json"
    with monkeypatch.context() as patch:
        patch.setattr(ChatSession, "stream", growing(interrupt=True))
        talk(["one"], model, "--history", str(path))
    ((turn,),) = chat_of(path)["conversations"]
    assert turn["answers"][0]["text"] == ""
    rows = tmp_path / "rows.jsonl"
    code, _, err = talk([f"/save {rows}", "two", f"/save {rows}"], model, "--history", str(path), "--resume")
    assert code == 0 and users(path) == [["one", "two"]]
    # What was stopped before its first word is neither shown to the model again nor trained on.
    assert "/save: there is no answer to save yet" in err and len(err.splitlines()) == 1
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert [turn["content"] for turn in row["messages"] if turn["role"] == "user"] == ["two"]


def test_a_retry_that_is_stopped_before_it_wrote_anything_loses_no_answer(
    talk: Talk, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.json"
    talk(["one"], model, "--history", str(path))
    ((before,),) = chat_of(path)["conversations"]
    with monkeypatch.context() as patch:
        patch.setattr(ChatSession, "stream", growing(interrupt=True))
        code, out, _ = talk(["/retry"], model, "--history", str(path), "--resume")
    ((turn,),) = chat_of(path)["conversations"]
    assert code == 0 and "stopped\nthe earlier answer is kept" in out and turn["answers"] == before["answers"]
    with monkeypatch.context() as patch:
        patch.setattr(ChatSession, "stream", growing("Once", interrupt=True))
        talk(["/retry"], model, "--history", str(path), "--resume")
    ((turn,),) = chat_of(path)["conversations"]
    assert turn["answers"] == [{"text": "Once", "stop_reason": "stopped", "tokens": 1}]


@pytest.mark.parametrize("wide", [False, True])
def test_an_impatient_second_ctrl_c_loses_no_answer(
    talk: Talk, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    """One comes while a word is printed, the other while the chat is saved."""
    path = tmp_path / "chat.json"

    def pressed(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return own(*given)

        return call

    if wide:
        monkeypatch.setattr("rlhf_core.cli.chat_answers.text_width", lambda: 120)
        monkeypatch.setattr("rlhf_core.cli.chat_answers._moves_cursor", lambda: True)
    writer = TwoColumns if wide else WrappedWriter
    monkeypatch.setattr(writer, "show", pressed(writer.show))
    monkeypatch.setattr("rlhf_core.cli.chat_terminal.save_chat", pressed(save_chat))
    monkeypatch.setattr(ChatSession, "stream", growing("Once", "Once upon"))
    code, out, _ = talk(["one", "/show"], model, "--beside", model, "--history", str(path))
    ((turn,),) = chat_of(path)["conversations"]
    assert code == 0 and "messages  1" in out
    assert turn["answers"][0]["text"].startswith("Once") and turn["answers"][0]["stop_reason"] == "stopped"


def test_signals_wait_where_nothing_is_drawn() -> None:
    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with ChatStops(terminal=True) as stops:
        with stops.answering():
            send(signal.SIGINT)  # too late to stop anything
        with pytest.raises(KeyboardInterrupt), stops.answering():
            send(signal.SIGINT)
            with stops.drawing():
                raise AssertionError("drew")
        with pytest.raises(Terminated), stops.answering():
            send(signal.SIGTERM)
            send(signal.SIGINT)
        with pytest.raises(Terminated), stops.answering(), stops.drawing():
            send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)  # at the prompt
    with pytest.raises(KeyboardInterrupt), ChatStops(terminal=False) as stops, stops.answering():
        send(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_text_grows_by_whole_words_to_the_width_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.cli.printing.text_width", lambda: 12)
    writer = WrappedWriter()
    text = "\n\nThe quick brown fox\n\n  jumps: 漢字漢字 abcdefghijklmnop\x1b[31m"
    for end in range(len(text) + 1):
        writer.show(text[:end])
    writer.end()
    out = capsys.readouterr().out
    assert out == "The quick \nbrown fox\n\n  jumps: \n漢字漢字 \nabcdefghijkl\nmnop\\x1b[31m\n"


def screen(written: str, lines: int, width: int) -> list[str]:
    """Return all lines that a terminal of this size shows, those that have scrolled off included."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[ABKm]|[\s\S]", written):
        if part == "\n":  # a terminal writes \n as \r\n
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif part == "\r":
            column = 0
        elif part[0] == "\x1b":
            count = int(part[2:-1] or 1)
            if part[-1] in "AB":
                row = max(row - count, len(rows) - lines, 0) if part[-1] == "A" else min(row + count, len(rows) - 1)
            elif part[-1] == "K":
                rows[row] = rows[row][:column]
        else:
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1 :]
            column += 1
            assert column < width
    return [one.rstrip() for one in rows]


def test_two_texts_grow_in_two_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.cli.two_columns.text_width", lambda: 30)
    monkeypatch.setattr("rlhf_core.cli.two_columns.get_terminal_size", lambda: os.terminal_size((30, 5)))
    left = "\n\nThe quick brown fox jumps\n\nover the lazy dog"
    right = "eins zwei drei vier\n" + "\n".join(map(str, range(9)))
    columns = TwoColumns(["a/long/path/model", "b"])
    at = [0, 0]
    while at != [len(left), len(right)]:
        for number, text in enumerate((left, right)):
            if at[number] < len(text) and (
                columns.may_grow(number) or at[1 - number] == len((left, right)[1 - number])
            ):
                at[number] += 1
                columns.show(number, text[: at[number]])
    columns.end(["3 tokens", "stopped"])
    assert screen(capsys.readouterr().out, 5, 30) == [
        "A: …ath/model │ B: b",
        "The quick     │ eins zwei",
        "brown fox     │ drei vier",
        "jumps         │ 0",
        "              │ 1",
        "over the lazy │ 2",
        "dog           │ 3",
        *(f"              │ {number}" for number in range(4, 9)),
        "3 tokens      │ stopped",
        "",
    ]


@pytest.mark.slow
def test_in_a_terminal_of_80_columns(model: str, state: Path) -> None:
    """Ctrl-C while an answer is written stops it, Ctrl-C at the prompt leaves, and the file has all of it."""
    command = [sys.executable, "-m", "rlhf_core", "chat", model, "--max-new-tokens", "200", "--seed", "0"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS="80", TERM="xterm")
        os.execvp(command[0], command)
    shown = b""

    def until(text: bytes, seconds: float = 60) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while text not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536)
        assert text in shown, shown.decode(errors="replace")
        shown = shown[shown.index(text) + len(text) :]

    until(b"/help lists the commands")
    until(b"> ")
    os.write(terminal, b"one\n")
    until(b"tokens/s")
    until(b"> ")
    os.write(terminal, b"\x03")
    until(b"--resume")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    (path,) = state.glob("*.json")
    assert users(path) == [["one"]]


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75(model: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    command = [sys.executable, "-m", "rlhf_core", "chat", model, "--history", str(path), "--max-new-tokens", "4"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write("one\n")
    process.stdin.flush()
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75 and "the chat is saved" in process.stderr.read()
    assert users(path) == [["one"]]
