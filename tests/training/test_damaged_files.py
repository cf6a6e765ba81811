"""Whatever is wrong with the files of a run is named, and a damaged checkpoint gives way to the one before."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import ROWS, toy

from rlhf_core.infra.errors import ModelError, RLHFError, StorageError
from rlhf_core.infra.files import read_json, to_json
from rlhf_core.training.checkpoint import CheckpointManager

OPTIONS: dict[str, Any] = {"checkpoint": {"every": 2}, "max_steps": 4, "eval_rows": ROWS[:8]}


@pytest.fixture(scope="module", params=["map", "streaming"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("whole")
    toy(output, dataset={"streaming": request.param == "streaming"}, **OPTIONS).train()
    return output


@pytest.fixture
def resume(run: Path, tmp_path: Path) -> Callable[[], Any]:
    """Return what resumes a copy of the run, which lies at `tmp_path`."""

    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    streaming = bool(read_json(run / "checkpoints" / "step-4" / "state.json")["ranks"][0]["stream"]["report"])
    return lambda: toy(tmp_path, dataset={"streaming": streaming}, **OPTIONS).train(resume=True)


def events(output: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (output / "events.jsonl").read_text().splitlines()]


DEEP = b"[" * 100_000 + b"]" * 100_000
MANIFESTS: dict[str, bytes | Callable[[dict[str, Any]], Any]] = {
    "nested 100,000 deep": DEEP,
    "a list": b"[]",
    "a number": b"1e999",
    "null": b"null",
    "a list for a map": lambda m: {**m, "files": [m["files"]]},
    "a list for a record": lambda m: {**m, "files": {name: [1] for name in m["files"]}},
    "a number for a record": lambda m: {**m, "files": dict.fromkeys(m["files"], 3)},
    "numbers for hashes": lambda m: {**m, "files": {n: {"sha256": 3, "bytes": 3} for n in m["files"]}},
    "text for bytes": lambda m: {**m, "files": {n: {"sha256": "", "bytes": "3"} for n in m["files"]}},
    "huge numbers": lambda m: {
        **m,
        "step": 10**4000,
        "files": {n: {"sha256": "", "bytes": 10**4000} for n in m["files"]},
    },
    "nested files": lambda m: {**m, "files": {"state.json": m["files"]}},
    "no state": lambda m: {**m, "files": {n: r for n, r in m["files"].items() if n != "state.json"}},
    "other names": lambda m: {**m, "files": {"../state.json": m["files"]["state.json"]}},
    "not UTF-8": b"\xff\xfe{",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_of_any_shape_falls_back(tmp_path: Path, resume: Callable[[], Any], kind: str) -> None:
    path = tmp_path / "checkpoints" / "step-4" / "manifest.json"
    damage = MANIFESTS[kind]
    path.write_bytes(damage if isinstance(damage, bytes) else to_json(damage(read_json(path))))
    assert resume().step == 4
    assert "checkpoint_damaged" in events(tmp_path) and (tmp_path / "checkpoints" / "step-4.damaged").is_dir()


def rewrite_state(checkpoint: Path, content: bytes) -> None:
    """Put other content into a checkpoint's state, of the hash that its manifest says."""
    (checkpoint / "state.json").write_bytes(content)
    manifest = read_json(checkpoint / "manifest.json")
    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (checkpoint / "manifest.json").write_bytes(to_json(manifest))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in some JSON, long lists of numbers cut short."""
    if isinstance(value, dict):
        return [path, *(p for key, item in value.items() for p in places(item, (*path, key)))]
    if isinstance(value, list):
        return [path, *(p for index, item in enumerate(value[:3]) for p in places(item, (*path, index)))]
    return [path]


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


FREE = {("optimizer",), ("ranks", 0, "trainer"), ("ranks", 0, "trainer", "windows")}
"""What may be anything of its type; and the method's own state, which only the method knows."""


@pytest.mark.slow
def test_a_state_of_any_shape_falls_back(run: Path, tmp_path: Path) -> None:
    """Every value of `state.json` in turn becomes one of another type, under a hash that fits."""

    whole = read_json(run / "checkpoints" / "step-4" / "state.json")
    streaming = bool(whole["ranks"][0]["stream"]["report"])
    tried = 0
    for path in places(whole):
        if any(path[: len(free)] == free for free in FREE) or (
            path[:2] == ("progress", "metrics") or path[:4] == ("ranks", 0, "stream", "report")
        ):
            continue
        output = tmp_path / str(tried)
        shutil.copytree(run, output)
        rewrite_state(output / "checkpoints" / "step-4", to_json(replaced(whole, path, [{"no": "such"}])))
        trainer = toy(output, dataset={"streaming": streaming}, **OPTIONS)
        assert trainer.train(resume=True).step == 4, path
        assert "checkpoint_damaged" in events(output), path
        tried += 1
        shutil.rmtree(output)
    assert tried > 30


@pytest.mark.parametrize(
    "content", [DEEP, b"[]", b"null", b"{}", b'{"progress": 3}', b"\xff"], ids=str.__name__ and repr
)
def test_a_state_that_is_none_falls_back(tmp_path: Path, resume: Callable[[], Any], content: bytes) -> None:
    rewrite_state(tmp_path / "checkpoints" / "step-4", content)
    assert resume().step == 4 and "checkpoint_damaged" in events(tmp_path)


