"""Extractive compression: the sentences of a context that matter most, as they are. It needs no model and no training."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Ranges for a regular expression: letters of scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han)."""
_WORD = re.compile(rf"[{UNSPACED}\uac00-\ud7af]|[^\W{UNSPACED}\uac00-\ud7af]+")
"""A word; of scripts without spaces a character, and of Hangul, whose words have endings, a syllable."""
_SENTENCE_END = re.compile(r"(?:(?<![.!?…。！？])[.!?…。！？]++[\"'”’)\]]*+(?=\s|$)|[。！？]|\n)\s*+")
"""Where a sentence ends. The lookbehind and `++` keep a long run of dots from being read again from each of them."""
_PART_END = re.compile(r"[,;:]\s++|[，、；：]\s*+")
_GAP = re.compile(r"\s+")
_WORDS_OF_A_PART, _TOKENS_OF_A_PART = 24, 48
K1, B = 1.2, 0.75
"""Of BM25, as Robertson and Zaragoza 2009 (The Probabilistic Relevance Framework, section 3.5) recommend."""

Span = tuple[int, int]
"""Places in a text: of the first character, and behind the last."""


def extract(text: str, budget: int, starts: Callable[[str], Sequence[int]], *, question: str = "") -> str:
    """Return the sentences of a text that matter most, in their order, of at most so many tokens together.

    Sentences rank by their relevance to the question (BM25 among the sentences), those of the same relevance (all, without a
    question) by how central they are (the cosine of their tf-idf weights with the sum of all: the centroid of Radev et al. 2004,
    Centroid-based summarization), and then by their place. One that doesn't fit any more is left out. Sentences that leave no
    room for others are cut at commas, then after some words, and what has no blanks between two tokens.

    Args:
        text: the context; blanks between sentences are kept with the sentence before.
        budget: most tokens.
        starts: returns the place in a text where each of its tokens begins. It reads the whole text once, and then what is left.
        question: what the context is for.

    Returns:
        Empty only where the budget is 0, the text has no word, or each character of its words is more tokens than the budget.
    """
    begins = sorted(starts(text))
    if len(begins) <= budget:
        return text
    tokens = _TokenCounter(begins)
    units = list(_units(text, budget, tokens))
    words = [[word.casefold() for word in _WORD.findall(text, *unit)] for unit in units]
    relevance, centrality = _relevance(words, question), _centrality(words)
    # Differences that only rounding makes must not decide.
    order = sorted(range(len(units)), key=lambda at: (-round(relevance[at], 9), -round(centrality[at], 9), at))
    chosen, left = list[Span](), budget
    for at in order:
        size = tokens.within(*units[at])
        if words[at] and size <= left:
            chosen.append(units[at])
            left -= size
    return _fitting(text, chosen, budget, starts, tokens)


class _TokenCounter:
    """How many tokens the parts of a text have: those that begin in them."""

    def __init__(self, begins: Sequence[int]) -> None:
        self.begins = begins

    def within(self, start: int, stop: int) -> int:
        return bisect_left(self.begins, stop) - bisect_left(self.begins, start)

    def cuts(self, start: int, stop: int, limit: int) -> Iterator[Span]:
        """Yield parts of a span that begin with a token and have at most so many, or are one character of more tokens."""
        while self.within(start, stop) > limit:
            # The token behind the limit begins the next part; one of several in a character can't.
            middle = self.begins[bisect_left(self.begins, start) + limit]
            if middle <= start:
                middle = start + 1
            yield start, middle
            start = middle
        yield start, stop


