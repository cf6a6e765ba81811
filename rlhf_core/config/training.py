"""Options that every method that trains has, in groups.

Flat for the options that everyone sets, small named groups for the rest. Every field's description says what a larger (or
the other) value does. Importing this module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig, refused
from rlhf_core.config.elastic_options import EWCConfig
from rlhf_core.config.metric_direction import better_when
from rlhf_core.config.sampling_options import SamplingConfig
from rlhf_core.infra.errors import ConfigError

LORA_RATE_FACTOR = 10
"""Best learning rate of LoRA adapters as a multiple of that of every weight (Schulman et al. 2025, "LoRA Without Regret")."""
BYTES_PER_WEIGHT = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "muon": 4.0}
"""Bytes that an optimiser keeps per weight that it steps: AdamW two float32 moments, in 8 bits with a scale per 256 of each."""
DEFAULT_MAX_LENGTH = 1024
"""What `max_length` is at most where it isn't set."""


RowFormat = Literal["auto", "columns", "alpaca", "messages", "sharegpt", "pairs", "texts", "dialogue", "text"]
"""Names of the shapes that rows may have."""


class TrainingStage(StrEnum):
    """Which part of the pipeline a trainer belongs to."""

    SFT = "sft"
    REWARD = "reward"
    PREFERENCE = "preference"
    POLICY = "policy"
    COMPRESSION = "compression"


