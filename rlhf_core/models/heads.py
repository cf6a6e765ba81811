"""Heads that map hidden states to scores, always in float32: scores are compared by small differences."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.model_files import HEAD_FORMAT, HEADS, head_description, kind_of, no_such_model
from rlhf_core.infra.safetensors_file import read_tensors, write_tensors

log = logging.getLogger(__name__)


class TwoLayerHead(nn.Module):
    """Scores from hidden states: W₂ silu(W₁ h + b₁) + b₂.

    Args:
        width: D, of the hidden states.
        outputs: scores a position.
        seed: of the initial weights, which depend on nothing else.
        zero: whether the last layer begins at 0, and so do all scores.
    """

    def __init__(self, width: int, outputs: int = 1, *, seed: int = 0, zero: bool = False) -> None:
        super().__init__()
        self.width = width
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, outputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(self.inner.weight, std=width**-0.5)
            nn.init.normal_(self.outer.weight, std=width**-0.5)
            nn.init.zeros_(self.inner.bias)
            nn.init.zeros_(self.outer.bias)
            if zero:
                nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (S, D) to (S, outputs) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(nn.functional.silu(self.inner(hidden.float())))


class LinearHead(nn.Module):
    """One layer, as in transformers' sequence classifiers, most of which have no bias."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.outer = nn.Linear(width, 1, bias=bias)

    @classmethod
    def like(cls, layer: nn.Linear) -> LinearHead:
        """Return a head with a layer's weights."""
        head = cls(layer.in_features, bias=layer.bias is not None)
        head.outer.load_state_dict(layer.state_dict())
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (S, D) to (S, 1) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(hidden.float())


SCALAR_HEADS: dict[str, Callable[[int], nn.Module]] = {
    "two_layer": TwoLayerHead,
    "linear": LinearHead,
    "linear_bias": functools.partial(LinearHead, bias=True),
}
"""Heads of one score by the name that is noted beside their weights; each is made for a width."""


def head_kind(head: nn.Module) -> str:
    """Return the name under which `SCALAR_HEADS` has a head."""
    if not isinstance(head, LinearHead):
        return "two_layer"
    return "linear" if head.outer.bias is None else "linear_bias"


def no_head(name: str) -> str:
    """Return what is wrong with a checkpoint that lacks its `NAME`."""
    return f"the checkpoint has no {_words(name)}, so its scores would be random"


def _words(name: str) -> str:
    return name.replace("_", " ")


def write_head(directory: Path, name: str, head: nn.Module, about: Mapping[str, Any]) -> None:
    """Write `NAME.json` with what the head is and `NAME.safetensors` with its weights."""
    (directory / f"{name}.json").write_text(
        json.dumps({"format": HEAD_FORMAT, **about}, indent=1) + "\n", encoding="utf-8"
    )
    write_tensors(directory / f"{name}.safetensors", head.state_dict())


def describe_head(directory: Path, name: str, *, width: int, keys: Mapping[str, type]) -> dict[str, Any]:
    """Return what `write_head` noted.

    Args:
        width: the backbone's.
        keys: what must be there, with its type.

    Raises:
        ModelError: the file is damaged, of another format, or the head belongs on a backbone of another width.
    """
    path = directory / f"{name}.json"
    about = head_description(directory, name)
    for key, kind in {"width": int, **keys}.items():
        if not isinstance(about.get(key), kind):
            raise ModelError(f"lacks `{key}`", place=str(path), fix="save the model again")
    if about["width"] != width:
        raise ModelError(
            f"the {_words(name)} doesn't fit the backbone",
            place=str(directory),
            got=f"a head of width {about['width']} for a backbone of {width}",
            fix="use the two that were saved together",
        )
    return about


def fill_head(directory: Path, name: str, head: nn.Module) -> None:
    """Put what `write_head` wrote into a head.

    Raises:
        ModelError: weights are missing or have other shapes.
    """
    path = directory / f"{name}.safetensors"
    if not path.is_file():
        raise ModelError(no_head(name), place=str(directory), got=f"no {path.name}", fix="copy the file")
    tensors, wanted = read_tensors(path), head.state_dict()
    if missing := sorted(wanted.keys() ^ tensors.keys()):
        raise ModelError(no_head(name), place=str(path), got=f"`{missing[0]}` is missing or too many")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            got = f"{tuple(tensor.shape)} for {tuple(wanted[key].shape)}"
            raise ModelError(f"`{key}` of the {_words(name)} has another shape", place=str(path), got=got)
    head.load_state_dict(tensors)


def head_directory(source: str | Path, name: str) -> Path | None:
    """Return where a model's `NAME.json` and `NAME.safetensors` stand, here or fetched from the hub; None without them.

    Raises:
        ModelError: only one of the two is there. Taken for a model without a head, it would be given a random one.
    """
    files = (f"{name}.json", f"{name}.safetensors")
    where = Path(source).expanduser()
    if where.exists():
        found = [where / file if (where / file).is_file() else None for file in files]
    else:
        found = from_hub(str(source), files)
    if (lost := [file for file, path in zip(files, found, strict=True) if path is None]) == []:
        return found[0].parent  # type: ignore[union-attr]
    if len(lost) == 1:
        there = files[1 - files.index(lost[0])]
        raise ModelError(
            no_head(name), place=str(source), got=f"{there}, and no {lost[0]}", fix="copy the whole checkpoint again"
        )
    return None


def warn_of_heads(source: str | Path) -> None:
    """Say that a model which is taken for a policy has a head beside its weights, which it loses."""
    where = Path(source).expanduser()
    for name in HEADS:
        if (where / f"{name}.safetensors").is_file():
            log.warning("%s is a %s: its backbone is taken, and its %s isn't", source, kind_of(name), _words(name))


def warn_of_other_heads(source: str | Path, own: str) -> None:
    """Say that heads of other kinds of models than `own` aren't used, where a model has them beside its weights."""
    where = Path(source).expanduser()
    for name in HEADS:
        if name != own and any((where / f"{name}.{kind}").is_file() for kind in ("json", "safetensors")):
            log.warning(
                "%s has a %s, which another method trained and which isn't used: its backbone is given a new head",
                source,
                _words(name),
            )


def from_hub(source: str, files: Sequence[str]) -> list[Path | None]:
    """Return where files of a hub repository stand in the cache, fetched where need be; None for those that it hasn't.

    Raises:
        ModelError: the hub can't be reached, and the cache has nothing of that name. Each further attempt would take its time.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found: list[Path | None] = []
    for file in files:
        try:
            found.append(Path(hf_hub_download(source, file)))
        except LocalEntryNotFoundError as error:
            if not isinstance(try_to_load_from_cache(source, "config.json"), str):
                raise no_such_model(source, error) from error
            found.append(None)
        except EntryNotFoundError:
            found.append(None)
        except (OSError, ValueError):  # no such name, or none that is let in: loading the model itself tells
            return [None] * len(files)
    return found
