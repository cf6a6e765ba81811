"""Sentences that matter most: by hand-made examples, against a BM25 computed otherwise, and by properties of any text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.models.extractive_compression import _relevance, extract

TEXT = (
    "The river rises in the hills. Its water is cold and clear. Trout live in the upper river. "
    "The town has a market on Fridays. Nobody swims in winter."
)


def words(text: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\S+", text)]


def letters(text: str) -> range:
    return range(len(text))


def octets(text: str) -> list[int]:
    """As a tokenizer of bytes says it: several tokens of a character begin in the same place."""
    return [at for at, letter in enumerate(text) for _ in letter.encode(errors="replace")]


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
    assert "the key is 42" in found and len(words(found)) <= 40


def test_scripts_without_spaces() -> None:
    text = "天气很好。钥匙在桌子上。他们去了公园。"
    assert extract(text, 8, letters, question="钥匙在哪里") == "钥匙在桌子上。"


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


@pytest.mark.parametrize(
    "text",
    ["天气很好" * 500, '{"key":[1,2],"name":"x"},' * 100, "abc" * 700, "ab " * 900, "การทดสอบ" * 300, "a, " * 900],
    ids=["Chinese", "JSON", "one word", "no commas", "Thai", "only commas"],
)
@pytest.mark.parametrize("starts", [letters, octets])
def test_text_that_has_no_sentences_fills_the_budget(text: str, starts: Callable[[str], Sequence[int]]) -> None:
    found = extract(text, 200, starts)
    assert 150 < len(starts(found)) <= 200


def test_what_is_asked_for_is_found_in_text_without_blanks() -> None:
    text = '{"name":"x","value":[1,2,3]},' * 100 + '{"name":"key","secret":42},' + '{"name":"x","value":[1,2,3]},' * 100
    assert '"secret":42' in extract(text, 200, letters, question="Which secret?")


def test_joined_sentences_that_have_more_tokens_take_few_rounds() -> None:
    reads = list[str]()

    def joined(text: str) -> list[int]:  # one more token at each sentence that was not behind another
        reads.append(text)
        numbers = [int(number) for number in re.findall(r"(\d+)\.", text)]
        gaps = sum(after != before + 1 for before, after in pairwise(numbers))
        return sorted([*words(text), *[0] * gaps])

    text = "".join(f"{'key' if n % 2 else 'lock'} and {n}. " for n in range(4000))
    found = extract(text, 5000, joined, question="key")
    assert 2000 < len(joined(found)) <= 5000 and len(reads) < 20


def test_the_best_alone_is_cut_where_it_has_more_tokens_than_among_others() -> None:
    def alone(text: str) -> list[int]:
        return sorted([*words(text), *([0, 0] if len(text) < 60 else [])])

    assert extract("one two three four. " * 5, 3, alone) == "one "


def test_a_long_run_of_dots_is_read_once() -> None:
    assert extract("." * 100_000 + "x and more", 4, letters)  # would take minutes if each dot began a new attempt


@given(
    st.text(max_size=400) | st.text("ab,;. \n。天気éß", max_size=400),
    st.integers(0, 60),
    st.text(max_size=40),
    st.sampled_from([letters, octets, words]),
)
def test_never_more_than_the_budget_and_only_what_was_there(
    text: str, budget: int, question: str, starts: Callable[[str], Sequence[int]]
) -> None:
    found = extract(text, budget, starts, question=question)
    assert len(starts(found)) <= budget
    rest = iter(text)
    assert all(letter in rest for letter in found)  # its letters are the text's, in their order
    of_a_letter = 4 if starts is octets else 1  # most tokens
    if budget >= of_a_letter and any(letter.isalnum() for letter in text):
        assert any(letter.isalnum() for letter in found)
