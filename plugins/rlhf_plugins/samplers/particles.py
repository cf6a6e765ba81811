"""Particle filtering over reasoning steps (Puri et al. 2025, arXiv 2502.01618)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from rlhf_core.plugin import (
    SearchStep,
    StepSearchConfig,
    StepSearchSampler,
    StepTrees,
    distinct_first,
    random_generator,
)


def resampling_weights(scores: Sequence[float], temperature: float) -> list[float]:
    """Return softmax(scores / temperature): the share of the next generation that each particle gets.

    The paper takes the log-odds of a process reward as scores at temperature 1; any scale is accepted here.
    """
    largest = max(scores)
    weights = [math.exp((score - largest) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def systematic_indices(weights: Sequence[float], uniform: float) -> list[int]:
    """Return len(weights) indices, index i either ⌊N·w_i⌋ or ⌈N·w_i⌉ times, by one random number in [0, 1)."""
    count, indices, at, total = len(weights), list[int](), 0, weights[0]
    for number in range(count):
        point = (number + uniform) / count
        while point >= total and at < count - 1:
            at += 1
            total += weights[at]
        indices.append(at)
    return indices


class ParticlesConfig(StepSearchConfig):
    """Options of particle filtering."""

    particles: int = Field(
        8, ge=1, description="Paths at a time, at least n; larger samples the better completions more reliably, slower."
    )
    resampling_temperature: float = Field(
        0.25,
        gt=0,
        description="Divisor of path scores in the weights of resampling; larger keeps more of the worse paths.",
    )


class ParticlesSampler(StepSearchSampler):
    """Resamples paths after each step in proportion to weights by a process reward, instead of keeping only the best."""

    api = 1
    Config = ParticlesConfig
    config: ParticlesConfig

    def search(self, trees: StepTrees, n: int) -> list[list[SearchStep]]:
        """Draw a step behind each particle that hasn't ended, resample all of a prompt's, and repeat; return the n best ends."""
        count = max(self.config.particles, n)
        populations = [[root] * count for root in trees.roots]
        generation = 0
        while any(not one.ended for particles in populations for one in particles):
            active = [one for particles in populations for one in particles if not one.ended]
            grown = iter(trees.grow(active))
            populations = [[one if one.ended else next(grown) for one in particles] for particles in populations]
            generation += 1
            populations = [self._resampled(trees, particles, generation) for particles in populations]
            alive = {one for particles in populations for one in particles if not one.ended}
            trees.release([one for steps in trees.steps for one in steps if one not in alive])
        return [distinct_first(particles, n) for particles in populations]

    def _resampled(self, trees: StepTrees, particles: list[SearchStep], generation: int) -> list[SearchStep]:
        """Return as many particles, drawn by their weights; a prompt whose particles have all ended keeps them."""
        if all(one.ended for one in particles):
            return particles
        weights = resampling_weights([one.score for one in particles], self.config.resampling_temperature)
        uniform = random_generator(trees.seed_of(particles[0].prompt), generation).random()
        return [particles[at] for at in systematic_indices(weights, uniform)]
