"""Simple preference optimisation: prefer the response whose tokens are likelier on average; no reference."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import (
    Batch,
    Loss,
    Trainer,
    TrainerConfig,
    TrainingStage,
    logistic_loss,
    pair_metrics,
    response_tokens,
)
from rlhf_plugins.trainers.cpo import preference_terms, term_weights


def simpo_loss(
    chosen_means: Tensor, rejected_means: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Return SimPO's loss for each pair, −log σ(β log π(y_w|x)/|y_w| − β log π(y_l|x)/|y_l| − γ).

    Meng et al. 2024, arXiv 2405.14734, equation 6. Deviation: labels may be smoothed, −(1 − ε) log σ(m) − ε log σ(−m) for the
    margin m.

    Args:
        chosen_means, rejected_means: (P,) log-probabilities averaged over the response's tokens in the loss, nats per token.
        gamma: γ, target margin between the rewards, in units of β × nats per token.

    Returns:
        (P,) nats.
    """
    return logistic_loss(beta * (chosen_means - rejected_means) - gamma, label_smoothing)


class SimPOConfig(TrainerConfig):
    """Options of simple preference optimisation."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    beta: float = Field(2.0, gt=0, description="Scale of the reward; larger weighs pairs near the margin more sharply.")
    gamma: float = Field(
        1.0, ge=0, description="Reward by which the chosen response should lead; larger pushes pairs further apart."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs assumed to be labelled wrongly; larger trusts pairs less."
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen responses' negative log-likelihood, averaged over tokens (CPO-SimPO); larger imitates"
        " them more.",
    )


class SimPOTrainer(Trainer[SimPOConfig]):
    """Simple preference optimisation on pairs: length-normalised likelihoods, a target margin, no reference."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = SimPOConfig

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Return the pairs, over which preference losses are averaged, and with `sft_weight` the chosen responses' tokens."""
        return term_weights(batch, self.config.sft_weight)

    def loss(self, batch: Batch) -> Loss:
        """Return SimPO's losses, summed over pairs, and with `sft_weight` the chosen likelihoods, summed over tokens."""
        config = self.config
        logps = self.policy.response_logps(batch)  # (R,)
        means = logps / response_tokens(batch)  # (R,) nats per token
        losses = simpo_loss(*batch.pairs(means), config.beta, config.gamma, config.label_smoothing)  # (P,)
        terms = preference_terms(batch, losses, logps, config.sft_weight)
        return Loss(terms, pair_metrics(batch, logps.detach(), config.beta * means.detach()))