class LoraConfig(BaseConfig):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) instead of training every weight."""

    rank: int = Field(16, ge=1, description="Rank of the update; larger learns more and costs more memory.")
    alpha: float = Field(
        32.0, gt=0, description="Scale of the update (alpha / rank); larger makes it act more strongly."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input; larger regularises more.")
    target_modules: list[str] | str = Field(
        "all-linear",
        description="Modules that get an adapter, as peft takes them: names or ends of names in a list (`q_proj`,"
        " `self_attn.q_proj`), a regular expression of whole names as one text, or `all-linear`. More modules learn more and"
        " cost more.",
    )
    exclude_modules: list[str] | str = Field(
        default_factory=list,
        description="Modules that get none though they are targets, written as those are; more of them train less.",
    )
    target_parameters: list[str] = Field(
        default_factory=list,
        description="Parameters that aren't modules and get an adapter, such as `mlp.experts.gate_up_proj` of a mixture of"
        " experts; more of them learn more and cost more.",
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Modules that are trained whole and saved with the adapter, such as `embed_tokens` and `lm_head`; more of"
        " them learn more and cost much more.",
    )
    use_rslora: bool = Field(
        False,
        description="Scale the update by alpha / √rank (rank-stabilised LoRA), which acts more strongly at high ranks.",
    )
    use_dora: bool = Field(
        False, description="Train the weights' magnitudes apart from their directions (DoRA): often better, and slower."
    )
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = Field(
        "default",
        description="How the update's first half starts (the other half is 0, so that nothing changes at first): uniform as in"
        " the reference implementation, or `gaussian`; `orthogonal` starts both halves so that their product is 0.",
    )
    quantize: Literal["none", "4bit", "8bit"] = Field(
        "none", description="Quantisation of the frozen base (QLoRA); fewer bits save memory and lose precision."
    )


class CheckpointConfig(BaseConfig):
    """When checkpoints are saved and how many are kept."""

    minutes: float | None = Field(
        10.0,
        gt=0,
        description="Most minutes of training between checkpoints; larger saves less often and loses more to a crash, null saves"
        " by steps alone. A checkpoint is always saved at the end and at a stop (Ctrl-C, SIGTERM).",
    )
    every: int = Field(
        0,
        ge=0,
        description="Steps between checkpoints, besides those by time; larger saves less often, 0 saves by time alone.",
    )
    keep: int = Field(
        2, ge=2, description="Checkpoints that are kept; larger keeps more to fall back to and takes more disk."
    )


class SamplesConfig(BaseConfig):
    """What the model says while it trains, kept in `samples.jsonl`: completions of fixed prompts, and some of each rollout."""

    alone = "prompts"

    prompts: list[str | list[dict[str, Any]] | dict[str, Any]] = Field(
        default_factory=list,
        description="Prompts that are completed at the start, at each evaluation and at the end, each time with the same random"
        " numbers: texts, chats (lists of messages), or paths of files of rows (`{path: NAME}` for a folder or a hub name); more"
        " of them show more and take longer.",
    )
    limit: int = Field(8, ge=1, description="Most prompts to take from each file; larger shows more and takes longer.")
    every: int | None = Field(
        None,
        ge=1,
        description="Steps between completions of the prompts, instead of at each evaluation; larger writes them less often.",
    )
    n: int = Field(1, ge=1, description="Completions per prompt; larger shows better how much they vary.")
    generation: SamplingConfig | None = Field(
        None,
        description="How they are drawn; null takes the options of the method's own `generation`, else the defaults.",
    )
    rollouts: int = Field(
        4,
        ge=0,
        description="Completions that are kept of each rollout and of each evaluation of an online method, with their rewards;"
        " larger keeps more, 0 none.",
    )

    @model_validator(mode="after")
    def _options_of_prompts(self) -> SamplesConfig:
        """Refuse options of the fixed prompts where there are none."""
        for name in () if self.prompts else ("limit", "every", "n", "generation"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` needs `prompts`, which are to be completed")
        return self

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_prompt_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, Path):
            return [str(value)]
        if isinstance(value, list | tuple):
            return [str(item) if isinstance(item, Path) else item for item in value]
        return [value] if isinstance(value, str | Mapping) else value


class RolloutsConfig(BaseConfig):
    """What is kept of the rollouts of an online method in `rollouts.jsonl`, for `rlhf rollouts`."""

    groups: int | None = Field(
        8,
        ge=0,
        description="Groups (prompts with all of their completions) that are kept of each rollout, evenly spaced; larger keeps"
        " more, 0 none, null all.",
    )
    megabytes: float = Field(
        1000.0,
        gt=0,
        description="Largest size of the file; a rollout that doesn't fit any more isn't kept. Larger keeps more.",
    )
    whole: bool = Field(
        False,
        description="Keep every group, with tokens and log-probabilities, so that another run can `replay` it: about 25 bytes"
        " per token more. False keeps texts and figures of some groups.",
    )
    probabilities: bool = Field(
        True,
        description="Keep the ids and log-probabilities of the tokens of groups that aren't kept whole, for `rlhf report`, which"
        " shades tokens by them: about 8 bytes per token more. False keeps texts and figures alone.",
    )
    show: int = Field(
        50,
        ge=0,
        description="Steps between tables of a few completions on the console, the first after the first rollout; larger shows"
        " fewer, 0 none.",
    )

    @model_validator(mode="after")
    def _whole_keeps_every_group(self) -> RolloutsConfig:
        if self.whole and self.groups is not None and "groups" in self.model_fields_set:
            raise ValueError("`whole` keeps every group: leave `groups` out")
        return self


class LoggingConfig(BaseConfig):
    """What is reported while training. `metrics.jsonl` is always written, one row per step."""

    every: int = Field(1, ge=1, description="Steps between lines on the console; larger prints less.")
    samples: SamplesConfig = Field(
        default_factory=SamplesConfig, description="What the model says while it trains, for `rlhf samples`."
    )
    rollouts: RolloutsConfig = Field(
        default_factory=RolloutsConfig, description="What an online method was trained on, for `rlhf rollouts`."
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list,
        description="Trackers that mirror the metrics and samples; more of them mirror to more places.",
    )
    project: str = Field("rlhf", min_length=1, description="Project name that trackers group runs under.")
    progress: bool = Field(True, description="Show a progress bar where there is a terminal; false shows none.")
    report: bool | None = Field(
        None,
        description="Write `report.html` into the run directory at evaluations, where that takes no more than a fiftieth of the"
        " time, and at the end. Null does so once the run has lasted a minute, true from the first, false never.",
    )


class _WatchedMetric(BaseConfig):
    """A metric of evaluations, and in which direction it improves."""

    metric: str = Field("eval_loss", min_length=1, description="Name of the metric that is watched, as logged.")
    mode: Literal["auto", "min", "max"] = Field(
        "auto",
        description="Whether a smaller (min) or larger (max) value is better; `auto` knows it of losses, rewards, accuracies and"
        " the like.",
    )

    @model_validator(mode="before")
    @classmethod
    def _direction(cls, values: Any) -> Any:
        """Replace `auto` by the direction that the metric's name tells, so that a run's record says it."""
        values = {"metric": values} if isinstance(values, str) else values
        if not isinstance(values, Mapping) or values.get("mode", "auto") != "auto":
            return values
        metric = values.get("metric", "eval_loss")
        if not isinstance(metric, str) or not metric.startswith("eval_"):
            return values  # which `_is_of_evaluations` refuses
        if (mode := better_when(metric)) is None:
            usual = ("eval_loss", "eval_accuracy", "eval_reward", "eval_rewards/margin")
            near = get_close_matches(metric, usual, n=1, cutoff=0.85)  # a slip, not another name such as `eval_length`
            meant = f"did you mean `{near[0]}`? Else " if near else ""
            raise ValueError(
                f"whether a larger `{metric}` is better isn't known: {meant}set `mode: max` or `mode: min` beside it"
            )
        return {**values, "mode": mode}

    @field_validator("metric")
    @classmethod
    def _is_of_evaluations(cls, metric: str) -> str:
        """Refuse a metric of training steps, as `loss` is: no evaluation would ever give it."""
        if metric.startswith("eval_"):
            return metric
        # Other trainers call them `val_loss` and `eval/loss`.
        name = re.sub(r"^(eval|val|valid|validation|test|dev|train)[_/.-]|^(?:eval)(?=[a-z])", "", metric.strip())
        raise refused(
            ConfigError(
                "isn't a metric of evaluations, whose names begin with `eval_`", fix=f"did you mean `eval_{name}`?"
            ),
            [],
            metric,
        )


class KeepBestConfig(_WatchedMetric):
    """Keep the checkpoint whose evaluation was best by a metric, and export its weights."""

    alone = "metric"


class EarlyStoppingConfig(_WatchedMetric):
    """Stop when an evaluated metric no longer improves."""

    patience: int = Field(3, ge=1, description="Evaluations without improvement before it stops; larger waits longer.")
    min_delta: float = Field(0.0, ge=0, description="Least change that counts as improvement; larger stops sooner.")
    keep_best: bool = Field(
        True,
        description="Save a checkpoint at each improvement, keep the best one beside `checkpoint.keep` others, and export its"
        " weights at the end; false saves that disk and exports the last step's weights. `keep_best` beside it decides instead.",
    )


class DistributedConfig(BaseConfig):
    """How many processes train together. They are started by `torchrun --nproc_per_node N -m rlhf_core train …`."""

    strategy: Literal["auto", "none", "ddp"] = Field(
        "auto", description="`auto` takes DDP when started by torchrun; `none` refuses more than one process."
    )
    world_size: int | None = Field(
        None,
        ge=1,
        description="Number of processes that must be running; a run started with another number is refused.",
    )
    timeout_minutes: float = Field(
        30.0,
        gt=0,
        description="Minutes that a process waits for another, at the start and in a step, before the run fails; larger"
        " tolerates slower processes (one that reads or writes for long), smaller notices a lost one sooner.",
    )


class OptimizerConfig(BaseConfig):
    """The optimiser beyond its learning rate: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), or what steps in its place."""

    alone = "name"

    name: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="What makes the step of the matrices in the model's layers; embeddings, output layers, heads, norms and"
        " biases are AdamW's in any case. `adamw_8bit` keeps its two numbers per weight in 8 bits (needs bitsandbytes), `muon`"
        " keeps one and makes updates orthogonal, of AdamW's size.",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's mean; larger remembers longer.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the gradient's square; larger remembers longer.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the denominator; larger damps small gradients.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled decay of matrices (not of biases or norms); larger shrinks more."
    )
    momentum: float = Field(
        0.95, ge=0, lt=1, description="Decay of the gradients that `muon` adds up; larger remembers longer."
    )

    @model_validator(mode="after")
    def _momentum_is_muons(self) -> OptimizerConfig:
        """Refuse a momentum that nothing uses."""
        if self.name != "muon" and self.momentum != type(self).model_fields["momentum"].default:
            error = ConfigError(f"`{self.name}` has no momentum", fix="set `beta1`, or `name: muon`")
            raise refused(error, ["momentum"], self.momentum)
        return self


class PushConfig(BaseConfig):
    """The upload of `model/` to the Hugging Face hub when a run has ended; `push_to_hub: owner/name` sets the name alone."""

    alone = "repo"

    repo: str = Field(min_length=1, description="Repository on the hub, `owner/name`, which is made where need be.")
    private: bool = Field(
        False, description="Make the repository private; one that exists and is public is then refused."
    )
    revision: str | None = Field(None, description="Branch to upload to, made where need be; null is the main one.")


class BatchingConfig(BaseConfig):
    """How a step's rows are laid out in forward passes. None of these changes a gradient beyond rounding."""

    layout: Literal["auto", "packed", "padded"] = Field(
        "auto",
        description="`packed` lays sequences end to end without padding, with attention within each sequence; `padded` gives each"
        " its own row; `auto` packs where the model's attention can be replaced.",
    )
    share_prompts: bool = Field(
        True, description="Compute a prompt once for all of its responses (packed layout); false computes it for each."
    )
    length_grouped: bool = Field(
        True, description="Put rows of similar length into the same micro-batch; false keeps the data's order."
    )
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="Most real tokens in one forward pass, each prompt counted once and padding not; larger takes more memory,"
        " and is faster on a GPU. `auto` sets no bound there, and on a CPU so many that a hidden state of each fits in its cache:"
        " more would be slower. Null sets no bound.",
    )