NAMES = st.sampled_from(["format", "step", "files", "state.json", "sha256", "bytes", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(value=JSON, raw=st.binary(max_size=64), use_raw=st.booleans())
def test_no_manifest_ends_in_another_fault(tmp_path: Path, value: Any, raw: bytes, use_raw: bool) -> None:

    import torch

    directory = tmp_path / "fuzz"
    shutil.rmtree(directory, ignore_errors=True)
    manager = CheckpointManager(directory)
    manager.save(1, {"model": {"a": torch.zeros(2)}}, {})
    manager.save(2, {"model": {"a": torch.zeros(2)}}, {})
    (directory / "step-2" / "manifest.json").write_bytes(raw if use_raw else to_json(value))
    checkpoint = manager.load_latest()
    assert checkpoint is not None and checkpoint.step == 1


def test_a_number_of_too_many_digits_is_reported_in_our_words(tmp_path: Path, resume: Callable[[], Any]) -> None:
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-{step}" / "manifest.json").write_bytes(b'{"step": ' + b"9" * 5000 + b"}")
    with pytest.raises(ModelError, match=r"got step 4: a number has 5,000 digits \|") as caught:
        resume()
    assert "limit" not in str(caught.value)


def test_nothing_to_fall_back_to_is_a_fault_of_the_model(tmp_path: Path, resume: Callable[[], Any]) -> None:
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-{step}" / "manifest.json").write_bytes(DEEP)
    with pytest.raises(
        ModelError, match=r"no checkpoint is whole; got step 4: manifest.json is nested too deeply \| step 2"
    ):
        resume()


RECORDS: dict[str, tuple[str, bytes]] = {
    "the record is deep": ("run.json", DEEP),
    "the record is cut": ("run.json", b'{"rlhf_core": "1", "id'),
    "the record is another": ("run.json", b"[1, 2]"),
    "the models are deep": ("models.json", DEEP),
    "the models are a list": ("models.json", b"[]"),
    "the models are no map": ("models.json", b'{"policy": {"files": 3}}'),
    "the models name none": ("models.json", b"{}"),
    "the settings are deep": ("config.yaml", DEEP),
    "the settings are a list": ("config.yaml", b"- 1\n"),
    "the settings are cut": ("config.yaml", b"method: {"),
    "the settings are not UTF-8": ("config.yaml", b"\xff"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_is_named(tmp_path: Path, resume: Callable[[], Any], kind: str) -> None:
    name, content = RECORDS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RLHFError) as caught:
        resume()
    assert caught.value.exit_code == 7 and name in str(caught.value)
    assert (name != "config.yaml") or "the record of the run's options" in str(caught.value)
    assert (tmp_path / "checkpoints" / "step-4").is_dir()


def test_missing_options_are_reported_and_nothing_is_trained(tmp_path: Path, resume: Callable[[], Any]) -> None:
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(
        StorageError, match=r"config\.yaml: the run has checkpoints, and the record of its options is missing"
    ):
        resume()
    assert (tmp_path / "checkpoints" / "step-4").is_dir() and not (tmp_path / "config.yaml").exists()
    # Without a checkpoint there is nothing that they could be compared for.
    shutil.rmtree(tmp_path / "checkpoints")
    assert resume().step == 4


@pytest.mark.parametrize("content", [b'{"resumed": 3}', b'{"step": "x"}', b'{"resumed": {"a": 1}, "step": []}'])
def test_odd_values_in_the_record_harm_nothing(tmp_path: Path, resume: Callable[[], Any], content: bytes) -> None:
    record = read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_bytes(to_json(record | json.loads(content)))
    assert resume().step == 4


def test_a_status_that_is_none_harms_nothing(tmp_path: Path, resume: Callable[[], Any]) -> None:
    (tmp_path / "status.json").write_bytes(b"[]")
    assert resume().step == 4


@pytest.mark.parametrize(
    "damage", [b"{\n", b"\n", DEEP + b"\n", b'{"step": 2}\n', b'{"step": Infinity}\n', b"\xff\n"], ids=len
)
def test_a_damaged_row_of_metrics_is_reported(
    tmp_path: Path, resume: Callable[[], Any], damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], damage, *lines[2:]]))
    with caplog.at_level(logging.WARNING):
        resume()
    assert "the row of 1 step is damaged and left out: 2" in caplog.text
    assert path.read_bytes() == b"".join([lines[0], *lines[2:]])
    found = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["steps"] for event in found if event["event"] == "metrics_damaged"] == [[2]]


def test_rows_that_are_gone_are_reported_and_the_last_is_in_the_checkpoint(
    tmp_path: Path, resume: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    path.unlink()
    resume()
    assert "left out: 1-3" in caplog.text and [json.loads(line) for line in path.read_text().splitlines()] == [last]


def test_what_a_kill_cut_off_behind_the_checkpoint_is_no_damage(
    tmp_path: Path, resume: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo')
    resume()
    assert "damaged" not in caplog.text and "metrics_damaged" not in events(tmp_path)


def test_a_directory_that_cannot_be_read_as_a_run_is_no_foreign_one(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"{")
    with pytest.raises(StorageError, match=r"run.json: can't be read as a run's record"):
        toy(tmp_path).train(overwrite=True)
