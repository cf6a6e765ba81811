"""Scan installed distributions: their entry points of the plugin groups, and what is wrong with their metadata.

Each distribution is read on its own, and its entry points line by line, so that one that is damaged hides no other.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.machinery import PathFinder
from typing import Any

from rlhf_core.infra.errors import describe_error, did_you_mean, printable

PREFIX = "rlhf_core."
GROUPS = {
    "trainer": "rlhf_core.trainers",
    "reward": "rlhf_core.rewards",
    "sampler": "rlhf_core.samplers",
    "merger": "rlhf_core.mergers",
    "hook": "rlhf_core.hooks",
    "part": "rlhf_core.parts",
}
WITHOUT_CLASS = {"hook", "part"}
"""Kinds whose entry points name something other than a class: a hook is any object, a part a function."""
PART_KINDS = ("advantage", "ratio", "clip", "correction", "aggregation", "kl", "shaping")
"""What a part of a policy gradient is for: the first word of its entry point's name, `advantage.mine`."""
KIND_OF_GROUP = {group: kind for kind, group in GROUPS.items()}

LOCAL = "local"
"""The distribution under which plugins are listed that `registry.register` added in this process."""
RESERVED = {LOCAL, *GROUPS, *(f"{kind}s" for kind in GROUPS)}
"""Words that mean a kind before the colon of `kind:name`, so no distribution with plugins may have one as its name."""

_DISTRIBUTION_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)
_METHOD_NAME = re.compile(r"\w[\w.-]{0,99}")
_TABLE = "entry_points.txt"


