"""What further completions of a prompt are expected to add: to the certainty of a vote, or to the best reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

LOOKAHEAD = 32
"""Most further completions for which the gain of a vote is computed."""
PRIOR_STRENGTH = 2
"""So many rewards count the spread within all prompts, beside a prompt's own."""
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(48)


# Votes


@lru_cache(maxsize=2**16)
def confidence(lead: int, rival: int) -> float:
    """Return the probability that an answer with `lead` votes is likelier than one with `rival`, by the votes of both.

    The first one's share of the two, θ, has a uniform prior: P(θ > 1/2) under Beta(lead + 1, rival + 1), which is that of at most
    `lead` heads in lead + rival + 1 tosses. Aggarwal et al. 2023 (arXiv 2305.11860, section 3) end votes by it.
    """
    tosses = lead + rival + 1
    return sum(math.comb(tosses, heads) for heads in range(lead + 1)) / 2**tosses


def beta_binomial(count: int, trials: int, a: int, b: int) -> float:
    """Return the probability of `count` successes in trials whose probability of success is drawn from Beta(a, b)."""
    ways = math.comb(count + a - 1, count) * math.comb(trials - count + b - 1, trials - count)
    return ways / math.comb(trials + a + b - 1, trials)


@lru_cache(maxsize=2**14)
def _gains_of_two(lead: int, rival: int) -> tuple[float, ...]:
    """Return by how much 0, 1, … `LOOKAHEAD` further votes for one of the two raise the larger one's expected `confidence`.

    The expectation of P(θ > 1/2) itself stays as it is: only votes after which the other one leads raise the larger of both.
    """
    gains = []
    for votes in range(LOOKAHEAD + 1):
        overtaking = range(min(votes, (votes + rival - lead - 1) // 2) + 1)  # further votes for the one that leads now
        gains.append(
            math.fsum(
                beta_binomial(own, votes, lead + 1, rival + 1) * (1 - 2 * confidence(lead + own, rival + votes - own))
                for own in overtaking
            )
        )
    return tuple(gains)


@lru_cache(maxsize=2**14)
def vote_gains(lead: int, rival: int, others: int) -> tuple[float, ...]:
    """Return by how much 0, 1, … `LOOKAHEAD` further completions raise the probability that a vote's winner is right.

    Three kinds of completions are distinguished, with a uniform Dirichlet prior on their probabilities: those with the leading
    answer, with the second one, and all others, those without an answer too. (For ending votes, three such kinds are nearly as
    good as all answers by themselves: arXiv 2602.05395.) Two assumptions stand in for what is right: it is one of the two with
    the probability of their share, (lead + rival + 2) / (m + 3) after m candidates, as of a calibrated policy, and then the
    likelier one. So a prompt whose answers are all different doesn't take the budget for finding out which is most frequent.

    Args:
        lead: candidates with the leading answer.
        rival: with the second one, at most `lead`.
        others: all other candidates.
    """
    two, share = _gains_of_two(lead, rival), (lead + rival + 2) / (lead + rival + others + 3)
    return tuple(
        share
        * math.fsum(
            beta_binomial(votes, drawn, lead + rival + 2, others + 1) * two[votes] for votes in range(1, drawn + 1)
        )
        for drawn in range(LOOKAHEAD + 1)
    )


def best_rate(gains: Sequence[float], begin: int, most: int) -> float:
    """Return the largest mean gain of a further completion after `begin`, over those drawn up to any number from there to `most`.

    A single further vote often changes nothing where several would, so gains aren't concave, and the next one alone would
    undervalue them: the measure is KG(*) of Frazier & Powell 2010, "Paradoxes in learning and the marginal value of information".

    Args:
        gains: of 0, 1, … further completions.
    """
    ends = range(begin + 1, min(most, len(gains) - 1) + 1)
    return max(((gains[end] - gains[begin]) / (end - begin) for end in ends), default=0.0)


# Rewards


def pooled_variance(groups: Sequence[Sequence[float]]) -> float:
    """Return the variance of rewards within prompts: squared differences to each prompt's own mean, over degrees of freedom.

    Args:
        groups: each prompt's rewards.
    """
    freedom = sum(len(group) - 1 for group in groups)
    return math.fsum(_squares(group) for group in groups) / freedom if freedom else 0.0


def _squares(group: Sequence[float]) -> float:
    mean = math.fsum(group) / len(group)
    return math.fsum((reward - mean) ** 2 for reward in group)


class RewardGains:
    """By how much further completions of a prompt raise the best of its rewards.

    A further reward X is taken as normal, with the mean of the prompt's own. Its variance is theirs, shrunk towards the one
    within all prompts, which counts as `PRIOR_STRENGTH` rewards, times 1 + 1/m for the error of the mean. The first gain is the
    expected improvement E[(min(X, ceiling) − best)⁺] (Jones et al. 1998), the one after k others that of the best of k + 1:

        ∫ F(x)ᵏ · (1 − F(x)) dx from best to ceiling, F the distribution function of X.

    Args:
        rewards: of the m candidates so far.
        pooled: variance within all prompts.
        best: the reward that further ones must exceed.
        ceiling: the largest reward that there can be; infinite where none is known.
    """

    def __init__(self, rewards: Sequence[float], pooled: float, *, best: float, ceiling: float = math.inf) -> None:
        count = len(rewards)
        variance = (_squares(rewards) + PRIOR_STRENGTH * pooled) / (count - 1 + PRIOR_STRENGTH)
        spread = math.sqrt(variance * (1 + 1 / count))
        mean = math.fsum(rewards) / count
        top = min(ceiling, max(best, mean) + 8 * spread)
        half = max(top - best, 0.0) / 2
        points = best + half * (_POINTS + 1)
        self._weights = half * _WEIGHTS
        scale = math.sqrt(2) * spread
        self._below = np.array([0.5 * math.erfc((mean - x) / scale) if scale else float(x >= mean) for x in points])

    def __call__(self, others: int) -> float:
        """Return the expected gain of a completion after so many others."""
        return float(self._weights @ (self._below**others * (1 - self._below)))
