"""The example of distillation: in small that it runs, in full that the student comes within five points of its teacher."""

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
def test_the_student_comes_within_five_points_of_its_teacher(example: ModuleType, tmp_path: Path) -> None:
    right = {name: share for name, (share, _) in example.run(tmp_path)["sampled_right"].items()}
    assert right["teacher"] > 0.9 and 0.3 < right["student"] < 0.6
    assert right["distilled"] > right["teacher"] - 0.05
