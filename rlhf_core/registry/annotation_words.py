"""Types and defaults of options as people read them, from source alone: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Callable

WORDS = {
    "Any": "any value",
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "Path": "path",
}
"""Names of types → words; those of `config.fields.type_name`, which reads types that were imported."""
_LISTS = {"list": "list", "List": "list", "Sequence": "list", "tuple": "tuple", "set": "list", "frozenset": "list"}
_MAPPINGS = ("dict", "Dict", "Mapping")
_DEPTH = 8

Lookup = Callable[[str], ast.expr | None]
"""What a name is defined as where the annotation stands: an expression, or None for a class and for what isn't found."""


def type_in_words(node: ast.expr, lookup: Lookup, depth: int = 0) -> str:
    """Return an annotation in words, the values of a choice one by one: `number or null`, "`cosine`, `linear`".

    Args:
        lookup: finds what a name stands for, such as `Mode = Literal["a", "b"]`.
        depth: how many names have been looked up on the way.
    """

    def words(part: ast.expr, deeper: int = 0) -> str:
        return type_in_words(part, lookup, depth + deeper)

    if isinstance(node, ast.Constant):
        if node.value is None:
            return "null"
        if isinstance(node.value, str) and depth < _DEPTH:
            try:
                return words(ast.parse(node.value, mode="eval").body, 1)
            except SyntaxError:
                return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return f"{words(node.left)} or {words(node.right)}"
    if isinstance(node, ast.Subscript):
        return _subscript(node, words)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    if name in WORDS:
        return WORDS[name]
    found = lookup(name) if name is not None and depth < _DEPTH else None
    if found is not None:
        return words(found, 1)
    return "group" if name is not None and name.endswith(("Config", "Options")) else name or ast.unparse(node)


def _subscript(node: ast.Subscript, words: Callable[[ast.expr], str]) -> str:
    """Return a type with arguments in words."""
    owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
    parts = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if owner == "Literal":
        return ", ".join(f"`{part.value!s}`" if isinstance(part, ast.Constant) else words(part) for part in parts)
    if owner == "Annotated":
        return words(parts[0])
    if owner in ("Optional", "Union"):
        return " or ".join([*map(words, parts), *(["null"] if owner == "Optional" else [])])
    if owner in _LISTS:
        return f"{_LISTS[owner]} of {words(parts[0])}"
    if owner in _MAPPINGS:
        return f"dict of {' → '.join(map(words, parts))}"
    return ast.unparse(node)


def default_in_words(node: ast.expr) -> str:
    """Return a default as YAML writes it; that of a group, which its own options have, as ''."""
    if isinstance(node, ast.Constant):
        value = node.value
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        if isinstance(value, str):
            return value if value.strip() and value.isprintable() else f'"{value}"'
        return str(value)
    if isinstance(node, ast.Name) and node.id in ("list", "tuple", "dict"):  # a factory
        return "{}" if node.id == "dict" else "[]"
    if isinstance(node, ast.Tuple | ast.List):
        return f"[{', '.join(map(default_in_words, node.elts))}]"
    if isinstance(node, ast.Call):
        if ast.unparse(node.func).endswith("options_field"):
            return "{}"
        if ast.unparse(node.func).endswith("field") and node.args:  # a function that makes a field
            return default_in_words(node.args[0])
        return ""
    if isinstance(node, ast.Attribute):  # a member of an enumeration
        return node.attr.lower()
    return ast.unparse(node)
