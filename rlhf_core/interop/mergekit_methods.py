"""mergekit's methods in terms of ours, and which of its definitions ours reproduce.

Everything here was found from mergekit's documentation and from what version 0.1.5 does with small tensors.
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
"""mergekit's parameters → our options."""
SHARED = ("t", "select_topk", "lambda", "normalize")
"""Those of them that hold for all models of a merge; a model may have a value of its own of the others."""
UNUSED = ("int8_mask", "embed_slerp", "consensus_method", "similarity_threshold")
"""Parameters that mergekit accepts, or once did, and that change nothing here."""


@dataclass(frozen=True)
class MergekitMethod:
    """One of mergekit's methods in our terms."""

    ours: str
    """The name of our method."""
    parameters: Mapping[str, Any]
    """Its parameters that we have, by its names, with its defaults."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of ours that make it that method."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters for which we have one value alone, with that value."""
    unused: tuple[str, ...] = ()
    """Its parameters that change nothing, or only how closely it computes."""
    needs_base: bool = True
    """Whether it merges differences from its base model."""
    differs: str | None = None
    """What it does otherwise than ours, if anything."""


_WEIGHTED = {"weight": REQUIRED}
_SPARSE = {**_WEIGHTED, "density": 1.0, "lambda": 1.0, "normalize": False}
_CRUMBS, _DELLA = {**_SPARSE, "gamma": 0.01}, {**_SPARSE, "epsilon": 0.15}
_RESCALED = (
    "it drops other entries, and scales the rest to the L1 norm of all where ours divides by the probability of keeping"
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
        differs="between tensors that are nearly parallel it takes the arc, where ours takes the straight line",
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
        differs="where task vectors oppose each other it goes past the base, at which ours stops, and it takes the angles between"
        " very small ones for larger",
    ),
    "sce": MergekitMethod(
        "sce",
        {"select_topk": 1.0},
        differs="it weighs models alike where the mean squares of their task vectors add up to less than a millionth",
    ),
    "karcher": MergekitMethod("karcher", {}, unused=("max_iter", "tol"), needs_base=False),
    "multislerp": MergekitMethod(
        "karcher",
        _WEIGHTED,
        only={"normalize_weights": True},
        unused=("eps",),
        needs_base=False,
        differs="it takes the normalised mean of the directions, where ours iterates to their mean on the sphere",
    ),
}
"""mergekit's methods that we have, by its names."""
PARAMETERS = {*UNUSED, *(name for one in METHODS.values() for name in (*one.parameters, *one.only, *one.unused))}
"""All parameters that mergekit's methods have, or had; a method ignores those of others."""


def parity(method: str, given: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Return the options by which a method of ours does what mergekit's does; those that are given are kept.

    Args:
        method: the name of ours.
        given: its options by our names.
        places: where each of them was set.

    Raises:
        ConfigError: no options make it that, or one that is given contradicts.
    """
    equals = [one for one in METHODS.values() if one.ours == method and one.differs is None]
    if not equals:
        reasons = {one.differs for one in METHODS.values() if one.ours == method}
        raise ConfigError(
            f"mergekit's definition of {method} can't be had",
            place=place_of("compat", places),
            got="; ".join(sorted(filter(None, reasons))) or "no such method of mergekit's",
            fix="leave `compat` out; it is there for "
            + ", ".join(sorted({one.ours for one in METHODS.values() if one.differs is None})),
        )
    theirs = next((one for one in equals if one.options.get("election") == given.get("election", "none")), equals[0])
    for name, value in theirs.options.items():
        if name in given and given[name] != value:
            raise ConfigError(
                f"mergekit has `{name}: {value}` only",
                place=place_of(name, places),
                got=given[name],
                fix="drop `compat`",
            )
    defaults = {OUR_NAMES[name]: value for name, value in theirs.parameters.items() if value is not REQUIRED}
    defaults.pop("weight", None)  # each model's own, and 1 here as there
    options = {**defaults, **given, **theirs.options}
    if method == "breadcrumbs":
        options["gamma"] = capped_gamma(options["gamma"], options["density"], place_of("gamma", places))
    return options


def capped_gamma(gamma: Any, density: Any, place: str) -> Any:
    """Return breadcrumbs' γ as mergekit takes it: where γ and the density are more than 1 together, γ is lowered to 1 - density.

    Raises:
        ConfigError: they are, and one of them varies by layer.
    """
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
    """Return all numbers of a value by layer."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return [number for one in inner for number in _numbers(one)]
    return [float(value)]
