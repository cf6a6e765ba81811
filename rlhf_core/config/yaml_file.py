"""YAML files and flags as values with the place of each key; duplicate keys, aliases and unsafe tags are errors.

In a value of a file `${NAME}` stands for an environment variable, `${NAME:-default}` for it or a default where it is unset or
empty, and `$${NAME}` for that text itself; a path that begins with `~/` is one in the user's home. A value without quotes is read
as YAML again after that, so that `max_steps: ${STEPS}` is a number.

Importing this module imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_core.infra.errors import ConfigError, Mistakes, either, nearest_names, shortened
from rlhf_core.infra.redact import remember_secret

_VARIABLE = re.compile(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")
_HOME = re.compile(r"~[\w.-]*/\S*")


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys and aliases, and notes the line of each key."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.file = name
        self.lines: dict[str, int] = {}
        self.expands = False
        """Whether variables and `~` in values are expanded."""
        self.mistakes = Mistakes()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias, else compose the node as PyYAML does, a text with its variables expanded."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ConfigError(
                "YAML aliases are not accepted",
                place=f"{self.file}:{event.start_mark.line + 1}",
                got=f"*{event.anchor}",
                fix="write the value out",
            )
        node = super().compose_node(parent, index)
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if self.expands and isinstance(node, yaml.ScalarNode) and not is_key:
            self._expand(node)
        return node

    def _expand(self, node: yaml.ScalarNode) -> None:
        """Replace variables and `~/` in a text; note a variable that isn't set among `mistakes`."""
        place = f"{self.file}:{node.start_mark.line + 1}"
        with self.mistakes.noted():
            text = _VARIABLE.sub(lambda match: _variable(match, place), node.value)
            if _HOME.fullmatch(text):
                text = os.path.expanduser(text)  # noqa: PTH111 (a `Path` loses a slash at the end, and raises for no such user)
            if text != node.value and node.style is None:
                node.tag = self.resolve(yaml.ScalarNode, text, (True, False))
            node.value = text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that occurs twice, else construct the mapping as PyYAML does."""
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(
                    f"duplicate key `{key}` (lines {seen[key]} and {line})",
                    place=f"{self.file}:{line}",
                    fix="remove one of them",
                )
            seen[key] = line
        return super().construct_mapping(node, deep=True)


def _variable(match: re.Match[str], place: str) -> str:
    """Return the value of a variable that a text names.

    Raises:
        ConfigError: it isn't set, and there is no default.
    """
    escaped, name, default = match.groups()
    if escaped:
        return match[0][1:]
    value = os.environ.get(name)
    if default is not None and not value:
        return str(default)
    if value is None:
        fix = f"`export {name}=…`, or give a default, `${{{name}:-default}}`; for this text itself write `$${{{name}}}`"
        raise ConfigError(f"the environment variable `{name}` isn't set", place=place, got=f"`{match[0]}`", fix=fix)
    remember_secret(name, value)
    return value


# YAML 1.1 reads `1e-5` (no dot) as text, `010` as eight and `1:30` as ninety. People who write them mean other things.
_NUMBERS = {
    "int": re.compile(r"^[-+]?[0-9][0-9_]*$|^0x[0-9a-fA-F_]+$"),
    "float": re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list("-+0123456789."))


def _integer(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    text = str(node.value).replace("_", "")
    return int(text, 16 if text.lower().startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a configuration file: its values, and for each dotted key its place (`file:line`; the file itself under '').

    Items of a list have their number in the key: `models.0.weight`.

    Raises:
        ConfigError: the file is missing, isn't UTF-8, isn't a mapping, has a key twice, a tag or an alias, or names a variable
            that isn't set; of several such variables the others are its `also`.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".csv", ".tsv", ".parquet") and path.is_file():
        hint = f"`rlhf data {path}` shows its rows; a run reads them by `--data {path}`"
        raise ConfigError("is a file of rows, not a configuration", place=str(path), fix=hint)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("no such file", place=str(path), fix=_near_file(path)) from None
    except IsADirectoryError:
        raise ConfigError("is a directory, not a file", place=str(path), fix=_file_in(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8", place=str(path), got=f"a bad byte at offset {error.start}") from None
    try:
        loader = _Loader(text, str(path))  # looks for characters that YAML doesn't have
        loader.expands = True
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        bare = "${" in [*text.splitlines(), ""][line - 1]
        fix = "put a value with `${…}` in quotes where it stands within `{…}` or `[…]`" if bare else None
        if "'\\t'" in str(error.problem):
            fix = "indent with blanks, not with tabs"
        raise ConfigError(f"not valid YAML: {error.problem}", place=f"{path}:{line}", fix=fix) from None
    except RecursionError:
        raise ConfigError("not valid YAML: nested too deeply", place=str(path)) from None
    except (yaml.YAMLError, ValueError) as error:  # a date that no calendar has is a ValueError
        raise ConfigError(f"not valid YAML: {error}", place=str(path)) from None
    loader.mistakes.raise_first()
    if not isinstance(values, dict):
        hint = "write `name: value`, a line for each option" + (", without dashes" if isinstance(values, list) else "")
        raise ConfigError("expected a mapping of options to values", place=str(path), got=shortened(values), fix=hint)
    places = {"": str(path)}
    _note_lines(node, "", str(path), places)
    return values, places


def _near_file(path: Path) -> str | None:
    """Return a hint for a file that doesn't exist: the configuration of a similar name, or that there is no such directory."""
    if not path.parent.is_dir():
        return f"there is no directory {path.parent} either"
    near = nearest_names(
        path.name, (one.name for one in path.parent.iterdir() if one.suffix in (".yaml", ".yml", ".json"))
    )
    return f"did you mean {either((str(path.parent / one) for one in near), mark='')}?" if near else None


