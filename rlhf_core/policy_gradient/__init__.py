"""The parts of a policy gradient: tables of pure functions, from which a method picks one of each kind.

The loss of a step is −Σ w · c · J / Σ m over its tokens: the objective J is what a *clip* makes of *ratio* and *advantage*,
c is the *correction* for samples of another policy, w and m are the *aggregation*'s weights and amounts; a *KL* estimate may
be added. *Shapings* change rewards before advantages are computed. A third party adds a part with an entry point of the group
`rlhf_core.parts`, named `KIND.NAME`, or with the table's `register`.
"""

from __future__ import annotations

from rlhf_core.infra.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.policy_gradient.part_table": "PartTable",
        "rlhf_core.policy_gradient.advantages": "ADVANTAGES",
        "rlhf_core.policy_gradient.ratios": "RATIOS",
        "rlhf_core.policy_gradient.clips": "CLIPS PolicyTerms clipped_tokens",
        "rlhf_core.policy_gradient.corrections": "CORRECTIONS",
        "rlhf_core.policy_gradient.aggregations": "LOSS_AGGREGATIONS",
        "rlhf_core.policy_gradient.kl_estimators": "KL_ESTIMATORS",
        "rlhf_core.policy_gradient.reward_shaping": "SHAPINGS RewardTerms",
    },
)
