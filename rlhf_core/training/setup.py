"""The set-up of a run: the method with its rewards, models, data and reference, ready for its first window.

The training loop and the conformance kit set a method up by this one class, so what the kit checks is what a run trains.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.encoded_data import EncodedData
from rlhf_core.data.open_source import check_paths
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.seeds import seed_everything
from rlhf_core.models.dropout import allow_dropout, disable_dropout
from rlhf_core.models.reference import Reference
from rlhf_core.rewards import Rewards, check_rewards, open_rewards
from rlhf_core.training.context import RunContext
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.elastic_weights import ElasticWeights, describe_elastic_weights
from rlhf_core.training.fixed_prompts import open_fixed_prompts
from rlhf_core.training.loader import Loader, in_float32
from rlhf_core.training.loss_scale import LossScale
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.optimizer import AnyOptimizer, check_optimizer, create_optimizer
from rlhf_core.training.replay import open_replay
from rlhf_core.training.roles import (
    check_built_models,
    check_declared_roles,
    reference_of,
    set_training_mode,
    trained_roles,
)
from rlhf_core.training.run_data import EarlyData, keep_encoding, mixture_of, one_pass, open_data, open_data_early
from rlhf_core.training.run_samplers import RunSampler, RunSamplers, SamplerKey
from rlhf_core.training.trackers import check_trackers
from rlhf_core.training.update import Updater

log = logging.getLogger(__name__)

Context = TypeVar("Context", bound=RunContext)


class RunSetup:
    """Sets a method up for its first window, by the methods from `build_models` to `precompute_reference`, in their order.

    Args:
        trainer: the method, with a configuration, a model and data.
        distribution: the processes that train together; this one is one of them.

    Raises:
        ConfigError: options that can't hold together, before anything is loaded.
    """

    loader: Loader
    """The model loader that `Trainer.build` got. Set by `build_models`."""
    parameters: dict[str, nn.Parameter]
    """The trained parameters by name, which begins with the role; a tied one once. Set by `build_models`."""
    dataset: EncodedData
    """The rows to train on. Set by `open_data`."""
    eval_dataset: EncodedData | None
    """The held-out rows; None without `eval_data`. Set by `open_data`."""

    def __init__(self, trainer: Trainer[Any], distribution: Distribution, devices: DeviceManager) -> None:
        check_config(trainer, distribution, devices)
        self.trainer, self.distribution, self.devices = trainer, distribution, devices
        self.rewards = _open_rewards(trainer)
        self.replay = open_replay(trainer.config, self.rewards)
        """The rollouts of another run, in place of those that the policy would draw."""
        self.run_samplers = RunSamplers(trainer.config, self.rewards)
        """What draws completions in place of the engine alone."""
        self.earlier_tasks = describe_elastic_weights(trainer.config.ewc)
        """What elastic weight consolidation holds on to, by directory, for the run's record."""
        self.samplers: Mapping[SamplerKey, RunSampler] = {}
        self.prompts = open_fixed_prompts(trainer)
        """The fixed prompts of `logging.samples`."""
        self.micro_batches = MicroBatches(trainer.config, divide=trainer.splits_groups)
        self._early: EarlyData | None = None

    @property
    def config(self) -> TrainerConfig:
        """The trainer's configuration; `max_length` is a number once the models are built."""
        return self.trainer.config

    def build_models(self) -> None:
        """Build the models by role, as `trainer.models` and `trainer.reference`, from the run's seed.

        Raises:
            DataError: the data don't exist, or a row has a mistake, which is found before a model is loaded.
            PluginError: `build` returns other roles than the method declares.
        """
        for data in (self.trainer.data, self.trainer.eval_data):
            check_paths(data)
        self._early = open_data_early(self.trainer)
        self.loader = Loader(self.trainer, self.devices, self.micro_batches)
        seed_everything(self.config.seed, "model")
        self.parameters = build_models(self.trainer, self.loader, self.devices)
        self.micro_batches.fit(self.devices.device, _width(self.trainer.models))

    def open_data(self) -> None:
        """Open the training data and the held-out data, encoded by the main model's tokenizer."""
        tokenizer, early = self.loader.main_model.tokenizer, self._early
        if early is not None and early.serves(tokenizer, self.config.length_limit):
            self.dataset, self.eval_dataset = early.dataset, early.held_out
        else:
            # In memory, or the method changes its tokenizer.
            self.dataset, self.eval_dataset = open_data(self.trainer, tokenizer)
        self._early = None

    def load_rewards(self) -> None:
        """Load what rewards and samplers need, so that a model that isn't there is reported before the first rollout."""
        self.rewards.prepare()
        # What is replayed isn't drawn.
        without = {"rollout_sampler"} if self.replay is not None else set()
        self.samplers = self.run_samplers.load(dict(self.trainer.models.items()).get("policy"), without=without)

    def inspect_data(self) -> None:
        """Keep with the trained models how the data were encoded, and let the method inspect the data."""
        keep_encoding(self.trainer, self.dataset)
        if (mixture := mixture_of(self.dataset)) is not None:
            log.info("a step's rows: %s", mixture)
        for dataset in self._datasets:
            self.trainer.inspect(dataset)

    def share_parameters(self) -> None:
        """Give the models of every process the first one's parameters."""
        self.distribution.same_parameters(self.trainer.models)

    def precompute_reference(self, *, alone: bool = False) -> None:
        """Let a reference in the mode `precompute` score all rows, before a step or a checkpoint changes the policy.

        Args:
            alone: whether this process scores every row by itself, instead of its share of them.
        """
        reference, output = reference_of(self.trainer), self.trainer.output
        if reference is None or reference.mode != "precompute":
            return
        distribution = Distribution(self.devices.device) if alone else self.distribution
        set_training_mode(self.trainer, False)
        batches = (batch for dataset in self._datasets for batch in one_pass(self.trainer, dataset, distribution))
        with torch.no_grad(), self.devices.autocast(self.config.precision):
            reference.precompute(batches, output / "reference.safetensors" if output is not None else None)

    @property
    def _datasets(self) -> list[EncodedData]:
        """The rows to train on, and the held-out rows where there are some."""
        return [self.dataset] if self.eval_dataset is None else [self.dataset, self.eval_dataset]

    def make_optimizer(self) -> AnyOptimizer:
        """Return a new optimiser over the trained parameters."""
        return create_optimizer(self.parameters.items(), self.config, self.loader.factors, models=self.trainer.models)

    def make_context(self, kind: type[Context], **options: Any) -> Context:
        """Return the run context that the method's experience and evaluation get."""
        return kind(
            self.trainer,
            self.distribution,
            self.devices,
            self.micro_batches,
            self.rewards,
            samplers=self.samplers,
            **options,
        )

    def make_updater(self, optimizer: AnyOptimizer, loss_scale: LossScale, notify: Callable[..., None]) -> Updater:
        """Return what makes the optimiser's step on a window; `notify` is called with the name and fields of an event.

        Raises:
            ConfigError: elastic weight consolidation doesn't suit the model.
        """
        ewc = self.config.ewc
        return Updater(
            self.trainer,
            optimizer,
            self.parameters,
            distribution=self.distribution,
            devices=self.devices,
            micro_batches=self.micro_batches,
            loss_scale=loss_scale,
            notify=notify,
            elastic=None if ewc is None else ElasticWeights(ewc, self.loader.main_model),
        )


