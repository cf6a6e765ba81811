"""Packages from templates, for `rlhf new`."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path

from rlhf_core import registry
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.version import API, __version__

TEMPLATES = Path(__file__).parent / "templates"
ONLINE = "trainer_online"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_package(kind: str, name: str, directory: Path, *, online: bool = False) -> Path:
    """Write the package `name` with one plugin of that kind and name; return its directory.

    Args:
        online: of a trainer, whether it learns from its policy's own completions, and not from responses in the data.

    Raises:
        ConfigError: the kind has no template, or the name can't be a package's, is taken, or hides another module.
        StorageError: the directory holds something already.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

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
        raise StorageError("is there already", place=str(root), fix="choose another name, or another place by `--dir`")
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
            f"there is a {kind} of that name", place="NAME", got=f"`{taken[0]}`", fix="choose another name"
        )
    if module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        raise ConfigError("a module of that name is installed, which it would hide", place="NAME", got=f"`{module}`",
                          fix=f"choose another name, such as `my-{name}`")  # fmt: skip
