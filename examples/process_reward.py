"""Teach a tiny model to find the first wrong step of written arithmetic, and measure it on problems it never met.

    python examples/process_reward.py [--output runs/process-reward] [--seed 0] [--steps 700]

A model that can't add can't find a sum that is wrong, so it learns to write right solutions first, then to judge them. Solutions
come from the embedded task (`rlhf_core.testing.arithmetic_task`): a right one and one with a slip for each problem, with a label
for every step. Whether a problem is for training or for testing is a function of the problem, so no test problem is
ever trained on; the script counts that, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_core import registry, setup_logging
from rlhf_core.cli import exit_code
from rlhf_core.testing.arithmetic_task import ArithmeticTask, Row
from rlhf_core.testing.tiny import save_tiny

TASK = ArithmeticTask("sums", terms=4, digits=1)
BATCH = 64


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder: Path, *, seed: int = 0, steps: int = 400) -> dict[str, Any]:
    """Train, print and write what was measured on held-out solutions; return it."""
    train = list(TASK.rows("preference", steps * BATCH, seed=seed))
    held_out = list(
        {row["prompt"]: row for row in islice(TASK.rows("preference", 4000, split="test", seed=seed), 4000)}.values()
    )
    known = {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    model = save_tiny(folder / "start", seed, layers=4, hidden=128, kv_heads=4, max_positions=128)
    right = [{"prompt": row["prompt"], "response": row["chosen"]} for row in train]
    shared_options: dict[str, Any] = {
        "seed": seed,
        "warmup_ratio": 0.05,
        "batch_size": BATCH,
        "max_steps": steps,
        "max_length": 128,
        "optimizer": {"beta2": 0.99},
        "logging": {"every": 50},
    }
    sft = registry.get("trainer", "sft")
    written = sft(
        sft.Config(learning_rate=3e-3, **shared_options),
        model=model,
        data=write(folder / "solutions.jsonl", right),
        output=folder / "sft",
    ).train(overwrite=True)
    judge = registry.get("trainer", "process_reward")
    result = judge(
        judge.Config(learning_rate=1e-3, **shared_options),
        model=written.model_dir,
        data=write(folder / "train.jsonl", train),
        eval_data=write(folder / "heldout.jsonl", held_out),
        output=folder / "judge",
    ).train(overwrite=True)
    names = ("first_error_found", "right_let_pass", "step_accuracy", "accuracy", "outcome_accuracy")
    report = {name: [result.eval_metrics[f"eval_{name}"], result.eval_metrics[f"eval_{name}_se"]] for name in names}
    report = {"problems": len(held_out), "trained on": len(known), "steps": result.step, **report}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{len(held_out)} held-out problems, {len(known)} of them trained on")
    for name in names:
        value, error = report[name]
        print(f"{name.replace('_', ' ')}: {100 * value:.1f} ± {100 * error:.1f} %")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/process-reward"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps (default: %(default)s)")
    options = parser.parse_args()
    setup_logging()
    run(options.output, seed=options.seed, steps=options.steps)


if __name__ == "__main__":
    sys.exit(exit_code(main))
