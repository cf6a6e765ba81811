"""Addresses of datasets and their files on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION][:CONFIG][/FILE]`."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.infra.errors import DataError, first_line, nearest
from rlhf_core.infra.hub_access import ask_hub, offline

_BEGINS = "hf://"
_ADDRESS = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:]+))?(?::(?P<config>[\w.-]+))?(?:/(?P<file>.+))?"
)
_FORM = "`hf://datasets/OWNER/NAME`, or `hf://datasets/OWNER/NAME/FILE`"


class HubAddress(NamedTuple):
    """What an address names."""

    name: str
    """Owner and name."""
    revision: str | None
    config: str | None
    file: str | None
    """Path or pattern of files within it; None for the dataset as a whole."""


def is_hub_url(path: str | Path) -> bool:
    """Return whether a path is an address on the hub."""
    return isinstance(path, str) and path.startswith(_BEGINS)


def parse_hub_url(url: str) -> HubAddress:
    """Return what an address names.

    Raises:
        DataError: it isn't the address of a dataset.
    """
    found = _ADDRESS.fullmatch(url.rstrip("/"))
    if found is None or (found["config"] and found["file"]):
        raise DataError("not an address of a dataset on the hub", place=url, fix=f"write it as {_FORM}")
    return HubAddress(found["name"], found["revision"], found["config"], found["file"])


def repository_of(url: str | Path) -> HubAddress | None:
    """Return the dataset that an address names as a whole; None where it names files."""
    address = parse_hub_url(str(url))
    return address if address.file is None else None


def downloaded(url: str) -> list[Path]:
    """Return the local copies of the files that an address names, in the order of their names. The hub's cache keeps them.

    Raises:
        DataError: there is no such file, or the hub can't be reached and the cache doesn't have it.
    """
    import huggingface_hub

    address = parse_hub_url(url)
    assert address.file is not None
    where: dict[str, Any] = {"repo_type": "dataset", "revision": address.revision}
    unreachable = None
    try:
        unreachable = ask_hub(address.name, "dataset")
        names = [address.file]
        if {*address.file} & {*"*?["}:
            held = huggingface_hub.list_repo_files(address.name, **where)
            names = sorted(name for name in held if fnmatch.fnmatchcase(name, address.file))
            if not names:
                near = nearest(address.file, held)
                fix = f"it has {near}" if near else f"it has {', '.join(sorted(held)[:5])}"
                raise DataError("matches no file of the dataset", place=url, fix=fix)
        with offline(unreachable is not None):
            return [Path(huggingface_hub.hf_hub_download(address.name, name, **where)) for name in names]
    except DataError:
        raise
    except Exception as error:  # The library and the network raise errors of many kinds.
        raise DataError(
            "cannot be downloaded from the hub",
            place=url,
            got=unreachable or first_line(error),
            fix="check the name, the network, and for a gated set the token",
        ) from None
