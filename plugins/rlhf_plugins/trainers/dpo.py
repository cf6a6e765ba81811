"""Direct preference optimisation: prefer the chosen response over the rejected one, held near a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_core.batch import Batch
from rlhf_core.config import TrainerConfig, TrainingStage
from rlhf_core.interfaces import Loss, Trainer


def preference_logits(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    """Return how much more than the reference the policy prefers the chosen response.

    h = [log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)]
    (Rafailov et al. 2023, arXiv 2305.18290, equation 7, the argument of σ without β).

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: (P,) token log-probabilities summed over the
            response only, nats.

    Returns:
        (P,) nats.
    """
    return (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)


def sigmoid_loss(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return DPO's loss for each pair, −(1 − ε) log σ(βh) − ε log σ(−βh).

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing ε (conservative DPO) from Mitchell 2023, "A note
    on DPO with noisy preferences". Zero margin gives log 2.
    """
    return -(1 - label_smoothing) * logsigmoid(beta * logits) - label_smoothing * logsigmoid(-beta * logits)


def hinge_loss(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the hinge loss for each pair, max(0, 1 − βh): SLiC-HF's (Zhao et al. 2023, arXiv 2305.10425, equation 2).

    Deviation: the margin is the difference to the reference scaled by β, as in RSO (arXiv 2309.06657, equation 7).
    """
    return relu(1 - beta * logits)


def ipo_loss(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the IPO loss for each pair, (h − 1/(2β))² (Azar et al. 2023, arXiv 2310.12036, equation 17, τ = β)."""
    return (logits - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
}


class DPOConfig(TrainerConfig):
    """Options of direct preference optimisation."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    beta: float = Field(0.1, gt=0, description="KL strength; larger keeps the policy nearer the reference.")
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description="Loss on the margin: `sigmoid` is DPO, `hinge` SLiC, `ipo` a squared distance."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of pairs assumed to be labelled wrongly (sigmoid); larger trusts pairs less.",
    )
    reference: Literal["auto", "copy", "adapter_off", "precompute"] = Field(
        "auto",
        description="How the reference is kept: a frozen `copy`, the base with a fresh adapter off (`adapter_off`), or"
        " log-probabilities computed once at the start (`precompute`). The objective is the same.",
    )

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> DPOConfig:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing has no meaning with loss_type {self.loss_type}; it belongs to sigmoid")
        return self


class DPOTrainer(Trainer[DPOConfig]):
    """Direct preference optimisation on pairs, with sigmoid, hinge or IPO loss."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = DPOConfig
    frozen = ("reference",)

    def experience(self, stream: Iterator[Batch]) -> Iterable[Batch]:
        for batch in stream:
            yield batch.attach(per_response={"ref_logps": self.reference.response_logps(batch)})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"preference": batch.num_prompts}

    def loss(self, batch: Batch) -> Loss:
        logps = self.policy.response_logps(batch)  # (R,)
        logits = preference_logits(*batch.pairs(logps), *batch.pairs(batch["ref_logps"]))  # (P,)
        losses = LOSSES[self.config.loss_type](logits, self.config.beta, self.config.label_smoothing)
        return Loss({"preference": losses.sum()}, self._metrics(batch, logps.detach(), logits.detach()))

    def _metrics(self, batch: Batch, logps: Tensor, logits: Tensor) -> dict[str, tuple[Tensor, float]]:
        """Implicit rewards β(log π − log π_ref), and the KL to the reference as the data's responses estimate it."""
        pairs = batch.num_prompts
        ratios = logps - batch["ref_logps"]
        chosen, rejected = batch.pairs(self.config.beta * ratios)
        return {
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/margin": (self.config.beta * logits, pairs),
            # A tie counts half, so the reference itself scores 0.5.
            "accuracy": ((logits > 0).float() + 0.5 * (logits == 0).float(), pairs),
            # E_ref[log π_ref − log π]: the forward KL where the responses come from the reference.
            "kl": (-ratios.sum(), batch.num_responses),
            "logps/chosen": (batch.pairs(logps)[0].sum(), pairs),
            "logps/rejected": (batch.pairs(logps)[1].sum(), pairs),
        }
