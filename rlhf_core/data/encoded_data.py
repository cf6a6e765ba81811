"""What map-style and streaming datasets share: how they are opened, walked epoch by epoch, and checked."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rlhf_core.config.training import DatasetConfig
from rlhf_core.data.data_report import DataReport
from rlhf_core.data.encoder import PLAIN, EncodedRow, Encoder, RowOutcome
from rlhf_core.data.open_source import open_source
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Position = list[Any]
"""Where in an epoch a walk stands, as JSON values. Empty at its beginning."""


class EncodedData(ABC):
    """Rows of one record type as token ids, walked epoch by epoch in an order that is a function of the seed."""

    records: ClassVar[tuple[str, ...]]
    """The record types that it reads; the first is the default."""
    streaming: ClassVar[bool] = False

    report: DataReport
    fingerprint: str
    """Hash of the data as they are encoded; a stream resumes on the same only."""

    def __init__(
        self,
        data: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        options: DatasetConfig | None = None,
        record: str | None = None,
    ) -> None:
        """Open `data` (see `sources.open_source`) and check it.

        Args:
            data: a path, several paths, a hub name, a `datasets` object, or a list of rows.
            tokenizer: a fast tokenizer; its own conventions say which beginning and end tokens there are.
            max_length: most tokens in a prompt with its response.
            options: how rows are read; the defaults where None.
            record: which record type, where the class reads more than one.

        Raises:
            DataError: the data break their record type.
        """
        self.record = record or self.records[0]
        if self.record not in self.records:
            raise ConfigError(
                f"{type(self).__name__} doesn't read `{self.record}`", fix=f"use {', '.join(self.records)}"
            )
        self.options = options or DatasetConfig()
        self.source = open_source(data, split=self.options.split, streaming=self.streaming)
        self.source_state = self.source.state()
        self.encoder = Encoder(
            tokenizer,
            self.record,
            max_length=max_length,
            truncation=self.options.truncation,
            chat_template=self.options.chat_template,
            columns=self.options.columns,
            format=self.options.format,
            ignored=self.options.ignore_columns,
            wrap=self.options.wrap,
            special_tokens=self.options.special_tokens,
            turns=self.options.turns,
        )
        self.report = DataReport(
            self.record,
            self.source.name,
            files=self.source.identity(whole=not self.streaming),
            template_sha256=self.encoder.template.sha256,
        )
        self._read()
        self._warn_of_plain_text()

    @abstractmethod
    def _read(self) -> None:
        """Read and check what is read when the data are opened, and set the fingerprint."""

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Rows that an epoch yields; None where that isn't known yet."""

    @abstractmethod
    def walk(
        self, epoch: int, *, seed: int, shuffle: bool, position: Position
    ) -> Iterator[tuple[RowOutcome, Position]]:
        """Yield an epoch's rows from a position on, each with the position after it.

        A stream yields what it refuses too, to be counted when it is met.
        """

    def _warn_of_plain_text(self) -> None:
        """Warn where the rows read so far are plain text, the model has a chat template, and nobody said which is meant."""
        if self.encoder.plain:
            logger.warning("%s: %s", self.source.name, PLAIN)
        if self.encoder.wrapped and self.options.wrap is None:
            logger.info(
                "%s: text prompts are the user's turns, as in the model's training (`dataset.wrap`)", self.source.name
            )

    def place_of(self, index: int) -> str:
        """Return what a message calls the row of that number: `file:line`.

        Rows don't carry it, so the data are read again up to there.
        """
        rows = (row.place for row in self.source.rows() if row.index == index)
        return next(rows, f"row {index}")


def add_to_hash(digest: hashlib._Hash, row: EncodedRow) -> None:
    """Let a row's index, ids, masks, prompt and columns count in a fingerprint."""
    columns = f"{row.per_prompt} {row.per_response} {row.prompt} {row.record}"
    digest.update(f"{row.index} {len(row.prompt_ids)} {columns}".encode())
    digest.update(np.asarray(row.prompt_ids, dtype=np.int64).tobytes())
    for ids, mask in zip(row.responses, row.masks, strict=True):
        digest.update(f"{len(ids)}".encode() + np.asarray(ids, dtype=np.int64).tobytes() + bytes(mask))
