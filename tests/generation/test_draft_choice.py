"""What is guessed, and how many guesses are worth verifying."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.drafting import Acceptance, Drafter, DraftRow, Drafts, Guesses, PassCosts
from rlhf_core.generation.lookup_drafts import (
    LONGEST_MATCH,
    MOST_PLACES,
    LookUp,
    NgramDrafter,
    SuffixDrafter,
    TokenIndex,
)

TOKENS = st.lists(st.integers(0, 2), max_size=40)


def row(ids: list[int], state: object = None, room: int = 8, left: int = 100) -> DraftRow:
    return DraftRow(ids, 0, state, room, left, (), 0, np.zeros(0))


@given(st.lists(TOKENS, max_size=3), TOKENS)
def test_a_guess_follows_the_longest_match(texts: list[list[int]], ids: list[int]) -> None:
    """Against every place of every text, compared token by token."""
    index = TokenIndex(texts)
    found = index.guess(*index.find(ids), 3)
    places: list[tuple[int, int]] = []
    for known in (1, 2):
        ends = ids[-known:] if len(ids) >= known else None
        found_here = [
            (text, at)
            for text in range(len(texts))
            for at in range(known, len(texts[text]))
            if texts[text][at - known : at] == ends
        ]
        places = found_here[-MOST_PLACES:] or places
    if not places:
        assert found == ([], [])
        return

    def match(text: int, at: int) -> int:
        length = 0
        while length < min(LONGEST_MATCH, at, len(ids)) and texts[text][at - 1 - length] == ids[-1 - length]:
            length += 1
        return length

    longest = max(match(*place) for place in places)
    best = [place for place in places if match(*place) == longest]
    counts = Counter(texts[text][at] for text, at in best)
    assert counts[found.ids[0]] == max(counts.values())
    assert found.kinds[0][0] == longest  # type: ignore[index]
    assert any(texts[text][at : at + len(found.ids)] == found.ids for text, at in best)


@given(st.lists(TOKENS, max_size=4), TOKENS, st.lists(st.integers(1, 4), max_size=12))
def test_a_match_that_is_followed_is_the_one_that_would_be_found(
    texts: list[list[int]], ids: list[int], steps: list[int]
) -> None:
    """Looks some tokens apart, beside a search from nothing at each."""
    index, length = TokenIndex(texts), 0
    looking = LookUp(index)
    for step in steps:
        length = min(length + step, len(ids))
        followed, (places, matched) = looking.guess(ids[:length], 3), index.find(ids[:length])
        searched = index.guess(places, matched, 3)
        assert bool(followed.ids) == bool(searched.ids)
        if not followed.ids:
            continue
        own, other = followed.kinds[0][0], searched.kinds[0][0]  # type: ignore[index]
        assert own >= other  # a search looks at the latest places alone
        if own == other < LONGEST_MATCH and len(places) < MOST_PLACES:
            assert followed.kinds[0] == searched.kinds[0]  # of two tokens as frequent either may be guessed


def test_a_text_is_looked_up_in_itself() -> None:
    drafter = NgramDrafter()
    state = drafter.begin([1, 2, 3, 4])
    text = [1, 2, 3, 4, 9, 1, 2]
    (found,) = drafter.propose([row(text, state)], 3, SamplingConfig())
    assert found.ids == [3, 4, 9]
    text += [3, 5, 2]  # no pair like it yet: the last token alone
    assert drafter.propose([row(text, state)], 1, SamplingConfig())[0].ids == [3]
    text += [3]
    (found,) = drafter.propose([row(text, state)], 2, SamplingConfig())
    assert found.ids in ([4, 9], [5, 2])  # both follow the longest match
    assert drafter.propose([row([*text, 8], drafter.begin([]))], 3, SamplingConfig()) == [([], [])]


def test_earlier_completions_of_the_prompt_are_remembered_up_to_a_limit() -> None:
    drafter = SuffixDrafter(most_remembered=14)
    for prompt, completion in (((1, 2), [5, 6, 7]), ((1, 2), [5, 6, 8]), ((1, 3), [9, 9, 9])):
        drafter.learn(prompt, completion)
    state = drafter.begin((1, 3))
    assert drafter.propose([row([1, 3], state)], 3, SamplingConfig())[0].ids == [9, 9, 9]
    # The two completions of the other prompt were forgotten together: 15 tokens were too many.
    assert drafter.propose([row([1, 2], drafter.begin((1, 2)))], 3, SamplingConfig())[0].ids == []


def test_a_row_that_is_being_drawn_learns_from_those_that_have_ended() -> None:
    drafter = SuffixDrafter()
    state = drafter.begin((1, 2))
    assert drafter.propose([row([1, 2], state)], 3, SamplingConfig()) == [([], [])]
    drafter.learn((1, 2), [5, 6, 7])
    assert drafter.propose([row([1, 2], state)], 3, SamplingConfig())[0].ids == [5, 6, 7]
    assert drafter.propose([row([1, 2, 5, 6], state)], 3, SamplingConfig())[0].ids == [7]


class Sure(Drafter):
    """Guesses four tokens per row, of a kind that is right with some probability."""

    costs_time = draws = False

    def begin(self, prompt: object) -> None:
        return None

    def propose(self, rows: object, most: int, sampling: SamplingConfig) -> list[Guesses]:
        return [Guesses([1] * 4, ["sure"] * 4) for _ in rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("right", "fixed", "each", "verified"),
    [
        (1.0, 1.0, 0.0, 4),  # a pass costs the same however many tokens it has
        (0.95, 1.0, 0.05, 4),
        (0.3, 0.0, 1.0, 0),  # each token costs as much as a pass
        (0.0, 1.0, 0.01, 0),
    ],
)
@pytest.mark.parametrize("rows", [1, 6])
def test_as_many_guesses_are_verified_as_pay(right: float, fixed: float, each: float, verified: int, rows: int) -> None:
    random, drafts, counts = np.random.default_rng(0), Drafts(Sure()), []
    for _ in range(400):
        chosen: list[list[int]] = [[] for _ in range(rows)]
        if drafts.look(rows):
            chosen = drafts.choose([row([], room=4) for _ in range(rows)], SamplingConfig(), waiting=True)
        drawn = []
        for guesses in chosen:
            ids: list[int] = []
            while len(ids) < len(guesses) and random.random() < right:
                ids.append(1)
            drawn.append([*ids, 1 if len(ids) == len(guesses) and random.random() < right else 2])
        drafts.drawn(drawn, chosen, fixed + each * (rows + sum(map(len, chosen))))
        counts.append(sum(map(len, chosen)) / rows)
    assert np.median(counts[200:]) == verified
    assert min(counts) == 0  # passes without guesses go on being measured


def test_rows_that_others_wait_for_count_more() -> None:
    """A token for a row that will have ended long before the others saves next to nothing."""
    drafts = Drafts(Sure())
    for rows in (1, 2, 4, 8):
        for _ in range(3):
            drafts.costs.measured(rows, 0, 1 + 0.01 * rows)
    behind, ahead = drafts._worth([100, 10], waiting=False)
    assert behind > 0.97 and ahead < 0.02 and behind + ahead == pytest.approx(1)
    assert drafts._worth([100, 10], waiting=True) == [0.5, 0.5]


def test_acceptance_is_a_mean_that_forgets() -> None:
    acceptance = Acceptance()
    assert acceptance.of("new") == 0.5
    for _ in range(1000):
        acceptance.note("kind", True)
    assert acceptance.of("kind") > 0.98
    for _ in range(600):
        acceptance.note("kind", False)
    assert acceptance.of("kind") < 0.3


def test_costs_are_the_nearest_measured_ones() -> None:
    costs = PassCosts()
    for rows, guesses, seconds in ((4, 0, 1.0), (4, 0, 1.2), (8, 0, 2.0), (4, 4, 1.5), (4, 12, 3.5)):
        costs.measured(rows, guesses, seconds)
    assert costs.seconds(4) == 1.2 and costs.seconds(8) == 2.0  # the median, the larger of two
    assert costs.seconds(6) == pytest.approx(1.6)  # halfway
    assert costs.seconds(4, 4) == 1.5
    assert costs.seconds(4, 8) == pytest.approx(2.5)
    assert 1.2 < costs.seconds(4, 2) < 1.5
    assert costs.seconds(4, 30) > 3.5


def test_passes_that_were_not_measured_cost_as_much_more_as_those_that_were() -> None:
    """A first pass with guesses takes long, as its matrices are packed: larger ones aren't that many times as long."""
    costs = PassCosts()
    for rows in (1, 8, 64):
        costs.measured(rows, 0, 1 + rows / 64)
    costs.measured(4, 4, 3.0)
    assert costs.seconds(64, 64) == pytest.approx(3 + (128 - 8) / 64)
    assert costs.seconds(128) == pytest.approx(3)


def test_a_larger_pass_bounds_what_a_smaller_one_costs() -> None:
    costs = PassCosts()
    costs.measured(4, 0, 5.0)  # disturbed
    costs.measured(16, 0, 2.0)
    assert costs.seconds(4) == costs.seconds(10) == 2.0


@pytest.mark.parametrize(("seconds", "looks"), [(1.0, 200), (1e-6, 20)])
def test_looks_in_vain_take_little_time(seconds: float, looks: int) -> None:
    """Where a pass takes long each may be preceded by a look; where it is as fast as a look hardly any is."""
    drafts, made = Drafts(Sure()), 0
    for _ in range(200):
        chosen: list[list[int]] = [[]]
        if drafts.look(1):
            made += 1
            chosen = drafts.choose([row([], room=4)], SamplingConfig())
        drafts.drawn([[2]], chosen, seconds * (1 + 9 * len(chosen[0])))
    assert made >= looks if seconds == 1 else made <= looks
