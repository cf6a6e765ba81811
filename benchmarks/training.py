"""Training speed and memory beside TRL's, on SmolLM2-135M-Instruct and GSM8K: the same rows, tokens and hyper-parameters.

    python benchmarks/training.py --data PATH_OF_GSM8K [--method sft dpo reward_model kto] [--precision float32 bf16] [--rounds 2]

Both sides take a GPU where there is one; `--batch 32` gives it more to do. Each cell runs in its own process, ours and the
peer's in turn. Every one of the peer's `PEER_SETTINGS` is run and the fastest is compared. Steps are
timed from the end of one to the end of the next, without the first `WARM_UP`, which allocate memory; memory is the process's peak
resident set, on a GPU the peak that was allocated there. The result is a table on stdout and JSON beside it
(`--output`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import PEER_SETTINGS, RECORDS, SIDES, Cell, Clock, encoded, matmul_rate, peak_memory, step_tokens

MODEL = "models/SmolLM2-135M-Instruct"
WARM_UP = 3
FILES = {
    "sft": "sft.jsonl",
    "dpo": "preferences.jsonl",
    "reward_model": "preferences.jsonl",
    "kto": "unpaired.jsonl",
}
PASSES = {"sft": 3, "dpo": 4, "reward_model": 3, "kto": 6}
"""Forward passes' worth of work: a backward pass counts two; DPO's reference one; KTO's reference one, its KL two."""
PARAMETERS = 134_515_008
BODY = 106_203_456
"""Parameters outside the embedding: what every token is multiplied by."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with sft.jsonl and preferences.jsonl")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--method", nargs="+", default=list(RECORDS), choices=list(RECORDS))
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--steps", type=int, default=9, help="steps a cell, warm-up included")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--rounds", type=int, default=2, help="times that each cell is run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        side, method, precision, setting = options.cell.split("/")
        clock = Clock()
        SIDES[side](make_cell(options, method, precision, setting), clock)
        print(json.dumps({"seconds": clock.seconds, "peak": peak_memory()}))
        return
    rates = {precision: matmul_rate(precision) for precision in options.precision}
    cells = []
    for method in options.method:
        tokens = count_tokens(options, method)
        for precision in options.precision:
            cells.append(compare(options, method, precision, tokens, rates[precision]))
            print(table(cells), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"matmul_gflops": rates, "cells": cells}, indent=1) + "\n")


def compare(options: argparse.Namespace, method: str, precision: str, tokens: list[dict[str, int]], rate: float) -> Any:
    """Run one method in one precision, ours and each setting of the peer in turn."""
    sides = [("ours", "packed"), *(("peer", setting) for setting in PEER_SETTINGS[method])]
    runs: dict[str, list[dict[str, Any]]] = {f"{side}/{setting}": [] for side, setting in sides}
    for _ in range(options.rounds):
        for side, setting in sides:
            runs[f"{side}/{setting}"].append(_run(options, side, method, precision, setting))
    timed = tokens[WARM_UP : options.steps]
    plain = sum(step["plain"] for step in timed)
    work = sum(step["flops"] for step in timed)
    rows = {}
    for name, found in runs.items():
        totals = [sum(run["seconds"][WARM_UP:]) for run in found]
        rows[name] = {
            "seconds": totals,
            "tokens_per_second": plain / statistics.median(totals),
            "rows_per_second": options.batch * len(timed) / statistics.median(totals),
            "peak_mib": statistics.median(run["peak"] for run in found) / 2**20,
            "of_matmul_rate": work / statistics.median(totals) / rate,
        }
    best = max((name for name in rows if name.startswith("peer/")), key=lambda name: rows[name]["tokens_per_second"])
    mine = rows["ours/packed"]
    return {
        "method": method,
        "precision": precision,
        "rows": rows,
        "peer": best,
        "speed_ratio": mine["tokens_per_second"] / rows[best]["tokens_per_second"],
        "memory_ratio": mine["peak_mib"] / rows[best]["peak_mib"],
    }


def _run(options: argparse.Namespace, side: str, method: str, precision: str, setting: str) -> dict[str, Any]:
    name = f"{side}/{method}/{precision}/{setting}"
    command = [sys.executable, __file__, "--data", str(options.data), "--model", options.model]
    command += ["--steps", str(options.steps), "--batch", str(options.batch), "--cell", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {[round(s, 2) for s in result['seconds']]} s, {result['peak'] / 2**20:.0f} MiB", file=sys.stderr)
    return result


def make_cell(options: argparse.Namespace, method: str, precision: str = "float32", setting: str = "padded") -> Cell:
    return Cell(method, options.model, rows(options, method), precision, setting, options.batch, options.steps)


def rows(options: argparse.Namespace, method: str) -> list[dict[str, Any]]:
    with (options.data / FILES[method]).open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    if RECORDS[method] == "preference":  # one pair per question: the file has several, and a step would repeat prompts
        found = list({row["prompt"]: row for row in found}.values())
    if method == "kto":  # good and bad in turn, each question once
        once = {row["prompt"]: row for row in found}.values()
        good, bad = ([row for row in once if row["label"] == label] for label in ("desirable", "undesirable"))
        found = [row for pair in zip(good, bad, strict=False) for row in pair]
    return found[: options.batch * options.steps]


def count_tokens(options: argparse.Namespace, method: str) -> list[dict[str, int]]:
    """Count each step's tokens (each response with its prompt) and the least floating-point work it takes.

    Least work: the body for every token, prompts computed once; the vocabulary for scored tokens; `PASSES` of both.
    """
    found = encoded(make_cell(options, method))
    head = PARAMETERS - BODY
    steps = []
    for number, plain in enumerate(step_tokens(found, options.batch)):
        batch = found[number * options.batch : (number + 1) * options.batch]
        shared = sum(row.num_tokens for row in batch)
        responses = sum(len(ids) for row in batch for ids in row.responses)
        scored = 0 if method == "reward_model" else head * responses
        steps.append({"plain": plain, "flops": 2 * PASSES[method] * (BODY * shared + scored)})
    return steps


def table(cells: list[Any]) -> str:
    lines = [
        "| method | precision | ours tokens/s | peer tokens/s (setting) | speed | ours MiB | peer MiB | memory | ours of"
        " matmul rate | peer of matmul rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        mine, other = cell["rows"]["ours/packed"], cell["rows"][cell["peer"]]
        lines.append(
            f"| {cell['method']} | {cell['precision']} | {mine['tokens_per_second']:.0f} |"
            f" {other['tokens_per_second']:.0f} ({cell['peer'].removeprefix('peer/')}) | {cell['speed_ratio']:.2f}× |"
            f" {mine['peak_mib']:.0f} | {other['peak_mib']:.0f} | {cell['memory_ratio']:.2f}× |"
            f" {mine['of_matmul_rate']:.0%} | {other['of_matmul_rate']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
