"""What is to be merged: models with their weights, a method with its options, and how the result is written."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.merging.weights import Value


class LayerRun(BaseConfig):
    """A run of layers of one model."""

    model: str | None = Field(
        min_length=1, description="Directory, adapter or hub name; null where the entry takes no part in these layers."
    )
    layers: tuple[int, int] = Field(description="The first layer, counted from 0, and the one after the last.")

    @model_validator(mode="after")
    def _runs_forwards(self) -> LayerRun:
        if not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers from {self.layers[0]} to {self.layers[1]} are none")
        return self


class ModelEntry(BaseConfig):
    """One model of a merge."""

    model: str | list[LayerRun] = Field(
        min_length=1,
        description="Directory, adapter or hub name; or a list of `{model, layers}`, runs of layers put one on the other.",
    )
    weight: Value = Field(
        1.0,
        description="Its weight; larger counts more. A list is a gradient over the layers, a group a value by place.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the method for this model alone, such as `density`; a number may vary by layer as a weight may.",
    )


class MergeConfig(BaseConfig):
    """What to merge and how. In a file the method's options stand beside these keys, by name."""

    KEYS: ClassVar[tuple[str, ...]]

    method: str = Field(min_length=1, description="Name of the method, as `rlhf list mergers` shows it.")
    base: str | list[LayerRun] | None = Field(
        None, description="Model that differences are taken from; it also gives configuration and tokenizer."
    )
    models: list[ModelEntry] = Field(min_length=1, description="Models that are merged.")
    output: str | None = Field(None, description="Directory that is written; it must not exist, or be empty.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="The method's options by name; a number may vary by layer as a weight may."
    )
    tokenizer: str | None = Field(
        None,
        description="Which tokenizer the result has where the models' differ: `base`, `union`, or a path; rows are then lined up"
        " by the tokens' text. Null refuses models whose vocabularies differ.",
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        description="The embeddings' rows are made a multiple of this, with rows of zeros; null adds none.",
    )
    chat_template: str | None = Field(
        None,
        description="The result's chat template: `alpaca`, `chatml`, `exaone`, `llama3`, `mistral`, a Jinja text, or `auto`, that"
        " of most models; null keeps the one that comes with the tokenizer.",
    )
    dtype: Literal["float32", "bf16", "fp16"] | None = Field(
        None, description="Type of the written values; null keeps the inputs' (the wider where they differ)."
    )
    shard_size: int = Field(
        5_000_000_000, ge=1, description="Most bytes in a weight file; larger makes fewer files. A tensor is never cut."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Tensors merged at once, in a process or a thread each; null takes the processor's cores, at most four for a"
        " method that needs whole tensors.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where values are computed; `auto` takes an NVIDIA GPU where there is one."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of random methods; another value draws other entries.")
    hash_inputs: bool = Field(
        False, description="Record the SHA-256 of each input file in the model card, which reads them once more."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        # A name alone is a model of weight one, which is what people type.
        if isinstance(value, list | tuple):
            return [{"model": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _other_spellings(cls, value: Any) -> Any:
        # As torch and config.json write it.
        return (
            {"bfloat16": "bf16", "float16": "fp16", "fp32": "float32"}.get(value, value)
            if isinstance(value, str)
            else value
        )

    @model_validator(mode="after")
    def _base_is_there(self) -> MergeConfig:
        if self.tokenizer == "base" and self.base is None:
            raise ValueError("`tokenizer: base` needs a `base`")
        return self


MergeConfig.KEYS = tuple(name for name in MergeConfig.model_fields if name != "options")
