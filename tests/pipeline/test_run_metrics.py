"""What a training stage came to, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.pipeline.run_metrics import training_gain


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        ({"loss": 2.0}, {"loss": 1.5}, "loss 2 → 1.5"),
        ({"loss": 2.0, "accuracy": 0.5}, {"loss": 1.5, "accuracy": 0.75}, "accuracy 0.5 → 0.75"),
        ({"eval_loss": 2.0, "loss": 3.0}, {"eval_loss": 1.5, "loss": 1.0}, "eval_loss 2 → 1.5"),
        # Evaluated at the end alone, which says more than the last step's own rows.
        ({"accuracy": 0.5}, {"accuracy": 0.75, "eval_accuracy": 0.5625}, "accuracy 0.5 → 0.75, held out 0.5625"),
        ({"loss": 2.0}, {"loss": 2.0}, "loss 2"),
        ({"entropy": 2.0}, {"entropy": 2.0}, ""),
    ],
)
def test_gain_of_a_training(first: dict[str, Any], last: dict[str, Any], text: str) -> None:
    assert training_gain({"first": first, "last": last}) == text
