"""Bad input to reinforcement learning and distillation, as `rlhf train` reports it: one line, what to do, and an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.testing.tiny import save_tiny

REWARDS = """
import math
import time


def raises(completions, **columns):
    raise KeyError("answer")


def hangs(completions, **columns):
    time.sleep(60)


def nothing(completions, **columns):
    return None


def not_a_number(completions, **columns):
    return [1.0] * (len(completions) - 1) + [math.nan]


def too_few(completions, **columns):
    return [1.0] * (len(completions) - 1)


def alike(completions, **columns):
    return [0.0] * len(completions)


def length(completions, **columns):
    return [len(text) for text in completions]
"""
PROMPTS = [{"prompt": f"q{number}"} for number in range(12)]
OPTIONS = (
    "--batch_size", "2", "--max_length", "64", "--group_size", "2", "--generation.max_new_tokens", "4", "--dataset.wrap", "none",
    "--logging.progress", "false",
)  # fmt: skip


@pytest.fixture
def online(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a function that runs `rlhf train METHOD` beside `own.py`, which has the rewards above; flags replace its own."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(REWARDS)

    def run(method: str, flags: str = "", **given: Any) -> Any:
        words = flags.split(" ") if flags else []
        kept = [
            word
            for name, value in zip(OPTIONS[::2], OPTIONS[1::2], strict=True)
            if name not in words and (name, method) != ("--group_size", "distill")
            for word in (name, value)
        ]
        if "--max_steps" not in words:
            kept += ["--max_steps", "2"]
        return train(*words, method=method, options=kept, **{"data": PROMPTS, **given})

    return run


def assert_one_line(ended: Any, code: int, message: str) -> None:
    assert ended.code == code, ended.err
    assert message in ended.error, ended.error
    assert ended.error.startswith("error[") and "; fix: " in ended.error and "Traceback" not in ended.err


@pytest.mark.parametrize("method", ["grpo", "ppo"])
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", "the reward raised an error; got KeyError: 'answer' at own.py:7 in raises; fix: mend the reward"),
        ("nothing", "the reward returned None; fix: return one number per sample"),
        ("not_a_number", "a score must be a finite number; got nan; fix: return a number for every sample"),
        (
            "too_few",
            "expected 4 scores, one per sample; got 3 scores; fix: return a list with one number per completion",
        ),
    ],
)
def test_a_broken_reward_is_named_and_the_run_says_how_it_ended(
    online: Callable, tmp_path: Path, method: str, reward: str, message: str
) -> None:
    ended = online(method, f"--rewards own.py:{reward}")
    assert_one_line(ended, 5, message)
    assert f"reward `{reward}`" in ended.error
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["exit_code"], record["step"]) == ("failed", 5, 0)


def test_a_reward_that_hangs_ends_at_its_time_limit(online: Callable) -> None:
    ended = online("grpo", '--rewards {"name":"own.py:hangs","time_limit":0.3}')
    assert_one_line(ended, 5, "scoring took longer than 0.3 seconds; got 4 samples, stopped at own.py:11 in hangs")


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_rewards_that_are_always_equal_end_the_run_and_are_shown(online: Callable, method: str) -> None:
    flags = "--rewards own.py:alike --max_steps 40 --max_idle_batches 2"
    ended = online(method, flags + (" --rollout_epochs 1" if method == "ppo" else ""))
    assert_one_line(ended, 6, "step 3: in 3 rollouts in a row all rewards")
    assert "alike 0, 0" in ended.error and "WARNING step 1: all rewards" in ended.err


CONFIGURATIONS: dict[tuple[str, str], str] = {
    ("grpo", ""): "command line: no rewards are given; fix: set `rewards`",
    (
        "grpo",
        "--rewards own.py",
    ): "--rewards: unknown reward `own.py`; fix: name a function in the file: `own.py:FUNCTION`",
    (
        "grpo",
        "--rewards own.py:lenght",
    ): "unknown reward `own.py:lenght`: `own.py` has no `lenght`; fix: did you mean `length`?",
    (
        "grpo",
        "--rewards elsewhere/rewards_of_mine.py:f",
    ): "--rewards: unknown reward `elsewhere/rewards_of_mine.py:f`: no such file; fix: give its path from ",
    ("grpo", '--rewards {"nmae":"length"}'): "--rewards: unknown option `rewards.0.nmae`; fix: did you mean `name`?",
    (
        "grpo",
        "--rewards repetition --group_size 1",
    ): "--group_size: group_mean_std needs groups of at least 2; got a group of 1; fix: ",
    ("grpo", "--rewards repetition --variant dr_grop"): "or 'dppo'; got 'dr_grop'; fix: did you mean `dr_grpo`?",
    ("grpo", "--rewards repetition --clip ppoo"): "--clip: unknown clip `ppoo`; fix: did you mean `ppo`?",
    ("grpo", "--rewards repetition --clip_options 0.3"): "--clip_options: must be a mapping",
    (
        "grpo",
        "--rewards repetition --clip_options.lo 0.3",
    ): "--clip_options.lo: clip `ppo` has no option `lo`; got 0.3; fix: did",
    (
        "grpo",
        "--rewards repetition --clip_options.low many",
    ): "--clip_options.low: option `low` of clip `ppo`: must be a",
    (
        "grpo",
        "--rewards repetition --shaping overlng",
    ): "--shaping: unknown shaping `overlng`; fix: did you mean `overlong`?",
    (
        "grpo",
        "--rewards own.py:length --eval_samples 4",
    ): "eval_samples: evaluations need held-out data; fix: set `eval_data`",
    (
        "grpo",
        "--rewards repetition --generation.temperature 0",
    ): "--generation.temperature: completions of temperature 0",
    (
        "grpo",
        "--rewards own.py:length --generation.max_new_tokens 128",
    ): "generation.max_new_tokens: no prompt leaves room for as",
    ("ppo", "--rewards own.py:length --value gone/value"): "gone/value",
    ("ppo", "--rewards repetition --kl_weight 0 --kl_target 0.1"): "kl_target needs a `kl_weight` above 0",
    (
        "ppo",
        "--rewards repetition --aggregation_options.size 2",
    ): "--aggregation_options.size: aggregation `token` has no option",
    ("distill", ""): "`teacher` is missing; fix: set `teacher`",
    ("distill", "--teacher ./gone --on_policy 1"): "./gone: no such model directory",
    ("distill", "--teacher ./gone --divergence kl"): "--divergence: must be 'forward_kl', 'reverse_kl'",
    ("distill", "--teacher ./gone --on_policy 2"): "--on_policy: must be less than or equal to 1; got 2",
}


@pytest.mark.parametrize(("method", "flags"), CONFIGURATIONS)
def test_a_configuration_that_cannot_hold_is_one_line(online: Callable, method: str, flags: str) -> None:
    ended = online(
        method, flags, data=[{**row, "response": "a"} for row in PROMPTS] if method == "distill" else PROMPTS
    )
    assert ended.code in (2, 4), ended.err
    assert CONFIGURATIONS[method, flags] in ended.error, ended.error
    assert ended.error.startswith("error[") and "Traceback" not in ended.err


def test_prompts_that_leave_no_room_are_counted_and_no_run_begins(online: Callable) -> None:
    ended = online("grpo", "--rewards own.py:length", data=[{"prompt": "long " * 40} for _ in range(4)])
    assert_one_line(ended, 3, "none of 4 rows can be used; got 4 × the prompt leaves no response token")


def test_rollouts_of_another_model_are_not_replayed(online: Callable, tmp_path: Path) -> None:
    first = online("grpo", "--rewards own.py:length --logging.rollouts.whole true", output=tmp_path / "drawn")
    assert first.code == 0, first.err
    other = save_tiny(tmp_path / "other", layers=1, hidden=16, max_positions=128, seed=1)
    flags = f"--rewards own.py:length --replay {tmp_path / 'drawn'}"
    ended = online("grpo", flags, model=other, output=tmp_path / "again")
    assert_one_line(ended, 2, "another model drew the rollouts than the one that would learn from them")
    assert online("grpo", flags, output=tmp_path / "same").code == 0
