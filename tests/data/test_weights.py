"""Files with weights: each row as often as its file's weight says, the same in every epoch, and a resume goes on exactly."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import lines, sft_rows, write_as

from rlhf_core.config.training import TrainerConfig
from rlhf_core.data import DataStream, open_dataset
from rlhf_core.data.open_source import check_paths, has_splits, open_source
from rlhf_core.data.row_source import Cursor
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.training.job import load_job


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows = sft_rows(400)
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines(rows[:300]).replace(b"\n", b"\n\n"))
    return [str(tmp_path / "a.jsonl"), str(write_as(rows[300:], tmp_path / "b", "parquet"))]


def weighted(files, *weights):
    return [{"path": path, "weight": weight} for path, weight in zip(files, weights, strict=True)]


def counts(source) -> list[int]:
    seen = Counter(row.place for row in source.rows())
    return [seen[row.place] for row in open_source([part.name for part in source.sources]).rows()]


def test_whole_weights_repeat_rows(files):
    assert counts(open_source(weighted(files, 2, 1))) == [2] * 300 + [1] * 100
    plain = list(open_source(files).rows())
    assert list(open_source([files[0], {"path": files[1]}]).rows()) == plain
    alone = open_source({"path": files[0], "weight": 1}).rows()
    assert [row.place for row in alone] == [row.place for row in plain[:300]]


@pytest.mark.parametrize("weight", [0.25, 1.5, 2.75])
def test_fractions_take_some_of_the_rows_once_more(files, weight):
    seen = counts(open_source(weighted(files, weight, 1)))
    assert set(seen[:300]) == {int(weight), int(weight) + 1} and set(seen[300:]) == {1}
    # Within four standard deviations of 300 draws.
    assert abs(sum(seen[:300]) - 300 * weight) < 4 * (300 * 0.25) ** 0.5
    assert counts(open_source(weighted(files, weight, 1))) == seen


@pytest.mark.parametrize("weights", [(2, 3), (0.3, 1), (1.5, 0.5), (1, 2.5)])
def test_reading_goes_on_from_any_cursor_between_copies_too(files, weights):
    source = open_source(weighted(files, *weights))
    every = list(source.rows())
    assert [row.index for row in every] == list(range(len(every)))
    for number in range(0, len(every), 7):
        after = Cursor(*json.loads(json.dumps(every[number].after)))
        assert list(itertools.islice(source.rows(after), 5)) == every[number + 1 : number + 6]


def opened(tokenizer, data, **dataset):
    return open_dataset(
        data, "sft", tokenizer, config=TrainerConfig(max_length=64, dataset={"wrap": "none", **dataset})
    )


def test_twins_give_the_same_rows(tiny, files):
    data = weighted(files, 1.5, 2)
    mapped, streamed = opened(tiny, data), opened(tiny, data, streaming=True)
    assert list(mapped) == list(streamed)
    assert mapped.num_rows == streamed.num_rows == len(list(open_source(data).rows()))
    assert mapped.report.files[0]["weight"] == 1.5


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_resumes_between_copies(tiny, files, streaming):
    def stream():
        data = opened(tiny, weighted(files, 2, 0.5), streaming=streaming, shuffle_block=33)
        return DataStream(data, batch_size=20, epochs=2, seed=3)

    first, whole = stream(), [batch.rows for batch in stream()]
    epochs = Counter(itertools.chain(*whole))
    assert set(epochs.values()) == {2}  # Copies have numbers of their own, so both epochs hold the same.
    for step in range(0, len(whole), 5):
        taken = [batch.rows for batch in itertools.islice(first, 5)]
        assert taken == whole[step : step + 5]
        state = json.loads(json.dumps(first.state_dict()))
        first = stream()
        first.load_state_dict(state)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_weights_are_other_data(tiny, files, streaming):
    prints = {
        opened(tiny, weighted(files, *w), streaming=streaming).fingerprint for w in ((1, 1), (2, 1), (1, 1.5), (1.5, 1))
    }
    assert len(prints) == 4
    same = opened(tiny, weighted(files, 1, 1), streaming=streaming).fingerprint
    assert same in prints and same == opened(tiny, files, streaming=streaming).fingerprint


@pytest.mark.parametrize("weight", [0, -1, True, "much", float("nan")])
def test_a_weight_is_a_positive_number(files, weight):
    with pytest.raises(ConfigError, match=r"data\[1\].*weight") as caught:
        open_source([files[1], {"path": files[0], "weight": weight}])
    assert caught.value.exit_code == 2


def test_paths_are_looked_up_under_weights_too(files):
    check_paths(weighted(files, 1, 2))
    with pytest.raises(DataError, match="no such file"):
        check_paths([files[0], {"path": "nowhere/gone.jsonl", "weight": 2}])
    assert has_splits([{"path": "owner/name", "weight": 2}]) and not has_splits(weighted(files, 1, 2))


def test_a_file_flags_and_python_say_the_same(tmp_path, files):
    run = tmp_path / "run.yaml"
    run.write_text(f"method: sft\nmodel: m\ndata: [{{path: {files[0]}, weight: 2}}, {files[1]}]\noutput: o\n")
    first = f"{{path: {files[0]}, weight: 2}}"
    expected = [{"path": files[0], "weight": 2.0}, files[1]]
    flags = ["--model", "m", "--output", "o", "--data"]
    for job in (
        load_job(run),
        load_job("sft", flags=[*flags, first, "--data", files[1]]),
        load_job("sft", flags=[*flags, f"[{first}, {files[1]}]"]),
        load_job("sft", {"model": "m", "output": "o", "data": expected}),
    ):
        assert job.trainer().data == expected == job.resolved()["data"]
    assert load_job("sft", flags=[*flags, first]).trainer().data == expected[:1]
    run.write_text("method: sft\nmodel: m\ndata: [{path: a.jsonl, wieght: 2}]\noutput: o\n")
    with pytest.raises(ConfigError, match="wieght"):
        load_job(run)
