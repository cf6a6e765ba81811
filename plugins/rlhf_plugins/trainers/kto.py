"""Kahneman-Tversky optimisation: learn from responses that are each desirable or undesirable, without pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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

log = logging.getLogger(__name__)

BALANCE = (1.0, 4 / 3)
"""Range that the paper recommends for λ_D n_D / (λ_U n_U), weights λ times rows n of the desirable and the undesirable label
(arXiv 2402.01306, in its first version; section "hyperparameters")."""


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss for each response, λ_D σ(−β(r − z₀)) where it is desirable, λ_U σ(−β(z₀ − r)) where it isn't.

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 8, with r = log π(y|x) − log π_ref(y|x); 1 − σ(m) is written σ(−m), which
    keeps its digits where m is large. At r = z₀ it is λ/2.

    Args:
        log_ratios: (R,) r, summed over the response's tokens in the loss, nats.
        desirable: (R,) bool.
        reference_point: (R,) or scalar z₀, an estimate of the KL to the reference, nats, without gradients.
        desirable_weight, undesirable_weight: λ_D and λ_U.

    Returns:
        (R,) in [0, λ].
    """
    margin = beta * torch.where(desirable, log_ratios - reference_point, reference_point - log_ratios)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * torch.sigmoid(-margin)


def next_other_prompts(batch: Batch, run: RunContext) -> list[list[int] | None]:
    """Return for each of the batch's prompts the ids of the next different prompt of the whole step, in the order of rows.

    The last row is followed by the first. None where all prompts of the step are equal. The answer is the same however the step's
    rows are divided among processes.
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


def mismatched_pairs(batch: Batch, prompts: Sequence[Sequence[int] | None], max_length: int) -> Batch:
    """Return the batch with other prompts before its responses; rows whose other prompt is None are left out.

    Args:
        batch: P prompts with one response each.
        prompts: P, for each prompt the ids of the one that replaces it.
        max_length: tokens of a prompt with its response; longer responses are truncated, to one token at least.
    """
    kept = [number for number, prompt in enumerate(prompts) if prompt is not None]
    part = batch.select(kept)
    others = [torch.tensor(prompts[number]) for number in kept]
    prompt_lengths = torch.tensor([len(ids) for ids in others], dtype=torch.long, device=batch.device)
    room = (max_length - prompt_lengths[part.owner]).clamp(min=1)
    lengths = torch.minimum(part.response_lengths, room)
    inside = torch.arange(part.response_ids.shape[1], device=batch.device) < lengths[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(others, batch_first=True) if others else part.prompt_ids
    return replace(
        part,
        prompt_ids=padded.to(batch.device),
        prompt_lengths=prompt_lengths,
        response_lengths=lengths,
        loss_mask=part.loss_mask & inside,
    )


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
        description="Reference point that rewards are compared with: the KL estimated from a step's mismatched pairs (`batch`),"
        " its moving average (`ema`, less noisy in small batches), or `zero`, which saves two forward passes.",
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
        """Refuse a step without mismatched pairs, and an option that the chosen reference point doesn't read."""
        if self.batch_size < 2 and self.kl != "zero":
            raise ValueError("a step of one row has no mismatched pair: set `batch_size` to 2 or more, or `kl: zero`")
        if self.kl != "ema" and self.kl_decay != type(self).model_fields["kl_decay"].default:
            raise ValueError(f"kl_decay has no effect with kl {self.kl}; only ema uses it")
        return self


class KTOTrainer(Trainer[KTOConfig]):
    """Kahneman-Tversky optimisation on single responses labelled desirable or undesirable."""

    api = 1
    record = "unpaired"
    stage = TrainingStage.PREFERENCE
    Config = KTOConfig
    roles: ClassVar = {"policy": TRAINED, "reference": FROZEN}

    moving_kl: float | None = None
    """The moving average of the KL estimates, nats; None before the first one, and unless `kl` is `ema`."""

    def inspect(self, data: EncodedData) -> None:
        """Warn where the labels' weights times their numbers of rows are out of the range that the paper recommends."""
        if data.streaming:
            log.info(
                "streamed rows can't be counted by label in advance: set `desirable_weight` and `undesirable_weight` so that the"
                " labels balance"
            )
            return
        labels = data.report.labels
        good, bad = labels["desirable"], labels["undesirable"]
        ratio = self.config.desirable_weight * good / (self.config.undesirable_weight * bad)
        low, high = BALANCE
        if not low <= ratio <= high:
            fit = self.config.undesirable_weight * bad / good
            log.warning(
                "the weighted desirable rows are %.3g times the weighted undesirable ones (%d and %d rows); the paper recommends"
                " %.3g to %.3g: set `desirable_weight` to %.3g to %.3g",
                ratio, good, bad, low, high, low * fit, high * fit,
            )  # fmt: skip

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        """Attach the reference's log-probabilities, (R,), and the reference point z₀, (P,), to each batch."""
        for batch in stream:
            point = self._reference_point(batch, run)
            yield batch.attach(
                per_response={"ref_logps": self.reference.response_logps(batch)},
                per_prompt={"kl": torch.full((batch.num_prompts,), point, device=batch.device)},
            )

    def _reference_point(self, batch: Batch, run: RunContext) -> float:
        """Return z₀ = max(0, E[log π(y'|x) − log π_ref(y'|x)]) over mismatched pairs (x, y') of the whole step, nats.

        Its moving average where `kl` is `ema`; 0 where it is `zero` or the step has no mismatched pair.
        """
        if self.config.kl == "zero":
            return 0.0
        other = mismatched_pairs(batch, next_other_prompts(batch, run), self.config.length_limit)
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

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The loss is averaged over responses."""
        return {"kto": batch.num_responses}

    def loss(self, batch: Batch) -> Loss:
        """Return KTO's losses, summed over responses."""
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
        """Return the mean reward β r of each label, one entry per prompt, and the reference point."""
        rewards, good = self.config.beta * log_ratios, batch["desirable"].float()
        in_order = batch.owner.argsort()  # one response per prompt
        return {
            "rewards/desirable": ((rewards * good)[in_order], good[in_order]),
            "rewards/undesirable": ((rewards * (1 - good))[in_order], (1 - good)[in_order]),
            "kl": (batch["kl"].sum(), batch.num_prompts),
        }

    def summary(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the AUC: how often a desirable response's reward is above an undesirable one's."""
        good, bad = values["rewards/desirable"], values["rewards/undesirable"]
        return {"auc": auc(good, bad)} if len(good) and len(bad) else {}

    def state_dict(self) -> dict[str, Any]:
        return {"moving_kl": self.moving_kl}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moving_kl = state["moving_kl"]
