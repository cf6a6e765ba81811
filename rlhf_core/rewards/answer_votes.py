"""Votes of completions for their final answers: which completions agree, and when a vote can't change any more."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rlhf_core.rewards.answer_reward import number_of
from rlhf_core.rewards.final_answer import Thinking, after_thinking, find_answer


def answer_key(text: str, *, complete: bool = True, thinking: Thinking = "auto") -> Hashable | None:
    """Return what two completions share whose final answers are equal; None for a completion without an answer.

    Numbers are equal by value (`0.50`, `1/2` and `50%`), other answers as texts without their blanks and case.

    Args:
        complete: whether the completion ended by itself; see `find_answer`.
        thinking: where the answer is looked for; see `after_thinking`.
    """
    rest = after_thinking(text, thinking)
    answer = None if rest is None else find_answer(rest, complete=complete)
    if answer is None:
        return None
    number = number_of(answer)
    if number is not None:
        return number.value / 100 if number.percent else number.value
    return "".join(answer.text.casefold().split()).strip("$.") or None


def tally(keys: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> dict[Hashable, float]:
    """Return the votes for each answer, in the order in which answers were first given. A completion without one has no vote.

    Args:
        keys: each completion's `answer_key`.
        weights: what each completion's vote counts; None: 1.
    """
    votes: dict[Hashable, float] = {}
    for key, weight in zip(keys, weights or [1.0] * len(keys), strict=True):
        if key is not None:
            votes[key] = votes.get(key, 0.0) + weight
    return votes


def is_decided(keys: Sequence[Hashable | None], left: int) -> bool:
    """Tell whether the winner of a vote is certain, whatever further completions answer.

    The winner is the answer with most votes; of several, the one that was given first.

    Args:
        keys: the `answer_key`s so far.
        left: completions that may still vote.
    """
    votes = tally(keys)
    if not votes:
        return left == 0
    winner = max(votes, key=lambda key: votes[key])  # of equal ones the one that was given first
    # The strongest rivals: those that were given before it win where they draw level, the others don't.
    order = list(votes)
    before = [votes[key] for key in order[: order.index(winner)]]
    after = [votes[key] for key in order[order.index(winner) + 1 :]]
    return all(count + left < votes[winner] for count in before) and max(after, default=0) + left <= votes[winner]
