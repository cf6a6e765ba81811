"""The benchmark of speculative decoding in small: every contender draws, and those of ours the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.testing.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_contender_draws_the_same_tokens(tmp_path: Path) -> None:
    model, output = save_tiny(tmp_path / "model", seed=0), tmp_path / "found.json"
    draft = save_tiny(tmp_path / "draft", seed=1, layers=1)
    command = [sys.executable, str(ROOT / "benchmarks" / "speculative.py"), "--model", str(model)]
    command += ["--draft-model", str(draft), "--precision", "float32", "--batches", "1", "8", "--rounds", "1"]
    command += ["--tokens", "12", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text())["rows"]
    found = {(row["work"], row["batch"], row["contender"]) for row in rows}
    ours = {(kind, batch, name) for kind in ("copy", "questions") for batch in (1, 8) for name in ("ngram", "model")}
    assert (
        ours | {("epochs", 8, "suffix"), ("copy", 1, "transformers, look-up"), ("copy", 1, "transformers, model")}
        <= found
    )
    assert all(row["differing"] == 0 and row["speed_up"] > 0 for row in rows)
    assert "| epochs | 8 | suffix |" in done.stdout
