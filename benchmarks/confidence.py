"""How many tokens confidence-based stopping saves, and at which accuracy, on prompts of mixed difficulty.

    python benchmarks/confidence.py [--prompts 90] [--steps 500] [--candidates 16] [--model DIR] [--output DIR]

A tiny model learns the embedded task from right solutions alone: sums of 2 to 6 numbers of one digit, and of 2 to 4 numbers of
two. After so few steps the short ones are easy for it, the long ones hard. Every sampler then answers the same held-out
prompts, so many of each kind. Differences are to the whole majority vote, prompt by prompt; errors are standard errors over
prompts. Tokens are those that the policy was run on. All is a function of the seed, up to rounding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from rlhf_core import PolicyModel, registry, setup_logging
from rlhf_core.infra.statistics import standard_error
from rlhf_core.testing.arithmetic_task import ArithmeticTask, Row, Split, verify
from rlhf_core.testing.tiny import save_tiny

KINDS = ((1, 2), (1, 3), (1, 4), (1, 6), (2, 2), (2, 3), (2, 4))
"""Digits of the numbers in a problem, and how many numbers there are."""
MOST_TOKENS = 72
FIRST = "majority"


def main() -> None:
    options = parse()
    setup_logging()
    model = options.model or train(options.output, options.steps, options.seed)
    policy = PolicyModel.from_pretrained(model).requires_grad_(requires_grad=False)
    rows = [row for each in streams("prompt", options.prompts, "test", options.seed + 8) for row in each]
    measured: dict[str, tuple[list[float], list[float]]] = {}
    print(f"{len(rows)} prompts, {options.candidates} candidates\n\n{HEADER}")
    for name, (method, chosen) in samplers(options.candidates).items():
        measured[name] = measure(policy, method, chosen, rows, options.seed)
        print(line(name, *measured[name], *measured[FIRST]), flush=True)
    path = options.output / "confidence.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=90, help="of each kind")
    parser.add_argument("--steps", type=int, default=500, help="of training; more make a better model")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--model", type=Path, help="a model that was trained before; trains none")
    parser.add_argument("--output", type=Path, default=Path("runs/confidence"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def streams(
    record: str, count: int, split: Split, seed: int, kinds: Sequence[tuple[int, int]] = KINDS
) -> list[list[Row]]:
    """Return so many rows of each kind."""
    tasks = [ArithmeticTask("sums", terms=terms, digits=digits, wrong=0.0) for digits, terms in kinds]
    return [list(islice(task.rows(record, count, split=split, seed=seed), count)) for task in tasks]


def train(output: Path, steps: int, seed: int, batch: int = 64) -> Path:
    """Train a model of 0.9 M weights from nothing; return its directory."""
    start = save_tiny(output / "start", seed, layers=4, hidden=128, kv_heads=4, max_positions=128)
    tasks = [ArithmeticTask("sums", terms=terms, digits=digits, wrong=0.0) for digits, terms in KINDS]
    kinds, rng = [task.rows("sft", steps * batch, seed=seed) for task in tasks], Random(seed)
    data = output / "train.jsonl"
    data.write_text("".join(json.dumps(next(rng.choice(kinds))) + "\n" for _ in range(steps * batch)), encoding="utf-8")
    trainer = registry.get("trainer", "sft")
    config = trainer.Config.parse(
        {
            "seed": seed, "max_length": 128, "dataset": {"wrap": "none"}, "logging": {"every": 50}, "learning_rate": 3e-3,
            "warmup_ratio": 0.05, "batch_size": batch, "max_steps": steps, "optimizer": {"beta2": 0.99, "weight_decay": 0.01},
        }
    )  # fmt: skip
    made: Path = trainer(config, model=start, data=data, output=output / "sft").train(overwrite=True).model_dir
    return made


def samplers(candidates: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return name → method and options."""
    common: dict[str, Any] = {"candidates": candidates, "max_new_tokens": MOST_TOKENS}
    vote = {"choose": "majority", **common}
    stopping = {"confidence_window": 4, **common}
    return {
        FIRST: ("best_of_n", vote),
        "majority, ended once it is certain": ("best_of_n", {"round_size": 4, **vote}),
        "confidence, equal votes": ("confidence", {"weight": "equal", **stopping}),
        "confidence, equal votes, keep 1": ("confidence", {"weight": "equal", "keep": 1.0, **stopping}),
        "confidence": ("confidence", stopping),
        "confidence, no consensus": ("confidence", {"consensus": None, **stopping}),
        "confidence, keep 0.5": ("confidence", {"keep": 0.5, **stopping}),
        "confidence, keep 0.1 of a warm-up of 8": ("confidence", {"keep": 0.1, "warmup": 8, **stopping}),
    }


def measure(
    policy: PolicyModel, method: str, options: Mapping[str, Any], rows: Sequence[Row], seed: int
) -> tuple[list[float], list[float]]:
    """Return for each prompt whether the first completion is right, 1 or 0, and the tokens forwarded."""
    sampler = registry.get("sampler", method)
    found = sampler(sampler.Config.parse(options), policy=policy).sample(rows, seed=seed)
    right = [float(verify(row["prompt"], group[0].text)) for row, group in zip(rows, found, strict=True)]
    return right, [float(group[0].details["tokens_forwarded"]) for group in found]


HEADER = "\n".join(("| sampler | accuracy | difference | tokens per prompt | saved |", "|---|---|---|---|---|"))


def line(
    name: str,
    right: Sequence[float],
    tokens: Sequence[float],
    first_right: Sequence[float],
    first_tokens: Sequence[float],
) -> str:
    """Return a sampler's line of the table; saved tokens are a share of the mean of the first sampler's."""
    better = [own - other for own, other in zip(right, first_right, strict=True)]
    saved = [(other - own) / fmean(first_tokens) for own, other in zip(tokens, first_tokens, strict=True)]
    return (
        f"| {name} | {percent(right)} | {percent(better)} | {fmean(tokens):.0f} ± {standard_error(tokens) or 0:.0f} |"
        f" {percent(saved)} |"
    )


def percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f} ± {100 * (standard_error(values) or 0):.1f} %"


if __name__ == "__main__":
    main()
