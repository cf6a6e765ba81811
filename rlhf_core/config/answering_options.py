"""Options of a language model that is asked questions: a judge, a critic. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_core.config.base import BaseConfig


class AnsweringModelConfig(BaseConfig):
    """A language model that answers chats: a local one, or one at an OpenAI-compatible address."""

    model: str = Field(
        min_length=1,
        description="Directory or hub name of a local model; with `base_url` the model's name at that address.",
    )
    base_url: str | None = Field(
        None, description="OpenAI-compatible address, such as `http://127.0.0.1:8000/v1`; null loads `model` here."
    )
    key_variable: str | None = Field(
        None, description="Name of the environment variable that holds the address's key; null sends none."
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32", description="Precision of a local model; 16 bits are faster and take half the memory."
    )
    system: str | None = Field(None, description="System message to the model, as it is; null sends none.")
    max_tokens: int = Field(512, ge=1, description="Most tokens of an answer; larger allows longer explanations.")
    temperature: float = Field(0.0, ge=0, description="Temperature of the model; larger varies its answers more.")
    timeout: float = Field(
        60.0, gt=0, description="Seconds that one request may take; larger waits longer for slow servers."
    )
    retries: int = Field(
        5, ge=0, description="Further tries after a refusal, an error or no answer; larger waits longer."
    )

    @model_validator(mode="after")
    def _keys_are_for_addresses(self) -> AnsweringModelConfig:
        if self.key_variable is not None and self.base_url is None:
            raise ValueError("`key_variable` needs a `base_url`: a local model has no key")
        return self
