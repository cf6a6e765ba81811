"""Votes for final answers: which answers are equal, and when a vote is decided."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.rewards.answer_votes import answer_key, is_decided, tally


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1+2=3\n#### 3", "The answer is 3."),
        ("\\boxed{1/2}", "<answer>0.5</answer>"),
        ("\\boxed{50\\%}", "#### 0.50"),
        ("#### 1,234", "\\boxed{1234}"),
        ("<think>4? no</think> The answer is 5.", "#### 5"),
        ("\\boxed{x + 1}", "\\boxed{X+1}"),
        ("Answer: Paris", "answer: paris."),
    ],
)
def test_equal_answers_share_a_key(one: str, other: str) -> None:
    assert answer_key(one) == answer_key(other) is not None


@pytest.mark.parametrize(
    ("one", "other"), [("#### 3", "#### 4"), ("\\boxed{x}", "\\boxed{y}"), ("#### 3", "\\boxed{x}")]
)
def test_different_answers_do_not(one: str, other: str) -> None:
    assert answer_key(one) != answer_key(other)


def test_a_completion_without_an_answer_has_no_key() -> None:
    assert answer_key("") is None
    assert answer_key("<think>17 or 18") is None  # it is still thinking
    assert answer_key("so it is 17", complete=False) is None  # 17 may be the beginning of a number


def test_votes_by_hand() -> None:
    assert tally(["a", None, "b", "a"]) == {"a": 2, "b": 1}
    assert tally(["a", None, "b", "a"], [0.25, 9.0, 1.5, 0.5]) == {"a": 0.75, "b": 1.5}
    assert tally([None]) == {}


def winner(keys: Sequence[Hashable | None]) -> Hashable | None:
    """The answer with most votes, of several the one that was given first: written out."""
    given_ones = [key for key in keys if key is not None]
    counts = [(-given_ones.count(key), given_ones.index(key), key) for key in given_ones]
    return min(counts, key=lambda one: one[:2])[2] if counts else None


ANSWERS = st.lists(st.sampled_from(["a", "b", "c", None]), max_size=6)


@given(ANSWERS, st.integers(0, 4))
def test_a_vote_is_decided_exactly_where_no_further_answers_change_its_winner(
    keys: list[str | None], left: int
) -> None:
    futures = itertools.product([*dict.fromkeys(key for key in keys if key), "new", None], repeat=left)
    certain = {winner([*keys, *future]) for future in futures} == {winner(keys)}
    assert is_decided(keys, left) == certain


@given(ANSWERS)
def test_the_tally_is_in_the_order_of_first_answers(keys: list[str | None]) -> None:
    votes = tally(keys)
    assert list(votes) == list(dict.fromkeys(key for key in keys if key is not None))
    assert sum(votes.values()) == sum(key is not None for key in keys)
