"""The options of `rlhf evaluate --tasks`. Importing this imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from rlhf_core.config.base import BaseConfig, between_commas
from rlhf_core.config.training import ModelConfig

FEWSHOT_SEED = 1234
"""lm-eval's own seed for choosing a prompt's examples, with which published numbers are made."""


class LmEvalConfig(BaseConfig):
    """How tasks of lm-eval are run."""

    limit: int | None = Field(None, ge=1, description="Rows of each task; larger measures it better, null takes all.")
    num_fewshot: int | None = Field(
        None,
        ge=0,
        description="Examples in each prompt; larger makes longer prompts. Null takes each task's own number, and a task that"
        " sets 0 keeps it.",
    )
    apply_chat_template: bool | str = Field(
        False, description="Write prompts as chats with the model's template; a text names one of several templates."
    )
    system_instruction: str | None = Field(
        None, description="The system message of each chat, or the text in front of each prompt."
    )
    fewshot_as_multiturn: bool = Field(
        True, description="With a chat template, make examples turns of their own; false puts them into one turn."
    )
    generation: dict[str, Any] = Field(
        default_factory=dict,
        description="Options over those of the tasks that generate: `max_gen_toks`, `temperature`, `do_sample`, `top_p` …",
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="Further variables of the chat template, such as `enable_thinking`."
    )
    bootstrap: int = Field(
        100_000,
        ge=0,
        description="Resamples behind the standard error of a metric that has no formula for it; larger is more exact and"
        " slower, 0 gives no standard errors.",
    )
    seed: int = Field(0, ge=0, description="Seed of sampled texts.")
    fewshot_seed: int = Field(FEWSHOT_SEED, ge=0, description="Seed of the choice of examples; lm-eval's own is 1234.")
    allow_code: bool = Field(
        False, description="Run tasks that execute what the model writes, on this computer, which is no sandbox."
    )


class LmEvalRunConfig(LmEvalConfig):
    """Tasks of lm-eval, and the model that does them."""

    tasks: list[str] = Field(
        min_length=1,
        description="Names of lm-eval's tasks, groups or tags, or task files (.yaml), separated by commas; more take longer.",
    )
    model: ModelConfig = Field(
        description="The model: a directory, an adapter's or a run's directory, a GGUF file or a hub name."
    )
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of matrix products; `auto` takes on a GPU the 16 bits that the model was saved in, else float32.",
    )
    include_path: list[str] = Field(
        default_factory=list,
        description="Directories with further task files; they come before lm-eval's own of the same name.",
    )
    output: str | None = Field(
        None, min_length=1, description="Directory that gets lm_eval.json: every metric, and its value for each row."
    )

    _names = field_validator("tasks", "include_path", mode="before")(between_commas)
