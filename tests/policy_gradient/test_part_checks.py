"""What a third party's part returns: wrong types, shapes and numbers are its own fault, by name; right ones train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.infra.errors import ConfigError, DataError, PluginError
from rlhf_core.policy_gradient import (
    ADVANTAGES,
    CLIPS,
    CORRECTIONS,
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    RATIOS,
    SHAPINGS,
    PartTable,
    PolicyTerms,
    RewardTerms,
)

LOGPS, MASK = torch.zeros(2, 3), torch.tensor([[True, True, True], [True, False, False]])
REWARDS, GROUPS = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
TERMS = PolicyTerms(logps=LOGPS, old_logps=LOGPS, log_ratio=LOGPS, advantages=LOGPS + 1, mask=MASK)
SHAPED = RewardTerms(REWARDS[None], torch.ones(1), GROUPS, torch.tensor([4, 5]), limit=8)
GIVEN: dict[str, tuple[PartTable, tuple[Any, ...], dict[str, Any], Any]] = {
    "advantage": (ADVANTAGES, (REWARDS, GROUPS), {}, REWARDS),
    "ratio": (RATIOS, (LOGPS, MASK), {}, LOGPS),
    "clip": (CLIPS, (TERMS,), {}, LOGPS),
    "correction": (CORRECTIONS, (LOGPS, LOGPS, MASK), {}, LOGPS),
    "aggregation": (LOSS_AGGREGATIONS, (MASK,), {"limit": 8}, (MASK.float(), MASK.float().sum(1))),
    "kl": (KL_ESTIMATORS, (LOGPS, LOGPS, None), {}, LOGPS),
    "shaping": (SHAPINGS, (SHAPED,), {}, SHAPED),
}
"""For each kind its table, the arguments of a part, and what a right one may return."""


def call(kind: str, part: Any) -> Any:
    """Return what the kind's part returns when it is called through its table, as `mine`."""
    table, given, named, _ = GIVEN[kind]
    table.register("mine", part)
    return table.bind("mine", {})(*given, **named)


def wrong(kind: str, change: Any) -> Any:
    """Return what a right part returns, its (first) tensor changed."""
    right = GIVEN[kind][3]
    if kind == "aggregation":
        return change(right[0]), right[1]
    return replace(right, scores=change(right.scores)) if kind == "shaping" else change(right)


@pytest.mark.parametrize("kind", GIVEN)
def test_a_right_part_returns_what_it_returns(kind: str) -> None:
    right = GIVEN[kind][3]
    found = call(kind, lambda *given, **named: right)
    assert type(found) is type(right) and (found is right or all(map(torch.equal, found, right)))


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda right: torch.cat([right, right], dim=-1), "got a tensor of float32 ("),
        (lambda right: right[..., :-1], "got a tensor of float32 ("),
        (lambda right: right[..., None], "got a tensor of float32 ("),
        (lambda right: right.long(), "got a tensor of int64 ("),
        (lambda right: right.tolist(), "got list of "),
        (lambda right: None, "got NoneType"),
        (lambda right: right * float("nan"), "got nan in "),
        (lambda right: right + float("inf"), "got inf in "),
    ],
)
def test_a_wrong_result_names_the_part(kind: str, change: Any, got: str) -> None:
    with pytest.raises(PluginError) as found:
        call(kind, lambda *given, **named: wrong(kind, change))
    line = found.value.line()
    assert line.startswith(f"error[plugin] {kind} `mine`: must return ") and got in line and "\n" not in line


def test_a_wrong_amount_or_weight_names_the_part() -> None:
    for found in (MASK.float(), (MASK.float(),), (MASK.float(), MASK.float()), (MASK.float(), REWARDS.log())):
        with pytest.raises(PluginError, match="aggregation `mine`: must return"):
            call("aggregation", lambda mask, *, limit, found=found: found)
    for changed in ({"weights": torch.ones(2)}, {"lengths": torch.ones(1)}, {"groups": None}):
        with pytest.raises(PluginError, match="shaping `mine`: must return"):
            call("shaping", lambda terms, changed=changed: replace(terms, **changed))
    with pytest.raises(PluginError, match="shaping `mine`: must return `RewardTerms`; got a tensor"):
        call("shaping", lambda terms: terms.total)


def test_what_a_part_raises_names_it_and_errors_of_the_project_stay() -> None:
    def raising(rewards: Tensor, groups: Tensor) -> Tensor:
        raise ValueError("boom")

    def refusing(rewards: Tensor, groups: Tensor) -> Tensor:
        raise DataError("no such column")

    with pytest.raises(PluginError, match="advantage `mine`: the part raised an error; got ValueError: boom"):
        call("advantage", raising)
    with pytest.raises(DataError, match=r"^no such column$"):
        call("advantage", refusing)
    with pytest.raises(ConfigError, match="needs groups of at least 2"):
        ADVANTAGES.bind("leave_one_out", {})(REWARDS, torch.tensor([0, 1]))


def test_another_precision_is_converted_with_its_gradient() -> None:
    logps = LOGPS.clone().requires_grad_()
    RATIOS.register("mine", lambda log_ratio, mask: log_ratio.double() * 2)
    found = RATIOS.bind("mine", {})(logps, MASK)
    found.sum().backward()
    assert found.dtype == torch.float32 and logps.grad is not None and logps.grad.unique().tolist() == [2.0]


def test_a_part_is_not_blamed_for_what_it_was_given_nor_for_padding() -> None:
    CLIPS.register("mine", lambda terms: (terms.ratio * terms.advantages).masked_fill(~terms.mask, float("nan")))
    clip = CLIPS.bind("mine", {})
    assert clip(TERMS).isnan().sum() == 2
    assert clip(replace(TERMS, log_ratio=LOGPS * float("nan"))).isnan().all()
