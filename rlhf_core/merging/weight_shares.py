"""Checks of the models' weights, for methods that normalise them."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.infra.errors import ConfigError


def share_of_weights(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum.

    Raises:
        ConfigError: they sum to zero or have mixed signs, so that shares would be large numbers that almost cancel.
    """
    require_one_sign(weights)
    total = sum(weights)
    return [weight / total for weight in weights]


def require_one_sign(weights: Sequence[float]) -> None:
    """Raise where weights that are to be normalised sum to zero, have mixed signs, or are negative."""
    if sum(weights) == 0:
        problem, fix = "sum to zero", "raise one"
    elif max(weights) < 0:
        problem, fix = "are all negative, which would turn every difference round", "give positive weights"
    elif min(weights) < 0 < max(weights):
        problem, fix = "have mixed signs, which blows the result up", "give weights of one sign"
    else:
        return
    raise ConfigError(
        f"weights that are normalised {problem}",
        place="weight",
        got=", ".join(f"{weight:g}" for weight in weights),
        fix=f"{fix}, or where the method has `normalize`, set it to false",
    )
