"""What a run needs before its first step: a configuration that fits, the policy, models by role, the reference."""

from __future__ import annotations

import functools
import itertools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_core.config import DEFAULT_MAX_LENGTH, TrainerConfig
from rlhf_core.data.base import EncodedData
from rlhf_core.errors import ConfigError, PluginError
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.interfaces import Seam, Trainer
from rlhf_core.models import PolicyModel
from rlhf_core.models.dropout import allow_dropout, keep_still, set_training
from rlhf_core.models.precision import DTYPES, frozen_dtype
from rlhf_core.models.reference import Reference
from rlhf_core.models.scoring import score_in_parts
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.rows import one_pass
from rlhf_core.training.trackers import check_trackers

log = logging.getLogger(__name__)


def check_config(trainer: Trainer, distribution: Distribution, devices: DeviceManager) -> None:
    """Refuse options that can't hold together, before anything is loaded.

    Raises:
        ConfigError: names the option and what to set.
    """
    config, processes = trainer.config, distribution.world_size
    devices.check(config.precision)
    if config.batch_size % processes:
        below = config.batch_size // processes * processes
        near = f"{below} or {below + processes}" if below else str(processes)
        raise ConfigError(
            f"{config.batch_size} rows can't be shared by {processes} processes",
            place="batch_size",
            got=f"{config.batch_size} = {config.batch_size // processes} × {processes} + {config.batch_size % processes}",
            fix=f"set `batch_size` to {near}",
        )
    if trainer.eval_data is None and config.eval_steps is not None:
        raise ConfigError("there is nothing to evaluate on", place="eval_steps", fix="set `eval_data`")
    if config.early_stopping is not None and (trainer.eval_data is None or config.eval_steps is None):
        missing = "eval_data" if trainer.eval_data is None else "eval_steps"
        raise ConfigError("early stopping needs evaluations under way", place="early_stopping", fix=f"set `{missing}`")
    if trainer.output is None:
        timed = config.checkpoint.minutes is not None and "minutes" in config.checkpoint.model_fields_set
        if asked := "every" if config.checkpoint.every else "minutes" if timed else None:
            raise ConfigError("there is no directory for checkpoints", place=f"checkpoint.{asked}", fix="set `output`")
    check_trackers(config.logging.trackers, trainer.output)


def load_policy(trainer: Trainer, devices: DeviceManager) -> PolicyModel:
    """Return the policy on the device with the run's options, loaded from its source or taken as passed in.

    Where `max_length` isn't set, `trainer.config` is given what the policy has positions for.

    Raises:
        ConfigError: sequences of `max_length` don't fit the model's positions.
    """
    config = trainer.config
    if isinstance(trainer.model, str | Path):
        policy = trainer.load(
            trainer.model,
            attention=config.attention,
            precision=config.precision,
            lora=config.lora,
            adapter=config.adapter,
            frozen_precision=config.frozen_precision,
            save_precision=config.save_precision,
            gradient_checkpointing=config.gradient_checkpointing,
            compile=config.compile,
            layout=config.batching.layout,
            share_prompts=config.batching.share_prompts,
            trust_remote_code=config.trust_remote_code,
            device=devices.device,
        )
    else:
        policy = trainer.adopt(trainer.model).to(devices.device)
        policy.configure(config)
    trainer.config = _with_length(config, policy.max_positions)
    return policy


def _with_length(config: TrainerConfig, positions: int | None) -> TrainerConfig:
    """Return the configuration with a `max_length` that is a number and fits the model's positions."""
    if positions is not None and (config.max_length or 0) > positions:
        raise ConfigError(
            "longer than the model's positions",
            place="max_length",
            got=f"{config.max_length} for a model of {positions}",
            fix=f"set `max_length: {positions}` or less",
        )
    if config.max_length is not None:
        return config
    length = min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    why = "all of the model's positions" if length == positions else "the default"
    log.info("max_length: %d, %s; longer rows are cut or dropped as `dataset.truncation` says", length, why)
    return config.model_copy(update={"max_length": length})


def build_models(trainer: Trainer, policy: PolicyModel, devices: DeviceManager) -> dict[str, nn.Parameter]:
    """Set `trainer.models`; return the trained parameters by name, a tied one once.

    Trained weights are float32 whatever the precision of products: an update of 16-bit weights rounds away.

    Raises:
        PluginError: `build` leaves out a role that the method trains.
    """
    place = type(trainer).__name__
    models = trainer.build(policy)
    if missing := [role for role in trainer.trains if role not in models]:
        raise PluginError(
            f"`build` returns no `{missing[0]}`, which the method trains", place=place, got=f"roles {sorted(models)}"
        )
    trainer.models = nn.ModuleDict(models).to(devices.device)
    for role, module in trainer.models.items():
        if role in trainer.trains:
            _settle_dropout(module, trainer.config, devices)
        else:
            module.requires_grad_(False)
    trained = {name: p for name, p in trainer.models.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("nothing to train: no parameter needs a gradient", place=place, fix="unfreeze the model")
    every = {id(p): p.numel() for p in trainer.models.parameters()}
    log.info(
        "trainable %s of %s parameters", f"{sum(p.numel() for p in trained.values()):,}", f"{sum(every.values()):,}"
    )
    narrow = [parameter for parameter in trained.values() if parameter.dtype in (torch.bfloat16, torch.float16)]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        log.info("%d trained tensors of 16 bits are kept in float32", len(narrow))
    return trained


def _settle_dropout(module: nn.Module, config: TrainerConfig, devices: DeviceManager) -> None:
    if config.dropout == "keep":
        return allow_dropout(module)
    asked = config.lora is not None and config.lora.dropout > 0
    context = functools.partial(devices.autocast, config.precision)
    if count := keep_still(module, adapters=not asked, context=context):
        log.info("the model's own dropout is off, in %d of its modules; `dropout: keep` leaves it on", count)
    return None


def connect(
    trainer: Trainer, *, distribution: Distribution, devices: DeviceManager, micro_batches: MicroBatches
) -> None:
    """Lend the method what its `experience` may ask of the loop."""
    score = functools.partial(score_in_parts, cut=micro_batches.cut, device=devices.device)
    trainer.seam = Seam(gather=distribution.gather, index=distribution.rank, score=score)


def training_mode(trainer: Trainer, training: bool) -> None:
    """Switch the trained models between training and evaluation mode; the others are always in evaluation mode."""
    for role, module in trainer.models.items():
        if training and role in trainer.trains:
            set_training(module)
        else:
            module.eval()


def create_reference(
    trainer: Trainer,
    policy: PolicyModel,
    datasets: tuple[EncodedData, EncodedData | None],
    *,
    distribution: Distribution,
    devices: DeviceManager,
    micro_batches: MicroBatches,
) -> None:
    """Set `trainer.reference` to the policy as it is now, before any step or checkpoint changes it."""
    mode: Any = getattr(trainer.config, "reference", "auto")
    config = trainer.config
    trainer.reference = Reference.create(
        policy,
        mode,
        cut=micro_batches.cut,
        hold=frozen_dtype(config.precision, config.frozen_precision),
        products=DTYPES[config.precision],
    )
    if trainer.reference.mode != "precompute":
        return
    training_mode(trainer, False)
    path = trainer.output / "reference.safetensors" if trainer.output is not None else None
    with torch.no_grad(), devices.autocast(trainer.config.precision):
        trainer.reference.precompute(
            itertools.chain.from_iterable(one_pass(trainer, dataset, distribution) for dataset in datasets if dataset),
            path,
        )
