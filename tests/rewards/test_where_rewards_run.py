"""Rewards run beside each other and beside generation; whatever one does wrong ends the run with its name and row."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.rewards import Rewards, WeightedReward, as_reward, open_rewards, reward_process

SAMPLES = [Sample("p", text, columns={"answer": text}, group=number // 2) for number, text in enumerate("abcd")]
ROWS = [4, 4, 7, 7]


def rewards_of(*functions: Any, **options: Any) -> Rewards:
    return Rewards([WeightedReward(f"r{n}", as_reward(one), **options) for n, one in enumerate(functions)])


def timed(rewards: Rewards, samples: Sequence[Sample] = SAMPLES) -> tuple[Any, float]:
    began = time.monotonic()
    scores = rewards.score(samples, rows=range(len(samples)))
    return scores, time.monotonic() - began


# Several at once, in the order of the samples


def test_async_functions_run_at_the_same_time_and_keep_the_order() -> None:
    async def later(completion: str) -> float:
        await asyncio.sleep(0.3 - 0.05 * "abcd".index(completion))  # the last ends first
        return float(ord(completion))

    async def batched(completions: list[str]) -> list[float]:
        await asyncio.sleep(0.3)
        return [float(len(completions))] * len(completions)

    scores, seconds = timed(rewards_of(later, batched))
    assert scores.by_name == {"r0": [97.0, 98.0, 99.0, 100.0], "r1": [4.0] * 4}
    assert seconds < 0.9  # one after the other they take 1.2 seconds
    assert 0.25 < scores.seconds["r0"] < 0.5 and scores.waited <= seconds


def test_an_async_method_of_a_class_is_awaited() -> None:
    class Later(RewardFn):
        api = 1

        async def score(self, samples: Sequence[Sample]) -> list[float]:
            await asyncio.sleep(0.01)
            return [1.0 for _ in samples]

    assert open_rewards([Later]).score(SAMPLES).total.tolist() == [1.0] * 4


def test_no_more_calls_at_once_than_asked_for() -> None:
    running, most = 0, 0

    async def counted(completion: str) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return 0.0

    rewards_of(counted, concurrency=2).score(SAMPLES)
    assert most == 2


def test_a_function_that_waits_runs_in_threads_beside_one_in_the_main_thread() -> None:
    where: list[str] = []

    def waits(completion: str) -> float:
        time.sleep(0.2)
        where.append(threading.current_thread().name)
        assert not torch.is_grad_enabled()
        return float(ord(completion))

    def computes(completions: list[str]) -> list[float]:
        time.sleep(0.2)
        where.append(threading.current_thread().name)
        return [0.0] * len(completions)

    entries = [
        WeightedReward("waits", as_reward(waits), runs_in="thread", concurrency=4),
        WeightedReward("computes", as_reward(computes)),
    ]
    scores, seconds = timed(Rewards(entries))
    assert scores.by_name["waits"] == [97.0, 98.0, 99.0, 100.0] and seconds < 0.8  # one after the other: 1
    assert sorted(where) == ["MainThread"] + ["reward waits"] * 4


def test_samples_that_are_added_in_any_order_are_scored_in_theirs() -> None:
    began: list[str] = []

    async def early(completions: list[str]) -> list[float]:
        began.extend(completions)
        return [float(ord(text)) for text in completions]

    rewards = rewards_of(early, lambda completions: [len(completions)] * len(completions))
    with rewards.scoring() as session:
        session.add(SAMPLES[2:], [7, 7], at=[2, 3])
        deadline = time.monotonic() + 5
        while not began and time.monotonic() < deadline:
            time.sleep(0.01)
        assert began == ["c", "d"]  # scored while the others don't exist yet
        session.add(SAMPLES[:2], [4, 4], at=[0, 1])
        scores = session.result()
    assert scores.by_name == {"r0": [97.0, 98.0, 99.0, 100.0], "r1": [4.0] * 4}
    assert list(scores.groups) == [0, 0, 1, 1]


# What goes wrong has a name and a row


def per_row(kind: str) -> Any:
    async def hangs_async(completion: str) -> float:
        await asyncio.sleep(60 if completion == "c" else 0)
        return 1.0

    async def raises_async(completion: str) -> float:
        return 1.0 if completion != "c" else 1 / 0

    def hangs(completion: str) -> float:
        time.sleep(60 if completion == "c" else 0)
        return 1.0

    def raises(completion: str) -> float:
        return 1.0 if completion != "c" else 1 / 0

    return locals()[kind]


@pytest.mark.parametrize(
    ("kind", "runs_in"),
    [
        *((kind, runs_in) for kind in ("hangs", "raises") for runs_in in ("main", "thread")),
        *((kind, "auto") for kind in ("hangs_async", "raises_async")),
    ],
)
def test_a_function_of_one_sample_is_blamed_for_its_row(kind: str, runs_in: Any) -> None:
    rewards = rewards_of(per_row(kind), time_limit=0.3, runs_in=runs_in)
    said = (
        "scoring took longer than 0.3 seconds"
        if "hangs" in kind
        else "the reward raised an error; got ZeroDivisionError"
    )
    began = time.monotonic()
    with pytest.raises(PluginError, match=f"^reward `r0`, row 7: {said}"):
        rewards.score(SAMPLES, rows=[4, 5, 7, 8])
    assert time.monotonic() - began < 3


def test_a_sample_without_a_row_number_is_named_too() -> None:
    with pytest.raises(PluginError, match=r"^reward `r0`, sample 2: the reward raised"):
        rewards_of(per_row("raises")).score(SAMPLES)
    with pytest.raises(PluginError, match=r"^reward `r0`, sample 2: scoring took longer"):
        rewards_of(per_row("hangs"), time_limit=0.3).score(SAMPLES)


def test_a_failure_beside_generation_is_raised_at_the_next_sample() -> None:
    async def raises(completion: str) -> float:
        raise ValueError("no")

    with pytest.raises(PluginError, match="row 4: the reward raised an error; got ValueError: no"):
        with rewards_of(raises).scoring() as session:
            for _ in range(100):
                session.add(SAMPLES[:1], [4])
                time.sleep(0.02)


@pytest.mark.parametrize("runs_in", ["thread", "auto"])
def test_calls_that_wait_do_not_start_once_a_session_has_ended(runs_in: Any) -> None:
    begun: list[str] = []

    def first_fails(completion: str) -> float:
        begun.append(completion)
        time.sleep(0.02)
        return float(completion)

    async def first_fails_async(completion: str) -> float:
        begun.append(completion)
        await asyncio.sleep(0.02)
        return float(completion)

    samples = [Sample("p", text) for text in ("no number", *"0123456789")]
    rewards = rewards_of(first_fails_async if runs_in == "auto" else first_fails, runs_in=runs_in, concurrency=1)
    with pytest.raises(PluginError, match="could not convert"):
        rewards.score(samples)
    time.sleep(0.3)  # all of them take 0.22 seconds
    assert len(begun) <= 3
    assert rewards.score(samples[1:]).by_name["r0"] == list(range(10))


@pytest.mark.parametrize("runs_in", ["main", "thread"])
def test_an_error_without_a_readable_text_is_blamed_all_the_same(runs_in: Any) -> None:
    class UnreadableError(Exception):
        def __str__(self) -> str:
            raise KeyError("text")

    def raises(completion: str) -> float:
        raise UnreadableError

    said = r"^reward `r0`, row 4: the reward raised an error; got UnreadableError: \(its text can't be read: KeyError\)"
    with pytest.raises(PluginError, match=said):
        rewards_of(raises, runs_in=runs_in).score(SAMPLES, rows=range(4, 8))


def test_a_thread_that_a_reward_left_does_not_keep_the_command_line_from_exiting(tmp_path: Path) -> None:
    (tmp_path / "lingers.py").write_text(
        "import threading, time\n"
        "def lingers(completion):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    return 1.0\n",
        encoding="utf-8",
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n', encoding="utf-8")
    command = [sys.executable, "-m", "rlhf_core", "score", "lingers.py:lingers", "--data", "rows.jsonl"]
    done = subprocess.run(
        [*command, "--output", "scores.jsonl"], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0 and (tmp_path / "scores.jsonl").read_text(encoding="utf-8"), done.stderr


def test_an_async_reward_that_does_not_await_is_the_one_that_is_blamed() -> None:
    ended = threading.Event()

    async def blocks(completions: list[str]) -> list[float]:
        while not ended.wait(0.01):
            pass
        return [1.0] * len(completions)

    async def innocent(completions: list[str]) -> list[float]:
        await asyncio.sleep(0.05)
        return [1.0] * len(completions)

    entries = [
        WeightedReward("innocent", as_reward(innocent), time_limit=0.3),
        WeightedReward("blocks", as_reward(blocks), time_limit=60),
    ]
    with pytest.raises(PluginError, match=r"reward `blocks`, rows 4, 7: an async reward doesn't await.*in blocks"):
        Rewards(entries).score(SAMPLES, rows=ROWS)
    assert open_rewards([innocent]).score(SAMPLES).total.tolist() == [1.0] * 4  # on another event loop
    ended.set()


LIES: dict[str, tuple[Any, str]] = {
    "too few": ([1.0], "expected 4 scores, one per sample; got 1 scores"),
    "None": (None, "the reward returned None"),
    "one None": ([1, None, 1, 1], "row 5: a score must be a finite number; got None"),
    "NaN": ([1, 1, float("nan"), 1], "row 6: a score must be a finite number; got nan"),
    "inf": ([1, 1, 1, float("inf")], "row 7: a score must be a finite number; got inf"),
    "text": (["1"] * 4, "row 4: a score must be a finite number; got '1'"),
    "a string": ("1234", "row 4: a score must be a finite number; got '1'"),
    "a dictionary": (dict.fromkeys("abcd", 1.0), "a score must be a finite number; got 'a'"),
    "a tensor of another shape": (torch.zeros(2, 2), "expected 4 scores, one per sample; got 2 scores"),
    "a tensor without axes": (torch.tensor(1.0), "expected 4 scores, one per sample; got float"),
}


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize("how", ["main", "thread", "async"])
def test_a_lying_reward_ends_the_run_wherever_it_runs(case: str, how: str) -> None:
    value, said = LIES[case]

    def lies(completions: list[str]) -> Any:
        return value

    async def lies_async(completions: list[str]) -> Any:
        return value

    rewards = rewards_of(lies_async) if how == "async" else rewards_of(lies, runs_in=how)
    with pytest.raises(PluginError, match=said):
        rewards.score(SAMPLES, rows=range(4, 8))


def test_true_and_false_count_as_one_and_zero() -> None:
    assert rewards_of(lambda completion: completion == "b").score(SAMPLES).total.tolist() == [0, 1, 0, 0]


def test_a_reward_that_leaks_threads_or_files_is_reported_once(tmp_path: Path, caplog: Any) -> None:
    kept: list[Any] = []
    stop = threading.Event()

    def threads(completions: list[str]) -> list[float]:
        threading.Thread(target=stop.wait, daemon=True).start()
        return [0.0] * len(completions)

    def files(completions: list[str]) -> list[float]:
        kept.append((tmp_path / "file").open("w"))
        return [0.0] * len(completions)

    def tidy(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    for function, said in ((threads, "8 more threads"), (files, "8 more open files"), (tidy, None)):
        caplog.clear()
        rewards = rewards_of(function)
        with caplog.at_level(logging.WARNING):
            for _ in range(20):
                rewards.score(SAMPLES)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (said is not None) and (said is None or f"reward `r0` left {said}" in told[0])
    stop.set()
    for file in kept:
        file.close()


# In child processes


def in_process(name: str, **options: Any) -> Rewards:
    return open_rewards([{"name": f"process_rewards:{name}", "runs_in": "process", **options}])


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


MIXED = [Sample("p", "good"), Sample("p", "bad"), Sample("p", "good")]


def test_a_reward_scores_in_another_process(capfd: Any) -> None:
    rewards = in_process("brevity")
    assert rewards.score([Sample("p", text) for text in ("a", "bbb", "")]).total.tolist() == [-1, -3, 0]
    assert capfd.readouterr().out == ""  # what a reward prints is no result
    assert in_process("pairs").score(SAMPLES, rows=ROWS).total.tolist() == [1.0] * 4
    assert "process_rewards:brevity" in rewards.describe()["brevity"]["name"]


ENDS = {
    "exits": "the reward's process ended while it scored; got exit code 0",
    "segfaults": "the reward's process ended while it scored; got SIGSEGV",
    "hangs": "scoring took longer than 2 seconds; got 1 sample",
    "raises": "the reward raised an error; got ValueError: no good",
    "unreadable": "the reward raised an error; got UnreadableError: (its text can't be read: KeyError)",
    "strange": "a score must be a finite number; got '1j'",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_reward_that_breaks_its_process_is_named_with_its_row(name: str) -> None:
    rewards = in_process(name, time_limit=2)
    rewards.prepare()
    began = time.monotonic()
    with pytest.raises(PluginError, match=f"^reward `{name}`, row 8: {re.escape(ENDS[name])}"):
        rewards.score(MIXED, rows=[7, 8, 9])
    assert time.monotonic() - began < 8
    assert rewards.score(MIXED[:1]).total.tolist() == [1.0]  # in another process, if that one ended


def test_several_processes_score_at_once() -> None:
    rewards = in_process("slow", concurrency=2)
    samples = [Sample("p", "a")] * 4
    assert len(set(rewards.score(samples).by_name["slow"])) == 2


def test_a_process_that_leaks_memory_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_process, "GROWTH", 2**24)
    pids = in_process("leaks").score([Sample("p", "a")] * 12).by_name["leaks"]
    assert len(set(pids)) > 1


def test_what_cannot_be_sent_to_a_process_is_refused() -> None:
    class Local(RewardFn):
        api = 1
        runs_in = "process"

        def score(self, samples: Sequence[Sample]) -> list[float]:
            return [0.0] * len(samples)

    with pytest.raises(ConfigError, match=r"rewards\.0, reward `Local`: the reward can't be sent to another process"):
        open_rewards([Local])


@pytest.mark.slow
def test_a_reward_that_holds_the_interpreters_lock_ends_the_process() -> None:
    script = """
        import re
        from rlhf_core.contracts.reward import Sample
        from rlhf_core.rewards import FunctionReward, Rewards, WeightedReward, background
        background.GRACE = 1.0
        async def matches(completion):
            re.match("(a+)+$", "a" * 60 + "b")
        Rewards([WeightedReward("matches", FunctionReward(matches), time_limit=1)]).score([Sample("p", "a")])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGABRT and "in matches" in done.stderr


