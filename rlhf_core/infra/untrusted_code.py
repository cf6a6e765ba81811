"""Run Python code that nobody has read in a process of its own, with limits on time, memory, files, processes and network.

This is no sandbox: it stops accidents and the usual tricks, not a program that sets out to break the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_core.infra.errors import ConfigError, PluginError

_PROGRAM = Path(__file__).with_name("untrusted_program.py")
_START = 30.0
"""Seconds for the interpreter to start, beyond the time limit of the code."""


@dataclass(frozen=True)
class CodeLimits:
    """What untrusted code may use."""

    seconds: float = 10.0
    """Of wall time, and about as many of processor time."""
    memory_bytes: int = 2**29
    file_bytes: int = 2**24
    """The largest file that it may write."""
    output_bytes: int = 2**16
    """The most that is kept of what it prints; more ends it."""


@dataclass
class CodeRun:
    """What untrusted code did."""

    passed: set[int] = field(default_factory=set)
    """The pieces that ran to their ends without an exception, by number."""
    skipped: set[int] = field(default_factory=set)
    """The pieces that skipped themselves as tests do, by `unittest.SkipTest` or `pytest.skip`, not helped by the `undo` piece."""
    reached: int = 0
    """How many pieces ran, whether they passed, failed or were skipped: the next one ended the process."""
    output: bytes = b""
    """What it wrote to stdout."""
    returncode: int | None = None
    """The process's exit code, negative for a signal; None where it was ended at a limit."""
    enforced: dict[str, bool] = field(default_factory=dict)
    """Whether the kernel keeps it from the `network`, from other `processes`, and from `files` outside its directory."""


def run_untrusted(
    pieces: Sequence[tuple[str, str]],
    limits: CodeLimits,
    *,
    stdin: bytes | None = None,
    needed: int = 0,
    undo: int | None = None,
) -> CodeRun:
    """Run pieces of code one after the other in one new process, in one namespace, in an empty directory of its own.

    The environment holds no variable of this process. Whether a piece passed comes through another pipe than stdout, after a
    random token: what the code prints can't forge it. (Code that inspects the interpreter that it shares with the tests can.)

    Where this process or the calling thread ends before the code, Linux kills the code at once; other systems do so a few
    seconds after its time limit, unless it has cancelled that timer. Its directory, `rlhf-code-…` among the temporary files, is
    then left over.

    Args:
        pieces: (a name for tracebacks, source).
        stdin: runs the first piece alone, as a program with this input, whose `output` and `returncode` matter.
        needed: how many of the first pieces must pass for the others to run.
        undo: the number of the piece that is tested by those after it. Functions and classes that it replaces in modules that
            were loaded before it are set back before the next piece runs, and those of unittest before each; a piece that finds
            unittest changed at its end fails.

    Raises:
        ConfigError: this system has no limits on processes (Windows).
        PluginError: no process can be started.
    """
    if not hasattr(os, "fork"):
        raise ConfigError("code can't be limited on this system", place="run_untrusted", fix="use Linux or macOS")
    directory = tempfile.mkdtemp(prefix="rlhf-code-")
    try:
        return _run(directory, pieces, limits, stdin, needed, undo)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(
    directory: str,
    pieces: Sequence[tuple[str, str]],
    limits: CodeLimits,
    stdin: bytes | None,
    needed: int,
    undo: int | None,
) -> CodeRun:
    token = secrets.token_hex(16)
    job = {"pieces": list(pieces), "token": token, "stdin": stdin is not None, "needed": needed, "undo": undo}
    job["parent"] = os.getpid()
    job |= {"seconds": limits.seconds, "memory_bytes": limits.memory_bytes, "file_bytes": limits.file_bytes}
    job_read, job_write = os.pipe()
    report_read, report_write = os.pipe()
    with tempfile.TemporaryFile() as given:
        given.write(stdin or b"")
        given.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(_PROGRAM), str(job_read), str(report_write), directory],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env={
                    "PATH": os.defpath,
                    "HOME": directory,
                    "TMPDIR": directory,
                    "LANG": "C.UTF-8",
                    "OMP_NUM_THREADS": "1",
                },
                pass_fds=(job_read, report_write),
                start_new_session=True,
            )
        except OSError as error:
            for descriptor in (job_write, report_read):
                os.close(descriptor)
            raise PluginError(f"no process can be started: {error}", place="run_untrusted") from error
        finally:
            os.close(job_read)
            os.close(report_write)
    try:
        with contextlib.suppress(OSError), os.fdopen(job_write, "w", encoding="utf-8") as file:
            json.dump(job, file)
        assert process.stdout is not None
        report, output, whole = _collect(process.stdout.fileno(), report_read, limits)
        run = CodeRun(output=output)
        if whole:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.returncode = process.wait(1.0)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        os.close(report_read)
    _read_report(report, token, run)
    return run


def _collect(output: int, report: int, limits: CodeLimits) -> tuple[bytes, bytes, bool]:
    """Return what comes through both pipes until they are closed, and whether they were within the limits."""
    held: dict[int, bytearray] = {output: bytearray(), report: bytearray()}
    most = {output: limits.output_bytes, report: 2**20}
    open_pipes, deadline, started = {output, report}, time.monotonic() + limits.seconds + _START, False
    while open_pipes:
        ready, _, _ = select.select(list(open_pipes), [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return bytes(held[report]), bytes(held[output]), False
        for pipe in ready:
            data = os.read(pipe, 2**16)
            held[pipe] += data
            if not data:
                open_pipes.remove(pipe)
            elif len(held[pipe]) > most[pipe]:
                return bytes(held[report]), bytes(held[output][: most[output]]), False
        if not started and held[report]:  # the code begins now
            started, deadline = True, time.monotonic() + limits.seconds
    return bytes(held[report]), bytes(held[output]), True


def _read_report(report: bytes, token: str, run: CodeRun) -> None:
    """Note what the process reported; a line without the token, which the code may have written, isn't read."""
    for line in report.decode(errors="replace").splitlines():
        head, _, rest = line.partition(" ")
        kind, _, value = rest.partition(" ")
        if not secrets.compare_digest(head.encode(), token.encode()):
            continue
        if kind == "enforced":
            run.enforced = json.loads(value)
        elif kind in ("passed", "failed", "skipped") and value == str(run.reached):
            run.reached += 1
            if kind == "passed":
                run.passed.add(int(value))
            elif kind == "skipped":
                run.skipped.add(int(value))
