"""Context compressors: long contexts as fewer embeddings that a language model reads in the place of their tokens.

A backbone reads a piece of the context with memory tokens behind it, and its hidden states at these become the embeddings, as in
the in-context autoencoder of Ge et al. 2023 (arXiv 2307.06945, section 2.1) and the gist tokens of Mu et al. 2023 (arXiv
2304.08467). There are as many memory tokens as the ratio asks for, so that one compressor serves several ratios.

Axes: C contexts, N soft tokens, M memory tokens, D width of the backbone's hidden states, E width of the reader's embeddings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import COMPRESSOR_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.head_files import HeadFiles
from rlhf_core.models.headed_model import HeadedModel, load_backbone, wrong_kind
from rlhf_core.models.load_options import LoadOptions, apply_load_options, reading_options
from rlhf_core.models.sequence_model import SequenceModel
from rlhf_core.models.soft_tokens import with_soft_tokens

LARGEST_PASS = 16_384
"""Most tokens that are read in one pass where no gradients are needed."""


class MemoryHead(nn.Module):
    """The memory tokens, and the map from their hidden states to embeddings.

    An embedding is W (h / rms(h)) · s, where W begins as the identity and s as the root mean square of the reader's embeddings:
    it begins as long as the tokens that the reader knows, whatever the length of the backbone's hidden states.

    Args:
        width: D.
        reader_width: E.
        slots: M, the most soft tokens that one piece of context is compressed to.
        scale: s.
        seed: of the memory tokens, which depend on nothing else but the shapes and the scale.
    """

    def __init__(self, width: int, reader_width: int, slots: int, *, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.width, self.reader_width, self.slots = width, reader_width, slots
        generator = torch.Generator().manual_seed(seed)
        self.memory = nn.Parameter(torch.randn(slots, width, generator=generator) * scale)
        self.marker = nn.Parameter(torch.randn(1, reader_width, generator=generator) * scale)
        """(1, E): behind soft tokens it asks the reader for the context itself."""
        self.outer = nn.Linear(width, reader_width, bias=False)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        with torch.no_grad():
            nn.init.eye_(self.outer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (N, D) to embeddings (N, E) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            normed = nn.functional.rms_norm(hidden.float(), (self.width,))
            return self.scale * self.outer(normed)


class ContextCompressor(HeadedModel):
    """Compresses contexts, given as token ids, to fewer embeddings.

    Args:
        backbone: reads contexts; a policy stays whole.
        head: memory tokens and the map to the reader's embeddings.
        chunk: most tokens of a context that are compressed together; a longer one is compressed piece by piece.
        ratios: how many tokens of context one soft token stood for in training, in increasing order.
    """

    head_name = COMPRESSOR_HEAD

    def __init__(self, backbone: SequenceModel, head: MemoryHead, *, chunk: int, ratios: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.head, self.chunk, self.ratios = backbone, head, chunk, tuple(sorted(map(float, ratios)))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        new_head: bool = False,
        chunk: int | None = None,
        ratios: Sequence[float] | None = None,
        seed: int = 0,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load a compressor that `save_pretrained` wrote, or start one from a language model.

        Args:
            new_head: whether a checkpoint without memory tokens gets new ones, for training; else that is an error.
            chunk: most tokens that are compressed together; None takes the checkpoint's, or 512.
            ratios: that are trained; None takes the checkpoint's, or 2, 4 and 8.
            seed: of new memory tokens.

        Raises:
            ModelError: the memory tokens are missing, or their width isn't the backbone's.
            ConfigError: a piece of context would need more memory tokens than there are.
        """
        reading = reading_options(options, may_be_quantised=False)
        files = cls.find_head(source, new_head=new_head, fix="train one: `rlhf train context_compressor`")
        backbone = load_backbone(source, reading, has_head_files=files is not None)
        if files is None:
            model = cls.on(backbone, chunk=chunk or 512, ratios=ratios or (2, 4, 8), seed=seed)
        else:
            keys = {"reader_width": int, "slots": int, "chunk": int, "ratios": list}
            about = files.describe(width=backbone.width, keys=keys)
            head = MemoryHead(about["width"], about["reader_width"], about["slots"])
            model = cls(backbone, head, chunk=chunk or about["chunk"], ratios=ratios or about["ratios"])
            model.check_slots()
            files.load_into(model.head)
        apply_load_options(model, [backbone], options)
        return model

    @classmethod
    def adopt(
        cls, model: object, *, chunk: int | None = None, ratios: Sequence[float] | None = None, seed: int = 0
    ) -> Self:
        """Return a compressor in memory with these options, or put memory tokens on a policy's backbone, which both then share.

        Raises:
            ModelError: the object is neither.
            ConfigError: a piece of context would need more memory tokens than there are.
        """
        if isinstance(model, cls):
            model.chunk, model.ratios = chunk or model.chunk, tuple(sorted(ratios or model.ratios))
            model.check_slots()
            return model
        if not isinstance(model, SequenceModel):
            raise wrong_kind(model, wanted=cls, allowed="a PolicyModel or a ContextCompressor")
        return cls.on(model.without_head(), chunk=chunk or 512, ratios=ratios or (2, 4, 8), seed=seed)

    @classmethod
    def on(cls, backbone: SequenceModel, *, chunk: int, ratios: Sequence[float], seed: int = 0) -> Self:
        """Put new memory tokens on a backbone, or on a policy, which stays whole; the reader has embeddings of the same width."""
        weight = backbone.network.get_input_embeddings().weight
        scale = float(weight.detach().float().square().mean().sqrt())
        slots = math.ceil(chunk / min(ratios))
        head = MemoryHead(backbone.width, weight.shape[1], slots, scale=scale, seed=stream_seed(seed, "memory tokens"))
        return cls(backbone, head.to(backbone.device), chunk=chunk, ratios=ratios)

    @property
    def backbone_list(self) -> list[SequenceModel]:
        return [self.backbone]

    def head_facts(self) -> dict[str, Any]:
        return {
            "reader_width": self.head.reader_width,
            "slots": self.head.slots,
            "chunk": self.chunk,
            "ratios": list(self.ratios),
        }

    def check_slots(self) -> None:
        """Check that the memory tokens suffice for a whole piece of context at the least ratio.

        Raises:
            ConfigError: they don't.
        """
        if (needed := math.ceil(self.chunk / min(self.ratios))) > self.head.slots:
            raise ConfigError(
                f"a piece of {self.chunk} tokens at a ratio of {min(self.ratios):g} needs {needed} memory tokens",
                place="chunk",
                got=f"a compressor with {self.head.slots}",
                fix=f"set `chunk` to at most {int(self.head.slots * min(self.ratios))}, or train a new one",
            )

    def pieces(self, length: int, ratio: float) -> list[tuple[int, int]]:
        """Return how a context of some length is compressed: for each piece its tokens and the soft tokens that it becomes.

        Pieces are as equal as whole tokens allow: a last piece of a few tokens would be compressed unlike any other.

        Raises:
            ConfigError: the ratio is below the least one that the memory tokens suffice for.
        """
        least = self.chunk / self.head.slots
        if not ratio >= max(1.0, min(least, min(self.ratios))):
            raise ConfigError(
                "the compressor has too few memory tokens for this ratio", place="ratio", got=f"{ratio:g}",
                fix=f"choose one from {min(self.ratios):g} on",
            )  # fmt: skip
        count = math.ceil(length / self.chunk)
        ends = [round(length * index / count) for index in range(count + 1)] if count else [0]
        sizes = [end - begin for begin, end in itertools.pairwise(ends)]
        return [(size, min(math.ceil(size / ratio), self.head.slots)) for size in sizes]

    def forward(self, contexts: Sequence[Sequence[int]], ratios: Sequence[float]) -> list[Tensor]:
        """Return for each context its embeddings (N, E) float32, with gradients; an empty context has none.

        Args:
            contexts: token ids.
            ratios: of each context, how many of its tokens one embedding stands for.
        """
        pieces: list[tuple[list[int], int]] = []
        owners: list[int] = []
        for index, (ids, ratio) in enumerate(zip(contexts, ratios, strict=True)):
            at = 0
            for size, count in self.pieces(len(ids), ratio):
                pieces.append((list(ids[at : at + size]), count))
                owners.append(index)
                at += size
        found: list[list[Tensor]] = [[] for _ in contexts]
        for owner, rows in zip(owners, self._embeddings(pieces), strict=True):
            found[owner].append(rows)
        empty = torch.zeros(0, self.head.reader_width, device=self.device)
        return [torch.cat(rows) if rows else empty for rows in found]

    @torch.no_grad()
    def compress(self, contexts: Sequence[Sequence[int]], ratio: float | None = None) -> list[Tensor]:
        """Return for each context its embeddings (N, E) float32, without gradients; equal contexts are compressed once.

        Args:
            contexts: token ids.
            ratio: how many tokens of context one embedding stands for; None takes the least one of training.

        Raises:
            ConfigError: the ratio is below the least one that the memory tokens suffice for.
        """
        ratio = min(self.ratios) if ratio is None else ratio
        unique = list(dict.fromkeys(map(tuple, contexts)))
        found: dict[tuple[int, ...], Tensor] = {}
        with evaluating(self):
            for group in _groups(unique, LARGEST_PASS):
                found |= dict(zip(group, self(group, [ratio] * len(group)), strict=True))
        return [found[tuple(ids)] for ids in contexts]

    def _embeddings(self, pieces: Sequence[tuple[list[int], int]]) -> list[Tensor]:
        """Return the embeddings (count, E) of each piece, given as (ids, count)."""
        if not pieces:
            return []
        device, network = self.device, self.backbone.network
        lengths, counts = ([len(ids) for ids, _ in pieces], [count for _, count in pieces])
        prompts = torch.zeros(len(pieces), max(lengths), dtype=torch.long)
        for row, (ids, _) in enumerate(pieces):
            prompts[row, : len(ids)] = torch.tensor(ids)
        with with_soft_tokens(network, self.head.memory) as first:
            slots = torch.arange(max(counts))
            within = slots < torch.tensor(counts)[:, None]
            batch = Batch(
                prompts,
                torch.tensor(lengths),
                torch.where(within, first + slots, 0),
                torch.tensor(counts),
                torch.arange(len(pieces)),
                within,
                rows=tuple(range(len(pieces))),
            ).to(device)
            hidden = self.backbone.hidden_states(batch).at()
        return list(self.head(hidden).split(counts))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and memory tokens, an adapter merged in; the model in memory is left as it is."""
        self.backbone.without_head(freeze=False).save_pretrained(directory, merged=True)
        description = {"width": self.backbone.width, **self.head_facts()}
        HeadFiles(Path(directory), self.head_name).write(self.head, description)


def context_span(length: int, keep_start: int, keep_end: int) -> slice:
    """Return which tokens of a prompt are its context: all but so many at its start and its end; none of a shorter prompt."""
    return slice(min(keep_start, length), max(length - keep_end, min(keep_start, length)))


def check_reader(compressor: ContextCompressor, reader: SequenceModel) -> None:
    """Check that a model can read a compressor's embeddings: that its own are as wide.

    Raises:
        ModelError: they aren't.
    """
    width = int(reader.network.get_input_embeddings().weight.shape[1])
    if width != compressor.head.reader_width:
        raise ModelError(
            "the model can't read what the compressor makes", place=reader.source,
            got=f"embeddings of width {width}, and {compressor.head.reader_width} of the compressor",
            fix="use the model that the compressor was trained for, or one trained from it",
        )  # fmt: skip


def _groups(contexts: Sequence[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield contexts in groups of at most so many tokens, or of one."""
    group: list[tuple[int, ...]] = []
    for ids in contexts:
        if group and sum(map(len, group)) + len(ids) > most:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group
