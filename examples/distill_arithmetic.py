"""Distil a tiny language model: a small student that learned from wrong demonstrations learns to answer as its teacher does.

    python examples/distill_arithmetic.py [--output runs/distill-arithmetic] [--seed 0]

The task is arithmetic in written steps (`rlhf_core.testing.arithmetic_task`). The teacher imitates right demonstrations; the
student, with 57 % of the teacher's weights, imitates demonstrations of which half are wrong. Then the student answers
problems, and learns at every token of its answers what its teacher would say there (`distill --on_policy 1`): without a
demonstration, without a reward. After every stage the model answers the same held-out problems. Everything depends on the seed
alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlhf_core import PolicyModel, registry, setup_logging
from rlhf_core.cli import exit_code
from rlhf_core.testing.arithmetic_task import ArithmeticTask, Row, verify
from rlhf_core.testing.tiny import save_tiny

RIGHT, NOISY = (ArithmeticTask("sums", terms=4, digits=1, wrong=wrong) for wrong in (0.0, 0.5))
TEACHER = {"hidden": 128, "heads": 4, "kv_heads": 4, "layers": 4}
STUDENT = {"hidden": 96, "heads": 4, "kv_heads": 4, "layers": 4}
SFT_STEPS, SFT_BATCH = {"teacher": 550, "student": 430}, 48
STEPS, BATCH = 200, 64
MOST_TOKENS = 34
"""Most tokens in an answer; a right one has at most 31."""

Estimate = tuple[float, float]
"""A mean over problems and its standard error."""


def write(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows to a JSONL file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(method: str, folder: Path, model: Path, data: Path, **options: Any) -> Path:
    """Train a model with a method of the registry; return the directory of the trained one."""
    trainer = registry.get("trainer", method)
    config = trainer.Config.parse({"max_length": 128, "warmup_ratio": 0.05, "logging": {"every": 20}, **options})
    result = trainer(config, model=model, data=data, output=folder / method).train(overwrite=True)
    return Path(result.model_dir)


def imitate(name: str, folder: Path, task: ArithmeticTask, shape: dict[str, int], seed: int, scale: float) -> Path:
    """Train a model of random weights on a task's demonstrations; return its directory."""
    start = save_tiny(folder / name / "start", seed, max_positions=128, **shape)
    steps = max(2, round(SFT_STEPS[name] * scale))
    data = write(folder / name / "demonstrations.jsonl", task.rows("sft", steps * SFT_BATCH, seed=seed))
    options = {"seed": seed, "learning_rate": 3e-3, "batch_size": SFT_BATCH, "max_steps": steps}
    optimizer = {"beta2": 0.99, "weight_decay": 0.01}
    return train("sft", folder / name, start, data, optimizer=optimizer, **options)


def distil(folder: Path, student: Path, teacher: Path, seed: int, scale: float) -> Path:
    """Train the student on its own answers to new problems by what the teacher says at each token; return its directory."""
    steps = max(2, round(STEPS * scale))
    prompts = write(folder / "distilled" / "prompts.jsonl", RIGHT.rows("prompt", steps * BATCH, seed=seed + 1))
    return train(
        "distill", folder / "distilled", student, prompts,
        teacher=str(teacher), on_policy=1, prompts_only=True, divergence="reverse_kl",
        generation={"max_new_tokens": MOST_TOKENS},
        seed=seed, learning_rate=2e-3, batch_size=BATCH, max_steps=steps, optimizer={"beta2": 0.99},
    )  # fmt: skip


def sampled_right(model: Path, seed: int, count: int) -> list[float]:
    """Return the share of right answers among four samples at temperature 1, by held-out problem."""
    policy = PolicyModel.from_pretrained(model)
    prompts = list(islice(RIGHT.problems(split="test", seed=seed + 2), count))
    drawn = policy.generate(prompts, n=4, max_new_tokens=MOST_TOKENS, seed=seed + 2)
    return [fmean(verify(prompt, one.text) for one in group) for prompt, group in zip(prompts, drawn, strict=True)]


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean over problems and its standard error; samples of one problem are not independent."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def run(folder: Path, *, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Train teacher and student, distil, print how many sampled answers are right, and write and return the report."""
    right: dict[str, Estimate] = {}
    seconds: dict[str, float] = {}
    models: dict[str, Path] = {}
    for name in ("teacher", "student", "distilled"):
        began = time.monotonic()
        if name == "distilled":
            models[name] = distil(folder, models["student"], models["teacher"], seed, scale)
        else:
            task, shape = (RIGHT, TEACHER) if name == "teacher" else (NOISY, STUDENT)
            models[name] = imitate(name, folder, task, shape, seed, scale)
        seconds[name] = time.monotonic() - began
        right[name] = estimate(sampled_right(models[name], seed, max(2, round(300 * scale))))
        share, error = (100 * value for value in right[name])
        print(f"{name:9}  {share:5.1f} ± {error:.1f} % of sampled answers right  ({seconds[name]:.0f} s)", flush=True)
    report = {"seed": seed, "scale": scale, "sampled_right": right, "seconds": seconds}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/distill-arithmetic"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, rows and problems (default: 1)")
    options = parser.parse_args()
    setup_logging()
    run(options.output, seed=options.seed, scale=options.scale)


if __name__ == "__main__":
    sys.exit(exit_code(main))
