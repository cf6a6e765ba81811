"""A search tree of a sampled row: as a drawing in the page's colours, and its best path as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from rlhf_core.evaluation.report.blocks import Block, Cell, Paragraph, Picture, Pictures, Table, figure
from rlhf_core.evaluation.report.run_files import is_number
from rlhf_core.evaluation.report.svg_charts import embedded
from rlhf_core.generation.tree_picture import tree_svg

MOST_STEPS = 400
"""Steps of a tree that is drawn; of a larger one the best path alone is shown."""
_COLOURS = {"#222": "var(--ink)", "#aaa": "var(--muted)", "#ddd": "var(--faint)"}
_NUMBERS = ("visits", "value", "prior", "score", "tokens")


def tree_blocks(tree: Any, title: str, prefix: str) -> list[Block]:
    """Return a tree's drawing and its best path.

    Args:
        tree: as `tree_values` made it, and as it was read from a file that anybody may have written.
        prefix: of ids in the drawing.
    """
    if not is_tree(tree):
        return [Paragraph(f"{title}: the search tree is damaged and left out.", tone="bad")]
    steps = {one["number"]: one for one in tree["steps"]}
    blocks: list[Block] = []
    if len(steps) <= MOST_STEPS:
        picture = _picture(tree_svg(tree), prefix, title)
        caption = (
            "A circle is a step: the greener, the higher its score; a rim ends a completion; the best path is thick."
        )
        blocks.append(Pictures([Picture(title, picture, caption, wide=True)]))
    else:
        blocks.append(Paragraph(f"{title}: {len(steps):,} steps, more than are drawn ({MOST_STEPS}); the best path:"))
    names = [name for name in _NUMBERS if any(is_number(one.get(name)) for one in steps.values())]
    rows = [
        [Cell(str(number)), Cell(steps[number]["text"]), *(Cell(figure(steps[number].get(name))) for name in names)]
        for number in tree["best"]
        if steps[number]["text"]
    ]
    if rows:
        numbers = frozenset([0, *range(2, 2 + len(names))])
        blocks.append(Table(["step", "text on the best path", *names], rows, numbers))
    return blocks


def is_tree(tree: Any) -> bool:
    """Return whether JSON values are a whole tree: steps, each with number, text and an earlier parent, and a best path."""
    if (
        not isinstance(tree, Mapping)
        or not isinstance(tree.get("steps"), list)
        or not isinstance(tree.get("best"), list)
    ):
        return False
    known: set[int] = set()
    for one in tree["steps"]:
        if not isinstance(one, Mapping) or type(one.get("number")) is not int or not isinstance(one.get("text"), str):
            return False
        if one["number"] in known or (one.get("parent") is not None and one["parent"] not in known):
            return False
        if not {"score", "stop_reason", "parent"} <= one.keys():
            return False
        if any(one.get(name) is not None and not is_number(one[name]) for name in _NUMBERS):
            return False
        if (one.get("visits") or 0) < 0 or not isinstance(one["stop_reason"], str | None):
            return False
        known.add(one["number"])
    return bool(known) and all(type(number) is int and number in known for number in tree["best"])


def _picture(svg: str, prefix: str, title: str) -> str:
    """Return the drawing without its white ground, its greys being the page's colours."""
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    for ground in root.findall(f"{space}rect"):
        root.remove(ground)
    for element in root.iter():
        for name in ("stroke", "fill"):
            if element.get(name) in _COLOURS:
                element.set(name, _COLOURS[element.attrib[name]])
    width = root.get("width", "0")
    ElementTree.register_namespace("", space.strip("{}"))
    made = embedded(ElementTree.tostring(root, encoding="unicode"), prefix, title)
    return made.replace("<svg ", f'<svg width="{float(width):.0f}" ', 1)
