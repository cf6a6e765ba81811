"""A stage's work as commands of `rlhf`, each in a process of its own.

A process per command, because it gives back all of its memory (of the device, too), begins in the same state whether or not the
stages before it ran just now, can be killed by the system without taking the pipeline with it, and is what `torchrun` starts.
Each command is one that a person can repeat alone: its configuration is a file in the pipeline's directory.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Protocol

from rlhf_core.infra import errors
from rlhf_core.infra.child_process import end_with_parent
from rlhf_core.infra.errors import Interrupted, LostProcess, RLHFError, Stopped
from rlhf_core.training.signals import StopSignal

_ERROR = re.compile(r"^error\[(\w+)\] (.*)$", re.MULTILINE)
_CHILD = "import sys; from rlhf_core.pipeline.stage_command import child; child(int(sys.argv.pop(1)))"
_POLL = 0.1
"""Seconds between two looks at whether the process has ended or a signal came."""
_KINDS: dict[str, type[RLHFError]] = {
    kind.code: kind
    for kind in (
        errors.ConfigError, errors.DataError, errors.ModelError, errors.PluginError, errors.NumbersError,
        errors.StorageError, errors.LostProcess, Stopped, Interrupted,
    )
}  # fmt: skip
"""Code in brackets of an error's line → its class."""


class RunCommand(Protocol):
    """Runs a command of `rlhf`."""

    def __call__(self, arguments: Sequence[str], *, log: Path, processes: int = 1) -> str:
        """Run it to its end and return what it wrote to stdout.

        Args:
            arguments: what follows `rlhf`.
            log: file that what it writes to stderr is appended to.
            processes: how many processes `torchrun` starts.

        Raises:
            RLHFError: it failed, of the kind that its exit code says, with the line that it printed.
            Stopped: it was stopped by SIGTERM or Ctrl-C, and can be continued.
        """


class CommandWatch(Protocol):
    """Looks on while commands run in processes of their own."""

    def begin(self, command: str) -> None:
        """A command of `rlhf`, such as `train`, begins."""

    def line(self, text: str) -> None:
        """It has written a line to stderr; called in another thread."""

    def tick(self) -> None:
        """It still runs; called several times a second."""


class InProcesses:
    """Runs each command in a process of its own, which ends when this one does and gets its SIGTERM and Ctrl-C.

    Args:
        stop: notes the signals of this process.
        show: called with each line that a command writes to stderr.
    """

    def __init__(self, stop: StopSignal, show: Callable[[str], None] | None = None) -> None:
        self._stop, self._show = stop, show
        self.watch: CommandWatch | None = None

    def __call__(self, arguments: Sequence[str], *, log: Path, processes: int = 1) -> str:
        python = sys.executable or "python"
        command = [python, "-P", "-c", _CHILD, str(os.getpid()), *arguments]
        if processes > 1:
            # torchrun's own processes get the signal from it; it ends with this one.
            launch = ["--standalone", "--nproc_per_node", str(processes), "-m", "rlhf_core"]
            command = [python, "-P", "-m", "torch.distributed.run", *launch, *arguments]
        with log.open("a", encoding="utf-8") as file:
            # In a session of its own: Ctrl-C on the terminal reaches this process alone, which passes it on.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
                encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
            out, err = io.StringIO(), io.StringIO()
            shown = [self._show] if self._show is not None else []
            if self.watch is not None:
                self.watch.begin(arguments[0])
                shown.append(self.watch.line)
            assert process.stdout is not None and process.stderr is not None
            readers = [
                threading.Thread(target=_copy, args=(process.stdout, out.write), daemon=True),
                threading.Thread(target=_copy, args=(process.stderr, _keep(err, file, *shown)), daemon=True),
            ]
            for reader in readers:
                reader.start()
            code = self._wait(process)
            for reader in readers:
                reader.join(timeout=5)
        if code < 0 and self._stop.requested is not None:  # it had nothing to save yet
            raise Stopped("the stage's process was stopped before it had anything to save")
        raise_ended(code, err.getvalue(), log)
        return out.getvalue()

    def _wait(self, process: subprocess.Popen[str]) -> int:
        """Wait for the end, passing on requests to stop; return the exit code, negative for a signal."""
        passed: signal.Signals | None = None
        while True:
            try:
                return process.wait(timeout=_POLL)
            except subprocess.TimeoutExpired:
                if self.watch is not None:
                    self.watch.tick()
                if passed is None and self._stop.requested is not None:
                    passed = self._stop.requested
                    process.send_signal(passed)
            except KeyboardInterrupt:  # a second Ctrl-C: the command stops at once, unsaved
                process.send_signal(signal.SIGINT)


class InThisProcess:
    """Runs commands in this process, where methods and rewards that were registered in it are known, as in a notebook.

    Args:
        main: takes what follows `rlhf` and returns the exit code, as `rlhf_core.cli.main` does.
    """

    def __init__(self, main: Callable[[Sequence[str]], int]) -> None:
        self._main = main

    def __call__(self, arguments: Sequence[str], *, log: Path, processes: int = 1) -> str:
        if processes > 1:
            problem = "several processes can't be started from within one"
            raise errors.ConfigError(problem, place="processes", got=processes, fix="leave `processes` out")
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = self._main(list(arguments))
        with log.open("a", encoding="utf-8") as file:
            file.write(err.getvalue())
        raise_ended(code, err.getvalue(), log)
        return out.getvalue()


def raise_ended(code: int, text: str, log: Path) -> None:
    """Raise the error with which a command ended; return where it ended well.

    Args:
        code: its exit code, negative for a signal.
        text: what it wrote to stderr.
        log: where that is kept, for messages.
    """
    if code == 0:
        return
    found = list(_ERROR.finditer(text))
    if code > 0 and found and found[-1][1] in _KINDS:  # `torchrun` ends with 1, whatever its processes did
        raise _KINDS[found[-1][1]](found[-1][2])
    if code < 0:
        name = signal.Signals(-code).name
        fix = f"see {log}; the system ends a process by SIGKILL where memory runs out"
        raise LostProcess("the stage's process was ended", got=name, fix=fix)
    if code in (Stopped.exit_code, Interrupted.exit_code):
        raise (
            Stopped("the stage was stopped") if code == Stopped.exit_code else Interrupted("the stage was interrupted")
        )
    raise RLHFError(found[-1][2] if found else f"ended with exit code {code}", fix=f"see {log}")


def child(parent: int) -> None:
    """Run `rlhf` with this process's arguments, as the child of a pipeline that it ends with. Doesn't return."""
    end_with_parent(parent)
    runpy.run_module("rlhf_core", run_name="__main__", alter_sys=True)


def _copy(stream: IO[str], write: Callable[[str], object]) -> None:
    with stream:
        for line in stream:
            write(line)


def _keep(kept: io.StringIO, file: IO[str], *shown: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that keeps a line, appends it to a file, and shows it."""

    def keep(line: str) -> None:
        kept.write(line)
        file.write(line)
        file.flush()
        for show in shown:
            show(line)

    return keep
