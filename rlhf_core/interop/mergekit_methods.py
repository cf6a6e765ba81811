"""mergekit's methods in terms of rlhf_core's, and which of mergekit's definitions rlhf_core can reproduce.

Found from mergekit's documentation and from the results of version 0.1.5 on small tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.config.base import place_of
from rlhf_core.infra.errors import ConfigError
from rlhf_core.interop.mergekit_parameters import REQUIRED

OUR_NAMES = {
    "weight": "weight", "scale": "weight", "t": "weight", "density": "density", "select_topk": "density", "gamma": "gamma",
    "epsilon": "epsilon", "lambda": "scale", "normalize": "normalize",
}  # fmt: skip
"""mergekit's parameters → options of rlhf_core's methods, or the weight."""
SHARED = ("t", "select_topk", "lambda", "normalize")
"""Those of them that are the same for all models of a merge; the others may differ between models."""
UNUSED = ("int8_mask", "embed_slerp", "consensus_method", "similarity_threshold")
"""Parameters that mergekit accepts, or once did, and that change nothing in rlhf_core."""


@dataclass(frozen=True)
class MergekitMethod:
    """One of mergekit's methods: the method of rlhf_core that is equivalent, and how its parameters translate."""

    method: str
    """The name of rlhf_core's method."""
    parameters: Mapping[str, Any]
    """The parameters that translate, by mergekit's names, with mergekit's defaults."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that rlhf_core's method needs in order to compute the same."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of which only one value is supported, with that value."""
    unused: tuple[str, ...] = ()
    """Parameters that change nothing, or only how closely mergekit computes."""
    needs_base: bool = True
    """Whether it merges task vectors, differences from a base model."""
    differs: str | None = None
    """How its definition differs from rlhf_core's, as a sentence; None where both are the same."""


_WEIGHTED = {"weight": REQUIRED}
_SPARSE = {**_WEIGHTED, "density": 1.0, "lambda": 1.0, "normalize": False}
_CRUMBS, _DELLA = {**_SPARSE, "gamma": 0.01}, {**_SPARSE, "epsilon": 0.15}
_RESCALED = (
    "mergekit drops other entries and scales the rest to the L1 norm of all; rlhf_core divides by the probability of"
    " keeping"
)
_WHOLE = {"scope": "tensor"}

METHODS: dict[str, MergekitMethod] = {
    "linear": MergekitMethod("linear", {**_WEIGHTED, "normalize": True}, needs_base=False),
    "slerp": MergekitMethod("slerp", {"t": REQUIRED}),
    "nuslerp": MergekitMethod(
        "slerp",
        _WEIGHTED,
        only={"nuslerp_flatten": True},
        unused=("nuslerp_row_wise",),
        needs_base=False,
        differs="between tensors that are nearly parallel mergekit takes the arc, rlhf_core the straight line",
    ),
    "passthrough": MergekitMethod("passthrough", {"scale": 1.0}, needs_base=False),
    "task_arithmetic": MergekitMethod(
        "task_arithmetic", {**_WEIGHTED, "lambda": 1.0}, only={"normalize": False}, unused=("density", "rescale")
    ),
    "ties": MergekitMethod(
        "ties",
        {**_SPARSE, "normalize": True},
        {"majority": "weighted", "trim_scope": "tensor"},
        only={"rescale": False},
    ),
    "dare_linear": MergekitMethod(
        "dare", _SPARSE, {"election": "none", "trim": 1.0}, only={"rescale": True}, differs=_RESCALED
    ),
    "dare_ties": MergekitMethod(
        "dare", _SPARSE, {"election": "ties", "trim": 1.0}, only={"rescale": True}, differs=_RESCALED
    ),
    "breadcrumbs": MergekitMethod("breadcrumbs", _CRUMBS, {"election": "none", **_WHOLE}, only={"rescale": False}),
    "breadcrumbs_ties": MergekitMethod("breadcrumbs", _CRUMBS, {"election": "ties", **_WHOLE}, only={"rescale": False}),
    "della": MergekitMethod(
        "della", {**_DELLA, "normalize": True}, {"election": "ties"}, only={"rescale": True}, differs=_RESCALED
    ),
    "della_linear": MergekitMethod("della", _DELLA, {"election": "none"}, only={"rescale": True}, differs=_RESCALED),
    "model_stock": MergekitMethod(
        "model_stock",
        {},
        only={"filter_wise": False},
        differs="where task vectors oppose each other mergekit goes past the base, where rlhf_core stops, and it overestimates"
        " the angles between very small ones",
    ),
    "sce": MergekitMethod(
        "sce",
        {"select_topk": 1.0},
        differs="mergekit weights models alike where the mean squares of their task vectors add up to less than a millionth",
    ),
    "karcher": MergekitMethod("karcher", {}, unused=("max_iter", "tol"), needs_base=False),
    "multislerp": MergekitMethod(
        "karcher",
        _WEIGHTED,
        only={"normalize_weights": True},
        unused=("eps",),
        needs_base=False,
        differs="mergekit takes the normalised mean of the directions; rlhf_core iterates to their mean on the sphere",
    ),
}
"""The methods of mergekit that are supported, by mergekit's names."""
PARAMETERS = {*UNUSED, *(name for one in METHODS.values() for name in (*one.parameters, *one.only, *one.unused))}
"""All parameters that mergekit's methods have, or had; a method ignores those of others."""


