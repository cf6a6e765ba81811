"""Contrastive preference optimisation: prefer the chosen response and imitate it; no reference."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import Batch, Loss, Trainer, TrainerConfig, TrainingStage
from rlhf_plugins.trainers.pairs import chosen_tokens, logistic_loss, pair_metrics


def cpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return CPO's preference loss for each pair, −log σ(β log π(y_w|x) − β log π(y_l|x)).

    Xu et al. 2024, arXiv 2401.08417, equation 3: DPO's loss with a uniform reference. Deviation: labels may be smoothed,
    −(1 − ε) log σ(m) − ε log σ(−m).

    Args:
        chosen, rejected: (P,) token log-probabilities summed over the response, nats.

    Returns:
        (P,) nats.
    """
    return logistic_loss(beta * (chosen - rejected), label_smoothing)


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
        weights = {"preference": float(batch.num_prompts)}
        if self.config.sft_weight:
            weights["sft"] = float(chosen_tokens(batch))
        return weights

    def loss(self, batch: Batch) -> Loss:
        config = self.config
        logps = self.policy.response_logps(batch)  # (R,)
        terms = {"preference": cpo_loss(*batch.pairs(logps), config.beta, config.label_smoothing).sum()}
        if config.sft_weight:
            # L_NLL of section 3. Deviation: averaged over tokens, as in the authors' code, where the paper's is over responses.
            terms["sft"] = -config.sft_weight * batch.pairs(logps)[0].sum()
        return Loss(terms, pair_metrics(batch, logps.detach(), config.beta * logps.detach()))
