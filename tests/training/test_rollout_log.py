"""`rollouts.jsonl` after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.config.training import RolloutsConfig
from rlhf_core.training.rollout_log import RolloutLog


def test_a_resume_keeps_what_was_drawn_before_its_checkpoint(tmp_path: Path) -> None:
    """Rollouts that made no step have the checkpoint's step, and their places lie before those still to come."""
    path = tmp_path / "rollouts.jsonl"
    rows = [(0, 0), (1, 4), (2, 8), (2, 12), (3, 16)]
    path.write_text(
        "".join(
            json.dumps(
                {"step": step, "place": place, "row": 0, "sample": 0, "prompt": "", "completion": "", "reward": 0}
            )
            + "\n"
            for step, place in rows
        )
    )
    RolloutLog(tmp_path, RolloutsConfig(), notify=lambda name, **fields: None).rewind(2, place=12)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["place"]) for row in kept] == rows[:3]
