"""Metrics as text: a line holds what a reader looks for, each spread behind its metric, and nothing twice."""

from __future__ import annotations

from rlhf_core.training.metric_text import evaluation_line, fixed, step_figures
from rlhf_core.training.rollout_log import rollout_table


def test_an_evaluation_has_each_error_behind_its_metric() -> None:
    assert (
        evaluation_line({"eval_loss": 1.25, "eval_loss_se": 0.5, "eval_se": 2})
        == "eval_loss 1.2500 ± 0.5000  eval_se 2.0000"
    )


def test_a_step_shows_its_own_metrics_in_their_order() -> None:
    row = {"loss": 1.0, "margin": 0.25, "eval_loss": 2.0, "accuracy": 0.5, "spread_std": 3.0}
    assert step_figures(row, hidden=("loss",)) == ["margin 0.25", "accuracy 0.5", "spread_std 3"]


def test_an_online_step_begins_with_its_reward_and_leaves_details_to_the_file() -> None:
    row = {
        "loss": 0.0, "length": 16.0, "ratio": 1.0, "ratio_positive": 1.0, "clipped": 0.25, "clipped_negative": 0.5, "kl": 0.1,
        "kl_sampled": 0.2, "logprob_gap": 1e-6, "logprob_gap_max": 1e-5, "length_right": 9.0, "mine": 7.0, "reward/format": 0.5,
        "reward": 0.5, "reward_std": 0.3, "eval_reward": 1.0, "eval_reward_se": 0.1,
    }  # fmt: skip
    assert step_figures(row, hidden=("loss",)) == [
        "reward 0.5 (std 0.3)", "reward/format 0.5", "length 16", "kl 0.1", "clipped 0.25", "logprob_gap 1e-06", "mine 7",
    ]  # fmt: skip
    assert "ratio 1" in step_figures({"ratio": 1.0})  # of another kind of method


def test_what_rounds_to_zero_has_no_sign() -> None:
    assert (fixed(-1e-9), fixed(-0.5)) == ("0.0000", "-0.5000")


def test_a_table_shows_where_a_prompt_and_a_completion_begin_and_end() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is it?{' so' * 60} Say #### 42"},
    ]
    row = {"step": 0, "row": 7, "place": 0, "prompt": chat, "stop_reason": "end", "tokens": 9}
    rows = [
        {**row, "sample": number, "reward": reward, "advantage": reward - 1, "completion": text}
        for number, (reward, text) in enumerate(
            [(0.0, "no\x1b[31m"), (2.0, f"First{' so' * 60}\n#### 5"), (1.0, "some")]
        )
    ]
    title, prompt, best, worst = rollout_table(rows).split("\n")
    assert max(map(len, (title, prompt, best, worst))) <= 100
    assert prompt.startswith("  row 7: What is it? so") and prompt.endswith("so Say #### 42") and " … " in prompt
    assert best.split()[:5] == ["2.000", "1.000", "9", "end", "First"] and best.endswith("so⏎#### 5")
    assert worst.endswith("end     no\\x1b[31m") and title.index("completion") == worst.index("no\\x1b")
