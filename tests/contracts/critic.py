"""Proximal policy optimisation with a critic, as a third party would write it: all it imports of the project is one module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlhf_core.plugin import (
    TRAINED,
    Batch,
    Evaluation,
    Loader,
    Loss,
    OnlineConfig,
    PolicyModel,
    Reference,
    Role,
    RunContext,
    TrainedModelConfig,
    Trainer,
    TrainingStage,
    ValueModel,
    Window,
)


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, end_values: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Estimate each token's advantage from rewards and values.

    Schulman et al. 2016 (arXiv 1506.02438), equations 10 and 16: δ_t = r_t + γ V(s_{t+1}) − V(s_t) and A_t = δ_t + γλ A_{t+1}.
    Time counts the tokens that the policy wrote: what stands between two of them (a tool's output) is the environment's answer,
    so s_{t+1} is the state before the next token inside the mask, and behind the last one it is the end.

    Args:
        rewards: (R, T), of each token.
        values: (R, T), of the state before each token.
        mask: (R, T) bool, the policy's tokens.
        end_values: (R,), of the state after the response: 0 where it ended, what it could still bring where it was cut off.

    Returns:
        (R, T), 0 outside the mask.
    """
    found = torch.zeros_like(values)
    advantage, after = torch.zeros_like(end_values), end_values
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        here = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * advantage
        advantage = torch.where(inside, here, advantage)
        after = torch.where(inside, values[:, t], after)
        found[:, t] = here * inside
    return found


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Return (R, T) rewards: −penalty for each token, and the response's score at the policy's last.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2, with the penalty of each token at that token.

    Args:
        scores: (R,). penalties: (R, T). mask: (R, T) bool, the policy's tokens.
    """
    later = mask.flip(1).cumsum(1).flip(1)  # (R, T): tokens of the policy from here on
    return mask * (scores[:, None] * (later == 1) - penalties)


def whitened(values: Tensor) -> Tensor:
    """Return (N,) values with mean 0 and variance 1; all 0 where they are equal."""
    centred = values - values.mean()
    return centred / centred.square().mean().sqrt().clamp(min=1e-8)


def clipped_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) with ρ = π / π_old: Schulman et al. 2017 (arXiv 1707.06347), equation 7.

    Args:
        logps: (…) token log-probabilities, nats. old_logps: those of the policy that wrote the tokens.
    """
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return ½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²), as in the authors' code of PPO; there is no equation of it."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


class CriticConfig(OnlineConfig):
    """Options of proximal policy optimisation."""

    group_size: int = Field(1, ge=1, description="Completions of each prompt; larger learns more from each.")
    critic: TrainedModelConfig | None = Field(
        None, description="The model that the critic begins with; null needs `share_backbone`."
    )
    share_backbone: bool = Field(
        False,
        description="Put the critic's head on the policy: one forward pass for both, and one backbone that serves both.",
    )
    head_learning_rate_factor: float = Field(
        1.0,
        gt=0,
        description="Learning rate of a head on the policy as a multiple of `learning_rate`; larger learns faster.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token; smaller counts late rewards less.")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="1 takes whole returns, smaller trusts the critic more: less variance, more bias."
    )
    clip: float = Field(
        0.2, gt=0, description="Most that a token's probability ratio counts beyond 1; larger moves further."
    )
    value_clip: float = Field(0.2, gt=0, description="Most that a value moves in a rollout; larger learns faster.")
    value_weight: float = Field(0.5, gt=0, description="Weight of the values' loss; larger fits values more closely.")
    cut_off: Literal["bootstrap", "score"] = Field(
        "bootstrap",
        description="What a response brings that `max_new_tokens` cut off: `bootstrap` what the critic expects of it, as it isn't"
        " over; `score` its score as it stands.",
    )
    kl_weight: float = Field(
        0.0,
        ge=0,
        description="Penalty on leaving the reference, per token and nat; larger stays nearer, 0 needs no reference.",
    )

    @model_validator(mode="after")
    def _one_critic(self) -> CriticConfig:
        if (self.critic is None) != self.share_backbone:
            raise ValueError("give either `critic`, a model's path, or `share_backbone: true`")
        if not self.share_backbone and self.head_learning_rate_factor != 1:
            raise ValueError(
                "head_learning_rate_factor needs share_backbone; that of a critic is critic.learning_rate_factor"
            )
        if not self.generation.temperature:
            raise ValueError("generation.temperature 0 draws nothing to learn from")
        return self


