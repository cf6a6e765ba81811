"""Rounds of self-improvement: samplers that search or refine, and flaws that are dropped or flagged before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.config.improvement_round import ImprovementConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.pipeline.improve_stage import kept_rows

SAMPLER = {"n": 2, "max_new_tokens": 6, "limit": 4}
TRAIN = {"max_steps": 1}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def stage(folder: Path) -> dict[str, Any]:
    """A stage whose check finds every completion right, and whose verifier none but those with an `a`."""
    (folder / "any.py").write_text(
        "def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n\n"
        "def strict(prompts, completions, **columns):\n    return [float('a' in text) for text in completions]\n"
    )
    return {
        "kind": "improve", "prompts": "prompt.jsonl", "check": "any.py:score", "at_least": 0.0,
        "sampler": {"method": "generate", **SAMPLER}, "train": TRAIN,
    }  # fmt: skip


def test_flaws_are_dropped_or_flagged_before_training(
    pipeline: Any, recorded: Any, folder: Path, stage: dict[str, Any]
) -> None:
    flaws = {"detectors": ["contradiction", "repetition"], "action": "flag", "verifier": "any.py:strict"}
    pipeline({**stage, "flaws": flaws}).run_full_pipeline()
    (one,) = recorded()["stages"]["improve"]["metrics"]["rounds"]
    kept = rows(folder / "out/stages/01-improve/round-1/kept.jsonl")
    checked = rows(folder / "out/stages/01-improve/round-1/checked.jsonl")
    assert len(checked) == 4 and all(len(row["flaws"]) == len(row["completions"]) == 2 for row in checked)
    assert one["flawed"] == sum(bool(names) for row in checked for names in row["flaws"])
    assert sum(one["flaws"].values()) >= one["flawed"] and all(
        {"prompt", "response", "flaws"} == {*row} for row in kept
    )


def test_the_best_completions_without_flaws_are_kept() -> None:
    row = {
        "prompt": "p", "completions": ["a", "b", "a", "c"], "stop_reasons": ["stop"] * 4, "check_score": [1.0, 3.0, 2.0, 0.0],
        "flaws": [[], ["refusal"], [], []],
    }  # fmt: skip
    base = {"model": "m", "prompts": "p.jsonl"}

    def kept(**options: Any) -> list[dict[str, Any]]:
        return list(kept_rows([row], ImprovementConfig.parse({**base, **options}), prompt="prompt"))

    assert [one["response"] for one in kept()] == ["b", "a"]
    assert [one["response"] for one in kept(flaws={})] == ["a"]
    assert [(one["response"], one["flaws"]) for one in kept(flaws={"action": "flag"})] == [
        ("b", ["refusal"]),
        ("a", []),
    ]
    single = {"prompt": "p", "completion": "x", "stop_reason": "stop", "check_score": 1.0, "flaws": ["refusal"]}
    assert not list(kept_rows([single], ImprovementConfig.parse({**base, "flaws": {}}), prompt="prompt"))


@pytest.mark.slow
def test_refined_answers_are_trained_on(pipeline: Any, recorded: Any, folder: Path, stage: dict[str, Any]) -> None:
    judge = {"name": "judge", "method": "reward_model", "data": "preference.jsonl", "model": "model"}
    refine = {"method": "refine", "rounds": 1, "critique_tokens": 4, **SAMPLER, "reward": "judge"}
    pipeline(judge, {**stage, "model": "model", "sampler": refine}).run_full_pipeline()
    samples = rows(folder / "out/stages/02-improve/round-1/samples.jsonl")
    assert recorded()["stages"]["improve"]["status"] == "finished" and all("details" in row for row in samples)
    critic = {"method": "refine", "rounds": 1, "critique_tokens": 4, "decide": "critic", **SAMPLER}
    assert pipeline({**stage, "sampler": critic}, output="by-critic").run_full_pipeline().exit_code == 0


def test_what_is_wrong_with_flaws_is_named(pipeline: Any, stage: dict[str, Any]) -> None:
    for flaws, text in (
        ({"detectors": ["repetitoin"]}, "did you mean `repetition`?"),
        ({"verifier": "nomeric_answer"}, "did you mean `numeric_answer`?"),
        ({"action": "dropp"}, "did you mean `drop`?"),
    ):
        with pytest.raises(Exception, match="recipe") as raised:
            pipeline({**stage, "flaws": flaws}).plan()
        assert text in str(raised.value)


@pytest.mark.parametrize(("group", "key"), [("sampler", "prompts"), ("sampler", "model"), ("train", "data")])
def test_what_the_stage_sets_itself_is_refused(group: str, key: str) -> None:
    method = {"sampler": "generate", "train": "sft"}[group]
    with pytest.raises(ConfigError, match=f"`{key}` is set by the stage itself, and isn't an option of its `{group}`"):
        ImprovementConfig.parse({"model": "m", "prompts": "p", group: {"method": method, key: "x"}})
