"""The example of distillation: in small that it runs, in full that the student learns from its teacher."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "distill_arithmetic.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_distill_arithmetic", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_in_small(example: ModuleType, tmp_path: Path) -> None:
    report = example.run(tmp_path, scale=0.01)
    assert json.loads((tmp_path / "report.json").read_text())["sampled_right"].keys() == report["seconds"].keys()
    assert (tmp_path / "distilled" / "distill" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_student_answers_more_problems_right(example: ModuleType, tmp_path: Path) -> None:
    """By more than three standard errors of both shares; how good each model gets differs between processors."""
    right = example.run(tmp_path)["sampled_right"]
    (before, before_error), (after, after_error) = right["student"], right["distilled"]
    assert right["teacher"][0] > before + 0.2
    assert after - before > 3 * (before_error**2 + after_error**2) ** 0.5
