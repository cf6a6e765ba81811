"""Policy gradient on groups of completions, as a package of a third party would have it: GRPO's advantages, PPO's clipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlhf_core.plugin import (
    TRAINED,
    Batch,
    Evaluation,
    Loader,
    Loss,
    OnlineConfig,
    Role,
    RunContext,
    SamplingConfig,
    Trainer,
    TrainingStage,
    Window,
    logprob_gaps,
    online_metrics,
)


def group_advantages(rewards: Tensor, *, scaled: bool = False) -> Tensor:
    """Return A = r − mean(r) over each group, divided by the group's deviation where `scaled`.

    Shao et al. 2024, arXiv 2402.03300, section 4.1.2; the deviation is over G here, not G − 1.

    Args:
        rewards: (P, G).

    Returns:
        (P, G).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-6) if scaled else centred


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return min(ρA, clip(ρ, 1 − low, 1 + high) A).

    Schulman et al. 2017, arXiv 1707.06347, equation 7; two bounds as in DAPO, arXiv 2503.14476, equation 10.

    Args:
        ratio: (R, T) ρ. advantages: broadcast to it.
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl_loss(logps: Tensor, ref_logps: Tensor, weight: Tensor) -> Tensor:
    """Return w ½ (log π − log π_ref)² for each token, k2 of Schulman's "Approximating KL divergence" (2020) times w = π/q.

    Averaged over tokens drawn from q, its gradient is that of KL(π ‖ π_ref) at their prefixes.

    Args:
        logps, ref_logps: (R, T) nats. weight: (R, T) w, without gradient.
    """
    return weight * (logps - ref_logps).square() / 2


