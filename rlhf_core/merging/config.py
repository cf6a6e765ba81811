"""The configuration of a merge: input models with their weights, a method with its options, and how the result is written."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.merging.layer_values import Value


class LayerRun(BaseConfig):
    """A run of layers of one model."""

    model: str | None = Field(
        min_length=1,
        description="Directory, adapter or hub name; null where the input model has none of these layers, and takes no part.",
    )
    layers: tuple[int, int] = Field(description="The first layer, counted from 0, and the one after the last.")

    @model_validator(mode="after")
    def _has_layers(self) -> LayerRun:
        """Raise where the run has no layer."""
        if not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"there are no layers from {self.layers[0]} to {self.layers[1]}")
        return self


class ModelEntry(BaseConfig):
    """One input model of a merge."""

    model: str | list[LayerRun] = Field(
        min_length=1,
        description="Directory, adapter or hub name; or a list of `{model, layers}`, runs of layers to stack in that order.",
    )
    weight: Value = Field(
        1.0,
        description="Its weight; larger counts more. A list is a gradient over the layers, a group per-layer values.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the method for this model alone, such as `density`; a number may differ between layers, too.",
    )


class MergeConfig(BaseConfig):
    """What to merge and how. In a file the method's options stand beside these keys, by name."""

    KEYS: ClassVar[tuple[str, ...]]

    method: str = Field(min_length=1, description="Name of the method, as `rlhf list mergers` shows it.")
    base: str | list[LayerRun] | None = Field(
        None,
        description="Base model, which task vectors are differences from; the result has its configuration and tokenizer.",
    )
    models: list[ModelEntry] = Field(min_length=1, description="Input models.")
    output: str | None = Field(None, description="Directory that is written; it must be empty, or not exist.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="The method's options by name; a number may differ between layers, as a weight may.",
    )
    tokenizer: str | None = Field(
        None,
        description="Tokenizer of the result where those of the input models differ: `base`, `union`, or a path; rows of the"
        " embeddings are then matched by the tokens' text. Null refuses models whose vocabularies differ.",
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        description="The embeddings are padded with rows of zeros to a multiple of this many; null adds none.",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template of the result: `alpaca`, `chatml`, `exaone`, `llama3`, `mistral`, a Jinja text, or `auto`, the"
        " one that most input models have; null keeps the one that comes with the tokenizer.",
    )
    dtype: Literal["float32", "bf16", "fp16"] | None = Field(
        None,
        description="Dtype of the written weights; null keeps that of the input models (the wider where they differ).",
    )
    shard_size: int = Field(
        5_000_000_000, ge=1, description="Most bytes in a shard; larger makes fewer files. A tensor is never split."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Tensors merged at once, each in its own process or thread; null takes the processor's cores, at most four"
        " for a method that needs whole tensors.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device that computes; `auto` takes an NVIDIA GPU where there is one."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of random methods; another value draws other entries.")
    hash_inputs: bool = Field(
        False, description="Record the SHA-256 of each input file in the model card; true reads every file once more."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """Accept a name alone as an input model of weight 1, which is what people type."""
        if isinstance(value, list | tuple):
            return [{"model": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _other_spellings(cls, value: Any) -> Any:
        """Accept dtypes as torch and config.json write them."""
        return (
            {"bfloat16": "bf16", "float16": "fp16", "fp32": "float32"}.get(value, value)
            if isinstance(value, str)
            else value
        )

    @model_validator(mode="after")
    def _base_is_given(self) -> MergeConfig:
        """Raise where the base's tokenizer is asked for and there is no base."""
        if self.tokenizer == "base" and self.base is None:
            raise ValueError("`tokenizer: base` needs a `base`")
        return self


MergeConfig.KEYS = tuple(name for name in MergeConfig.model_fields if name != "options")