def _file_in(directory: Path) -> str:
    """Return a hint for a directory where a file was expected: the configuration in a pipeline's or a run's."""
    found = [directory / name for name in ("recipe.yaml", "config.yaml") if (directory / name).is_file()]
    return f"name the file in it, {found[0]}" if found else "name a YAML file"


def _note_lines(node: Any, prefix: str, file: str, places: dict[str, str]) -> None:
    """Add `file:line` to `places` for each key below a YAML node, dotted, starting with `prefix`."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            places[key] = f"{file}:{key_node.start_mark.line + 1}"
            _note_lines(value_node, key + ".", file, places)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            places[f"{prefix}{number}"] = f"{file}:{item.start_mark.line + 1}"
            if isinstance(item, yaml.MappingNode):
                _note_lines(item, f"{prefix}{number}.", file, places)


def parse_scalar(text: str) -> Any:
    """Read a flag's value as YAML would (`3`, `1e-5`, `true`, `null`, `[a, b]`, `{rank: 8}`), else as text."""
    try:
        loader = _Loader(text, "flag")
        value = loader.get_single_data()
    except (yaml.YAMLError, ConfigError, ValueError, RecursionError):
        return text
    return text if value is None and text.strip() not in ("null", "~", "") else value


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `over`; groups are merged key by key, and a group replaces a null or a true."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = overlay(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn groups into dotted keys, the reverse of `nest`: `{"lora": {"rank": 8}}` → `{"lora.rank": 8}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Return values as the text of a YAML file, keys in their order; `load_yaml` reads the same values from it."""
    return yaml.safe_dump(_escaped(dict(values)), sort_keys=False, allow_unicode=True, width=100)


def _escaped(value: Any) -> Any:
    """Return values in which no text names a variable."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    return _VARIABLE.sub(lambda match: f"${match[0]}", value) if isinstance(value, str) else value


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into groups: `{"lora.rank": 8}` → `{"lora": {"rank": 8}}`."""
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *groups, last = dotted.split(".")
        leaf: dict[str, Any] = {last: value}
        for group in reversed(groups):
            leaf = {group: leaf}
        nested = overlay(nested, leaf)
    return nested
