"""Supervised fine-tuning: imitate the responses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rlhf_core.plugin import Batch, Loss, Trainer, TrainerConfig, TrainingStage


def sft_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Return the negative log-likelihood of the tokens in the loss, summed over a batch.

    The maximum-likelihood objective of Ouyang et al. 2022 (arXiv 2203.02155, section 3.5, step 1):
    L = −Σ_t log π(y_t | x, y_<t), over the response tokens inside the mask.

    Args:
        logps: (R, T) token log-probabilities, nats.
        mask: (R, T) bool, the loss mask: the response tokens in the loss.

    Returns:
        Scalar sum, nats.
    """
    return -(logps * mask).sum()


class SFTConfig(TrainerConfig):
    """Options of supervised fine-tuning: those that every trainer has, and no others."""


class SFTTrainer(Trainer[SFTConfig]):
    """Supervised fine-tuning on prompts with responses, loss on the response tokens only."""

    api = 1
    record = "sft"
    stage = TrainingStage.SFT
    Config = SFTConfig

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The loss is averaged over the tokens in the loss."""
        return {"nll": batch.num_loss_tokens}

    def loss(self, batch: Batch) -> Loss:
        """Return the negative log-likelihood, summed over the tokens in the loss."""
        return Loss({"nll": sft_loss(self.policy.token_logps(batch), batch.loss_mask)})
