"""`rlhf merge --diff A B`: the distance between the weights of two models, as a table, as JSON, or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.cli.printing import print_json, print_table, print_text
from rlhf_core.cli.quick_imports import quick_imports

if TYPE_CHECKING:
    from rlhf_core.evaluation.weight_diff import Difference, Distance


def show_difference(first: str, second: str, *, picture: Path | None, as_json: bool) -> None:
    """Compare two models and print what is found; with `picture` draw it into that file too."""
    with quick_imports():
        from rlhf_core.evaluation.weight_diff import diff, draw
        from rlhf_core.infra.progress import ByteBar
        from rlhf_core.registry.plugin_logs import setup_logging

    setup_logging()
    with ByteBar("comparing") as bar:
        found = diff(first, second, progress=bar)
    if picture is not None:
        draw(found, picture)
    if as_json:
        return print_json({**found.as_dict(), "picture": None if picture is None else str(picture)})
    _print(found)
    if picture is not None:
        print(f"picture: {picture}")
    return None


def _print(found: Difference) -> None:
    """Print the distances by layer and part, the tensors that are farthest apart, and what was left out."""
    from rlhf_core.evaluation.weight_diff import PARTS

    table, by_part = found.by_layer(), found.by_part()
    parts = [part for part in PARTS if part in by_part]
    rows = [*table.items(), ("all", {**by_part, "all": found.total})]
    print_text(f"‖b - a‖ / ‖a‖ by layer and part; a: {found.names[0]}, b: {found.names[1]}")
    print_table(
        ("layer", *parts, "all", "cosine", "max |b-a|"),
        [
            (name, *(f"{cells[part].relative:.3g}" if part in cells else "" for part in parts), *_figures(cells["all"]))
            for name, cells in rows
        ],
    )
    farthest = sorted(found.tensors.items(), key=lambda entry: -entry[1].relative)[:5]
    if farthest and farthest[0][1].squared_difference > 0:
        print("\nfarthest apart:")
        rows_of_tensors = [(name, *_figures(one)) for name, one in farthest]
        print_table(("tensor", "‖b - a‖ / ‖a‖", "cosine", "max |b-a|"), rows_of_tensors)
    else:
        print("\nall values are equal")
    for name, only in zip(found.names, found.only, strict=True):
        if only:
            print_text(f"only in {name}: {', '.join(only)}")
    for name, (first, second) in found.reshaped.items():
        print_text(f"left out, as its shapes differ: {name} {list(first)}, {list(second)}")


def _figures(one: Distance) -> tuple[str, str, str]:
    """Return relative distance, cosine and largest difference as text."""
    return f"{one.relative:.3g}", f"{one.cosine:.6f}", f"{one.largest:.3g}"
