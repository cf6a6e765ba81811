"""How completions are drawn from a model: by rollouts, samplers, and for the texts that a run keeps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig


class SamplingConfig(BaseConfig):
    """How completions are drawn: repetition penalty, then temperature, top-k, top-p and min-p, in transformers' order."""

    max_new_tokens: int = Field(
        256, ge=1, description="Most tokens in a completion, its end token included; larger allows longer answers."
    )
    temperature: float = Field(
        1.0, ge=0, description="Divisor of the logits; larger draws more varied tokens, 0 always the most likely one."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw among the most likely tokens whose probabilities add up to it; smaller draws fewer different tokens.",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Draw among this many of the most likely tokens; larger draws more different ones, 0 draws among all.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Draw among the tokens that are at least this share as likely as the most likely one, after temperature;"
        " larger draws fewer different tokens, 0 draws among all.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="Divisor of the positive logits, and factor of the negative ones, of tokens that the prompt or the"
        " completion already holds; larger repeats less, below 1 repeats more.",
    )
    min_new_tokens: int = Field(
        0,
        ge=0,
        description="Tokens that a completion has before it may end with an end token, a stop id, a stop string or for too little"
        " confidence; larger makes longer answers.",
    )
    stop: list[str] = Field(
        default_factory=list,
        description="Texts that end a completion where they appear in it, and that its text is without; more of them end it"
        " earlier. A plain text is a list of one.",
    )
    stop_ids: list[int] = Field(
        default_factory=list,
        description="Token ids that end a completion besides its end tokens, and that its text is without; more of them end"
        " it earlier. A plain number is a list of one.",
    )

    min_confidence: float | None = Field(
        None,
        ge=0,
        description="A completion ends where the mean confidence of its last `confidence_window` tokens is below it (Fu et al."
        " 2025), in nats; larger ends more of them, earlier. 0 ends none and reports each token's confidence; null reports none.",
    )
    confidence_window: int = Field(
        32,
        ge=1,
        description="Tokens whose mean confidence decides (min_confidence); larger reacts later, and less to single tokens. A"
        " completion with fewer tokens isn't ended by it.",
    )
    confidence_top: int = Field(
        20,
        ge=1,
        description="A token's confidence is the mean of -log p over so many of the most likely tokens (min_confidence); larger"
        " counts less likely ones, too.",
    )
    draft: Literal["ngram", "suffix"] | None = Field(
        None,
        description="Guess next tokens, several of which one pass verifies: `ngram`, what followed the same tokens earlier in the"
        " text; `suffix`, in earlier completions of the same prompt, too. Faster where texts repeat, and as many are guessed as"
        " pays; the same completions, but the last bits of their log-probabilities vary from run to run. Null guesses none.",
    )

    @field_validator("stop", "stop_ids", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, stop: list[str]) -> list[str]:
        for text in stop:
            if not text:
                raise ValueError("an empty text is in every completion: leave it out")
            if "\ufffd" in text:
                raise ValueError("U+FFFD stands for bytes that aren't text, as half a character: leave it out")
        return stop

    @field_validator("stop_ids", mode="before")
    @classmethod
    def _stop_ids_are_ids(cls, stop_ids: Any) -> Any:
        for token in stop_ids if isinstance(stop_ids, list) else []:
            if isinstance(token, bool) or (isinstance(token, int) and token < 0):
                raise ValueError("token ids are whole numbers, 0 or larger")
        return stop_ids

    @model_validator(mode="after")
    def _room_for_the_least(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"`min_new_tokens` ({self.min_new_tokens}) is above `max_new_tokens` ({self.max_new_tokens}): lower the first or"
                " raise the second"
            )
        return self

    @model_validator(mode="after")
    def _confidence_can_end(self) -> SamplingConfig:
        if self.min_confidence is None:
            for name in ("confidence_window", "confidence_top"):
                if getattr(self, name) != SamplingConfig.model_fields[name].default:
                    raise ValueError(f"{name} has no meaning without `min_confidence`: set it, 0 to end no completion")
        elif self.min_confidence > 0 and self.confidence_window > self.max_new_tokens:
            raise ValueError(
                f"no completion of at most {self.max_new_tokens} tokens (`max_new_tokens`) has the {self.confidence_window} of"
                " `confidence_window`, so `min_confidence` would end none: lower the window"
            )
        return self
