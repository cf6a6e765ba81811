"""Advantages, returns and losses with a value model: what PPO computes from rewards and values.

Axes: R responses, T tokens, N entries of the whole step. All functions are pure, and compute in the dtype of their inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, end_values: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Return each token's advantage, A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    Schulman et al. 2016 (arXiv 1506.02438), equations 10 and 16. Time counts the policy's tokens alone: what stands between two
    of them (a tool's output) is the environment's answer, so s_{t+1} is the state before the next token inside the mask, and
    after the last one it is the end. By hand, for γ = λ = ½, rewards 0, 1, 4, values 3, 1, 2 and an end of 0: δ = −2.5, 1, 2 and
    A = −2.125, 1.5, 2.

    The return of a token, which its value is trained towards, is A_t + V(s_t): TD(λ).

    Args:
        rewards: (R, T), of each token.
        values: (R, T), of the state before each token.
        mask: (R, T) bool, the policy's tokens; what the others hold is ignored.
        end_values: (R,), of the state after each response: 0 where the response ended, and what it could still bring where
            a limit truncated it.
        gamma: γ, the discount per token; 1 counts late rewards fully.
        lam: λ; 0 trusts the next value, 1 takes the whole return.

    Returns:
        (R, T), 0 outside the mask.
    """
    advantages = torch.zeros_like(values)
    advantage, next_value = torch.zeros_like(end_values), end_values
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        here = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantage = torch.where(inside, here, advantage)
        next_value = torch.where(inside, values[:, t], next_value)
        advantages[:, t] = torch.where(inside, here, 0.0)
    return advantages


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Return (R, T) rewards: each token's penalty subtracted, and the response's score added at the policy's last token.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2, R = r − β log(π / ρ), with each token's share of the logarithm at that
    token. For a score of 3, penalties of ½ and a mask of 1, 1, 0, 1: −½, −½, 0, 2½.

    Args:
        scores: (R,).
        penalties: (R, T), such as β (log π − log π_ref), the estimator k1 of the KL.
        mask: (R, T) bool, the policy's tokens; rewards are 0 at the others.
    """
    later = mask.flip(1).cumsum(1).flip(1)  # (R, T): tokens of the policy from here on
    rewards = torch.where(later == 1, scores[:, None], 0.0) - penalties
    return torch.where(mask, rewards, 0.0)


def whitened(values: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Return values divided by their standard deviation, with mean 0, or with their mean as it was.

    Huang et al. 2024 (arXiv 2403.17031) whiten rewards and keep their mean, and whiten advantages to mean 0. The deviation is
    over N, not N − 1: 1 and 5 give −1 and 1, and with `keep_mean` 2 and 4. Pass the entries of the whole step
    (`RunContext.over_step`), and of tokens only those inside the mask.

    Args:
        values: (N,).

    Returns:
        (N,); where all values are equal, their mean (0 without `keep_mean`). A deviation below 1e-4 counts as 1e-4: what a KL of
        two equal policies is by rounding must not become a whole advantage.
    """
    if not len(values):
        return values
    mean = values.mean()
    centred = values - mean
    deviation = centred.square().mean().sqrt()
    # Equal values differ from their mean by rounding, which must not be scaled up.
    alike = deviation <= 1e-6 * mean.abs() + 1e-12
    scaled = torch.where(alike, 0.0, centred / deviation.clamp(min=1e-4))
    return scaled + mean if keep_mean else scaled


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """Return ½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) for each token; ½ (V − R)² where `clip` is None.

    Schulman et al. 2017 (arXiv 1707.06347), equation 9, has the square; the clipping is of their code (OpenAI baselines, ppo2),
    not of the paper. Where the clipped value is the further one, the loss is constant: a value moves by at most ε in a
    rollout. For V = 1, V_old = 0, ε = 0.2: R = 2 gives ½ · 1.8² = 1.62, and R = 0 gives ½.

    Args:
        values: V, of any shape, with gradient.
        old_values: V_old, when the rollout was made.
        returns: R, what values are trained towards.
        clip: ε.
    """
    errors = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return errors / 2


def adapted_kl_weight(weight: float, kl: float, *, target: float, gain: float = 0.1) -> float:
    """Return the weight of the KL penalty for the next rollout: β (1 + K e) with e = clip(KL / target − 1, −0.2, 0.2).

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, with K = 0.1. For β = 1, K = 0.1 and a target of 2: a KL of 2.2 gives
    1.01, and any KL from 2.4 on 1.02.

    Args:
        weight: β until now.
        kl: the KL to the reference that the last rollout had, in the unit of `target`.
        gain: K; larger follows the target faster.
    """
    return weight * (1 + gain * min(max(kl / target - 1, -0.2), 0.2))


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Return 1 − Var(R − V) / Var(R): 1 for perfect values, 0 for a constant, below 0 for worse than that.

    Args:
        values, returns: (N,) V and R.

    Returns:
        A scalar; 0 where all returns are equal.
    """
    if not len(returns):
        return returns.new_zeros(())
    spread, error = (x.double().var(correction=0) for x in (returns, returns - values))
    found = torch.where(spread > 1e-12, 1 - error / spread.clamp(min=1e-12), 0.0)
    return found.to(returns.dtype)
