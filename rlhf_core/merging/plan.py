"""What a merge will do, known before it does it: which tensors are merged or copied, with what weights, and where they go."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.merging.checkpoint import Checkpoint
from rlhf_core.merging.heads import Head
from rlhf_core.merging.layout import MERGED, Described, Item, OutputFile, lay_out, lay_out_file
from rlhf_core.merging.selection import SMALL
from rlhf_core.merging.streams import Source
from rlhf_core.merging.vocabulary import Vocabularies
from rlhf_core.merging.weights import is_head, layer_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The inputs, checked against each other, and the layout of the output."""

    base: Checkpoint | None
    models: Sequence[Checkpoint]
    items: Sequence[Item]
    files: Sequence[OutputFile]
    left_out: Sequence[str]
    """Tensors that aren't written because they are tied to another."""
    vocabularies: Vocabularies
    heads: Sequence[Head] = ()
    """Heads that are merged and written beside the weights."""

    @classmethod
    def make(
        cls,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        *,
        dtype: torch.dtype | None = None,
        shard_size: int = 5_000_000_000,
        tokenizer: str | None = None,
        multiple: int | None = None,
        heads: Sequence[Head] = (),
    ) -> Plan:
        """Check the inputs against each other and lay the output out. Reads headers, configurations and tokenizers only.

        Raises:
            ModelError: names or shapes differ, vocabularies differ and `tokenizer` doesn't say what to do, or a type can't be
                merged.
        """
        inputs = [*([base] if base is not None else []), *models]
        _same_architecture(inputs)
        left_out = _settle_heads(inputs)
        names = _common_names(inputs, left_out)
        vocabularies = Vocabularies.compare(base, models, tokenizer, names, multiple)
        described = [_describe(name, inputs, vocabularies, dtype) for name in sorted(names, key=natural)]
        items, files = lay_out(described, shard_size)
        for head in heads:
            tensors = [Described(key, shape, kind, merged=True) for key, (kind, shape) in head.tensors.items()]
            beside, file = lay_out_file(f"{head.name}.safetensors", tensors, head=head.name)
            items, files = [*items, *beside], [*files, file]
        for model in models:
            own = model.root
            if base is not None and own is not model and own.digest != base.digest:
                log.warning(
                    "%s is an adapter of %s, not of the base %s: the difference of the two is merged too",
                    model.name,
                    own.name,
                    base.name,
                )
        return cls(base, models, items, files, sorted(left_out), vocabularies, heads)

    @cached_property
    def depth(self) -> int:
        """Number of layers, from the tensors' names."""
        return 1 + max((layer for item in self.items if (layer := layer_of(item.name)) is not None), default=0)

    @property
    def own(self) -> list[Item]:
        """The model's own tensors, without those of heads beside it."""
        return [item for item in self.items if item.head is None]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files that are written."""
        return sum(file.size for file in self.files)

    @property
    def read_bytes(self) -> int:
        """Bytes of the inputs' values, each counted once."""
        inputs = [*([self.base] if self.base is not None else []), *self.models]
        entries = [one.all_tensors for one in inputs]
        return sum(own[item.name].nbytes for own in entries for item in self.items if item.name in own)

    def sources(self, item: Item) -> tuple[Source | None, list[Source | None]]:
        """Return a tensor of the base, if there is one, and of each model that takes part; vocabularies lined up."""
        if item.head is not None:
            has = self.base is not None and item.head in self.base.heads
            origin = self.base.head_source(item.name) if self.base is not None and has else None
            return origin, [model.head_source(item.name) for model in self.models]
        base = self.vocabularies.source(self.base, item.name) if self.base is not None else None
        takes_part = (not model.absent(item.name) for model in self.models)
        return base, [
            self.vocabularies.source(model, item.name) if there else None
            for model, there in zip(self.models, takes_part, strict=True)
        ]

    def index(self) -> dict[str, object]:
        """Return what the index of a sharded output holds."""
        total = sum(item.nbytes for item in self.own)
        return {"metadata": {"total_size": total}, "weight_map": {item.name: item.file for item in self.own}}

    def fingerprint(self, *more: object) -> str:
        """Return a hash of all that the output's bytes depend on: inputs, layout, and whatever else is given."""
        digest = hashlib.sha256()
        for one in [self.base, *self.models]:
            digest.update(one.digest if one is not None else b"none")
            for path in one.files if one is not None else []:
                stat = path.stat()  # what a digest of samples may miss
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        for file in self.files:
            digest.update(file.header)
        digest.update(repr(self.vocabularies.layout()).encode())
        digest.update(json.dumps(more, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


_ARCHITECTURE = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "num_hidden_layers",
)
_SETTINGS = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps", "sliding_window")


def _same_architecture(inputs: Sequence[Checkpoint]) -> None:
    """Raise where tensors of one name would mean different things, though their shapes may agree."""
    first = inputs[0]
    for other in inputs[1:]:
        for key in (*_ARCHITECTURE, *_SETTINGS):
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


def _settle_heads(inputs: Sequence[Checkpoint]) -> set[str]:
    """Return output heads that are every input's embeddings, and so aren't written: one tensor, not two.

    Where only some inputs tie theirs, each gets a head under its own name, with the values that it uses.
    """
    heads = {name for one in inputs for name in one.tensors if is_head(name)}
    if not heads:
        return set()
    tied = [one for one in inputs if one.tied]
    if len(tied) == len(inputs):
        return heads
    for one in tied:
        for head in heads - set(one.tensors):
            if not one.absent(head) and one.table is not None and head.endswith(".weight"):
                one.untie(head)
    if tied:
        own = next(one for one in inputs if not one.tied)
        log.warning(
            "the output head of %s is its embeddings, and %s has one of its own: so has the result",
            tied[0].name,
            own.name,
        )
    return set()


_BUFFERS = re.compile(
    r"(.+\.)?(rotary_emb|rotary_pos_emb|rope)\.[^.]+|(.+\.)?(position_ids|inv_freq|masked_bias)|(.+\.)?(attn|attention)\.bias"
)
"""Tensors that some releases of transformers saved and all work out when a model is made."""


def _is_buffer(name: str, one: Checkpoint) -> bool:
    entry = one.tensors[name]
    # A mask of past positions is (1, 1, positions, positions); a bias of that name is a vector.
    return _BUFFERS.fullmatch(name) is not None and (not name.endswith(".bias") or len(entry.shape) == 4)


def _common_names(inputs: Sequence[Checkpoint], left_out: set[str]) -> set[str]:
    """Return the tensors of all inputs, without what models work out themselves and only some of them hold."""
    every = set[str]().union(*(one.tensors for one in inputs))
    found = [{*one.tensors, *(name for name in every if one.absent(name))} - left_out for one in inputs]
    odd = set[str]().union(*found) - found[0].intersection(*found)
    buffers = {name for one in inputs for name in odd & one.tensors.keys() if _is_buffer(name, one)}
    if buffers:
        name = min(buffers, key=natural)
        has = next(one for one in inputs if name in one.tensors)
        log.warning(
            "%d tensors are left out, as a model works them out itself and not every input has them: `%s` of %s%s",
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


def _describe(
    name: str, inputs: Sequence[Checkpoint], vocabularies: Vocabularies, dtype: torch.dtype | None
) -> Described:
    inputs = [one for one in inputs if not one.absent(name)]
    entries = [one.tensors[name] for one in inputs]
    aligned = vocabularies.shape(name, entries[0].shape)
    if aligned is None:
        for one, entry in zip(inputs[1:], entries[1:], strict=True):
            if entry.shape != entries[0].shape:
                raise ModelError(
                    f"tensor `{name}` has another shape",
                    place=one.name,
                    got=f"{list(entry.shape)}, and {list(entries[0].shape)} in {inputs[0].name}",
                    fix="merge models of one architecture and size",
                )
    kinds = {entry.dtype for entry in entries}
    floating = {kind for kind in kinds if kind.is_floating_point}
    if floating != kinds and len(kinds) > 1:
        listed = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ModelError(f"tensor `{name}` is of kinds that don't mix", place=inputs[0].name, got=listed)
    merged = bool(floating)
    if merged and not kinds <= MERGED and dtype is None:
        odd = next(kind for kind in kinds if kind not in MERGED)
        raise ModelError(
            f"tensor `{name}` is stored as {str(odd).removeprefix('torch.')}, which float32 arithmetic can't keep",
            place=inputs[0].name,
            fix="set `dtype` to the type that the result shall have",
        )
    wide = entries[0].dtype
    for kind in kinds:
        wide = torch.promote_types(wide, kind)
    return Described(name, aligned or entries[0].shape, (dtype or wide) if merged else wide, merged)


def check_count(models: Sequence[object], bounds: tuple[int, int | None], method: str) -> None:
    """Raise where a method can't merge so many models."""
    least, most = bounds
    if len(models) < least or (most is not None and len(models) > most):
        span = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"{method} merges {span} models", place="models", got=len(models))


def memory(plan: Plan, threads: int, chunk: int, *, whole: bool) -> int:
    """Estimate the bytes of memory that a merge takes beyond the interpreter's: buffers of each of `threads`, and what thresholds
    are found from.

    Args:
        whole: whether the method needs whole tensors, rather than chunks.
    """
    inputs = len(plan.models) + (plan.base is not None)
    largest = max((item.count for item in plan.items if item.merged), default=0)
    # Of a large tensor, a twentieth is kept as a rule; more where rows differ much in size.
    kept = 0 if whole else len(plan.models) * max(min(SMALL, largest), largest // 20)
    return threads * 4 * ((inputs + 4) * (largest if whole else min(chunk, largest)) + kept)
