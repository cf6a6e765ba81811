"""Elastic weight consolidation in a run: a penalty on how far the weights are from those that earlier tasks need.

The penalty is a function of the weights alone. So it has no part in micro-batches and processes: its gradient is added once per
step, to gradients that are summed over all of them already. It is as strong whatever the batch, and the step stays exact on a
resume. Any method's run has it by the option `ewc`, a third party's too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.config.elastic_options import EWCConfig
from rlhf_core.infra.errors import ConfigError, ModelError, did_you_mean
from rlhf_core.models.diagonal_fisher import DiagonalFisher, elastic_penalty, read_manifest
from rlhf_core.models.headed_model import HeadedModel

log = logging.getLogger(__name__)

METRIC = "ewc_penalty"
"""Name of the metric with the penalty's value, λ included; a step's `loss` includes it."""


@dataclass(frozen=True)
class _Anchored:
    """One weight that is trained, directly or by an adapter, with what holds it."""

    value: Callable[[], Tensor]
    """Returns the weight as the model uses it, with gradients into what is trained."""
    fisher: Tensor
    anchor: Tensor


class ElasticWeights:
    """The penalty λ/2 Σ F (θ - θ*)² of a run, over all weights that it trains and that an earlier task has information on.

    Args:
        config: the directories, and λ.
        model: the run's own model, on its device.

    Raises:
        ConfigError: a directory has no Fisher information, it is of another model, or an adapter changes weights in a way that
            isn't supported.
        ModelError: a file is damaged.
    """

    def __init__(self, config: EWCConfig, model: Any) -> None:
        self.config = config
        weights, places = trained_weights(model)
        self._anchored: list[_Anchored] = []
        for directory in config.fisher:
            self._anchored += _anchored(DiagonalFisher.load(directory), weights, places, directory)
        log.info(
            "elastic weight consolidation holds %d of the model's weights to %s",
            len({id(one.value) for one in self._anchored}),
            ", ".join(config.fisher),
        )

    def add_gradients(self) -> Tensor:
        """Add the penalty's gradient to that of every parameter, and return its value, a scalar on the device, without gradient.

        One weight is worked on after the other, so that of the weights that adapters change no more than one is in memory.
        """
        total: Tensor | None = None
        for one in self._anchored:
            with torch.enable_grad():
                penalty = self.config.weight * elastic_penalty(one.value(), one.fisher, one.anchor)
            penalty.backward()
            total = penalty.detach() if total is None else total + penalty.detach()
        assert total is not None
        return total


def describe_elastic_weights(config: EWCConfig | None) -> dict[str, Any]:
    """Return for each directory how its Fisher information was computed, and its files' hashes, for the run's record.

    Raises:
        ConfigError: a directory has none.
    """
    return {} if config is None else {directory: read_manifest(directory) for directory in config.fisher}


def trained_weights(model: Any) -> tuple[dict[str, Callable[[], Tensor]], set[str]]:
    """Return what a run trains in its own model: weight's name → a function that returns the weight as the model uses it.

    A weight under a LoRA adapter is the frozen weight plus the adapter's update. The second result has the names of all weights.

    Raises:
        ConfigError: an adapter isn't a plain LoRA on a module.
    """
    inner = model.backbone_list[0] if isinstance(model, HeadedModel) else model
    network: nn.Module = getattr(inner, "network", inner)
    found: dict[str, Callable[[], Tensor]] = {}
    every: set[str] = set()
    for name, parameter in network.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        every.add(plain)
        if ".base_layer." in name and not name.endswith(".bias"):
            if update := _update_of(network, name, parameter):
                found[plain] = update
        elif parameter.requires_grad:
            found[plain] = functools.partial(_as_it_is, parameter)
    return found, every


def _as_it_is(weight: nn.Parameter) -> Tensor:
    return weight


def _update_of(network: nn.Module, name: str, base: nn.Parameter) -> Callable[[], Tensor] | None:
    """Return what computes the weight under an adapter as it is used; None where nothing of it is trained.

    Args:
        name: of the base weight in the network.
    """
    layer: Any = network.get_submodule(name.partition(".base_layer.")[0])
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    active = [one for one in layer.active_adapters if one in layer.scaling]
    kind = type(layer).__name__
    odd = (
        "a quantised base"
        if not base.is_floating_point()
        else "DoRA"
        if any(getattr(layer, "use_dora", {}).values()) or getattr(layer, "lora_magnitude_vector", {})
        else "an adapter on a parameter (`lora.target_parameters`)"
        if kind == "ParamWrapper"
        else f"{len(active)} active adapters"
        if len(active) != 1
        else "another kind of adapter"
        if not hasattr(layer, "get_delta_weight")
        else None
    )
    if odd is not None:
        raise ConfigError(
            f"elastic weight consolidation can't be computed through {odd}",
            place="ewc",
            got=f"`{name.partition('.base_layer.')[0]}`",
            fix="train plain LoRA adapters on modules, or every weight (`lora: null`)",
        )
    return lambda: base.float() + layer.get_delta_weight(active[0]).float()


def _anchored(
    known: DiagonalFisher, weights: Mapping[str, Callable[[], Tensor]], every: Iterable[str], directory: str
) -> list[_Anchored]:
    """Return the weights that are trained and have a Fisher information.

    Raises:
        ConfigError: names or shapes are those of another model, or nothing of it is trained.
    """
    place, names = f"ewc.fisher, {directory}", set(every)
    if missing := next((name for name in known.fisher if name not in names), None):
        raise ConfigError(
            f"the Fisher information is that of another model: this one has no weight `{missing}`",
            place=place,
            fix=did_you_mean(missing, names) if len(names) < 8 else "compute it with a model of the same architecture",
        )
    found = []
    for name, value in weights.items():
        if name not in known.fisher:
            continue
        with torch.no_grad():
            now = value()
        fisher, anchor = known.fisher[name], known.weights.get(name)
        if anchor is None or anchor.shape != fisher.shape:
            raise ModelError(f"the file of weights doesn't fit that of the Fisher information at `{name}`", place=place)
        if now.shape != fisher.shape:
            got = f"{tuple(now.shape)} for {tuple(fisher.shape)}"
            raise ConfigError(
                f"the Fisher information is that of another model: `{name}` has another shape", place=place, got=got,
                fix="compute it with a model of the same architecture",
            )  # fmt: skip
        found.append(_Anchored(value, fisher.to(now.device), anchor.to(now.device)))
    if not found:
        raise ConfigError(
            "none of the weights that are trained has a Fisher information",
            place=place,
            got=f"{len(weights)} trained weights",
        )
    return found
