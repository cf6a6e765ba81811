"""Data: records → sources → datasets or streams → typed batches.

`open_dataset` reads and checks rows, `DataStream` cuts them into the windows of optimiser steps, and `collate.collate` makes a
`Batch` of each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.config.training import TrainerConfig
    from rlhf_core.data.base import EncodedData

# Public name → the module that defines it, loaded on first use: torch comes with the datasets.
_PUBLIC = {
    "SFTDataset": "datasets",
    "PreferenceDataset": "datasets",
    "KTODataset": "datasets",
    "GRPODataset": "datasets",
    "StreamingSFTDataset": "streaming",
    "StreamingPreferenceDataset": "streaming",
    "StreamingKTODataset": "streaming",
    "StreamingGRPODataset": "streaming",
    "DataReport": "report",
    "DataStream": "stream",
    "EncodedData": "base",
    "EncodedRow": "encode",
    "Encoder": "encode",
    "open_source": "sources",
}

__all__ = [*_PUBLIC, "open_dataset"]

_BY_RECORD = {
    "sft": "SFTDataset",
    "preference": "PreferenceDataset",
    "unpaired": "KTODataset",
    "prompt": "GRPODataset",
    "reasoning": "GRPODataset",
}


def open_dataset(data: Any, record: str, tokenizer: PreTrainedTokenizerBase, *, config: TrainerConfig) -> EncodedData:
    """Open and check `data` as rows of the record type `record`: map-style, or streaming where the configuration says so.

    Args:
        data: a path, several paths, a hub name, a `datasets` object, or a list of rows.
        record: a name in `rlhf_core.contracts.records.RECORDS`.
        tokenizer: the model's fast tokenizer.
        config: its `max_length` and `dataset` options are used.

    Raises:
        DataError: the data break their record type.
        ConfigError: an option is wrong, or there is no such record type.
        ModelError: the tokenizer lacks what the data need.
    """
    if record not in _BY_RECORD:
        raise ConfigError(f"unknown record `{record}`", place="record", fix=did_you_mean(record, _BY_RECORD))
    name = _BY_RECORD[record]
    kind = __getattr__(f"Streaming{name}" if config.dataset.streaming else name)
    return kind(data, tokenizer, max_length=config.length_limit, options=config.dataset, record=record)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"rlhf_core.data.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_core.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
