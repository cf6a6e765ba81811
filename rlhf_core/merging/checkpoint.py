"""Checkpoints as a merge reads them: safetensors files, sharded or single, local or from the hub; adapters on their base.

Only headers are read when a checkpoint is opened. Values are read where they are wanted, straight into a small buffer a thread:
nothing is mapped or kept, so a merge's memory doesn't grow with its inputs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf_core.infra.errors import ModelError, first_line
from rlhf_core.infra.files import read_json, storage_error, storage_errors
from rlhf_core.infra.model_files import HEADS, adapter_chain, check_files, is_adapter, locate, near_path
from rlhf_core.infra.safetensors_file import TensorEntry, read_header
from rlhf_core.merging.streams import CHUNK, Source, digest_of
from rlhf_core.merging.weights import GROUPS, LM_HEAD, is_head

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_TABLES = {*GROUPS["embeddings"], *LM_HEAD, "shared", "output_layer"} - {"wpe"}


class Checkpoint:
    """The tensors of one model, by name."""

    def __init__(self, name: str, path: Path, files: Mapping[str, WeightFile]) -> None:
        self.name, self.path = name, path
        self._files = files
        self._aliases: dict[str, str] = {}
        self.tensors: dict[str, TensorEntry] = {
            name: entry for file in dict.fromkeys(files.values()) for name, entry in file.entries.items()
        }
        try:
            self.heads = _head_files(path, name)
        except ModelError:
            for file in dict.fromkeys(files.values()):
                file.close()
            raise

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a directory, an adapter's directory, or a model on the hub; reads headers only.

        `BASE+ADAPTER` is an adapter on a base of one's own choice, whatever the adapter's configuration names.

        Raises:
            ModelError: there is no such model, a shard is missing or damaged, or the weights are pickles or GGUF.
        """
        name = str(source)
        base, plus, adapter = name.rpartition("+")
        if plus and base and not Path(name).expanduser().exists():
            from rlhf_core.merging.adapter import AdapterCheckpoint

            where, _ = locate(adapter)
            path = Path(where) if Path(where).is_dir() else _download(where)
            return AdapterCheckpoint(name, path, cls.open(base))
        where, options = locate(name)
        if "gguf_file" in options:
            raise ModelError(
                "GGUF weights are not merged: they are quantised",
                place=name,
                fix="load it with transformers and save it with `save_pretrained`",
            )
        path = Path(where) if Path(where).is_dir() else _download(where)
        if is_adapter(str(path)):
            from rlhf_core.merging.adapter import AdapterCheckpoint

            base, adapters = adapter_chain(str(path), local=_local)
            under = cls._base_of(name, base)
            for inner in adapters[:-1]:
                under = AdapterCheckpoint(inner, Path(inner), under)
            return AdapterCheckpoint(name, path, under)
        return cls(name, path, _weight_files(path, name))

    @classmethod
    def _base_of(cls, adapter: str, base: str) -> Checkpoint:
        """Open the base that an adapter names, which may have been moved since."""
        try:
            return cls.open(base)
        except ModelError as error:
            if Path(base).expanduser().exists():
                raise
            raise ModelError(
                "the base that this adapter names isn't there",
                place=adapter,
                got=f"{base}: {error.got or error.problem}",
                fix=f"name it where it lies now, `BASE+{adapter}`",
            ) from error

    def source(self, name: str) -> Source:
        """Return one tensor, to be read."""
        return self._source(self._aliases.get(name, name))

    def _source(self, name: str) -> Source:
        return FileSource(self._files[name], self.tensors[name], name, self)

    @cached_property
    def table(self) -> str | None:
        """Name of the tensor with a row for each token that goes in."""
        return next((name for name in sorted(self.tensors) if not is_head(name) and is_vocabulary(name, self)), None)

    @cached_property
    def tied(self) -> bool:
        """Whether its output head is its embeddings: by its configuration, unless it stores a head with other values.

        So does transformers: what is stored counts.
        """
        if not self.said_tied:
            return False
        stored = next((name for name in self.tensors if is_head(name)), None)
        if stored is None or self.table is None or self._same_values(stored, self.table):
            return True
        log.warning(
            "%s stores a head that differs from the embeddings that its configuration ties it to: it is kept", self.name
        )
        return False

    @cached_property
    def said_tied(self) -> bool:
        """Whether its configuration says that its head is its embeddings, or where that says nothing, its architecture."""
        said = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        if said is None and (kind := self.config.get("model_type")):
            from transformers import AutoConfig

            try:
                said = AutoConfig.for_model(kind).get_text_config().tie_word_embeddings
            except Exception:  # an architecture that transformers doesn't know has its head where it is stored
                log.debug("what %s ties isn't known", kind, exc_info=True)
        return bool(said)

    def _same_values(self, first: str, second: str) -> bool:
        if self.tensors[first].shape != self.tensors[second].shape:
            return False
        a, b, count = self.source(first), self.source(second), self.tensors[first].count
        for start in range(0, count, CHUNK):
            parts = torch.empty(2, min(CHUNK, count - start))
            for source, part in zip((a, b), parts, strict=True):
                source.read(start, start + parts.shape[1], part)
            if not torch.equal(parts[0], parts[1]):
                return False
        return True

    def head_name(self) -> str:
        """Return what its output head is called where it has one of its own."""
        if (stored := next((name for name in self.tensors if is_head(name)), None)) is not None:
            return stored
        import transformers

        named = self.config.get("architectures") or []
        for architecture in named:
            keys = getattr(getattr(transformers, str(architecture), None), "_tied_weights_keys", None) or ()
            if (name := next((key for key in keys if is_head(key)), None)) is not None:
                return str(name)
        raise ModelError(
            "its output head is its embeddings, and what it is called with values of its own isn't known",
            place=self.name,
            got=f"architectures {named}",
            fix="set `tie_word_embeddings: false` in its config.json, and store the head",
        )

    def absent(self, name: str) -> bool:
        """Tell whether it takes no part in merging a tensor, by its plan; else a tensor that it lacks is a fault."""
        return False

    def untie(self, head: str) -> None:
        """Give a head that is the embeddings a name of its own, under which it is read as they are."""
        assert self.table is not None
        self._aliases[head] = self.table
        self.tensors[head] = self.tensors[self.table]

    @property
    def head_tensors(self) -> dict[str, TensorEntry]:
        """The tensors of its heads, by the head's name and their own."""
        return {f"{head}.{key}": entry for head, file in self.heads.items() for key, entry in file.entries.items()}

    def head_source(self, name: str) -> Source:
        """Return one tensor of a head, to be read."""
        head, _, key = name.partition(".")
        return FileSource(self.heads[head], self.heads[head].entries[key], name, self)

    @property
    def all_tensors(self) -> dict[str, TensorEntry]:
        """The model's own tensors and those of its heads."""
        return {**self.tensors, **self.head_tensors}

    def any_source(self, name: str) -> Source:
        """Return one of `all_tensors`, to be read."""
        return self.source(name) if name in self.tensors else self.head_source(name)

    def close(self) -> None:
        """Close the files."""
        for file in (*dict.fromkeys(self._files.values()), *self.heads.values()):
            file.close()

    @property
    def places(self) -> list[Path]:
        """Directories in which its tokenizer and settings are looked for, the first that counts first."""
        return [self.path]

    @property
    def root(self) -> Checkpoint:
        """The model under it, where it is an adapter; else itself."""
        return self

    @property
    def files(self) -> list[Path]:
        """The weight files that it is read from."""
        return [file.path for file in (*dict.fromkeys(self._files.values()), *self.heads.values())]

    @cached_property
    def config(self) -> dict[str, Any]:
        """What `config.json` holds; empty where there is none."""
        path = self.path / "config.json"
        if not path.is_file():
            return {}
        with storage_errors(path):
            try:
                found = read_json(path)
            except ValueError as error:
                raise ModelError("config.json can't be read", place=self.name, got=error) from None
        return found if isinstance(found, dict) else {}

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of `config`, where a model has several parts."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def digest(self) -> bytes:
        """A hash of every tensor's name, shape and some of its values: the same however the files are cut or stored."""
        total = hashlib.blake2b(digest_size=16)
        own = set(self.tensors) - set(self._aliases)
        for name in [*sorted(own), *sorted(self.head_tensors)]:
            source = self.any_source(name)
            total.update(f"{name}\0{source.shape}\0".encode())
            total.update(digest_of(source))
        return total.digest()


