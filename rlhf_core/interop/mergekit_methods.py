"""mergekit's methods in terms of ours, and which of its definitions ours reproduce.

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
"""mergekit's parameters → our options."""
SHARED = ("t", "select_topk", "lambda", "normalize")
"""Those of them that are the same for all models of a merge; the others may differ between models."""
UNUSED = ("int8_mask", "embed_slerp", "consensus_method", "similarity_threshold")
"""Parameters that mergekit accepts, or once did, and that change nothing here."""


@dataclass(frozen=True)
class MergekitMethod:
    """One of mergekit's methods: the method of ours that is equivalent, and how its parameters translate."""

    ours: str
    """The name of our method."""
    parameters: Mapping[str, Any]
    """The parameters that translate, by mergekit's names, with mergekit's defaults."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that our method needs in order to compute the same."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of which only one value is supported, with that value."""
    unused: tuple[str, ...] = ()
    """Parameters that change nothing, or only how closely mergekit computes."""
    needs_base: bool = True
    """Whether it merges task vectors, differences from a base model."""
    differs: str | None = None
    """How its definition differs from ours, as a sentence; None where both are the same."""


_WEIGHTED = {"weight": REQUIRED}
_SPARSE = {**_WEIGHTED, "density": 1.0, "lambda": 1.0, "normalize": False}
_CRUMBS, _DELLA = {**_SPARSE, "gamma": 0.01}, {**_SPARSE, "epsilon": 0.15}
_RESCALED = (
    "mergekit drops other entries and scales the rest to the L1 norm of all; ours divides by the probability of keeping"
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
        differs="between tensors that are nearly parallel mergekit takes the arc, ours the straight line",
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
        differs="where task vectors oppose each other mergekit goes past the base, at which ours stops, and it overestimates the"
        " angles between very small ones",
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
        differs="mergekit takes the normalised mean of the directions; ours iterates to their mean on the sphere",
    ),
}
"""The methods of mergekit that are supported, by mergekit's names."""
PARAMETERS = {*UNUSED, *(name for one in METHODS.values() for name in (*one.parameters, *one.only, *one.unused))}
"""All parameters that mergekit's methods have, or had; a method ignores those of others."""


def parity(method: str, given: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Return the options with which a method of ours computes what mergekit does; those that are given are kept.

    Args:
        method: the name of ours.
        given: its options by our names.
        places: where each of them was set.

    Raises:
        ConfigError: the definitions differ whatever the options, or one that is given contradicts.
    """
    same = [one for one in METHODS.values() if one.ours == method and one.differs is None]
    if not same:
        reasons = {one.differs for one in METHODS.values() if one.ours == method}
        raise ConfigError(
            f"mergekit's definition of {method} isn't available here",
            place=place_of("compat", places),
            got="; ".join(sorted(filter(None, reasons))) or "mergekit has no such method",
            fix="leave `compat` out; it is supported by "
            + ", ".join(sorted({one.ours for one in METHODS.values() if one.differs is None})),
        )
    theirs = next((one for one in same if one.options.get("election") == given.get("election", "none")), same[0])
    for name, value in theirs.options.items():
        if name in given and given[name] != value:
            raise ConfigError(
                f"mergekit has only `{name}: {value}`",
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
    """Return the γ of breadcrumbs that mergekit uses: lowered to 1 - density where both are more than 1 together.

    Raises:
        ConfigError: they are more than 1 together, and one of them varies by layer.
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
    """Return all numbers in a value by layer."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return [number for one in inner for number in _numbers(one)]
    return [float(value)]
