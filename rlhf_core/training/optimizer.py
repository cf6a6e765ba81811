"""Optimisers with their state by parameter name, and learning rates that are pure functions of the step."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.config.training import BYTES_PER_WEIGHT, LORA_RATE_FACTOR, OptimizerConfig, TrainerConfig
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models.precision import blocks_of

log = logging.getLogger(__name__)

_FACTOR = "learning_rate_factor"
"""The key of a parameter group that holds its role's multiple of the run's learning rate."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step: a linear rise over the warm-up, then constant or down to a lowest one.

    Steps count from 1; a run whose steps aren't known beforehand counts its batches of data in their place. Over W warm-up
    steps the rate is peak · s / (W + 1); after that, with S steps in all and the share p = (s - 1 - W) / (S - W) that is done, it
    is peak · (m + (1 - m) · f): f is (1 + cos πp) / 2, 1 - p, or 1, and m the lowest rate as a share of the peak. It would be
    m · peak at the step after the last, so with m = 0, too, no step has a rate of 0 and none is wasted.
    """

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    warmup_steps: int = 0
    total_steps: int | None = None
    """None where the data's length isn't known, which only a constant rate with a warm-up of so many steps allows."""
    lowest: float = 0.0
    """m, the share of the peak that the rate falls to."""

    @classmethod
    def create(cls, config: TrainerConfig, total_steps: int | None) -> Schedule:
        """Return the schedule of a run.

        Args:
            total_steps: steps of the whole run; None where their number isn't known.

        Raises:
            ConfigError: it isn't known, and the schedule depends on it; or the warm-up leaves no step for the peak.
        """
        peak, given = config.learning_rate, config.warmup_steps
        if total_steps is None:
            if config.lr_schedule != "constant" or config.warmup_ratio:
                raise ConfigError(
                    "the learning rate's schedule needs the number of steps, which isn't known of streamed data",
                    place="lr_schedule",
                    got=f"`{config.lr_schedule}` with warmup_ratio {config.warmup_ratio:g}",
                    fix="set `max_steps`, or `lr_schedule: constant` with `warmup_steps` or `warmup_ratio: 0`",
                )
            return cls("constant", peak, given or 0)
        if given is not None and given >= total_steps:
            raise ConfigError(
                "the warm-up leaves no step for the learning rate itself",
                place="warmup_steps",
                got=f"{given} of {total_steps} steps",
                fix=f"set `warmup_steps` to less than {total_steps}, or train for more steps",
            )
        # At least one step is left for the peak, however few there are.
        warmup = min(math.ceil(config.warmup_ratio * total_steps), total_steps - 1) if given is None else given
        return cls(config.lr_schedule, peak, warmup, total_steps, config.min_learning_rate_ratio)

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / (self.warmup_steps + 1)
        if self.kind == "constant" or self.total_steps is None:
            return self.peak
        done = min((step - 1 - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.peak * (self.lowest + (1 - self.lowest) * left)


class OptimizerPair:
    """Two optimisers that step together, each for parameters of its own."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Make one step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release the gradients of all parameters, or set them to 0."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


AnyOptimizer = torch.optim.Optimizer | OptimizerPair


def create_optimizer(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    config: TrainerConfig,
    factors: Mapping[str, float] | None = None,
    *,
    models: nn.Module | None = None,
) -> AnyOptimizer:
    """Return the optimiser of the parameters that need gradients, with weight decay on matrices only (not on biases and norms).

    With `adamw` all of them are AdamW's. With `adamw_8bit` (Dettmers et al. 2021, arXiv 2110.02861) and `muon` (Jordan et al.
    2024) the matrices inside the layers of transformers models are that optimiser's, and everything else is AdamW's. Muon's
    updates are scaled by 0.2 · √(longer side) (Liu et al. 2025, arXiv 2502.16982): rate and decay mean what they do for AdamW.

    Args:
        parameters: a module or named parameters; a name begins with its role.
        config: gives the learning rate and `optimizer`.
        factors: learning rates by role as multiples of that rate; 1 where a role isn't named.
        models: what the parameters are of, where `parameters` is no module.

    Raises:
        ConfigError: nothing is trained, or nothing that the optimiser is for, or its package isn't installed.
    """
    named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    if not trained:
        raise ConfigError("nothing to train: no parameter needs a gradient", place="optimizer", fix="unfreeze a model")
    options = config.optimizer
    if options.name == "adamw":
        return _adamw(_groups(trained, config, factors), options)
    own_models = parameters if isinstance(parameters, nn.Module) else models
    inside = layer_matrices(own_models) if own_models is not None else set()
    matrices = {name: parameter for name, parameter in trained.items() if id(parameter) in inside}
    others = {name: parameter for name, parameter in trained.items() if name not in matrices}
    if not matrices:
        raise ConfigError(
            f"`{options.name}` is for the matrices in a model's layers, and none of them is trained",
            place="optimizer.name",
            fix="set `optimizer.name: adamw`",
        )
    count = sum(parameter.numel() for parameter in matrices.values())
    log.info("%s steps %s parameters in %d matrices, AdamW the others", options.name, f"{count:,}", len(matrices))
    first = _MATRIX_OPTIMIZERS[options.name](_groups(matrices, config, factors), options)
    return OptimizerPair(first, _adamw(_groups(others, config, factors), options)) if others else first


def check_optimizer(options: OptimizerConfig) -> None:
    """Refuse an optimiser whose package isn't installed.

    Raises:
        ConfigError: names the extra to install.
    """
    if options.name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "`optimizer.name: adamw_8bit` needs the package bitsandbytes",
            place="optimizer.name",
            fix='pip install "rlhf-core[adamw-8bit]", or set `optimizer.name: adamw`',
        )


