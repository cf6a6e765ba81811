"""What the installed distributions say: their entry points of our groups, and what is wrong with their metadata.

One distribution's faults are its own: each is read alone, and its entry points line by line.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import Distribution
from typing import Any
from urllib.parse import unquote, urlparse

from rlhf_core.errors import did_you_mean, printable

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
class Offer:
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

    offers: tuple[Offer, ...] = ()
    faults: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    """The files in which the offers stand."""


def scan() -> Scan:
    """Read what is installed. The first distribution of a name on `sys.path` hides later ones, as it does for imports."""
    offers: dict[tuple[str, str, str], Offer] = {}
    faults: list[str] = []
    tables: list[str] = []
    first: dict[str, _Found] = {}
    for distribution in every_distribution(faults):
        found = _Found(distribution)
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


class _Found:
    """One distribution, read guardedly."""

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution
        self.place = str(getattr(distribution, "_path", distribution))
        self.stem, self.stem_version = _of_directory(self.place)
        self.table = ""
        self.why_malformed = ""
        try:
            self.table = distribution.read_text(_TABLE) or ""
            if not self.table and os.path.lexists(os.path.join(self.place, _TABLE)):  # noqa: PTH118
                self.why_malformed = _why_unreadable(os.path.join(self.place, _TABLE))  # noqa: PTH118
        except Exception as error:
            self.why_malformed = f"{_TABLE}: {type(error).__name__}: {error}"
        if malformed := _malformed_line(self.table):
            self.why_malformed = malformed

    @property
    def is_ours(self) -> bool:
        return PREFIX in self.table

    @cached_property
    def stated(self) -> tuple[str, str]:
        """Name and version as its metadata state them, '' where they don't."""
        try:
            fields: Any = self.distribution.metadata
            return str(fields.get("Name") or "").strip(), str(fields.get("Version") or "").strip()
        except Exception:
            return "", ""

    @property
    def name(self) -> str:
        """The name by its metadata, else by its directory; '' where neither is a name."""
        return next((name for name in (self.stated[0], self.stem) if _DISTRIBUTION_NAME.fullmatch(name)), "")

    @property
    def version(self) -> str:
        return self.stated[1] or self.stem_version

    def entries(self) -> Iterator[tuple[int, str, str | None, str]]:
        """Yield (line, name, target, group) for each line of our groups; the target is None where the line has none."""
        group = ""
        for number, line in enumerate(self.table.lstrip("\ufeff").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith(("#", ";")):
                continue
            if line.startswith("["):
                group = line[1:-1].strip() if line.endswith("]") else ""
            elif group.startswith(PREFIX):
                name, equals, target = (part.strip() for part in line.partition("="))
                yield number, name, target if equals else None, group

    def offers(self) -> Iterator[Offer]:
        distribution, version = self.name, self.version
        owner = _owner_fault(distribution, self.stated[0])
        for number, name, target, group in self.entries():
            if group in KIND_OF_GROUP:
                fault = owner or method_name_fault(name)
                if target is None:
                    fault = f"line {number} of {self.place}/{_TABLE} isn't of the form `name = package.module:Class`"
                yield Offer(KIND_OF_GROUP[group], name, target or "", distribution, version, fault)

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with it and shows in no plugin."""
        if not _DISTRIBUTION_NAME.fullmatch(self.stated[0]) and self.name:
            yield f"the METADATA in {self.place} has no valid name; the directory's is used, `{self.name}`"
        for group in sorted({group for *_, group in self.entries()} - KIND_OF_GROUP.keys()):
            yield f"{self.place}: unknown entry-point group `{group}`; {did_you_mean(group, KIND_OF_GROUP)}"


def unreadable_distributions() -> list[tuple[str, str]]:
    """Return (place, reason) for each installed distribution whose metadata can't be read, whether it has plugins or not."""
    faults: list[str] = []
    found = [_Found(distribution) for distribution in every_distribution(faults)]
    unnamed = "it has no name"
    reasons = [(one.place, one.why_malformed or ("" if one.stated[0] else unnamed)) for one in found]
    return [(place, printable(reason)) for place, reason in reasons if reason]


def entry_points(distribution: Distribution, group: str) -> dict[str, str]:
    """Return a distribution's targets by name, of one of our groups; those of its lines that can be read."""
    entries = _Found(distribution).entries()
    return {name: target for _, name, target, one in entries if one == group and target is not None}


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


def direct_url(distribution: Distribution) -> dict[str, Any]:
    """Return where a distribution was installed from, as its installer noted; {} where nothing readable is noted."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except Exception:
        return {}
    return origin if isinstance(origin, dict) else {}


def editable_source(distribution: Distribution) -> str | None:
    """Return the directory that an editable installation stands for."""
    origin = direct_url(distribution)
    about, url = origin.get("dir_info"), str(origin.get("url", ""))
    editable = isinstance(about, dict) and about.get("editable") and url.startswith("file:")
    return unquote(urlparse(url).path) if editable else None


def every_distribution(faults: list[str]) -> Iterator[Distribution]:
    """Yield every distribution, place by place along `sys.path`, so that one place's fault hides no other's; it is noted."""
    for place in dict.fromkeys(place for place in sys.path if isinstance(place, str)):
        try:
            yield from list(importlib.metadata.distributions(path=[place]))
        except Exception as error:  # another package's finder
            try:
                context = importlib.metadata.DistributionFinder.Context(path=[place])
                yield from list(importlib.metadata.MetadataPathFinder.find_distributions(context))
            except Exception:
                faults.append(f"{place}: its distributions can't be read: {type(error).__name__}: {error}")


def _tolerate_malformed() -> None:
    """Let a table that can't be read stand for no entry points, in all of this process.

    torch and pydantic read the entry points of everything that is installed when they are imported, so that one malformed
    table breaks whatever imports them: every method here, for a package that has nothing to do with them.
    """
    stated: Any = vars(Distribution)["entry_points"]
    if isinstance(stated, _Tolerant):
        return

    def entry_points(self: Distribution) -> Any:
        try:
            return stated.fget(self)
        except Exception:
            return importlib.metadata.EntryPoints()

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


def _why_unreadable(path: str) -> str:
    """Return why a file that is there reads as nothing, or '' where it is empty."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return "" if not file.read(1) else f"{_TABLE} is no text"
    except OSError as error:
        return f"{_TABLE}: {error.strerror or error}"


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


def _hidden(used: _Found, hidden: _Found) -> Iterator[str]:
    """Yield a line where one distribution hides another of its name and the two are not the same installation."""
    if not (used.is_ours or hidden.is_ours) or _same_installation(used, hidden):
        return
    version, other = used.version or "one without a version", hidden.version or "one without a version"
    yield (
        f"two distributions are named `{used.name or used.stem}`: {version} at {used.place} is used,"
        f" {other} at {hidden.place} is not; fix: uninstall one"
    )


def _same_installation(one: _Found, other: _Found) -> bool:
    """Tell whether two entries are one installation: one place by two paths, or an editable one and its source's own record."""
    if os.path.realpath(one.place) == os.path.realpath(other.place):
        return True
    for installed, source in ((one, other), (other, one)):
        root = editable_source(installed.distribution)
        if root and os.path.realpath(source.place).startswith(os.path.realpath(root) + os.sep):
            return True
    return False


def _quoted(text: str) -> str:
    return f"`{printable(text[:100])}`"
