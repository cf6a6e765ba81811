"""The options of compressing long prompts. Importing this imports no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf_core.config.base import BaseConfig


class CompressionConfig(BaseConfig):
    """Long prompts are compressed before a policy reads them. A path alone means `{compressor: …}`."""

    alone = "compressor"

    over: int = Field(
        1024, ge=1, description="Most tokens of a prompt that is read whole; larger leaves more prompts whole."
    )
    ratio: float = Field(
        4.0, gt=1, description="Tokens of a context per token that is left of it; larger costs less and loses more."
    )
    compressor: str | None = Field(
        None,
        min_length=1,
        description="Directory of a trained context compressor, whose soft tokens stand for the context; null takes the sentences"
        " that matter most, without any model.",
    )
    keep_start: int | None = Field(
        None,
        ge=0,
        description="Tokens at a prompt's start that a compressor leaves as they are, such as a system message's. Null takes"
        " those of its training.",
    )
    keep_end: int | None = Field(
        None,
        ge=1,
        description="Tokens at the end of a prompt that aren't compressed: the question; larger compresses less. Null takes those"
        " of the compressor's training, without one 64.",
    )


class LongPromptsConfig(CompressionConfig):
    """Long prompts are compressed before a policy reads them, by what these options alone name."""

    @model_validator(mode="after")
    def _options_are_used(self) -> LongPromptsConfig:
        if self.keep_start is not None and self.compressor is None:
            raise ValueError(
                "keep_start has no meaning without a compressor: sentences are taken from anywhere but the end"
            )
        return self
