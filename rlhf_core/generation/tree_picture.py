"""A search tree as JSON values, and as a picture of them (SVG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from rlhf_core.generation.step_trees import SearchStep

COLUMN, ROW, MARGIN = 36, 64, 40
"""Pixels between leaves, between generations, and around the tree."""


def tree_values(
    steps: Sequence[SearchStep], best: SearchStep, more: Mapping[SearchStep, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return a prompt's tree as JSON values: its `steps` by number, each with its `parent`, and the numbers of the `best` path.

    Args:
        steps: all steps of the tree, the root first.
        best: the end of the path that was chosen.
        more: what a search knows of a step besides, such as `visits`.
    """
    found = []
    for step in steps:
        before = "" if step.parent is None else step.parent.text
        found.append(
            {
                "number": step.number,
                "parent": None if step.parent is None else step.parent.number,
                "text": step.text[len(before) :],
                "tokens": len(step.own.ids),
                "score": step.score if step.step_scores else None,
                "stop_reason": step.stop_reason if step.ended else None,
                **(more or {}).get(step, {}),
            }
        )
    return {"steps": found, "best": [one.number for one in best.path]}


def tree_svg(tree: Mapping[str, Any]) -> str:
    """Return a picture of a tree (`tree_values`) as SVG: the larger a step's score, the greener; the best path is drawn thick.

    A step's text appears where the mouse rests on it. A circle with a dark rim is the end of a completion; a larger one was
    visited more often.
    """
    steps = {one["number"]: one for one in tree["steps"]}
    children: dict[Any, list[int]] = {}
    for number, one in steps.items():
        children.setdefault(one["parent"], []).append(number)
    places: dict[int, tuple[float, float]] = {}
    leaves = 0
    # Children come behind their parents in number, so the reverse order places every child before its parent.
    depth = dict.fromkeys(children.get(None, []), 0)
    order = list(children.get(None, []))
    for number in order:
        for child in children.get(number, []):
            depth[child] = depth[number] + 1
            order.append(child)
    for number in _by_branch(children):
        own = [places[child][0] for child in children.get(number, [])]
        if not own:
            leaves += 1
        at = sum(own) / len(own) if own else (leaves - 1) * COLUMN + MARGIN
        places[number] = (at, depth[number] * ROW + MARGIN)
    scores = [one["score"] for one in steps.values() if one["score"] is not None]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    width = max(1, leaves - 1) * COLUMN + 2 * MARGIN
    height = max(depth.values(), default=0) * ROW + 2 * MARGIN
    best = {*tree["best"], 0}
    lines, circles = [], []
    for number, one in steps.items():
        x, y = places[number]
        if one["parent"] is not None:
            from_x, from_y = places[one["parent"]]
            stroke = ("#222", 3) if number in best else ("#aaa", 1)
            lines.append(
                f'<line x1="{from_x:.1f}" y1="{from_y:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="{stroke[0]}"'
                f' stroke-width="{stroke[1]}"/>'
            )
        circles.append(_circle(one, x, y, low, high))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join([*lines, *circles]) + "\n</svg>\n"
    )


def _circle(one: Mapping[str, Any], x: float, y: float, low: float, high: float) -> str:
    """Return a step as a circle with its text."""
    share = 0.5 if one["score"] is None or high <= low else (one["score"] - low) / (high - low)
    fill = "#ddd" if one["score"] is None else f"hsl({120 * share:.0f},60%,60%)"
    radius = min(16.0, 6 + float(one.get("visits") or 0) ** 0.5)
    rim = "#222" if one["stop_reason"] else "none"
    facts = ", ".join(
        f"{name} {one[name]:.3g}" if isinstance(one[name], float) else f"{name} {one[name]}"
        for name in ("score", "visits", "value", "prior", "tokens", "stop_reason")
        if one.get(name) is not None
    )
    text = escape("".join(letter if letter.isprintable() else " " for letter in one["text"]))
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" stroke="{rim}" stroke-width="2">'
        f"<title>{one['number']}: {text} ({escape(facts)})</title></circle>"
    )


def _by_branch(children: Mapping[Any, Sequence[int]]) -> list[int]:
    """Return all steps, each behind its children, branch by branch."""
    found: list[int] = []
    waiting = [*children.get(None, [])]
    while waiting:
        number = waiting.pop()
        found.append(number)
        waiting += children.get(number, [])
    return found[::-1]
