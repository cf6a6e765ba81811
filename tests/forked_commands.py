"""Commands that start at once: forked from a process that has already imported what takes seconds to import.

Tests of documents run about 150 commands, each in a process of its own as a reader would, and importing torch, transformers and
datasets takes a process longer than most of these commands work. A server imports them once; a small script then stands for a
command, hands its arguments, directory, environment and files to the server, and passes on signals and the exit code.

python forked_commands.py SOCKET      serve until stdin ends
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import select
import site
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEAVY = ("torch", "numpy", "datasets", "transformers.modeling_utils", "accelerate", "peft", "tokenizers")
"""None of the project's own modules: whatever these remember must begin afresh in each command."""

# What the script does: no import that a command's start would wait for, and none of the site's.
CLIENT = """#!{python} -SEI
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = json.dumps([{module!r}, sys.argv, os.getcwd(), dict(os.environ)]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([len(job).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(job)
answers = server.makefile()
process = int(answers.readline())
for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(one, lambda number, frame: os.kill(process, number))
code = int(answers.readline() or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def serving(python: Path, address: Path, environment: dict[str, str]) -> Iterator[None]:
    """Keep a server of an environment's Python inside the context; the first commands wait until it has imported everything."""
    with subprocess.Popen(
        [python, __file__, str(address)],
        env={**environment, "TQDM_DISABLE": "1"},  # what `rlhf` sets before it imports anything
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            server.stdin.close()


def write_command(path: Path, module: str | None, python: Path, address: Path) -> None:
    """Write a script that runs `python -m module` on the server, or for None what `python` is asked to run."""
    path.write_text(CLIENT.format(python=python, module=module, address=str(address)))
    path.chmod(0o755)


def serve(address: str) -> None:
    """Import the heavy libraries and fork a process for every command; it alone returns, to run the command and to end."""
    for name in HEAVY:
        importlib.import_module(name)
    import gc

    gc.collect()
    gc.freeze()  # a fork's collections would copy every page
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            watch(connection)
            return
        connection.close()


def watch(connection: socket.socket) -> None:
    """Read a command, fork the process that runs it, send its id and, once it has ended, its exit code; return in the new one."""
    size, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_LEN(3 * array.array("i").itemsize))
    files = array.array("i")
    files.frombytes(ancillary[0][2])
    module, arguments, folder, environment = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
    process = os.fork()
    if process:
        connection.sendall(f"{process}\n".encode())
        _, status = os.waitpid(process, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    connection.close()
    os.setsid()
    for here, there in zip(files, (0, 1, 2), strict=True):
        os.dup2(here, there)
        os.close(here)
    os.chdir(folder)
    os.fsync = lambda file: None  # as in the tests' own process
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder  # that of `python -m`
    site.addsitedir(sysconfig.get_path("purelib"))  # what was installed since
    importlib.invalidate_caches()
    run(module, arguments)


def run(module: str | None, arguments: list[str]) -> None:
    """Run a module, or what `python` with these arguments would: code, a module or a file."""
    if module is not None:
        sys.argv[:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    first = arguments[1] if len(arguments) > 1 else ""
    if first == "-m":
        sys.argv[:] = arguments[2:]
        runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = ["-c", *arguments[3:]]
        sys.path[0] = ""
        exec(compile(arguments[2], "<string>", "exec", dont_inherit=True), sys.modules["__main__"].__dict__)
    elif first.endswith(".py"):
        sys.argv[:] = arguments[1:]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
    else:
        os.execv(sys.executable, arguments)


if __name__ == "__main__":
    serve(sys.argv[1])
