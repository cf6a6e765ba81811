"""An input model of a merge: its tensors by name, wherever they are read from, and what belongs to them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlhf_core.infra.errors import ModelError
from rlhf_core.merging.tensor_names import has_token_rows, is_head, score_head_of
from rlhf_core.merging.tensor_reader import TensorReader, WeightFile

log = logging.getLogger(__name__)

_COMPARED = 1 << 16
"""Elements that are compared at once."""


@dataclass(eq=False)
class InputModel:
    """One input model: a model directory, an adapter on its base, or layers of several models; `open_model` makes them all."""

    name: str
    """As it was given: a directory, an adapter, a name on the hub."""
    path: Path | None
    """The directory of its files; None for layers of several models."""
    tensors: dict[str, TensorReader]
    """Its tensors, those of heads beside its weights too, as `reward_head.NAME`."""
    config: Mapping[str, Any]
    """What its config.json holds; empty where there is none."""
    files: Sequence[WeightFile]
    """All files that it is read from, those of a base too."""
    directories: Sequence[Path]
    """Where its tokenizer and other files are looked for, in this order."""
    heads: Mapping[str, Path] = field(default_factory=dict)
    """The heads beside its weights, and the directory of each."""
    base: InputModel | None = None
    """The model under an adapter."""
    absent: Callable[[str], bool] = lambda name: False
    """Whether it takes no part in merging a tensor that it lacks; else such a tensor is an error."""

    @property
    def root(self) -> InputModel:
        """The model under all adapters; itself where there are none."""
        return self.base.root if self.base is not None else self

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of `config`, where a model has several parts."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def fingerprint(self) -> bytes:
        """A hash of every tensor's name, shape and some of its values, whatever its shards and dtypes."""
        total = hashlib.blake2b(digest_size=16)
        for name in sorted(self.tensors, key=lambda name: (score_head_of(name) is not None, name)):
            tensor = self.tensors[name]
            total.update(f"{name}\0{tensor.shape}\0".encode())
            total.update(tensor.fingerprint())
        return total.digest()

    @cached_property
    def embeddings(self) -> str | None:
        """Name of the tensor with a row per token that goes in."""
        tables = (name for name in sorted(self.tensors) if has_token_rows(name, self.tensors[name]))
        return next((name for name in tables if not is_head(name)), None)

    @property
    def output_head(self) -> str | None:
        """Name of the output head, where it is a tensor."""
        return next((name for name in self.tensors if is_head(name)), None)

    @cached_property
    def tied(self) -> bool:
        """Whether its output head is its embeddings: by its configuration, unless it stores a head with other values.

        transformers decides the same way: what is stored counts.
        """
        if not self.configured_tied:
            return False
        stored = self.output_head
        if stored is None or self.embeddings is None or self._same_values(stored, self.embeddings):
            return True
        log.warning(
            "%s stores a head that differs from the embeddings that its configuration ties it to: it is kept", self.name
        )
        return False

    @cached_property
    def configured_tied(self) -> bool:
        """Whether its configuration, or where that says nothing its architecture, ties its output head to its embeddings."""
        given = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        if given is None and (kind := self.config.get("model_type")):
            from transformers import AutoConfig

            try:
                given = AutoConfig.for_model(kind).get_text_config().tie_word_embeddings
            except Exception:  # an architecture that transformers doesn't know has its head where it is stored
                log.debug("what %s ties isn't known", kind, exc_info=True)
        return bool(given)

    def untie(self, head: str) -> None:
        """Read the embeddings under the name of an output head too; the fingerprint stays that of the model as it is stored."""
        assert self.embeddings is not None and self.fingerprint
        self.tensors[head] = self.tensors[self.embeddings]

    def drop_score_heads(self) -> None:
        """Take no part in heads beside the weights; the fingerprint stays that of the model as it is stored."""
        assert self.fingerprint
        absent = self.absent
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if score_head_of(name) is None}
        self.absent = lambda name: score_head_of(name) is not None or absent(name)

    def untied_head(self) -> str:
        """Return the name that its output head has, or would have where it weren't tied.

        Raises:
            ModelError: its architecture isn't known.
        """
        if (stored := self.output_head) is not None:
            return stored
        import transformers

        named = self.config.get("architectures") or []
        for architecture in named:
            keys = getattr(getattr(transformers, str(architecture), None), "_tied_weights_keys", None) or ()
            if (name := next((key for key in keys if is_head(key)), None)) is not None:
                return str(name)
        raise ModelError(
            "the merge needs an untied output head, and its name in this architecture isn't known",
            place=self.name,
            got=f"architectures {named}",
            fix="save the model with its head as a tensor and `tie_word_embeddings: false` in config.json",
        )

    def find_file(self, name: str) -> Path | None:
        """Return the first of its `directories`' files of a name; None where there is none."""
        return next((place / name for place in self.directories if (place / name).is_file()), None)

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def _same_values(self, first: str, second: str) -> bool:
        a, b = self.tensors[first], self.tensors[second]
        if a.shape != b.shape:
            return False
        for start in range(0, a.count, _COMPARED):
            stop = min(start + _COMPARED, a.count)
            values = torch.empty(2, stop - start)
            for tensor, row in zip((a, b), values, strict=True):
                tensor.read(start, stop, row)
            if not torch.equal(values[0], values[1]):
                return False
        return True


def with_changes(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with changed values, in its language model's part too where a model has several parts."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return {**config, **changed}
    outer = {key: value for key, value in changed.items() if key in config or key == "tie_word_embeddings"}
    return {**config, "text_config": {**inner, **changed}, **outer}
