"""Training speed and memory beside TRL's, on SmolLM2-135M-Instruct and GSM8K: the same rows, tokens and hyper-parameters.

    python benchmarks/training.py --data PATH_OF_GSM8K [--method sft dpo reward_model kto] [--precision float32 bf16] [--rounds 2]

Both sides take a GPU where there is one; `--batch 32` gives it more to do. Each cell runs in a process of its own, ours and the
peer's in turn. The peer's best setting counts: every one in `SETTINGS` is run and the fastest compared. Steps are timed from the
end of one to the end of the next, the first `WARM_UP` left out, in which memory is touched for the first time; memory is the
process's peak resident set, on a GPU the most that was allocated there. The result is a table on stdout and JSON beside it
(`--output`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "models/SmolLM2-135M-Instruct"
WARM_UP = 3
MAX_LENGTH = 512
LEARNING_RATE = 1e-6
RECORDS = {"sft": "sft", "dpo": "preference", "reward_model": "preference", "kto": "unpaired"}
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

# What the peer can be told to do that bears on speed here; it runs without gradient checkpointing, which is its default.
# Rows are cut before they reach either side.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}},
    "dpo": {"padded": {}},
    "reward_model": {"padded": {}},
    "kto": {"padded": {}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with sft.jsonl and preferences.jsonl")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--method", nargs="+", default=list(RECORDS), choices=list(RECORDS))
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--steps", type=int, default=9, help="steps a cell, warm-up included")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--rounds", type=int, default=2, help="times that each cell is run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        side, method, precision, setting = options.cell.split("/")
        run = ours if side == "ours" else peer
        seconds = run(options, method, precision, setting)
        print(json.dumps({"seconds": seconds, "peak": _peak_memory()}))
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
    sides = [("ours", "packed"), *(("peer", setting) for setting in SETTINGS[method])]
    runs: dict[str, list[dict[str, Any]]] = {f"{side}/{setting}": [] for side, setting in sides}
    for _ in range(options.rounds):
        for side, setting in sides:
            runs[f"{side}/{setting}"].append(_cell(options, side, method, precision, setting))
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


def _cell(options: argparse.Namespace, side: str, method: str, precision: str, setting: str) -> dict[str, Any]:
    name = f"{side}/{method}/{precision}/{setting}"
    command = [sys.executable, __file__, "--data", str(options.data), "--model", options.model]
    command += ["--steps", str(options.steps), "--batch", str(options.batch), "--cell", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {[round(s, 2) for s in result['seconds']]} s, {result['peak'] / 2**20:.0f} MiB", file=sys.stderr)
    return result


def encoded(options: argparse.Namespace, method: str) -> list[Any]:
    """Return the rows of the benchmark as token ids, which both sides train on."""
    from transformers import AutoTokenizer

    from rlhf_core.config import TrainerConfig
    from rlhf_core.data import open_dataset

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = TrainerConfig(max_length=MAX_LENGTH)
    dataset = open_dataset(rows(options, method), RECORDS[method], tokenizer, config=config)
    return [dataset[i] for i in range(options.batch * options.steps)]


def rows(options: argparse.Namespace, method: str) -> list[dict[str, Any]]:
    with (options.data / FILES[method]).open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    if (
        RECORDS[method] == "preference"
    ):  # one pair a question, as the file holds several and a step would else repeat prompts
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
    found = encoded(options, method)
    head = PARAMETERS - BODY
    steps = []
    for start in range(0, len(found), options.batch):
        batch = found[start : start + options.batch]
        shared = sum(row.num_tokens for row in batch)
        responses = sum(len(ids) for row in batch for ids in row.responses)
        plain = sum(len(row.prompt_ids) * len(row.responses) + sum(map(len, row.responses)) for row in batch)
        scored = 0 if method == "reward_model" else head * responses
        steps.append({"plain": plain, "flops": 2 * PASSES[method] * (BODY * shared + scored)})
    return steps


def ours(options: argparse.Namespace, method: str, precision: str, setting: str) -> list[float]:
    from rlhf_core import registry

    cls: Any = registry.get("trainer", method)
    config = cls.Config(
        learning_rate=LEARNING_RATE, batch_size=options.batch, max_steps=options.steps, max_length=MAX_LENGTH,
        precision=precision, lr_schedule="constant", warmup_ratio=0, dataset={"shuffle": False},
        logging={"progress": False},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        trainer = cls(config, model=options.model, data=rows(options, method), output=output)
        trainer.train()
        lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines]


def peer(options: argparse.Namespace, method: str, precision: str, setting: str) -> list[float]:
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    class InOrder:
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it is tokenised already

    class SFT(InOrder, trl.SFTTrainer):  # type: ignore[misc,name-defined]
        pass

    class DPO(InOrder, trl.DPOTrainer):  # type: ignore[misc,name-defined]
        pass

    class Reward(InOrder, trl.RewardTrainer):  # type: ignore[misc,name-defined]
        pass

    class KTO(InOrder, trl.KTOTrainer):  # type: ignore[misc,name-defined]
        pass

    found = encoded(options, method)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        shared: dict[str, Any] = {
            "output_dir": directory, "per_device_train_batch_size": options.batch, "max_steps": options.steps,
            "max_length": MAX_LENGTH, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
            "use_cpu": not torch.cuda.is_available(), "bf16": precision == "bf16", "report_to": "none",
            "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
            "dataloader_pin_memory": False, **SETTINGS[method][setting],
        }  # fmt: skip
        if method == "sft":
            table = [
                {
                    "input_ids": row.prompt_ids + row.responses[0],
                    "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.responses[0]),
                }
                for row in found
            ]
            trainer = SFT(
                model=model,
                args=trl.SFTConfig(**shared, completion_only_loss=True),
                train_dataset=Dataset.from_list(table),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        elif method == "reward_model":
            table = [
                {"chosen_ids": row.prompt_ids + row.responses[0], "rejected_ids": row.prompt_ids + row.responses[1]}
                for row in found
            ]
            trainer = Reward(
                model=_classifier(options.model, tokenizer),
                args=trl.RewardConfig(**shared),
                train_dataset=Dataset.from_list(table),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        elif method == "kto":
            others = [
                found[start + (i + 1) % options.batch]
                for start in range(0, len(found), options.batch)
                for i in range(options.batch)
            ]
            table = [
                {
                    "prompt_ids": row.prompt_ids,
                    "completion_ids": row.responses[0],
                    "KL_completion_ids": other.responses[0],
                    "label": bool(row.per_response["desirable"][0]),
                }
                for row, other in zip(found, others, strict=True)
            ]
            trainer = KTO(
                model=model,
                ref_model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
                args=trl.KTOConfig(**shared, beta=0.1),
                train_dataset=Dataset.from_list(table),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        else:
            table = [
                {"prompt_ids": row.prompt_ids, "chosen_ids": row.responses[0], "rejected_ids": row.responses[1]}
                for row in found
            ]
            trainer = DPO(
                model=model,
                ref_model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
                args=trl.DPOConfig(**shared, beta=0.1),
                train_dataset=Dataset.from_list(table),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        trainer.train()
    return clock.seconds


def _classifier(model: str, tokenizer: Any) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    made.config.pad_token_id = tokenizer.pad_token_id
    return made


def matmul_rate(precision: str) -> float:
    """Return the machine's measured rate on the model's own matrix shapes, floating-point operations a second."""
    import torch

    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times_each = 50 if device == "cuda" else 1  # a GPU's product takes less time than its launch
    rates = []
    for m, k, n in ((2048, 576, 1536), (2048, 1536, 576), (2048, 576, 576)):
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        wait()
        times = []
        for _ in range(30):
            began = time.perf_counter()
            for _ in range(times_each):
                a @ b
            wait()
            times.append((time.perf_counter() - began) / times_each)
        rates.append(2 * m * k * n / statistics.median(times))
    return statistics.fmean(rates)


def _peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no peak memory in /proc/self/status")


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
