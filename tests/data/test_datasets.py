"""The map-style datasets and their streaming twins: the same rows, reports of what was read, real data."""

from __future__ import annotations

import hashlib
import json

import datasets
import pytest
from data_helpers import gsm8k, sft_rows, write_as

import rlhf_core
from rlhf_core.config.training import DatasetConfig, TrainerConfig
from rlhf_core.data import (
    GRPODataset,
    SFTDataset,
    StreamingGRPODataset,
    StreamingSFTDataset,
    open_dataset,
)
from rlhf_core.data.collate import collate
from rlhf_core.data.map_dataset import SMALL
from rlhf_core.infra.errors import ConfigError, DataError

TURNS = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}] * 2
LONG = {"prompt": "p" * 99, "response": "r"}
RECORDS = {
    "sft": [*sft_rows(40), {"messages": TURNS}, {"prompt": TURNS[:1], "response": "c", "id": 1.5}, LONG],
    "preference": [
        *({"prompt": "a", "chosen": f"b{i}", "rejected": f"c{i}" * (i % 40 + 1), "margin": i} for i in range(50)),
        {"prompt": "a", "chosen": "b", "rejected": "b", "margin": 1},
    ],
    "unpaired": [{"prompt": f"a{i}", "response": "b", "label": ("un" * (i % 2)) + "desirable"} for i in range(20)],
    "prompt": [{"prompt": f"a{i}", "tests": {"in": [i, None], "out": 0.1}} for i in range(20)],
    "reasoning": [{"prompt": TURNS[:1], "answer": i, "verifiable": i % 2 == 0} for i in range(20)],
}


def opened(tokenizer, data, record, *, max_length=64, **dataset):
    return open_dataset(data, record, tokenizer, config=TrainerConfig(max_length=max_length, dataset=dataset))


@pytest.mark.parametrize("form", ["list", "jsonl", "gz", "zst", "parquet", "table", "iterable"])
@pytest.mark.parametrize("record", RECORDS)
def test_twins_give_the_same_rows_and_batches(tiny, tmp_path, record, form):
    rows = RECORDS[record]
    if form in ("parquet", "table", "iterable") and record == "sft":
        rows = rows[:40]  # Arrow has one type a column.
    data = rows
    if form in ("table", "iterable"):
        table = datasets.Dataset.from_list(rows)
        data = table if form == "table" else table.to_iterable_dataset()
    elif form != "list":
        data = write_as(rows, tmp_path, form)
    mapped, streamed = opened(tiny, data, record), opened(tiny, data, record, streaming=True)
    assert not mapped.streaming and streamed.streaming
    every = list(streamed)
    assert [mapped[i] for i in range(len(mapped))] == every
    assert streamed.num_rows == mapped.num_rows == len(every)
    assert streamed.report.state_dict() == mapped.report.state_dict()
    left, right = collate(every), collate(mapped.rows(range(len(mapped))))
    assert (
        left.response_ids.equal(right.response_ids) and left.records == right.records and left.prompts == right.prompts
    )
    list(streamed)
    assert streamed.report.rows == len(rows)  # A second pass counts nothing twice.


def test_classes_by_record(tiny):
    kinds = {
        "sft": "SFTDataset",
        "preference": "PreferenceDataset",
        "unpaired": "KTODataset",
        "prompt": "GRPODataset",
        "reasoning": "GRPODataset",
    }
    for record, name in kinds.items():
        assert type(opened(tiny, RECORDS[record], record)) is getattr(rlhf_core, name)
        streamed = opened(tiny, RECORDS[record], record, streaming=True)
        assert type(streamed) is getattr(rlhf_core, f"Streaming{name}")
    assert GRPODataset(RECORDS["reasoning"], tiny, record="reasoning")[0].record["answer"] == 0
    with pytest.raises(ConfigError, match="doesn't read `sft`"):
        StreamingGRPODataset(RECORDS["sft"], tiny, record="sft")


def test_indexing(tiny):
    data = SFTDataset(sft_rows(5), tiny)
    assert len(data) == 5 and data[-1] == data[4] and data.rows([3, 1]) == [data[3], data[1]]
    with pytest.raises(IndexError):
        data[5]
    assert [row.index for row in data] == [0, 1, 2, 3, 4]


