"""Reward models from preferences: one score per response, by one model or by an ensemble that measures its uncertainty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.plugin import (
    TRAINED,
    BaseConfig,
    Batch,
    Loader,
    Loss,
    RewardModel,
    RunContext,
    Trainer,
    TrainerConfig,
    TrainingStage,
    auc,
    calibration_error,
    pair_accuracy,
    random_generator,
)


def ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Return the Bradley-Terry loss for each pair, −log σ(r_w − r_l − m).

    Ouyang et al. 2022 (arXiv 2203.02155, equation 1) for m = 0; the margin m from Touvron et al. 2023 (arXiv 2307.09288,
    equation 2). Equal scores and no margin give log 2.

    Args:
        chosen, rejected: r_w and r_l, scores of the responses, of any one shape: (P, K) for K members of an ensemble.
        margin: m, a number or a tensor that broadcasts to that shape.

    Returns:
        The shape of the scores, nats.
    """
    return -logsigmoid(chosen - rejected - margin)


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return (r_w + r_l)² for each pair: ranking determines scores up to a constant, which this draws towards zero.

    Eisenstein et al. 2023 (arXiv 2312.09244, section 2, equation 2).

    Args:
        chosen, rejected: (P, K) scores r_w and r_l of K members.

    Returns:
        (P, K).
    """
    return (chosen + rejected) ** 2


def disagreement(margins: Tensor) -> Tensor:
    """Return the standard deviation over members of σ(r_w − r_l), each member's probability that the chosen response is better.

    The standard deviation of the margins themselves also grows with how far apart two responses are, on which members may agree.

    Args:
        margins: (P, K) r_w − r_l of K members, K above 1.

    Returns:
        (P,), from 0 to about 0.7, where two members are sure of opposite orders.
    """
    return margins.sigmoid().std(dim=1)


class EnsembleConfig(BaseConfig):
    """Several members, whose disagreement measures how uncertain a score is."""

    size: int = Field(
        1, ge=1, le=64, description="Members; more of them measure uncertainty more finely and cost more."
    )
    share_backbone: bool = Field(
        True, description="One backbone with a head per member; false trains a whole model per member."
    )
    bootstrap: bool = Field(
        False, description="Give each member its own random weights of the pairs, so that members differ more."
    )


class RewardModelConfig(TrainerConfig):
    """Options of reward models."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak step size; larger learns faster and may diverge.")
    margin: float = Field(
        0.0,
        ge=0,
        description="Least difference of scores that a pair should have, added to a row's own `margin`; larger demands more.",
    )
    centre_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the penalty that keeps a pair's scores around 0 (0.01 is usual); larger centres more.",
    )
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig, description="Members of the model.")


class RewardModelTrainer(Trainer[RewardModelConfig]):
    """Reward model on pairs by Bradley-Terry ranking, alone or as an ensemble with its uncertainty."""

    api = 1
    record = "preference"
    stage = TrainingStage.REWARD
    Config = RewardModelConfig
    roles: ClassVar = {"reward": TRAINED}

    def build(self, loader: Loader) -> dict[str, RewardModel]:
        """Return the reward model, with the members that `ensemble` asks for."""
        ensemble = self.config.ensemble
        # Only options that were given: a model that was trained before keeps its own members.
        given = {name: getattr(ensemble, name) for name in ensemble.model_fields_set}
        model = loader.main(
            RewardModel,
            members=given.get("size"),
            share_backbone=given.get("share_backbone"),
            seed=self.config.seed,
        )
        model.centred = self.config.centre_weight > 0
        return {"reward": model}

    @property
    def reward(self) -> RewardModel:
        return self.models["reward"]  # type: ignore[return-value]

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        """Attach each pair's weight for each member, (P, K), to each batch."""
        for batch in stream:
            yield batch.attach(per_prompt={"member_weights": self._member_weights(batch, run)})

    def _member_weights(self, batch: Batch, run: RunContext) -> Tensor:
        """Return (P, K) the weight of each pair for each member: 1, or for a bootstrap a draw from Poisson(1).

        A draw depends on the seed and the pair's row number alone, so it is the same in every epoch and on every process.
        """
        members = self.reward.members
        if run.evaluating or not self.config.ensemble.bootstrap:
            return torch.ones(batch.num_prompts, members, device=batch.device)
        draws = [random_generator(self.config.seed, row).poisson(1.0, members).tolist() for row in batch.rows]
        return torch.tensor(draws, dtype=torch.float32, device=batch.device).view(-1, members)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Ranking is averaged over pairs, weighted by member where a bootstrap weighs them; centring over pairs."""
        ranking = {"ranking": float(batch["member_weights"].sum()) / max(batch["member_weights"].shape[1], 1)}
        return ranking | ({"centring": batch.num_prompts} if self.config.centre_weight else {})

    def loss(self, batch: Batch) -> Loss:
        """Return the ranking losses and, with `centre_weight`, the centring penalties: means over members, summed over pairs."""
        chosen, rejected = batch.pairs(self.reward.scores(batch))  # (P, K) each
        margin = batch["margin"][:, None] if "margin" in batch.per_prompt else 0.0
        ranking = ranking_loss(chosen, rejected, margin + self.config.margin) * batch["member_weights"]
        terms = {"ranking": ranking.mean(dim=1).sum()}
        if self.config.centre_weight:
            penalty = centring_penalty(chosen, rejected).mean(dim=1).sum()
            terms["centring"] = self.config.centre_weight * penalty
        counted = (batch["member_weights"] > 0).any(dim=1)
        return Loss(terms, self._metrics(chosen.detach(), rejected.detach(), counted.float()))

    def _metrics(self, chosen: Tensor, rejected: Tensor, counted: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return metrics as (values, counted), one entry per pair.

        Args:
            chosen, rejected: (P, K) scores.
            counted: (P,) 1 where any member weights the pair above 0, else 0: the loop may skip the micro-batch of other
                pairs.
        """
        margins = chosen - rejected  # (P, K)
        mean = margins.mean(dim=1)
        metrics = {
            "accuracy": pair_accuracy(mean),
            "margin": mean,
            "scores/chosen": chosen.mean(dim=1),
            "scores/rejected": rejected.mean(dim=1),
        }
        if chosen.shape[1] > 1:
            metrics["uncertainty"] = margins.std(dim=1)
            metrics["disagreement"] = disagreement(margins)
        return {name: (values * counted, counted) for name, values in metrics.items()}

    def summary(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return calibration, quantiles of the scores, and whether members disagree more on pairs that they rank wrongly."""
        margins, right = values["margin"], values["accuracy"] > 0.5
        scores = torch.cat([values["scores/chosen"], values["scores/rejected"]])
        levels = torch.quantile(scores, torch.tensor([0.05, 0.5, 0.95], dtype=scores.dtype))
        found = {
            "calibration_error": calibration_error(margins.abs().sigmoid(), right),
            "brier": float(((1 - margins.sigmoid()) ** 2).mean()),
            "scores/std": float(scores.std()) if len(scores) > 1 else 0.0,
            **{f"scores/p{level:02d}": float(value) for level, value in zip((5, 50, 95), levels, strict=True)},
        }
        if bool(right.any()) and not bool(right.all()):
            for name in ("uncertainty", "disagreement"):
                if (spread := values.get(name)) is not None:
                    found[f"{name}/right"] = float(spread[right].mean())
                    found[f"{name}/wrong"] = float(spread[~right].mean())
                    found[f"{name}/auc"] = auc(spread[~right], spread[right])
        return found