def check_config(trainer: Trainer[Any], distribution: Distribution, devices: DeviceManager) -> None:
    """Refuse options that can't hold together, before anything is loaded.

    Raises:
        ConfigError: names the option and what to set.
    """
    config, processes = trainer.config, distribution.world_size
    check_declared_roles(trainer)
    devices.check(config.precision)
    check_optimizer(config.optimizer)
    if config.batch_size % processes:
        below = config.batch_size // processes * processes
        near = f"{below} or {below + processes}" if below else str(processes)
        raise ConfigError(
            f"{config.batch_size} rows can't be shared by {processes} processes",
            place="batch_size",
            got=f"{config.batch_size} = {config.batch_size // processes} × {processes} + {config.batch_size % processes}",
            fix=f"set `batch_size` to {near}",
        )
    if trainer.eval_data is None:
        for name in ("eval_steps", "eval_samples", "eval_temperature", "eval_sampler"):
            if name in type(config).model_fields and getattr(config, name) != type(config).model_fields[name].default:
                raise ConfigError("evaluations need held-out data", place=name, fix="set `eval_data`")
    for name, what in (("early_stopping", "early stopping"), ("keep_best", "finding the best checkpoint")):
        if getattr(config, name) is not None and (trainer.eval_data is None or config.eval_steps is None):
            missing = "eval_data" if trainer.eval_data is None else "eval_steps"
            raise ConfigError(f"{what} needs evaluations during the run", place=name, fix=f"set `{missing}`")
    if trainer.output is None:
        if config.keep_best is not None:
            raise ConfigError("there is no directory to keep a checkpoint in", place="keep_best", fix="set `output`")
        timed = config.checkpoint.minutes is not None and "minutes" in config.checkpoint.model_fields_set
        if asked := "every" if config.checkpoint.every else "minutes" if timed else None:
            raise ConfigError("there is no directory for checkpoints", place=f"checkpoint.{asked}", fix="set `output`")
    check_trackers(config.logging.trackers, trainer.output)


