"""One step of GRPO, phase by phase, beside TRL's `GRPOTrainer` in one run, on SmolLM2-135M-Instruct.

    python benchmarks/online.py [--model DIR] [--precision float32 bf16] [--rounds 2] [--threads 2] [--output FILE]

Both sides draw 8 completions of 64 tokens for each of 8 prompts, score them by one function, compute the log-probabilities of the
reference, and make one step on all 64 with the same hyper-parameters: every weight trained by AdamW, GRPO's loss with a KL to the
reference in it, no gradient checkpointing. End tokens end nothing, so both train on as many tokens. Each measurement is a process
of its own, whose first step isn't timed; rounds go through all contenders in turn, every setting of TRL's is run and the fastest
is compared. Memory is what is resident at the peak of the steps. `cpu` counts processor time, which other people's work on the
machine changes less than the clock's; with more than one thread it counts threads that wait, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from generation import MODEL, QUESTIONS, machine
from online_contenders import PHASES, SETTINGS, Work

HERE = Path(__file__).resolve().parent
SPEED, MEMORY = 2.5, 0.75
"""Least speed over TRL's, and most of its memory."""


def main() -> None:
    options = parse()
    with options.prompts.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line in lines]
    prompts = [texts[number % len(texts)] for number in range(options.num_prompts)]
    contenders = [(name, setting) for name in options.contender for setting in SETTINGS[name]]
    cells = []
    for precision in options.precision:
        runs: dict[str, list[dict[str, Any]]] = {f"{name}/{setting}": [] for name, setting in contenders}
        for _ in range(options.rounds):
            for name, setting in contenders:
                work = Work(
                    contender=name, setting=setting, model=options.model, precision=precision, threads=options.threads,
                    prompts=prompts, completions=options.completions, tokens=options.tokens, steps=options.steps,
                )  # fmt: skip
                runs[f"{name}/{setting}"].append(run(work, options.timeout))
        cells.append(cell(precision, runs))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(options), "cells": cells}
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n" + machine(options) + "\n\n" + table(cells))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--contender", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=2, help="threads of each contender's products")
    parser.add_argument("--prompts", type=Path, default=QUESTIONS, help="JSON Lines with a `prompt` as text")
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--completions", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one process may take")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/online.json"))
    parser.set_defaults(device="cpu")
    return parser.parse_args()


def run(work: Work, timeout: float) -> dict[str, Any]:
    """Run a contender in a process of its own and return what it measured, or the reason where it failed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": str(work.threads), "ACCELERATE_USE_CPU": "1"}
    name = f"{work.contender}/{work.setting}/{work.precision}"
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / "online_contenders.py")], input=json.dumps(dataclasses.asdict(work)),
            capture_output=True, text=True, env=environment, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {timeout:.0f} s"}
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    seconds = ", ".join(f"{step['seconds']:.1f}" for step in found["steps"])
    print(f"{name}: {seconds} s", file=sys.stderr, flush=True)
    return found


def cell(precision: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of all steps in one precision, and ours over the fastest setting of TRL's."""
    rows: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        steps = [step for each in found for step in each.get("steps", ())]
        if not steps:
            rows[name] = {"reason": found[0]["failed"]}
            continue
        rows[name] = {
            "seconds": statistics.median(step["seconds"] for step in steps),
            "cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps),
            "phases": {
                phase: [statistics.median(step["phases"].get(phase, (0, 0))[k] for step in steps) for k in (0, 1)]
                for phase in PHASES
            },
            "peak_mib": statistics.median(each["resident_bytes"] for each in found if "steps" in each) / 2**20,
            "others_cores": statistics.median(step["others_cores"] for step in steps),
            "runs": found,
        }
    made: dict[str, Any] = {"precision": precision, "rows": rows}
    others = [name for name, row in rows.items() if name.startswith("trl/") and "seconds" in row]
    mine = rows.get("ours/auto", {})
    if others and "seconds" in mine:
        made["best"] = best = min(others, key=lambda name: rows[name]["seconds"])
        for measure in ("seconds", "cpu_seconds"):
            made[f"{measure}_ratio"] = rows[best][measure] / mine[measure]
        made["memory_ratio"] = mine["peak_mib"] / rows[best]["peak_mib"]
    return made


def table(cells: list[dict[str, Any]]) -> str:
    """Return the cells in Markdown: seconds by the clock, and processor seconds in brackets."""
    lines = [
        f"| precision | contender | step s (cpu) | {' | '.join(PHASES)} | MiB | others' cores |",
        "|---|---|---|" + "---|" * (len(PHASES) + 2),
    ]
    for one in cells:
        for name, row in one["rows"].items():
            if "reason" in row:
                lines.append(f"| {one['precision']} | {name} | – ({row['reason']}) |" + " – |" * (len(PHASES) + 2))
                continue
            phases = " | ".join(f"{wall:.1f} ({cpu:.1f})" for wall, cpu in row["phases"].values())
            lines.append(
                f"| {one['precision']} | {name} | {row['seconds']:.1f} ({row['cpu_seconds']:.1f}) | {phases} |"
                f" {row['peak_mib']:,.0f} | {row['others_cores']:.2f} |"
            )
        if "best" in one:
            speed, memory = one["seconds_ratio"], one["memory_ratio"]
            verdict = [
                f"ours {speed:.2f}× ({one['cpu_seconds_ratio']:.2f}× by cpu) of {one['best']}, {SPEED}×"
                f" {'met' if speed >= SPEED else 'missed'}",
                f"memory {memory:.2f} of it, {MEMORY} {'met' if memory <= MEMORY else 'missed'}",
            ]
            lines.append(f"| {one['precision']} | targets | {'; '.join(verdict)} |" + " |" * (len(PHASES) + 2))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
