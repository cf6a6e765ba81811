"""Supervised fine-tuning: imitate the responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import Batch, Loss, RunContext, Trainer, TrainerConfig, TrainingStage, Window, random_generator

SEEDS = "noise_seeds"
"""Column with the seed of each prompt's noise."""


def sft_loss(logps: Tensor, weights: Tensor) -> Tensor:
    """Return the negative log-likelihood of the tokens in the loss, summed over a batch.

    The maximum-likelihood objective of Ouyang et al. 2022 (arXiv 2203.02155, section 3.5, step 1):
    L = −Σ_t w_t log π(y_t | x, y_<t), with weight 1 for the response tokens inside the mask and 0 for all others.

    Args:
        logps: (R, T) token log-probabilities, nats.
        weights: (R, T) bool or float, the loss mask, or the weight of each token.

    Returns:
        Scalar sum, nats.
    """
    return -(logps * weights).sum()


def with_prompts(batch: Batch, prompt_weight: float) -> tuple[Batch, Tensor]:
    """Return a batch whose loss mask has every token but the first, and (R, T) the weight of each token.

    Args:
        prompt_weight: of the tokens that weren't in the loss mask: prompts, and what stands between an assistant's turns.
    """
    whole = batch.prompts_in_responses()
    real = torch.arange(whole.response_ids.shape[1], device=batch.device) < whole.response_lengths[:, None]
    weights = torch.where(whole.loss_mask, 1.0, torch.where(real, prompt_weight, 0.0))
    return replace(whole, loss_mask=real), weights


class SFTConfig(TrainerConfig):
    """Options of supervised fine-tuning."""

    prompt_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight in the loss of tokens that the model isn't to write (prompts, later user turns, tool output), beside"
        " 1 for responses; larger imitates prompts more. 1 trains on every token but the first.",
    )
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description="Noise on the embeddings while training (NEFTune): uniform, up to this over the root of tokens times width."
        " Larger regularises more, 5 to 15 are usual; null adds none.",
    )


class SFTTrainer(Trainer[SFTConfig]):
    """Supervised fine-tuning on prompts with responses, loss on the response tokens, on request on prompts too."""

    api = 1
    record = "sft"
    stage = TrainingStage.SFT
    Config = SFTConfig

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        """Attach the seed of each prompt's noise, which follows from its place in the run, where noise is asked for."""
        for batch in stream:
            if self.config.neftune_alpha is None or run.evaluating:
                yield batch
                continue
            places = batch.places or batch.rows
            seeds = [int(random_generator(self.config.seed, place).integers(1 << 62)) for place in places]
            yield batch.attach(per_prompt={SEEDS: torch.tensor(seeds, dtype=torch.long, device=batch.device)})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The loss is averaged over the weights of its tokens: over the tokens in the loss where prompts have none."""
        if not self.config.prompt_loss_weight:
            return {"nll": batch.num_loss_tokens}
        return {"nll": float(with_prompts(batch.to("cpu"), self.config.prompt_loss_weight)[1].double().sum())}

    def loss(self, batch: Batch) -> Loss:
        """Return the negative log-likelihood, summed over the weighted tokens."""
        weights = batch.loss_mask
        if self.config.prompt_loss_weight:
            batch, weights = with_prompts(batch, self.config.prompt_loss_weight)
        states = None
        if SEEDS in batch.per_prompt and self.config.neftune_alpha is not None:
            states = self.policy.noisy_hidden_states(batch, self.config.neftune_alpha, batch[SEEDS], drop_last=True)
        return Loss({"nll": sft_loss(self.policy.token_logps(batch, states=states), weights)})
