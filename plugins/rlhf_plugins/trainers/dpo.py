"""Direct preference optimisation: prefer the chosen response over the rejected one, held near a reference.

The loss of a pair is a row of the table in dpo_losses.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_core.plugin import (
    FROZEN,
    TRAINED,
    Batch,
    Loss,
    ReferenceConfig,
    RunContext,
    Trainer,
    TrainingStage,
    chosen_nll,
    pair_metrics,
    response_tokens,
)
from rlhf_plugins.trainers.dpo_losses import LOSSES, LossType, PreferencePairs


class DPOConfig(ReferenceConfig):
    """Options of direct preference optimisation."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    beta: float = Field(0.1, gt=0, description="KL strength; larger keeps the policy nearer the reference.")
    loss_type: LossType = Field(
        "sigmoid",
        description="Loss on a pair. `sigmoid` is DPO; `robust` corrects it for wrong labels; `hinge` is SLiC; `ipo` a squared"
        " distance, `ipo_length` per token; `apo_zero` and `apo_down` anchor each likelihood; `sppo_hard`, `nca`; `discopop`"
        " blends logistic and exponential; `aot` and `aot_unpaired` compare ranks within a step.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of pairs assumed to be labelled wrongly (sigmoid, robust, aot); larger trusts pairs less.",
    )
    tau: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Temperature of the blend (discopop); larger passes more gently from logistic to exponential.",
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen response's negative log-likelihood per token, averaged over pairs (RPO); larger"
        " imitates it more.",
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> DPOConfig:
        """Refuse an option that the chosen loss doesn't read."""
        for option in sorted({option for row in LOSSES.values() for option in row.options}):
            default = type(self).model_fields[option].default
            if option not in LOSSES[self.loss_type].options and getattr(self, option) != default:
                owners = ", ".join(name for name, row in LOSSES.items() if option in row.options)
                raise ValueError(f"{option} has no effect with loss_type {self.loss_type}; it is used only by {owners}")
        return self


def dpo_metrics(batch: Batch, logps: Tensor, beta: float) -> dict[str, tuple[Tensor, float]]:
    """Return the metrics of pairs for implicit rewards β(log π − log π_ref), and the estimated KL to the reference.

    Args:
        batch: its column `ref_logps` holds log π_ref of each response, (R,).
        logps: (R,) log π of each response, summed over its tokens in the loss, nats; without gradients.
    """
    log_ratios = logps - batch["ref_logps"]
    # E_ref[log π_ref − log π]: the forward KL where the responses come from the reference.
    kl = (-log_ratios.sum(), float(batch.num_responses))
    return {**pair_metrics(batch, logps, beta * log_ratios), "kl": kl}


class DPOTrainer(Trainer[DPOConfig]):
    """Direct preference optimisation on pairs, with a table of losses: DPO, IPO, SLiC, APO, SPPO, NCA, AOT and others."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = DPOConfig
    roles: ClassVar = {"policy": TRAINED, "reference": FROZEN}

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        """Attach the reference's log-probabilities, (R,), to each batch, and partners where the loss sorts a step."""
        for batch in stream:
            window = batch.attach(per_response={"ref_logps": self.reference.response_logps(batch)})
            yield self._with_partners(window, run)

    def _with_partners(self, window: Batch, run: RunContext) -> Batch:
        """Return the window with a column `partners` where the loss needs it (`aot`, `aot_unpaired`), else unchanged.

        Such a loss compares values of the same rank in the whole step. `partners`, (R,), is what each response is compared with,
        nats: for `aot` the reference's log-probabilities of the pair of the same rank, for `aot_unpaired` a log-ratio.
        """
        find_partners = LOSSES[self.config.loss_type].find_partners
        if find_partners is None:
            return window
        logps = run.forward(window, self.policy.response_logps)
        step_logps = torch.stack([*window.pairs(logps), *window.pairs(window["ref_logps"])], dim=1)  # (P, 4)
        partners = run.over_step(find_partners, step_logps, rows=window.rows)  # (P, 2)
        return window.attach(per_response={"partners": partners.flatten()})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Both terms are averaged over the P pairs."""
        terms = ("preference", "sft") if self.config.sft_weight else ("preference",)
        return dict.fromkeys(terms, float(batch.num_prompts))

    def loss(self, batch: Batch) -> Loss:
        """Return the losses of `loss_type`, and with `sft_weight` the chosen likelihoods per token, summed over pairs."""
        config, variant = self.config, LOSSES[self.config.loss_type]
        logps = self.policy.response_logps(batch)  # (R,)
        pairs = PreferencePairs(
            *batch.pairs(logps),
            *batch.pairs(batch["ref_logps"]),
            *batch.pairs(response_tokens(batch)),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            tau=config.tau,
            partners=batch.pairs(batch["partners"]) if variant.find_partners else None,
        )
        terms = {"preference": variant.loss(pairs).sum()}
        if config.sft_weight:
            # Pang et al. 2024, arXiv 2404.19733, equation 1: DPO + α NLL(y_w) / |y_w|.
            terms["sft"] = config.sft_weight * chosen_nll(batch, logps).sum()
        return Loss(terms, dpo_metrics(batch, logps.detach(), config.beta))
