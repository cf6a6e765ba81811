"""The two files of a head beside a model's weights: `NAME.json` says what it is, `NAME.safetensors` holds its tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.model_files import (
    COMPRESSOR_HEAD,
    HEAD_FORMAT,
    HEADS,
    head_description,
    head_pair,
    head_words,
    kind_of,
)
from rlhf_core.infra.safetensors_file import read_tensors, write_tensors
from rlhf_core.models.heads import SCALAR_HEADS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadFiles:
    """The files of one head in a model's directory."""

    directory: Path
    name: str
    """Such as `reward_head`."""

    @property
    def description_file(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def tensor_file(self) -> Path:
        return self.directory / f"{self.name}.safetensors"

    @classmethod
    def find(cls, source: str | Path, name: str) -> Self | None:
        """Return a model's head files, fetched from the hub where the model is there; None for a model without that head.

        Raises:
            ModelError: only one of the two files is there.
        """
        files = head_pair(source, name, str(source))
        return None if files is None else cls(files[0].parent, name)

    def write(self, head: nn.Module, description: Mapping[str, Any]) -> None:
        """Write both files: the description with the format's version, and the head's tensors."""
        text = json.dumps({"format": HEAD_FORMAT, **description}, indent=1) + "\n"
        self.description_file.write_text(text, encoding="utf-8")
        write_tensors(self.tensor_file, head.state_dict())

    def describe(self, *, width: int, keys: Mapping[str, type]) -> dict[str, Any]:
        """Return the description.

        Args:
            width: width of the backbone's hidden states, which must be the head's.
            keys: further keys that must be there, with their types.

        Raises:
            ModelError: the file is damaged, of another format, or the head was trained on a backbone of another width.
        """
        about = head_description(self.directory, self.name)
        for key, kind in {"width": int, **keys}.items():
            if not isinstance(about.get(key), kind):
                raise ModelError(
                    f"the head's file lacks `{key}`", place=str(self.description_file), fix="save the model again"
                )
        if about["width"] != width:
            raise ModelError(
                f"the {head_words(self.name)} doesn't fit the backbone",
                place=str(self.directory),
                got=f"a head of width {about['width']} for a backbone of {width}",
                fix="use the two that were saved together",
            )
        return about

    def new_scalar_head(self, description: Mapping[str, Any]) -> nn.Module:
        """Return an untrained head of one score of the described kind and width.

        Raises:
            ModelError: there is no such kind.
        """
        if description["head"] not in SCALAR_HEADS:
            raise self.unsupported(f"head {description['head']}", f"known heads are {', '.join(SCALAR_HEADS)}")
        return SCALAR_HEADS[description["head"]](description["width"])

    def unsupported(self, got: str, fix: str) -> ModelError:
        """Return the error of a description with a value that this version can't read."""
        return ModelError("the head's description isn't supported", place=str(self.description_file), got=got, fix=fix)

    def load_into(self, head: nn.Module) -> None:
        """Load the tensors into a head in place.

        Raises:
            ModelError: tensors are missing, unknown or of other shapes than the head's.
        """
        path = self.tensor_file
        tensors, wanted = read_tensors(path), head.state_dict()
        if odd := sorted(wanted.keys() ^ tensors.keys()):
            got = f"tensor `{odd[0]}` is " + ("missing" if odd[0] in wanted else "unknown")
            raise ModelError(_no_head(self.name), place=str(path), got=got)
        for key, tensor in tensors.items():
            if tensor.shape != wanted[key].shape:
                got = f"{tuple(tensor.shape)} for {tuple(wanted[key].shape)}"
                raise ModelError(f"`{key}` of the {head_words(self.name)} has another shape", place=str(path), got=got)
        head.load_state_dict(tensors)


def missing_head(name: str, source: str | Path, fix: str) -> ModelError:
    """Return the error of a checkpoint without the head that it needs."""
    return ModelError(_no_head(name), place=str(source), got=f"no {name}.json", fix=fix)


def warn_of_heads(source: str | Path, *, own: str | None = None) -> None:
    """Warn that heads beside a checkpoint's weights aren't used by the model that is made of it.

    Args:
        own: name of the new head that the model gets; None for a policy, which has no head.
    """
    where = Path(source).expanduser()
    for name in HEADS:
        tensors, description = (where / f"{name}.{suffix}" for suffix in ("safetensors", "json"))
        if own is None and tensors.is_file():
            log.warning("%s is a %s: its backbone is used, and its %s isn't", source, kind_of(name), head_words(name))
        elif own not in (None, name) and (tensors.is_file() or description.is_file()):
            log.warning(
                "%s has a %s, which another method trained and which isn't used: its backbone gets a new head",
                source,
                head_words(name),
            )


def _no_head(name: str) -> str:
    lost = "it compresses nothing" if name == COMPRESSOR_HEAD else "its scores would be random"
    return f"the checkpoint has no {head_words(name)}, so {lost}"