class DatasetConfig(BaseConfig):
    """How rows are read."""

    format: RowFormat = Field(
        "auto",
        description="Shape of the rows (docs/data.md shows each); `auto` recognises it and says so, another value refuses rows of"
        " any other.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Column of the record type → the data's own name, such as `prompt: question`."
    )
    ignore_columns: list[str] = Field(
        default_factory=list,
        description="Columns of text that may go unused: no warning for them, and no error under `strict`.",
    )
    split: str = Field("train", min_length=1, description="Split of a hub dataset, or of a `DatasetDict`, to train on.")
    eval_split: str = Field(
        "test", min_length=1, description="Split of a hub dataset, or of a `DatasetDict`, given as `eval_data`."
    )
    streaming: bool = Field(False, description="Read rows as they are needed instead of all at the start.")
    shuffle: bool = Field(True, description="Draw rows in a random order, new in each epoch; false keeps the file's.")
    shuffle_block: int = Field(
        4096, ge=1, description="Rows shuffled together when streaming; larger mixes better and takes more memory."
    )
    strict: bool = Field(
        False,
        description="Make a row that would be dropped or truncated, and a column of text that nothing uses, an error instead of a"
        " counted warning.",
    )
    truncation: Literal["keep_start", "keep_end", "drop"] = Field(
        "keep_start",
        description="For a row over `max_length`: truncate the response at its end, the prompt at its start, or drop it.",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the tokenizer's own: a name (`chatml`, `llama3`, `gemma`, `phi3`, `mistral`,"
        " `zephyr`, `vicuna`, `alpaca`), the path of a Jinja file, or Jinja text; it is saved with the model.",
    )
    wrap: Literal["none", "chat"] | None = Field(
        None,
        description="What rows of plain text are: `chat` makes a prompt the user's turn and a response the assistant's, `none`"
        " keeps them as they are. Null takes what the model was trained with, else `none`, and warns where there is a template.",
    )
    processes: int | None = Field(
        None,
        ge=1,
        description="Processes that tokenise rows; more are faster and take more memory. Null takes one per processor, at most 8,"
        " for data of more than 4 MiB. The rows are the same for any number.",
    )
    turns: Literal["together", "each"] = Field(
        "together",
        description="How a conversation trains: `together` is one row with every assistant turn in the loss; `each` makes every"
        " turn a row behind exactly the prompt that it answers, for templates that rewrite earlier turns.",
    )
    special_tokens: list[str] | None = Field(
        None,
        description="Special tokens that data may use, such as `<think>`: in a text they are encoded as themselves, all others as"
        " mere text. Null takes what the model was trained with, else none.",
    )


