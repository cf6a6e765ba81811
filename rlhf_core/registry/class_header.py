"""Read a class's header from its module's source, without importing anything.

The header is the class docstring and the literals `record`, `api` and `stage` in the class body: enough to list a method and to
refuse one that was written for another version of the contracts, however long its imports would take.
"""

from __future__ import annotations

import ast
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.infra.errors import describe_error
from rlhf_core.registry.annotation_words import Lookup, default_in_words, type_in_words
from rlhf_core.registry.module_source import NoSourceError as NoSourceError
from rlhf_core.registry.module_source import SourceError as SourceError
from rlhf_core.registry.module_source import read_module_source

T = TypeVar("T")

_parsing = threading.RLock()
"""Held while a source is parsed: warnings are switched off meanwhile, which affects all threads."""
_IMPORTS = 3
"""Modules that a name of a type is followed through."""
_EXTRAS = re.compile(r"\s*\[[^\[\]]*\]\s*$")


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as `rlhf show` lists it: its type in words, its default as YAML writes it."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class ClassHeader:
    """What a class's source states: a value is None where its line is missing, or isn't a literal."""

    summary: str
    doc: str
    record: str | None
    api: int | None
    stage: str | None
    path: Path
    line: int


def split_target(target: str) -> tuple[str, str]:
    """Split `package.module:Class [extra]` into module and class; the class is '' where the target is a module alone.

    Raises:
        SourceError: the text has another form.
    """
    module, colon, name = (part.strip() for part in _EXTRAS.sub("", target).partition(":"))
    words = [*module.split("."), *(name.split(".") if colon else [])]
    if not all(word.isidentifier() for word in words):
        raise SourceError(f"its entry point `{target}` isn't of the form `package.module:Class`")
    return module, name


def read_class_header(target: str) -> ClassHeader:
    """Read the header of `package.module:Class`.

    Raises:
        NoSourceError: the module exists, but not as source.
        SourceError: the file is missing or doesn't parse, or doesn't define the class.
    """
    module, name = split_target(target)
    if not name:
        raise SourceError(f"its entry point `{target}` isn't of the form `package.module:Class`")
    return _parsed(module, lambda tree, path: _header(tree, path, module, name))


def read_module_summary(target: str) -> str:
    """Return the first docstring line of a target's module: the summary of a hook, which may be any kind of object."""
    return _parsed(split_target(target)[0], lambda tree, _: _first_line(ast.get_docstring(tree)))


def read_function_summary(target: str) -> str:
    """Return the first docstring line of a function that stands in a target's module; '' where it isn't defined there."""
    module, name = split_target(target)

    def look(tree: ast.Module, _: Path) -> str:
        found = (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name)
        return next((_first_line(ast.get_docstring(one)) for one in found), "")

    return _parsed(module, look)


def read_options(target: str) -> list[Option]:
    """Return the fields that a class's `Config` adds to its base, where the configuration class stands in the same file."""
    module, name = split_target(target)
    return _parsed(module, lambda tree, _: _options(tree, name, lambda wanted: _meaning(tree, wanted)))


def _parsed(module: str, look: Callable[[ast.Module, Path], T]) -> T:
    """Parse a module's source and return `look(tree, path)`; whatever goes wrong with the source is a `SourceError`."""
    source = read_module_source(module)
    path = source.path
    try:
        with _parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in strings, which are for the author to see
            return look(ast.parse(source.text, filename=str(path)), path)
    except SourceError as error:
        raise SourceError(str(error), path) from None
    except SyntaxError as error:
        raise SourceError(f"{path}:{error.lineno or 1}: {error.msg}", path) from error
    except (RecursionError, MemoryError) as error:
        raise SourceError(f"{path} can't be read: it nests too deeply for Python's parser", path) from error
    except Exception as error:
        raise SourceError(f"{path} can't be read: {describe_error(error)}", path) from error


def _header(tree: ast.Module, path: Path, module: str, name: str) -> ClassHeader:
    """Return the header of class `name` in a parsed module."""
    found = _definition(tree.body, name)
    if found is None:
        raise SourceError(_why_no_class(tree, module, name, path))
    doc = ast.get_docstring(found) or ""
    values = dict(_literals(found.body))
    record, api, stage = values.get("record"), values.get("api"), values.get("stage")
    return ClassHeader(
        summary=_first_line(doc),
        doc=doc,
        record=record if isinstance(record, str) else None,
        api=api if isinstance(api, int) and not isinstance(api, bool) else None,
        stage=stage if isinstance(stage, str) else None,
        path=path,
        line=found.lineno,
    )


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0].strip()


