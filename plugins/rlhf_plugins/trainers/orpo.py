"""Odds-ratio preference optimisation: imitate the chosen response and raise its odds over the rejected one's; no reference."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.plugin import (
    Batch,
    Loss,
    Trainer,
    TrainerConfig,
    TrainingStage,
    chosen_nll,
    pair_metrics,
    response_tokens,
)


def log1mexp(values: Tensor) -> Tensor:
    """Return log(1 − exp(x)) for negative x, element by element, to full precision at both ends (Mächler 2012, equation 7)."""
    near_zero = torch.log(-torch.expm1(values))
    return torch.where(values > -math.log(2), near_zero, torch.log1p(-torch.exp(values)))


def log_odds(logps: Tensor) -> Tensor:
    """Return log(p / (1 − p)) from log p, element by element (Hong et al. 2024, arXiv 2403.07691, equation 4).

    Deviation: p is clamped to at most 1 − ε with float32's ε, where the odds would be infinite; there the gradient is 0.
    """
    logps = logps.clamp(max=-torch.finfo(torch.float32).eps)
    return logps - log1mexp(logps)


def orpo_loss(chosen_means: Tensor, rejected_means: Tensor) -> Tensor:
    """Return ORPO's odds-ratio loss for each pair, −log σ(log odds(y_w|x) − log odds(y_l|x)).

    Hong et al. 2024, arXiv 2403.07691, equation 7. Equal likelihoods give log 2.

    Args:
        chosen_means, rejected_means: (P,) log-probabilities averaged over the response's tokens (equation 3), nats per token.

    Returns:
        (P,) nats.
    """
    return -logsigmoid(log_odds(chosen_means) - log_odds(rejected_means))


class ORPOConfig(TrainerConfig):
    """Options of odds-ratio preference optimisation."""

    learning_rate: float = Field(8e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    beta: float = Field(
        0.1, gt=0, description="Weight λ of the odds ratio beside imitation; larger contrasts pairs more strongly."
    )


class ORPOTrainer(Trainer[ORPOConfig]):
    """Odds-ratio preference optimisation on pairs: imitation of the chosen with an odds-ratio penalty, no reference."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = ORPOConfig

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Both terms are averaged over the P pairs."""
        # Equation 6: the mean of L_SFT + λ L_OR over pairs.
        return dict.fromkeys(("sft", "preference"), float(batch.num_prompts))

    def loss(self, batch: Batch) -> Loss:
        """Return the chosen responses' negative log-likelihood per token and the odds-ratio losses, summed over pairs."""
        beta = self.config.beta
        logps = self.policy.response_logps(batch)  # (R,)
        means = logps / response_tokens(batch)  # (R,) nats per token
        terms = {"sft": chosen_nll(batch, logps).sum(), "preference": beta * orpo_loss(*batch.pairs(means)).sum()}
        return Loss(terms, pair_metrics(batch, logps.detach(), beta * means.detach()))