class TrainerConfig(BaseConfig):
    """Options that every trainer has. A method's own configuration inherits these and adds its own."""

    beside = ("model", "data", "eval_data", "output")
    switched: ClassVar[tuple[str, ...]] = ("lora", "early_stopping", "keep_best")
    """Groups that true and false switch on and off."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak step size; larger learns faster and may diverge.")
    batch_size: int = Field(
        8, ge=1, description="Rows per optimiser step, over all processes; larger gives less noisy gradients."
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most rows in one forward pass; larger is faster and takes more memory. Null takes all of a process's rows"
        " at once. The gradient doesn't depend on it.",
    )
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps to take; null trains for `epochs`.")
    epochs: float = Field(
        1.0, gt=0, description="Passes over the data where `max_steps` is null; larger trains longer."
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Most tokens in a prompt with its response; larger keeps more text and takes more memory. Null takes what the"
        " model has positions for, at most 1,024.",
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after warm-up: along a cosine or a line, or not at all."
    )
    warmup_ratio: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="Share of the steps over which the learning rate rises from 0; larger rises more gently.",
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="Steps over which the learning rate rises from 0, in place of `warmup_ratio`; larger rises more gently.",
    )
    min_learning_rate_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="What the learning rate falls to at the end, as a share of `learning_rate`; larger learns more in the last"
        " steps.",
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients of a larger norm are scaled down to it; larger clips less, null never."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random stream; another value draws other numbers.")
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32",
        description="Precision of matrix products; 16 bits are faster. Weights and log-probabilities stay float32.",
    )
    frozen_precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of frozen weights that the run loads or copies: a base under an adapter, a reference. `auto`"
        " takes `precision`, which halves their memory in 16 bits and changes no result, but that a mixture's experts compute in"
        " 16 bits, too; `float32` keeps every bit.",
    )
    save_precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description="What the trained model is saved in: `auto` takes what it came in; `float32` keeps every bit and takes"
        " twice the disk of 16. Checkpoints are always exact.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    attention: Literal["auto", "flash", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel; `auto` takes the fastest that the device has."
    )
    dropout: Literal["none", "keep"] = Field(
        "none",
        description="The model's own dropout, skipped layers and router noise while it trains: `none` switches them off; `keep`"
        " leaves them on, which regularises, but then a step's gradient depends on the size of its micro-batches, and a"
        " policy differs from its reference before the first step (the first DPO loss isn't ln 2). `lora.dropout` is apart.",
    )
    compile: bool = Field(False, description="Compile the model with torch.compile: slow start, faster steps on a GPU.")
    trust_remote_code: bool = Field(
        False, description="Run code that the model's repository ships; true only where you trust that code."
    )
    max_idle_batches: int = Field(
        50,
        ge=1,
        description="Successive batches that may give no loss (every token masked, all rewards of each group equal) before the"
        " run is stopped as broken; larger waits longer.",
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations; larger evaluates less often, null evaluates only at the end.",
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train low-rank adapters, at about ten times the learning rate of every weight; null trains every weight.",
    )
    adapter: Literal["continue", "fold"] = Field(
        "continue",
        description="Where `model` is an adapter: `continue` trains and saves that adapter, its base as it is; `fold` merges it"
        " into the base first and trains every weight, or with `lora` a new adapter, and saves a whole model.",
    )
    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Tokens that are added to the tokenizer, such as `<think>`, with embeddings that start as the mean of the"
        " others; with `lora` their rows alone are trained beside the adapters. Those of a chat template by name become control"
        " tokens. More of them shorten what they stand for.",
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="Parts of the model that stay as they are: names of modules or parameters, or ends of names, with `*` and"
        " `[0-9]` as in paths, such as `embed_tokens` or `model.layers.[0-9].*`. More of them train less, and take less memory.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimiser beyond its rate.")
    batching: BatchingConfig = Field(default_factory=BatchingConfig, description="Layout of a step's rows.")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig, description="How rows are read.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="When state is saved.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="What is reported.")
    early_stopping: EarlyStoppingConfig | None = Field(
        None, description="When to stop before the last step; null never."
    )
    keep_best: KeepBestConfig | None = Field(
        None,
        description="Metric of evaluations, such as `eval_accuracy`, whose best checkpoint is kept beside `checkpoint.keep`"
        " others and exported at the end; null exports the last step's weights, or what `early_stopping` keeps.",
    )
    ewc: EWCConfig | None = Field(
        None,
        description="Hold on to earlier tasks: weights that they need change less. Null lets every weight change alike.",
    )
    push_to_hub: PushConfig | None = Field(
        None,
        description="Upload `model/` with its card to the hub at the end; the name and token are checked first.",
    )
    distributed: DistributedConfig = Field(
        default_factory=DistributedConfig, description="Processes that train together."
    )

    @property
    def length_limit(self) -> int:
        """`max_length` in tokens. Where it is null, a run sets it from its model; without a run, it is DEFAULT_MAX_LENGTH."""
        return DEFAULT_MAX_LENGTH if self.max_length is None else self.max_length

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_the_ratio(cls, values: Any) -> Any:
        """Take `warmup_steps` alone as no `warmup_ratio`, so that a file of every option describes the same run."""
        if isinstance(values, Mapping) and values.get("warmup_steps") is not None:
            return {"warmup_ratio": 0.0, **values}
        return values

    @model_validator(mode="after")
    def _schedule_holds_together(self) -> TrainerConfig:
        """Refuse a warm-up that is given twice, and a lowest rate for a rate that doesn't fall."""
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            error = ConfigError("the warm-up is given twice, by `warmup_ratio`, too", fix="leave one of the two out")
            raise refused(error, ["warmup_steps"], self.warmup_steps)
        if self.warmup_steps is not None and self.max_steps is not None and self.warmup_steps >= self.max_steps:
            error = ConfigError(
                f"the warm-up leaves none of the {self.max_steps} steps for the learning rate itself",
                fix=f"set it to less than {self.max_steps}, or train for more steps",
            )
            raise refused(error, ["warmup_steps"], self.warmup_steps)
        if self.min_learning_rate_ratio > 0 and self.lr_schedule == "constant":
            fix = "set `lr_schedule: cosine` or `linear`, or leave it out"
            error = ConfigError("a constant learning rate doesn't fall to any other", fix=fix)
            raise refused(error, ["min_learning_rate_ratio"], self.min_learning_rate_ratio)
        return self

    @model_validator(mode="after")
    def _new_tokens_differ(self) -> TrainerConfig:
        """Refuse a token that is added twice, or has white space around it, which text beside it may lack."""
        for number, token in enumerate(self.new_tokens):
            if token in self.new_tokens[:number]:
                raise refused(ConfigError("the token is named twice", fix="leave one out"), ["new_tokens"], token)
            if token != token.strip():
                error = ConfigError("a token has no white space around it", fix=f"write `{token.strip()}`")
                raise refused(error, ["new_tokens"], token)
        return self

    @model_validator(mode="after")
    def _nothing_is_frozen_twice(self) -> TrainerConfig:
        """Refuse `freeze` beside `lora`, whose base is frozen."""
        if self.freeze and self.lora is not None:
            fix = "leave it out; `lora.exclude_modules` keeps adapters off modules"
            error = ConfigError("the base under `lora` is frozen already", fix=fix)
            raise refused(error, ["freeze"], self.freeze)
        return self

    @property
    def exported_by(self) -> KeepBestConfig | EarlyStoppingConfig | None:
        """The option that says which checkpoint is the best, kept and exported; None where the last one is exported."""
        if self.keep_best is not None:
            return self.keep_best
        return self.early_stopping if self.early_stopping is not None and self.early_stopping.keep_best else None

    @model_validator(mode="after")
    def _frozen_weights_fit_products(self) -> TrainerConfig:
        """Refuse 16-bit frozen weights with `precision: float32`."""
        if self.precision == "float32" and self.frozen_precision in ("bf16", "fp16"):
            raise ValueError(f"frozen_precision {self.frozen_precision} needs `precision: bf16` or `fp16`")
        return self

    @model_validator(mode="before")
    @classmethod
    def _groups_by_flag(cls, values: Any) -> Any:
        """Take `lora: true` as its defaults and `lora: false` as none; `early_stopping` and `keep_best` likewise."""
        if isinstance(values, Mapping):
            values = dict(values)
            for group in cls.switched:
                if isinstance(values.get(group), bool):
                    values[group] = {} if values[group] else None
        return values


