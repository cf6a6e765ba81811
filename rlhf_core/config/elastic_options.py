"""The options by which a run keeps weights that earlier tasks need. Importing this imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from rlhf_core.config.base import BaseConfig


class EWCConfig(BaseConfig):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): weights that earlier tasks need change less."""

    fisher: list[str] = Field(
        min_length=1,
        description="Directory that `rlhf fisher` wrote for an earlier task, or several, whose penalties are added up; more of"
        " them hold on to more, and each takes as much memory as two copies of the weights.",
    )
    weight: float = Field(
        gt=0,
        description="λ, the strength of the penalty λ/2 Σ F (θ - θ*)²; larger forgets less and learns the new task less. There is"
        " no default: it depends on the scale of the loss and of the Fisher information.",
    )

    @field_validator("fisher", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("fisher")
    @classmethod
    def _each_once(cls, fisher: list[str]) -> list[str]:
        if len(set(fisher)) < len(fisher):
            raise ValueError("a directory is named twice: raise `weight` instead")
        return fisher
