"""What a plugin's source says about itself, read without importing anything.

The first line of the class docstring, and the literals `record` and `api` in its body: enough to list a method, refuse one
that was written for other contracts, and name its options, however long its imports would take.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class HeaderError(Exception):
    """The header can't be read; the message is the reason, in words."""


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as its source states it."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class Header:
    """What the source of one class states. A literal that is absent, or isn't a literal, is None."""

    summary: str
    doc: str
    record: str | None
    api: int | None
    path: Path
    line: int


def split_target(target: str) -> tuple[str, str]:
    """Split `package.module:Class` into module and class; the class is '' where the target names a module."""
    module, colon, name = (part.strip() for part in target.partition(":"))
    words = [*module.split("."), *(name.split(".") if colon else [])]
    if not all(word.isidentifier() for word in words):
        raise HeaderError(f"its entry point `{target}` isn't of the form `package.module:Class`")
    return module, name


def locate(module: str) -> Path:
    """Return the source file of a module, found from its top-level package alone: no parent package is imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except Exception as error:  # another package's finder may raise anything
        raise HeaderError(f"package `{top}` can't be located: {type(error).__name__}: {error}") from error
    if spec is None:
        raise HeaderError(f"package `{top}` isn't installed")
    if not rest and spec.origin and spec.origin.endswith(".py"):
        return Path(spec.origin)
    for root in spec.submodule_search_locations or ():
        stem = Path(root).joinpath(*rest)
        for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    raise HeaderError(f"module `{module}` has no source file")


def read_header(target: str) -> Header:
    """Read the header of `package.module:Class`.

    Raises:
        HeaderError: the file is missing or doesn't parse, or the class isn't defined in it.
    """
    module, name = split_target(target)
    if not name:
        raise HeaderError(f"its entry point `{target}` isn't of the form `package.module:Class`")
    path = locate(module)
    tree = _parse(path)
    found = _definition(tree.body, name)
    if found is None:
        raise HeaderError(
            f"class `{name}` isn't defined in `{module}` ({path}); an entry point names the defining module"
        )
    doc = ast.get_docstring(found) or ""
    values = dict(_literals(found.body))
    record, api = values.get("record"), values.get("api")
    return Header(
        summary=doc.strip().split("\n")[0].strip(),
        doc=doc,
        record=record if isinstance(record, str) else None,
        api=api if isinstance(api, int) and not isinstance(api, bool) else None,
        path=path,
        line=found.lineno,
    )


def read_module_summary(target: str) -> str:
    """Return the first line of the docstring of a target's module: the summary of a hook, which may be any object."""
    tree = _parse(locate(split_target(target)[0]))
    return (ast.get_docstring(tree) or "").strip().split("\n")[0]


def read_options(target: str) -> list[Option]:
    """Return the options that a class's `Config` adds, where that configuration is written in the same file."""
    module, name = split_target(target)
    tree = _parse(locate(module))
    owner = _definition(tree.body, name)
    if owner is None:
        return []
    config = next((node for node in owner.body if isinstance(node, ast.ClassDef) and node.name == "Config"), None)
    for statement in owner.body:
        for field, value in _assigned(statement):
            if field == "Config" and isinstance(value, ast.Name):
                config = _definition(tree.body, value.id)
    if config is None:
        return []
    options = []
    for node, after in zip(config.body, [*config.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            options.append(_option(node, after))
    return options


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise HeaderError(f"{path}:{error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise HeaderError(f"{path} can't be read: {error}") from error


def _definition(body: Iterable[ast.stmt], name: str) -> ast.ClassDef | None:
    """Find a class by its dotted name; inside `if` and `try` too."""
    head, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == head:
            return _definition(node.body, rest) if rest else node
        blocks = [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        if isinstance(node, ast.If | ast.Try):
            for block in blocks:
                if found := _definition(block, name):
                    return found
    return None


def _assigned(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Name):
                yield target.id, statement.value
    elif (
        isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None
    ):
        yield statement.target.id, statement.value


def _literals(body: Iterable[ast.stmt]) -> Iterator[tuple[str, Any]]:
    for statement in body:
        for name, value in _assigned(statement):
            if name in ("record", "api"):
                yield name, value.value if isinstance(value, ast.Constant) else None


def _option(node: ast.AnnAssign, after: ast.stmt | None) -> Option:
    default = "required"
    # A string that stands below a field describes it too.
    description = _text(after.value) if isinstance(after, ast.Expr) else ""
    value = node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("Field"):
        named = {keyword.arg: keyword.value for keyword in value.keywords}
        stated = value.args[0] if value.args else named.get("default", named.get("default_factory"))
        if stated is not None and not (isinstance(stated, ast.Constant) and stated.value is Ellipsis):
            default = ast.unparse(stated)
        description = _text(named.get("description")) or description
    elif value is not None:
        default = ast.unparse(value)
    return Option(ast.unparse(node.target), ast.unparse(node.annotation), default, description)


def _text(node: ast.expr | None) -> str:
    return node.value.strip() if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
