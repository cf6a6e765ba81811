"""Metrics as text: a line holds what a reader looks for, each spread behind its metric, and nothing twice."""

from __future__ import annotations

import pytest

from rlhf_core.training.metric_text import evaluation_table, fixed, row_figures, step_figures, step_line
from rlhf_core.training.rollout_log import rollout_table

DPO_STEP = {
    "step": 123, "loss": 0.6931, "learning_rate": 5e-07, "grad_norm": 4.4012, "tokens_per_second": 12_345.0,
    "rewards/chosen": 0.0001308, "rewards/rejected": -0.1532, "rewards/margin": -4.883e-05, "accuracy": 0.78125,
    "logps/chosen": -169.1, "logps/rejected": -167.2, "kl": -0.001064,
}  # fmt: skip
OWN = dict(list(DPO_STEP.items())[5:])


def test_an_evaluation_is_a_small_table_with_each_error_and_the_values_of_before() -> None:
    metrics = {
        "eval_kl": -1e-9,
        "eval_loss": 1.25,
        "eval_rewards/margin": 0.5,
        "eval_rewards/margin_se": 0.5,
        "eval_se": 2,
    }
    assert evaluation_table(metrics, 0).splitlines() == [
        "evaluation of step 0",
        "  eval_loss            1.2500",
        "  eval_rewards/margin  0.5000 ± 0.5000",
        "  eval_kl              0.0000",
        "  eval_se              2.0000",
    ]
    assert evaluation_table(metrics, 20, {"eval_loss": 1.5, "eval_kl": -0.25}, 10).splitlines() == [
        "evaluation of step 20                   before, step 10",
        "  eval_loss            1.2500                    1.5000",
        "  eval_rewards/margin  0.5000 ± 0.5000",
        "  eval_kl              0.0000                   -0.2500",
        "  eval_se              2.0000",
    ]


def test_the_evaluation_of_an_online_method_leaves_details_to_the_file() -> None:
    text = evaluation_table({"eval_reward": 0.5, "eval_length": 9.0, "eval_length_right": 8.0}, 1)
    assert "eval_length " in text and "right" not in text


@pytest.mark.parametrize("width", [71, 111, None])
def test_a_step_of_dpo_fits_one_line(width: int | None) -> None:
    line = step_line(DPO_STEP, row_figures(DPO_STEP, OWN), 10_000, width=width)
    assert width is None or len(line) <= width
    assert line.startswith("step 123/10000  loss 0.6931  margin -4.9e-05  accuracy 0.7812")
    assert (width == 71) == ("lr 5.0e-07" not in line) and (width is None) == ("logps/rejected" in line)


def test_two_metrics_of_one_last_name_keep_their_whole_names() -> None:
    row = {**DPO_STEP, "a/margin": 1.0, "b/margin": 2.0}
    assert row_figures(row, {"a/margin": 1.0, "b/margin": 2.0})[1:3] == ["a/margin 1", "b/margin 2"]


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
