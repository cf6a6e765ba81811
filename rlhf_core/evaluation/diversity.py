"""How much the completions of one prompt differ: their n-grams, their overlap, and the distance of their embeddings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

# Scripts that are written without blanks: each of their characters is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+|\S")
_SMALL = 0.1
"""What stands for a count of 0 matching n-grams."""


def words(text: str) -> list[str]:
    """Return a text's words in lower case; a punctuation mark is a word, and so is a Chinese or Japanese character."""
    return _WORD.findall(text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Return the share of different n-grams of words among all n-grams of the texts; None where they have none.

    Li et al. 2016 (arXiv 1510.03055), section 5.2. Deviation: the divisor is the number of n-grams, not of words, so that texts
    without any repetition have 1 for every n.
    """
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def bleu(candidate: Sequence[str], references: Sequence[Sequence[str]], *, order: int = 4) -> float:
    """Return the BLEU of one text against others: min(1, e^(1 − r/c)) · exp(mean over n of log p_n), in [0, 1].

    Papineni et al. 2002 ("BLEU: a method for automatic evaluation of machine translation"), equations 1 to 3, with p_n the
    share of the candidate's n-grams that are in a reference, each at most as often as there, c the candidate's length and r the
    reference length nearest to it, of equal ones the shorter. A count of 0 is replaced by 0.1 (Chen and Cherry 2014, method 1).

    Deviations: n runs to the candidate's length where that is below `order`, so that a text equal to a reference has 1 at any
    length; without a common word BLEU is 0, except that of two empty texts, which is 1.

    Args:
        candidate: words. references: words of each, one or more. order: the largest n.
    """
    if not candidate:
        return float(any(not reference for reference in references))
    precisions = []
    for n in range(1, min(order, len(candidate)) + 1):
        own = Counter(_grams(candidate, n))
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= Counter(_grams(reference, n))
        matched = sum((own & most).values())
        if n == 1 and not matched:
            return 0.0
        precisions.append((matched or _SMALL) / sum(own.values()))
    length = len(candidate)
    nearest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return min(1.0, math.exp(1 - nearest / length)) * math.exp(fmean(map(math.log, precisions)))


def self_bleu(texts: Sequence[str], *, order: int = 4) -> float:
    """Return the mean BLEU of each text against all the others, in [0, 1]; 1 where all are equal. Larger is less diverse.

    Zhu et al. 2018 ("Texygen", arXiv 1802.01886), section 3.2; see `bleu`.

    Raises:
        ValueError: there are fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError("self-BLEU compares two texts or more")
    table = [words(text) for text in texts]
    return fmean(bleu(one, table[:i] + table[i + 1 :], order=order) for i, one in enumerate(table))


def mean_cosine_distance(embeddings: Tensor) -> float:
    """Return the mean of 1 − cos over all pairs of embeddings, in [0, 2]; 0 where all have one direction.

    Args:
        embeddings: (N, D), N at least 2. An embedding of length 0 has distance 1 to all others.
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError("a pairwise distance needs two embeddings or more")
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1, eps=1e-300)
    # Σ over ordered pairs of different ones is |Σ u|² − Σ |u|².
    total = unit.sum(0).square().sum() - unit.square().sum()
    return max(0.0, 1 - float(total) / (count * (count - 1)))


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))
