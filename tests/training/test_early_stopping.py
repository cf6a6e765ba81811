"""When patience runs out."""

from __future__ import annotations

import pytest

from rlhf_core.errors import ConfigError
from rlhf_core.training.early_stopping import EarlyStopping


def feed(stopping: EarlyStopping, *values: float) -> list[bool]:
    return [stopping.update({stopping.metric: value}, step) for step, value in enumerate(values, 1)]


def test_it_stops_after_patience_without_improvement() -> None:
    stopping = EarlyStopping(patience=2)
    assert feed(stopping, 3.0, 2.0, 2.5, 1.9, 1.9, 2.0) == [False, False, False, False, False, True]
    assert (stopping.best, stopping.best_step) == (1.9, 4)


def test_larger_can_be_better() -> None:
    assert feed(EarlyStopping("eval_accuracy", mode="max", patience=1), 0.5, 0.6, 0.6) == [False, False, True]


def test_a_gain_must_exceed_min_delta() -> None:
    assert feed(EarlyStopping(patience=1, min_delta=0.5), 3.0, 2.6) == [False, True]


def test_nan_is_no_improvement() -> None:
    assert feed(EarlyStopping(patience=2), float("nan"), float("nan")) == [False, True]


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean `eval_loss`"):
        EarlyStopping("eval_los").check({"eval_loss": 1.0, "eval_kl": 0.0})


def test_its_state_comes_back() -> None:
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    feed(first, 1.0, 2.0)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"best": 1.0, "best_step": 1, "waited": 1}
