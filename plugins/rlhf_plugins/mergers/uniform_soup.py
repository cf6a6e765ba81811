"""Uniform soup: the mean of all models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf_core.plugin import Chunk, ConfigError, Merger
from rlhf_plugins.mergers.linear import linear


def uniform_soup(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ θᵢ / N, in place of the first tensor.

    Wortsman et al. 2022, Model soups (arXiv 2203.05482), section 2. The sum is divided once: shares of 1 / N would be rounded,
    and where the mean of 16-bit models lies half-way between two 16-bit numbers, that would decide which of them it becomes.

    Args:
        tensors: θᵢ, each (N,) float32; overwritten.
    """
    return linear(tensors, [1.0] * len(tensors), len(tensors))


def require_equal(weights: Sequence[float], method: str) -> None:
    """Raise where the models' weights differ: the method takes no weights, and ignoring them would hide that.

    Raises:
        ConfigError: they differ, or one is 0.
    """
    if len(set(weights)) > 1 or 0.0 in weights:
        raise ConfigError(
            f"`{method}` doesn't take weights: all models count equally",
            place="weight",
            got=", ".join(f"{weight:g}" for weight in weights),
            fix="leave the weights out, or use `linear`",
        )


class UniformSoupMerger(Merger):
    """Mean of all models, whose weights must be equal (uniform soup, Wortsman et al. 2022)."""

    api = 1
    commutative = True
    ignores_base = True

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights that differ."""
        require_equal(weights, "uniform_soup")

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        return uniform_soup(chunk.tensors)
