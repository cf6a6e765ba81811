"""How far the engine's log-probabilities are from the trainer's before the first update; a run may not start with too much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.infra.errors import NumbersError

if TYPE_CHECKING:
    from rlhf_core.training.context import RunContext

log = logging.getLogger(__name__)

_MOST = 16
"""Completions that are compared."""
_ALLOWED = {"float32": 1e-3, "bf16": 0.25, "fp16": 0.1}
"""Most nats per token by which they may differ on average, by the precision of products."""
_USUAL = 0.2
"""Share of it from which the user is warned."""


class FirstGap:
    """Compares some completions of the first rollout of a process, before the first update; the run ends where they differ.

    A large gap means that policy and engine compute different distributions, so that every importance ratio is wrong.

    Args:
        config: of the method.
        notify: called with the name and fields of an event.
    """

    def __init__(self, config: TrainerConfig, notify: Callable[..., None]) -> None:
        asked = config.max_logprob_gap if isinstance(config, OnlineConfig) else None
        self.allowed = _ALLOWED[config.precision] if asked is None else asked
        self._notify, self._done = notify, False

    def __call__(self, run: RunContext, batch: Batch, completions: Sequence[Sequence[Completion]]) -> None:
        """Measure the gap, where that hasn't been done; every process takes part.

        Raises:
            NumbersError: the mean over tokens is above the bound.
        """
        if self._done:
            return
        self._done = True
        parts = run.gather([_difference(run, batch, completions)])
        tokens = sum(part[1] for part in parts)
        if not tokens:
            return
        mean, largest = sum(part[0] for part in parts) / tokens, max(part[2] for part in parts)
        log.info(
            "engine and trainer differ by %.1e nats per token (at most %.1e), over %d tokens before the first update",
            mean, largest, tokens,
        )  # fmt: skip
        self._notify("logprob_gap_measured", step=run.step, mean=mean, max=largest, tokens=tokens)
        if not mean <= self.allowed:
            raise NumbersError(
                "the engine's log-probabilities aren't those of the trainer, so the ratios of updates would be wrong",
                place=f"step {run.step + 1}",
                got=f"{mean:.3g} nats per token between them, over {tokens} tokens",
                fix=f"up to {self.allowed:g} is allowed: set a larger `max_logprob_gap` if you know why, or `precision: float32`",
            )
        if mean > _USUAL * self.allowed:
            log.warning(
                "engine and trainer differ by %.2g nats per token, which is much for this precision; above %g the run"
                " ends (`max_logprob_gap`)",
                mean, self.allowed,
            )  # fmt: skip


def _difference(run: RunContext, batch: Batch, completions: Sequence[Sequence[Completion]]) -> tuple[float, int, float]:
    """Return sum, number and maximum of the differences over the tokens of some completions that the policy wrote."""
    policy: Any = run.trainer.policy
    flat = [(prompt, one) for prompt, group in enumerate(completions) for one in group if one.raw_logprobs]
    step = max(1, -(-len(flat) // _MOST))
    chosen = flat[::step]
    if not chosen:
        return 0.0, 0, 0.0
    prompts = list(dict.fromkeys(prompt for prompt, _ in chosen))
    groups = [[one for prompt, one in chosen if prompt == each] for each in prompts]
    bare = replace(batch.select(prompts), per_prompt={}, per_response={}, per_token={})
    made = Batch.from_completions(bare, groups)
    logps = run.forward(made, lambda part: policy.token_logps(part), axis="token")
    assert isinstance(logps, torch.Tensor)
    apart = (logps - made["raw_logps"]).abs()[made.loss_mask].double()
    return float(apart.sum()), apart.numel(), float(apart.max())
