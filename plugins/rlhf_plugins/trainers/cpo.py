"""Contrastive preference optimisation: prefer the chosen response and imitate it; no reference."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import Batch, Loss, Trainer, TrainerConfig, TrainingStage, logistic_loss, pair_metrics


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return CPO's preference loss for each pair, −log σ(β log π(y_w|x) − β log π(y_l|x)).

    Xu et al. 2024, arXiv 2401.08417, equation 3: DPO's loss with a uniform reference. Deviation: labels may be smoothed,
    −(1 − ε) log σ(m) − ε log σ(−m) for the margin m.

    Args:
        chosen_logps, rejected_logps: (P,) log-probabilities of the responses, summed over their tokens in the loss, nats.

    Returns:
        (P,) nats.
    """
    return logistic_loss(beta * (chosen_logps - rejected_logps), label_smoothing)


def term_weights(batch: Batch, sft_weight: float) -> dict[str, float]:
    """Return what the two terms are averaged over: P pairs; for imitation, the chosen responses' tokens in the loss.

    A term of weight 0 is left out, here and in `preference_terms`.
    """
    weights = {"preference": float(batch.num_prompts)}
    if sft_weight:
        chosen_tokens, _ = batch.pairs(batch.loss_mask.sum(dim=1))
        weights["sft"] = float(chosen_tokens.sum())
    return weights


def preference_terms(batch: Batch, losses: Tensor, logps: Tensor, sft_weight: float) -> dict[str, Tensor]:
    """Return the terms of a micro-batch as sums: a preference loss for each pair, and w L_NLL, w −Σ log π(y_w|x).

    Xu et al. 2024, arXiv 2401.08417, section 3. Deviation: L_NLL is averaged over tokens, as in the authors' code, where the
    paper's is over responses.

    Args:
        losses: (P,) preference losses.
        logps: (R,) log-probabilities of the responses, summed over their tokens in the loss, nats.
        sft_weight: w.
    """
    terms = {"preference": losses.sum()}
    if sft_weight:
        chosen_logps, _ = batch.pairs(logps)
        terms["sft"] = -sft_weight * chosen_logps.sum()
    return terms


class CPOConfig(TrainerConfig):
    """Options of contrastive preference optimisation."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    beta: float = Field(0.1, gt=0, description="Scale of the margin; larger weighs pairs near a tie more sharply.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs assumed to be labelled wrongly; larger trusts pairs less."
    )
    sft_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the chosen responses' negative log-likelihood, averaged over tokens; larger imitates them more.",
    )


class CPOTrainer(Trainer[CPOConfig]):
    """Contrastive preference optimisation on pairs: a preference loss without reference, plus imitation of the chosen."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = CPOConfig

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The preference losses are averaged over pairs, imitation over the chosen responses' tokens."""
        return term_weights(batch, self.config.sft_weight)

    def loss(self, batch: Batch) -> Loss:
        """Return CPO's losses, summed over pairs, and with `sft_weight` the chosen likelihoods, summed over tokens."""
        config = self.config
        logps = self.policy.response_logps(batch)  # (R,)
        losses = cpo_loss(*batch.pairs(logps), config.beta, config.label_smoothing)  # (P,)
        terms = preference_terms(batch, losses, logps, config.sft_weight)
        return Loss(terms, pair_metrics(batch, logps.detach(), config.beta * logps.detach()))
