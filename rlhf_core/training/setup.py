"""What a run needs before its first step: a configuration that fits, models by role, the reference, the rewards."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any

import torch
from torch import nn

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.base import EncodedData
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models.dropout import allow_dropout, keep_still, set_training
from rlhf_core.models.reference import Reference
from rlhf_core.rewards import Rewards, check_rewards, open_rewards
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.loader import Loader, check_roles, reference_of, roles_of, widened
from rlhf_core.training.run_data import one_pass
from rlhf_core.training.trackers import check_trackers

log = logging.getLogger(__name__)


def check_config(trainer: Trainer[Any], distribution: Distribution, devices: DeviceManager) -> None:
    """Refuse options that can't hold together, before anything is loaded.

    Raises:
        ConfigError: names the option and what to set.
    """
    config, processes = trainer.config, distribution.world_size
    check_roles(trainer)
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


def prepare_rewards(trainer: Trainer[Any]) -> Rewards:
    """Return the rewards of the run, from its configuration or as they were given in Python, before anything is loaded.

    Raises:
        ConfigError: a method that learns from rewards has none, or one that doesn't has some.
    """
    config, given = trainer.config, trainer.rewards
    if not isinstance(config, OnlineConfig):
        if given is not None:
            got = f"{len(given)} of them"
            raise ConfigError("the method learns from no rewards", place="rewards", got=got, fix="leave them out")
        return open_rewards([])
    if given is None:
        check_rewards(config)
        return open_rewards(config.rewards)
    if config.rewards:
        raise ConfigError("rewards are given twice", place="rewards", fix="give them in the configuration or in Python")
    if not given and config.needs_rewards:
        raise ConfigError("there is nothing to learn from", place="rewards", got="an empty list")
    return open_rewards(given)


def build_models(trainer: Trainer[Any], loader: Loader, devices: DeviceManager) -> dict[str, nn.Parameter]:
    """Set `trainer.models` and `trainer.reference`; return the trained parameters by name, a tied one once.

    Trained weights are float32 whatever the precision of products.

    Raises:
        PluginError: `build` returns other roles than the method declares.
    """
    built = roles_of(trainer, trainer.build(loader), loader)
    for role, model in built.items():
        if isinstance(model, Reference):
            trainer.reference = model
        elif trainer.roles[role].trained:
            widened(model)
    modules = {role: model for role, model in built.items() if not isinstance(model, Reference)}
    # What two roles share has the name, and with it the learning rate and clipping, of the run's own model.
    order = sorted(modules, key=lambda role: modules[role] is not loader.given)
    trainer.models = nn.ModuleDict({role: modules[role] for role in order}).to(devices.device)
    for role, module in trainer.models.items():
        if trainer.roles[role].trained:
            _settle_dropout(module, trainer.config, loader.lora(role), devices)
        else:
            module.requires_grad_(False)
    trained = {name: p for name, p in trainer.models.named_parameters() if p.requires_grad}
    for role in trained_roles(trainer):
        if not any(parameter.requires_grad for parameter in trainer.models[role].parameters()):
            raise ConfigError(
                f"nothing to train in `{role}`: no parameter needs a gradient",
                place=type(trainer).__name__,
                fix="unfreeze the model",
            )
    every = {id(p): p.numel() for p in trainer.models.parameters()}
    log.info(
        "trainable %s of %s parameters", f"{sum(p.numel() for p in trained.values()):,}", f"{sum(every.values()):,}"
    )
    return trained


def trained_roles(trainer: Trainer[Any]) -> list[str]:
    """Return the roles of the models that are trained."""
    return [role for role in trainer.models if trainer.roles[role].trained]


def _settle_dropout(module: nn.Module, config: TrainerConfig, lora: LoraConfig | None, devices: DeviceManager) -> None:
    if config.dropout == "keep":
        return allow_dropout(module)
    asked = lora is not None and lora.dropout > 0
    context = functools.partial(devices.autocast, config.precision)
    if count := keep_still(module, adapters=not asked, context=context):
        log.info("the model's own dropout is off, in %d of its modules; `dropout: keep` leaves it on", count)
    return None


def training_mode(trainer: Trainer[Any], training: bool) -> None:
    """Switch the trained models between training and evaluation mode; the others are always in evaluation mode."""
    for role, module in trainer.models.items():
        if training and trainer.roles[role].trained:
            set_training(module)
        else:
            module.eval()


def precompute_reference(
    trainer: Trainer[Any],
    datasets: tuple[EncodedData, EncodedData | None],
    *,
    distribution: Distribution,
    devices: DeviceManager,
) -> None:
    """Let a reference that is computed beforehand score all rows, before any step or checkpoint changes the policy."""
    reference = reference_of(trainer)
    if reference is None or reference.mode != "precompute":
        return
    training_mode(trainer, False)
    path = trainer.output / "reference.safetensors" if trainer.output is not None else None
    with torch.no_grad(), devices.autocast(trainer.config.precision):
        reference.precompute(
            itertools.chain.from_iterable(one_pass(trainer, dataset, distribution) for dataset in datasets if dataset),
            path,
        )
