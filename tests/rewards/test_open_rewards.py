"""Rewards of a run: what a name, function or object means, how it is called, what is added up, and what stops the run."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import Field
from trl import rewards as trl_rewards

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.online import OnlineConfig, RewardConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import ConfigError, DataError, PluginError
from rlhf_core.rewards import (
    FunctionReward,
    Rewards,
    WeightedReward,
    check_rewards,
    open_rewards,
    rewards_changed,
    samples_of,
)

SAMPLES = [
    Sample("1+1=", "2", completion_ids=(5, 1), columns={"answer": "2", "level": 1}),
    Sample([{"role": "user", "content": "2+2?"}], "It is 5", columns={"answer": "4", "level": 2}, stop_reason="length"),
]


class WindowConfig(BaseConfig):
    threshold: float = Field(0.5, description="Larger lets less through.")


class Window(RewardFn):
    """Scores by a threshold."""

    api = 1
    Config = WindowConfig
    config: WindowConfig

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self.config.threshold] * len(samples)


def exact(completions: list[str], answer: list[str], bonus: float = 1.0, **columns: Any) -> list[float]:
    return [bonus if text == right else 0.0 for text, right in zip(completions, answer, strict=True)]


@pytest.fixture(autouse=True)
def window() -> None:
    registry.register("reward", "window", Window)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A directory that is the current one, to write files of the user's into."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith(("mine", "rlhf_file_")):
            del sys.modules[name]


def scores(given: Any, samples: Sequence[Sample] = SAMPLES) -> list[float]:
    return open_rewards(given).score(samples).total.tolist()


# What is accepted


def test_names_functions_classes_objects_and_pairs_are_added_up() -> None:
    given = [
        "window",
        {"name": "window", "weight": 2, "options": {"threshold": 3}},
        (exact, 10),
        RewardConfig(name="local:window", weight=0),
        Window(WindowConfig(threshold=-1)),
        (Window, 0.5),
    ]
    rewards = open_rewards(given)
    assert rewards.names == ("window", "window_2", "exact", "window_3", "window_4", "window_5") and len(rewards) == 6
    assert rewards.weights == (1, 2, 10, 0, 1, 0.5)
    found = rewards.score(SAMPLES)
    assert found.by_name["window_2"] == [3, 3] and found.by_name["exact"] == [1, 0]
    assert found.total.dtype == torch.float32 and found.total.tolist() == [0.5 + 6 + 10 - 1 + 0.25, 0.5 + 6 - 1 + 0.25]


def test_one_reward_needs_no_list_and_none_is_no_reward() -> None:
    assert scores(exact) == [1, 0] and scores("window") == [0.5, 0.5] and scores((exact, -2)) == [-2, 0]
    assert len(open_rewards([])) == 0
    with pytest.raises(ConfigError, match="no rewards are given"):
        scores([])
    empty = open_rewards([exact]).score([])
    assert empty.total.shape == (0,) and empty.by_name == {"exact": []}


def test_a_function_of_a_module_or_a_file_is_a_reward(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "words.py").write_text(
        "def count(completions, **columns):\n    return [len(c.split()) for c in completions]\n"
        "class Judge:\n    def __call__(self, prompts, completions, scale: float = 1.0):\n"
        "        return [scale] * len(prompts)\n    strict = __call__\n"
        "judge = Judge()\n"
    )
    (here / "lone.py").write_text(
        "from mine_too import TEN\ndef ten(completions):\n    return [TEN for _ in completions]\n"
    )
    (here / "mine_too.py").write_text("TEN = 10\n")
    given = [
        "mine.words:count",
        "lone.py:ten",
        f"{here}/lone.py:ten",
        {"name": "mine.words:judge", "options": {"scale": "2.5"}},
    ]
    rewards = open_rewards([*given, "mine.words:judge.strict", f"{__name__}:Window"])
    assert rewards.names == ("count", "ten", "ten_2", "judge", "strict", "Window")
    assert rewards.score(SAMPLES).by_name == {
        "count": [1, 3], "ten": [10, 10], "ten_2": [10, 10], "judge": [2.5, 2.5], "strict": [1, 1], "Window": [0.5, 0.5],
    }  # fmt: skip


class Callable_:
    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        return [float(len(prompts))] * len(completions)

    def method(self, completions: list[str]) -> list[float]:
        return [1.0] * len(completions)


def test_functions_of_any_form_get_the_arguments_that_they_have() -> None:
    def named(*, completions: Any, level: Any) -> Any:
        return [len(text) * number for text, number in zip(completions, level, strict=True)]

    def tokens(completions: Any, completion_ids: Any, stop_reasons: Any, log_extra: Any = None) -> Any:
        assert log_extra is None
        return [len(ids) + (reason == "end") for ids, reason in zip(completion_ids, stop_reasons, strict=True)]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return exact(*args, **kwargs)

    def positional(prompts: Any, texts: Any, /, answer: Any) -> Any:
        return [float(text == right) for text, right in zip(texts, answer, strict=True)]

    def overlong(completion_ids: Any) -> Any:
        return [-float(len(ids)) for ids in completion_ids]

    cases: list[tuple[Any, list[float]]] = [
        (named, [1, 14]),
        (tokens, [3, 0]),
        (wrapped, [1, 0]),
        (positional, [1, 0]),
        (lambda p, c: [isinstance(one, list) for one in p], [0, 1]),
        (lambda **columns: columns["level"], [1, 2]),
        (Callable_(), [2, 2]),
        (Callable_().method, [1, 1]),
        (functools.partial(exact, bonus=4), [4, 0]),
        (functools.partial(functools.partial(exact, bonus=4), bonus=5), [5, 0]),
        (lambda stop_reasons: [one == "end" for one in stop_reasons], [1, 0]),
        (overlong, [-2, 0]),
        (trl_rewards.get_soft_overlong_punishment(2, 1), [-1, 0]),
    ]
    for function, expected in cases:
        assert scores([function]) == expected, function
    assert open_rewards([max]).names == ("max",)


def test_what_a_partial_sets_no_column_overrides() -> None:
    samples = [Sample("p", "c", columns={"bonus": 7.0, "answer": "c"})]
    assert scores([functools.partial(exact, bonus=4)], samples) == [4]
    assert scores([{"name": f"{__name__}:exact", "options": {"bonus": 3}}], samples) == [3]


@pytest.mark.parametrize("where", ["plain", "within a loop"])
def test_async_functions_are_awaited_and_keep_their_loop(where: str) -> None:
    loops = []

    async def judge(completions: Any, **columns: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    rewards = open_rewards([judge, functools.partial(judge)])

    async def notebook() -> Any:
        return [rewards.score(SAMPLES).total.tolist() for _ in range(2)]

    found = asyncio.run(notebook()) if where == "within a loop" else [rewards.score(SAMPLES).total.tolist()] * 2
    assert found == [[2, 14], [2, 14]]
    assert len(set(map(id, loops))) == 1  # a client that one call opened is good in the next


# What is wrong, before anything is scored

WRONG: dict[str, tuple[Any, str]] = {
    "a misspelt name": ("windw", r"rewards\.0\.name: unknown reward `windw`; fix: did you mean `window`\?"),
    "a misspelt name of a distribution": ("local:windw", r"unknown reward `local:windw`.*did you mean `local:window`\?"),
    "a dot for a colon": ("os.path", r"unknown reward `os\.path`; fix: write `os:path` for a function of a module"),
    "no module": ("nothing.here:f", r"unknown reward `nothing\.here:f`: there is no module `nothing`; fix: install it, or run"),
    "no attribute": (f"{__name__}:exat", r"has no `exat`; fix: did you mean `exact`\?"),
    "no file": ("nothing.py:f", r"no such file"),
    "nothing that can be called": (f"{__name__}:SAMPLES", r"is neither a function nor a class of RewardFn"),
    "a class of something else": (f"{__name__}:Callable_", r"is neither a function nor a class of RewardFn"),
    "an unknown option": (
        {"name": "window", "options": {"treshold": 1}},
        r"unknown option `rewards\.0\.options\.treshold`; fix: did you mean `threshold`\?",
    ),
    "an option of another type": (
        {"name": "window", "options": {"threshold": "high"}},
        r"`rewards\.0\.options\.threshold`: must be a number; got 'high'",
    ),
    "no argument of a function": (
        {"name": f"{__name__}:exact", "options": {"bonuss": 1}},
        r"rewards\.0\.options\.bonuss: the function `exact` has no argument `bonuss`; got 1; fix: did you mean `bonus`\?",
    ),
    "an argument of another type": (
        {"name": f"{__name__}:exact", "options": {"bonus": "much"}},
        r"rewards\.0\.options\.bonus: argument `bonus` of `exact`: must be a valid number.*got 'much'",
    ),
    "a key that no reward has": ({"name": "window", "wieght": 1}, r"unknown option `rewards\.0\.wieght`.*`weight`\?"),
    "a weight that is no number": ((exact, float("nan")), r"rewards\.0: a tuple must be a reward and its weight"),
    "nothing but weights of 0": ([(exact, 0), ("window", 0.0)], r"every reward has a weight of 0"),
    "a number": (3, r"rewards\.0: is not a reward; got 3"),
    "a model": (torch.nn.Linear(1, 1), r"a model alone is not a reward; got Linear"),
    "a function of one argument": (lambda texts: [], r"takes neither `completions` nor two arguments; got \(texts\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reward_is_refused_before_anything_is_scored(case: str) -> None:
    given, said = WRONG[case]
    with pytest.raises(ConfigError, match=said) as raised:
        open_rewards(given)
    assert raised.value.exit_code == 2


def test_a_module_that_raises_is_a_broken_plugin(here: Path) -> None:
    (here / "mine_broken.py").write_text("import nothing_of_that_name\n")
    (here / "mine_exits.py").write_text("import sys\nsys.exit(3)\n")
    for name, said in (
        ("mine_broken:f", "importing `mine_broken` raised an error; got ModuleNotFoundError: No module named"),
        ("mine_exits.py:f", r"importing `mine_exits\.py` raised an error; got SystemExit: 3"),
    ):
        with pytest.raises(PluginError, match=said):
            open_rewards([name])


def test_a_reward_that_cannot_be_made_is_named() -> None:
    class Stubborn(Window):
        api = 1

        def __init__(self, config: Any = None) -> None:
            raise OSError("no network")

    with pytest.raises(PluginError, match=r"rewards\.0, reward `Stubborn`: making .* got OSError: no network"):
        open_rewards([Stubborn])


def test_checking_makes_nothing() -> None:
    class Costly(Window):
        api = 1

        def __init__(self, config: Any = None) -> None:
            raise AssertionError

    registry.register("reward", "costly", Costly)
    check_rewards(OnlineConfig(rewards=["costly", {"name": "window"}]))
    with pytest.raises(ConfigError, match=r"run\.yaml:7: unknown reward `costy`; fix: did you mean `costly`"):
        check_rewards(OnlineConfig(rewards=["costy"]), place={"rewards": "run.yaml:7"})
    with pytest.raises(ConfigError, match="no rewards are given; fix: set `rewards`"):
        check_rewards(OnlineConfig())


# What stops a run


def sleeps() -> None:
    time.sleep(60)


def loops() -> None:
    while True:
        pass


def matches() -> None:
    re.match("(a+)+$", "a" * 60 + "b")


def multiplies() -> None:
    3 ** (3**20)


def computes() -> None:
    table = torch.randn(200, 200)
    while True:
        table = (table @ table).tanh()


def waits() -> None:
    threading.Event().wait()


def swallows() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


async def sleeps_async() -> None:
    await asyncio.sleep(60)


ended = threading.Event()


async def loops_async() -> None:
    while not ended.wait(0.01):  # never awaits, so its event loop runs nothing else
        pass


HANGS = (sleeps, loops, matches, multiplies, computes, waits, swallows, sleeps_async, loops_async)


@pytest.mark.parametrize("hangs", HANGS, ids=lambda hangs: hangs.__name__)
def test_a_reward_that_hangs_is_ended_and_named(hangs: Any) -> None:
    calm: list[int] = []
    ended.clear()

    def slow(completions: Any) -> Any:
        return [1.0] * len(completions) if calm else hangs()

    space: dict[str, Any] = {"slow": slow}
    if asyncio.iscoroutinefunction(hangs):

        async def slowly(completions: Any) -> Any:
            return [1.0] * len(completions) if calm else await hangs()

        space["slow"] = slowly
    rewards = Rewards([WeightedReward("slow", FunctionReward(space["slow"]), time_limit=0.3)])
    before = signal.getsignal(signal.SIGVTALRM)
    began = time.monotonic()
    with pytest.raises(PluginError) as raised:
        rewards.score(SAMPLES, rows=[7, 9])
    assert time.monotonic() - began < 5
    said = raised.value.line()
    assert "reward `slow`, rows 7, 9: scoring took longer than 0.3 seconds; got 2 samples" in said
    assert re.search(rf", stopped at test_open_rewards\.py:\d+ in {hangs.__name__};", said) or hangs is sleeps_async
    ended.set()
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    calm.append(1)
    assert rewards.score(SAMPLES).total.tolist() == [1, 1]


def test_a_reward_that_hangs_in_another_thread_or_a_notebook_is_ended_too() -> None:
    def slow(completions: Any) -> Any:
        time.sleep(2)

    async def notebook(rewards: Rewards) -> None:
        rewards.score(SAMPLES)

    async def slowly(completions: Any) -> Any:
        await asyncio.sleep(60)

    limited = Rewards([WeightedReward("slow", FunctionReward(slow), time_limit=0.2)])
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(PluginError, match=r"scoring took longer than 0\.2 seconds"):
            pool.submit(limited.score, SAMPLES).result()
    with pytest.raises(PluginError, match=r"scoring took longer than 0\.2 seconds"):
        asyncio.run(notebook(Rewards([WeightedReward("slow", FunctionReward(slowly), time_limit=0.2)])))


def test_a_reward_may_set_alarms_of_its_own() -> None:
    rung = []

    def alarmed(completions: Any) -> Any:
        before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.1)
        signal.signal(signal.SIGALRM, before)
        return [len(rung)] * len(completions)

    assert scores(alarmed) == [1, 1]


def test_ctrl_c_interrupts_a_reward() -> None:
    def slow(completions: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        scores(slow)


def test_what_a_reward_raises_keeps_its_traceback_and_its_kind() -> None:
    def wrong(completions: Any, kind: Any = None) -> Any:
        raise (kind or [ValueError("no")])[0]

    with pytest.raises(
        PluginError, match=r"reward `wrong`, row 3: the reward raised an error; got ValueError: no"
    ) as raised:
        open_rewards([wrong]).score(SAMPLES, rows=[3, 3])
    frames = []
    trace = raised.value.__cause__.__traceback__  # type: ignore[union-attr]
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert frames[-1] == "wrong"
    with pytest.raises(DataError, match=r"reward `wrong`, sample 1: too long"):
        scores([functools.partial(wrong, kind=[DataError("too long", place="sample 1")])])
    with pytest.raises(PluginError, match="SystemExit"):
        scores([functools.partial(wrong, kind=[SystemExit(3)])])

    def chats(completions: Any) -> Any:
        return [len(one[0]["content"]) for one in completions]

    with pytest.raises(PluginError, match="completions are text here, not chat messages"):
        scores([chats])


def test_what_a_row_lacks_is_named() -> None:
    def misspelt(completions: Any, anwser: Any) -> Any:
        raise AssertionError

    with pytest.raises(
        PluginError, match=r"needs a column `anwser`, which the rows don't have; fix: did you mean `answer`\?"
    ):
        scores([misspelt])
    with pytest.raises(PluginError, match=r"first two arguments get prompts and completions, and `answer` is a column"):
        scores([lambda answer, texts: []])
    with pytest.raises(
        PluginError, match=r"needs a column `anwser`, which the rows don't have; fix: did you mean `answer`"
    ):
        scores([lambda completion, anwser: 1])
    with pytest.raises(PluginError, match=r"needs a column `answer`, which 1 of 2 rows lack"):
        scores([exact], [SAMPLES[0], Sample("p", "c")])
    with pytest.raises(
        PluginError, match=r"sample 1: a score must be a finite number; got None; fix: return a number for every"
    ):
        scores([lambda prompts, completions: [1.0, None]])
    with pytest.raises(
        PluginError, match=r"rewards, row 8: the weighted sum is too large for float32; got 1 × 1e\+300"
    ):
        open_rewards([lambda p, c: [0, 1e300]]).score(SAMPLES, rows=[7, 8])


def test_rewards_are_scored_without_gradients_and_leave_no_state() -> None:
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def notes(completions: Any) -> Any:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        torch.set_grad_enabled(True)
        return weight * torch.ones(len(completions))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores(notes)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False)] and torch.is_grad_enabled()


def test_rewards_load_once_and_without_a_time_limit() -> None:
    class Loads(Window):
        api = 1
        loads = 0

        def prepare(self) -> None:
            time.sleep(1.2)
            type(self).loads += 1

    registry.register("reward", "loads", Loads)
    rewards = open_rewards([{"name": "loads", "time_limit": 1}])
    assert [rewards.score(SAMPLES).total.tolist() for _ in range(2)] == [[0.5, 0.5]] * 2 and Loads.loads == 1


class Stepwise(Window):
    api = 1
    given: Any = ([0.5, 1], torch.tensor([0.25]))
    asked = 0

    def score_steps(self, samples: Sequence[Sample]) -> Any:
        type(self).asked += 1
        return self.given


def test_step_scores_are_computed_when_they_are_asked_for() -> None:
    Stepwise.asked = 0
    found = open_rewards([Stepwise, exact]).score(SAMPLES)
    assert Stepwise.asked == 0
    assert found.steps == {"Stepwise": [[0.5, 1], [0.25]]} == found.steps and Stepwise.asked == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([[0.5]], "expected 2 lists of step scores, one per sample; got 1 lists"),
        ([[0.5], 0.5], "row 8: step scores must be a list; got 0.5"),
        ([[0.5, float("nan")], [1]], "row 7, step 1: a score must be a finite number; got nan"),
    ],
)
def test_wrong_step_scores_are_named(given: Any, said: str) -> None:
    reward = Stepwise()
    reward.given = given
    with pytest.raises(PluginError, match=f"reward `Stepwise`.*{said}"):
        _ = open_rewards([reward]).score(SAMPLES, rows=[7, 8]).steps


# What is recorded


def test_a_changed_reward_is_noticed(here: Path) -> None:
    file = here / "mine_graded.py"
    file.write_text("def grade(completions, bonus: float = 1):\n    return [bonus] * len(completions)\n")
    given = [{"name": "mine_graded.py:grade", "options": {"bonus": 2}}, "window", exact]
    before = json.loads(json.dumps(open_rewards(given).describe()))
    assert before["window"]["options"] == {"threshold": 0.5} and before["window"]["distribution"] == "local"
    assert before["grade"]["options"] == {"bonus": 2.0} and len(before["grade"]["source_sha256"]) == 64
    assert rewards_changed(before, open_rewards(given).describe()) == []
    file.write_text("def grade(completions, bonus: float = 1):\n    return [-bonus] * len(completions)\n")
    given = [
        {"name": "mine_graded.py:grade", "options": {"bonus": 3}},
        {"name": "window", "weight": 2, "options": {"threshold": 1}},
        Window,
    ]
    changes = rewards_changed(before, open_rewards(given).describe())
    assert [change.partition(" (")[0] for change in changes] == [
        "`exact` is gone",
        "`window_2` is new",
        "`grade`: options.bonus 2.0 → 3.0",
        "`grade`: its source changed",
        "`window`: options.threshold 0.5 → 1.0",
        "`window`: weight 1.0 → 2.0",
    ]


def test_what_is_bound_to_a_function_counts_and_secrets_are_not_kept() -> None:
    def made(threshold: float, api_key: str) -> Any:
        return lambda completions: [threshold] * len(completions)

    def described(function: Any) -> Any:
        return open_rewards([function]).describe()

    assert rewards_changed(described(made(1, "")), described(made(2, ""))) == ["`lambda`: values.threshold 1 → 2"]
    one, other = (described(functools.partial(exact, bonus=bonus)) for bonus in (1, 2))
    assert rewards_changed(one, other) == ["`exact`: values.bonus 1 → 2"]
    secret = described(functools.partial(exact, api_key="hunter2"))
    assert "hunter2" not in json.dumps(secret) and "[redacted]" in json.dumps(secret)


def test_functions_without_a_file_are_known_by_their_code() -> None:
    def compiled(text: str) -> Any:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(text, space)
        return open_rewards([space["f"]]).describe()

    one, same, other = (
        compiled(f"def f(completions):\n    return [{value} if c in {{'a', 'b'}} else 0 for c in completions]\n")
        for value in (1, 1, 2)
    )
    assert rewards_changed(one, same) == [] and rewards_changed(one, other) == ["`f`: its source changed (__main__:f)"]


def test_samples_are_made_of_a_batch_and_its_completions() -> None:
    batch: Any = SimpleNamespace(
        num_prompts=2,
        prompt_ids=torch.tensor([[5, 6, 0], [7, 8, 9]]),
        prompt_lengths=torch.tensor([2, 3]),
        prompts=("1+1=", [{"role": "user", "content": "2+2?"}]),
        records=({"answer": "2"}, {"answer": "4"}),
    )
    drawn = [
        [Completion("2", (5, 1), (-0.5, -0.1), "end"), Completion("3", (6,), (-1.0,), "length", mask=(False,))],
        [Completion("4", (7, 1), (-0.5, -0.1), "end")],
    ]
    samples = samples_of(batch, drawn)
    assert [(s.prompt, s.completion, s.group, s.stop_reason, s.mask) for s in samples] == [
        ("1+1=", "2", 0, "end", None),
        ("1+1=", "3", 0, "length", (False,)),
        (batch.prompts[1], "4", 1, "end", None),
    ]
    assert [list(s.prompt_ids) for s in samples] == [[5, 6], [5, 6], [7, 8, 9]]
    assert samples[1].completion_ids == (6,) and samples[2].columns == {"answer": "4"}
    with pytest.raises(ValueError, match="1 lists of completions for 2 prompts"):
        samples_of(batch, drawn[:1])