def _open_rewards(trainer: Trainer[Any]) -> Rewards:
    """Return the rewards of the run, from its configuration or as they were given in Python, before anything is loaded.

    Raises:
        ConfigError: a method that learns from rewards has none, or one that doesn't has some.
    """
    config, given = trainer.config, trainer.rewards
    if not isinstance(config, OnlineConfig):
        if given is not None:
            got = f"{len(given)} of them"
            raise ConfigError("the method doesn't use rewards", place="rewards", got=got, fix="leave them out")
        return open_rewards([])
    if given is None:
        check_rewards(config)
        return open_rewards(config.rewards)
    if config.rewards:
        raise ConfigError(
            "rewards are given in the configuration and in Python", place="rewards", fix="give them in one of the two"
        )
    if not given and config.needs_rewards:
        raise ConfigError("the method learns from rewards, and none is given", place="rewards", got="an empty list")
    return open_rewards(given)


def _width(models: nn.Module) -> int | None:
    """Return the width of the widest model's hidden states; None where no model's configuration names it."""
    configs = [module.config for module in models.modules() if isinstance(module, PreTrainedModel)]
    widths = [getattr(config.get_text_config(), "hidden_size", None) for config in configs]
    return max((width for width in widths if isinstance(width, int)), default=None)


def build_models(trainer: Trainer[Any], loader: Loader, devices: DeviceManager) -> dict[str, nn.Parameter]:
    """Set `trainer.models` and `trainer.reference`; return the trained parameters by name, a tied one once.

    Trained weights are float32 whatever the precision of products.
    """
    returned = trainer.build(loader)
    main = loader.main_model
    built = check_built_models(trainer, returned, loader.loaded)
    for role, model in built.items():
        if isinstance(model, Reference):
            trainer.reference = model
        elif trainer.roles[role].trained:
            in_float32(model)
    modules = {role: model for role, model in built.items() if not isinstance(model, Reference)}
    # What two roles share has the name, and with it the learning rate and clipping, of the run's own model.
    order = sorted(modules, key=lambda role: modules[role] is not main)
    trainer.models = nn.ModuleDict({role: modules[role] for role in order}).to(devices.device)
    for role, module in trainer.models.items():
        if trainer.roles[role].trained:
            _set_dropout(module, trainer.config, loader.lora(role), devices)
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


def _set_dropout(module: nn.Module, config: TrainerConfig, lora: LoraConfig | None, devices: DeviceManager) -> None:
    """Switch the model's own dropout off, unless `dropout` is `keep`; dropout of LoRA is on where its options ask for it."""
    if config.dropout == "keep":
        allow_dropout(module)
        return
    of_lora = lora is not None and lora.dropout > 0
    context = functools.partial(devices.autocast, config.precision)
    if count := disable_dropout(module, adapters=not of_lora, context=context):
        log.info("the model's own dropout is off, in %d of its modules; `dropout: keep` leaves it on", count)
