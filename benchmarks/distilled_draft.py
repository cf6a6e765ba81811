"""A draft model distilled from its target on the embedded task, beside no draft and transformers' assisted generation.

    python benchmarks/distilled_draft.py [--target DIR] [--draft DIR] [--steps 1500] [--batches 1 8 64] [--temperatures 0 1]

The target, 0.9 M weights in four layers, learns sums in written steps (those of `confidence.py`) from right solutions. The draft,
of two narrow layers, learns from the target's distribution at each token of such solutions (`distill`). Problems are held-out
ones, one completion each, which ends where it ends. Contenders and columns are those of `speculative.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from confidence import KINDS, MOST_TOKENS
from inference_compute import fit, problems, write
from speculative import load, machine, measure, table

from rlhf_core import setup_logging
from rlhf_core.testing.tiny import save_tiny


def main() -> None:
    options = parse()
    setup_logging()
    target = options.target or fit(
        "sft", save_tiny(options.output / "start", 0, layers=4, hidden=128, kv_heads=4, max_positions=128),
        solutions(options, options.steps), options.output / "target", options.steps, 64, 0, learning_rate=3e-3,
    )  # fmt: skip
    draft = options.draft or fit(
        "distill", save_tiny(options.output / "small", 1, layers=2, hidden=options.hidden, kv_heads=4, max_positions=128),
        solutions(options, options.draft_steps), options.output / "draft", options.draft_steps, 64, 0, learning_rate=3e-3,
        teacher=str(target),
    )  # fmt: skip
    torch.set_num_threads(options.threads)
    options.model, options.draft_model = str(target), str(draft)
    policy, small = load(options.model, options.precision), load(options.draft_model, options.precision)
    rows = []
    for temperature in options.temperatures:
        options.temperature = temperature
        for batch in options.batches:
            rows += [
                {**row, "work": f"problems, temperature {temperature:g}"}
                for row in measure(policy, small, "problems", batch, options)
            ]
    print("\n" + machine(options) + "\n\n" + table(rows))
    (options.output / "distilled_draft.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a model of the task that was trained before; trains none")
    parser.add_argument("--draft", type=Path, help="its draft, made before; trains none")
    parser.add_argument("--steps", type=int, default=1500, help="of the target's training")
    parser.add_argument("--draft-steps", type=int, default=2000, help="of the distillation")
    parser.add_argument("--hidden", type=int, default=64, help="width of the draft")
    parser.add_argument("--precision", default="bf16", choices=["float32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--output", type=Path, default=Path("runs/distilled_draft"))
    return parser.parse_args()


def solutions(options: argparse.Namespace, steps: int) -> Path:
    """Write the rows of so many steps."""
    return write(options.output / f"solutions-{steps}.jsonl", problems("sft", steps * 64, "train", 0, KINDS))


if __name__ == "__main__":
    main()
