"""What map-style and streaming datasets share: how they are opened, and how an epoch of them is read."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rlhf_core.config.training import DatasetConfig
from rlhf_core.data.data_report import DataReport
from rlhf_core.data.encoder import PLAIN, EncodedRow, Encoder, RowOutcome
from rlhf_core.data.mixture import Part, Position, mixture
from rlhf_core.data.open_source import open_source
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class EncodedData(ABC):
    """Rows of one record type as token ids. The order of an epoch's rows is a function of seed and epoch."""

    records: ClassVar[tuple[str, ...]]
    """Record types that the class reads; the first is the default."""
    streaming: ClassVar[bool] = False

    report: DataReport
    """What reading the rows did: counts, truncated and refused rows, warnings."""
    fingerprint: str
    """Content fingerprint of the encoded rows, a hash; a run resumes only where it is the same."""

    def __init__(
        self,
        data: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        options: DatasetConfig | None = None,
        record: str | None = None,
        told: bool = False,
        held_out: bool = False,
    ) -> None:
        """Open `data` and check it.

        Args:
            data: a path, several paths, a hub name, a `datasets` object, or a list of rows (see `open_source`).
            tokenizer: a fast tokenizer; it decides which beginning and end tokens are added.
            max_length: most tokens in a prompt with its longest response.
            options: how rows are read; the defaults where None.
            record: the record type, where the class reads several; the first of them where None.
            told: whether what becomes of plain text was said of other rows of the same run.
            held_out: whether the rows are to be scored, each of them once.

        Raises:
            DataError: the data can't be read, or a row isn't what its record type needs.
            ConfigError: an option doesn't fit the record type or the rows.
            ModelError: the tokenizer lacks what the rows need, such as a chat template.
        """
        self.record = record or self.records[0]
        if self.record not in self.records:
            raise ConfigError(
                f"{type(self).__name__} doesn't read `{self.record}`", fix=f"use {', '.join(self.records)}"
            )
        self.options = options or DatasetConfig()
        self.source = open_source(data, split=self.options.split, streaming=self.streaming, once=held_out)
        self.source_state = self.source.state()
        self.encoder = Encoder.with_options(tokenizer, self.record, self.options, max_length)
        self.report = DataReport(
            self.record,
            self.source.name,
            files=self.source.identity(whole=not self.streaming),
            template_sha256=self.encoder.template.sha256,
        )
        self._read()
        if self.mixed:
            shares = json.dumps(self.source.groups)
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {shares}".encode()).hexdigest()
        if not told:
            self._warn_of_plain_text()

    @abstractmethod
    def _read(self) -> None:
        """Read the rows that are read when the data are opened (all, or a stream's first), and set `fingerprint`."""

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Number of rows in an epoch; None where that isn't known yet."""

    @property
    def mixed(self) -> bool:
        """Whether rows are drawn from parts of the data, each with its share of them."""
        return bool(self.source.groups)

    @abstractmethod
    def walk(
        self, epoch: int, *, seed: int, shuffle: bool, position: Position, parts: Collection[int] | None = None
    ) -> Iterator[tuple[RowOutcome, Position]]:
        """Yield an epoch's rows from a position on, each once, with the position after it.

        A streaming dataset also yields the outcomes of refused rows, to be counted as they are read.

        Args:
            parts: numbers of the parts of `source` whose rows are meant; None for all.
        """

    def draw(
        self, epoch: int, *, seed: int, shuffle: bool, position: Position
    ) -> Iterator[tuple[RowOutcome, Position]]:
        """Yield an epoch's rows in the order of training: as `walk` does, or drawn by their shares, as many as there are rows.

        The position at the end of an epoch of drawn rows is where the next one begins. Where the number of rows isn't known, that
        epoch has no end.
        """
        if not self.mixed:
            yield from self.walk(epoch, seed=seed, shuffle=shuffle, position=position)
            return

        def part(group: int) -> Part:
            _, numbers = self.source.groups[group]
            return lambda again, at: self.walk(again, seed=seed, shuffle=shuffle, position=at, parts=numbers)

        end = None if self.num_rows is None else (epoch + 1) * self.num_rows
        walks = {
            self.source.parts[numbers[0]].name: part(group) for group, (_, numbers) in enumerate(self.source.groups)
        }
        yield from mixture(walks, self.source.shares, seed=seed, position=position, end=end)

    def entry_of(self, index: int) -> str:
        """Return the name of the entry of `data` that the row of that number is of; empty text where there is one entry alone."""
        firsts = {entry["first"]: name for name, entry in self.report.entries.items() if "first" in entry}
        found = max((first for first in firsts if first <= index), default=None)
        return "" if found is None else firsts[found]

    def _warn_of_plain_text(self) -> None:
        """Warn where rows are plain text, there is a chat template, and `dataset.wrap` doesn't say whether to use it."""
        if self.encoder.plain:
            logger.warning("%s: %s", self.source.name, PLAIN, extra={"same_everywhere": True})
        if self.encoder.wrapped and self.options.wrap is None:
            logger.info(
                "%s: text prompts become user turns, as in the model's training (`dataset.wrap`)", self.source.name
            )

    def place_of(self, index: int) -> str:
        """Return where the row of that number is (`file:line`), for messages. Reads the data again up to that row."""
        rows = (row.place for row in self.source.rows() if row.index == index)
        return next(rows, f"row {index}")


def add_to_hash(digest: hashlib._Hash, row: EncodedRow) -> None:
    """Add a row's index, ids, loss masks, prompt and columns to the hash of a fingerprint."""
    columns = f"{row.per_prompt} {row.per_response} {row.prompt} {row.record}"
    digest.update(f"{row.index} {len(row.prompt_ids)} {columns}".encode())
    digest.update(np.asarray(row.prompt_ids, dtype=np.int64).tobytes())
    for ids, mask in zip(row.responses, row.masks, strict=True):
        digest.update(f"{len(ids)}".encode() + np.asarray(ids, dtype=np.int64).tobytes() + bytes(mask))
