"""Extractive compression: the sentences of a context that matter most, as they are. It needs no model and no training."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

_SENTENCE = re.compile(r".*?(?:[.!?…。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]|\n|$)\s*", re.DOTALL)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")
"""A word, or a character of a script that puts no spaces between words."""
_PART = re.compile(r".*?(?:[,;:]\s+|$)", re.DOTALL)
_WORDS_OF_A_PART = 24
K1, B = 1.2, 0.75
"""Of BM25, as Robertson and Zaragoza 2009 (The Probabilistic Relevance Framework, section 3.5) recommend."""


def extract(text: str, budget: int, count: Callable[[str], int], *, question: str = "") -> str:
    """Return the sentences of a text that matter most, in their order, of at most so many tokens together.

    Sentences rank by their relevance to the question (BM25 among the sentences), those of the same relevance (all, without a
    question) by how central they are (the cosine of their tf-idf weights with the sum of all: the centroid of Radev et al. 2004,
    Centroid-based summarization), and then by their place. One that doesn't fit any more is left out. Sentences that leave no
    room for others are cut at commas, and then after some words.

    Args:
        text: the context; blanks between sentences are kept with the sentence before.
        budget: most tokens.
        count: returns how many tokens a text has.
        question: what the context is for.
    """
    if count(text) <= budget:
        return text
    units = _units(text, budget, count)
    words = [[word.casefold() for word in _WORD.findall(unit)] for unit in units]
    relevance, centrality = _relevance(words, question), _centrality(words)
    # Differences that only rounding makes must not decide.
    order = sorted(range(len(units)), key=lambda at: (-round(relevance[at], 9), -round(centrality[at], 9), at))
    sizes = [count(unit) for unit in units]
    chosen, left = set[int](), budget
    for at in order:
        if words[at] and sizes[at] <= left:
            chosen.add(at)
            left -= sizes[at]
    found = "".join(unit for at, unit in enumerate(units) if at in chosen)
    # Tokens of a whole may be more than those of its parts.
    for at in reversed(order):
        if count(found) <= budget:
            break
        chosen.discard(at)
        found = "".join(unit for at, unit in enumerate(units) if at in chosen)
    return found


def _units(text: str, budget: int, count: Callable[[str], int]) -> list[str]:
    """Return a text's sentences; parts of those of more than half of the budget, which would leave room for nothing else."""
    found = []
    for sentence in filter(None, _SENTENCE.findall(text)):
        parts = [sentence]
        if count(sentence) > budget / 2:
            parts = [part for part in _PART.findall(sentence) if part]
        for part in parts:
            if count(part) <= budget / 2:
                found.append(part)
                continue
            pieces = re.findall(r"\S*\s*", part)
            found += ["".join(pieces[at : at + _WORDS_OF_A_PART]) for at in range(0, len(pieces), _WORDS_OF_A_PART)]
    return [unit for unit in found if unit]


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
