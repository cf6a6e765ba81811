"""A batch that is larger than the data says what its steps are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer

from rlhf_core.testing.tiny import save_tiny

ROWS = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 64},
            "batch_size: 64 rows per step, and there are 3: the only step takes all of them; a smaller `batch_size`, or more"
            " `epochs`, makes more steps",
        ),
        (
            {"batch_size": 64, "max_steps": 2},
            "batch_size: 64 rows per step, and there are 3: each step takes every row about 21.3 times; `batch_size: 3` takes it"
            " once",
        ),
        ({"batch_size": 3}, None),
        ({"batch_size": 64, "max_steps": 2, "dataset": {"streaming": True}}, None),
    ],
)
def test_fewer_rows_than_a_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], message: str | None
) -> None:
    model = save_tiny(tmp_path / "model")
    SFTTrainer(SFTConfig(**options), model=str(model), data=ROWS, output=None).train()
    found = [line for line in caplog.messages if line.startswith("batch_size")]
    assert found == ([message] if message else [])
