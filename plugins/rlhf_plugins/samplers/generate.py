"""Sample completions as they are drawn: no search, no choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_core.plugin import Completion, Sampler, SamplingConfig, prompt_batch


class GenerateConfig(SamplingConfig):
    """Options of plain sampling: those of every completion that is drawn."""


class GenerateSampler(Sampler):
    """Draws n completions per prompt from the policy, in the order in which they were drawn, without scores."""

    api = 1
    Config = GenerateConfig
    config: GenerateConfig
    on_policy = True

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return n completions for each prompt, in the order in which they were drawn; none has a score."""
        return self.engine(seed).generate(prompt_batch(self.policy, prompts), n, self.config)