def test_report(tiny, jsonl):
    rows = [*sft_rows(3), LONG, {"prompt": "<|end|>", "response": "r" * 99}]
    path = jsonl(rows)
    report = opened(tiny, path, "sft").report.as_dict()
    assert json.loads(json.dumps(report)) == report
    assert (report["rows"], report["kept"], report["truncated"]) == (5, 4, 1)
    assert report["dropped"] == {"the prompt leaves no response token": {"rows": 1, "examples": [f"{path}:4"]}}
    assert report["notes"]["truncated"]["examples"] == [f"{path}:5"]
    assert report["notes"]["control tokens in text, encoded as text"]["examples"] == [f"{path}:5"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["files"] == [{"name": str(path), "bytes": path.stat().st_size, "sha256": digest}]
    assert report["template_sha256"] == hashlib.sha256(tiny.chat_template.encode()).hexdigest()
    assert report["loss_tokens"] == report["response_tokens"] > 0


def test_examples_are_few(tiny):
    data = opened(tiny, [*sft_rows(1), *[LONG] * 50], "sft")
    dropped = data.report.dropped["the prompt leaves no response token"]
    assert dropped["rows"] == 50 and len(dropped["examples"]) == 5


@pytest.mark.parametrize("caching", [False, True])
def test_large_data_go_to_a_file(tiny, caching):
    rows = [{"prompt": f"a{i}", "response": "b"} for i in range(SMALL // 1024 + 1)]
    if not caching:
        datasets.disable_caching()
    try:
        large = SFTDataset(rows, tiny)
    finally:
        datasets.enable_caching()
    small = SFTDataset(rows[:-1], tiny)
    assert large.table.cache_files and not small.table.cache_files
    assert list(large)[:-1] == list(small) and large[-1].index == len(small)


def test_fingerprint_tells_data_tokenizer_and_options_apart(tiny, bpe):
    rows = sft_rows(5)
    for kind in (SFTDataset, StreamingSFTDataset):
        same = kind(rows, tiny).fingerprint
        assert same == kind([dict(row) for row in rows], tiny).fingerprint
        others = [
            kind(rows[:4], tiny),
            kind(rows[::-1], tiny),
            kind(rows, bpe),
            kind(rows, tiny, max_length=8),
        ]
        assert len({same, *(other.fingerprint for other in others)}) == 5


def test_streaming_checks_the_first_rows_when_opened(tiny, jsonl):
    with pytest.raises(DataError, match="no column `response`"):
        StreamingSFTDataset(jsonl([{"prompt": "a"}]), tiny)


def test_streaming_reads_no_more_than_it_needs(tiny, jsonl):
    good = sft_rows(200)
    path = jsonl([*good, {"prompt": "a"}])
    rows = iter(StreamingSFTDataset(path, tiny, options=DatasetConfig(shuffle_block=10)))
    assert [next(rows).index for _ in range(190)] == list(range(190))
    with pytest.raises(DataError, match=r"rows\.jsonl:201: no column `response`"):
        list(rows)


def test_streaming_finds_at_the_end_of_a_pass_what_only_a_pass_can_tell(tiny):
    one = [{"prompt": "a", "response": "b", "label": "desirable"}] * 3
    with pytest.raises(DataError, match="no row has the label `undesirable`"):
        list(opened(tiny, one, "unpaired", streaming=True))
    with pytest.raises(DataError, match="none of 2 rows"):
        list(opened(tiny, [LONG] * 2, "sft", streaming=True))
    with pytest.raises(DataError, match="leaves no response token"):
        list(opened(tiny, [*sft_rows(2), LONG], "sft", streaming=True, strict=True))


@pytest.mark.parametrize(
    ("file", "record", "rows"),
    [
        pytest.param("sft", "sft", 7473, marks=pytest.mark.slow),
        ("preferences", "preference", 1260),
        ("unpaired", "unpaired", 2800),
        ("test_prompts", "reasoning", 200),
    ],
)
def test_gsm8k(bpe, file, record, rows):
    path = gsm8k() / f"{file}.jsonl"
    mapped = opened(bpe, path, record, max_length=4096)
    assert len(mapped) == rows and mapped.report.dropped == {} and mapped.report.truncated == 0
    streamed = opened(bpe, path, record, max_length=4096, streaming=True)
    for row, other, _ in zip(mapped, streamed, range(200), strict=False):
        assert row == other
    with path.open() as file:
        first = json.loads(next(file))
    assert bpe.decode(mapped[0].prompt_ids) == first["prompt"]
    for text, ids in zip(
        [first[name] for name in ("response", "chosen", "rejected") if name in first], mapped[0].responses, strict=True
    ):
        assert bpe.decode(ids) == text + "<|im_end|>"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_has_a_place_by_its_number(tiny, tmp_path, streaming):
    paths = [write_as(sft_rows(3), tmp_path, "jsonl"), write_as(sft_rows(2), tmp_path, "parquet")]
    data = (StreamingSFTDataset if streaming else SFTDataset)(list(map(str, paths)), tiny)
    assert [data.place_of(index) for index in (1, 3)] == [f"{paths[0]}:2", f"{paths[1]}:row 1"]
    assert data.place_of(9) == "row 9"
