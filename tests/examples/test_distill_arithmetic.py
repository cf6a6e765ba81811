"""The example of distillation: that it runs, and that with a fifth of its steps the student comes nearer to its teacher."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from statistics import fmean

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "distill_arithmetic.py"


@pytest.mark.slow
def test_the_student_comes_nearer_to_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence on its own completions falls by a third at least, and it answers no worse beyond chance."""
    spec = importlib.util.spec_from_file_location("example_distill_arithmetic", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)
    spec.loader.exec_module(example)

    right = example.run(tmp_path, scale=0.2)["sampled_right"]

    run = tmp_path / "distilled" / "distill"
    assert (run / "model" / "model.safetensors").is_file()
    divergence = [json.loads(line)["divergence"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert fmean(divergence[-5:]) < 2 / 3 * fmean(divergence[:5])
    (before, before_error), (after, after_error) = right["student"], right["distilled"]
    assert after - before > -3 * (before_error**2 + after_error**2) ** 0.5
    written = json.loads((tmp_path / "report.json").read_text())["sampled_right"]
    assert {name: tuple(pair) for name, pair in written.items()} == right
