"""Seconds of GRPO's rollouts in the second epoch over its prompts, with a suffix draft and without, in two runs that take turns.

    python benchmarks/grpo_drafts.py [--model DIR] [--precision bf16] [--problems 128] [--batch 16] [--temperature 1.0] [--json]

A tiny model (that of `confidence.py`) is trained by GRPO for two epochs on problems of the embedded task, eight completions
each. In the second epoch the suffix draft of `generation.draft: suffix` knows what the policy wrote on each problem before. Both
runs draw the same completions, up to rounding in 16 bits. Each is a process of its own, so that what one measures doesn't help
the other; they follow one another `--rounds` times, and the ratio is of the medians of an epoch's seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from confidence import KINDS, MOST_TOKENS, streams, train

from rlhf_core import registry, setup_logging
from rlhf_core.testing.arithmetic_task import verify

DRAFTS = (None, "suffix")


def main() -> None:
    options = parse()
    setup_logging()
    if options.draft is not None:
        run(options, None if options.draft == "none" else options.draft)
        return
    options.model = options.model or train(options.output, options.steps, options.seed)
    found: dict[str, list[list[dict[str, Any]]]] = {str(draft): [] for draft in DRAFTS}
    for _ in range(options.rounds):
        for draft in DRAFTS:
            subprocess.run([*again(options), "--draft", str(draft).lower()], check=True)
            lines = (options.output / f"grpo-{draft}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            found[str(draft)].append([row for row in map(json.loads, lines) if "seconds/rollout" in row])
    report = compare(found, options.problems // options.batch)
    print(json.dumps(report) if options.json else table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model that was trained before; trains none")
    parser.add_argument("--steps", type=int, default=500, help="of the training from nothing")
    parser.add_argument("--precision", default="bf16", choices=["float32", "bf16"])
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="problems per rollout")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--draft", choices=["none", "suffix"], help="run GRPO once with this draft, and compare nothing"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/grpo_drafts"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def again(options: argparse.Namespace) -> list[str]:
    """Return the command of this program with the same options."""
    given = {name: value for name, value in vars(options).items() if name not in ("draft", "json")}
    return [sys.executable, __file__, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def run(options: argparse.Namespace, draft: str | None) -> None:
    """Train by GRPO for two epochs."""
    rows = [
        row
        for rows in zip(*streams("prompt", -(-options.problems // len(KINDS)), "train", 1), strict=True)
        for row in rows
    ]
    data = options.output / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in islice(rows, options.problems)), encoding="utf-8")
    trainer = registry.get("trainer", "grpo")
    config = trainer.Config.parse(
        {
            "seed": options.seed, "precision": options.precision, "epochs": 2, "batch_size": options.batch, "group_size": 8,
            "learning_rate": options.learning_rate, "max_length": 128, "dataset": {"wrap": "none"},
            "generation": {"max_new_tokens": MOST_TOKENS, "temperature": options.temperature, "draft": draft},
            "logging": {"every": 1},
        }
    )  # fmt: skip
    output = options.output / f"grpo-{draft}"
    trainer(config, model=options.model, data=data, output=output, rewards=[right]).train(overwrite=True)


def right(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(verify(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def compare(found: dict[str, list[list[dict[str, Any]]]], rollouts: int) -> list[dict[str, Any]]:
    """Return for each epoch the rollout's seconds without and with the draft.

    Args:
        found: the metrics of each step, by draft and round.
        rollouts: of an epoch.
    """
    epochs = []
    for epoch, part in enumerate((slice(0, rollouts), slice(rollouts, None)), start=1):
        seconds = {
            draft: [[row["seconds/rollout"] for row in one[part]] for one in rounds] for draft, rounds in found.items()
        }
        plain, drafted = (median(sum(one) for one in seconds[str(draft)]) for draft in DRAFTS)
        tokens = fmean(row["tokens_per_second/rollout"] for one in found[str(None)] for row in one[part])
        epochs.append(
            {
                "epoch": epoch, "no_draft_seconds": plain, "suffix_seconds": drafted, "speed_up": plain / drafted,
                "no_draft_tokens_per_second": tokens,
            }
        )  # fmt: skip
    return epochs


def table(report: list[dict[str, Any]]) -> str:
    lines = ["| epoch | rollouts without a draft, s | with suffix, s | speed-up |", "|---|---|---|---|"]
    for one in report:
        seconds = f"{one['no_draft_seconds']:.1f} | {one['suffix_seconds']:.1f}"
        lines.append(f"| {one['epoch']} | {seconds} | {one['speed_up']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
