"""`rlhf train METHOD --help`: the options of one method, without importing it, torch or typer."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_core import registry
from rlhf_core.cli.listing import own_options, print_option
from rlhf_core.cli.printing import print_heading, print_wrapped, text_width
from rlhf_core.registry.class_header import Option

_ONLINE = ("prompt", "reasoning")
"""Record types of methods that draw completions and score them."""
_SWITCHES = (
    Option("--dry-run", "", "", "Check options and rows, print what the run takes; load and write nothing."),
    Option("--resume", "", "", "Continue the run in --output from its last checkpoint."),
    Option("--overwrite", "", "", "Replace the run in --output."),
    Option("--allow-change NAMES", "", "", "With --resume: options that may differ from those of the run."),
    Option("--json", "", "", "Print the result as JSON."),
)


def print_method_help(name: str) -> None:
    """Print the options that `rlhf train NAME` takes, those of the method first.

    Raises:
        RLHFError: there is no such trainer, or several.
    """
    from rlhf_core.config.online import OnlineConfig
    from rlhf_core.config.run_file import RunConfig
    from rlhf_core.config.training import TrainerConfig

    plugin = registry.lookup(name if ":" in name else f"trainer:{name}")
    width = None if text_width() < 1 << 20 else 80
    print_wrapped(f"{plugin.name}: {plugin.summary}\n", width=width)
    print_wrapped(f"rlhf train {name} --model MODEL --data DATA [--output DIR] [--OPTION VALUE …]", width=width)
    print_wrapped(
        f"rlhf train FILE.yaml [--OPTION VALUE …], where the file has `method: {name}` and options by name", width=width
    )
    config = OnlineConfig if plugin.record in _ONLINE else TrainerConfig
    own = own_options(plugin)
    seen = {option.name for option in own}
    _print_section("The run", (one for one in _options(RunConfig) if one.name != "method"))
    _print_section(f"Options of {plugin.name}", own)
    shared = [option for option in _options(config) if option.name not in seen]
    _print_section("Options that methods share", (one for one in shared if one.type != "group"))
    _print_section("Groups: their options are set as --GROUP.NAME", (one for one in shared if one.type == "group"))
    _print_section("Switches", _SWITCHES)
    print_wrapped(f"\nEvery option, those inside groups too: rlhf show {name} --all", width=width)


def _options(config: type) -> list[Option]:
    """Return the options of a configuration class, of a group those in it as its description."""
    from rlhf_core.config.fields import option_rows

    found = []
    for row in option_rows(config):
        if row.group is None:
            found.append(Option(*row[:4]))
        else:
            inside = ", ".join(row.group.model_fields)
            found.append(Option(row.name, "group", "", f"{row.meaning} Options: {inside}.".strip()))
    return found


def _print_section(title: str, options: Iterable[Option]) -> None:
    """Print a heading with options under it, as flags."""
    options = list(options)
    if options:
        print()
        print_heading(title)
    for option in options:
        flag = option.name if option.name.startswith("--") else f"--{option.name}"
        print_option(Option(flag, "" if option.type == "group" else option.type, option.default, option.description))
