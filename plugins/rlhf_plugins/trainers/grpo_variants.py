"""GRPO's family: one row of the table `VARIANTS` per paper, which picks a part of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VariantName = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "sapo", "gmpo", "maxrl", "dppo"
]
KLPlace = Literal["loss", "reward", "return"]
EqualGroups = Literal["keep", "skip", "resample"]


@dataclass(frozen=True)
class Variant:
    """What a paper picks of each kind of part; the defaults are GRPO's."""

    paper: str
    advantage: str = "group_mean_std"
    ratio: str = "token"
    clip: str = "ppo"
    correction: str = "none"
    aggregation: str = "sequence_mean"
    kl: str = "k3"
    kl_weight: float = 0.0
    kl_in: KLPlace = "loss"
    shaping: tuple[str, ...] = ()
    equal_groups: EqualGroups = "keep"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of its parts, by kind."""


VARIANTS: dict[VariantName, Variant] = {
    # ε isn't in the paper; it is PPO's. β is of section 4.2.
    "grpo": Variant("Shao et al. 2024, arXiv 2402.03300, equation 3", kl_weight=0.04),
    "dr_grpo": Variant(
        "Liu et al. 2025, arXiv 2503.20783, section 3.2", advantage="group_mean", aggregation="constant"
    ),
    "dapo": Variant(
        "Yu et al. 2025, arXiv 2503.14476, equations 8 and 13",
        aggregation="token",
        shaping=("overlong",),
        equal_groups="resample",
        options={"clip": {"low": 0.2, "high": 0.28}},
    ),
    # The bounds are of section 5.1.
    "gspo": Variant(
        "Zheng et al. 2025, arXiv 2507.18071, equation 5",
        ratio="geometric",
        options={"clip": {"low": 3e-4, "high": 4e-4}},
    ),
    "cispo": Variant("MiniMax 2025, arXiv 2506.13585, equation 4", clip="cispo", aggregation="token"),
    # A completion is one action. β is of appendix C; the clip, which the paper doesn't have, changes nothing in the first
    # update of a rollout.
    "rloo": Variant(
        "Ahmadian et al. 2024, arXiv 2402.14740, section 3",
        advantage="leave_one_out",
        ratio="sequence",
        kl="k1",
        kl_weight=0.03,
        kl_in="reward",
    ),
    # The equations give neither the value of β nor the aggregation: both are the defaults of the authors' framework, OpenRLHF.
    "reinforce_plus_plus": Variant(
        "Hu et al. 2025, arXiv 2501.03262, equations 8 to 10",
        advantage="batch_norm",
        aggregation="token",
        kl="k1",
        kl_weight=0.01,
        kl_in="return",
    ),
    "sapo": Variant("Gao et al. 2025, arXiv 2511.20347", clip="sapo"),
    "gmpo": Variant("Zhao et al. 2025, arXiv 2507.20673", clip="gmpo"),
    # The paper's estimator weighs gradients of whole completions' log-probabilities, so tokens are summed. As for RLOO, the
    # clip matters from the second update of a rollout on.
    "maxrl": Variant(
        "Tajwar et al. 2026, arXiv 2602.02710, algorithm 1",
        advantage="group_mean_over_mean",
        aggregation="sequence_sum",
    ),
    # Advantage and aggregation are Dr. GRPO's, which the authors recommend with it.
    "dppo": Variant("Qi et al. 2026, arXiv 2602.04879", advantage="group_mean", clip="dppo", aggregation="constant"),
}
