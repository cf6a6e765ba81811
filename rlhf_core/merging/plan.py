"""The plan of a merge: which tensors it reads, which it merges or copies, and where it writes them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import SINGLE
from rlhf_core.infra.safetensors_file import encode_header
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.score_heads import common_heads
from rlhf_core.merging.selection import SMALL
from rlhf_core.merging.tensor_names import depth_of, is_head, natural, score_head_of
from rlhf_core.merging.tensor_reader import TensorReader
from rlhf_core.merging.vocabulary import Vocabularies

log = logging.getLogger(__name__)

MERGED = {torch.float32, torch.bfloat16, torch.float16}
"""Types that are merged; whole numbers and flags are copied where all inputs agree on them."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result: the tensors that it is merged from, and its place in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    merged: bool
    """Whether it is merged; else it is the same in all inputs and copied."""
    base: TensorReader | None
    """The base's, where there is a base."""
    models: Sequence[TensorReader | None]
    """Each model's; None for a model that takes no part in it."""
    file: str = ""
    """The weight file that it is written to, and `start`, the offset of its first byte there."""
    start: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def readers(self) -> list[TensorReader]:
        """The tensors of all inputs that take part, the base's first."""
        return [one for one in (self.base, *self.models) if one is not None]


@dataclass(frozen=True)
class OutputFile:
    """A weight file of the result."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Plan:
    """The inputs, checked against each other, and the layout of the output."""

    base: InputModel | None
    models: Sequence[InputModel]
    tensors: Sequence[PlannedTensor]
    files: Sequence[OutputFile]
    left_out: Sequence[str]
    """Tensors that aren't written because they are tied to another."""
    vocabularies: Vocabularies
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The heads beside the result's weights, and what their descriptions say."""

    @classmethod
    def make(
        cls,
        base: InputModel | None,
        models: Sequence[InputModel],
        *,
        base_merged: bool = True,
        dtype: torch.dtype | None = None,
        shard_size: int = 5_000_000_000,
        tokenizer: str | None = None,
        multiple: int | None = None,
    ) -> Plan:
        """Check the inputs against each other and lay the output out. Reads headers, configurations and tokenizers only.

        Args:
            base: the base, where there is one.
            models: the merged models.
            base_merged: whether the method reads the base, and doesn't take its configuration and tokenizer alone.
            dtype: of the result, but for heads beside the weights; None keeps the inputs'.
            shard_size: most bytes of a weight file.
            tokenizer: whose tokens the result has where the inputs' differ: `base`, `union`, or a path.
            multiple: the embeddings' rows are a multiple of this.

        Raises:
            ModelError: names or shapes differ, vocabularies differ and `tokenizer` doesn't say what to do, or a type can't be
                merged.
        """
        inputs = [*([base] if base is not None else []), *models]
        _require_one_architecture(inputs)
        heads = common_heads(inputs if base_merged else models)
        if base is not None and not base_merged:
            base.drop_score_heads()
        left_out = _settle_tied_heads(inputs)
        names = _common_names(inputs, left_out)
        vocabularies = Vocabularies.align(base, models, tokenizer, names, multiple)
        planned = []
        for name in sorted(names, key=natural):
            readers = [vocabularies.aligned(name, one) for one in models]
            of_base = vocabularies.aligned(name, base) if base is not None else None
            planned.append(_planned(name, of_base, readers, dtype if score_head_of(name) is None else None))
        tensors, files = lay_out(planned, shard_size)
        for model in models:
            if base is not None and model.base is not None and model.root.fingerprint != base.fingerprint:
                log.warning(
                    "%s is an adapter of %s, not of the base %s: the difference of the two is merged too",
                    model.name,
                    model.root.name,
                    base.name,
                )
        return cls(base, models, tensors, files, sorted(left_out), vocabularies, heads)

    @cached_property
    def depth(self) -> int:
        """Number of layers, from the tensors' names; one at least."""
        return max(1, depth_of(tensor.name for tensor in self.tensors))

    @property
    def inputs(self) -> list[InputModel]:
        """The base, where there is one, and the models."""
        return [*([self.base] if self.base is not None else []), *self.models]

    @property
    def own(self) -> list[PlannedTensor]:
        """The model's own tensors, without those of heads beside its weights."""
        return [tensor for tensor in self.tensors if score_head_of(tensor.name) is None]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files that are written."""
        return sum(file.size for file in self.files)

    @property
    def read_bytes(self) -> int:
        """Bytes of the inputs' values, each counted once."""
        return sum(one.tensors[t.name].nbytes for t in self.tensors for one in self.inputs if t.name in one.tensors)

    def index(self) -> dict[str, object]:
        """Return the content of the index of a sharded output."""
        total = sum(tensor.nbytes for tensor in self.own)
        return {"metadata": {"total_size": total}, "weight_map": {tensor.name: tensor.file for tensor in self.own}}

    def fingerprint(self, *more: object) -> str:
        """Return a hash of all that the output's bytes depend on: inputs, layout, and other JSON values."""
        digest = hashlib.sha256()
        for one in [self.base, *self.models]:
            digest.update(one.fingerprint if one is not None else b"none")
            for file in one.files if one is not None else []:
                stat = file.path.stat()  # changes that a fingerprint of some values may miss
                digest.update(f"{file.path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        for output in self.files:
            digest.update(output.header)
        digest.update(json.dumps([self.vocabularies.fingerprint(), *more], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def memory(self, threads: int, chunk: int | None) -> int:
        """Estimate the bytes of memory that the merge takes beyond the interpreter's.

        Args:
            threads: tensors that are merged at once; each needs buffers, and values from which thresholds are found.
            chunk: elements of a chunk; None for whole tensors.
        """
        largest = max((tensor.count for tensor in self.tensors if tensor.merged), default=0)
        # Of a large tensor, usually a twentieth is kept; more where rows differ much in size.
        kept = 0 if chunk is None else len(self.models) * max(min(SMALL, largest), largest // 20)
        return threads * 4 * ((len(self.inputs) + 4) * min(chunk or largest, largest) + kept)

    def close(self) -> None:
        """Close the inputs' files."""
        for one in self.inputs:
            one.close()


def lay_out(planned: Sequence[PlannedTensor], shard_size: int) -> tuple[list[PlannedTensor], list[OutputFile]]:
    """Give tensors their places: shards of up to `shard_size` bytes in the order of the names, and a file for each head."""
    shards: list[list[PlannedTensor]] = [[]]
    heads: dict[str, list[PlannedTensor]] = {}
    room = shard_size
    for one in planned:
        if (head := score_head_of(one.name)) is not None:
            heads.setdefault(head, []).append(one)
            continue
        if one.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append(one)
        room -= one.nbytes
    contents = {
        SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }
    contents |= {f"{head}.safetensors": sorted(own, key=lambda one: one.name) for head, own in heads.items()}
    placed, files = [], []
    for file, tensors in contents.items():
        ordered = sorted(
            tensors, key=lambda one: -one.dtype.itemsize
        )  # wide elements first, as `encode_header` needs it
        # In a head's own file its tensors have no prefix.
        entries = {one.name.removeprefix(f"{score_head_of(one.name)}."): (one.dtype, one.shape) for one in ordered}
        header = encode_header(entries, format="pt")
        start = len(header)
        for one in ordered:
            placed.append(replace(one, file=file, start=start))
            start += one.nbytes
        files.append(OutputFile(file, header, start))
    return placed, files


_ARCHITECTURE = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "num_hidden_layers",
)
_COMPUTATION = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps", "sliding_window")


def _require_one_architecture(inputs: Sequence[InputModel]) -> None:
    """Raise where tensors of one name have different meanings, though their shapes may agree."""
    first = inputs[0]
    for other in inputs[1:]:
        for key in (*_ARCHITECTURE, *_COMPUTATION):
            a, b = first.text_config.get(key), other.text_config.get(key)
            if a == b or a is None or b is None:
                continue
            if key in _ARCHITECTURE:
                raise ModelError(
                    f"its `{key}` differs from that of {first.name}",
                    place=other.name,
                    got=f"{b}, and {a}",
                    fix="merge models of one architecture and size",
                )
            log.warning("`%s` is %s in %s and %s in %s; the result has the first", key, a, first.name, b, other.name)


def _settle_tied_heads(inputs: Sequence[InputModel]) -> set[str]:
    """Return the output heads that every input ties to its embeddings, and that aren't written.

    Where only some inputs tie theirs, their embeddings are read as their output heads.
    """
    heads = {name for one in inputs for name in one.tensors if is_head(name)}
    if not heads:
        return set()
    tied = [one for one in inputs if one.tied]
    if len(tied) == len(inputs):
        return heads
    for one in tied:
        for head in heads - set(one.tensors):
            if not one.absent(head) and one.embeddings is not None and head.endswith(".weight"):
                one.untie(head)
    if tied:
        untied = next(one for one in inputs if not one.tied)
        log.warning(
            "the output head of %s is its embeddings, and %s has another one: the result has both tensors",
            tied[0].name,
            untied.name,
        )
    return set()


_BUFFERS = re.compile(
    r"(.+\.)?(rotary_emb|rotary_pos_emb|rope)\.[^.]+|(.+\.)?(position_ids|inv_freq|masked_bias)|(.+\.)?(attn|attention)\.bias"
)
"""Tensors that some releases of transformers saved and all compute when a model is made."""


def _is_buffer(name: str, tensor: TensorReader) -> bool:
    # A mask of past positions is (1, 1, positions, positions); a bias of that name is a vector.
    return _BUFFERS.fullmatch(name) is not None and (not name.endswith(".bias") or len(tensor.shape) == 4)


def _common_names(inputs: Sequence[InputModel], left_out: set[str]) -> set[str]:
    """Return the names of the tensors that all inputs have, and raise where they differ, but for buffers that models compute."""
    every = {name for one in inputs for name in one.tensors} - left_out
    found = [{name for name in every if name in one.tensors or one.absent(name)} for one in inputs]
    odd = every - found[0].intersection(*found)
    buffers = {name for one in inputs for name in odd & one.tensors.keys() if _is_buffer(name, one.tensors[name])}
    if buffers:
        name = min(buffers, key=natural)
        has = next(one for one in inputs if name in one.tensors)
        log.warning(
            "%d tensors are left out, since models compute them and not every input has them: `%s` of %s%s",
            len(buffers), name, has.name, " and others" if len(buffers) > 1 else "",
        )  # fmt: skip
    first, wanted = inputs[0], found[0] - buffers
    for other, names in zip(inputs[1:], found[1:], strict=True):
        if names - buffers == wanted:
            continue
        lacking, extra = sorted(wanted - names, key=natural), sorted(names - buffers - wanted, key=natural)
        name, lacks, has = (lacking[0], other, first) if lacking else (extra[0], first, other)
        more = len(lacking or extra) - 1
        raise ModelError(
            f"tensor `{name}` is in {has.name} and not in {lacks.name}",
            place=other.name,
            got=f"{len(wanted)} and {len(names - buffers)} tensors" + (f", {more} more differ" if more else ""),
            fix="merge models of one architecture" + (", and copy the head's weights too" if is_head(name) else ""),
        )
    return wanted


def _planned(
    name: str, base: TensorReader | None, models: Sequence[TensorReader | None], dtype: torch.dtype | None
) -> PlannedTensor:
    """Return a tensor of the result, in `dtype` or else the widest type of the inputs'; raise where the inputs' differ."""
    readers = [one for one in (base, *models) if one is not None]
    first = readers[0]
    for one in readers[1:]:
        if one.shape != first.shape:
            raise ModelError(
                f"tensor `{name}` has another shape",
                place=one.place,
                got=f"{list(one.shape)}, and {list(first.shape)} in {first.place}",
                fix="merge models of one architecture and size",
            )
    kinds = {one.dtype for one in readers}
    floating = {kind for kind in kinds if kind.is_floating_point}
    if floating != kinds and len(kinds) > 1:
        listed = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ModelError(f"tensor `{name}` is of kinds that don't mix", place=first.place, got=listed)
    if floating and not kinds <= MERGED and dtype is None:
        odd = next(one for one in readers if one.dtype not in MERGED)
        raise ModelError(
            f"tensor `{name}` is stored as {str(odd.dtype).removeprefix('torch.')}, which float32 arithmetic can't keep",
            place=odd.place,
            fix="save the model again, with its head in float32"
            if score_head_of(name)
            else "set `dtype` to the type that the result shall have",
        )
    widest = first.dtype
    for kind in kinds:
        widest = torch.promote_types(widest, kind)
    return PlannedTensor(name, first.shape, dtype if dtype and floating else widest, bool(floating), base, models)


def require_count(models: Sequence[object], bounds: tuple[int, int | None], method: str) -> None:
    """Raise where a method can't merge so many models."""
    least, most = bounds
    if len(models) < least or (most is not None and len(models) > most):
        span = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"{method} merges {span} models", place="models", got=len(models))
