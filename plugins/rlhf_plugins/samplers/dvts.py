"""Diverse verifier tree search: several greedy searches that share nothing but the prompt (Beeching et al. 2024)."""

from __future__ import annotations

from pydantic import Field

from rlhf_core.plugin import SearchStep, StepSearchConfig, StepSearchSampler, StepTrees, distinct_first


class DVTSConfig(StepSearchConfig):
    """Options of diverse verifier tree search."""

    subtrees: int = Field(
        4, ge=1, description="Searches beside each other, at least n; larger gives more varied completions, slower."
    )
    expansions: int = Field(
        4,
        ge=1,
        description="Steps drawn at each point, of which the best is kept; larger follows the process reward more, slower.",
    )


class DVTSSampler(StepSearchSampler):
    """Searches several subtrees apart, each along its best steps by a process reward, so that one error doesn't take all."""

    api = 1
    Config = DVTSConfig
    config: DVTSConfig

    def search(self, trees: StepTrees, n: int) -> list[list[SearchStep]]:
        """Follow the best step of each subtree until all have ended; return the n best of a prompt's ends."""
        subtrees, expansions = max(self.config.subtrees, n), self.config.expansions
        heads = [root for root in trees.roots for _ in range(subtrees)]
        while open_heads := [at for at, head in enumerate(heads) if not head.ended]:
            grown = trees.grow([heads[at] for at in open_heads for _ in range(expansions)])
            left = [heads[at] for at in open_heads]
            for number, at in enumerate(open_heads):
                heads[at] = distinct_first(grown[number * expansions : (number + 1) * expansions], 1)[0]
            trees.release([*left, *(step for step in grown if step not in heads or step.ended)])
        return [distinct_first(heads[at * subtrees : (at + 1) * subtrees], n) for at in range(len(trees.roots))]
