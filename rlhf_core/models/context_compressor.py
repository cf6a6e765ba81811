"""Context compressors: long contexts as fewer embeddings that a language model reads in the place of their tokens.

A backbone reads a piece of the context, and its last hidden states become the embeddings: `pooled`, each the mean over as many
neighbouring tokens as the ratio says (Feldman and Artzi 2025, arXiv 2510.20797), or `memory`, those at memory tokens behind the
piece, as in the in-context autoencoder of Ge et al. 2023 (arXiv 2307.06945, section 2.1) and the gist tokens of Mu et al. 2023
(arXiv 2304.08467). Either way each context has a ratio of its own, so that one compressor serves several.

Axes: C contexts, N soft tokens, M memory tokens, D width of the backbone's hidden states, E width of the reader's embeddings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, Unpack, get_args

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

Summary = Literal["memory", "pooled"]
"""What embeddings are made of: the hidden states of memory tokens, or means of those of neighbouring tokens."""
LARGEST_PASS = 16_384
"""Most tokens that are read in one pass where no gradients are needed."""


class SummaryHead(nn.Module):
    """The tokens of its own that a compressor reads, and the map from hidden states to embeddings.

    An embedding is W (h / rms(h)) · s, where W begins as the identity and s as the root mean square of the reader's embeddings:
    it begins as long as the tokens that the reader knows, whatever the length of the backbone's hidden states.

    Args:
        width: D.
        reader_width: E.
        slots: M, memory tokens: the most soft tokens that one piece is compressed to; for pooled states 1, before the piece.
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
        summary: what the embeddings are made of.
    """

    head_name = COMPRESSOR_HEAD

    def __init__(
        self,
        backbone: SequenceModel,
        head: SummaryHead,
        *,
        chunk: int,
        ratios: Sequence[float],
        summary: Summary = "memory",
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.chunk, self.ratios = backbone, head, chunk, tuple(sorted(map(float, ratios)))
        self.summary = summary
        self.kept = (0, 64)
        """Tokens at a prompt's start and at its end that weren't context in training."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        new_head: bool = False,
        chunk: int | None = None,
        ratios: Sequence[float] | None = None,
        summary: Summary | None = None,
        seed: int = 0,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load a compressor that `save_pretrained` wrote, or start one from a language model.

        Args:
            new_head: whether a checkpoint without a compressor's head gets a new one, for training; else that is an error.
            chunk: most tokens that are compressed together; None takes the checkpoint's, or 512.
            ratios: that are trained; None takes the checkpoint's, or 2, 4 and 8.
            summary: what the embeddings are made of; None takes what the checkpoint has, or `memory`.
            seed: of a new head.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: a piece of context would need more memory tokens than there are.
        """
        reading = reading_options(options, may_be_quantised=False)
        files = cls.find_head(source, new_head=new_head, fix="train one: `rlhf train context_compressor`")
        backbone = load_backbone(source, reading, has_head_files=files is not None)
        if files is None:
            model = cls.on(backbone, chunk=chunk or 512, ratios=ratios or (2, 4, 8), summary=summary, seed=seed)
        else:
            keys = {"reader_width": int, "slots": int, "chunk": int, "ratios": list, "summary": str, "kept": list}
            about = files.describe(width=backbone.width, keys=keys)
            if about["summary"] not in get_args(Summary):
                raise files.unsupported(f"summary {about['summary']}", f"known ones are {', '.join(get_args(Summary))}")
            head = SummaryHead(about["width"], about["reader_width"], about["slots"])
            model = cls(backbone, head, chunk=about["chunk"], ratios=about["ratios"], summary=about["summary"])
            model.kept = tuple(about["kept"])
            model.set_sizes(chunk, ratios, summary)
            files.load_into(model.head)
        apply_load_options(model, [backbone], options)
        return model

    @classmethod
    def adopt(
        cls,
        model: object,
        *,
        chunk: int | None = None,
        ratios: Sequence[float] | None = None,
        summary: Summary | None = None,
        seed: int = 0,
    ) -> Self:
        """Return a compressor in memory with these options, or put a head on a policy's backbone, which both then share.

        Raises:
            ModelError: the object is neither.
            ConfigError: a piece of context would need more memory tokens than there are.
        """
        if isinstance(model, cls):
            model.set_sizes(chunk, ratios, summary)
            return model
        if not isinstance(model, SequenceModel):
            raise wrong_kind(model, wanted=cls, allowed="a PolicyModel or a ContextCompressor")
        return cls.on(model.without_head(), chunk=chunk or 512, ratios=ratios or (2, 4, 8), summary=summary, seed=seed)

    @classmethod
    def on(
        cls,
        backbone: SequenceModel,
        *,
        chunk: int,
        ratios: Sequence[float],
        summary: Summary | None = None,
        seed: int = 0,
    ) -> Self:
        """Put a new head on a backbone, or on a policy, which stays whole; the reader has embeddings of the same width."""
        weight = backbone.network.get_input_embeddings().weight
        scale = float(weight.detach().float().square().mean().sqrt())
        slots = math.ceil(chunk / min(ratios)) if summary != "pooled" else 1
        head = SummaryHead(backbone.width, weight.shape[1], slots, scale=scale, seed=stream_seed(seed, "memory tokens"))
        model = cls(backbone, head.to(backbone.device), chunk=chunk, ratios=ratios, summary=summary or "memory")
        model.set_sizes()
        return model

    @classmethod
    def is_saved_in(cls, source: str | Path) -> bool:
        """Return whether a directory holds a compressor."""
        return HeadFiles.find(source, cls.head_name) is not None

    @property
    def backbone_list(self) -> list[SequenceModel]:
        return [self.backbone]

    def head_facts(self) -> dict[str, Any]:
        return {
            "reader_width": self.head.reader_width,
            "slots": self.head.slots,
            "chunk": self.chunk,
            "ratios": list(self.ratios),
            "summary": self.summary,
            "kept": list(self.kept),
        }

    def set_sizes(
        self, chunk: int | None = None, ratios: Sequence[float] | None = None, summary: Summary | None = None
    ) -> None:
        """Set the length of a piece and the ratios that are trained; None leaves one as it is.

        Raises:
            ConfigError: a piece would need more memory tokens than there are, or more positions than the model has, or the
                embeddings are made of something else.
        """
        if summary not in (None, self.summary):
            fix = f"set `summary: {self.summary}`, or start from a language model"
            raise ConfigError(
                f"the compressor has {self.summary} embeddings", place="summary", got=str(summary), fix=fix
            )
        self.chunk, self.ratios = chunk or self.chunk, tuple(sorted(map(float, ratios or self.ratios)))
        positions, own = self.backbone.max_positions, self.head.slots
        if positions is not None and self.chunk + own > positions:
            raise ConfigError(
                "a piece of context with the compressor's own tokens doesn't fit the model's positions", place="chunk",
                got=f"{self.chunk} + {own} tokens for {positions} positions", fix="set a smaller `chunk`",
            )  # fmt: skip
        if self.summary != "memory":
            return
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
        most = self.head.slots if self.summary == "memory" else self.chunk
        if not ratio >= 1 or math.ceil(self.chunk / ratio) > most:
            raise ConfigError(
                "the compressor has too few memory tokens for this ratio", place="ratio", got=f"{ratio:g}",
                fix=f"choose one from {self.chunk / most:g} on",
            )  # fmt: skip
        count = math.ceil(length / self.chunk)
        ends = [round(length * index / count) for index in range(count + 1)] if count else [0]
        sizes = [end - begin for begin, end in itertools.pairwise(ends)]
        return [(size, math.ceil(size / ratio)) for size in sizes]

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
        counts = [count for _, count in pieces]
        with with_soft_tokens(self.backbone.network, self.head.memory) as first:
            if self.summary == "memory":
                behind = [list(range(first, first + count)) for count in counts]
                hidden = self._states([(ids, slots) for (ids, _), slots in zip(pieces, behind, strict=True)])
            else:
                hidden = _means(self._states([([first], ids) for ids, _ in pieces]), pieces)
        return list(self.head(hidden).split(counts))

    def _states(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Return the hidden states (N, D) at the second part of each sequence, one after the other."""
        (before, lengths), (behind, sizes) = (_padded([pair[part] for pair in pairs]) for part in (0, 1))
        within = torch.arange(behind.shape[1]) < sizes[:, None]
        owner, rows = torch.arange(len(pairs)), tuple(range(len(pairs)))
        batch = Batch(before, lengths, behind, sizes, owner, within, rows=rows)
        return self.backbone.hidden_states(batch.to(self.device)).at()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and memory tokens, an adapter merged in; the model in memory is left as it is."""
        self.backbone.without_head(freeze=False).save_pretrained(directory, merged=True)
        description = {"width": self.backbone.width, **self.head_facts()}
        HeadFiles(Path(directory), self.head_name).write(self.head, description)


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids (P, L) long, padded on the right, and their lengths (P,)."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(ids) for ids in rows])


def _means(hidden: Tensor, pieces: Sequence[tuple[Sequence[int], int]]) -> Tensor:
    """Return the means of hidden states over neighbouring tokens: of each piece, given as (ids, count), so many.

    The tokens of a mean differ by at most one in number from those of another mean of the piece.
    """
    groups, at = [], 0
    for ids, count in pieces:
        groups.append(at + torch.arange(len(ids)) * count // len(ids))
        at += count
    group = torch.cat(groups).to(hidden.device)
    sums = hidden.new_zeros(at, hidden.shape[1], dtype=torch.float32).index_add(0, group, hidden.float())
    return sums / torch.bincount(group, minlength=at)[:, None]


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
