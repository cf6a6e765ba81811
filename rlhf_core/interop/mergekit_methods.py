"""mergekit's methods in terms of ours, and which of its definitions ours reproduce.

Everything here was found from mergekit's documentation and from what version 0.1.5 does with small tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.config.base import place_of
from rlhf_core.infra.errors import ConfigError

_DROPS = (
    "it drops other entries, and scales the rest to the L1 norm of all where ours divides by the probability of keeping"
)


@dataclass(frozen=True)
class Peer:
    """One of mergekit's methods in our terms."""

    ours: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of ours that make it that method."""
    per_model: Mapping[str, str] = field(default_factory=dict)
    """Its parameters of each model → our options."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Its parameters of the whole merge → our options."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Its defaults, by its names; a parameter without one must be given."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters for which we have one value alone, with that value."""
    idle: tuple[str, ...] = ()
    """Its parameters that change nothing, or only how closely it computes."""
    based: bool = True
    """Whether differences are taken from its base model."""
    differs: str | None = None
    """What it does otherwise than ours, if anything."""


_SUM = {"lambda": "scale"}
_FUSED = {**_SUM, "normalize": "normalize"}
_WEIGHT = {"weight": "weight"}
_SPARSE = {**_WEIGHT, "density": "density"}
_DENSE = {"density": 1.0, "lambda": 1.0}

METHODS: dict[str, Peer] = {
    "linear": Peer(
        "linear", per_model=_WEIGHT, shared={"normalize": "normalize"}, defaults={"normalize": True}, based=False
    ),
    "slerp": Peer("slerp", shared={"t": "weight"}),
    "nuslerp": Peer(
        "slerp",
        per_model=_WEIGHT,
        only={"nuslerp_flatten": True},
        idle=("nuslerp_row_wise",),
        based=False,
        differs="between tensors that are nearly parallel it takes the arc, where ours takes the straight line",
    ),
    "passthrough": Peer("passthrough", per_model={"scale": "weight"}, defaults={"scale": 1.0}, based=False),
    "task_arithmetic": Peer(
        "task_arithmetic",
        per_model=_WEIGHT,
        shared=_SUM,
        defaults={"lambda": 1.0},
        only={"normalize": False},
        idle=("density", "rescale"),
    ),
    "ties": Peer(
        "ties",
        {"majority": "weighted", "trim_scope": "tensor"},
        per_model=_SPARSE,
        shared=_FUSED,
        defaults=_DENSE | {"normalize": True},
        only={"rescale": False},
    ),
    "dare_linear": Peer(
        "dare",
        {"election": "none", "trim": 1.0},
        per_model=_SPARSE,
        shared=_FUSED,
        defaults=_DENSE | {"normalize": False},
        only={"rescale": True},
        differs=_DROPS,
    ),
    "dare_ties": Peer(
        "dare",
        {"election": "ties", "trim": 1.0},
        per_model=_SPARSE,
        shared=_FUSED,
        defaults=_DENSE | {"normalize": False},
        only={"rescale": True},
        differs=_DROPS,
    ),
    "breadcrumbs": Peer(
        "breadcrumbs",
        {"election": "none", "scope": "tensor"},
        per_model=_SPARSE | {"gamma": "gamma"},
        shared=_FUSED,
        defaults=_DENSE | {"gamma": 0.01, "normalize": False},
        only={"rescale": False},
    ),
    "breadcrumbs_ties": Peer(
        "breadcrumbs",
        {"election": "ties", "scope": "tensor"},
        per_model=_SPARSE | {"gamma": "gamma"},
        shared=_FUSED,
        defaults=_DENSE | {"gamma": 0.01, "normalize": False},
        only={"rescale": False},
    ),
    "della": Peer(
        "della",
        {"election": "ties"},
        per_model=_SPARSE | {"epsilon": "epsilon"},
        shared=_FUSED,
        defaults=_DENSE | {"epsilon": 0.15, "normalize": True},
        only={"rescale": True},
        differs=_DROPS,
    ),
    "della_linear": Peer(
        "della",
        {"election": "none"},
        per_model=_SPARSE | {"epsilon": "epsilon"},
        shared=_FUSED,
        defaults=_DENSE | {"epsilon": 0.15, "normalize": False},
        only={"rescale": True},
        differs=_DROPS,
    ),
    "model_stock": Peer(
        "model_stock",
        only={"filter_wise": False},
        differs="where task vectors oppose each other it goes past the base, at which ours stops, and it takes the angles between"
        " very small ones for larger",
    ),
    "sce": Peer(
        "sce",
        shared={"select_topk": "density"},
        defaults={"select_topk": 1.0},
        differs="it weighs models alike where the mean squares of their task vectors add up to less than a millionth",
    ),
    "karcher": Peer("karcher", idle=("max_iter", "tol"), based=False),
    "multislerp": Peer(
        "karcher",
        per_model=_WEIGHT,
        only={"normalize_weights": True},
        idle=("eps",),
        based=False,
        differs="it takes the normalised mean of the directions, where ours iterates to their mean on the sphere",
    ),
}
"""mergekit's methods that we have, by its names."""
PARAMETERS = {
    *(name for peer in METHODS.values() for name in (*peer.per_model, *peer.shared, *peer.only, *peer.idle)),
    "int8_mask", "embed_slerp", "consensus_method", "similarity_threshold",
}  # fmt: skip
"""All parameters that mergekit's methods have, or had; a method pays no heed to those of others."""


def parity(method: str, given: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Return our method's options by which it does what mergekit's does; those that are given are kept.

    Raises:
        ConfigError: no options make it that, or one that is given contradicts.
    """
    peers = [peer for peer in METHODS.values() if peer.ours == method and peer.differs is None]
    if not peers:
        reasons = {peer.differs for peer in METHODS.values() if peer.ours == method}
        raise ConfigError(
            f"mergekit's definition of {method} can't be had",
            place=place_of("compat", places),
            got="; ".join(sorted(filter(None, reasons))) or "no such method of mergekit's",
            fix="leave `compat` out; it is there for "
            + ", ".join(sorted({peer.ours for peer in METHODS.values() if peer.differs is None})),
        )
    peer = next((one for one in peers if one.options.get("election") == given.get("election", "none")), peers[0])
    for name, value in peer.options.items():
        if name in given and given[name] != value:
            raise ConfigError(
                f"mergekit has `{name}: {value}` only",
                place=place_of(name, places),
                got=given[name],
                fix="drop `compat`",
            )
    renamed = {**peer.shared, **peer.per_model}
    defaults = {renamed[name]: value for name, value in peer.defaults.items()}
    options = {**defaults, **given, **peer.options}
    if method == "breadcrumbs":
        options["gamma"] = outliers(options["gamma"], options["density"], place_of("gamma", places))
    return options


def outliers(gamma: Any, density: Any, place: str) -> Any:
    """Return γ as mergekit takes it: where γ and the share that is kept are more than all, the share is kept and γ gives way."""
    if isinstance(gamma, int | float) and isinstance(density, int | float):
        return min(gamma, round(1 - density, 12))
    if max(_numbers(gamma)) + max(_numbers(density)) <= 1:
        return gamma
    raise ConfigError(
        "mergekit lowers `gamma` where it and `density` are more than 1, which can't be done by layer",
        place=place,
        fix="give a `gamma` of at most 1 - `density` everywhere",
    )


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for inner in value.values() for number in _numbers(inner)]
    return [number for inner in value for number in _numbers(inner)] if isinstance(value, list) else [float(value)]
