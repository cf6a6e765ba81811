"""Sentences that matter most: by hand-made examples, against a BM25 computed otherwise, and by properties of any text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.models.extractive_compression import _relevance, extract

TEXT = (
    "The river rises in the hills. Its water is cold and clear. Trout live in the upper river. "
    "The town has a market on Fridays. Nobody swims in winter."
)


def words(text: str) -> int:
    return len(text.split())


def test_the_question_decides() -> None:
    assert extract(TEXT, 7, words, question="When is the market of the town?") == "The town has a market on Fridays. "
    assert extract(TEXT, 6, words, question="Where do trout live?") == "Trout live in the upper river. "


def test_sentences_stay_in_their_order() -> None:
    found = extract(TEXT, 13, words, question="market trout")
    assert found == "Trout live in the upper river. The town has a market on Fridays. "


def test_without_a_question_the_central_sentences_are_kept() -> None:
    text = "Cats chase mice. Cats chase birds and mice. Snow fell. Mice fear cats."
    assert "Snow" not in extract(text, 9, words)


def test_a_text_that_fits_is_left_as_it_is() -> None:
    assert extract(TEXT, 1000, words) == TEXT


def test_long_sentences_are_cut() -> None:
    one = " ".join(f"word{n}" for n in range(200)) + ", the key is 42, " + " ".join(f"more{n}" for n in range(200))
    found = extract(one, 40, words, question="What is the key?")
    assert "the key is 42" in found and words(found) <= 40


def test_scripts_without_spaces() -> None:
    text = "天气很好。钥匙在桌子上。他们去了公园。"
    assert extract(text, 8, len, question="钥匙在哪里") == "钥匙在桌子上。"


def test_bm25_by_hand() -> None:
    sentences = [["a", "b"], ["a", "a", "c", "d"], ["e"]]
    weight = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    mean = 7 / 3
    wanted = [
        weight * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / mean)),
        weight * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / mean)),
        0.0,
    ]
    assert _relevance(sentences, "A?") == pytest.approx(wanted)


@given(st.text(max_size=400), st.integers(0, 60), st.text(max_size=40))
def test_never_more_than_the_budget_and_only_what_was_there(text: str, budget: int, question: str) -> None:
    found = extract(text, budget, len, question=question)
    assert len(found) <= budget
    rest = iter(text)
    assert all(letter in rest for letter in found)  # its letters are the text's, in their order