def parity(method: str, options_set: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Return the options with which a method reproduces mergekit's definition, those that the user set included.

    Args:
        method: the name of rlhf_core's method.
        options_set: the options that the user set, by name.
        places: where each of them was set.

    Raises:
        ConfigError: no options reproduce mergekit's definition, or one that the user set contradicts it.
    """
    same = [one for one in METHODS.values() if one.method == method and one.differs is None]
    if not same:
        reasons = {one.differs for one in METHODS.values() if one.method == method}
        raise ConfigError(
            f"`compat: mergekit` isn't supported for {method}",
            place=place_of("compat", places),
            got="; ".join(sorted(filter(None, reasons))) or "mergekit has no such method",
            fix="drop `compat`; it is supported for "
            + ", ".join(sorted({one.method for one in METHODS.values() if one.differs is None})),
        )
    same_method = next(
        (one for one in same if one.options.get("election") == options_set.get("election", "none")), same[0]
    )
    for name, value in same_method.options.items():
        if name in options_set and options_set[name] != value:
            raise ConfigError(
                f"mergekit has only `{name}: {value}`",
                place=place_of(name, places),
                got=options_set[name],
                fix="drop `compat`",
            )
    defaults = {OUR_NAMES[name]: value for name, value in same_method.parameters.items() if value is not REQUIRED}
    defaults.pop("weight", None)  # set per model; both default to 1
    options = {**defaults, **options_set, **same_method.options}
    if method == "breadcrumbs":
        options["gamma"] = capped_gamma(options["gamma"], options["density"], place_of("gamma", places))
    return options


def capped_gamma(gamma: Any, density: Any, place: str) -> Any:
    """Return the γ of breadcrumbs that mergekit uses: lowered to 1 - density where both are more than 1 together.

    Raises:
        ConfigError: gamma + density exceeds 1, and one of them differs between layers.
    """
    if isinstance(gamma, int | float) and isinstance(density, int | float):
        return min(gamma, round(1 - density, 12))
    if max(_numbers(gamma)) + max(_numbers(density)) <= 1:
        return gamma
    raise ConfigError(
        "mergekit caps `gamma` at 1 - `density`, which isn't supported for values that differ between layers",
        place=place,
        fix="set `gamma` to at most 1 - `density` in every layer",
    )


def _numbers(value: Any) -> list[float]:
    """Return all numbers in a per-layer value."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return [number for one in inner for number in _numbers(one)]
    return [float(value)]
