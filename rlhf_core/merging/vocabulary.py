"""Vocabularies that differ, aligned by the tokens' text: each row of the embeddings is merged with those of the same token.

A token that an input lacks takes no part there: it has the base's row, so that its difference is zero, or, where the base lacks
it too, the mean of the inputs that have it. Rows without a token (padding) are aligned by number and never dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.files import read_json
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.tensor_names import has_token_rows
from rlhf_core.merging.tensor_reader import TensorReader

TOKENIZER = "tokenizer.json"

RowMap = numpy.ndarray
"""For each row of the result that of an input, or -1 where the input has none; (rows,) int64."""


@dataclass(frozen=True)
class Vocabularies:
    """How the rows of each input's embeddings become those of the result; without effect where all inputs agree."""

    rows: int | None = None
    """Rows of the result's embeddings, where they are aligned."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """The result's vocabulary, where rows are aligned: token → row."""
    tokenizer: dict[str, Any] | None = None
    """The result's tokenizer.json, where it is that of no input."""
    origin: Path | None = None
    """The tokenizer.json that the result's tokenizer is taken from, where the alignment decided it."""
    maps: Sequence[tuple[InputModel, RowMap]] = ()
    """The inputs in the order in which one fills another's gaps, and where each has the result's rows."""
    based: bool = False
    """Whether the first of them is a base, which fills the gaps alone where it has the row."""

    @classmethod
    def align(
        cls,
        base: InputModel | None,
        models: Sequence[InputModel],
        wanted: str | None,
        names: set[str],
        multiple: int | None = None,
    ) -> Vocabularies:
        """Compare the inputs' vocabularies, and align them as `wanted` says where they differ.

        Args:
            base: the base, where there is one.
            models: the merged models.
            wanted: whose tokens the result has: `base`, `union`, or a path.
            names: the tensors that are merged.
            multiple: the result's rows are a multiple of this.

        Raises:
            ModelError: they differ and `wanted` is None, or an input has no tokenizer.json.
            ConfigError: `wanted` has no meaning, since no tensor has a row per token.
        """
        inputs = [*([base] if base is not None else []), *models]
        tables = [name for name in sorted(names) if _has_token_rows(name, inputs)]
        if not tables:
            _refuse_without_tables(wanted, multiple)
            return cls()
        given = [_InputVocabulary.of(one, tables) for one in inputs if not one.tensors.keys().isdisjoint(tables)]
        path = None if wanted in (None, "base", "union") else Path(str(wanted)).expanduser()
        fits = path is None and len({one.rows for one in given}) == 1 and given[0].rows % (multiple or 1) == 0
        if fits and len({one.file.read_bytes() for one in given if one.file is not None}) <= 1:
            return cls()  # the usual case, in which no tokenizer is read
        known = [one.tokens for one in given if one.tokens]
        alike = all(one == known[0] for one in known) and len({one.rows for one in given}) == 1
        if alike and fits:
            return cls()
        if wanted is None and not alike:
            raise _difference(given)
        return cls._by_text(given, path or wanted, multiple or 1, based=base is not None)

    @classmethod
    def _by_text(
        cls, inputs: Sequence[_InputVocabulary], wanted: str | Path | None, multiple: int, *, based: bool
    ) -> Vocabularies:
        """Return the alignment of rows by their tokens' text.

        Args:
            wanted: as for `align`.
            multiple: the result's rows are a multiple of this.
            based: whether the first input is a base.

        Raises:
            ModelError: an input has no tokenizer.json, or none can be made for the result.
        """
        if lacking := [one.model for one in inputs if one.tokenizer is None]:
            raise ModelError(
                "vocabularies are aligned by the tokens' text, and there is no tokenizer.json", place=lacking[0].name
            )
        tokenizers = [one.tokenizer for one in inputs if one.tokenizer is not None]
        target, tokenizer, origin = _target([one.model for one in inputs], tokenizers, wanted, based=based)
        # Rows without a token are never dropped; rows of tokens that the result doesn't have are.
        padded = [one.rows for one in inputs if one.rows > 1 + max(one.tokens.values())]
        count = max([1 + max(target.values()), *padded, *(one.rows for one in inputs[: int(based)])])
        count = -(-count // multiple) * multiple
        maps = [(one.model, _row_map(target, count, one.tokens, one.rows)) for one in inputs]
        # Models fill each other's gaps in an order that isn't the one in which they were given.
        maps[int(based) :] = sorted(maps[int(based) :], key=lambda pair: pair[0].fingerprint)
        return cls(count, target, tokenizer, origin, maps, based)

    def fingerprint(self) -> list[object]:
        """Return what the rows of the result depend on besides the inputs, as JSON values."""
        hashes = [hashlib.sha256(rows.tobytes()).hexdigest() for _, rows in self.maps]
        return [self.rows, sorted(self.tokens.items()), hashes]

    def renumbered(self, one: InputModel, number: Any) -> Any:
        """Return the row in the result of a token that an input knows by a number; of a list of numbers their rows."""
        if isinstance(number, list):
            return [self.renumbered(one, item) for item in number]
        file = one.find_file(TOKENIZER)
        if self.rows is None or not isinstance(number, int) or file is None:
            return number
        text = next((text for text, row in _TokenizerFile.read(file).tokens.items() if row == number), None)
        return self.tokens.get(text, number) if text is not None else number

    def aligned(self, name: str, one: InputModel) -> TensorReader | None:
        """Return a tensor of an input, its rows aligned where need be; None where the input takes no part in it."""
        plain = one.tensors.get(name)
        if plain is None or self.rows is None or not _has_token_rows(name, [one for one, _ in self.maps]):
            return plain
        filling = [(other.tensors[name], rows) for other, rows in self.maps if name in other.tensors]
        own = next(rows for other, rows in self.maps if other is one)
        return AlignedTensor(plain, own, filling, based=self.based)


class AlignedTensor(TensorReader):
    """An input's embeddings with their rows in the order of the result.

    Args:
        plain: the embeddings as they are, (rows of the input, columns).
        rows: where the input has each row of the result.
        filling: the same of all inputs, from which a row that the input lacks is taken: from the first where `based` and it has
            the row, else the mean of all that have it.
        based: whether the first of `filling` is a base.
    """

    def __init__(
        self, plain: TensorReader, rows: RowMap, filling: Sequence[tuple[TensorReader, RowMap]], *, based: bool
    ) -> None:
        super().__init__(plain.place, (len(rows), *plain.shape[1:]), plain.dtype)
        self._plain, self._rows, self._filling, self._based = plain, rows, filling, based

    def read(self, start: int, stop: int, out: Tensor) -> None:
        columns = self.shape[1]
        first, last = start // columns, -(-stop // columns)
        if (start, stop) != (first * columns, last * columns):
            whole = torch.empty((last - first) * columns)
            self.read(first * columns, last * columns, whole)
            out.copy_(whole[start - first * columns : stop - first * columns])
            return
        table = out.view(-1, columns)
        for row, count, source in _runs(self._rows[first:last]):
            if source >= 0:
                self._plain.read(source * columns, (source + count) * columns, table[row : row + count].view(-1))
                continue
            for missing in range(row, row + count):
                self._fill(first + missing, table[missing])

    def _fill(self, row: int, out: Tensor) -> None:
        having = [(tensor, int(rows[row])) for tensor, rows in self._filling if rows[row] >= 0]
        if self._based and self._filling[0][1][row] >= 0:
            having = having[:1]
        total, part = torch.zeros_like(out), torch.empty_like(out)
        for tensor, place in having:
            tensor.read(place * len(out), (place + 1) * len(out), part)
            total.add_(part)
        out.copy_(total.div_(max(1, len(having))))


def same_tokens(one: InputModel, other: InputModel) -> bool:
    """Tell whether two models number the same tokens alike, as far as their files say."""
    first, second = one.find_file(TOKENIZER), other.find_file(TOKENIZER)
    if first is None or second is None or first == second:
        return True
    return _TokenizerFile.read(first).tokens == _TokenizerFile.read(second).tokens


def _has_token_rows(name: str, inputs: Sequence[InputModel]) -> bool:
    return any(name in one.tensors and has_token_rows(name, one.tensors[name]) for one in inputs)


@dataclass(frozen=True)
class _TokenizerFile:
    """What a tokenizer.json says of its vocabulary."""

    file: Path
    pieces: Mapping[str, int]
    """The pieces that text is split into: token → row."""
    added: Mapping[str, dict[str, Any]]
    """Tokens that are matched as a whole, with their flags."""

    @cached_property
    def tokens(self) -> dict[str, int]:
        return dict(self.pieces) | {text: int(flags["id"]) for text, flags in self.added.items()}

    @classmethod
    def read(cls, file: Path) -> _TokenizerFile:
        try:
            document = read_json(file)
            vocabulary = document["model"]["vocab"]
            if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
                vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
            added = {token["content"]: token for token in document.get("added_tokens") or []}
            found = cls(file, vocabulary, added)
            found.tokens  # noqa: B018  # a number that is missing raises here
            return found
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ModelError(
                "tokenizer.json can't be read", place=str(file), got=f"{type(error).__name__}: {error}"
            ) from None


@dataclass(frozen=True)
class _InputVocabulary:
    """An input's tokens, and the rows that it has for them."""

    model: InputModel
    rows: int
    """Rows of its embeddings."""
    file: Path | None
    """Its tokenizer.json, where it has one."""

    @classmethod
    def of(cls, model: InputModel, tables: Sequence[str]) -> _InputVocabulary:
        """Return the vocabulary of an input that has one of `tables`, tensors with a row per token."""
        rows = next(model.tensors[name].shape[0] for name in tables if name in model.tensors)
        return cls(model, rows, model.find_file(TOKENIZER))

    @cached_property
    def tokenizer(self) -> _TokenizerFile | None:
        return _TokenizerFile.read(self.file) if self.file is not None else None

    @property
    def tokens(self) -> Mapping[str, int]:
        """Token → row; empty without a tokenizer.json."""
        return self.tokenizer.tokens if self.tokenizer is not None else {}


def _refuse_without_tables(wanted: str | None, multiple: int | None) -> None:
    """Raise where options of the vocabulary are given, and no tensor has a row per token."""
    if wanted is not None or multiple is not None:
        raise ConfigError(
            "no tensor is known to have a row for each token",
            place="tokenizer" if wanted is not None else "pad_to_multiple_of",
            got=wanted or multiple,
            fix="leave it out",
        )


def _difference(inputs: Sequence[_InputVocabulary]) -> ModelError:
    """Return the error of two inputs whose vocabularies differ."""
    first = next((one for one in inputs if one.tokens), inputs[0])
    other = next(one for one in inputs if one.rows != first.rows or (one.tokens and one.tokens != first.tokens))
    detail = f"{len(first.tokens)} tokens in {first.rows} rows, and {len(other.tokens)} in {other.rows}"
    if (len(first.tokens), first.rows) == (len(other.tokens), other.rows):
        token = next(text for text, row in first.tokens.items() if other.tokens.get(text) != row)
        detail += f"; token {token!r} is number {first.tokens[token]} and {other.tokens.get(token, 'none')}"
    return ModelError(
        f"its vocabulary differs from that of {first.model.name}",
        place=other.model.name,
        got=detail,
        fix="set `tokenizer` to `base`, `union` or a path: rows are then aligned by the tokens' text",
    )


def _target(
    inputs: Sequence[InputModel], tokenizers: Sequence[_TokenizerFile], wanted: str | Path | None, *, based: bool
) -> tuple[dict[str, int], dict[str, Any] | None, Path]:
    """Return the result's vocabulary, its tokenizer.json where no input has it, and the tokenizer.json that it is taken from."""
    if isinstance(wanted, Path):
        file = wanted if wanted.is_file() else wanted / TOKENIZER
        if not file.is_file():
            raise ConfigError("no tokenizer.json is there", place="tokenizer", got=str(wanted))
        return _TokenizerFile.read(file).tokens, None, file
    # Numbers of tokens are the base's, else those of the longest vocabulary, whatever the order of the models.
    sizes = [(len(one.tokens), model.fingerprint) for one, model in zip(tokenizers, inputs, strict=True)]
    main = 0 if based else sizes.index(max(sizes))
    target, file = dict(tokenizers[main].tokens), tokenizers[main].file
    if wanted != "union":
        return target, None, file
    for model, own in zip(inputs, tokenizers, strict=True):
        if (lacking := sorted(set(own.pieces) - set(target))) and set(own.pieces) != set(tokenizers[main].pieces):
            raise ModelError(
                f"splits text into other pieces than {inputs[main].name}, and no tokenizer splits it as both do",
                place=model.name,
                got=f"{len(lacking)} pieces more, such as {lacking[0]!r}",
                fix="set `tokenizer` to `base` or a path",
            )
    more = sorted({text for own in tokenizers for text in own.added} - set(target))
    if not more:
        return target, None, file
    target |= {text: number for number, text in enumerate(more, 1 + max(target.values()))}
    flags = {text: next(own.added[text] for own in tokenizers if text in own.added) for text in more}
    document: dict[str, Any] = read_json(file)
    added = [*(document.get("added_tokens") or []), *({**flags[text], "id": target[text]} for text in more)]
    return target, document | {"added_tokens": added}, file


def _row_map(target: Mapping[str, int], count: int, own: Mapping[str, int], size: int) -> RowMap:
    """Return where each of the result's `count` rows is in an input with `size` rows and the tokens `own`."""
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
    return rows


def _runs(rows: RowMap) -> Iterator[tuple[int, int, int]]:
    """Yield rows that can be read at once: the first, how many, and the first one's row in the input, or -1."""
    follows = numpy.where(rows[1:] < 0, rows[:-1] < 0, rows[1:] == rows[:-1] + 1) & ((rows[:-1] < 0) == (rows[1:] < 0))
    starts = [0, *(numpy.flatnonzero(~follows) + 1).tolist()] if len(rows) else []
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=False):
        yield start, end - start, int(rows[start])