class WeightFile:
    """A safetensors file, open for reading from several threads."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        with storage_errors(path):
            try:
                self.entries = read_header(path)
            except ValueError as error:
                raise ModelError("a weight file is damaged", place=name, got=error, fix="copy the file again") from None
            for tensor in self.entries:
                if not tensor or tensor.startswith(".") or any(sign in tensor for sign in "/\\\0"):
                    raise ModelError(
                        f"{path.name} names a tensor like a path",
                        place=name,
                        got=repr(tensor),
                        fix="don't use the file, unless you trust it: then rename the tensor and save it again",
                    )
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on."""
        try:
            while (got := os.preadv(self._descriptor, [buffer], offset)) < len(buffer):
                if got == 0:
                    raise OSError(None, "the file ended early: it was changed while it was read")
                buffer, offset = buffer[got:], offset + got
        except OSError as error:
            raise storage_error(error, self.path) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FileSource(Source):
    """A tensor in a safetensors file."""

    def __init__(self, file: WeightFile, entry: TensorEntry, name: str, owner: Checkpoint) -> None:
        self.file, self.entry, self.name, self.owner = file, entry, name, owner
        self.place, self.shape, self.dtype = owner.name, entry.shape, entry.dtype

    def read(self, start: int, stop: int, out: Tensor) -> None:
        if self.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous():
            view = out.view(torch.uint8).numpy().data  # as it is stored: no copy between
            self.file.read_into(view, self.entry.start + start * 4)
        else:
            out.copy_(self.raw(start, stop))

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        size, length = self.dtype.itemsize, out.shape[1] * self.dtype.itemsize
        buffer = _buffer(len(starts) * length)
        view = buffer.data
        for number, start in enumerate(starts):
            self.file.read_into(view[number * length : (number + 1) * length], self.entry.start + start * size)
        out.copy_(torch.from_numpy(buffer).view(self.dtype).view(out.shape))

    def raw(self, start: int, stop: int) -> Tensor:
        """Return elements as they are stored, in a buffer of this thread that the next call overwrites."""
        size = self.dtype.itemsize
        buffer = _buffer((stop - start) * size)
        self.file.read_into(buffer.data, self.entry.start + start * size)
        return torch.from_numpy(buffer).view(self.dtype)

    def key(self) -> bytes:
        return self.owner.digest


