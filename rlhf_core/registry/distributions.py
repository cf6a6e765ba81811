"""What the installed distributions say: their entry points of our groups, and what is wrong with their metadata.

One distribution's faults are its own: each is read alone, and its entry points line by line.
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
}
KIND_OF_GROUP = {group: kind for kind, group in GROUPS.items()}

LOCAL = "local"
"""The distribution of what `registry.register` adds in this process."""
RESERVED = {LOCAL, *GROUPS, *(f"{kind}s" for kind in GROUPS)}
"""Words that stand before a colon in the name of a method, so that no distribution can be addressed by them."""

_DISTRIBUTION_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)
_METHOD_NAME = re.compile(r"\w[\w.-]{0,99}")
_TABLE = "entry_points.txt"


@dataclass(frozen=True)
class EntryPoint:
    """A line of a distribution's entry points, before the source that it names is read. `fault` says what is wrong with it."""

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
    """What all distributions offer, and one line for each fault that is a distribution's and no plugin's."""

    offers: tuple[EntryPoint, ...] = ()
    faults: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    """The files in which the offers stand."""


def scan() -> Scan:
    """Read what is installed. The first distribution of a name on `sys.path` hides later ones, as it does for imports."""
    offers: dict[tuple[str, str, str], EntryPoint] = {}
    faults: list[str] = []
    tables: list[str] = []
    first: dict[str, InstalledDistribution] = {}
    for found in every_distribution(faults):
        key = canonical(found.stem or found.name) or found.place
        if key.startswith("~"):  # pip renames what it is about to remove
            if found.is_ours:
                faults.append(f"{found.place} is left over from an interrupted installation; fix: remove it")
            continue
        if found.why_malformed:
            faults.append(f"the metadata at {found.place} can't be read: {found.why_malformed}")
            _tolerate_malformed()
        earlier = first.setdefault(key, found)
        if earlier is not found:
            faults += _hidden(earlier, found)
        elif found.is_ours:
            tables.append(os.path.join(found.place, _TABLE))  # noqa: PTH118
            faults += found.faults()
            for offer in found.offers():
                offers.setdefault((offer.kind, offer.qualified, offer.target), offer)
    return Scan(tuple(offers.values()), tuple(map(printable, faults)), tuple(tables))


class InstalledDistribution:
    """One distribution, read guardedly.

    Args:
        place: the directory of its metadata.
        read_text: returns the text of one of the files there, None where there is no such file; may raise anything.
    """

    def __init__(self, place: str, read_text: Callable[[str], str | None]) -> None:
        self.place, self._read_text = place, read_text
        self.stem, self._stem_version = _of_directory(place)
        try:
            self.table = read_text(_TABLE) or ""
            self.why_malformed = _malformed_line(self.table)
        except Exception as error:
            self.table, self.why_malformed = "", f"{_TABLE}: {describe_error(error)}"

    @property
    def is_ours(self) -> bool:
        return PREFIX in self.table

    @cached_property
    def stated(self) -> tuple[str, str]:
        """Name and version as its metadata state them, '' where they don't."""
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
        """The name by its metadata, which agrees with its directory's, else by its directory; '' where neither is a name."""
        stated = self.stated[0]
        agreed = not self.stem or canonical(stated) == canonical(self.stem)
        return next((name for name in (stated if agreed else "", self.stem) if _DISTRIBUTION_NAME.fullmatch(name)), "")

    @property
    def version(self) -> str:
        return self.stated[1] or self._stem_version

    @property
    def editable_source(self) -> str | None:
        """The directory that an editable installation stands for."""
        import json
        from urllib.parse import unquote, urlparse

        try:
            origin = json.loads(self.read("direct_url.json") or "{}")
            about, url = origin["dir_info"], origin["url"]
            return unquote(urlparse(url).path) if about["editable"] and url.startswith("file:") else None
        except Exception:  # nothing readable is noted
            return None

    def entry_points(self, group: str) -> dict[str, str]:
        """Return the targets by name of one of our groups, from those of its lines that can be read."""
        return {name: target for _, name, target, one in self.entries() if one == group and target is not None}

    def read(self, file: str) -> str | None:
        try:
            return self._read_text(file)
        except Exception:
            return None

    def entries(self) -> Iterator[tuple[int, str, str | None, str]]:
        """Yield (line, name, target, group) for each line of our groups; the target is None where the line has none."""
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

    def offers(self) -> Iterator[EntryPoint]:
        distribution, version = self.name, self.version
        owner = _owner_fault(distribution, self.stated[0])
        for number, name, target, group in self.entries():
            if group in KIND_OF_GROUP:
                fault = owner or method_name_fault(name)
                if target is None:
                    fault = f"line {number} of {self.place}/{_TABLE} isn't of the form `name = package.module:Class`"
                yield EntryPoint(KIND_OF_GROUP[group], name, target or "", distribution, version, fault)

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with it and shows in no plugin."""
        if self.name and self.name != self.stated[0]:
            yield f"the METADATA in {self.place} has no valid name, or another; the directory's is used, `{self.name}`"
        for group in sorted({group for *_, group in self.entries()} - KIND_OF_GROUP.keys()):
            yield f"{self.place}: unknown entry-point group `{group}`; {did_you_mean(group, KIND_OF_GROUP)}"


def unreadable_distributions() -> list[tuple[str, str]]:
    """Return (place, reason) for each installed distribution whose metadata can't be read, whether it has plugins or not."""
    found = list(every_distribution([]))
    reasons = [(one.place, one.why_malformed or ("" if one.stated[0] else "it has no name")) for one in found]
    return [(place, printable(reason)) for place, reason in reasons if reason]


