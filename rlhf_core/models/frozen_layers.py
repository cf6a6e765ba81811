"""Parts of a model that stay as they are while the rest is trained, chosen by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from rlhf_core.infra.errors import ConfigError, did_you_mean
from rlhf_core.models.sequence_model import SequenceModel

log = logging.getLogger(__name__)

_FREEZE = "freeze"
_FROZEN: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()
"""What was frozen by name in a model; one in memory may be trained again, with other options."""


def freeze_by_name(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze parameters of the transformers models in a model, in place; heads on top of them are trained in any case.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left to train, or the model has an adapter.
    """
    parts = [part for part in model.modules() if isinstance(part, SequenceModel)]
    if any(part.has_adapter for part in parts):
        raise ConfigError(
            "the base under an adapter is frozen already",
            place=_FREEZE,
            fix="leave it out; `lora.exclude_modules` keeps new adapters off modules, `adapter: fold` trains every weight",
        )
    frozen = freeze_networks([part.network for part in parts], patterns)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trained:
        problem = "every parameter is frozen, so there is nothing to train"
        raise ConfigError(problem, place=_FREEZE, got=", ".join(patterns), fix="name fewer")
    log.info("frozen by name: %s parameters; %s are trained", f"{frozen:,}", f"{trained:,}")


def undo_freezing(model: nn.Module) -> None:
    """Let what an earlier run froze by name in a model be trained again."""
    for part in model.modules():
        if isinstance(part, SequenceModel):
            for parameter in _FROZEN.pop(part.network, []):
                parameter.requires_grad_(True)


def freeze_networks(networks: Sequence[Any], patterns: Sequence[str]) -> int:
    """Freeze parameters of transformers models, in place; return how many numbers they hold.

    A pattern means a parameter, or a module with all that is in it, by its full name in the language model or the end of one
    after a dot. In it, `*` stands for any text, `?` for a character and `[0-9]` for one of several.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    frozen: dict[int, nn.Parameter] = {}
    unused = dict.fromkeys(patterns)
    names: list[str] = []
    for network in networks:
        # A backbone without its language model has the names that it would have in one.
        alone: Any = getattr(network, "base_model", None)
        around = f"{network.base_model_prefix}." if alone is network else ""
        # A tied weight has a name in each of its modules.
        for own, parameter in network.named_parameters(remove_duplicate=False):
            names.append(name := around + own)
            if found := [pattern for pattern in patterns if _means(pattern, name)]:
                frozen[id(parameter)] = parameter
                unused = {pattern: None for pattern in unused if pattern not in found}
    for pattern in unused:
        near = did_you_mean(pattern, {part for name in names for part in name.split(".") if not part.isdigit()})
        fix = near or (f"names are such as `{names[len(names) // 2]}`" if names else None)
        raise ConfigError(f"no parameter of the model is named `{pattern}`", place=_FREEZE, fix=fix)
    found_trained = [parameter for parameter in frozen.values() if parameter.requires_grad]
    for parameter in found_trained:
        parameter.requires_grad_(False)
    for network in networks:
        _FROZEN[network] = found_trained
    return sum(parameter.numel() for parameter in frozen.values())


def _means(pattern: str, name: str) -> bool:
    """Tell whether a pattern means a parameter, or a module around it, by its name or the end of it."""
    parts = name.split(".")
    around = accumulate(parts, lambda outer, inner: f"{outer}.{inner}")
    return any(fnmatchcase(one, pattern) or fnmatchcase(one, f"*.{pattern}") for one in around)
