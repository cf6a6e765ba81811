"""What was tokenised is kept: a resume and a second process load it, bit for bit, and nothing stale or damaged is ever used."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from data_helpers import bpe_tokenizer, lines, sft_rows
from transformers import PreTrainedTokenizerFast

from rlhf_core.config.training import DatasetConfig
from rlhf_core.data import PreferenceDataset, SFTDataset
from rlhf_core.data.chat_rendering import rendered_at
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.data.row_cache import CacheEntry, as_arrow, encoded_table
from rlhf_core.infra.errors import DataError

MARK = "a word that stands in rows only"
ROWS = [
    *(
        {"question": f"{MARK} {i} " + "x" * 200, "answer": "y" * (i % 9 + 1), "note": {"i": [i, None]}}
        for i in range(900)
    ),
    {"question": MARK + "z" * 600, "answer": "no room"},
    {"question": MARK, "answer": "y" * 600},
    {"question": f"{MARK} <|im_end|>", "answer": "forged"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder / "rlhf_core"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))
    return path


@pytest.fixture
def tokenised(monkeypatch):
    """The texts of rows that the tokenizer gets, as they come."""
    seen: list[str] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self, text, *args, **options):
        seen.extend(one for one in ([text] if isinstance(text, str) else text) if MARK in one)
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    return seen


def opened(data, tokenizer=None, *, max_length=512, kind=SFTDataset, **options):
    return kind(data, tokenizer or bpe_tokenizer(), max_length=max_length, options=DatasetConfig(**options))


def logged(caplog):
    """The log of opening data, but for the lines on the cache itself."""
    text = [record.getMessage() for record in caplog.records if "row_cache" not in record.name]
    caplog.clear()
    return text


def forked(work):
    """Run `work` in a child process; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one_row(cache, before=lambda: None):
    """Load one row from the cache or encode it, after `before()`; return whether it was loaded."""

    def encode(write):
        before()
        write(as_arrow([EncodedRow(0, [1, 2], [[3]], [[True]])]))
        return {"fingerprint": "f"}

    entry = CacheEntry("sft", {"data": "one row"}, unchanged=lambda: True)
    assert entry.path.parent == cache
    rows = encoded_table(entry, encode, in_memory=False)
    assert rows.table["prompt_ids"] == [[1, 2]] and rows.summary == {"fingerprint": "f"}
    return rows.cached


class Listening(logging.Handler):
    """Calls `then()` when a line with this text is logged for the first time."""

    def __init__(self, text, then):
        super().__init__()
        self.text, self.then = text, then

    def emit(self, record):
        if self.text in record.getMessage() and (then := self.then) is not None:
            self.then = None
            then()


def listen(text, then):
    logger = logging.getLogger("rlhf_core.data.row_cache")
    logger.setLevel(logging.INFO)
    logger.addHandler(Listening(text, then))


@pytest.fixture
def building(cache):
    """Start a process that builds an entry until `go` is set, then does `last()`, and others that wait for it."""
    context = multiprocessing.get_context("fork")
    go, started, waiting = context.Event(), context.Event(), context.Semaphore(0)

    def start(waiters, last, waiter):
        def build():
            one_row(cache, lambda: (started.set(), go.wait(60), last()))

        def wait():
            listen("waiting for another process", waiting.release)
            waiter()

        builder = forked(build)
        assert started.wait(60)
        children = [forked(wait) for _ in range(waiters)]
        assert all(waiting.acquire(timeout=60) for _ in children)
        return builder, children, go

    return start


def everything(dataset):
    return (
        list(dataset), dataset.fingerprint, dataset.report.as_dict(), dataset.encoder.state_dict(),
        [row for row, _ in dataset.walk(1, seed=3, shuffle=True, position=[7])],
    )  # fmt: skip


def test_the_second_time_nothing_is_tokenised(data, cache, tokenised, caplog):
    caplog.set_level(logging.INFO)
    first = opened(data)
    said = logged(caplog)
    assert len(tokenised) == len(ROWS) and len(first) == len(ROWS) - 1
    tokenised.clear()
    again = opened(data)
    assert tokenised == [] and f"{len(first)} tokenised rows from the cache" in caplog.text
    assert everything(again) == everything(first)
    assert logged(caplog) == said and len(said) == 5  # read as, dropped, truncated, control tokens, plain text
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
    datasets.disable_caching()
    try:
        assert everything(opened(data)) == everything(first) and len(tokenised) == len(ROWS)
    finally:
        datasets.enable_caching()


