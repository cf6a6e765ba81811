"""Addresses on the hub: what they name, and that files are read as local ones are; the hub itself is a stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from data_helpers import lines

from rlhf_core.data.hub_files import parse_hub_url
from rlhf_core.data.open_source import check_paths, has_splits, open_source
from rlhf_core.infra.errors import DataError


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, bytes]:
    """Files of `acme/sums` on a hub that is a folder."""
    files = {
        "README.md": b"# sums",
        "data/a.jsonl": lines([{"prompt": "a", "response": "1"}]),
        "data/b.jsonl": lines([{"prompt": "b", "response": "2"}]),
        "test.csv": b"prompt,response\nc,3\n",
    }
    asked = []

    def download(repo_id, filename, *, repo_type, revision):
        assert (repo_id, repo_type) == ("acme/sums", "dataset")
        asked.append((filename, revision))
        if filename not in files:
            raise huggingface_hub.errors.EntryNotFoundError(f"404: no {filename}")
        path = tmp_path / "cache" / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[filename])
        return str(path)

    monkeypatch.setattr("rlhf_core.data.hub_files.ask_hub", lambda name, kind: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo_id, **_: sorted(files))
    files["asked"] = asked
    yield files
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def prompts(data, **options):
    return [row.values["prompt"] for row in open_source(data, **options).rows()]


def test_files_are_downloaded_and_read_as_local_ones(hub):
    asked = hub.pop("asked")
    assert prompts("hf://datasets/acme/sums/data/a.jsonl") == ["a"]
    assert prompts("hf://datasets/acme/sums@v2/test.csv", streaming=True) == ["c"]
    assert asked == [("data/a.jsonl", None), ("test.csv", "v2")]
    source = open_source(
        [{"path": "hf://datasets/acme/sums/data/*.jsonl", "share": 0.5}, "hf://datasets/acme/sums/test.csv"]
    )
    assert [Path(one.name).name for one in source.sources] == ["a.jsonl", "b.jsonl", "test.csv"]
    assert source.shares == [0.5, 0.5]


def test_an_address_without_a_file_is_a_hub_name(monkeypatch):
    given = []

    def load(name, config=None, *, split, streaming, revision=None):
        given.append((name, config, split, revision))
        return datasets.Dataset.from_list([{"prompt": split, "response": "r"}])

    monkeypatch.setattr("rlhf_core.data.open_source.ask_hub", lambda name, kind: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = [
        "hf://datasets/acme/sums",
        {"path": "hf://datasets/acme/sums@main:hard", "split": "extra"},
        "acme/sums:main",
    ]
    check_paths(data)
    assert has_splits(data)
    assert prompts(data, split="test") == ["test", "extra", "test"]
    assert given == [
        ("acme/sums", None, "test", None),
        ("acme/sums", "hard", "extra", "main"),
        ("acme/sums", "main", "test", None),
    ]


def test_what_is_wrong_is_said(hub):
    hub.pop("asked")
    check_paths("hf://datasets/acme/sums/data/a.jsonl")  # looks nothing up
    for url in (
        "hf://acme/sums",
        "hf://models/acme/sums",
        "hf://datasets/acme",
        "hf://datasets/acme/sums:main/a.jsonl",
    ):
        with pytest.raises(DataError, match="not an address of a dataset") as caught:
            check_paths(url)
        assert "hf://datasets/OWNER/NAME" in str(caught.value)
    with pytest.raises(DataError, match="404"):
        prompts("hf://datasets/acme/sums/gone.jsonl")
    with pytest.raises(DataError, match=r"matches no file.*data/a\.jsonl"):
        prompts("hf://datasets/acme/sums/data/*.parquet")
    with pytest.raises(DataError, match="unknown kind of file"):
        prompts("hf://datasets/acme/sums/README.md")


def test_parts_of_an_address():
    assert parse_hub_url("hf://datasets/a/b@r/x/y.jsonl") == ("a/b", "r", None, "x/y.jsonl")
    assert parse_hub_url("hf://datasets/a/b:c/") == ("a/b", None, "c", None)
