"""Print what `rlhf list` and `rlhf show` show, without typer, whose import takes longer than either."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core import registry
from rlhf_core.cli.printing import (
    encodable,
    print_hanging,
    print_heading,
    print_json,
    print_table,
    print_warning,
    print_wrapped,
    styled,
    text_width,
)
from rlhf_core.infra.errors import printable
from rlhf_core.registry.class_header import Option, SourceError, read_class_header, read_options
from rlhf_core.registry.distributions import WITHOUT_CLASS

if TYPE_CHECKING:
    from rlhf_core.registry import Plugin

_STYLES = {"ok": "", "conflict": "yellow", "disabled": "dim", "broken": "red", "wrong-api": "red"}


_ROOM = 40
"""Least width of a column of summaries; a narrower one is unreadable."""


def print_list(
    kind: str | None = None, *, as_json: bool = False, check: bool = False, seconds: float | None = None
) -> None:
    """Print the plugins of one kind, or of all, as a table or JSON; warn on stderr of damaged installations.

    Args:
        kind: such as `trainers`; None for all kinds.
        check: import each plugin first, in another process, so that its status shows whether it works.
        seconds: the time limit of each import; None for the default.
    """
    plugins = registry.check(kind, seconds=seconds) if check else registry.find(kind)
    for fault in registry.faults():
        print_warning(fault)
    if as_json:
        return print_json([plugin.as_dict() for plugin in plugins])
    rows = [
        (
            p.kind,
            _clipped(p.name),
            _clipped(f"{p.distribution} {p.version}".strip()),
            p.record or "",
            p.status,
            p.reason or p.summary,
        )
        for p in plugins
    ]
    header = ("kind", "name", "distribution", "record", "status", "summary")
    taken = sum(max(map(len, column)) + 2 for column in list(zip(header, *rows, strict=True))[:-1])
    if text_width() - taken < _ROOM:
        return _print_below(plugins)
    return print_table(header, rows, styles=[_STYLES[plugin.status] for plugin in plugins])


def _print_below(plugins: Sequence[Plugin]) -> None:
    """Print each plugin's summary below its name, for terminals in which a column beside it would be too narrow to be read."""
    kind = None
    for plugin in plugins:
        if plugin.kind != kind:
            kind = plugin.kind
            print_heading(f"{kind}s")
        facts = [plugin.record, f"{plugin.distribution} {plugin.version}".strip()]
        said = "" if plugin.status == "ok" else f"  {plugin.status}"
        line = f"  {_clipped(plugin.name)}{said}  ({', '.join(fact for fact in facts if fact)})"
        print(
            styled(encodable(printable(line)), _STYLES[plugin.status])
            if _STYLES[plugin.status]
            else encodable(printable(line))
        )
        print_hanging("      ", plugin.reason or plugin.summary)