def _why_no_class(tree: ast.Module, module: str, name: str, path: Path) -> str:
    """Return why a module defines no class `name`: it is a function, a value, imported from elsewhere, or missing."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return f"`{name}` in `{module}` is a function, not a class ({path}:{node.lineno})"
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            origin = f"`{'.' * node.level}{node.module or ''}`"
            return (
                f"class `{name}` isn't defined in `{module}` but imported there from {origin} ({path}:{node.lineno});"
                " an entry point names the defining module"
            )
        if any(target == name for target, _ in _assigned(node)):
            return f"`{name}` in `{module}` is a value, not a class that is defined there ({path}:{node.lineno})"
    return f"class `{name}` isn't defined in `{module}` ({path}); an entry point names the defining module"


def _meaning(tree: ast.Module, name: str, depth: int = 0) -> ast.expr | None:
    """Return what a name is assigned in a module, or in the one that it is imported from; None for a class, or not found."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            for target, value in _assigned(node):
                if target == name:
                    return value
        if isinstance(node, ast.ImportFrom) and node.module and not node.level and depth < _IMPORTS:
            named = {alias.asname or alias.name: alias.name for alias in node.names}
            if name in named:
                return _meaning_in(node.module, named[name], depth + 1)
    return None


def _meaning_in(module: str, name: str, depth: int) -> ast.expr | None:
    """Return what `_meaning` finds in a module; None where its source can't be read."""
    try:
        return _parsed(module, lambda tree, _: _meaning(tree, name, depth))
    except SourceError:
        return None


def _options(tree: ast.Module, name: str, lookup: Lookup) -> list[Option]:
    """Return the annotated fields of the class that `name.Config` is, or names."""
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
            options.append(_option(node, after, lookup))
    return options


def _definition(body: Iterable[ast.stmt], name: str) -> ast.ClassDef | None:
    """Return the first definition of a class by its dotted name, those inside `if`, `try` and `with` included."""
    head, _, rest = name.partition(".")
    waiting = [*body][::-1]
    while waiting:  # no recursion, for a chain of `elif` is nested as deep as it is long
        node = waiting.pop()
        if isinstance(node, ast.ClassDef) and node.name == head:
            return _definition(node.body, rest) if rest else node
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [node, *getattr(node, "handlers", [])]
            blocks = [getattr(part, block, []) for part in parts for block in ("body", "orelse", "finalbody")]
            waiting += [statement for block in blocks for statement in block][::-1]
    return None


def _assigned(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield (name, value) of each plain name that a statement assigns."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Name):
                yield target.id, statement.value
    elif (
        isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None
    ):
        yield statement.target.id, statement.value


def _literals(body: Iterable[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Yield the values of `record`, `api` and `stage` in a class body, None for what isn't a literal."""
    for statement in body:
        for name, value in _assigned(statement):
            if name in ("record", "api", "stage"):
                yield name, _stage(value) if name == "stage" else _constant(value)


def _constant(value: ast.expr) -> Any:
    return value.value if isinstance(value, ast.Constant) else None


def _stage(value: ast.expr) -> Any:
    """Return the value of `TrainingStage.PREFERENCE`, which is "preference", or of a literal."""
    if not isinstance(value, ast.Attribute):
        return _constant(value)
    owner = getattr(value.value, "id", None) or getattr(value.value, "attr", None)
    return value.attr.lower() if owner == "TrainingStage" else None


def _option(node: ast.AnnAssign, after: ast.stmt | None, lookup: Lookup) -> Option:
    """Return a field of a configuration, whose description is `Field`'s, or the string in the statement after it."""
    default = "required"
    description = _text(after.value) if isinstance(after, ast.Expr) else ""
    value = node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("Field"):
        named = {keyword.arg: keyword.value for keyword in value.keywords}
        stated = value.args[0] if value.args else named.get("default", named.get("default_factory"))
        if stated is not None and not (isinstance(stated, ast.Constant) and stated.value is Ellipsis):
            default = default_in_words(stated)
        description = _text(named.get("description")) or description
    elif value is not None:
        default = default_in_words(value)
    return Option(ast.unparse(node.target), type_in_words(node.annotation, lookup), default, description)


def _text(node: ast.expr | None) -> str:
    return node.value.strip() if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
