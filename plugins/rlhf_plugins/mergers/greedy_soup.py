"""Greedy soup: add one model after the other, as long as an evaluation doesn't get worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger
from rlhf_plugins.mergers.uniform_soup import require_equal, uniform_soup

if TYPE_CHECKING:
    from rlhf_core.plugin import ModelMerger

Score = Callable[[Sequence[int]], float]
"""Indices of models → the evaluation's score of their mean; larger is better."""


def greedy_choice(
    names: Sequence[bytes], score: Score, *, strict: bool = False
) -> tuple[list[int], float, list[float]]:
    """Return the indices of the models of the greedy soup, the soup's score, and each model's own score.

    Wortsman et al. 2022, Model soups (arXiv 2203.05482), recipe 1: models are sorted by their own score, and each is added where
    the mean of all with it scores no worse than the mean without it. The soup is thus never below its best ingredient.

    Args:
        names: a name or hash for each model, by which models of equal score are ordered, whatever their order in the list.
        score: evaluates the mean of the models with these indices; larger is better.
        strict: add a model only where the score rises. The paper adds it at equality too; its code is strict.
    """
    alone = [score([number]) for number in range(len(names))]
    ranked = sorted(range(len(names)), key=lambda number: (-alone[number], names[number]))
    chosen, best = [ranked[0]], alone[ranked[0]]
    for number in ranked[1:]:
        found = score([*chosen, number])
        if found > best or (found == best and not strict):
            chosen, best = [*chosen, number], found
    return chosen, best, alone


class GreedySoupConfig(BaseConfig):
    """Options of the greedy soup."""

    strict: bool = Field(
        False, description="Add a model only where the evaluation rises; false adds it at equality too."
    )


class ModelSoup(Merger):
    """Mean of the models that don't make an evaluation worse, added one by one (greedy soup, Wortsman et al. 2022)."""

    api = 1
    commutative = True
    Config = GreedySoupConfig
    config: GreedySoupConfig
    ignores_base = True
    replay = "uniform_soup"

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights that differ."""
        require_equal(weights, "greedy_soup")

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        return uniform_soup(chunk.tensors)

    def merge(self, merge: ModelMerger) -> None:
        """Choose the models by evaluating means of them, record the scores, and write the mean of the chosen ones."""
        inputs = merge.inputs
        chosen, score, alone = greedy_choice(
            [one.fingerprint for one in inputs],
            lambda models: merge.evaluate(self, models),
            strict=self.config.strict,
        )
        merge.details |= {
            "chosen": [inputs[number].name for number in sorted(chosen)],
            "score": score,
            "scores": {one.name: own for one, own in zip(inputs, alone, strict=True)},
        }
        merge.write(self, chosen)
