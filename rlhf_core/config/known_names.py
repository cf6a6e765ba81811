"""Names of options that people know from other trainers, and what says the same here; for messages and a page of the docs.

Importing this imports no torch.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from pydantic import BaseModel

from rlhf_core.config.fields import option_at

TOOLS = {"trl": "TRL", "axolotl": "axolotl", "llama_factory": "LLaMA-Factory"}
"""The trainers whose names are known, by the field of `KnownName` that has them."""


class KnownName(NamedTuple):
    """One thing that can be set, as other trainers name it and as it is named here.

    TRL's names include those of transformers' `TrainingArguments` and peft's `LoraConfig`. A field has several names separated by
    blanks, or none.
    """

    ours: str
    """Options or keys that say it, separated by blanks: the first that a configuration has is meant. Empty where nothing does."""
    trl: str = ""
    axolotl: str = ""
    llama_factory: str = ""
    differs: str = ""
    """What is different, as part of a sentence; empty where the same value means the same."""
    elsewhere: str = ""
    """Further names, of no trainer in particular."""

    def names(self) -> dict[str, str]:
        """Return each name → the trainers that have it, as text; empty for names of none in particular."""
        found: dict[str, list[str]] = {name: [] for name in self.elsewhere.split()}
        for field, tool in TOOLS.items():
            for name in getattr(self, field).split():
                found.setdefault(name, []).append(tool)
        return {name: ", ".join(tools) for name, tools in found.items()}


_PER_STEP = (
    "rows per optimiser step over all devices: theirs per device × devices × accumulated batches. How many rows one pass takes"
    " is `micro_batch_size`, or `batching.micro_batch_tokens`; neither changes a gradient"
)

KNOWN: dict[str, tuple[KnownName, ...]] = {
    "Method, model and data": (
        KnownName(
            "method",
            axolotl="rl",
            llama_factory="stage do_train",
            differs="`sft`, `dpo`, `kto`, `reward_model`, `grpo`, …: `rlhf list trainers`",
        ),
        KnownName(
            "",
            "config",
            "config_file",
            differs="name the file in place of the method: `rlhf train FILE.yaml --option value`",
        ),
        KnownName("model", "model_name_or_path", "base_model", "model_name_or_path", elsewhere="model_name model_path"),
        KnownName(
            "model",
            axolotl="lora_model_dir",
            llama_factory="adapter_name_or_path",
            differs="give the adapter's directory as `model`, which names its base; it is trained further, or folded by"
            " `adapter: fold`",
        ),
        KnownName(
            "",
            "model_revision",
            "revision_of_model",
            "model_revision",
            differs="there is none here: fetch the revision, and give its directory as `model`",
        ),
        KnownName(
            "",
            "processing_class tokenizer_name",
            "tokenizer_config tokenizer_type model_type tokenizer_use_fast is_llama_derived_model",
            "resize_vocab",
            differs="there is none here: the tokenizer and the kind of model are those of the directory that `model` names",
        ),
        KnownName(
            "data",
            "dataset_name train_dataset dataset_mixture",
            "datasets pretraining_dataset",
            "dataset",
            differs="a path, a hub name (`owner/name:config`), or a list of them; how rows are read is in the group `dataset`",
            elsewhere="train_file train_data training_data dataset_path data_path train_data_path",
        ),
        KnownName(
            "data",
            llama_factory="dataset_dir media_dir mix_strategy interleave_probs",
            differs="paths are given whole, and weights with them: `data: [{path: …, weight: 2}]`",
        ),
        KnownName("data", "dataset_config", differs="write it behind the hub name: `data: owner/name:config`"),
        KnownName(
            "eval_data",
            "eval_dataset",
            "test_datasets",
            "eval_dataset",
            elsewhere="validation_file test_file valid_data val_data dev_data",
        ),
        KnownName(
            "eval_data",
            axolotl="val_set_size",
            llama_factory="val_size",
            differs="no rows are split off from `data`: give held-out ones, as a file or by `dataset.eval_split`",
        ),
        KnownName("output", "output_dir", "output_dir", "output_dir", elsewhere="save_dir out_dir"),
        KnownName("dataset.split", "dataset_train_split", llama_factory="split", differs="of a hub set or a folder"),
        KnownName("dataset.eval_split", "dataset_test_split", differs="of a hub set or a folder given as `eval_data`"),
        KnownName("dataset.streaming", "dataset_streaming", "streaming", "streaming"),
        KnownName("dataset.shuffle", axolotl="shuffle_merged_datasets"),
        KnownName(
            "dataset.shuffle",
            llama_factory="disable_shuffling",
            differs="the other way round: false keeps the file's order",
        ),
        KnownName(
            "dataset.columns",
            "dataset_text_field",
            "field_messages message_property_mappings",
            "columns",
            differs="the record type's column → the data's own: `columns: {prompt: question, response: answer}`",
        ),
        KnownName(
            "dataset.chat_template",
            "chat_template_path",
            "chat_template chat_template_jinja",
            "template",
            differs="the tokenizer's own is taken where this isn't set, which is nearly always right",
        ),
        KnownName(
            "new_tokens",
            axolotl="tokens added_tokens_overrides",
            llama_factory="add_tokens add_special_tokens",
            differs="tokens that the model has already are let into data by `dataset.special_tokens`",
        ),
        KnownName(
            "dataset.wrap",
            axolotl="default_system_message",
            llama_factory="default_system",
            differs="`chat` puts plain rows into the template; a system message stands in the rows themselves",
        ),
        KnownName("dataset.processes", "dataset_num_proc", "dataset_processes", "preprocessing_num_workers"),
        KnownName(
            "",
            "dataset_kwargs remove_unused_columns dataloader_num_workers dataloader_pin_memory dataloader_drop_last"
            " dataloader_prefetch_factor dataloader_persistent_workers",
            "dataset_prepared_path dataset_keep_in_memory dataloader_num_workers dataset_exact_deduplication"
            " skip_prepare_dataset",
            "overwrite_cache dataloader_num_workers tokenized_path preprocessing_batch_size",
            differs="nothing needs to be set: rows are read and kept by the loop, and columns that nothing uses do no harm",
        ),
        KnownName("", llama_factory="max_samples", differs="write the entry of `data` as `{path: FILE, rows: N}`"),
    ),
    "Steps and batches": (
        KnownName("epochs", "num_train_epochs", "num_epochs", "num_train_epochs", elsewhere="num_epoch n_epochs epoch"),
        KnownName(
            "max_steps",
            elsewhere="total_steps num_steps train_steps num_train_steps iterations iters",
        ),
        KnownName(
            "max_steps",
            "total_episodes",
            differs="optimiser steps, of `batch_size` prompts with `group_size` completions each",
        ),
        KnownName(
            "batch_size",
            "per_device_train_batch_size train_batch_size",
            "",
            "per_device_train_batch_size",
            differs=_PER_STEP,
            elsewhere="per_gpu_train_batch_size global_batch_size train_micro_batch_size_per_gpu",
        ),
        KnownName(
            "batch_size",
            "gradient_accumulation_steps",
            "gradient_accumulation_steps",
            "gradient_accumulation_steps",
            differs="write `batch_size`, the rows per optimiser step over all devices, with it multiplied in; what is accumulated"
            " follows from that and `micro_batch_size`",
            elsewhere="grad_accum accumulate_grad_batches gradient_accumulation",
        ),
        KnownName(
            "micro_batch_size",
            "per_device_eval_batch_size eval_accumulation_steps",
            "eval_batch_size",
            "per_device_eval_batch_size",
            differs="passes of an evaluation are as large as those of training",
        ),
        KnownName(
            "max_length",
            "max_seq_length model_max_length",
            "sequence_len",
            "cutoff_len",
            differs="tokens of a prompt with its response",
            elsewhere="max_seq_len seq_len seq_length context_length block_size",
        ),
        KnownName(
            "max_length",
            "max_prompt_length truncation_mode",
            "excess_length_strategy",
            "",
            differs="the prompt shares it with the response; `dataset.truncation` says what a row over it loses",
        ),
        KnownName(
            "batching.layout",
            "packing packing_strategy padding_free eval_packing",
            "sample_packing eval_sample_packing pad_to_sequence_len flash_attn_varlen",
            "packing neat_packing",
            differs="rows are packed wherever attention can be kept within each, which is the default; `padded` switches it off",
        ),
        KnownName("batching.length_grouped", "group_by_length", "group_by_length", "group_by_length"),
        KnownName("seed", "data_seed", "data_seed", "data_seed", differs="one seed for every random stream"),
    ),
    "Optimiser and schedule": (
        KnownName("learning_rate", elsewhere="lr peak_lr max_lr"),
        KnownName(
            "lr_schedule", "lr_scheduler_type", "lr_scheduler", "lr_scheduler_type", elsewhere="scheduler schedule"
        ),
        KnownName("warmup_steps", elsewhere="num_warmup_steps warmup lr_warmup_steps"),
        KnownName(
            "min_learning_rate_ratio",
            "lr_scheduler_kwargs",
            "cosine_min_lr_ratio",
            "lr_scheduler_kwargs",
            differs="a share of `learning_rate`; along a cosine or a line",
            elsewhere="min_lr min_lr_ratio min_lr_rate final_lr",
        ),
        KnownName(
            "optimizer.name",
            "optim",
            "",
            "optim",
            differs="`adamw` (theirs `adamw_torch`), `adamw_8bit` or `muon`, in the group `optimizer`",
            elsewhere="optimizer_name optimizer_type",
        ),
        KnownName(
            "optimizer.weight_decay",
            "weight_decay",
            "weight_decay",
            "weight_decay",
            differs="it decays matrices, not biases or norms",
            elsewhere="wd",
        ),
        KnownName("optimizer.beta1", "adam_beta1", "adam_beta1", "adam_beta1", elsewhere="beta_1"),
        KnownName("optimizer.beta2", "adam_beta2", "adam_beta2", "adam_beta2", elsewhere="beta_2"),
        KnownName("optimizer.epsilon", "adam_epsilon", "adam_epsilon", "adam_epsilon", elsewhere="adam_eps"),
        KnownName(
            "max_grad_norm",
            axolotl="gradient_clipping",
            elsewhere="grad_clip clip_grad_norm gradient_clip_val max_gradient_norm",
        ),
        KnownName(
            "", axolotl="loraplus_lr_ratio", llama_factory="loraplus_lr_ratio use_galore", differs="there is none here"
        ),
    ),
    "Precision, memory and devices": (
        KnownName(
            "precision",
            "bf16 bf16_full_eval",
            "bf16 bfloat16",
            "bf16 pure_bf16",
            differs="write `precision: bf16`; products are in 16 bits, trained weights and log-probabilities stay float32",
        ),
        KnownName(
            "precision",
            "fp16",
            "fp16 float16",
            "fp16",
            differs="write `precision: fp16`; products are in 16 bits, trained weights and log-probabilities stay float32",
        ),
        KnownName(
            "precision",
            "dtype torch_dtype model_init_kwargs",
            "torch_dtype",
            "infer_dtype",
            differs="of matrix products: `float32`, `bf16` or `fp16`; trained weights stay float32, frozen ones follow it",
            elsewhere="mixed_precision",
        ),
        KnownName(
            "", "tf32", "tf32", "tf32", differs="there is none here: write `precision: bf16` for faster products"
        ),
        KnownName(
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs activation_offloading",
            "gradient_checkpointing_kwargs activation_offloading",
            "disable_gradient_checkpointing",
            differs="true or false, false by default",
            elsewhere="activation_checkpointing",
        ),
        KnownName(
            "attention",
            "attn_implementation use_flash_attention_2",
            "flash_attention sdp_attention xformers_attention eager_attention attn_implementation",
            "flash_attn",
            differs="`auto`, the default, takes the fastest that the device has; or `flash`, `sdpa`, `eager`",
        ),
        KnownName("compile", "torch_compile torch_compile_backend", "torch_compile", "torch_compile"),
        KnownName(
            "",
            "use_liger_kernel",
            "liger_rope liger_rms_norm liger_glu_activation liger_fused_linear_cross_entropy chunked_cross_entropy plugins",
            "enable_liger_kernel use_unsloth",
            differs="there is none here: the vocabulary projection is computed at positions in the loss alone, in any case",
        ),
        KnownName(
            "distributed.strategy",
            "deepspeed fsdp fsdp_config accelerator_config parallelism_config ddp_find_unused_parameters ddp_backend",
            "deepspeed fsdp fsdp_config fsdp_version",
            "deepspeed fsdp",
            differs="several processes train by DDP, started by `torchrun --nproc_per_node N -m rlhf_core train …`; sharded"
            " weights (DeepSpeed, FSDP) aren't there, and adapters on a quantised base take the least memory",
        ),
        KnownName(
            "distributed.world_size",
            elsewhere="num_gpus n_gpus gpus num_processes devices nproc_per_node",
            differs="it only refuses another number; `torchrun --nproc_per_node N -m rlhf_core train …` starts processes",
        ),
        KnownName("distributed.timeout_minutes", "ddp_timeout", "ddp_timeout", "ddp_timeout", differs="in minutes"),
        KnownName(
            "",
            "use_cpu no_cuda",
            "device device_map",
            "use_cpu",
            differs="the fastest device that is there is taken; `CUDA_VISIBLE_DEVICES=` leaves the CPU",
        ),
        KnownName(
            "dropout",
            "disable_dropout",
            differs="the model's dropout is off by default (`none`); `lora.dropout` is apart",
        ),
    ),
    "Adapters and quantisation": (
        KnownName(
            "lora",
            "use_peft peft_config",
            "adapter",
            "finetuning_type",
            differs="`lora: {rank: 16, alpha: 32}` trains adapters, and without it every weight is trained; `adapter` says what"
            " becomes of an adapter that `model` is",
            elsewhere="use_lora peft lora_enable qlora use_qlora",
        ),
        KnownName(
            "lora.rank",
            "lora_r r",
            "lora_r",
            "lora_rank",
        ),
        KnownName(
            "lora.alpha",
            "lora_alpha",
            "lora_alpha",
            "lora_alpha",
        ),
        KnownName("lora.dropout", "lora_dropout", "lora_dropout", "lora_dropout"),
        KnownName(
            "lora.target_modules",
            "lora_target_modules",
            "lora_target_modules lora_target_linear",
            "lora_target",
            differs="names in a list, one regular expression, or `all-linear`, the default (LLaMA-Factory's `all`)",
        ),
        KnownName(
            "lora.target_parameters", "lora_target_parameters", "lora_target_parameters", "lora_target_parameters"
        ),
        KnownName("lora.modules_to_save", "lora_modules_to_save", "lora_modules_to_save", "additional_target"),
        KnownName("lora.use_rslora", "use_rslora", "peft_use_rslora", "use_rslora"),
        KnownName("lora.use_dora", "use_dora", "peft_use_dora", "use_dora"),
        KnownName("lora.init_lora_weights", "init_lora_weights", "peft_init_lora_weights"),
        KnownName(
            "lora.quantize",
            "load_in_4bit",
            "load_in_4bit",
            "quantization_bit",
            differs="write `lora: {quantize: 4bit}`; a quantised base is trained with adapters",
        ),
        KnownName(
            "lora.quantize",
            "load_in_8bit",
            "load_in_8bit",
            "",
            differs="write `lora: {quantize: 8bit}`; a quantised base is trained with adapters",
        ),
        KnownName(
            "lora.quantize",
            "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_compute_dtype bnb_4bit_use_double_quant quantization_config",
            "bnb_config_kwargs",
            "quantization_type double_quantization quantization_method",
            differs="`4bit` is NF4 with double quantisation, computing in bf16",
        ),
    ),
    "Saving, evaluating, logging": (
        KnownName(
            "checkpoint.every",
            "save_steps save_strategy",
            "save_steps save_strategy saves_per_epoch",
            "save_steps save_strategy",
            differs="a number of steps; by default one is saved every 10 minutes (`checkpoint.minutes`) and at the end",
        ),
        KnownName("checkpoint.keep", "save_total_limit", "save_total_limit", "save_total_limit", differs="at least 2"),
        KnownName(
            "",
            "save_only_model save_safetensors save_on_each_node",
            "save_only_model save_safetensors",
            "save_only_model",
            differs="there is none here: a run leaves `model/` in safetensors, and checkpoints from which it resumes exactly",
        ),
        KnownName(
            "",
            "resume_from_checkpoint",
            "resume_from_checkpoint auto_resume_from_checkpoints",
            "resume_from_checkpoint",
            differs="write `rlhf train … --resume` with the same output; from Python, `train(resume=True)`",
        ),
        KnownName(
            "",
            "overwrite_output_dir",
            "",
            "overwrite_output_dir",
            differs="write `rlhf train … --overwrite`; from Python, `train(overwrite=True)`",
        ),
        KnownName(
            "eval_steps",
            "eval_strategy evaluation_strategy do_eval",
            "eval_strategy evals_per_epoch",
            "eval_strategy do_eval",
            differs="a number of steps, and `eval_data`; without it there is one evaluation at the end",
            elsewhere="eval_every eval_interval val_check_interval",
        ),
        KnownName(
            "keep_best",
            "load_best_model_at_end",
            "load_best_model_at_end",
            "load_best_model_at_end",
            differs="the metric that decides, such as `keep_best: eval_loss`; the best checkpoint is kept and exported",
        ),
        KnownName("keep_best.metric", "metric_for_best_model", "metric_for_best_model", "metric_for_best_model"),
        KnownName(
            "keep_best.mode",
            "greater_is_better",
            "greater_is_better",
            "greater_is_better",
            differs="`max` for true, `min` for false; `auto`, the default, knows the metrics of the methods",
        ),
        KnownName("early_stopping.patience", axolotl="early_stopping_patience", llama_factory="early_stopping_steps"),
        KnownName("early_stopping.min_delta", elsewhere="early_stopping_threshold"),
        KnownName(
            "logging.every",
            "logging_steps logging_strategy",
            "logging_steps",
            "logging_steps",
            differs="of lines on the console: `metrics.jsonl` has every step",
            elsewhere="log_every log_interval log_every_n_steps log_freq",
        ),
        KnownName(
            "logging.trackers",
            "report_to",
            "use_tensorboard use_wandb use_mlflow report_to",
            "report_to",
            differs="`tensorboard`, `wandb`, `trackio`, or several in a list; none by default",
        ),
        KnownName(
            "logging.project",
            "project",
            "wandb_project mlflow_experiment_name",
            "",
            differs="further settings of wandb are read from its own variables, such as `WANDB_ENTITY`",
            elsewhere="project_name",
        ),
        KnownName(
            "output",
            "run_name logging_dir",
            "wandb_name wandb_run_id",
            "run_name swanlab_run_name",
            differs="a run's name is that of its directory, and its logs are in it",
        ),
        KnownName(
            "logging.progress",
            "disable_tqdm",
            llama_factory="disable_tqdm",
            differs="the other way round: false shows no bar",
        ),
        KnownName(
            "logging.rollouts.show logging.samples",
            "log_completions num_completions_to_print",
            "num_completions_to_print",
            differs="steps between tables of completions; all that are kept are shown by `rlhf rollouts RUN`",
        ),
        KnownName("", llama_factory="plot_loss", differs="`rlhf report RUN` draws every curve of a run"),
        KnownName(
            "",
            "log_level log_on_each_node log_level_replica logging_first_step logging_nan_inf_filter",
            differs="there is none here: `--debug` shows tracebacks, and `logging.every` says how often a line is printed",
        ),
    ),
    "Losses": (
        KnownName("beta kl_weight", "beta kl_coef init_kl_coef", "rl_beta", "pref_beta"),
        KnownName(
            "loss_type variant",
            "loss_type loss_weights",
            "",
            "pref_loss",
            differs="SimPO, ORPO and CPO are methods of their own (`method: simpo`); the family of GRPO is `variant`",
        ),
        KnownName("label_smoothing", "label_smoothing_factor", "dpo_label_smoothing", "dpo_label_smoothing"),
        KnownName(
            "sft_weight",
            "rpo_alpha cpo_alpha",
            "rpo_alpha cpo_alpha",
            "pref_ftx",
            differs="weight of the chosen response's negative log-likelihood beside the preference loss",
        ),
        KnownName("gamma", "simpo_gamma", "simpo_gamma", "simpo_gamma"),
        KnownName(
            "reference",
            "precompute_ref_log_probs ref_model force_use_ref_model sync_ref_model ref_model_sync_steps",
            "precompute_ref_log_probs",
            "ref_model",
            differs="it is always the policy as passed in: `copy`, `adapter_off`, or `precompute` (log-probabilities once)",
        ),
        KnownName("desirable_weight", "desirable_weight", "kto_desirable_weight", "kto_chosen_weight"),
        KnownName("undesirable_weight", "undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight"),
        KnownName("centre_weight", "center_rewards_coefficient", axolotl="center_rewards_coefficient"),
        KnownName("separator", "step_separator", differs="the text between the steps of a response"),
        KnownName(
            "teacher",
            "teacher_model_name_or_path teacher_model_init_kwargs",
            "kd_teacher",
            differs="a path, or `{path: …, precision: …}`",
            elsewhere="teacher_model",
        ),
        KnownName("on_policy", "lmbda", differs="share of the rollouts that the student draws itself"),
        KnownName(
            "prompt_loss_weight",
            "completion_only_loss train_on_completion_only",
            axolotl="train_on_inputs",
            llama_factory="train_on_prompt",
            differs="a number: 1 trains on every token, 0, the default, on responses alone",
            elsewhere="prompt_weight",
        ),
        KnownName(
            "neftune_alpha", "neftune_noise_alpha", "neftune_noise_alpha noisy_embedding_alpha", "neftune_noise_alpha"
        ),
        KnownName(
            "freeze",
            llama_factory="freeze_trainable_layers freeze_trainable_modules freeze_vision_tower",
            axolotl="unfrozen_parameters",
            differs="names what stays as it is, as patterns: `[embed_tokens, model.layers.[0-9].*]`",
        ),
        KnownName(
            "",
            "assistant_only_loss",
            "roles_to_train train_on_eos",
            "mask_history",
            differs="the loss is on every assistant turn and its end token; `dataset.turns: each` makes each turn a row",
        ),
    ),
    "Online methods": (
        KnownName("group_size", "num_generations", "num_generations", elsewhere="num_rollouts num_samples_per_prompt"),
        KnownName(
            "rewards",
            "reward_funcs reward_model_path reward_model reward_weights",
            "reward_funcs reward_model reward_weights",
            "reward_model reward_model_type",
            differs="names, `package.module:function`, or `{name: reward_model, options: {model: PATH}, weight: 1}`, in a list",
        ),
        KnownName(
            "generation.max_new_tokens max_length",
            "max_completion_length response_length max_new_tokens",
            "max_completion_length",
            "max_new_tokens",
            elsewhere="max_tokens max_response_length",
        ),
        KnownName("generation.temperature", "temperature", "temperature", "temperature"),
        KnownName("generation.top_p", "top_p", "top_p", "top_p"),
        KnownName("generation.top_k", "top_k", "top_k", "top_k"),
        KnownName("generation.min_p", "min_p", "min_p"),
        KnownName("generation.repetition_penalty", "repetition_penalty", "repetition_penalty", "repetition_penalty"),
        KnownName("generation.stop", "stop_token stop_strings stop_sequences", differs="texts in a list"),
        KnownName("generation.stop_ids", "stop_token_id stop_token_ids", differs="token ids in a list"),
        KnownName(
            "rollout_epochs", "num_iterations num_ppo_epochs", "num_iterations", "ppo_epochs", elsewhere="ppo_epoch"
        ),
        KnownName(
            "minibatches",
            "num_mini_batches steps_per_generation generation_batch_size",
            "steps_per_generation",
            "ppo_buffer_size",
            differs="optimiser steps per pass over a rollout",
        ),
        KnownName("mask_truncated", "mask_truncated_completions", "mask_truncated_completions"),
        KnownName(
            "advantage whiten_advantages",
            "scale_rewards multi_objective_aggregation",
            "scale_rewards",
            differs="how rewards become advantages: `rlhf show grpo --all` has the names",
        ),
        KnownName(
            "clip_options",
            "epsilon epsilon_high delta cliprange",
            "grpo_epsilon epsilon epsilon_high",
            differs="a group: `rlhf show grpo --variant grpo` prints its options and values",
        ),
        KnownName("ratio", "importance_sampling_level", "importance_sampling_level", differs="or `variant: gspo`"),
        KnownName("value_clip", "cliprange_value"),
        KnownName("value_weight", "vf_coef"),
        KnownName("gae_lambda", "lam"),
        KnownName("whiten_rewards", "", "", "ppo_whiten_rewards"),
        KnownName("kl_target", "target_kl", "", "ppo_target", "the KL to which `kl_weight` is adapted"),
        KnownName("value", "value_model_path", differs="a path, or `{path: …, head: …}`"),
        KnownName(
            "equal_groups", elsewhere="dynamic_sampling filter_groups", differs="`resample` takes further prompts"
        ),
        KnownName(
            "",
            "use_vllm vllm_mode vllm_server_host vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_sampling_params",
            "vllm use_vllm",
            "vllm_maxlen infer_backend",
            differs="there is none here: rollouts are drawn by the engine that holds the live policy",
        ),
    ),
    "Code and hub": (
        KnownName("trust_remote_code", elsewhere="allow_remote_code"),
        KnownName("push_to_hub.repo", "hub_model_id", "hub_model_id", "hub_model_id"),
        KnownName("push_to_hub.private", "hub_private_repo", "", "hub_private_repo"),
        KnownName("push_to_hub.revision", "hub_revision"),
        KnownName(
            "push_to_hub",
            "hub_strategy",
            "hub_strategy",
            "hub_strategy",
            differs="a group, `{repo: owner/name}`: the model is uploaded at the end",
        ),
        KnownName(
            "",
            "hub_token hf_token token",
            "hf_use_auth_token",
            "hf_hub_token",
            differs="a token is read from the variable `HF_TOKEN`, or from where `hf auth login` put it: it belongs in no file",
        ),
    ),
}
"""What is known, by the heading under which the docs list it."""

SAME_NAME = {
    "micro_batch_size": "in axolotl the rows per device and accumulated batch; here the most rows in one forward pass, of the"
    " `batch_size` of a step",
    "dataset": "in LLaMA-Factory the names of the data, which here is `data`; here how rows are read, a group",
    "optimizer": "in axolotl the optimiser's name, which here is `optimizer: {name: adamw}` (or `adamw_8bit`, `muon`); here a"
    " group of options",
    "push_to_hub": "in TRL true or false; here where to: `push_to_hub: {repo: owner/name}`",
    "adapter": "in axolotl `lora` or `qlora`, which here is `lora: {rank: 16, alpha: 32}`, with `quantize: 4bit` for QLoRA;"
    " here what becomes of an adapter that `model` is",
    "eval_steps": "a whole number of steps, never a share of the run (TRL's `0.1`)",
    "early_stopping": "here a group; `early_stopping: true` takes its defaults",
}
"""Names that stand for something here, too, and what differs."""


@functools.cache
def _by_name() -> dict[str, tuple[KnownName, ...]]:
    """Return each name → what it may stand for."""
    found: dict[str, list[KnownName]] = {}
    for known in (one for group in KNOWN.values() for one in group):
        for name in known.names():
            found.setdefault(name, []).append(known)
    return {name: tuple(rows) for name, rows in found.items()}


def said_here(name: str, config: type[BaseModel], keys: Iterable[str] = ()) -> str | None:
    """Return how what another trainer calls `name` is said here, as the `fix` of a message; None for a name that isn't known, or
    that stands for nothing that a configuration has.

    Args:
        name: an unknown option, of a dotted one its last part.
        config: the configuration that was to have it.
        keys: the names beside its options that a file or the command line may have (`model`, `data`).
    """
    for known in _known(name):
        for ours in known.ours.split():
            if ours not in keys and option_at(config, ours) is None:
                continue
            if known.differs.startswith("write "):
                return known.differs
            return f"write `{ours}`: {known.differs}" if known.differs else f"write `{ours}`"
        if not known.ours:
            return known.differs
    return None


def as_flags(fix: str) -> str:
    """Return what `said_here` says with options as flags: `--epochs` for `epochs`, `--lora.quantize 4bit` for a group's."""
    fix = re.sub(r"^write `([a-z_.]+)`", r"write `--\1`", fix)
    fix = re.sub(r"`([a-z_.]+): ([^`{}\[\]]+)`", r"`--\1 \2`", fix)
    return re.sub(r"`([a-z_.]+): \{([a-z_]+): (\w+)\}`", r"`--\1.\2 \3`", fix)


def said_elsewhere(name: str) -> str | None:
    """Return, as the `fix` of a message, what a name of another trainer is called here, by methods that have such an option."""
    for known in _known(name):
        names = " or ".join(f"`{one}`" for one in known.ours.split())
        return f"leave it out: {names}, as it is called here, is an option of other methods"
    return None


def called_here(name: str) -> list[str]:
    """Return the options and keys that may be meant by another trainer's name; [] for a name that isn't known."""
    return [ours for known in _known(name) for ours in known.ours.split()]


def written_for(names: Iterable[str]) -> str | None:
    """Return the trainer that a file with these keys (dotted ones don't count) was written for; None where they don't tell."""
    counts: Counter[str] = Counter()
    for name in (one for one in names if "." not in one):
        tools = {tool for known in _known(name) for tool in known.names().get(name, "").split(", ") if tool}
        counts.update(tools)
    most = counts.most_common(2)
    clear = most and most[0][1] >= 3 and (len(most) == 1 or most[0][1] > most[1][1])
    return most[0][0] if clear else None


def _known(name: str) -> tuple[KnownName, ...]:
    return _by_name().get(name.rpartition(".")[2].replace("-", "_").casefold(), ())