class ModelConfig(BaseConfig):
    """A model beside the one that is trained, such as a teacher: only read."""

    alone = "path"

    path: str = Field(min_length=1, description="Path or hub name of the model.")
    precision: Literal["float32", "bf16", "fp16"] | None = Field(
        None, description="Precision of its matrix products; null takes the run's, 16 bits take half the memory."
    )
    trust_remote_code: bool = Field(
        False, description="Run code that its repository ships; true only where you trust that code."
    )


class TrainedModelConfig(ModelConfig):
    """A model that is trained beside the policy, such as a critic."""

    lora: LoraConfig | None = Field(None, description="Train low-rank adapters on it; null trains every weight.")
    learning_rate_factor: float = Field(
        1.0,
        gt=0,
        description="Its learning rate as a multiple of `learning_rate`; larger learns faster than the policy.",
    )


def models_beside(config: BaseConfig) -> dict[str, ModelConfig]:
    """Return the models that a configuration names beside the one that is trained, by option; none without a path."""
    return {name: value for name, value in config if isinstance(value, ModelConfig) and value.path}


ReferenceMode = Literal["auto", "copy", "adapter_off", "precompute"]


class ReferenceConfig(TrainerConfig):
    """Options of a method that compares the policy with what it was at the start."""

    reference: ReferenceMode = Field(
        "auto",
        description="How the reference is kept: a frozen `copy`, the base with a fresh adapter off (`adapter_off`), or"
        " log-probabilities computed once at the start (`precompute`). The objective is the same.",
    )
