"""Rows tokenised by several processes are the rows of one: ids, reports, fingerprints, files in the cache, and errors."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_core.config.training import DatasetConfig, TrainerConfig
from rlhf_core.data import KTODataset, PreferenceDataset, SFTDataset, open_dataset
from rlhf_core.data.map_dataset import MapDataset
from rlhf_core.infra.errors import DataError
from rlhf_core.infra.forked_calls import forked_calls, may_fork
from rlhf_core.testing.tiny import tiny_tokenizer

pytestmark = pytest.mark.skipif(not may_fork(), reason="processes can't be forked here")

COUNTS = (1, 2, 3)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "rlhf_core"


@pytest.fixture(autouse=True)
def no_threads_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tests of this process left, such as a reward that hangs in a thread, doesn't count as a thread here."""
    left = set(threading.enumerate()) - {threading.current_thread()}
    monkeypatch.setattr(threading, "active_count", lambda: len(set(threading.enumerate()) - left))


def _sft(number: int) -> dict[str, Any]:
    if number % 7 == 3:
        return {"question": f"{number} " + "x" * (number % 90), "answer": "y" * (number % 50 + 1), "id": number}
    if number > 2500 and number % 7 == 1:
        return {"talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": str(number)}]}
    if number % 7 == 5:
        return {"messages": [*CHAT, {"role": "user", "content": str(number)}, *CHAT[1:]]}
    return {"prompt": f"<|end|> {number}", "response": "z" * (number % 120 + 1)}


def _opened(cls: type[MapDataset], data: Any, processes: int, **options: Any) -> MapDataset:
    given = DatasetConfig(processes=processes, **options)
    return cls(data, tiny_tokenizer(), max_length=64, options=given)


def _file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("options", [{}, {"wrap": "chat", "turns": "each", "truncation": "drop"}])
def test_any_number_of_processes_gives_the_same_rows(
    tmp_path: Path, cache: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = _file(tmp_path / "rows.jsonl", [_sft(number) for number in range(3500)])
    seen = []
    for processes in COUNTS:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = _opened(SFTDataset, path, processes, **options)
        (entry,) = cache.iterdir()
        kept = (entry / "rows.arrow").read_bytes(), (entry / "rows.json").read_bytes()
        lines = [record.getMessage() for record in caplog.records]
        seen.append((kept, found.fingerprint, found.report.as_dict(), found.encoder.state_dict(), lines, list(found)))
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][2]["rows"] >= 3500 and seen[0][2]["notes"] and len(seen[0][2]["shapes"]) == 2


@pytest.mark.parametrize(
    ("cls", "bad", "at"),
    [
        (SFTDataset, {"prompt": "a", "response": ""}, (1500, 3499)),
        (SFTDataset, {"prompt": "a"}, (3000,)),
        (PreferenceDataset, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}, (1, 2048)),
        (PreferenceDataset, {"prompt": "a", "chosen": "b", "rejected": "c"}, (2048,)),
        (KTODataset, {"prompt": "a", "response": "b", "label": "prhaps"}, (2900,)),
    ],
)
def test_the_first_mistake_is_the_one_that_is_raised(
    tmp_path: Path, cls: type[MapDataset], bad: dict[str, Any], at: tuple[int, ...]
) -> None:
    good = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c", "label": True}
    for first in at:
        # Another mistake follows in a later chunk, which a process may reach first.
        rows: list[Any] = [bad if number == first else {**good, "label": bool(number % 2)} for number in range(3500)]
        if cls is PreferenceDataset and "margin" not in bad:
            rows = [row if row is bad else {**row, "margin": 1} for row in rows]
        rows[-1] = "no row" if first != 3499 else rows[-1]
        path = _file(tmp_path / "rows.jsonl", rows)
        errors = []
        for processes in COUNTS:
            with pytest.raises(DataError) as error:
                _opened(cls, path, processes)
            errors.append(str(error.value))
        assert errors[0] == errors[1] == errors[2]
        assert f"{path}:{first + 1}" in errors[0] or "margin" in errors[0]


def test_a_row_under_strict_is_refused_with_its_place(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b" * (200 if number in (2500, 3400) else 2)} for number in range(3500)]
    path = _file(tmp_path / "rows.jsonl", rows)
    for processes in COUNTS:
        with pytest.raises(DataError, match=r"rows\.jsonl:2501: longer than max_length"):
            _opened(SFTDataset, path, processes, strict=True)


def test_rows_that_cannot_be_pickled_are_encoded_here() -> None:
    rows = [
        {"prompt": "a", "response": "b", "other": threading.Lock() if number == 1500 else 1} for number in range(3000)
    ]
    one, two = _opened(SFTDataset, rows, 1), _opened(SFTDataset, rows, 2)
    assert len(two) == 3000 and one.fingerprint == two.fingerprint and one.report.as_dict() == two.report.as_dict()


def _squared(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise ValueError(number)
    return number**2


def test_calls_that_fail_have_no_result_and_hide_no_other() -> None:
    found = dict(forked_calls(_squared, [0, 1, 2, 3, 4], 2))
    assert found == {0: 0, 1: 1, 2: 4, 3: None, 4: 16}
    # A process that is killed loses its own calls alone.
    found = dict(forked_calls(_squared, range(12), 2))
    assert list(found) == list(range(12)) and found[5] is None
    assert all(found[number] in (None, number**2) for number in found) and found[11] == 121
    # With the last one, all that is left is the caller's.
    found = dict(forked_calls(_killed, range(6), 2))
    assert found == dict.fromkeys(range(6))


def _killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("taken", range(6))
def test_processes_that_are_stopped_while_they_write_hold_nobody_up(taken: int) -> None:
    calls = forked_calls(_many_bytes, range(100), 2)
    for _ in range(taken):
        next(calls)
    calls.close()


def _many_bytes(number: int) -> bytes:
    return bytes(3_000_000 + number)


def test_an_error_of_the_arguments_comes_after_the_results_before_it() -> None:
    def arguments() -> Iterator[int]:
        yield from (1, 2, 4)
        raise KeyError("end")

    calls, seen = forked_calls(_squared, arguments(), 2), []
    with pytest.raises(KeyError, match="end"):
        for argument, result in calls:
            seen.append((argument, result))
    assert seen == [(1, 1), (2, 4), (4, 16)]


def test_a_killed_process_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path / "rows.jsonl", [_sft(number) for number in range(3500)])
    one = _opened(SFTDataset, path, 1)
    here, encode = os.getpid(), type(one.encoder).encode

    def killed(self: Any, rows: Any) -> Any:
        if os.getpid() != here and rows[0].index >= 2048:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, rows)

    monkeypatch.setattr(type(one.encoder), "encode", killed)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    two = _opened(SFTDataset, path, 2)
    assert one.fingerprint == two.fingerprint and one.report.as_dict() == two.report.as_dict()


def test_processes_end_with_the_iteration() -> None:
    calls: Any = forked_calls(_pid_of, range(100), 2)
    _, process = next(calls)
    calls.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def _pid_of(_: int) -> int:
    return os.getpid()


def test_a_number_of_processes_that_is_not_followed_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another thread may hold a lock at the fork, so one process encodes; the rows are the same."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}?", "response": "{i}"}}\n' for i in range(8)))
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        config = TrainerConfig(max_length=64, dataset={"wrap": "none", "processes": 2})
        assert len(open_dataset(str(path), "sft", tiny_tokenizer(), config=config)) == 8
    finally:
        done.set()
        thread.join()
    assert [one.levelname for one in caplog.records if "one process encodes the rows" in one.getMessage()] == [
        "WARNING"
    ]
