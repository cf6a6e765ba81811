"""Plain functions as rewards, and scores that no run may go on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import PluginError
from rlhf_core.rewards import FunctionReward, as_reward, checked_scores
from rlhf_core.testing import RewardContract


def length(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    return [float(len(text)) for text in completions]


class TestFunctionReward(RewardContract):
    reward = length


def test_a_function_gets_prompts_completions_and_the_columns_that_all_have() -> None:
    given: dict[str, Any] = {}

    def note(prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[int]:
        given.update(prompts=prompts, completions=completions, **columns)
        return [1, 2]

    samples = [Sample("p", "a", columns={"answer": "4", "extra": 1}), Sample("q", "b", columns={"answer": "5"})]
    assert checked_scores(as_reward(note), samples) == [1.0, 2.0]
    ids = {"completion_ids": [[], []], "stop_reasons": ["end", "end"]}
    assert given == {"prompts": ["p", "q"], "completions": ["a", "b"], "answer": ["4", "5"]} | ids


def test_a_reward_class_is_taken_as_it_is() -> None:
    reward = FunctionReward(length)
    assert as_reward(reward) is reward


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "too few": (lambda **_: [1.0], r"reward `wrong`: expected 2 scores, one per sample; got 1 scores"),
    "not a number": (
        lambda **_: [1.0, float("nan")],
        r"reward `wrong`, row 8: a score must be a finite number; got nan",
    ),
    "none": (lambda **_: [None, 1.0], r"reward `wrong`, row 7: a score must be a finite number; got None"),
    "raises": (
        lambda **_: 1 / 0,
        r"reward `wrong`, rows 7, 8: the reward raised an error; got ZeroDivisionError: division by zero",
    ),
    "returns none": (lambda: None, r"reward `wrong`: the reward returned None; fix: return one number per sample"),
    "returns one number": (lambda: 0.5, r"reward `wrong`: expected 2 scores, one per sample; got float"),
    "an array with a gap": (
        lambda: np.array([0.5, np.nan]),
        r"reward `wrong`, row 8: a score must be a finite number; got nan",
    ),
    "a column of a tensor": (lambda: torch.zeros(2, 1), r"row 7: a score must be a finite number; got \[0.0\]"),
    "a tensor too short": (lambda: torch.zeros(1), r"expected 2 scores, one per sample; got 1 scores"),
    "complex": (lambda: np.array([1j, 0]), r"row 7: a score must be a finite number; got 1j"),
    "too large a whole number": (lambda: [1, 10**400], r"row 8: a score must be a finite number; got 10{30}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_run_may_not_go_on_with(case: str) -> None:
    function, said = WRONG[case]

    def wrong(prompts: Any, completions: Any) -> Any:
        return function()

    with pytest.raises(PluginError, match=said) as caught:
        checked_scores(as_reward(wrong), [Sample("p", "a"), Sample("p", "b")], rows=[7, 8])
    assert caught.value.exit_code == 5


TAKEN: dict[str, tuple[Any, list[float]]] = {
    "an array": (np.array([1, 0.5], dtype=np.float32), [1.0, 0.5]),
    "whole numbers": (np.array([3, -4]), [3.0, -4.0]),
    "scalars": ([np.float32(1.5), np.int64(2)], [1.5, 2.0]),
    "truth": (np.array([True, False]), [1.0, 0.0]),
    "a tensor": (torch.tensor([1.0, 0.5], requires_grad=True), [1.0, 0.5]),
    "a narrow tensor": (torch.tensor([1.0, 0.5], dtype=torch.bfloat16), [1.0, 0.5]),
    "tensors": ([torch.tensor(1.0), torch.tensor(2)], [1.0, 2.0]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_arrays_and_tensors_are_taken(case: str) -> None:
    given, expected = TAKEN[case]

    class Plain(RewardFn):
        api = 1

        def score(self, samples: Sequence[Sample]) -> Any:
            return given

    for reward in (as_reward(lambda prompts, completions: given), Plain()):
        found = checked_scores(reward, [Sample("p", "a"), Sample("p", "b")])
        assert found == expected and all(type(score) is float for score in found)


def test_a_generator_function_is_taken() -> None:
    def each(prompts: Any, completions: Any) -> Any:
        yield from (1.0, 2.0)

    assert checked_scores(as_reward(each), [Sample("p", "a"), Sample("p", "b")]) == [1.0, 2.0]


def test_a_reward_that_raises_names_each_row_once_and_not_too_many() -> None:
    def wrong(prompts: Any, completions: Any) -> Any:
        raise ValueError("no")

    for rows, said in (
        ([4, 4], "row 4"),
        ([4, 4, 2], "rows 4, 2"),
        (range(20), "rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"),
    ):
        with pytest.raises(PluginError, match=f"^reward `wrong`, {said}: the reward raised"):
            checked_scores(as_reward(wrong), [Sample("p", "a")] * len(rows), rows=rows)


def test_scores_that_are_no_list_are_told() -> None:
    class Lazy(RewardFn):
        api = 1

        def score(self, samples: Sequence[Sample]) -> Any:
            return (1.0 for _ in samples)

    with pytest.raises(PluginError, match="got generator"):
        checked_scores(Lazy(), [Sample("p", "a")])
