"""Other values of an option to try, derived from its type."""

from __future__ import annotations

from types import NoneType
from typing import Any, Literal, get_args, get_origin

from rlhf_core.config.fields import alternatives

NUMBERS = (0.5, 0.01, 2.0, 100.0, 0.1, 0.0, 0.9, 1.0)
"""Values of any option that takes a float."""
COUNTS = (2, 1, 3, 4, 0, 8)
"""Values of any option that takes an integer."""

SPEED_ALONE = ("draft",)
"""Options of `SamplingConfig` that change how fast completions are drawn, and nothing else."""


def other_values(annotation: Any, value: Any) -> list[Any]:
    """Return values of a type other than the given one, those likeliest to have another effect first.

    A configuration may refuse some of them. There are none for types such as paths, lists and groups.

    Args:
        annotation: the option's type.
        value: the option's own value.
    """
    found: list[Any] = []
    for kind in alternatives(annotation):
        if get_origin(kind) is Literal:
            found += get_args(kind)
        elif kind is bool:
            found += [True, False]
        elif kind is int:
            found += [*([value * 2, value + 1] if isinstance(value, int) else []), *COUNTS]
        elif kind is float:
            found += [*([value * 2, value / 2] if isinstance(value, int | float) and value else []), *NUMBERS]
        elif kind is str:
            found += [*([value + value, value + "x"] if isinstance(value, str) else []), "x"]
    if NoneType in alternatives(annotation):
        found.append(None)
    # By type as well: True equals 1.
    distinct = {(type(one), one): one for one in found}
    return [one for one in distinct.values() if type(one) is not type(value) or one != value]
