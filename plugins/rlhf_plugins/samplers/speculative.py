"""Speculative decoding: the policy's own completions, several tokens per pass where a draft guesses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlhf_core.plugin import (
    BaseConfig,
    Completion,
    Drafter,
    Drafts,
    ModelDrafter,
    NgramDrafter,
    Sampler,
    SamplingConfig,
    SuffixDrafter,
    prompt_batch,
)


class SpeculativeConfig(SamplingConfig):
    """Options of speculative decoding: those of every completion that is drawn, and what guesses its tokens."""

    draft: Literal["model", "ngram", "suffix"] = Field(  # type: ignore[assignment]
        "model",
        description="What guesses: a smaller `model` of the same tokenizer, the role `draft_model`; `ngram`, what followed the"
        " same tokens earlier in the text; `suffix`, in earlier completions of the same prompt, too.",
    )
    draft_tokens: int = Field(
        16,
        ge=1,
        description="Most tokens guessed at a time; larger is faster where most guesses are right. As many are guessed as was"
        " measured to pay, down to none.",
    )


class SpeculativeDecoder(Sampler):
    """Draws the completions that `generate` draws, with guessed tokens of which one pass of the policy verifies several.

    The acceptance rule is that of speculative sampling, Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1, with each row's
    own random numbers, so that a draft changes no token.
    """

    api = 1
    on_policy = True
    Config = SpeculativeConfig
    config: SpeculativeConfig
    roles: ClassVar = {"policy": "policy", "draft_model": "policy"}

    @classmethod
    def roles_for(cls, config: BaseConfig) -> Mapping[str, str]:
        """Return all roles; look-ups need no draft model."""
        return (
            cls.roles if not isinstance(config, SpeculativeConfig) or config.draft == "model" else {"policy": "policy"}
        )

    def __init__(self, config: BaseConfig | None = None, **models: Any) -> None:
        """Take a configuration and models, as every sampler.

        Raises:
            ConfigError: as for every sampler.
            ModelError: the draft model has another vocabulary, or can't draft.
        """
        super().__init__(config, **models)
        self.drafts = Drafts(self._drafter(), most=self.config.draft_tokens)
        """What was learned about guesses so far, and how many were right: `drafts.counts`."""

    def _drafter(self) -> Drafter:
        if self.config.draft == "model":
            return ModelDrafter(self.models["draft_model"], self.policy, counted=self._count_draft)
        return NgramDrafter() if self.config.draft == "ngram" else SuffixDrafter()

    def _count_draft(self, tokens: int) -> None:
        self.forwarded["draft_model"] = self.forwarded.get("draft_model", 0) + tokens

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return n completions for each prompt, those of `generate` with the same seed, in the order in which they were drawn.

        `details` have `acceptance_rate`, the share of verified guesses that were right, and `tokens_per_pass` of the policy; they
        depend on the computer's speed.
        """
        return self.engine(seed, drafts=self.drafts).generate(prompt_batch(self.policy, prompts), n, self.config)
