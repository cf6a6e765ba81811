"""Read what a user names on the command line or in Python: a method, or a configuration file that names one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.config.file_paths import find_beside
from rlhf_core.config.known_names import written_for
from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.infra.errors import ConfigError, nearest
from rlhf_core.registry.discovery import Plugin
from rlhf_core.registry.resolve import View, load, lookup

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class GivenValues:
    """The values of a configuration file that was read already, as part of a larger one."""

    values: Mapping[str, Any]
    places: Mapping[str, str]
    """The place of each dotted key; of the whole under ''."""


def names_file(target: str | Path) -> bool:
    """Tell whether a text names a configuration file: it is a path, has a separator, or ends in .yaml or .yml."""
    text = str(target)
    return isinstance(target, Path) or text.endswith((".yaml", ".yml")) or os.sep in text


def read_method_or_file(target: str | Path | GivenValues) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Return the values that a method's name or a configuration file sets, the place of each key, and the file's text.

    Relative paths in a file are looked for in the working directory, then beside the file.

    The place of a key is where messages say that it was set, such as `run.yaml:7`; the text is None where there is no file.
    """
    if isinstance(target, GivenValues):
        return dict(target.values), dict(target.places), None
    if not names_file(target):
        return {"method": str(target)}, {"": COMMAND_LINE, "method": COMMAND_LINE}, None
    values, places = load_yaml(target)
    values = find_beside(values, target)
    return values, places, Path(target).read_text(encoding="utf-8-sig")


def find_method(values: Mapping[str, Any], places: Mapping[str, str], kind: str) -> tuple[Plugin, Any]:
    """Return the plugin of a kind that the value `method` names, and its class; see `find_plugin`.

    Raises:
        PluginError: the plugin is broken, ambiguous or disabled.
    """
    plugin = find_plugin(values, places, kind)
    return plugin, load(plugin)


def find_plugin(values: Mapping[str, Any], places: Mapping[str, str], kind: str) -> Plugin:
    """Return the plugin of a kind that the value `method` names. Imports nothing of it.

    Args:
        values, places: as `read_method_or_file` returns them.

    Raises:
        ConfigError: there is no such plugin, or `method` is missing.
        PluginError: the name is ambiguous, or the plugin is disabled.
    """
    name = values.get("method")
    if not isinstance(name, str):
        known = ", ".join(View(kind))
        problem = "`method` is missing" if name is None else "`method` is not a name"
        place = places.get("method", places[""])
        if name is None and (tool := written_for(places)) is not None:
            raise ConfigError(
                f"looks like a file of {tool}, and has no `method`",
                place=place,
                fix=f"`rlhf init METHOD` writes one of ours (METHOD is one of {known}); docs/other-trainers.md says what {tool}'s"
                " options are called here, and so do messages once there is a `method`",
            )
        instead = f"set it to one of: {known}"
        if name is None and kind == "trainer" and place.endswith((".yaml", ".yml")):
            meant = nearest("stages", (key for key in places if "." not in key))
            asked = f" (did you mean it by `{meant}`?)" if meant else ""
            instead += f"; a recipe of several, for `rlhf run`, has `stages`{asked}"
        raise ConfigError(problem, place=place, got=None if name is None else repr(name), fix=instead)
    try:
        return lookup(name, kind)
    except ConfigError as error:
        fix = error.fix
        if Path(name).is_dir():
            load_yaml(name)  # says that it is a directory, and which file in it may be meant
        if not names_file(name) and Path(f"{name}.yaml").is_file():
            fix = f"write `{name}.yaml` for the file; {fix}"
        raise type(error)(error.problem, place=places.get("method", places[""]), got=error.got, fix=fix) from None