def test_a_second_process_tokenises_nothing(data, tokenised):
    first = opened(data)
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from transformers import PreTrainedTokenizerFast
call, seen = PreTrainedTokenizerFast.__call__, []
def counted(self, text, *args, **options):
    seen.extend(one for one in ([text] if isinstance(text, str) else text) if {MARK!r} in one)
    return call(self, text, *args, **options)
PreTrainedTokenizerFast.__call__ = counted
from data_helpers import bpe_tokenizer
from rlhf_core.data import SFTDataset
rows = SFTDataset({str(data)!r}, bpe_tokenizer(), max_length=512)
print(len(seen), len(rows), rows.fingerprint)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["0", str(len(first)), first.fingerprint]


def test_processes_that_open_the_same_data_at_once_tokenise_it_once(data, cache):
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = 0 if opened(data).fingerprint else 1
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    (entry,) = cache.iterdir()
    built = entry.stat().st_mtime_ns
    opened(data)
    assert entry.stat().st_mtime_ns == built


def test_processes_that_waited_check_the_entry_at_the_same_time(cache, building, monkeypatch):
    from rlhf_core.infra.files import sha256_of

    barrier = multiprocessing.get_context("fork").Barrier(2)

    def together(path):
        barrier.wait(20)
        return sha256_of(path)

    def waiter():
        monkeypatch.setattr("rlhf_core.data.row_cache.sha256_of", together)
        assert one_row(cache)

    builder, waiters, go = building(2, lambda: None, waiter)
    go.set()
    assert [ended(child) for child in (builder, *waiters)] == [0, 0, 0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_waited_for_one_that_is_killed_keeps_the_rows(cache, building, how):
    def waiter():
        one_row(cache)

    builder, waiters, _ = building(2, lambda: None, waiter)
    os.kill(builder, how)
    assert ended(builder) != 0
    assert [ended(child) for child in waiters] == [0, 0]
    assert [path.suffix for path in cache.iterdir()] == [""]
    assert one_row(cache)


def test_processes_that_waited_for_one_that_failed_encode_at_the_same_time(cache, building):
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def fail():
        raise DataError("a bad row")

    builder, waiters, go = building(2, fail, lambda: one_row(cache, lambda: barrier.wait(20)))
    go.set()
    assert [ended(child) for child in (builder, *waiters)] == [1, 0, 0]
    assert [*cache.iterdir()] == []


def test_an_entry_that_another_process_repaired_is_not_built_again(cache):
    one_row(cache)
    (entry,) = cache.iterdir()
    (entry / "rows.arrow").write_bytes(b"")
    encoded = []

    def work():
        # Another process repairs the entry after this one has found it damaged.
        listen("damaged in the cache", lambda: one_row(cache, lambda: encoded.append("repair")))
        assert one_row(cache, lambda: encoded.append("again")) and encoded == ["repair"]

    assert ended(forked(work)) == 0


def test_a_lock_that_is_newer_than_the_one_waited_for_stays(cache, monkeypatch):
    asked = []

    def flock(descriptor, operation):
        asked.append(operation)
        if len(asked) == 1:
            raise BlockingIOError
        # The other process ends, and a third one begins.
        (file,) = cache.iterdir()
        file.unlink()
        file.write_text("")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not one_row(cache)
    assert len(asked) == 2 and [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("damaged", [False, True])
def test_without_file_locks_rows_are_encoded_once_per_process_and_kept(cache, monkeypatch, caplog, damaged):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    caplog.set_level(logging.INFO)
    if damaged:
        one_row(cache)
        (entry,) = cache.iterdir()
        (entry / "rows.arrow").write_bytes(b"")
    encoded = []

    def meanwhile():
        encoded.append("first")
        one_row(cache, lambda: encoded.append("second"))

    assert not one_row(cache, meanwhile) and encoded == ["first", "second"]
    assert [path.suffix for path in cache.iterdir()] == [""]
    assert "the cache can't" not in caplog.text and one_row(cache)


def test_other_rows_tokenizers_and_options_are_never_mixed_up(data, cache, tokenised, tmp_path):
    first = opened(data)
    tokenised.clear()
    other_template, other_token, other_special = bpe_tokenizer(), bpe_tokenizer(), bpe_tokenizer()
    other_template.chat_template = other_template.chat_template.replace("assistant", "user")
    other_token.add_tokens(["xxxx"])
    other_special.bos_token = "<|im_end|>"
    with_saved_options, splitting = bpe_tokenizer(), bpe_tokenizer()
    with_saved_options.init_kwargs["rlhf_core"] = {"special_tokens": ["<|im_end|>"]}
    splitting.split_special_tokens = True
    made = [
        (data, other_template, {}),
        (data, other_token, {}),
        (data, other_special, {}),
        (data, with_saved_options, {}),
        (data, splitting, {}),
        (data, None, {"max_length": 500}),
        (data, None, {"truncation": "keep_end"}),
        (data, None, {"truncation": "drop"}),
        (data, None, {"wrap": "chat"}),
        (data, None, {"wrap": "none"}),
        (data, None, {"special_tokens": ["<|im_end|>"]}),
        (data, None, {"columns": {"prompt": "question"}}),
        (data, None, {"format": "columns"}),
        (data, None, {"ignore_columns": ["note"]}),
        ([{"path": data, "weight": 2}], None, {}),
        ([data, data], None, {}),
    ]
    for number, (rows, tokenizer, options) in enumerate(made, 1):
        opened(rows, tokenizer, **options)
        assert len(tokenised) >= len(ROWS) and len([*cache.iterdir()]) == number + 1, options
        tokenised.clear()
    # What doesn't bear on the ids of a row shares an entry.
    opened(data, shuffle=False, shuffle_block=7, eval_split="dev")
    assert tokenised == []
    data.write_bytes(lines([{**ROWS[0], "answer": "otherwise"}, *ROWS[1:]]))
    assert opened(data).fingerprint != first.fingerprint and len(tokenised) == len(ROWS)


def test_strict_fails_again_and_leaves_nothing(data, cache):
    opened(data)
    for _ in range(2):
        with pytest.raises(DataError, match="leaves no response token"):
            opened(data, strict=True)
    assert len([*cache.iterdir()]) == 1


@pytest.mark.parametrize("file", ["rows.arrow", "rows.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone"])
def test_a_damaged_entry_is_made_again(data, cache, tokenised, caplog, file, damage):
    expected = everything(opened(data))
    (entry,) = cache.iterdir()
    path, content = entry / file, bytearray((entry / file).read_bytes())
    if damage == "bit":
        # The last digit of the counts, or one bit within the ids.
        at = content.rindex(b'"loss_tokens": ') + 15 if file == "rows.json" else len(content) // 2
        content[at] ^= 1
    path.write_bytes({"bit": content, "cut": content[: len(content) // 2]}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    tokenised.clear()
    caplog.clear()
    assert everything(opened(data)) == expected and len(tokenised) == len(ROWS)
    assert len([r for r in caplog.records if "so the rows are tokenised again" in r.getMessage()]) == 1
    tokenised.clear()
    assert everything(opened(data)) == expected and tokenised == []


def test_a_process_that_is_killed_leaves_nothing_that_is_trusted(data, cache, tokenised):
    killed = 0
    for delay in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
        tokenizer = bpe_tokenizer()
        child = os.fork()
        if child == 0:
            try:
                opened(data, tokenizer)
            finally:
                os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] != 0
    datasets.disable_caching()
    try:
        expected = everything(opened(data))
    finally:
        datasets.enable_caching()
    assert killed and everything(opened(data)) == expected
    # A lock whose process was killed between the last byte and its removal stays, and locks nothing.
    assert [path.name for path in cache.iterdir() if path.suffix == ".tmp"] == []


def test_a_full_disk_costs_the_cache_and_nothing_else(data, cache, caplog):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            caplog.set_level(logging.INFO)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            code = 2
            opened([*ROWS, *ROWS])
        except Exception as error:
            # The temporary folder is as full: an error that names it.
            code = 0 if getattr(error, "exit_code", None) == 7 and "can't be written" in caplog.text else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [*cache.iterdir()] == []
    assert len(opened([*ROWS, *ROWS])) == 2 * len(ROWS) - 2


def test_a_cache_that_cannot_be_written_is_done_without(data, tmp_path, monkeypatch, tokenised, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    first = opened(data)
    assert len([record for record in caplog.records if "can't be written" in record.getMessage()]) == 1
    assert len(first) == len(ROWS) - 1 and len(tokenised) == len(ROWS)
    assert len(opened(data)) == len(first) and len(tokenised) == 2 * len(ROWS)


def test_a_cache_that_cannot_be_looked_into_is_done_without(cache, caplog):
    opened(sft_rows(20))  # Everything is imported, and the data are too small to be cached.
    tokenizer = bpe_tokenizer()
    cache.parent.mkdir()
    cache.parent.chmod(0)

    def work():
        caplog.set_level(logging.INFO)
        if os.geteuid() == 0:
            os.seteuid(65534)
        assert len(opened(ROWS, tokenizer)) == len(ROWS) - 1
        assert len([r for r in caplog.records if "the cache can't be read: Permission denied" in r.getMessage()]) == 1
        assert "damaged" not in caplog.text and "can't be written" not in caplog.text

    child = forked(work)
    assert ended(child) == 0
    cache.parent.chmod(0o700)


def test_rows_that_turn_out_not_to_fit_are_encoded_again_and_warned_of_once(
    data, cache, monkeypatch, tokenised, caplog
):
    def full(path, chunks):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rlhf_core.data.row_cache.write_file", full)
    caplog.set_level(logging.INFO)
    assert len(opened(data)) == len(ROWS) - 1 and len(tokenised) == 2 * len(ROWS)
    assert "the cache can't be written: No space left on device" in caplog.text
    lines = logged(caplog)
    assert len(lines) == len(set(lines)) == 5 and [*cache.iterdir()] == []


def test_data_that_change_while_they_are_read_are_not_kept(data, cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    call, seen = PreTrainedTokenizerFast.__call__, []

    def touching(self, text, *args, **options):
        os.utime(data, (1, time.monotonic_ns()))
        seen.extend(one for one in ([text] if isinstance(text, str) else text) if MARK in one)
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", touching)
    assert len([*opened(data)]) == len(seen) - 1 == len(ROWS) - 1
    assert [*cache.iterdir()] == []
    assert len([r for r in caplog.records if "the data changed while they were read" in r.getMessage()]) == 1
    lines = logged(caplog)
    assert len(lines) == len(set(lines)) == 6 and "the cache" not in " ".join(lines)


def test_small_data_and_objects_without_contents_are_not_kept(data, cache, tokenised):
    class Opaque:
        pass

    for rows in (sft_rows(20), [{**row, "extra": Opaque()} for row in ROWS]):
        opened(rows)
        assert not cache.exists()
    tokenised.clear()
    opened(ROWS)
    opened([dict(row) for row in ROWS])
    assert len(tokenised) == len(ROWS)
    # The same columns in another order are other rows to a reward, and a tuple isn't a list.
    opened([dict(reversed(row.items())) for row in ROWS])
    opened([{**row, "note": ()} for row in ROWS])
    opened([{**row, "note": []} for row in ROWS])
    assert len(tokenised) == 4 * len(ROWS)


def test_a_tokenizer_of_unknown_code_is_not_kept(data, cache):
    class Own(PreTrainedTokenizerFast):
        pass

    tokenizer = bpe_tokenizer()
    tokenizer.__class__ = Own
    opened(data, tokenizer)
    assert not cache.exists()


def test_a_template_that_writes_the_date_is_kept_for_its_day(data, cache, tokenised):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B') }}" + tokenizer.chat_template
    opened(data, tokenizer, wrap="chat")
    assert not cache.exists()  # Nothing says which day a resume is on.
    tokenised.clear()
    for time_ in ("2026-01-02T03:04:05", "2026-01-02T09:00:00", "2026-01-03T03:04:05"):
        with rendered_at(time_):
            opened(data, tokenizer, wrap="chat")
    assert len([*cache.iterdir()]) == 2


def test_pairs_and_columns_come_back_as_they_were(tmp_path, tokenised):
    rows = [
        {"prompt": MARK, "chosen": f"b{i}", "rejected": "c", "margin": i / 3, "meta": {"ü": [None, i, 0.1]}} for i in range(300)
    ]  # fmt: skip
    first, again = (opened(rows, kind=PreferenceDataset) for _ in range(2))
    assert list(first) == list(again) and first[7].per_prompt == {"margin": 7 / 3}
    assert json.loads(json.dumps(again[7].record)) == {"meta": {"ü": [None, 7, 0.1]}}
