"""How long many rows take to the first step, in seconds, seconds of processors and memory.

    .venv/bin/python benchmarks/first_step.py --data ROWS.jsonl --times 40 --model MODEL

The rows of a file, repeated, train a model of two narrow layers with MODEL's tokenizer: the first time, when the rows were seen
before, resumed, and streamed. Beside it stands the least that the `datasets` library's own `map` takes, which makes ids of the
texts alone: no checks, no masks, no report. Each run is a process of its own; memory is that of all its processes, shared pages
counted once (PSS).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple

import psutil

_EVERY = 0.5
"""Seconds between two looks at the memory."""

_MAP = """
import sys, datasets, transformers
data, model, processes = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
rows = datasets.load_dataset("json", data_files=data, split="train")
def encode(batch):
    return {name: tokenizer(batch[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "response")}
rows.map(encode, batched=True, num_proc=int(processes))
print(" step 1/", file=sys.stderr)
"""


class Measured(NamedTuple):
    """What one run took."""

    to_first_step: float
    """Seconds."""
    processors: float
    """Seconds of all processors, to the end."""
    memory: int
    """Most bytes at one time."""


def measure(command: list[str], folder: Path) -> Measured:
    """Run a command, and time it until its first step.

    Raises:
        RuntimeError: it fails, or makes no step.
    """
    began = time.perf_counter()
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    steps: list[float] = []
    lines: list[str] = []
    reader = threading.Thread(target=_watch, args=(process.stderr, began, steps, lines))
    reader.start()
    most, spent = 0, 0.0
    while process.poll() is None:
        memory, seconds = _of_tree(process.pid)
        most, spent = max(most, memory), max(spent, seconds)
        time.sleep(_EVERY)
    reader.join()
    if process.returncode or not steps:
        raise RuntimeError("".join(lines[-5:]))
    return Measured(steps[0], spent, most)


def _watch(stream: IO[str], began: float, steps: list[float], lines: list[str]) -> None:
    """Note when a step was logged."""
    for line in stream:
        lines.append(line)
        if " step " in line:
            steps.append(time.perf_counter() - began)


def _of_tree(pid: int) -> tuple[int, float]:
    """Return the memory of a process and those that it started, and the seconds of processors that they have taken."""
    memory, seconds = 0, 0.0
    try:
        root = psutil.Process(pid)
        for one in [root, *root.children(recursive=True)]:
            times = one.cpu_times()
            seconds += times.user + times.system + (times.children_user + times.children_system if one == root else 0)
            memory += one.memory_full_info().pss
    except psutil.Error:  # It has just ended.
        pass
    return memory, seconds


def make_inputs(folder: Path, data: Path, times: int, model: str) -> tuple[Path, Path]:
    """Write the rows, repeated, and a small model with the tokenizer of `model`; return both paths."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    rows, small = folder / "rows.jsonl", folder / "model"
    text = data.read_bytes()
    with rows.open("wb") as file:
        for _ in range(times):
            file.write(text)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(small)
    tokenizer.save_pretrained(small)
    return rows, small


def main() -> None:
    """Measure every run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows with `prompt` and `response`, JSON lines")
    parser.add_argument("--model", required=True, help="directory or hub name whose tokenizer is used")
    parser.add_argument("--times", type=int, default=40, help="how often the rows are repeated")
    parser.add_argument("--processes", type=int, default=2, help="processes that tokenise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, model = make_inputs(folder, given.data, given.times, given.model)
        train = [
            sys.executable, "-m", "rlhf_core", "train", "sft", "--model", str(model), "--data", str(rows),
            "--batch-size", "2", "--logging.progress", "false", "--dataset.processes", str(given.processes),
        ]  # fmt: skip
        once = [*train, "--output", str(folder / "run")]
        runs = {
            "the first time": [*once, "--max-steps", "2", "--overwrite"],
            "seen before": [*once, "--max-steps", "2", "--overwrite"],
            "resumed": [*once, "--max-steps", "4", "--resume"],
            "streamed": [*train, "--output", str(folder / "s"), "--max-steps", "2", "--dataset.streaming", "true"],
            "`datasets.map`, ids alone": [sys.executable, "-c", _MAP, str(rows), str(model), str(given.processes)],
        }
        print(f"{given.data.name} × {given.times}: {rows.stat().st_size / 1e6:.0f} MB, {given.processes} processes")
        print("| run | first step, s | processors, s | memory, MB |\n|---|---|---|---|")
        for title, command in runs.items():
            found = measure(command, folder)
            print(
                f"| {title} | {found.to_first_step:.1f} | {found.processors:.1f} | {found.memory / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