class CriticTrainer(Trainer[CriticConfig]):
    """Proximal policy optimisation: rollouts, a critic's advantages, and clipped steps of both."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = CriticConfig
    roles: ClassVar = {"policy": TRAINED, "value": TRAINED, "reference": Role(trained=False, optional=True)}
    splits_groups = True

    @property
    def value(self) -> ValueModel:
        return self.models["value"]  # type: ignore[return-value]

    def build(self, loader: Loader) -> Mapping[str, nn.Module | Reference]:
        config, policy = self.config, loader.main(PolicyModel)
        models: dict[str, nn.Module | Reference] = {"policy": policy}
        if config.critic is not None:
            models["value"] = loader.load("value", ValueModel, config.critic, seed=config.seed)
        else:
            models["value"] = ValueModel.on(policy, seed=config.seed)
            loader.learning_rate("value", config.head_learning_rate_factor)
        if config.kl_weight:
            models["reference"] = loader.reference(policy)
        return models

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window]:
        config = self.config
        for batch in stream:
            completions, scored = run.generate_and_score(batch, config.group_size, config.generation)
            scores = scored.total
            yield from run.windows(self._with_advantages(Batch.from_completions(batch, completions), scores, run))

    def _with_advantages(self, rollout: Batch, scores: Tensor, run: RunContext) -> Batch:
        config, mask = self.config, rollout.loss_mask
        logps, values, end_values = run.forward(rollout, self._forward, axis=("token", "token", "response"))
        penalties = torch.zeros_like(logps)
        if config.kl_weight:
            ratios = logps - self.reference.token_logps(rollout, temperature=config.generation.temperature)
            run.log("kl_to_reference", (ratios * mask).sum(), mask.sum())
            penalties = config.kl_weight * ratios
        # What the limit cut off isn't over: the critic says what it will score. Not besides its score as it stands, or
        # values would grow by a score with each rollout.
        goes_on = rollout["truncated"] & (config.cut_off == "bootstrap")
        scores, ends = scores.to(logps) * ~goes_on, end_values * goes_on
        rewards = token_rewards(scores, penalties, mask)
        raw = generalized_advantages(rewards, values, mask, ends, gamma=config.gamma, lam=config.gae_lambda)
        returns = (raw + values) * mask
        run.log("return", returns.sum(), mask.sum())
        run.log("value_error", ((returns - values) * mask).square().sum(), mask.sum())
        run.log("truncated", rollout["truncated"].sum(), rollout.num_responses)
        rows = torch.tensor(rollout.rows, dtype=torch.long)[rollout.owner.cpu()]  # (R,)
        advantages = torch.zeros_like(raw)
        advantages[mask] = run.over_step(whitened, raw[mask], rows=rows.repeat_interleave(mask.sum(1).cpu()).tolist())
        return rollout.attach(
            per_token={"old_logps": logps, "old_values": values, "advantages": advantages, "returns": returns}
        )

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (R, T) token log-probabilities, (R, T) values before the tokens, and (R,) values at the end."""
        states = self.policy.hidden_states(batch)
        logps = self.policy.token_logps(batch, temperature=self.config.generation.temperature, states=states)
        return logps, *self.value.values(batch, states=states if self.config.share_backbone else None)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Count tokens for the policy; responses for the critic, whose long ones weigh no more than its short ones."""
        return {"policy": batch.num_loss_tokens, "value": int(batch.loss_mask.any(1).sum())}

    def loss(self, batch: Batch) -> Loss:
        config, mask = self.config, batch.loss_mask
        logps, values, _ = self._forward(batch)
        policy = clipped_policy_loss(logps, batch["old_logps"], batch["advantages"], config.clip) * mask
        value = clipped_value_loss(values, batch["old_values"], batch["returns"], config.value_clip) * mask
        per_response = value.sum(1) / mask.sum(1).clamp(min=1)
        ratio = (logps.detach() - batch["old_logps"]).exp()
        outside = ((ratio - 1).abs() > config.clip) & mask
        metrics = {"clipped": (outside.sum(), mask.sum()), "ratio": ((ratio * mask).sum(), mask.sum())}
        return Loss({"policy": policy.sum(), "value": config.value_weight * per_response.sum()}, metrics)

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        """Return the rewards of one completion of each prompt."""
        _, scores = run.generate_and_score(batch, 1, self.config.generation)
        return Evaluation(metrics=scores.per_prompt(batch.num_prompts))