class Renamed(Source):
    """A tensor of another checkpoint as one of its owner's."""

    def __init__(self, base: Source, owner: Checkpoint) -> None:
        self.base, self.owner = base, owner
        self.place, self.shape, self.dtype = owner.name, base.shape, base.dtype

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.base.read(start, stop, out)

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        self.base.read_runs(starts, out)

    def key(self) -> bytes:
        return self.owner.digest


_own = threading.local()


def _buffer(nbytes: int) -> numpy.ndarray:
    """Return bytes of this thread's own, reused from call to call."""
    room = getattr(_own, "room", None)
    if room is None or len(room) < nbytes:
        room = _own.room = numpy.empty(max(nbytes, 1 << 18), dtype=numpy.uint8)
    return room[:nbytes]


def is_vocabulary(name: str, one: Checkpoint) -> bool:
    """Tell whether a tensor has a row for each token."""
    pieces, entry = name.split("."), one.tensors[name]
    fits = len(entry.shape) == 2 and entry.dtype.is_floating_point
    return fits and pieces[-1] == "weight" and pieces[-2:-1] != [] and pieces[-2] in _TABLES


def _weight_files(path: Path, name: str) -> dict[str, WeightFile]:
    check_files(str(path))
    index = path / INDEX
    if (
        path / SINGLE
    ).is_file() or not index.is_file():  # the single file counts where both are there, as in transformers
        others = sorted(file for file in path.glob("*.safetensors") if file.stem not in HEADS)
        single = [path / SINGLE] if (path / SINGLE).is_file() else others
        if len(single) != 1:
            found = ", ".join(file.name for file in single) or "none"
            raise ModelError(
                f"has no {SINGLE} and no {INDEX}",
                place=name,
                got=f"safetensors files: {found}",
                fix=f"copy {INDEX} too, which says what lies in which shard" if single else "copy the weights too",
            )
        file = WeightFile(single[0], name)
        return dict.fromkeys(file.entries, file)
    try:
        mapped: dict[str, str] = read_json(index)["weight_map"]
        shards = {shard: WeightFile(path / shard, name) for shard in sorted(set(mapped.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{INDEX} can't be read", place=name, got=first_line(error)) from None
    for tensor, shard in mapped.items():
        if tensor not in shards[shard].entries:
            raise ModelError(f"shard {shard} lacks tensor `{tensor}`", place=name, fix="copy the file again")
    for shard, file in shards.items():
        for tensor in file.entries:
            if mapped.get(tensor) != shard:
                raise ModelError(
                    f"tensor `{tensor}` lies in {shard}, where the index doesn't have it",
                    place=name,
                    fix=f"mend {INDEX}",
                )
    return {tensor: shards[shard] for tensor, shard in mapped.items()}


def _head_files(path: Path, name: str) -> dict[str, WeightFile]:
    """Open the weights of the heads that stand beside a model's own."""
    found = {}
    for head in HEADS:
        there = [kind for kind in ("json", "safetensors") if (path / f"{head}.{kind}").is_file()]
        if len(there) == 1:
            lacking = "safetensors" if there == ["json"] else "json"
            raise ModelError(
                f"the {head.replace('_', ' ')} is not whole",
                place=name,
                got=f"no {head}.{lacking}",
                fix="copy the file",
            )
        if there:
            found[head] = WeightFile(path / f"{head}.safetensors", name)
    return found


def _local(where: str) -> str:
    """Return the directory of a model that may be one of the hub's; as it is where there is none."""
    try:
        found, _ = locate(where)
        return found if Path(found).is_dir() else str(_download(found))
    except ModelError:
        return where


def _download(name: str) -> Path:
    """Fetch a model's weights, configuration and tokenizer from the hub, or take them from its cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:
        raise ModelError(
            "is neither a local directory nor a model that the hub gave",
            place=name,
            got=first_line(error),
            fix=near_path(Path(name)) or "check the path, or for a hub name the spelling and the network",
        ) from error


def read_adapter_config(path: Path, name: str) -> dict[str, Any]:
    """Return what adapter_config.json holds."""
    try:
        found = json.loads((path / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError("adapter_config.json can't be read", place=name, got=first_line(error)) from None
    return dict(found)