def method_name_fault(name: str) -> str:
    """Return why a method can't bear a name, or ''."""
    if not name:
        return "its entry point has no name"
    if not _METHOD_NAME.fullmatch(name):
        return f"its name {_quoted(name)} can't be addressed: names have letters, digits, `-`, `_` and `.`, up to 100"
    if name.casefold().endswith((".yaml", ".yml")):
        return f"its name {_quoted(name)} can't be addressed: it reads as a file's"
    return ""


def canonical(distribution: str) -> str:
    """Return a distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).casefold()


def every_distribution(faults: list[str]) -> Iterator[InstalledDistribution]:
    """Yield every distribution, place by place along `sys.path`, so that one place's fault hides no other's; it is noted.

    Directories are read without `importlib.metadata`, whose import takes half as long as all of `rlhf list`; it reads archives
    and what other finders know.
    """
    seen: set[str] = set()
    for place in dict.fromkeys(place for place in sys.path if isinstance(place, str)):
        for found in _in_directory(place) if os.path.isdir(place or ".") else _in_archive(place):  # noqa: PTH112
            seen.add(found.place)
            yield found
    for finder in [one for one in sys.meta_path if one is not PathFinder and hasattr(one, "find_distributions")]:
        try:
            known = [found for found in map(_installed, _ask(finder)) if found.place not in seen]
        except Exception as error:
            faults.append(
                f"the distributions that {type(finder).__name__} knows can't be read: {describe_error(error)}"
            )
            continue
        yield from known


def _in_directory(place: str) -> Iterator[InstalledDistribution]:
    try:
        children = sorted(os.listdir(place or "."))  # noqa: PTH208
    except OSError:
        return
    for child in children:
        low = child.lower()
        if low.endswith((".dist-info", ".egg-info")) or (low == "egg-info" and place.lower().endswith(".egg")):
            directory = os.path.join(place, child)  # noqa: PTH118
            yield InstalledDistribution(directory, partial(_read_file, directory))


def _in_archive(place: str) -> list[InstalledDistribution]:
    if not os.path.isfile(place):  # noqa: PTH113
        return []
    import importlib.metadata

    context = importlib.metadata.DistributionFinder.Context(path=[place])
    return [_installed(one) for one in importlib.metadata.MetadataPathFinder.find_distributions(context)]


def _ask(finder: Any) -> list[Any]:
    import importlib.metadata

    return list(finder.find_distributions(importlib.metadata.DistributionFinder.Context()))


def _installed(distribution: Any) -> InstalledDistribution:
    return InstalledDistribution(str(getattr(distribution, "_path", distribution)), distribution.read_text)


def _read_file(place: str, file: str) -> str | None:
    """Read a file of a metadata directory; '' is the place itself, where it is a file as distutils wrote it."""
    try:
        with open(os.path.join(place, file) if file else place, encoding="utf-8") as stream:  # noqa: PTH118, PTH123
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _tolerate_malformed() -> None:
    """Let a table that can't be read stand for no entry points, in all of this process.

    torch and pydantic read the entry points of everything that is installed when they are imported, so that one malformed
    table breaks whatever imports them: every method here, for a package that has nothing to do with them.
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
    """The property that stands for `Distribution.entry_points`."""


def _of_directory(place: str) -> tuple[str, str]:
    """Return name and version as the metadata's directory states them: `acme_rlhf-1.0.dist-info`."""
    stem, suffix = os.path.splitext(os.path.basename(place.rstrip("/\\")))  # noqa: PTH119, PTH122
    if suffix.lower() not in (".dist-info", ".egg-info"):
        return "", ""
    name, _, version = stem.partition("-")
    return name.replace("_", "-"), version if suffix.lower() == ".dist-info" else ""


def _owner_fault(name: str, stated: str) -> str:
    if not name:
        return f"its distribution has no valid name: {_quoted(stated)}"
    if canonical(name) in RESERVED:
        return f"its distribution is named `{name}`, a word that the registry uses itself"
    return ""


def _malformed_line(table: str) -> str:
    """Return what is wrong with the first line that is no entry point, as importlib.metadata reads them; '' where all are."""
    for number, line in enumerate(table.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#") and "=" not in line and not (line.startswith("[") and line.endswith("]")):
            return f"line {number} of {_TABLE} is malformed: {line}"
    return ""


def _hidden(used: InstalledDistribution, hidden: InstalledDistribution) -> Iterator[str]:
    """Yield a line where one distribution hides another of its name and the two are not the same installation."""
    if not (used.is_ours or hidden.is_ours) or _same_installation(used, hidden):
        return
    version, other = used.version or "one without a version", hidden.version or "one without a version"
    yield (
        f"two distributions are named `{used.name or used.stem}`: {version} at {used.place} is used,"
        f" {other} at {hidden.place} is not; fix: uninstall one"
    )


def _same_installation(one: InstalledDistribution, other: InstalledDistribution) -> bool:
    """Tell whether two entries are one installation: one place by two paths, or an editable one and its source's own record."""
    if os.path.realpath(one.place) == os.path.realpath(other.place):
        return True
    for installed, source in ((one, other), (other, one)):
        root = installed.editable_source
        if root and os.path.realpath(source.place).startswith(os.path.realpath(root) + os.sep):
            return True
    return False


def _quoted(text: str) -> str:
    return f"`{printable(text[:100])}`"
