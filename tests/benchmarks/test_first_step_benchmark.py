"""The benchmark of the way to the first step measures what a command and those that it starts take."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "first_step.py"


@pytest.fixture(scope="module")
def first_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_step", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_step_is_noticed(first_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_step, "_EVERY", 0.02)
    code = "import sys, time; time.sleep(0.1); print('INFO step 1/2', file=sys.stderr, flush=True); time.sleep(0.3)"
    found = first_step.measure([sys.executable, "-c", code], tmp_path)
    assert found.to_first_step > 0.1 and found.memory > 1 << 20 and found.processors >= 0


def test_a_run_that_fails_says_why(first_step: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        first_step.measure([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path)