def layer_matrices(models: nn.Module) -> set[int]:
    """Return the ids of the matrices inside the layers of transformers models, those of adapters on them too.

    Embeddings, output layers and heads aren't inside a layer; stacked experts are no matrices.
    """
    blocks = {
        id(block): block
        for model in models.modules()
        if isinstance(model, PreTrainedModel)
        for block in blocks_of(model)
    }
    lookups = {id(p) for module in models.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return {id(p) for block in blocks.values() for p in block.parameters() if p.ndim == 2} - lookups


def _groups(
    trained: Mapping[str, nn.Parameter], config: TrainerConfig, factors: Mapping[str, float] | None
) -> list[dict[str, Any]]:
    """Return parameter groups, by the learning-rate factor of their role and whether their weights decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        factor = (factors or {}).get(name.partition(".")[0], 1.0)
        groups.setdefault((factor, parameter.ndim < 2), []).append(parameter)
    return [
        {
            "params": group,
            "lr": config.learning_rate * factor,
            "weight_decay": 0.0 if small else config.optimizer.weight_decay,
            _FACTOR: factor,
        }
        for (factor, small), group in sorted(groups.items(), key=lambda item: item[0])
    ]


def _adamw(groups: list[dict[str, Any]], options: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW, by the fused kernel on the devices that have one.

    On two CPU cores a step of 135 M parameters took 64 ms, against 407 ms with `foreach` and 358 ms with a plain loop.
    """
    fused = all(
        parameter.device.type in {"cpu", "cuda", "mps"} and torch.is_floating_point(parameter)
        for group in groups
        for parameter in group["params"]
    )
    return torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.epsilon, fused=fused)


def _adamw_8bit(groups: list[dict[str, Any]], options: OptimizerConfig) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW with moments in 8 bits, in blocks of 256; matrices below 4,096 weights have them in 32."""
    check_optimizer(options)
    # Its import says what it lacks for products, which aren't used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(groups, betas=(options.beta1, options.beta2), eps=options.epsilon)
    return made


def _muon(groups: list[dict[str, Any]], options: OptimizerConfig) -> torch.optim.Optimizer:
    """Return PyTorch's Muon with updates of AdamW's size."""
    return torch.optim.Muon(groups, momentum=options.momentum, adjust_lr_fn="match_rms_adamw")


_MATRIX_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw_8bit": _adamw_8bit,
    "muon": _muon,
}


def state_bytes(parameters: Mapping[str, nn.Parameter], config: TrainerConfig, models: nn.Module) -> int:
    """Return the bytes of the optimiser's state for trained float32 parameters, once it has made a step."""
    inside = layer_matrices(models) if config.optimizer.name != "adamw" else set()
    of_matrices = BYTES_PER_WEIGHT[config.optimizer.name]
    return round(
        sum(
            parameter.numel() * (of_matrices if id(parameter) in inside else BYTES_PER_WEIGHT["adamw"])
            for parameter in parameters.values()
        )
    )


def warn_of_rate_for_every_weight(
    names: Iterable[str], config: TrainerConfig, factors: Mapping[str, float] | None = None
) -> None:
    """Warn where adapters are trained at a learning rate that fits training every weight, at which they learn little.

    A method's default rate is one for every weight. A rate nearer to it than to ten times as much, on a scale of factors, counts.

    Args:
        names: of the trained parameters; each begins with its role.
        config: gives the learning rate, and by its class the method's default.
        factors: learning rates by role as multiples of that rate; 1 where a role isn't named.
    """
    fields = type(config).model_fields
    default = fields["learning_rate"].default
    if fields["lora"].default is not None:  # the default rate is one for adapters
        return
    for role in sorted({name.partition(".")[0] for name in names if ".lora_" in name}):
        rate = config.learning_rate * (factors or {}).get(role, 1.0)
        if rate < default * math.sqrt(LORA_RATE_FACTOR):
            log.warning(
                "learning_rate: %g fits training every weight, and the `%s` trains LoRA adapters, which learn little at it; about"
                " ten times the rate of every weight is usual: %g",
                rate,
                role,
                default * LORA_RATE_FACTOR,
            )


def set_learning_rate(optimizer: AnyOptimizer, rate: float) -> None:
    """Set the learning rate of every parameter group to `rate` times the factor of its role."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]


def optimizer_state(
    optimizer: AnyOptimizer, named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state by parameter name, tensors and other values apart; the keys are `KEY/PARAMETER`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in named.items():
        for part in _parts(optimizer):
            for key, value in part.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key}/{name}"] = value
                else:
                    values[f"{key}/{name}"] = value
    return tensors, values


def load_optimizer_state(
    optimizer: AnyOptimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    place: str,
) -> None:
    """Restore what `optimizer_state` returned; learning rates, betas and decay stay those of the configuration.

    Raises:
        ModelError: the state is of a parameter that isn't trained now.
    """
    parts = _parts(optimizer)
    index: dict[int, tuple[int, int]] = {}
    for number, part in enumerate(parts):
        order = [parameter for group in part.param_groups for parameter in group["params"]]
        index |= {id(parameter): (number, position) for position, parameter in enumerate(order)}
    states: list[dict[int, dict[str, Any]]] = [{} for _ in parts]
    for key_name, value in [*tensors.items(), *values.items()]:
        key, _, name = key_name.partition("/")
        if name not in named or id(named[name]) not in index:
            raise ModelError("the optimiser's state is of a parameter that isn't trained", place=place, got=name)
        number, position = index[id(named[name])]
        states[number].setdefault(position, {})[key] = value
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def _parts(optimizer: AnyOptimizer) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer.parts if isinstance(optimizer, OptimizerPair) else (optimizer,)
