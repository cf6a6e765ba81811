"""A reward in child processes: one that hangs is killed, one that crashes costs an error, one that leaks is started again.

The parent sends pickled samples and gets JSON back, so that nothing a reward returns can run code here.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.child_process import end_with_parent
from rlhf_core.infra.errors import ConfigError, PluginError, describe_error, error_report, reported_error
from rlhf_core.infra.time_limit import TimeLimit

GROWTH = 2**30
"""Bytes by which a child's memory may grow after its first call until another replaces it."""


class ProcessReward(RewardFn):
    """A reward that is scored in child processes, as many as there are calls at once. They end with this process.

    Args:
        reward: the reward, not prepared. A child makes it again from `recipe`, or from its pickle.
        recipe: its `name` and `options`, where it was configured by name; None where it was given as an object.
        time_limit: seconds that one call may take; None for no limit.
        name: the reward's name, for messages.

    Raises:
        ConfigError: the reward can be neither named nor pickled.
    """

    api = 1
    runs_in = "process"

    def __init__(
        self, reward: RewardFn, recipe: dict[str, Any] | None, *, time_limit: float | None, name: str, place: str
    ) -> None:
        self.config, self.reward, self.name = reward.config, reward, name
        self.by_row, self._limit = reward.by_row, time_limit
        self._message = _pickled(recipe if recipe is not None else reward, name, place)
        self._free: queue.SimpleQueue[_Child] = queue.SimpleQueue()

    def prepare(self) -> None:
        """Start a child, so that a reward that can't be made there is reported before anything is generated."""
        self._free.put(_Child(self._message, self.name))

    def describe(self) -> dict[str, Any]:
        return self.reward.describe()

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return the scores by a free child, or by a new one where all are at work.

        Raises:
            TimeLimit: the child took too long, and was killed.
            PluginError: the child ended, or the reward raised in it.
        """
        return self._ask("score", samples)

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        # Asking a child costs time, and most rewards have no steps.
        return None if type(self.reward).score_steps is RewardFn.score_steps else self._ask("score_steps", samples)

    def _ask(self, method: str, samples: Sequence[Sample]) -> Any:
        try:
            child = self._free.get_nowait()
        except queue.Empty:
            child = _Child(self._message, self.name)
        try:
            found = child.ask(method, samples, self._limit)
        except BaseException as error:
            if isinstance(error, TimeLimit) or not child.answered:
                child.kill()
            else:
                self._free.put(child)
            raise
        if child.grown > GROWTH:
            child.kill()
        else:
            self._free.put(child)
        return found


class _Child:
    """One child process and the connection to it; it is killed when this object is no longer needed."""

    def __init__(self, message: bytes, name: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = "from rlhf_core.rewards.reward_process import serve; serve()"
            self.process = subprocess.Popen(
                [sys.executable, "-c", command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Beside the current directory, which `-c` puts first, modules are found where this process finds them.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _kill, self.process, self._connection)
        self.grown, self._size = 0, 0
        self._name, self.answered = name, True
        self._connection.send_bytes(message)
        self._receive(None)

    def ask(self, method: str, samples: Sequence[Sample], limit: float | None) -> Any:
        """Return what the reward's method returns for the samples, as JSON values."""
        self.answered = False
        self._connection.send_bytes(pickle.dumps((method, list(samples))))
        reply = self._receive(limit)
        size = int(reply["bytes"])
        self._size = self._size or size
        self.grown = size - self._size
        return reply["result"]

    def kill(self) -> None:
        self._end()

    def _receive(self, limit: float | None) -> dict[str, Any]:
        """Return the child's next message; raise the error that it reports.

        Raises:
            TimeLimit: there is none within `limit` seconds.
            PluginError: the child has ended.
        """
        try:
            if not self._connection.poll(limit):
                raise TimeLimit("")
            reply = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.answered = False
            code = _exit_code(self.process)
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise PluginError(
                "the reward's process ended while it scored",
                place=f"reward `{self._name}`",
                got=how,
                fix="see its output above; score these rows alone to find the one that does it",
            ) from None
        self.answered = True
        if "error" in reply:
            raise reported_error(reply["error"])
        return reply


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Return a child's exit code, negative for a signal; one that only closed its connection is killed."""
    try:
        return process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _kill(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def _pickled(made_from: Any, name: str, place: str) -> bytes:
    """Return what a child makes the reward from: a name with options, or the reward itself, pickled."""
    fix = "define the reward in a module, and give it by name: `package.module:name`"
    inner = getattr(made_from, "function", made_from)
    if not isinstance(made_from, dict) and "__main__" in (getattr(inner, "__module__", ""), type(inner).__module__):
        problem = "a reward of the script or notebook itself can't run in another process"
        raise ConfigError(problem, place=f"{place}, reward `{name}`", fix=fix)
    try:
        return pickle.dumps(made_from)
    except Exception as error:
        problem = "the reward can't be sent to another process"
        got = describe_error(error)
        raise ConfigError(problem, place=f"{place}, reward `{name}`", got=got, fix=fix) from None


def serve() -> None:
    """Make the reward and score what the parent sends, until it closes the connection. Runs in the child."""
    end_with_parent(int(sys.argv[2]))
    connection = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # what the reward prints isn't the parent's result
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process

    def answer(reply: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(reply).encode())

    try:
        reward = _make(pickle.loads(connection.recv_bytes()))
        reward.prepare()
    except BaseException as error:
        answer({"error": error_report(error)})
        return
    answer({})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, samples = pickle.loads(connection.recv_bytes())
            try:
                reply = {"result": _call(reward, method, samples), "bytes": _memory()}
            except Exception as error:
                reply = {"error": error_report(error)}
            answer(reply)
    os._exit(0)  # whatever threads the reward has left


def _make(made_from: Any) -> RewardFn:
    """Return the reward that `made_from` describes: itself, or its name and options."""
    if isinstance(made_from, RewardFn):
        return made_from
    from rlhf_core.rewards.opening import open_reward

    return open_reward(made_from)


def _call(reward: RewardFn, method: str, samples: Sequence[Sample]) -> Any:
    """Return what a method of the reward returns, as JSON values; what isn't one is returned as its `repr`."""
    import inspect

    from rlhf_core.rewards.background import awaited
    from rlhf_core.rewards.function_reward import plain
    from rlhf_core.rewards.session import without_gradients

    with without_gradients():
        found = getattr(reward, method)(samples)
        found = plain(awaited(found) if inspect.isawaitable(found) else found)
    if isinstance(found, list | tuple):
        found = [plain(one) for one in found]
    return json.loads(json.dumps(found, default=repr))


def _memory() -> int:
    """Return this process's resident memory in bytes."""
    import psutil

    return psutil.Process().memory_info().rss
