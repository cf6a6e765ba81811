"""A merge that is killed leaves nothing or the whole under its name, and goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import merge_helpers
import pytest
import torch
from merge_helpers import bytes_of, merge, write_weights

from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.merging import output
from rlhf_core.merging.output import unfinished

# Every write, fsync and rename of the merge is counted, over its processes; all kill themselves at the wanted one. Two processes
# write: which files a commit has to put on disk, and so how many operations come before the last stretch, differs by a few from
# run to run. With --publish those of the last stretch alone are counted, which is one process's.
WORKER = """
import multiprocessing, os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, {helpers!r})
from rlhf_core.merging import output
output.COMMIT_BYTES = 200_000
count = multiprocessing.Value("l", 0, lock=False)
stop = multiprocessing.Value("l", int(sys.argv[1]), lock=False)
def counted(function):
    def call(*args, **kwargs):
        count.value += 1  # without a lock, which a process may be killed with
        if count.value >= stop.value > 0:
            stop.value = -1
            os.killpg(0, signal.SIGINT if "--interrupt" in sys.argv else signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("pwrite", "fsync", "write", "rename", "mkdir", "unlink", "posix_fallocate"):
    setattr(os, name, counted(getattr(os, name)))
if "--publish" in sys.argv:
    publish, wanted, stop.value = output.Output.publish, stop.value, -1
    def counted_from_here(self, *args):
        self.flush()
        count.value, stop.value = 0, wanted
        return publish(self, *args)
    output.Output.publish = counted_from_here
if "--threads" in sys.argv:
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # a process with threads isn't forked
from merge_helpers import merge
folder = Path(sys.argv[2])
merge("ties", [folder / "a", folder / "b"], folder / "out", base=folder / "base", shard_size=300_000, threads=2,
      resume="--resume" in sys.argv, overwrite="--overwrite" in sys.argv)
print(count.value)
"""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {f"model.layers.{n}.w.weight": torch.randn(100, 200, generator=generator) for n in range(12)}
        write_weights(tmp_path / name, tensors)
    return tmp_path


def _run(folder: Path, stop: int, *flags: str) -> subprocess.CompletedProcess[str]:
    script = WORKER.format(helpers=str(Path(merge_helpers.__file__).parent))
    command = [sys.executable, "-c", script, str(stop), str(folder), *flags]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _whole_or_nothing(folder: Path, expected: dict[str, bytes]) -> None:
    if (folder / "out").exists():
        assert bytes_of(folder / "out") == expected
        assert (folder / "out" / "README.md").is_file()


def _settings(folder: Path) -> dict[str, object]:
    return {"base": folder / "base", "shard_size": 300_000}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--processes", "--threads"])
def test_killed_at_ten_moments_it_goes_on_to_the_same_bytes(how: str, inputs: Path) -> None:
    merge("ties", [inputs / "a", inputs / "b"], inputs / "expected", **_settings(inputs))
    expected = bytes_of(inputs / "expected")
    whole = _run(inputs, -1, how)
    assert whole.returncode == 0, whole.stderr
    assert bytes_of(inputs / "out") == expected
    operations = int(whole.stdout.split()[-1])
    assert operations > 40
    begun = 12  # operations before which nothing is noted yet, and a merge starts over
    moments = sorted({*random.Random(0).sample(range(2, operations + 1), 10), begun, operations - 4, operations - 2})
    resumed = 0
    for moment in moments:
        subprocess.run(["rm", "-rf", str(inputs / "out"), str(unfinished(inputs / "out"))], check=True)
        killed = _run(inputs, moment, how)
        # Another run may have a few operations fewer, and be whole before the last moments.
        assert killed.returncode == -signal.SIGKILL or (killed.returncode == 0 and moment > operations - 8)
        _whole_or_nothing(inputs, expected)
        if (inputs / "out").exists():
            continue  # killed after the last rename
        flags = ["--resume"] if (unfinished(inputs / "out") / "merge.state").is_file() else []
        assert flags or moment < begun
        resumed += bool(flags)
        again = _run(inputs, -1, how, *flags)
        assert again.returncode == 0, again.stderr
        assert bytes_of(inputs / "out") == expected
        assert not unfinished(inputs / "out").exists()
    assert resumed >= 5


@pytest.mark.slow
def test_killed_from_outside_it_leaves_nothing_or_the_whole(inputs: Path) -> None:
    merge("ties", [inputs / "a", inputs / "b"], inputs / "expected", **_settings(inputs))
    expected = bytes_of(inputs / "expected")
    script = WORKER.format(helpers=str(Path(merge_helpers.__file__).parent))
    for delay in (0.0, 0.01, 0.03, 0.1, 0.3):
        process = subprocess.Popen([sys.executable, "-c", script, "-1", str(inputs)], stdout=subprocess.DEVNULL)
        started = time.monotonic()
        while not unfinished(inputs / "out").exists() and process.poll() is None and time.monotonic() < started + 60:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()
        _whole_or_nothing(inputs, expected)
        subprocess.run(["rm", "-rf", str(inputs / "out")], check=True)
    merge("ties", [inputs / "a", inputs / "b"], inputs / "out", **_settings(inputs))
    assert bytes_of(inputs / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("moment", [22, 26, 32])
def test_ctrl_c_ends_all_of_its_processes_and_it_goes_on(moment: int, inputs: Path) -> None:
    """A terminal sends it to each of them."""
    merge("ties", [inputs / "a", inputs / "b"], inputs / "expected", **_settings(inputs))
    script = WORKER.format(helpers=str(Path(merge_helpers.__file__).parent))
    command = [sys.executable, "-c", script, str(moment), str(inputs), "--interrupt"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        told = process.communicate(timeout=100)[1]
    assert process.returncode == -signal.SIGINT
    assert told.count("KeyboardInterrupt") == 1 and "multiprocessing" not in told.split("KeyboardInterrupt")[1]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left
    assert not (inputs / "out").exists()
    assert _run(inputs, -1, "--resume").returncode == 0
    assert bytes_of(inputs / "out") == bytes_of(inputs / "expected")


@pytest.mark.slow
def test_killed_while_it_replaces_a_model_it_goes_on(inputs: Path) -> None:
    """At every operation of the last stretch the old model or the new one is there, or can be had again."""
    merge("ties", [inputs / "a", inputs / "b"], inputs / "expected", **_settings(inputs))
    expected = bytes_of(inputs / "expected")
    merge("linear", [inputs / "a"], inputs / "old")
    subprocess.run(["cp", "-r", str(inputs / "old"), str(inputs / "out")], check=True)
    operations = int(_run(inputs, -1, "--overwrite", "--publish").stdout.split()[-1])
    assert operations > 12
    for moment in range(operations - 12, operations + 1, 2):
        subprocess.run(["rm", "-rf", str(inputs / "out"), str(unfinished(inputs / "out"))], check=True)
        subprocess.run(["cp", "-r", str(inputs / "old"), str(inputs / "out")], check=True)
        assert _run(inputs, moment, "--overwrite", "--publish").returncode == -signal.SIGKILL
        found = bytes_of(inputs / "out") if (inputs / "out").exists() else None
        assert found in (expected, bytes_of(inputs / "old"), None)
        if found != expected:
            assert _run(inputs, -1, "--resume").returncode == 0
            assert bytes_of(inputs / "out") == expected


def test_a_model_about_to_be_replaced_is_put_back(inputs: Path) -> None:
    merge("linear", [inputs / "a"], inputs / "out")
    before = bytes_of(inputs / "out")
    work = unfinished(inputs / "out")
    work.mkdir()
    (inputs / "out").rename(work / "replaced")  # where a kill may leave it
    with pytest.raises(ConfigError, match="no unfinished merge"):
        merge("linear", [inputs / "b"], inputs / "out", resume=True)
    with pytest.raises(StorageError, match="holds a model already"):
        merge("linear", [inputs / "b"], inputs / "out")
    assert bytes_of(inputs / "out") == before


def test_a_header_that_a_kill_kept_from_being_written_is_written(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge("ties", [inputs / "a", inputs / "b"], inputs / "expected", **_settings(inputs))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(output.Output, "discard", output.Output.close)
        with pytest.raises(KeyboardInterrupt):
            merge("ties", [inputs / "a", inputs / "b"], inputs / "out", **_settings(inputs))
    merge("ties", [inputs / "a", inputs / "b"], inputs / "out", resume=True, **_settings(inputs))
    assert bytes_of(inputs / "out") == bytes_of(inputs / "expected")


def _interrupted(inputs: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Leave a merge that was stopped after so many tensors."""
    monkeypatch.setattr(output, "COMMIT_BYTES", 1)

    def stopping(done: int, total: int) -> None:
        if done > after * total / 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge("ties", [inputs / "a", inputs / "b"], inputs / "out", threads=1, progress=stopping, **_settings(inputs))


def test_what_was_done_is_not_done_again(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge("ties", [inputs / "a", inputs / "b"], inputs / "expected", **_settings(inputs))
    _interrupted(inputs, monkeypatch, after=5)
    assert not (inputs / "out").exists()
    reported: list[float] = []
    merge(
        "ties",
        [inputs / "a", inputs / "b"],
        inputs / "out",
        resume=True,
        threads=1,
        progress=lambda done, total: reported.append(done * 12 / total),
        **_settings(inputs),
    )
    assert reported[0] == 5 and reported[-1] == 12 and len(set(reported)) == 8
    assert bytes_of(inputs / "out") == bytes_of(inputs / "expected")


def test_an_unfinished_merge_that_is_to_replace_a_model_is_named(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge("linear", [inputs / "a"], inputs / "old")
    _interrupted(inputs, monkeypatch, after=3)
    (inputs / "old").rename(inputs / "out")
    with pytest.raises(StorageError, match="holds a model already; fix: `--resume` continues the unfinished merge"):
        merge("ties", [inputs / "a", inputs / "b"], inputs / "out", **_settings(inputs))


def test_a_merge_of_something_else_is_not_continued(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupted(inputs, monkeypatch, after=3)
    with pytest.raises(ConfigError, match="other inputs or options"):
        merge("ties", [inputs / "a", inputs / "b"], inputs / "out", resume=True, density=0.5, **_settings(inputs))
    write_weights(inputs / "b", {f"model.layers.{n}.w.weight": torch.ones(100, 200) for n in range(12)})
    with pytest.raises(ConfigError, match="other inputs or options"):
        merge("ties", [inputs / "a", inputs / "b"], inputs / "out", resume=True, **_settings(inputs))


def test_without_resume_it_begins_anew(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupted(inputs, monkeypatch, after=3)
    merge("linear", [inputs / "a"], inputs / "out")
    assert bytes_of(inputs / "out") and not unfinished(inputs / "out").exists()


def test_a_merge_killed_after_its_last_rename_is_whole(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "discard", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge("ties", [inputs / "a", inputs / "b"], inputs / "out", **_settings(inputs))
    expected = bytes_of(inputs / "out")
    with pytest.raises(ConfigError, match="whole already"):
        merge("ties", [inputs / "a", inputs / "b"], inputs / "out", resume=True, **_settings(inputs))
    assert bytes_of(inputs / "out") == expected and not unfinished(inputs / "out").exists()


def test_nothing_to_resume_is_told(inputs: Path) -> None:
    with pytest.raises(ConfigError, match="no unfinished merge"):
        merge("linear", [inputs / "a"], inputs / "out", resume=True)


def test_a_damaged_file_of_an_unfinished_merge_is_told(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupted(inputs, monkeypatch, after=5)
    for file in (unfinished(inputs / "out") / "model").glob("*.safetensors"):
        file.write_bytes(b"short")
    with pytest.raises(StorageError, match="damaged"):
        merge("ties", [inputs / "a", inputs / "b"], inputs / "out", resume=True, **_settings(inputs))


def test_two_merges_into_one_place_are_refused(inputs: Path) -> None:
    from rlhf_core.infra.files import lock_directory

    place = unfinished(inputs / "out")
    place.mkdir()
    held = lock_directory(place, "merge.lock")
    assert held is not None
    with pytest.raises(StorageError, match="another process is merging"):
        merge("linear", [inputs / "a"], inputs / "out")
    os.close(held)


def test_the_recipe_is_kept(inputs: Path) -> None:
    merge("linear", [inputs / "a", inputs / "b"], inputs / "out", hash_inputs=True)
    card = (inputs / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "base_model:" not in card and "| a | model | 1 |" in card
    assert str(inputs) not in card
    import hashlib

    assert hashlib.sha256((inputs / "a" / "model.safetensors").read_bytes()).hexdigest() in card
    assert json.loads((inputs / "out" / "config.json").read_text())["model_type"] == "llama"
