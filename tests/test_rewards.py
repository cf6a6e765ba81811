"""Plain functions as rewards, and scores that no run may go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_core.errors import PluginError
from rlhf_core.interfaces import RewardFn, Sample
from rlhf_core.rewards import FunctionReward, as_reward, checked_scores
from rlhf_core.testing import RewardContract


def length(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    return [float(len(text)) for text in completions]


class Length(FunctionReward):
    """A function as a reward class, for the contract."""

    api = 1

    def __init__(self, config: Any = None) -> None:
        super().__init__(length)


class TestFunctionReward(RewardContract):
    reward = Length


def test_a_function_gets_prompts_completions_and_the_columns_that_all_have() -> None:
    given: dict[str, Any] = {}

    def note(prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[int]:
        given.update(prompts=prompts, completions=completions, **columns)
        return [1, 2]

    samples = [Sample("p", "a", columns={"answer": "4", "extra": 1}), Sample("q", "b", columns={"answer": "5"})]
    assert checked_scores(as_reward(note), samples) == [1.0, 2.0]
    assert given == {"prompts": ["p", "q"], "completions": ["a", "b"], "answer": ["4", "5"]}


def test_a_reward_class_is_taken_as_it_is() -> None:
    reward = Length()
    assert as_reward(reward) is reward


WRONG = {
    "too few": (lambda **_: [1.0], r"reward `wrong`: expected 2 scores, one a sample; got 1 scores"),
    "not a number": (
        lambda **_: [1.0, float("nan")],
        r"reward `wrong`, row 8: a score must be a finite number; got nan",
    ),
    "none": (lambda **_: [None, 1.0], r"reward `wrong`, row 7: a score must be a finite number; got None"),
    "raises": (
        lambda **_: 1 / 0,
        r"reward `wrong`: the reward raised an error; got ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_run_may_not_go_on_with(case: str) -> None:
    function, said = WRONG[case]

    def wrong(prompts: Any, completions: Any) -> Any:
        return function()

    with pytest.raises(PluginError, match=said) as caught:
        checked_scores(as_reward(wrong), [Sample("p", "a"), Sample("p", "b")], rows=[7, 8])
    assert caught.value.exit_code == 5


def test_scores_that_are_no_list_are_told() -> None:
    class Lazy(RewardFn):
        api = 1

        def score(self, samples: Sequence[Sample]) -> Any:
            return (1.0 for _ in samples)

    with pytest.raises(PluginError, match="got generator"):
        checked_scores(Lazy(), [Sample("p", "a")])
