"""The options of sampling completions for prompts into a file, beside those of the sampler. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, create_model, field_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.compression import LongPromptsConfig
from rlhf_core.config.online import RewardConfig
from rlhf_core.config.training import ModelConfig
from rlhf_core.infra.errors import PluginError

POLICY = "policy"
"""The role that the option `model` names."""


class PromptDataConfig(BaseConfig):
    """How prompts are read from rows, and encoded."""

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Column of the record type `prompt` → the data's own name, such as `prompt: question`.",
    )
    split: str = Field("train", min_length=1, description="Split of a hub dataset to answer.")
    chat_template: str | None = Field(
        None, description="Jinja template for chat messages, or the path of one, in place of the tokenizer's own."
    )
    wrap: Literal["none", "chat"] | None = Field(
        None,
        description="What prompts of plain text are: `chat` makes each the user's turn, `none` continues it as it is. Null takes"
        " what the model was trained with, else `none`.",
    )
    special_tokens: list[str] | None = Field(
        None,
        description="Special tokens that prompts may use, such as `<think>`: in a text they are encoded as themselves, all others"
        " as mere text. Null takes what the model was trained with, else none.",
    )


class PromptRunConfig(BaseConfig):
    """The prompts of a command that completes them."""

    prompts: list[str] = Field(
        min_length=1,
        description="Files of prompts (.jsonl, .json, .csv, .tsv, .parquet, .txt with one per line), hub names, texts, or `-` for"
        " the lines of standard input.",
    )
    limit: int | None = Field(None, ge=1, description="Rows to answer, from the first; larger answers more, null all.")
    dataset: PromptDataConfig = Field(default_factory=PromptDataConfig, description="How prompts are read and encoded.")
    compress: LongPromptsConfig | None = Field(
        None, description="How prompts over a length are compressed before the model reads them; null reads them whole."
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class SamplingRunConfig(PromptRunConfig):
    """What is sampled from and where it is written. `run_config_of` adds the models of a sampler's other roles."""

    FREE: ClassVar[tuple[str, ...]] = ("output", "prompts")
    """Options that don't determine a completion: the rows that prompts name are compared themselves."""

    method: str = Field(min_length=1, description="Name of the sampler, as `rlhf list samplers` shows it.")
    model: ModelConfig = Field(
        description="Model that completes the prompts: a directory, an adapter, a run's directory, a GGUF file or a hub name."
    )
    output: str | None = Field(None, description="File that rows are written to, *.jsonl; null prints them.")
    n: int = Field(1, ge=1, description="Completions per prompt; larger gives more of them, and costs more.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every draw; another value draws other completions.")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Prompts that the sampler gets at once; larger is faster, and a stop loses more of what isn't written yet."
        " Null takes as many as have 64 completions, on a GPU 512.",
    )
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of the models' matrix products; `auto` takes on a GPU the 16 bits that a model was saved in, and"
        " else float32.",
    )
    ids: bool = Field(False, description="Write the token ids of completions, too.")
    logprobs: bool = Field(
        False,
        description="Write the log-probability of each token, too: under the distribution that drew it, and under the model.",
    )

    @field_validator("output")
    @classmethod
    def _rows_are_json_lines(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith((".jsonl", ".ndjson")):
            raise ValueError("must end in .jsonl: rows are appended to it one by one")
        return value

    def rows_together(self, device: str) -> int:
        """Return how many prompts the sampler gets at once on a kind of device, `cpu` or `cuda`."""
        return self.batch_size or max(1, (64 if device == "cpu" else 512) // self.n)


def run_config_of(roles: Mapping[str, str], *, sampler: str) -> type[SamplingRunConfig]:
    """Return the options of sampling with a sampler of these roles: those of `SamplingRunConfig`, and one per other role.

    Args:
        roles: role → kind of model, as `Sampler.roles`.
        sampler: its name, for messages.

    Raises:
        PluginError: a role is named as an option of every sampling run.
    """
    own: dict[str, Any] = {}
    for role, kind in roles.items():
        if role == POLICY:
            continue
        if role in SamplingRunConfig.model_fields:
            raise PluginError(
                f"a sampler's role can't be named `{role}`, which is an option of every sampling run",
                place=f"sampler `{sampler}`",
            )
        if kind == "policy":
            text = f"Model of the sampler's role `{role}`, given as `model` is; null where its options need none."
            own[role] = (ModelConfig | None, Field(None, description=text))
        elif kind == "policies":
            text = (
                f"Models of the sampler's role `{role}`, each given as `model` is, one flag per model; more need more memory and"
                " time. Null where its options need none."
            )
            own[role] = (list[ModelConfig] | None, Field(None, min_length=1, description=text))
        else:
            text = (
                f"Reward of the sampler's role `{role}`: a name, `package.module:function`, or a reward model's path; null where"
                " its options need none."
            )
            own[role] = (list[RewardConfig] | None, Field(None, min_length=1, description=text))
    if POLICY not in roles:
        own["model"] = (ModelConfig | None, Field(None, description="Not used: the sampler has no role `policy`."))
    return create_model("SamplingRun", __base__=SamplingRunConfig, **own)