@pytest.mark.slow
def test_a_short_call_while_the_watch_sleeps_ends_no_process() -> None:
    """Its limit is taken back when it ends, in a fork of the process as well."""
    script = """
        import os, time
        from rlhf_core.rewards import background
        background.GRACE = 0.0
        watch = background.LockWatch()
        with watch.over(0.5):
            time.sleep(0.2)
        time.sleep(0.5)  # the watch has nothing to do and sleeps
        with watch.over(0.5):
            pass
        if os.fork() == 0:
            with watch.over(0.5):
                os._exit(0)
        time.sleep(4)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a stopped process is seen in /proc")
@pytest.mark.parametrize("stopped", ["process", "group"])
def test_a_run_that_is_stopped_for_longer_than_its_time_limit_continues(stopped: str) -> None:
    script = """
        import time
        from rlhf_core.rewards import background
        background.GRACE = 1.0
        with background.LockWatch().over(1.0):
            time.sleep(1.5)
            print("scoring", flush=True)
            time.sleep(1)
            time.sleep(8)  # after it continues, longer than limit and grace
        print("done")
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert run.stdout is not None and run.stdout.readline() == "scoring\n"
        send = os.kill if stopped == "process" else os.killpg
        send(run.pid, signal.SIGSTOP)
        time.sleep(5)
        send(run.pid, signal.SIGCONT)
        assert run.communicate(timeout=60)[0] == "done\n" and run.returncode == 0
    finally:
        run.kill()
