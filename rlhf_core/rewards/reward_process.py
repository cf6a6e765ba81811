"""A reward in child processes: one that hangs is killed, one that crashes costs an error, one that leaks is started again.

The parent sends pickled samples and gets JSON back, so that nothing a reward returns can run code here.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import queue
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from rlhf_core.contracts.reward import RewardFn, Sample, ScoreWithParts
from rlhf_core.infra.child_process import ChildProcess, end_with_parent, take_stdio
from rlhf_core.infra.errors import ConfigError, PluginError, describe_error, error_report, reported_error
from rlhf_core.infra.time_limit import TimeLimit

_CODE = (
    # Without a line the parent has ended meanwhile.
    "import sys, json; line = sys.stdin.readline(); line or sys.exit(); given = json.loads(line);"
    "sys.path[:] = given.pop('path');"
    "from rlhf_core.rewards.reward_process import serve; serve(**given)"
)
_START_SECONDS = 600.0
"""The time limit of a child's start, in which it imports the reward's module and loads what it needs."""
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
        self.by_row, self.concurrency, self._limit = reward.by_row, reward.concurrency, time_limit
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
    """One child process; it is ended when this object is no longer needed."""

    def __init__(self, message: bytes, name: str) -> None:
        self.answered, self.grown, self._size, self._name = True, 0, 0, name
        try:
            self._process = ChildProcess(_CODE)
        except OSError as error:
            raise PluginError(f"no process can be started: {error}", place=f"reward `{name}`") from error
        self._end = weakref.finalize(self, self._process.kill)
        path = [place for place in sys.path if isinstance(place, str)]
        self._process.send({"path": path, "parent": os.getpid(), "message": _text(message)})
        self._receive(_START_SECONDS, "was made")

    def ask(self, method: str, samples: Sequence[Sample], limit: float | None) -> Any:
        """Return what the reward's method returns for the samples, as JSON values."""
        self._process.send({"method": method, "samples": _text(pickle.dumps(list(samples)))})
        reply = self._receive(limit, "scored")
        self._size = self._size or int(reply["bytes"])
        self.grown = int(reply["bytes"]) - self._size
        found = reply["result"]
        return (
            [ScoreWithParts(one, parts) for one, parts in zip(found, reply["parts"], strict=True)]
            if "parts" in reply
            else found
        )

    def kill(self) -> None:
        self._end()

    def _receive(self, limit: float | None, doing: str) -> dict[str, Any]:
        """Return the child's next message; raise the error that it reports.

        Raises:
            TimeLimit: there is none within `limit` seconds.
            PluginError: the child has ended.
        """
        self.answered = False
        began = time.monotonic()
        line = self._process.next_line(threading.TIMEOUT_MAX if limit is None else limit)
        if line is None:
            if limit is not None and time.monotonic() - began >= limit:
                raise TimeLimit()
            raise PluginError(
                f"the reward's process ended while it {doing}",
                got=self._process.how_it_ended(),
                fix="see what it wrote above",
            )
        self.answered = True
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise reported_error(reply["error"])
        return reply


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


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


def serve(parent: int, message: str) -> None:
    """Make the reward and score what the parent sends, until it closes stdin. Runs in the child."""
    end_with_parent(parent)
    requests, answers = take_stdio()

    def answer(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    try:
        reward = _make(pickle.loads(base64.b64decode(message)))
        reward.prepare()
    except Exception as error:
        answer({"error": error_report(error)})
        return
    answer({})
    for line in requests:
        request = json.loads(line)
        samples = pickle.loads(base64.b64decode(request["samples"]))
        try:
            found = _call(reward, request["method"], samples)
            reply = {"result": json.loads(json.dumps(found, default=repr)), "bytes": _memory()}
            if isinstance(found, list) and found and all(isinstance(one, ScoreWithParts) for one in found):
                reply["parts"] = [one.parts for one in found]
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
    """Return what a method of the reward returns, with lists and numbers in place of arrays."""
    import inspect

    from rlhf_core.rewards.background import awaited
    from rlhf_core.rewards.function_reward import plain
    from rlhf_core.rewards.session import without_gradients

    with without_gradients():
        found = getattr(reward, method)(samples)
        found = plain(awaited(found) if inspect.isawaitable(found) else found)
    if isinstance(found, list | tuple):
        found = [plain(one) for one in found]
    return found


def _memory() -> int:
    """Return this process's resident memory in bytes."""
    import psutil

    return psutil.Process().memory_info().rss
