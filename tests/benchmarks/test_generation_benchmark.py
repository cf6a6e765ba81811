"""The benchmark of generation in small: every contender draws the same tokens' worth, and one that is missing says so."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core.testing.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of `benchmarks`, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import generation
    import generation_contenders

    return SimpleNamespace(parent=generation, contenders=generation_contenders)


def run(model: Path, output: Path, *options: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "generation.py"), "--model", str(model), "--threads", "1"]
    command += ["--output", str(output / "found.json"), "--num-prompts", "2", "--completions", "3", "--tokens", "12"]
    command += ["--long", "200", "--rounds", "1", "--repeats", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((output / "found.json").read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("work", ["even", "uneven"])
def test_every_contender_is_timed_on_the_same_work(work: str, model: Path, tmp_path: Path) -> None:
    peers = ["generate"] if work == "uneven" else ["generate", "continuous"]
    found, text = run(model, tmp_path, "--work", work, "--precision", "float32", "--contender", "ours", *peers)
    (cell,) = found["cells"]
    rows = cell["rows"]
    assert list(rows)[:2] == ["ours/read", "ours/trained"]
    for name, row in rows.items():
        assert row["tokens_per_second"] > 0 and row["tokens_per_cpu_second"] > 0, name
        (one,) = row["runs"]
        assert one["tokens"] == (72 if work == "even" else one["tokens"]) and len(one["calls"]) == 1
    assert len({row["runs"][0]["tokens"] for row in rows.values()}) == 1
    assert set(cell["tokens_per_second_ratio"]) == set(peers)
    assert f"| {work} | float32 | generate/sdpa |" in text and "× |" in text and "1 threads" in text


@pytest.mark.slow
def test_long_prompts_and_a_contender_that_is_not_installed(model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    found, text = run(model, tmp_path, "--work", "long", "--precision", "bf16", "--contender", "ours", "vllm")
    (cell,) = found["cells"]
    assert cell["prompt_tokens"] == [200, 200, 200]
    assert cell["rows"]["vllm/compiled"] == {"reason": "vllm isn't installed"}
    assert "| long | bf16 | vllm/compiled | – (vllm isn't installed) |" in text


def test_uneven_lengths_are_the_same_each_time_and_far_apart(bench: SimpleNamespace) -> None:
    limits = bench.parent.limits_of("uneven", 8, 8, 128)
    assert limits == bench.parent.limits_of("uneven", 8, 8, 128)
    every = sorted(limit for row in limits for limit in row)
    assert len(every) == 64 and every[0] < 12 and every[-1] == 128 and every[32] < 48
    assert bench.parent.limits_of("even", 2, 2, 5) == [[5, 5], [5, 5]]


def test_the_fastest_setting_is_compared_and_targets_are_judged(bench: SimpleNamespace) -> None:
    def ran(seconds: float) -> dict[str, Any]:
        calls = [{"seconds": seconds, "cpu_seconds": seconds, "others_cores": 0.0}]
        figures = {"first_call_seconds": 1.0, "over_model_bytes": 2**20, "resident_bytes": 2**21, "versions": {}}
        return {"tokens": 1200, "calls": calls, **figures}

    runs = {
        "ours/read": [ran(1.0), ran(1.2), ran(9.0)],
        "ours/trained": [ran(2.0)],
        "generate/sdpa": [ran(3.0)],
        "vllm/compiled": [ran(1.1)],
        "vllm/eager": [{"failed": "no such luck"}],
    }
    cell = bench.parent.cell("even", "bf16", [[1, 2, 3]], runs)
    assert cell["best"] == {"ours": "ours/read", "generate": "generate/sdpa", "vllm": "vllm/compiled"}
    assert cell["tokens_per_second_ratio"] == pytest.approx({"generate": 2.5, "vllm": 1.1 / 1.2})
    text = bench.parent.table([cell])
    assert "| even | bf16 | ours/read | 1,000 (133 – 1,200) |" in text
    assert "| even | bf16 | vllm/eager | – (no such luck) |" in text
    assert "generate 2.50 of 2.4 met; vllm 0.92 of 0.95 missed" in text


BUSY = """
import time
held = b"x" * (200 * 2**20)
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
print()
input()
"""


def test_memory_and_time_of_child_processes_count(bench: SimpleNamespace) -> None:
    before, small = bench.contenders.usage(), bench.contenders.resident(peak=False)
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    running = bench.contenders.usage()
    assert bench.contenders.resident(peak=True) >= bench.contenders.resident(peak=False) > small + 190 * 2**20
    child.communicate(b"\n")
    ended = bench.contenders.usage()
    assert running.cpu - before.cpu > 0.25 and ended.cpu - before.cpu > 0.25
    assert ended.machine >= running.machine > before.machine
