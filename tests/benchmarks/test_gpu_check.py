"""The GPU check on a machine without one: its parts run in small, and nothing that a part does costs the others' results."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of `benchmarks`, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_report
    import random_models
    import step_profile

    yield SimpleNamespace(gpu=gpu, report=gpu_report, models=random_models, profile=step_profile)


def check(output: Path, *options: str) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--size", "tiny"]
    return [*command, "--output", str(output), *options]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo", "reward_model", "kto"])
def test_a_method_is_timed_and_profiled_beside_the_peer(method: str, tmp_path: Path) -> None:
    done = subprocess.run(check(tmp_path, "--parts", f"{method}/*"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(results) == [f"{method}/tiny/ours", f"{method}/tiny/peer"]
    for found in results.values():
        assert found["status"] == "done", found
        assert len(found["seconds"]) == 6 and min(found["seconds"]) > 0
        assert found["profile"]["operations"] > 100
        assert found["profile"]["top_operations"][0]["ms"] > 0
    ours, peer = results.values()
    assert ours["tokens"] == peer["tokens"]
    assert f"| {method} | tiny |" in done.stdout and "| – |" in done.stdout  # a tiny model has no target


@pytest.mark.slow
def test_generation_is_timed_beside_the_peers_that_are_there(tmp_path: Path) -> None:
    command = check(tmp_path, "--parts", "generation/tiny/ours", "generation/tiny/generate", "generation/tiny/vllm")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["parts"]
    for contender in ("ours", "generate"):
        found = results[f"generation/tiny/{contender}"]
        assert found["status"] == "done", found
        assert found["even"]["drawn_per_second"] > 0 and found["uneven"]["drawn_per_second"] > 0
    if importlib.util.find_spec("vllm") is None:
        assert "| tiny | even | vllm | – (vllm isn't installed) | – | – |" in done.stdout
    assert "| tiny | uneven | generate |" in done.stdout


def test_the_table_of_generation_says_what_could_not_be_measured(bench: SimpleNamespace) -> None:
    def drawn(even: float, uneven: float | None = None) -> dict[str, Any]:
        found = {"status": "done", "reason": None, "even": {"drawn_per_second": even, "over_model_bytes": 2**21}}
        if uneven is not None:
            found["uneven"] = {"drawn_per_second": uneven, "over_model_bytes": None}
        return found

    results = {
        "generation/135m/ours": drawn(3000, 2000),
        "generation/135m/generate": drawn(1000) | {"status": "failed", "reason": "stopped after 60 s"},
        "generation/135m/vllm": {"status": "skipped", "reason": "vllm isn't installed"},
    }
    text = bench.report.report(results)
    assert "| 135m | even | ours | 3,000 | – | 2 |" in text and "| 135m | uneven | ours | 2,000 | – | – |" in text
    assert "| 135m | even | generate | 1,000 | 3.00× | 2 |" in text
    assert "| 135m | uneven | generate | – (stopped after 60 s) | – | – |" in text
    assert "| 135m | even | vllm | – (vllm isn't installed) | – | – |" in text


@pytest.mark.slow
def test_a_killed_check_keeps_what_it_had(tmp_path: Path) -> None:
    process = subprocess.Popen(check(tmp_path, "--parts", "environment", "sft/*"), stdout=subprocess.PIPE)
    path = tmp_path / "results.json"
    until = time.monotonic() + 120
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert json.loads(path.read_text())["parts"]["environment"]["status"] == "done"
    assert (tmp_path / "summary.md").read_text().startswith("cpu, ")


@pytest.mark.slow
def test_parts_without_time_left_are_named(tmp_path: Path) -> None:
    done = subprocess.run(
        check(tmp_path, "--parts", "environment", "tests", "--seconds", "11"), capture_output=True, text=True
    )
    assert "tests: not run" in done.stdout and "no time was left" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["tests"]["status"] == "not run"


def run_one(bench: SimpleNamespace, run: Any, tmp_path: Path, device: str = "cpu") -> dict[str, Any]:
    settings = bench.gpu.Settings(device, 4, tmp_path, 60.0)
    bench.gpu.run_part("part", bench.gpu.Part(run, 60), settings, tmp_path / "part.json")
    found: dict[str, Any] = json.loads((tmp_path / "part.json").read_text())
    return found


def test_a_part_that_fails_keeps_what_it_saved_and_says_why(bench: SimpleNamespace, tmp_path: Path) -> None:
    def breaks(settings: Any, save: Any) -> dict[str, Any]:
        save({"tokens_per_second": 3.0})
        raise ValueError("no such luck")

    found = run_one(bench, breaks, tmp_path)
    assert (found["status"], found["reason"]) == ("failed", "ValueError: no such luck")
    assert found["tokens_per_second"] == 3.0


def test_a_missing_package_is_no_failure(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bench.gpu.importlib.util.find_spec
    monkeypatch.setattr(bench.gpu.importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
    ended = run_one(bench, bench.gpu.train("sft", "tiny", "peer"), tmp_path)
    assert (ended["status"], ended["reason"]) == ("skipped", "trl isn't installed")


def test_without_a_gpu_each_row_says_so(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.gpu, "has_gpu", lambda: False)
    ended = run_one(bench, lambda settings, save: {"drew": 1}, tmp_path, device="auto")
    assert (ended["status"], ended["reason"]) == ("skipped", "there is no GPU")
    text = bench.report.report({"generation/135m/ours": ended})
    assert "| 135m | even | ours | – (there is no GPU) | – | – |" in text
    assert not any(part.measures for name, part in bench.gpu.parts("full").items() if name in ("environment", "tests"))


def test_methods_are_found_without_an_installation(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.gpu.write_metadata(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found.name, found.version) == (project["name"], project["version"])
    points = {(entry.group, entry.name): entry.value for entry in found.entry_points}
    wanted = project["entry-points"].items()
    assert points == {(group, name): target for group, named in wanted for name, target in named.items()}


def test_rows_are_the_same_each_time_and_of_the_length_asked_for(bench: SimpleNamespace) -> None:
    rows = bench.models.make_rows("dpo", "135m", 400)
    assert rows == bench.models.make_rows("dpo", "135m", 400)
    lengths = sorted(len(row["chosen"].split()) for row in rows)
    assert 95 < lengths[200] < 115  # the median
    labels = [row["label"] for row in bench.models.make_rows("kto", "tiny", 4)]
    assert labels == ["desirable", "undesirable"] * 2


def timed(side: str, speed: float, mib: int, setting: str = "padded") -> dict[str, Any]:
    found = {"method": "sft", "shape": "135m", "side": side, "setting": setting, "tokens_per_second": speed}
    return {"status": "done", "reason": None, **found, "step_ms": 10.0, "peak_bytes": mib * 2**20}


def test_the_table_has_ratios_beside_the_best_setting_of_the_peer(bench: SimpleNamespace) -> None:
    results = {
        "sft/135m/ours": timed("ours", 2600, 700),
        "sft/135m/peer": timed("peer", 1000, 900),
        "sft/135m/peer-padding_free": timed("peer", 2000, 1000, "padding_free"),
        "dpo/135m/ours": {"status": "failed", "reason": "stopped after 75 s"},
    }
    text = bench.report.report(results)
    assert "| sft | 135m | 2,600 | 2,000 | 1.30× | 700 | 1,000 | 0.70× | yes |" in text
    assert "- `dpo/135m/ours`: stopped after 75 s" in text


def test_operations_that_compute_are_counted_and_views_are_not(bench: SimpleNamespace) -> None:
    import torch

    x = torch.randn(4, 4, requires_grad=True)
    with bench.profile.Operations() as operations:
        (x.view(16) * 2).sum().backward()
    # Forward: a product and a sum. Backward: ones for the sum's gradient, and a product.
    assert operations.count == 4


def test_kernels_launches_waits_and_copies_are_told_apart(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile of a GPU's step, as the profiler would give it."""
    import torch

    host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name: str, where: Any, microseconds: float = 0.0, annotation: bool = False) -> SimpleNamespace:
        spent = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=where, time_range=spent, is_user_annotation=annotation)

    def average(key: str, where: Any, count: int, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=where, count=count, self_device_time_total=microseconds, is_user_annotation=False
        )

    events = [
        *(event("cudaLaunchKernel", host) for _ in range(3)),
        event("cuLaunchKernelEx", host),
        event("cudaMemcpyAsync", host),
        event("cudaStreamSynchronize", host),
        event("aten::_local_scalar_dense", host),
        event("gemm", device, 500.0),
        event("gemm", device, 1500.0),
        event("softmax", device, 100.0),
        event("Memcpy HtoD (Pageable -> Device)", device, 10.0),
        event("Memset (Device)", device, 5.0),
        event("Optimizer.step", device, 9000.0, annotation=True),
    ]
    averages = [
        average("aten::mm", host, 2, 2000.0),
        average("gemm", device, 2, 2000.0),
        average("aten::softmax", host, 1, 100.0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    profile = bench.profile.StepProfile(3)
    profile.read(SimpleNamespace(events=lambda: events, key_averages=lambda: averages))
    found = profile.found
    assert (found["kernels"], found["launches"], found["waits"], found["items"]) == (3, 4, 1, 1)
    assert found["copies"] == {"HtoD": 1, "set": 1} and found["device_ms"] == pytest.approx(2.115)
    assert found["top_operations"] == [
        {"name": "aten::mm", "calls": 2, "ms": 2.0},
        {"name": "aten::softmax", "calls": 1, "ms": 0.1},
    ]
    assert found["top_kernels"][0] == {"name": "gemm", "calls": 2, "ms": 2.0}


def test_waits_are_named_by_the_line_that_waits(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import torch

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    profile = bench.profile.StepProfile(3)
    shown = warnings.showwarning
    profile.watch_waits()
    for _ in range(2):
        warnings.warn("called a synchronizing CUDA operation", UserWarning)
        warnings.warn("something else", UserWarning)
    profile.stop_watching()
    assert modes == ["warn", "default"] and warnings.showwarning is shown
    ((place, count),) = profile.found["waits_at"].items()
    assert count == 2 and "test_gpu_check.py:" in place
