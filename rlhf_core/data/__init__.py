"""Data: rows of files, the hub or memory → checked and tokenised datasets → batches.

`open_dataset` reads, checks and encodes rows, `DataStream` divides them into the windows of optimiser steps, and
`collate.collate` makes a `Batch` of each window.
"""

from rlhf_core.infra.lazy import lazy_names

# Loaded on first use: torch comes with the datasets.
__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.data.data_report": "DataReport",
        "rlhf_core.data.data_stream": "DataStream",
        "rlhf_core.data.data_survey": "DataSurvey survey_data",
        "rlhf_core.data.encoded_data": "EncodedData",
        "rlhf_core.data.encoder": "EncodedRow Encoder",
        "rlhf_core.data.open_source": "open_source",
        "rlhf_core.data.record_datasets": "GRPODataset KTODataset PreferenceDataset SFTDataset StreamingGRPODataset"
        " StreamingKTODataset StreamingPreferenceDataset StreamingSFTDataset open_dataset",
    },
)
