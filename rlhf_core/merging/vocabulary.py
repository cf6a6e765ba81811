"""Vocabularies that differ, lined up by the tokens' text, so that a row of the embeddings is merged with its own like.

A token that an input lacks takes no part there: it stands at the base's row, so that its difference is zero, or, where the base
lacks it too, at the mean of the inputs that have it. Rows without a token (padding) are lined up by number and never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.files import read_json
from rlhf_core.merging.checkpoint import Checkpoint, is_vocabulary
from rlhf_core.merging.streams import Source

TOKENIZER = "tokenizer.json"

Runs = list[tuple[int, int, int]]
"""Rows as (first row of the result, number of rows, first row of the input, or -1 where the input has none)."""


@dataclass(frozen=True)
class Vocabularies:
    """How the rows of each input's embeddings come to stand in the result's; nothing to do where all inputs agree."""

    rows: int | None = None
    """Rows of the result's embeddings, where they are lined up."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """The result's vocabulary, where rows are lined up: token → row."""
    tokenizer: dict[str, Any] | None = None
    """The result's tokenizer.json, where it is nobody's own."""
    origin: Path | None = None
    """The tokenizer.json that the result's tokenizer is taken from, where the plan decided it."""
    based: int = 0
    """How many of the inputs, the first, are a base: one or none."""
    _runs: Mapping[int, Runs] = field(default_factory=dict)
    """For each input (by identity) where its rows go."""
    _inputs: Sequence[Checkpoint] = ()

    @classmethod
    def compare(
        cls,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        wanted: str | None,
        names: set[str],
        multiple: int | None = None,
    ) -> Vocabularies:
        """Compare the inputs' vocabularies, and line them up as `wanted` says where they differ.

        Args:
            wanted: whose tokens the result has: `base`, `union`, or a path.
            names: the tensors that are merged.
            multiple: the result's rows are a multiple of this.

        Raises:
            ModelError: they differ and `wanted` is None, or an input has no tokenizer.json.
            ConfigError: `wanted` has no meaning, since no tensor has a row for each token.
        """
        inputs = [*([base] if base is not None else []), *models]
        table = next((name for name in sorted(names) if _is_vocabulary(name, inputs)), None)
        if table is None:
            if wanted is not None or multiple is not None:
                raise ConfigError(
                    "no tensor is known to have a row for each token",
                    place="tokenizer" if wanted is not None else "pad_to_multiple_of",
                    got=wanted or multiple,
                    fix="leave it out",
                )
            return cls()
        inputs = [one for one in inputs if not one.absent(table)]
        rows = [one.tensors[table].shape[0] for one in inputs]
        files = [tokenizer_file(one) for one in inputs]
        path = None if wanted in (None, "base", "union") else Path(str(wanted)).expanduser()
        as_they_are = path is None and len(set(rows)) == 1 and rows[0] % (multiple or 1) == 0
        texts = {file.read_bytes() for file in files if file is not None}
        if len(texts) <= 1 and as_they_are:
            return cls()
        described = [_describe(file) if file is not None else None for file in files]
        tokens = [one.tokens if one is not None else {} for one in described]
        known = [one for one in tokens if one]
        alike = all(one == known[0] for one in known) and len(set(rows)) == 1
        if alike and as_they_are:
            return cls()
        if wanted is None and not alike:
            _refuse(inputs, tokens, rows)
        for one, found in zip(inputs, described, strict=True):
            if found is None:
                raise ModelError(
                    "vocabularies are lined up by tokens' text, and there is no tokenizer.json", place=one.name
                )
        found_all = [one for one in described if one is not None]
        return cls._line_up(base, inputs, found_all, rows, wanted if path is None else path, multiple or 1)

    @classmethod
    def _line_up(
        cls,
        base: Checkpoint | None,
        inputs: Sequence[Checkpoint],
        described: Sequence[_Tokenizer],
        rows: Sequence[int],
        wanted: str | Path | None,
        multiple: int,
    ) -> Vocabularies:
        made: dict[str, Any] | None = None
        if isinstance(wanted, Path):
            file = wanted if wanted.is_file() else wanted / TOKENIZER
            if not file.is_file():
                raise ConfigError("no tokenizer.json is there", place="tokenizer", got=str(wanted))
            target, origin = _describe(file).tokens, file
        else:
            # Whose numbers stay: the base's, else those of the longest vocabulary; never the order of the models.
            sizes = [(len(one.tokens), inputs[number].digest) for number, one in enumerate(described)]
            main = 0 if base is not None else sizes.index(max(sizes))
            target, origin = dict(described[main].tokens), described[main].file
            if wanted == "union":
                made = _joined(inputs, described, main, target)
        # Rows without a token are never dropped; rows of tokens that the result doesn't have are.
        padded = [size for one, size in zip(described, rows, strict=True) if size > 1 + max(one.tokens.values())]
        count = max([1 + max(target.values()), *padded, *rows[: int(base is not None)]])
        count = -(-count // multiple) * multiple
        runs = {
            id(one): _match(target, count, own.tokens, size)
            for one, own, size in zip(inputs, described, rows, strict=True)
        }
        return cls(count, target, made, origin, int(base is not None), runs, inputs)

    def layout(self) -> object:
        """Return what the rows of the result depend on."""
        return self.rows, sorted(self.tokens.items()), [self._runs[id(one)] for one in self._inputs]

    def renumbered(self, one: Checkpoint, number: Any) -> Any:
        """Return the row in the result of a token that an input knows by a number; lists of numbers alike."""
        if isinstance(number, list):
            return [self.renumbered(one, item) for item in number]
        file = tokenizer_file(one)
        if self.rows is None or not isinstance(number, int) or file is None:
            return number
        text = next((text for text, row in _describe(file).tokens.items() if row == number), None)
        return self.tokens.get(text, number) if text is not None else number

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Return a tensor's shape in the result where its rows are lined up, else None."""
        if self.rows is None or not _is_vocabulary(name, self._inputs):
            return None
        return (self.rows, *shape[1:])

    def source(self, one: Checkpoint, name: str) -> Source:
        """Return a tensor of an input, its rows lined up where need be."""
        plain = one.source(name)
        shape = self.shape(name, plain.shape)
        if shape is None:
            return plain
        # Who fills a gap: the base, else all that have the row, in an order that isn't the one they were given in.
        models = sorted(self._inputs[self.based :], key=lambda model: model.digest)
        others = [(other.source(name), self._runs[id(other)]) for other in (*self._inputs[: self.based], *models)]
        return AlignedSource(plain, self._runs[id(one)], others, shape, based=bool(self.based))


class AlignedSource(Source):
    """Rows of an input in the order of the result."""

    def __init__(
        self,
        plain: Source,
        runs: Runs,
        others: Sequence[tuple[Source, Runs]],
        shape: tuple[int, ...],
        *,
        based: bool,
    ) -> None:
        self.plain, self.shape, self._others, self._based = plain, shape, others, based
        self.place, self.dtype = plain.place, plain.dtype
        self._columns = shape[1]
        self._map = _row_map(runs, shape[0])
        self._maps = [_row_map(runs, shape[0]) for _, runs in others]

    def read(self, start: int, stop: int, out: Tensor) -> None:
        columns = self._columns
        first, last = start // columns, -(-stop // columns)
        if (start, stop) != (first * columns, last * columns):
            whole = torch.empty((last - first) * columns)
            self.read(first * columns, last * columns, whole)
            out.copy_(whole[start - first * columns : stop - first * columns])
            return
        table = out.view(-1, columns)
        for row, count, source in _runs_of(self._map[first:last]):
            if source >= 0:
                self.plain.read(source * columns, (source + count) * columns, table[row : row + count].view(-1))
                continue
            for missing in range(row, row + count):
                self._fill(first + missing, table[missing])

    def _fill(self, row: int, out: Tensor) -> None:
        having = [number for number, rows in enumerate(self._maps) if rows[row] >= 0]
        if self._based and having[:1] == [0]:
            having = [0]
        total, part = torch.zeros_like(out), torch.empty_like(out)
        for number in having:
            place = int(self._maps[number][row]) * self._columns
            self._others[number][0].read(place, place + self._columns, part)
            total.add_(part)
        out.copy_(total.div_(max(1, len(having))))

    def key(self) -> bytes:
        return self.plain.key()


def _is_vocabulary(name: str, inputs: Sequence[Checkpoint]) -> bool:
    return any(name in one.tensors and is_vocabulary(name, one) for one in inputs)


def same_tokens(one: Checkpoint, other: Checkpoint) -> bool:
    """Tell whether two models number the same tokens alike, as far as their files say."""
    files = [tokenizer_file(one), tokenizer_file(other)]
    if None in files or files[0] == files[1]:
        return True
    first, second = (_describe(file).tokens for file in files if file is not None)
    return first == second


def tokenizer_file(one: Checkpoint) -> Path | None:
    """Return a model's tokenizer.json: an adapter's own, or its base's."""
    return next((place / TOKENIZER for place in one.places if (place / TOKENIZER).is_file()), None)


@dataclass(frozen=True)
class _Tokenizer:
    """What a tokenizer.json says of its vocabulary."""

    file: Path
    pieces: Mapping[str, int]
    """What text is cut into: token → row."""
    added: Mapping[str, dict[str, Any]]
    """Tokens that are matched as a whole, with their flags."""

    @cached_property
    def tokens(self) -> dict[str, int]:
        return dict(self.pieces) | {text: int(flags["id"]) for text, flags in self.added.items()}


def _describe(file: Path) -> _Tokenizer:
    try:
        described = read_json(file)
        vocabulary = described["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        added = {token["content"]: token for token in described.get("added_tokens") or []}
        found = _Tokenizer(file, vocabulary, added)
        found.tokens  # noqa: B018  # a number that is missing shows here
        return found
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            "tokenizer.json can't be read", place=str(file), got=f"{type(error).__name__}: {error}"
        ) from None


def _refuse(inputs: Sequence[Checkpoint], tokens: Sequence[dict[str, int]], rows: Sequence[int]) -> None:
    first = next((n for n in range(len(inputs)) if tokens[n]), 0)
    other = next(n for n in range(len(inputs)) if rows[n] != rows[first] or (tokens[n] and tokens[n] != tokens[first]))
    detail = f"{len(tokens[first])} tokens in {rows[first]} rows, and {len(tokens[other])} in {rows[other]}"
    if (len(tokens[first]), rows[first]) == (len(tokens[other]), rows[other]):
        token = next(text for text, row in tokens[first].items() if tokens[other].get(text) != row)
        detail += f"; token {token!r} is number {tokens[first][token]} and {tokens[other].get(token, 'none')}"
    raise ModelError(
        f"its vocabulary differs from that of {inputs[first].name}",
        place=inputs[other].name,
        got=detail,
        fix="set `tokenizer` to `base`, `union` or a path: rows are then lined up by the tokens' text",
    )


def _joined(
    inputs: Sequence[Checkpoint], described: Sequence[_Tokenizer], main: int, target: dict[str, int]
) -> dict[str, Any] | None:
    """Add the added tokens of all inputs to the main one's, and to `target`; return its tokenizer.json where there are any.

    Raises:
        ModelError: text is cut into other pieces by another input: such vocabularies have no union that cuts text as both do.
    """
    for one, own in zip(inputs, described, strict=True):
        if (lacking := sorted(set(own.pieces) - set(target))) and set(own.pieces) != set(described[main].pieces):
            raise ModelError(
                f"cuts text into other pieces than {inputs[main].name}, and no tokenizer cuts it as both do",
                place=one.name,
                got=f"{len(lacking)} pieces more, such as {lacking[0]!r}",
                fix="set `tokenizer` to `base` or a path",
            )
    more = sorted({text for own in described for text in own.added} - set(target))
    first = 1 + max(target.values())
    target |= {text: first + number for number, text in enumerate(more)}
    if not more:
        return None
    flags = {text: next(own.added[text] for own in described if text in own.added) for text in more}
    document: dict[str, Any] = read_json(described[main].file)
    return document | {
        "added_tokens": [*(document.get("added_tokens") or []), *({**flags[t], "id": target[t]} for t in more)]
    }


def _match(target: Mapping[str, int], count: int, own: Mapping[str, int], size: int) -> Runs:
    """Return where each row of the result stands in an input."""
    rows = numpy.full(count, -1, dtype=numpy.int64)
    named, taken = numpy.zeros(count, dtype=bool), numpy.zeros(max(size, 1), dtype=bool)
    for token, row in target.items():
        named[row] = True
        if (place := own.get(token, size)) < size:
            rows[row] = place
    for place in own.values():
        if place < size:
            taken[place] = True
    free = numpy.arange(min(count, size))
    free = free[~named[free] & ~taken[free]]
    rows[free] = free
    return _runs_of(rows)


def _runs_of(rows: numpy.ndarray) -> Runs:
    """Cut a map of rows into runs that can be read at once."""
    if not len(rows):
        return []
    follows = numpy.where(rows[1:] < 0, rows[:-1] < 0, rows[1:] == rows[:-1] + 1) & ((rows[:-1] < 0) == (rows[1:] < 0))
    starts = [0, *(numpy.flatnonzero(~follows) + 1).tolist()]
    ends = [*starts[1:], len(rows)]
    return [(start, end - start, int(rows[start])) for start, end in zip(starts, ends, strict=True)]


def _row_map(runs: Runs, count: int) -> numpy.ndarray:
    rows = numpy.full(count, -1, dtype=numpy.int64)
    for row, length, source in runs:
        if source >= 0:
            rows[row : row + length] = numpy.arange(source, source + length)
    return rows