@dataclass(frozen=True)
class EntryPoint:
    """One entry point of a plugin group, before the source that it names is read. `fault` says what is wrong with it, or ''."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str
    fault: str = ""

    @property
    def qualified(self) -> str:
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True)
class Scan:
    """The entry points of all distributions, and what is wrong with distributions themselves, a line each."""

    entry_points: tuple[EntryPoint, ...] = ()
    faults: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    """The `entry_points.txt` files that hold the entry points."""


def scan() -> Scan:
    """Scan every installed distribution. The first of a name on `sys.path` hides later ones, as it does for imports."""
    entry_points: dict[tuple[str, str, str], EntryPoint] = {}
    faults: list[str] = []
    tables: list[str] = []
    first: dict[str, InstalledDistribution] = {}
    for found in every_distribution(faults):
        key = canonical(found.stem or found.name) or found.place
        if key.startswith("~"):  # pip renames what it is about to remove
            if found.has_plugins:
                faults.append(f"{found.place} is left over from an interrupted installation; fix: remove it")
            continue
        if found.why_malformed:
            faults.append(f"the metadata at {found.place} can't be read: {found.why_malformed}")
            _tolerate_malformed()
        earlier = first.setdefault(key, found)
        if earlier is not found:
            faults += _hidden(earlier, found)
        elif found.has_plugins:
            tables.append(os.path.join(found.place, _TABLE))  # noqa: PTH118
            faults += found.faults()
            for one in found.entry_points():
                entry_points.setdefault((one.kind, one.qualified, one.target), one)
    return Scan(tuple(entry_points.values()), tuple(map(printable, faults)), tuple(tables))


class InstalledDistribution:
    """One installed distribution; reading its metadata never raises.

    Args:
        place: the directory of its metadata, such as `acme_rlhf-1.0.dist-info`.
        read_text: returns the text of a file in that directory, None where there is none; may raise anything.
    """

    def __init__(self, place: str, read_text: Callable[[str], str | None]) -> None:
        self.place, self._read_text = place, read_text
        self.stem, self._stem_version = _name_and_version(place)
        try:
            self.table = read_text(_TABLE) or ""
            self.why_malformed = _malformed_line(self.table)
        except Exception as error:
            self.table, self.why_malformed = "", f"{_TABLE}: {describe_error(error)}"

    @property
    def has_plugins(self) -> bool:
        return PREFIX in self.table

    @cached_property
    def stated(self) -> tuple[str, str]:
        """Name and version in its METADATA file, '' where they are missing."""
        text = self.read("METADATA") or self.read("PKG-INFO") or self.read("") or ""
        fields: dict[str, str] = {}
        for line in text.splitlines():
            if not line.strip():  # what follows is the description
                break
            field, _, value = line.partition(":")
            fields.setdefault(field.strip().casefold(), value.strip())
        return fields.get("name", ""), fields.get("version", "")

    @property
    def name(self) -> str:
        """The name in METADATA where it agrees with the directory's, else the directory's; '' where neither is valid."""
        stated = self.stated[0]
        agreed = not self.stem or canonical(stated) == canonical(self.stem)
        return next((name for name in (stated if agreed else "", self.stem) if _DISTRIBUTION_NAME.fullmatch(name)), "")

    @property
    def version(self) -> str:
        return self.stated[1] or self._stem_version

    @property
    def editable_source(self) -> str | None:
        """The project's directory, where this is an editable installation (`pip install -e`); else None."""
        import json
        from urllib.parse import unquote, urlparse

        try:
            origin = json.loads(self.read("direct_url.json") or "{}")
            about, url = origin["dir_info"], origin["url"]
            return unquote(urlparse(url).path) if about["editable"] and url.startswith("file:") else None
        except Exception:  # nothing readable is noted
            return None

    def targets(self, group: str) -> dict[str, str]:
        """Return `{name: "package.module:Class"}` for the readable entry points of a plugin group."""
        return {name: target for _, name, target, one in self._lines() if one == group and target is not None}

    def read(self, file: str) -> str | None:
        """Return the text of a file of its metadata, or None where it is missing or can't be read."""
        try:
            return self._read_text(file)
        except Exception:
            return None

    def _lines(self) -> Iterator[tuple[int, str, str | None, str]]:
        """Yield (line number, name, target, group) for each line of a plugin group; the target is None on a malformed line."""
        group = ""
        for number, line in enumerate(self.table.lstrip("\ufeff").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith(("#", ";")):
                continue
            if line.startswith("[") and (line.endswith("]") or "=" not in line):
                group = line[1:-1].strip() if line.endswith("]") else ""
            elif group.startswith(PREFIX):
                name, equals, target = (part.strip() for part in line.partition("="))
                yield number, name, target if equals else None, group

    def entry_points(self) -> Iterator[EntryPoint]:
        """Yield its entry points of the plugin groups, each with its fault."""
        distribution, version = self.name, self.version
        owner = _owner_fault(distribution, self.stated[0])
        for number, name, target, group in self._lines():
            if group in KIND_OF_GROUP:
                fault = owner or method_name_fault(name) or (part_name_fault(name) if group == GROUPS["part"] else "")
                if target is None:
                    fault = f"line {number} of {self.place}/{_TABLE} isn't of the form `name = package.module:Class`"
                yield EntryPoint(KIND_OF_GROUP[group], name, target or "", distribution, version, fault)

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the distribution itself, and so shows in the status of none of its plugins."""
        if self.name and self.name != self.stated[0]:
            yield f"the METADATA in {self.place} has no valid name, or another; the directory's is used, `{self.name}`"
        for group in sorted({group for *_, group in self._lines()} - KIND_OF_GROUP.keys()):
            yield f"{self.place}: unknown entry-point group `{group}`; {did_you_mean(group, KIND_OF_GROUP)}"


def unreadable_distributions() -> list[tuple[str, str]]:
    """Return (place, reason) for each installed distribution whose metadata can't be read, whether it has plugins or not."""
    found = list(every_distribution([]))
    reasons = [(one.place, one.why_malformed or ("" if one.stated[0] else "it has no name")) for one in found]
    return [(place, printable(reason)) for place, reason in reasons if reason]


def method_name_fault(name: str) -> str:
    """Return why a method can't have this name, or '' where it can."""
    if not name:
        return "its entry point has no name"
    if not _METHOD_NAME.fullmatch(name):
        return f"its name {_quoted(name)} can't be addressed: names have letters, digits, `-`, `_` and `.`, up to 100"
    if name.casefold().endswith((".yaml", ".yml")):
        return f"its name {_quoted(name)} can't be addressed: it reads as a file's"
    return ""


def part_name_fault(name: str) -> str:
    """Return why a part can't have this name, or '' where it can: `KIND.NAME`, such as `advantage.mine`."""
    kind, dot, rest = name.partition(".")
    if dot and rest and kind in PART_KINDS:
        return ""
    return f"its name {_quoted(name)} isn't of the form `KIND.NAME`; {did_you_mean(kind, PART_KINDS)}"


def canonical(distribution: str) -> str:
    """Return the form in which names of distributions are compared: lower case, `-` for each run of `-`, `_` and `.`."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).casefold()


def every_distribution(faults: list[str]) -> Iterator[InstalledDistribution]:
    """Yield every installed distribution in the order of `sys.path`, then those that other import finders know.

    A finder that raises is skipped and noted in `faults`. Directories are listed here, for importing `importlib.metadata` takes
    half as long as all of `rlhf list`; it is used for archives and for other finders.

    Args:
        faults: a list to which a line is added for each finder that fails.
    """
    seen: set[str] = set()
    for place in dict.fromkeys(place for place in sys.path if isinstance(place, str)):
        for found in _in_directory(place) if os.path.isdir(place or ".") else _in_archive(place):  # noqa: PTH112
            seen.add(found.place)
            yield found
    for finder in distribution_finders():
        try:
            known = [found for found in map(_installed, _ask(finder)) if found.place not in seen]
        except Exception as error:
            faults.append(
                f"the distributions that {type(finder).__name__} knows can't be read: {describe_error(error)}"
            )
            continue
        yield from known


def distribution_finders() -> list[Any]:
    """Return the finders on `sys.meta_path` that know distributions beside those in directories and archives."""
    return [finder for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_distributions")]


def metadata_directories(place: str) -> Iterator[str]:
    """Yield the paths of the metadata directories in a directory, sorted; none where it can't be listed."""
    try:
        children = sorted(os.listdir(place or "."))  # noqa: PTH208
    except OSError:
        return
    for child in children:
        low = child.lower()
        if low.endswith((".dist-info", ".egg-info")) or (low == "egg-info" and place.lower().endswith(".egg")):
            yield os.path.join(place, child)  # noqa: PTH118


def _in_directory(place: str) -> Iterator[InstalledDistribution]:
    for directory in metadata_directories(place):
        yield InstalledDistribution(directory, partial(_read_file, directory))


def _in_archive(place: str) -> list[InstalledDistribution]:
    """Return the distributions in an archive on `sys.path`, such as a zip file; [] for anything else."""
    if not os.path.isfile(place):  # noqa: PTH113
        return []
    import importlib.metadata

    context = importlib.metadata.DistributionFinder.Context(path=[place])
    return [_installed(one) for one in importlib.metadata.MetadataPathFinder.find_distributions(context)]


def _ask(finder: Any) -> list[Any]:
    """Return the distributions that a finder on `sys.meta_path` knows."""
    import importlib.metadata

    return list(finder.find_distributions(importlib.metadata.DistributionFinder.Context()))


def _installed(distribution: Any) -> InstalledDistribution:
    return InstalledDistribution(str(getattr(distribution, "_path", distribution)), distribution.read_text)


def _read_file(place: str, file: str) -> str | None:
    """Return the text of a file in a metadata directory, or None; '' reads `place` itself, a file in distutils' old format."""
    try:
        with open(os.path.join(place, file) if file else place, encoding="utf-8") as stream:  # noqa: PTH118, PTH123
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _tolerate_malformed() -> None:
    """Patch `importlib.metadata` in this process so that a malformed entry_points.txt counts as an empty one.

    torch and pydantic read the entry points of every installed distribution when they are imported: one malformed table, of
    a package that nothing here uses, would break all methods.
    """
    from importlib.metadata import Distribution, EntryPoints

    stated: Any = vars(Distribution)["entry_points"]
    if isinstance(stated, _Tolerant):
        return

    def entry_points(self: Distribution) -> Any:
        try:
            return stated.fget(self)
        except Exception:
            return EntryPoints()

    Distribution.entry_points = _Tolerant(entry_points)  # type: ignore[assignment]


class _Tolerant(property):
    """The type of the patched property `Distribution.entry_points`, by which the patch is recognised."""


def _name_and_version(place: str) -> tuple[str, str]:
    """Return the name and version in a metadata directory's own name: `acme_rlhf-1.0.dist-info` → acme-rlhf, 1.0."""
    stem, suffix = os.path.splitext(os.path.basename(place.rstrip("/\\")))  # noqa: PTH119, PTH122
    if suffix.lower() not in (".dist-info", ".egg-info"):
        return "", ""
    name, _, version = stem.partition("-")
    return name.replace("_", "-"), version if suffix.lower() == ".dist-info" else ""


def _owner_fault(name: str, stated: str) -> str:
    """Return why a distribution's name keeps its plugins from being addressed, or ''."""
    if not name:
        return f"its distribution has no valid name: {_quoted(stated)}"
    if canonical(name) in RESERVED:
        return f"its distribution is named `{name}`, a word that the registry uses itself"
    return ""


def _malformed_line(table: str) -> str:
    """Return what is wrong with the first line that `importlib.metadata` would refuse; '' where it accepts all."""
    for number, line in enumerate(table.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#") and "=" not in line and not (line.startswith("[") and line.endswith("]")):
            return f"line {number} of {_TABLE} is malformed: {line}"
    return ""


def _hidden(used: InstalledDistribution, hidden: InstalledDistribution) -> Iterator[str]:
    """Yield a warning where a distribution with plugins hides, or is hidden by, another installation of the same name."""
    if not (used.has_plugins or hidden.has_plugins) or _same_installation(used, hidden):
        return
    version, other = used.version or "one without a version", hidden.version or "one without a version"
    yield (
        f"two distributions are named `{used.name or used.stem}`: {version} at {used.place} is used,"
        f" {other} at {hidden.place} is not; fix: uninstall one"
    )


def _same_installation(one: InstalledDistribution, other: InstalledDistribution) -> bool:
    """Tell whether two metadata directories are of one installation: one directory by two paths, or an editable installation
    and the directory that the build left in its project."""
    if os.path.realpath(one.place) == os.path.realpath(other.place):
        return True
    for installed, source in ((one, other), (other, one)):
        root = installed.editable_source
        if root and os.path.realpath(source.place).startswith(os.path.realpath(root) + os.sep):
            return True
    return False


def _quoted(text: str) -> str:
    return f"`{printable(text[:100])}`"
