"""The benchmark of confidence-based stopping: its figures by hand, and the whole of it in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_core.testing.tiny import save_tiny


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module: `benchmarks` is no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "confidence", raising=False)
    import confidence

    return confidence


def test_a_line_by_hand(bench: ModuleType) -> None:
    """Two prompts: one of them is answered right now, for 30 tokens less; the other needs 10 less. The means were 50 and 100."""
    found = bench.line("x", [1.0, 1.0], [70.0, 90.0], [0.0, 1.0], [100.0, 100.0])
    assert found == "| x | 100.0 ± 0.0 % | 50.0 ± 50.0 % | 80 ± 10 | 20.0 ± 10.0 % |"


@pytest.mark.slow
def test_in_small(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny", max_positions=128)
    options = ["--model", str(model), "--prompts", "1", "--candidates", "9", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["confidence.py", *options])
    monkeypatch.setattr(bench, "MOST_TOKENS", 12)
    bench.main()
    out = capsys.readouterr().out
    assert "7 prompts, 9 candidates" in out and out.count("\n| ") == 1 + len(bench.samplers(9))
    found = json.loads((tmp_path / "confidence.json").read_text())
    assert all(len(right) == len(tokens) == 7 for right, tokens in found.values())
    assert max(found["confidence"][1]) <= max(found[bench.FIRST][1])


@pytest.mark.slow
def test_the_model_is_trained(bench: ModuleType, tmp_path: Path) -> None:
    assert (bench.train(tmp_path, steps=2, seed=0, batch=4) / "model.safetensors").is_file()
