"""Direct preference optimisation: prefer the chosen response over the rejected one, held near a reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_core.plugin import FROZEN, TRAINED, Batch, Loss, ReferenceConfig, RunContext, Trainer, TrainingStage
from rlhf_plugins.trainers.dpo_losses import LOSSES, LossType
from rlhf_plugins.trainers.pairs import Pairs, chosen_nll, pair_metrics, response_tokens


class DPOConfig(ReferenceConfig):
    """Options of direct preference optimisation."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    beta: float = Field(0.1, gt=0, description="KL strength; larger keeps the policy nearer the reference.")
    loss_type: LossType = Field(
        "sigmoid",
        description="Loss on a pair. `sigmoid` is DPO; `robust` corrects it for wrong labels; `hinge` is SLiC; `ipo` a squared"
        " distance, `ipo_length` a token; `apo_zero` and `apo_down` anchor each likelihood; `sppo_hard`, `nca`; `discopop` blends"
        " logistic and exponential; `aot` and `aot_unpaired` compare ranks within a step.",
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
        description="Weight of the chosen response's negative log-likelihood a token, averaged over pairs (RPO); larger imitates"
        " it more.",
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> DPOConfig:
        for option in sorted({option for row in LOSSES.values() for option in row.options}):
            default = type(self).model_fields[option].default
            if option not in LOSSES[self.loss_type].options and getattr(self, option) != default:
                owners = ", ".join(name for name, row in LOSSES.items() if option in row.options)
                raise ValueError(f"{option} has no meaning with loss_type {self.loss_type}; it belongs to {owners}")
        return self


class DPOTrainer(Trainer[DPOConfig]):
    """Direct preference optimisation on pairs, with a table of losses: DPO, IPO, SLiC, APO, SPPO, NCA, AOT and others."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = DPOConfig
    roles: ClassVar = {"policy": TRAINED, "reference": FROZEN}

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        for batch in stream:
            yield self._matched(run, batch.attach(per_response={"ref_logps": self.reference.response_logps(batch)}))

    def weights(self, batch: Batch) -> Mapping[str, float]:
        terms = ("preference", "sft") if self.config.sft_weight else ("preference",)
        return dict.fromkeys(terms, float(batch.num_prompts))

    def loss(self, batch: Batch) -> Loss:
        logps = self.policy.response_logps(batch)  # (R,)
        terms = {"preference": LOSSES[self.config.loss_type].loss(self._pairs(batch, logps)).sum()}
        if self.config.sft_weight:
            # Pang et al. 2024, arXiv 2404.19733, equation 1: DPO + α NLL(y_w) / |y_w|.
            terms["sft"] = self.config.sft_weight * chosen_nll(batch, logps).sum()
        return Loss(terms, self._metrics(batch, logps.detach()))

    def _pairs(self, batch: Batch, logps: Tensor) -> Pairs:
        config = self.config
        return Pairs(
            *batch.pairs(logps),
            *batch.pairs(batch["ref_logps"]),
            *batch.pairs(response_tokens(batch)),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            tau=config.tau,
            partners=batch.pairs(batch["partners"]) if LOSSES[config.loss_type].match else None,
        )

    def _matched(self, run: RunContext, batch: Batch) -> Batch:
        """Attach what each response is compared with, where the loss sorts the step."""
        rule = LOSSES[self.config.loss_type].match
        if rule is None:
            return batch
        logps = run.forward(batch, self.policy.response_logps)
        own = torch.stack([*batch.pairs(logps), *batch.pairs(batch["ref_logps"])], dim=1)  # (P, 4)
        partners = run.over_step(rule, own, rows=batch.rows)  # (P, 2)
        return batch.attach(per_response={"partners": partners.flatten()})

    def _metrics(self, batch: Batch, logps: Tensor) -> dict[str, tuple[Tensor, float]]:
        """Implicit rewards β(log π − log π_ref), and the KL to the reference as the data's responses estimate it."""
        ratios = logps - batch["ref_logps"]
        # E_ref[log π_ref − log π]: the forward KL where the responses come from the reference.
        kl = (-ratios.sum(), float(batch.num_responses))
        return {**pair_metrics(batch, logps, self.config.beta * ratios), "kl": kl}
