"""`rlhf new` and `rlhf check`: start a package with a plugin from templates, and run the conformance tests on a plugin."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_core.cli import METHOD_OPTIONS, shell_completion
from rlhf_core.infra.errors import ConfigError, StorageError

TEMPLATES = Path(__file__).parent / "templates"
ONLINE = "trainer_online"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(check)
    app.command()(new)


def check(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="[KIND:]NAME", help="The plugin to check.", autocompletion=shell_completion.names)
    ],
) -> None:
    """Run the conformance tests of a plugin's kind on it: `rlhf check ties`, `rlhf check reward:reward_model --model M`.

    Every option of the method is a flag; those without a default are required.
    """
    from rlhf_core import registry

    plugin = registry.lookup(name)
    if plugin.kind == "part":
        from rlhf_core.infra.errors import ConfigError

        raise ConfigError("a part has no contract to check", place=f"part `{name}`", fix="test the function itself")
    method = registry.load(plugin)  # where it can't be loaded, that is one error, not many failing tests
    from rlhf_core.config.base import BaseConfig
    from rlhf_core.config.flags import convert_options, lex
    from rlhf_core.config.yaml_file import nest
    from rlhf_core.testing.runner import run_contract

    kind = BaseConfig if plugin.kind == "hook" else method.Config
    given, places = convert_options(lex(context.args), kind, plugin.qualified, ())
    options = nest(given)
    kind.parse(options, place=places | {"": "command line"})  # a missing option is one error, not one per test
    raise typer.Exit(run_contract(plugin.kind, plugin.qualified, options=options))


def new(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="trainer, reward, sampler, merger or hook.", autocompletion=shell_completion.kinds
        ),
    ],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the package and its plugin, such as acme-margin.")
    ],
    directory: Annotated[
        Path, typer.Option("--dir", help="Where to create the package's directory.", file_okay=False)
    ] = Path(),
    online: Annotated[
        bool,
        typer.Option("--online", help="Of a trainer: sample completions and learn from their rewards, not from pairs."),
    ] = False,
) -> None:
    """Write a Python package with one working plugin, ready to install, edit and test.

    A new trainer learns from preference pairs, or with `--online` from completions that its policy samples.
    """
    from rlhf_core.registry import parse_kind

    root = write_package(parse_kind(kind), name, directory, online=online)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        print(path)
    print(f"\nnext: pip install -e {root} && rlhf show {name} && pytest {root}/tests")


def write_package(kind: str, name: str, directory: Path, *, online: bool = False) -> Path:
    """Write the package `name` with one plugin of that kind and name; return its directory.

    Args:
        directory: where the package's directory is created.
        online: for a trainer: it learns from completions that its policy samples, not from responses in the data.

    Raises:
        ConfigError: the kind has no template, or the name isn't valid for a package, is taken, or hides an installed module.
        StorageError: the package's directory exists and isn't empty.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from rlhf_core.infra.version import API, __version__

    kinds = sorted({path.name for path in TEMPLATES.iterdir()} - {"shared", ONLINE})
    if kind not in kinds:
        raise ConfigError(
            "there is no template for this kind", place="KIND", got=f"`{kind}`", fix=f"use one of: {', '.join(kinds)}"
        )
    if online and kind != "trainer":
        raise ConfigError("only a trainer is online", place="--online", got=f"`{kind}`", fix="leave it out")
    _check_name(kind, name)
    root = directory / name
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise StorageError(
            "the directory isn't empty", place=str(root), fix="choose another name, or another place with `--dir`"
        )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    module = name.replace("-", "_")
    stem = "".join(part.capitalize() for part in name.split("-"))
    values = {"kind": kind, "name": name, "module": module, "stem": stem, "api": API, "core_version": __version__}
    values["class_name"] = stem.removesuffix(kind.capitalize()) + kind.capitalize()
    own = TEMPLATES / (ONLINE if online else kind)
    for source in sorted([*(TEMPLATES / "shared").rglob("*.j2"), *own.rglob("*.j2")]):
        inside = source.relative_to(TEMPLATES)
        target = root / str(Path(*inside.parts[1:])).removesuffix(".j2").replace("MODULE", module)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(environment.get_template(inside.as_posix()).render(values), encoding="utf-8")
    return root


def _check_name(kind: str, name: str) -> None:
    """Raise a `ConfigError` where a package of this name can't be written, installed or found by its name."""
    from rlhf_core import registry

    module = name.replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(module):
        plain = re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")
        fix = (
            f"write `{plain}`"
            if _NAME.fullmatch(plain) and not keyword.iskeyword(plain)
            else "use a name such as `acme-margin`"
        )
        raise ConfigError(
            "a package's name has lower-case letters, digits and `-`", place="NAME", got=f"`{name}`", fix=fix
        )
    taken = [p.qualified for p in registry.find(kind) if p.name.replace("_", "-") == name]
    if taken:
        raise ConfigError(
            f"there is a {kind} of this name already", place="NAME", got=f"`{taken[0]}`", fix="choose another name"
        )
    if module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        raise ConfigError("an installed module has this name, and would be hidden", place="NAME", got=f"`{module}`",
                          fix=f"choose another name, such as `my-{name}`")  # fmt: skip