class PolicyGradientConfig(OnlineConfig):
    """Options of the policy gradient on groups."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    group_size: int = Field(4, ge=2, description="Completions of each prompt; larger estimates its mean reward better.")
    clip_low: float = Field(
        0.2, gt=0, lt=1, description="How far a token's ratio may fall; larger trusts old rollouts more."
    )
    clip_high: float = Field(
        0.2, gt=0, description="How far a token's ratio may rise; larger trusts old rollouts more."
    )
    scale: Literal["none", "group", "step"] = Field(
        "none", description="Divide advantages by the deviation of rewards in the `group`, in the whole `step`, or not."
    )
    kl_weight: float = Field(0.0, ge=0, description="Weight of the KL to the reference; larger stays nearer to it.")
    kl_target: float | None = Field(
        None, gt=0, description="Let the KL weight follow this KL per token, nats; larger lets the policy go further."
    )
    reference: Literal["auto", "copy", "adapter_off"] = Field(
        "auto", description="How the reference is kept: a frozen copy, or the base with a fresh adapter off."
    )
    dynamic_sampling: bool = Field(
        False,
        description="Take more prompts until `batch_size` groups have rewards that differ, and leave out the others; false"
        " takes each batch as it is.",
    )
    learn_from_truncated: bool = Field(
        True, description="Whether completions that the limit cut off are in the loss; false leaves them out."
    )

    @field_validator("generation")
    @classmethod
    def _is_drawn(cls, generation: SamplingConfig) -> SamplingConfig:
        if generation.temperature == 0:
            raise ValueError("completions of temperature 0 are all alike: set `temperature` above 0")
        return generation


class PolicyGradientTrainer(Trainer[PolicyGradientConfig]):
    """Policy gradient on groups of completions, clipped, with KL to the reference and dynamic sampling."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = PolicyGradientConfig
    roles: ClassVar = {"policy": TRAINED, "reference": Role(trained=False, optional=True)}
    splits_groups = True
    kl_weight: float
    """The weight of the KL as it is now."""

    def build(self, loader: Loader) -> Mapping[str, Any]:
        policy, self.kl_weight = loader.main(), self.config.kl_weight
        if not self.config.kl_weight:
            return {"policy": policy}
        return {"policy": policy, "reference": loader.reference(policy, self.config.reference)}

    def windows_per_batch(self) -> int | None:
        return None if self.config.dynamic_sampling else super().windows_per_batch()

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterator[Window]:
        """Roll out each batch, or with dynamic sampling so many that enough groups are there, and learn from it in epochs."""
        config, held, groups = self.config, list[Batch](), 0
        for batch in stream:
            rollout = self.rollout(batch, run)
            if config.dynamic_sampling:
                rollout = rollout.select(rollout["differs"].nonzero()[:, 0])
                # Every process takes another batch, or none does: a step has the same groups for any number of them.
                groups += sum(run.gather(rollout.num_prompts))
            held.append(rollout)
            if not config.dynamic_sampling or groups >= config.batch_size:
                yield from self.windows(Batch.cat(held), run)
                held, groups = [], 0
        if groups:
            yield from self.windows(Batch.cat(held), run)

    def rollout(self, batch: Batch, run: RunContext) -> Batch:
        """Return completions of the prompts with their rewards and the log-probabilities that they had when they were drawn."""
        sampling = self.config.generation
        completions, scores = run.generate_and_score(batch, self.config.group_size, sampling)
        rollout = Batch.from_completions(batch, completions)
        rewards = scores.total.to(rollout.device)
        grouped = self.grouped(rewards, rollout)
        differs = (grouped != grouped[:, :1]).any(dim=1)
        tokens = {"old_logps": rollout.engine_logps}
        if self.config.kl_weight:
            with run.phase("reference", tokens=rollout.num_tokens):
                tokens["ref_logps"] = self.reference.token_logps(rollout, temperature=sampling.temperature)
        return rollout.attach(per_prompt={"differs": differs}, per_response={"rewards": rewards}, per_token=tokens)

    def windows(self, rollout: Batch, run: RunContext) -> Iterator[Window]:
        """Attach advantages, over all of the step's groups, and cut the rollout."""
        config = self.config
        advantages = group_advantages(
            self.grouped(rollout["rewards"], rollout), scaled=config.scale == "group"
        ).flatten()
        if config.scale == "step":
            rows = [rollout.rows[owner] for owner in rollout.owner.tolist()]
            advantages = run.over_step(
                lambda whole: whole / (whole.square().mean().sqrt() + 1e-6), advantages, rows=rows
            )
        if config.kl_weight:
            self.follow_target(rollout, run)
        if not config.learn_from_truncated:  # they have had their say in the group's mean
            rollout = replace(rollout, loss_mask=rollout.loss_mask & ~rollout["truncated"][:, None])
        rollout = run.record_rollout(rollout.attach(per_response={"advantages": advantages}), advantages)
        yield from run.windows(rollout)

    def grouped(self, values: Tensor, rollout: Batch) -> Tensor:
        """Return (P, G) values of (R,) responses: a rollout's groups are whole and stand in the order of its prompts."""
        return values.view(rollout.num_prompts, self.config.group_size)

    def follow_target(self, rollout: Batch, run: RunContext) -> None:
        """Move the KL's weight towards its target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""
        kl = ((rollout["old_logps"] - rollout["ref_logps"]) * rollout.loss_mask).sum()
        total, tokens = (sum(run.gather(float(value))) for value in (kl, rollout.num_loss_tokens))
        if self.config.kl_target is not None and tokens:
            error = total / tokens / self.config.kl_target - 1
            self.kl_weight *= 1 + 0.1 * max(-0.2, min(error, 0.2))
        run.log("kl_weight", self.kl_weight)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Average the policy's term over the tokens of groups with rewards that differ, the KL over all."""
        learned = batch.loss_mask & batch["differs"][batch.owner, None]
        weights = {"policy": float(learned.sum())}
        return weights | ({"kl": float(batch.loss_mask.sum())} if self.config.kl_weight else {})

    def loss(self, batch: Batch) -> Loss:
        config, mask = self.config, batch.loss_mask
        logps = self.policy.token_logps(batch, temperature=config.generation.temperature)  # (R, T) nats
        old, mass = batch["old_logps"], batch["kept_mass"]
        ratio = torch.where(mask, logps - old, 0.0).exp()
        gain = mass * clipped(ratio, batch["advantages"][:, None], config.clip_low, config.clip_high)
        terms = {"policy": -(gain * mask).sum()}
        now, ref = ratio.detach(), None
        outside = torch.where(batch["advantages"][:, None] > 0, now > 1 + config.clip_high, now < 1 - config.clip_low)
        if config.kl_weight:
            ref = batch["ref_logps"]
            terms["kl"] = self.kl_weight * (kl_loss(logps, ref, now * mass) * mask).sum()
        metrics = online_metrics(
            logps=logps,
            old_logps=old,
            advantages=batch["advantages"],
            mask=mask,
            clipped=outside,
            ref_logps=ref,
            weight=now * mass,
        )
        return Loss(terms, metrics, logprob_gaps(logps, old, mask))

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        """Complete held-out prompts and score that: the loss on its own completions says nothing of how good they are."""
        return run.evaluate_completions(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"kl_weight": self.kl_weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_weight = state["kl_weight"]
