"""The benchmark of samplers at equal tokens: what a budget is, differences by hand, and the whole of it in small."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_core.evaluation.sampler_comparison import SamplerScore


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module: `benchmarks` is no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "inference_compute", raising=False)
    import inference_compute

    return inference_compute


def test_a_budget_is_as_many_steps_at_each_depth(bench: ModuleType) -> None:
    by_label = {one.label: one.options for one in bench.contenders([16], 30.5, 0.7) if one.budget == 16}
    assert (
        by_label["best_of_n"]["candidates"]
        == by_label["particles"]["particles"]
        == by_label["adaptive"]["budget"]
        == 16
    )
    assert by_label["beam"]["beams"] * by_label["beam"]["expansions"] == 16
    assert by_label["dvts"]["subtrees"] * by_label["dvts"]["expansions"] == 16
    assert by_label["mcts"]["max_tokens"] == 16 * 30.5


@pytest.mark.parametrize("text", ["1", "3", "8"])
def test_a_budget_that_no_search_can_spend_is_refused(bench: ModuleType, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="square"):
        bench.square(text)


def test_differences_are_to_the_majority_of_the_same_budget(bench: ModuleType) -> None:
    """Prompts are won and lost: right at 0 and 2 against right at 0 alone, of four; the other budget has no part in it."""
    scores = [
        SamplerScore("majority 4", [1.0, 0.0, 0.0, 0.0], 9.0, {"policy": 40}, 0.0),
        SamplerScore("majority 16", [1.0, 1.0, 1.0, 1.0], 9.0, {"policy": 160}, 0.0),
        SamplerScore("beam 4", [1.0, 0.0, 1.0, 0.0], 9.0, {"policy": 44, "process_reward": 20}, 0.0),
    ]
    first, _, beam = bench.as_rows(scores)
    assert first["difference"] is None and first["process_reward_tokens"] is None and first["policy_tokens"] == 10
    assert (beam["difference"], beam["difference_error"]) == (0.25, 0.25)
    assert (beam["policy_tokens"], beam["process_reward_tokens"]) == (11, 5)
    assert bench.table([beam]).endswith("| beam | 4 | 50.0 ± 28.9 | +25.0 ± 25.0 | 11 | 5 | 0 |")


@pytest.mark.slow
def test_in_small(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompts", "3", "--budgets", "4", "--steps", "2", "--base-steps", "2"]
    options += ["--reward-steps", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["inference_compute.py", "--json", *options])
    bench.main()
    found = json.loads((tmp_path / "inference_compute.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    names = [(row["sampler"], row["budget"]) for row in found["rows"]]
    assert names == [(one.label, one.budget) for one in bench.contenders([4], 30.0, 0.7)]
    assert all(row["policy_tokens"] > 0 for row in found["rows"])
    assert {row["sampler"] for row in found["rows"] if row["process_reward_tokens"]} == {
        "beam",
        "dvts",
        "particles",
        "mcts",
    }
