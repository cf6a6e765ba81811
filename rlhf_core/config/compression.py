"""The options of compressing long prompts. Importing this imports no torch."""

from __future__ import annotations

from pydantic import Field

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
    keep_start: int = Field(
        0,
        ge=0,
        description="Tokens at a prompt's start that a compressor leaves as they are, such as a system message's.",
    )
    keep_end: int = Field(
        64,
        ge=1,
        description="Tokens at the end of a prompt that aren't compressed: the question; larger compresses less.",
    )