def _fitting(
    text: str, chosen: list[Span], budget: int, starts: Callable[[str], Sequence[int]], tokens: _TokenCounter
) -> str:
    """Return spans of a text, the best first, joined in their order; without the last ones where they have too many tokens.

    The tokens of a text may be more than those of its parts as they stood among others. Each round leaves out at least twice
    what the last one did, so that few are needed. Of the very best, where it alone is too long, the beginning is taken.
    """
    least = 1
    while True:
        found = "".join(text[start:stop] for start, stop in sorted(chosen))
        begins = starts(found)
        over = len(begins) - budget
        if over <= 0:
            return found
        if len(chosen) == 1:
            keep = min(budget, max(len(begins) - least, 1))
            chosen = [(chosen[0][0], chosen[0][0] + sorted(begins)[keep])]
        else:
            drop = max(over, least)
            while drop > 0 and len(chosen) > 1:
                drop -= max(tokens.within(*chosen.pop()), 1)
        least *= 2


def _units(text: str, budget: int, tokens: _TokenCounter) -> Iterator[Span]:
    """Yield a text's sentences; parts of those of more than half of the budget, which would leave room for nothing else."""
    for sentence in _split(text, _SENTENCE_END, 0, len(text)):
        if tokens.within(*sentence) <= budget / 2:
            yield sentence
            continue
        for part in _split(text, _PART_END, *sentence):
            if tokens.within(*part) <= budget / 2:
                yield part
            else:
                yield from _some_words(text, *part, budget, tokens)


def _some_words(text: str, start: int, stop: int, budget: int, tokens: _TokenCounter) -> Iterator[Span]:
    """Yield parts of a span, each at most 24 words, and no more than the budget allows; pieces of what is no word but longer."""
    longest = min(budget, max(budget // 2, _TOKENS_OF_A_PART))
    begin, words = start, 0
    for word, end in _split(text, _GAP, start, stop):
        long = tokens.within(word, end) > longest
        if words and (long or words == _WORDS_OF_A_PART or tokens.within(begin, end) > budget):
            yield begin, word
            begin, words = word, 0
        if long:
            yield from tokens.cuts(word, end, min(max(budget // 2, 1), _TOKENS_OF_A_PART))
            begin = end
        else:
            words += 1
    if begin < stop:
        yield begin, stop


def _split(text: str, end: re.Pattern[str], start: int, stop: int) -> Iterator[Span]:
    """Yield the parts of a span, each up to and with a match."""
    for match in end.finditer(text, start, stop):
        yield start, match.end()
        start = match.end()
    if start < stop:
        yield start, stop


def _inverse_frequencies(words: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return word → log(1 + (N − n + ½) / (n + ½)), where n of the N sentences have it; never negative."""
    having = Counter(word for sentence in words for word in set(sentence))
    return {word: math.log(1 + (len(words) - n + 0.5) / (n + 0.5)) for word, n in having.items()}


def _relevance(words: Sequence[Sequence[str]], question: str) -> list[float]:
    """Return the BM25 of each sentence for a question's words; 0 without a question."""
    asked = {word.casefold() for word in _WORD.findall(question)}
    weights = _inverse_frequencies(words)
    mean = sum(map(len, words)) / max(len(words), 1) or 1.0
    found = []
    for sentence in words:
        counts = Counter(word for word in sentence if word in asked)
        length = K1 * (1 - B + B * len(sentence) / mean)
        found.append(sum(weights[word] * n * (K1 + 1) / (n + length) for word, n in counts.items()))
    return found


def _centrality(words: Sequence[Sequence[str]]) -> list[float]:
    """Return the cosine of each sentence's tf-idf weights with their sum over all sentences."""
    weights = _inverse_frequencies(words)
    vectors = [{word: n * weights[word] for word, n in Counter(sentence).items()} for sentence in words]
    centroid: Counter[str] = Counter()
    for vector in vectors:
        centroid.update(vector)
    whole = math.sqrt(sum(value**2 for value in centroid.values())) or 1.0
    found = []
    for vector in vectors:
        own = math.sqrt(sum(value**2 for value in vector.values())) or 1.0
        found.append(sum(value * centroid[word] for word, value in vector.items()) / own / whole)
    return found
