"""Schedules by golden numbers, and which parameters decay."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.config.training import TrainerConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.training.optimizer import Schedule, create_optimizer


def schedule(kind: str, steps: int | None, warmup: float = 0.0) -> Schedule:
    config = TrainerConfig.parse({"learning_rate": 1.0, "lr_schedule": kind, "warmup_ratio": warmup})
    return Schedule.create(config, steps)


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, 0.853553, 0.5, 0.146447]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_golden_rates(kind: str, warmup: float, expected: list[float]) -> None:
    rate = schedule(kind, 4, warmup)
    assert [rate(step) for step in range(1, 5)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "steps", "warmup", "lowest", "expected"),
    [
        # Over 2 steps of warm-up a third more of the peak each; then from the peak to a fifth of it in 4 steps.
        ("linear", 6, 2, 0.2, [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4]),
        ("cosine", 6, 2, 0.2, [1 / 3, 2 / 3, 1, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447]),
        ("linear", 4, 0, 0.5, [1, 0.875, 0.75, 0.625]),
        ("constant", 3, 1, 0.0, [0.5, 1, 1]),
        ("constant", None, 2, 0.0, [1 / 3, 2 / 3, 1]),
    ],
)
def test_golden_rates_with_steps_of_warm_up_and_a_lowest_rate(
    kind: str, steps: int | None, warmup: int, lowest: float, expected: list[float]
) -> None:
    options = {"learning_rate": 2.0, "lr_schedule": kind, "warmup_steps": warmup, "min_learning_rate_ratio": lowest}
    config = TrainerConfig.parse(options)
    rate = Schedule.create(config, steps)
    rates = [rate(step) for step in range(1, len(expected) + 1)]
    assert rates == pytest.approx([2 * one for one in expected], abs=1e-6)
    # Every option written out, as in a run's config.yaml, describes the same schedule.
    assert Schedule.create(TrainerConfig.parse(config.model_dump()), steps) == rate


def test_a_schedule_that_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="the warm-up is given twice, by `warmup_ratio`, too; got 5; fix: leave one"):
        TrainerConfig.parse({"warmup_steps": 5, "warmup_ratio": 0.1})
    with pytest.raises(ConfigError, match=r"a constant learning rate doesn't fall to any other; got 0\.1; fix"):
        TrainerConfig.parse({"lr_schedule": "constant", "min_learning_rate_ratio": 0.1})
    with pytest.raises(ConfigError, match=r"leaves no step for the learning rate itself; got 8 of 8 steps; fix"):
        Schedule.create(TrainerConfig.parse({"warmup_steps": 8}), 8)
    with pytest.raises(ConfigError, match=r"leaves none of the 8 steps for the learning rate itself; got 9; fix"):
        TrainerConfig.parse({"warmup_steps": 9, "max_steps": 8})
    assert TrainerConfig.parse({"warmup_steps": 5, "warmup_ratio": 0}).warmup_steps == 5


def test_no_step_is_wasted_and_the_peak_is_reached() -> None:
    for steps in (1, 2, 3, 7, 100):
        for kind in ("cosine", "linear"):
            rates = [schedule(kind, steps, 0.1)(step) for step in range(1, steps + 1)]
            assert max(rates) == 1.0 and min(rates) > 0


def test_an_unknown_length_allows_only_a_constant_rate() -> None:
    assert schedule("constant", None)(10**9) == 1.0
    for kind, warmup in (("cosine", 0.0), ("linear", 0.0), ("constant", 0.1)):
        with pytest.raises(ConfigError, match="needs the number of steps") as caught:
            schedule(kind, None, warmup)
        assert caught.value.exit_code == 2


def test_decay_on_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].requires_grad_(False)
    config = TrainerConfig.parse({"optimizer": {"weight_decay": 0.1, "beta2": 0.95}})
    optimizer = create_optimizer(model, config)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays.get(id(p)) for name, p in model.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": None, "2.bias": None
    }  # fmt: skip
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        create_optimizer(torch.nn.Linear(1, 1).requires_grad_(False), TrainerConfig())


def test_one_step_of_adamw_by_hand() -> None:
    """The first step moves every weight by the rate (bias-corrected m / √v is the gradient's sign), after decay."""
    parameter = torch.nn.Parameter(torch.tensor([[2.0, -4.0]]))
    config = TrainerConfig.parse({"learning_rate": 0.1, "optimizer": {"weight_decay": 0.5, "epsilon": 1e-12}})
    optimizer = create_optimizer([("w", parameter)], config)
    parameter.grad = torch.tensor([[3.0, -0.01]])
    optimizer.step()
    assert torch.allclose(parameter, torch.tensor([[2.0 * 0.95 - 0.1, -4.0 * 0.95 + 0.1]]))
