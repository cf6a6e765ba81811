"""The first argument of a command: a name or a file, never an option."""

from __future__ import annotations

from rlhf_core.infra.errors import ConfigError


def refuse_flag(given: str | None, wanted: str, *, fix: str) -> str:
    """Return the argument.

    Args:
        given: what stands there; None where nothing does.
        wanted: what should, such as `a method or a file`.
        fix: how the command is written.

    Raises:
        ConfigError: nothing stands there, or an option.
    """
    if given is None or given.startswith("-"):
        got = None if given is None else f"`{given}`"
        raise ConfigError(f"the first argument must be {wanted}", place="command line", got=got, fix=fix)
    return given
