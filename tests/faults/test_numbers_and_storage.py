"""Numbers that go wrong, disks that are full, runs that are interrupted: exit codes 6, 7 and 75."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_core import models
from rlhf_core.cli import main
from rlhf_core.training.checkpoint import CheckpointManager

LIMITED = """
import resource, sys
from rlhf_core.cli import main
from rlhf_core.models import PolicyModel
import rlhf_core.training.run
limit, after = int(sys.argv[1]), sys.argv[2]
def lower():
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
if after == "start":
    lower()
else:
    save = PolicyModel.save_pretrained
    PolicyModel.save_pretrained = lambda *given: (lower(), save(*given))
sys.exit(main(sys.argv[3:]))
"""


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


@pytest.mark.parametrize(("rate", "what"), [("1e38", "loss is"), ("1e30", "gradient's norm is")])
def test_what_is_not_finite_steps_nothing(train: Callable, tmp_path: Path, rate: str, what: str) -> None:
    """A learning rate that throws every weight away: the second step has nothing finite to go on with."""
    flags = ["--learning_rate", rate, "--lr_schedule", "constant", "--warmup_ratio", "0", "--checkpoint.every", "1"]
    ended = train(*flags, options=["--batch_size", "2", "--max_length", "64", "--max_steps", "4"])
    assert ended.code == 6, ended.err
    assert ended.error.startswith(f"error[numbers] step 2: the {what} not finite on rows ")
    assert "; nothing was stepped; got nan; fix: look at these rows, or lower `learning_rate`" in ended.error
    run = tmp_path / "run"
    assert (record(run)["status"], record(run)["exit_code"], record(run)["step"]) == ("failed", 6, 1)
    assert CheckpointManager(run / "checkpoints").steps() == [1] and not (run / "model").exists()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1]


def test_an_output_that_cannot_be_used_is_reported_before_the_model_loads(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train().code == 0
    monkeypatch.setattr(models.PolicyModel, "from_pretrained", lambda *given, **options: pytest.fail("it loaded"))
    run, full, file = tmp_path / "run", tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.tex").touch()
    file.touch()
    expected = {
        run: "holds an earlier run; fix: `--resume` continues it, `--overwrite` replaces it",
        full: "is not empty and not a run's directory, so it is neither continued nor removed; got thesis.tex;"
        " fix: choose an empty or a new directory",
        file: "is a file, not a directory; fix: choose another `output`",
    }
    for output, text in expected.items():
        ended = train(output=output)
        assert (ended.code, ended.error) == (7, f"error[io] {output}: {text}")
    refused = train("--overwrite", output=full)
    assert refused.code == 7 and refused.error.startswith(f"error[io] {full}: is not empty and not a run's directory")
    assert (full / "thesis.tex").exists()
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    # Permissions don't bind root; a file system of the kernel does.
    output = locked / "run" if os.geteuid() else Path("/proc/run")
    ended = train(output=output)
    assert ended.code == 7 and ended.error.startswith(f"error[io] {output}: cannot read or write; got ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "after", "place", "method"),
    [
        (3000, "start", "checkpoints/step-2", "sft"),
        (3000, "export", "model", "sft"),
        (2900, "start", "reference.safetensors", "dpo"),
        (90, "start", "run.json", "sft"),
    ],
)
def test_a_full_disk_names_the_path_and_the_bytes(
    model: Path, write: Callable, tmp_path: Path, limit: int, after: str, place: str, method: str
) -> None:
    """A limit on the size of a file replaces a full disk: the write fails in the same place with its own number."""
    keys = {"sft": ("response",), "dpo": ("chosen", "rejected")}[method]
    data = write([{"prompt": f"q{i}", **{key: f"{key}{i}" for key in keys}} for i in range(90)])
    run = tmp_path / "run"
    command = ["train", method, "--model", str(model), "--data", str(data), "--output", str(run), "--max_length", "64"]
    command += ["--max_steps", "2"] + (["--reference", "precompute"] if method == "dpo" else [])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), after, *command], capture_output=True, text=True, timeout=120
    )
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 7, done.stderr
    assert error.startswith(f"error[io] {run / place}: cannot write: ") and "File too large" in error
    needed = error.split("cannot write: ")[1].split()[0]
    assert int(needed) > limit and error.endswith(
        "fix: free space, raise the file size limit, or choose another output directory"
    )
    if place != "run.json":
        assert (record(run)["status"], record(run)["exit_code"]) == ("failed", 7)


def test_an_interrupt_saves_and_is_exit_code_75(model: Path, write: Callable, tmp_path: Path) -> None:
    run, data = tmp_path / "run", write([{"prompt": "q", "response": "a"}] * 8)
    command = ["train", "sft", "--model", str(model), "--data", str(data), "--output", str(run), "--max_length", "64"]
    process = subprocess.Popen(
        # A shell that starts its jobs in the background has them ignore the signal; a terminal doesn't.
        [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
         "from rlhf_core.cli import main; sys.exit(main(sys.argv[1:]))", *command, "--max_steps", "1000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    last = errors.splitlines()[-1]
    assert last.startswith("error[stopped] ") and last.endswith("; its state is saved; fix: continue with `--resume`")
    assert (record(run)["status"], record(run)["exit_code"]) == ("stopped", 75) and "Traceback" not in errors
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{record(run)['step']}"]


def test_a_damaged_cache_of_the_reference_is_computed_again(train: Callable, tmp_path: Path) -> None:
    """A flipped bit in it would change the gradients without any error."""
    pairs = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(8)]
    flags = ["--reference", "precompute", "--checkpoint.every", "1"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(*flags, method="dpo", data=pairs, output=whole).code == 0
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-2")
    cache = run / "reference.safetensors"
    damaged = bytearray(cache.read_bytes())
    damaged[-50] ^= 1
    cache.write_bytes(damaged)
    ended = train(*flags, "--resume", method="dpo", data=pairs)
    assert ended.code == 0 and f"WARNING {cache} is damaged" in ended.err
    assert cache.read_bytes() == (whole / "reference.safetensors").read_bytes()
    weights = [output / "model" / "model.safetensors" for output in (whole, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_no_traceback_without_debug(train: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    assert "Traceback" not in train().err
    with pytest.raises(Exception, match="is not empty"):
        main(["--debug", "train", "sft", "--model", "m", "--data", "d", "--output", str(tmp_path / "run")])
