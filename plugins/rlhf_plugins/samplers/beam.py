"""Beam search over reasoning steps (Snell et al. 2024, arXiv 2408.03314, section 5.2)."""

from __future__ import annotations

from pydantic import Field

from rlhf_core.plugin import SearchStep, StepSearchConfig, StepSearchSampler, StepTrees, distinct_first


class BeamConfig(StepSearchConfig):
    """Options of beam search over steps."""

    beams: int = Field(
        4, ge=1, description="Paths that are kept after each step, at least n; larger finds better completions, slower."
    )
    expansions: int = Field(
        4,
        ge=1,
        description="Steps drawn behind each kept path; larger gives the process reward more to choose from, slower.",
    )


class BeamSampler(StepSearchSampler):
    """Keeps, after each step, the paths with the highest scores by a process reward."""

    api = 1
    Config = BeamConfig
    config: BeamConfig

    def search(self, trees: StepTrees, n: int) -> list[list[SearchStep]]:
        """Continue the best paths until all kept ones have ended; return the n best of them."""
        beams, expansions = max(self.config.beams, n), self.config.expansions
        # The first steps of all beams are drawn from the prompt.
        grown = trees.grow([root for root in trees.roots for _ in range(beams * expansions)])
        kept: list[list[SearchStep]] = [[] for _ in trees.roots]
        while grown:
            candidates = [[step for step in steps if step.ended] for steps in kept]
            for step in grown:
                candidates[step.prompt].append(step)
            kept = [distinct_first(steps, beams) for steps in candidates]
            chosen = {step for steps in kept for step in steps}
            open_steps = [step for steps in kept for step in steps if not step.ended]
            before = {step.parent for step in grown if step.parent is not None}
            trees.release([*before, *(step for step in grown if step not in chosen or step.ended)])
            grown = trees.grow([step for step in open_steps for _ in range(expansions)])
        return [distinct_first(steps, n) for steps in kept]
