"""Kahneman-Tversky optimisation: learn from responses that are each desirable or undesirable, without pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_core.plugin import (
    FROZEN,
    TRAINED,
    Batch,
    EncodedData,
    Loss,
    ReferenceConfig,
    RunContext,
    Trainer,
    TrainingStage,
    auc,
)
from rlhf_plugins.trainers.kto_pairs import mismatched

log = logging.getLogger(__name__)

BALANCE = (1.0, 4 / 3)
"""Where the paper wants λ_D n_D / (λ_U n_U) to lie (arXiv 2402.01306, in its first version; section "hyperparameters")."""


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss for each response.

    λ_D (1 − σ(β(r − z₀))) for a desirable response, λ_U (1 − σ(β(z₀ − r))) for an undesirable one, with
    r = log π(y|x) − log π_ref(y|x) (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8; its constants λ_y are there to
    make the loss non-negative, as here).

    Args:
        log_ratios: (R,) r, summed over the response, nats.
        desirable: (R,) bool.
        reference_point: (R,) or scalar z₀, nats, without gradient.

    Returns:
        (R,) in [0, λ].
    """
    margin = beta * torch.where(desirable, log_ratios - reference_point, reference_point - log_ratios)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    # 1 − σ(m) loses its digits where m is large; σ(−m) doesn't.
    return weights * torch.sigmoid(-margin)


class KTOConfig(ReferenceConfig):
    """Options of Kahneman-Tversky optimisation."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    beta: float = Field(0.1, gt=0, description="KL strength; larger keeps the policy nearer the reference.")
    desirable_weight: float = Field(
        1.0, gt=0, description="Weight of desirable responses; larger learns more from what is good."
    )
    undesirable_weight: float = Field(
        1.0, gt=0, description="Weight of undesirable responses; larger learns more from what is bad."
    )
    kl: Literal["batch", "ema", "zero"] = Field(
        "batch",
        description="Reference point that rewards are held against: the KL that a step's mismatched pairs estimate (`batch`), its"
        " moving average (`ema`, less noisy in small batches), or `zero`, which saves two forward passes.",
    )
    kl_decay: float = Field(
        0.9, ge=0, lt=1, description="Share of the moving average kept each step (`kl: ema`); larger is smoother."
    )
    reference: Literal["auto", "copy", "adapter_off"] = Field(
        "auto",
        description="How the reference is kept: a frozen `copy`, or the base with a fresh adapter off (`adapter_off`). The"
        " objective is the same. Mismatched pairs are new in every step, so nothing can be computed beforehand.",
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> KTOConfig:
        if self.batch_size < 2 and self.kl != "zero":
            raise ValueError("a step of one row has no mismatched pair: set `batch_size` to 2 or more, or `kl: zero`")
        if self.kl != "ema" and self.kl_decay != type(self).model_fields["kl_decay"].default:
            raise ValueError(f"kl_decay has no meaning with kl {self.kl}; it belongs to ema")
        return self


class KTOTrainer(Trainer[KTOConfig]):
    """Kahneman-Tversky optimisation on single responses labelled desirable or undesirable."""

    api = 1
    record = "unpaired"
    stage = TrainingStage.PREFERENCE
    Config = KTOConfig
    roles: ClassVar = {"policy": TRAINED, "reference": FROZEN}

    moving_kl: float | None = None
    """The moving average of the KL estimates, nats; None before the first."""

    def inspect(self, data: EncodedData) -> None:
        if data.streaming:
            log.info("streamed rows aren't counted by label beforehand: see to it that the weights fit them")
            return
        labels = data.report.labels
        good, bad = labels["desirable"], labels["undesirable"]
        ratio = self.config.desirable_weight * good / (self.config.undesirable_weight * bad)
        low, high = BALANCE
        if not low <= ratio <= high:
            fit = self.config.undesirable_weight * bad / good
            log.warning(
                "%d desirable and %d undesirable rows weigh %.3g to 1; the paper wants %.3g to %.3g, which a"
                " `desirable_weight` of %.3g to %.3g gives",
                good, bad, ratio, low, high, low * fit, high * fit,
            )  # fmt: skip

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        for batch in stream:
            point = self._reference_point(batch, run)
            yield batch.attach(
                per_response={"ref_logps": self.reference.response_logps(batch)},
                per_prompt={"kl": torch.full((batch.num_prompts,), point, device=batch.device)},
            )

    def _reference_point(self, batch: Batch, run: RunContext) -> float:
        """Return z₀ = max(0, E[log π(y'|x) − log π_ref(y'|x)]) over mismatched pairs of the whole step, nats."""
        if self.config.kl == "zero":
            return 0.0
        other = mismatched(batch, self._next_prompts(batch, run), self.config.length_limit)
        total, count = 0.0, other.num_responses
        if count:
            ratios = run.forward(other, self.policy.response_logps) - self.reference.response_logps(other)
            total = float(ratios.double().sum())
        total, count = sum(run.gather(total)), sum(run.gather(count))
        if count:
            estimate = total / count
            if self.config.kl == "batch":
                return max(estimate, 0.0)
            decay = self.config.kl_decay if self.moving_kl is not None else 0.0
            self.moving_kl = decay * (self.moving_kl or 0.0) + (1 - decay) * estimate
        return max(self.moving_kl or 0.0, 0.0)

    def _next_prompts(self, batch: Batch, run: RunContext) -> list[list[int] | None]:
        """Return for each row of this process the next other prompt of the whole step, in the order of rows, round and round.

        None where the step has no other prompt. Whichever process has a row, it meets the same prompt.
        """
        ids, lengths = batch.prompt_ids.tolist(), batch.prompt_lengths.tolist()
        own = [[row, prompt[:length]] for row, prompt, length in zip(batch.rows, ids, lengths, strict=True)]
        step = sorted(run.gather(own))
        found: list[list[int] | None] = []
        for entry in own:
            at = step.index(entry)
            around = [prompt for _, prompt in step[at + 1 :] + step[:at]]
            found.append(next((prompt for prompt in around if prompt != entry[1]), None))
        return found

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"kto": batch.num_responses}

    def loss(self, batch: Batch) -> Loss:
        config = self.config
        log_ratios = self.policy.response_logps(batch) - batch["ref_logps"]  # (R,)
        losses = kto_loss(
            log_ratios,
            batch["desirable"],
            batch["kl"][batch.owner],
            config.beta,
            config.desirable_weight,
            config.undesirable_weight,
        )
        return Loss({"kto": losses.sum()}, self._metrics(batch, log_ratios.detach()))

    def _metrics(self, batch: Batch, log_ratios: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
        rewards, good = self.config.beta * log_ratios, batch["desirable"].float()
        in_order = batch.owner.argsort()  # one response a prompt
        return {
            "rewards/desirable": ((rewards * good)[in_order], good[in_order]),
            "rewards/undesirable": ((rewards * (1 - good))[in_order], (1 - good)[in_order]),
            "kl": (batch["kl"].sum(), batch.num_prompts),
        }

    def summary(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        good, bad = values["rewards/desirable"], values["rewards/undesirable"]
        return {"auc": auc(good, bad)} if len(good) and len(bad) else {}

    def state_dict(self) -> dict[str, Any]:
        return {"moving_kl": self.moving_kl}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moving_kl = state["moving_kl"]
