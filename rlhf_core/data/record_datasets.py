"""A map-style and a streaming dataset for each record type, and the function that opens the right one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.data.encoded_data import EncodedData
from rlhf_core.data.map_dataset import MapDataset
from rlhf_core.data.streaming_dataset import StreamingDataset
from rlhf_core.infra.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.config.training import TrainerConfig


class SFTDataset(MapDataset):
    """Prompts with the response to imitate, or conversations."""

    records: ClassVar[tuple[str, ...]] = ("sft",)


class PreferenceDataset(MapDataset):
    """Prompts with two responses each, chosen and rejected, in that order."""

    records: ClassVar[tuple[str, ...]] = ("preference",)


class KTODataset(MapDataset):
    """Prompts with one response each, desirable or not (column `desirable` of the batch)."""

    records: ClassVar[tuple[str, ...]] = ("unpaired",)


class GRPODataset(MapDataset):
    """Prompts to sample completions for, with the columns that a reward needs."""

    records: ClassVar[tuple[str, ...]] = ("prompt", "reasoning")


class StreamingSFTDataset(StreamingDataset):
    """`SFTDataset`, read as rows are needed."""

    records = SFTDataset.records


class StreamingPreferenceDataset(StreamingDataset):
    """`PreferenceDataset`, read as rows are needed."""

    records = PreferenceDataset.records


class StreamingKTODataset(StreamingDataset):
    """`KTODataset`, read as rows are needed."""

    records = KTODataset.records


class StreamingGRPODataset(StreamingDataset):
    """`GRPODataset`, read as rows are needed."""

    records = GRPODataset.records


_MAP_STYLE = (SFTDataset, PreferenceDataset, KTODataset, GRPODataset)
_STREAMING = (StreamingSFTDataset, StreamingPreferenceDataset, StreamingKTODataset, StreamingGRPODataset)


def open_dataset(
    data: Any,
    record: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: TrainerConfig,
    told: bool = False,
    held_out: bool = False,
) -> EncodedData:
    """Open and check `data` as rows of the record type `record`: map-style, or streaming where the configuration says so.

    Args:
        data: a path, several paths, a hub name, a `datasets` object, or a list of rows.
        record: a name in `rlhf_core.contracts.records.RECORDS`.
        tokenizer: the model's fast tokenizer.
        config: its `max_length` and `dataset` options are used.
        told: whether what becomes of plain text was said of other rows of the same run.
        held_out: whether the rows are to be scored, each of them once.

    Raises:
        DataError: a row isn't what its record type needs.
        ConfigError: an option is wrong, or there is no such record type.
        ModelError: the tokenizer lacks what the rows need, such as a chat template.
    """
    classes = {name: kind for kind in (_STREAMING if config.dataset.streaming else _MAP_STYLE) for name in kind.records}
    if record not in classes:
        raise ConfigError(f"unknown record type `{record}`", place="record", fix=did_you_mean(record, classes))
    return classes[record](
        data,
        tokenizer,
        max_length=config.length_limit,
        options=config.dataset,
        record=record,
        told=told,
        held_out=held_out,
    )
