"""A configuration file that was given to the wrong command is answered with the right one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rlhf_core.infra.errors import ConfigError

_CONFIGURES = {
    "run": "a pipeline", "train": "a training run", "merge": "a merge", "sample": "sampling", "evaluate": "an evaluation",
    "test-capabilities": "capability tests",
}  # fmt: skip
"""Command → what its files configure."""
_BY_METHOD = {"trainer": "train", "merger": "merge", "sampler": "sample"}
"""Kind of plugin that `method` names → the command."""


def refuse_file_of_another(target: str | None, command: str, *, checked: bool = False) -> None:
    """Raise `ConfigError` where a configuration file is for another command than this one; its message names that one.

    Args:
        target: what was given; nothing happens where it is no file, can't be read, or may be anything.
        command: the one that it was given to, such as `train`.
        checked: whether the file was only to be checked.
    """
    found = _command_of(target) if target is not None else None
    if found in (None, command) or (found, command) == ("evaluate", "sample"):  # which may lack its `method`
        return
    dry_run = " --dry-run" if checked and found != "test-capabilities" else ""
    raise ConfigError(
        f"configures {_CONFIGURES[found]}, not {_CONFIGURES[command]}",
        place=target,
        fix=f"`rlhf {found} {target}{dry_run}`",
    )


def _command_of(target: str) -> str | None:
    """Return the command that a configuration file is for, as its keys tell; None where they don't."""
    from rlhf_core.config.yaml_file import load_yaml
    from rlhf_core.registry.method_or_file import names_file
    from rlhf_core.registry.resolve import View

    values: dict[str, Any] = {}
    if names_file(target):
        with suppress(ConfigError):
            values = load_yaml(target)[0]
    if values.get("method") is not None:
        found = [command for kind, command in _BY_METHOD.items() if values["method"] in View(kind)]
        return found[0] if len(found) == 1 else None
    keys = {
        "stages": "run",
        "suites": "test-capabilities",
        "merge_method": "merge",
        "prompts": "evaluate",
        "tasks": "evaluate",
    }
    return next((command for key, command in keys.items() if key in values), None)
