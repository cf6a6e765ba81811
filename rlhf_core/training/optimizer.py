"""AdamW with its state by parameter name, and learning rates that are pure functions of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_core.config.training import LORA_RATE_FACTOR, TrainerConfig
from rlhf_core.infra.errors import ConfigError, ModelError

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


def create_optimizer(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    config: TrainerConfig,
    factors: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that need gradients, with weight decay on matrices only (not on biases and norms).

    The fused kernel is used on the devices that have one: on two CPU cores a step of 135 M parameters took 64 ms, against
    407 ms with `foreach` and 358 ms with a plain loop.

    Args:
        parameters: a module or named parameters; a name begins with its role.
        config: gives the learning rate and `optimizer`.
        factors: learning rates by role as multiples of that rate; 1 where a role isn't named.
    """
    named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trained:
        raise ConfigError("nothing to train: no parameter needs a gradient", place="optimizer", fix="unfreeze a model")
    options = config.optimizer
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        factor = (factors or {}).get(name.partition(".")[0], 1.0)
        groups.setdefault((factor, parameter.ndim < 2), []).append(parameter)
    fused = all(
        parameter.device.type in {"cpu", "cuda", "mps"} and torch.is_floating_point(parameter)
        for _, parameter in trained
    )
    return torch.optim.AdamW(
        [
            {
                "params": group,
                "lr": config.learning_rate * factor,
                "weight_decay": 0.0 if small else options.weight_decay,
                _FACTOR: factor,
            }
            for (factor, small), group in sorted(groups.items(), key=lambda item: item[0])
        ],
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=fused,
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


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group to `rate` times the factor of its role."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state by parameter name, tensors and other values apart; the keys are `KEY/PARAMETER`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                values[f"{key}/{name}"] = value
    return tensors, values


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
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
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {id(parameter): position for position, parameter in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    for key_name, value in [*tensors.items(), *values.items()]:
        key, _, name = key_name.partition("/")
        if name not in named or id(named[name]) not in index:
            raise ModelError("the optimiser's state is of a parameter that isn't trained", place=place, got=name)
        state.setdefault(index[id(named[name])], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