def _clipped(text: str, length: int = 60) -> str:
    """Return a text clipped to the width of a column, for names of plugins may have any length."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def print_plugin(name: str, *, every: bool = False, as_json: bool = False) -> None:
    """Print one plugin: summary, origin, record type, status and options, as text or JSON.

    Args:
        every: list inherited options as well, for which the plugin is imported; else only those in its source are listed.
    """
    plugin = registry.lookup(name)
    doc, source, options = _of_source(plugin)
    if every:
        options, loaded_doc = _of_class(plugin)
        plugin, doc = registry.lookup(f"{plugin.kind}:{plugin.qualified}"), doc or loaded_doc
    doc = doc or plugin.summary
    if as_json:
        facts: dict[str, Any] = {**plugin.as_dict(), "doc": doc, "source": source}
        return print_json({**facts, "options": [vars(option) for option in options]})
    print_wrapped(f"{plugin.name}: {doc.strip()}" if doc else plugin.name)
    print()
    _print_facts(plugin, source)
    if options:
        print()
        print_options(options)
    if plugin.kind == "trainer" and not every:
        print()
        print_wrapped(f"For the options that all trainers share: rlhf show {name} --all")
    return None


def print_choices(name: str, flags: list[str], *, as_json: bool = False) -> None:
    """Print what the options that a method leaves open come to with these flags, as a table or JSON.

    Raises:
        ConfigError: an option doesn't exist or doesn't fit, or the method has none to show.
    """
    from rlhf_core.config.flags import convert_options, lex
    from rlhf_core.config.yaml_file import nest
    from rlhf_core.infra.errors import ConfigError

    plugin = registry.lookup(name)
    cls = registry.load(plugin)
    if plugin.kind in WITHOUT_CLASS:
        raise ConfigError(
            f"a {plugin.kind} takes no options here", place=f"{plugin.kind} `{name}`", fix=f"rlhf show {name}"
        )
    given, places = convert_options(lex(flags), cls.Config, plugin.qualified, ())
    choices = cls.Config.parse(nest(given), place=places | {"": "command line"}).choices()
    if not choices:
        raise ConfigError(
            f"{plugin.name} has no options that others decide", place=flags[0], fix=f"rlhf show {name} --all"
        )
    if as_json:
        return print_json(choices)
    return print_table(("option", "value"), list(choices.items()))


def _print_facts(plugin: Plugin, source: str) -> None:
    """Print a plugin's origin, record type and status, one line each."""
    facts = {
        "kind": plugin.kind,
        "qualified": plugin.qualified,
        "version": plugin.version,
        "target": plugin.target,
        "source": source,
        "record": _record(plugin),
        "stage": plugin.stage or "",
        "status": plugin.status,
        "reason": plugin.reason,
    }
    width = max(map(len, facts))
    for label, value in facts.items():
        if value:
            print_hanging(f"{label:{width}}  ", value)


def print_options(options: Sequence[Option]) -> None:
    """Print options: on a terminal each with its description below it, else one line per option."""
    if not sys.stdout.isatty():
        return print_table(("option", "type", "default", "description"), [tuple(vars(one).values()) for one in options])
    for option in options:
        print_option(option)
    return None


def print_option(option: Option) -> None:
    """Print an option with its type and default, and below it the values of a choice and its description."""
    default = {"required": "required", "": ""}.get(option.default, f"by default {option.default}")
    choice = option.type.startswith("`")
    about = ", ".join(text for text in ("" if choice else option.type, default) if text)
    below = [f"one of {option.type}"] if choice else []
    _print_name(option.name, about)
    for text in [*below, option.description]:
        if text:
            print_hanging("    ", text)


def _print_name(name: str, about: str) -> None:
    """Print a name, whole, and behind it what is said of it, on lines of its own where that doesn't fit."""
    if about and len(name) + 2 + len(about) > text_width():
        print_heading(name)
        print_hanging("    ", about)
    else:
        print(f"{styled(encodable(printable(name)), 'bold')}  {encodable(printable(about))}".rstrip())


def own_options(plugin: Plugin) -> list[Option]:
    """Return a plugin's own options from its source; none where that can't be read."""
    return _of_source(plugin)[2]


def _of_source(plugin: Plugin) -> tuple[str, str, list[Option]]:
    """Return docstring, `file:line` and own options from a plugin's source; ("", "", []) where it can't be read."""
    if plugin.kind not in WITHOUT_CLASS:
        try:
            header = read_class_header(plugin.target)
            return header.doc, f"{header.path}:{header.line}", read_options(plugin.target)
        except SourceError:
            pass  # the plugin's reason says why
    return "", "", []


def _of_class(plugin: Plugin) -> tuple[list[Option], str]:
    """Import a plugin and return all its options, inherited ones included, and its docstring."""
    import inspect

    from rlhf_core.config.fields import every_option

    def look(cls: Any) -> tuple[list[Option], str]:
        config = getattr(cls, "Config", None)
        options = [Option(*row[:4]) for row in every_option(config)] if config is not None else []
        return options, inspect.getdoc(cls) or ""

    return registry.ask(plugin, look)


def _record(plugin: Plugin) -> str:
    """Return a trainer's record type in words, with its required fields; '' for other plugins."""
    from rlhf_core.contracts.records import RECORDS

    record = RECORDS.get(plugin.record or "")
    return f"{record.name} ({', '.join(record.required)}): {record.summary}" if record else ""
