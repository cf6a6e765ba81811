"""Time and memory of training with frozen weights held in float32 and in the precision of the products, side by side.

    python benchmarks/frozen.py --model models/SmolLM2-135M-Instruct --data FOLDER

FOLDER holds `sft.jsonl` and `preferences.jsonl`. Each run is its own process; the two precisions take turns. Beside seconds by
the clock, which other work on the machine disturbs, processor seconds per step are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA SFT": ("sft", "sft.jsonl", {"lora": {"rank": 16}}),
    "LoRA DPO": ("dpo", "preferences.jsonl", {"lora": {"rank": 16}}),
    "DPO with a copied reference": ("dpo", "preferences.jsonl", {"reference": "copy"}),
}
WARM = 1
"""Steps that aren't timed."""


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train a few steps in this process; return seconds per step by the clock (`wall`) and of the processor, and peak MiB."""
    from rlhf_core import registry

    method, rows, settings = RUNS[options.run]
    cls = registry.get("trainer", method)
    times: list[tuple[float, float]] = []

    class Timed(cls):  # type: ignore[misc, valid-type]
        def experience(self, stream: Any) -> Any:
            for window in super().experience(stream):
                times.append((time.perf_counter(), time.process_time()))
                yield window

    config = cls.Config(
        max_steps=options.steps + WARM,
        batch_size=options.batch,
        max_length=512,
        precision="bf16",
        frozen_precision=options.frozen,
        gradient_checkpointing=options.checkpointing,
        logging={"progress": False},
        **settings,
    )
    result = Timed(config, model=options.model, data=str(options.data / rows)).train()
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    spans = [[b - a for a, b in zip(c[WARM:], c[WARM + 1 :], strict=False)] for c in zip(*times, strict=True)]
    wall, processor = (statistics.median(span) for span in spans)
    return {"wall": wall, "processor": processor, "MiB": peak / 2**20, "loss": float(result.metrics["loss"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, as the presets do")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--frozen", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.model = in_bf16(options.model, Path(folder))
        print(
            "| run | frozen weights | seconds per step | processor seconds per step | peak MiB | loss |\n"
            + "|---" * 6
            + "|"
        )
        for name in RUNS:
            for frozen in ("float32", "bf16"):
                flags = ["--model", options.model, "--data", options.data, "--run", name, "--frozen", frozen]
                flags += ["--steps", options.steps, "--batch", options.batch]
                flags += ["--checkpointing"] if options.checkpointing else []
                command = [sys.executable, __file__, *map(str, flags)]
                made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(made.splitlines()[-1])
                print(
                    f"| {name} | {frozen} | {found['wall']:.2f} | {found['processor']:.2f} | {found['MiB']:,.0f} |"
                    f" {found['loss']:.6f} |",
                    flush=True,
                )


def in_bf16(model: Path, folder: Path) -> Path:
    """Write the model in bf16, as it was published: what is measured is how its weights are held, not how they are rounded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
