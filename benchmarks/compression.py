"""What accuracy is kept when a context is compressed 2, 4 and 8 times: by a trained compressor, by extraction, by cutting it off.

    python benchmarks/compression.py [--output runs/compression] [--seed 0] [--base-steps 500] [--steps 1000]

The task is to look something up: a context with a number for each of sixteen names (`ban 42. bat 7. …`), and a name that is asked
for. A small model of words is trained from nothing until it looks up numbers, then a compressor for it as it is; the model itself
isn't trained for compressed contexts. Cut contexts keep their last part. Everything is measured on contexts that no training met,
by greedy answers, with standard errors over questions.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core import registry, setup_logging
from rlhf_core.cli import exit_code
from rlhf_core.config.compression import CompressionConfig
from rlhf_core.generation.prompt_compression import PromptCompression, detach
from rlhf_core.models import ContextCompressor, PolicyModel
from rlhf_core.testing.tiny import save_tiny

RATIOS = (2, 4, 8)
NAMES = [first + vowel + last for first in "bd" for vowel in "aeou" for last in "nt"]
NUMBERS = [str(number) for number in range(100)]
PAD, BOS, END, UNKNOWN = SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|unknown|>")
QUESTION = 1
"""Tokens of a question: the name."""


def word_tokenizer() -> tuple[Any, int]:
    """Return a tokenizer with a token for each word of the task, and how many there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, ".", *NAMES, *NUMBERS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    ), len(words)


def rows(seed: int, count: int) -> list[dict[str, str]]:
    """Return rows whose response states the number that is asked for, and then all others in some order."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        values = {name: draw.choice(NUMBERS) for name in NAMES}
        asked, *others = draw.sample(NAMES, len(NAMES))
        found.append({
            "prompt": " ".join(f"{name} {values[name]}." for name in NAMES) + f" {asked}",
            "response": f" {values[asked]}." + "".join(f" {name} {values[name]}." for name in others),
        })  # fmt: skip
    return found


def train(method: str, output: Path, data: Sequence[Any], held_out: Sequence[Any], **options: Any) -> Path:
    """Train and return the model's directory."""
    cls = registry.get("trainer", method)
    shared = {
        "batch_size": 64, "max_length": 256, "warmup_ratio": 0.05, "optimizer": {"beta2": 0.99, "weight_decay": 0.01},
        "dataset": {"wrap": "none"}, "logging": {"every": 50}, "eval_steps": 200,
    }  # fmt: skip
    model = options.pop("model")
    config = cls.Config.parse(shared | options)
    cls(config, model=str(model), data=data, eval_data=held_out, output=output).train(overwrite=True)
    return output / "model"


def accuracy(policy: PolicyModel, asked: Sequence[dict[str, str]]) -> tuple[float, float]:
    """Return the share of questions that are answered rightly, and its standard error."""
    answers = policy.generate([row["prompt"] for row in asked], max_new_tokens=1, temperature=0.0)
    right = [
        one[0].text.strip() == row["response"].split(".")[0].strip() for one, row in zip(answers, asked, strict=True)
    ]
    share = sum(right) / len(right)
    return share, math.sqrt(share * (1 - share) / len(right))


def cut(asked: Sequence[dict[str, str]], ratio: float) -> list[dict[str, str]]:
    """Return rows whose context is its last part alone."""
    found = []
    for row in asked:
        *facts, question = row["prompt"].rsplit(" ", 1)
        kept = facts[0].split(". ")
        kept = kept[len(kept) - round(len(kept) / ratio) :]
        found.append(row | {"prompt": f"{'. '.join(kept)} {question}"})
    return found


def measure(base: Path, trained: Path, questions: int, seed: int) -> list[dict[str, Any]]:
    """Return accuracy and tokens per prompt for each way and ratio."""
    asked = rows(seed + 2, questions)
    policy = PolicyModel.from_pretrained(base, frozen=True)
    compressor = ContextCompressor.from_pretrained(trained, frozen=True)
    whole = len(policy.tokenizer(asked[0]["prompt"]).input_ids)
    found = [{"way": "whole", "ratio": 1, "tokens": float(whole), "accuracy": accuracy(policy, asked)}]
    for ratio in RATIOS:
        config = CompressionConfig(over=1, ratio=ratio, keep_end=QUESTION)
        for way, by in (("compressor", compressor), ("extraction", None)):
            compression = PromptCompression(config, policy.tokenizer, compressor=by)
            compression.attach(policy)
            share = accuracy(policy, asked)
            tokens = compression.counts["after"] / compression.counts["compressed"]
            found.append({"way": way, "ratio": ratio, "tokens": tokens, "accuracy": share})
        detach(policy)
        shorter = cut(asked, ratio)
        tokens = sum(len(policy.tokenizer(row["prompt"]).input_ids) for row in shorter) / len(shorter)
        found.append({"way": "cut off", "ratio": ratio, "tokens": tokens, "accuracy": accuracy(policy, shorter)})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compression"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=500, help="steps of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the compressor (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=400, help="questions that are measured (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of the compressor (default: %(default)s)")
    parser.add_argument("--summary", choices=("memory", "pooled"), default="memory", help="(default: %(default)s)")
    parser.add_argument("--base", type=Path, help="a model that was trained before")
    options = parser.parse_args()
    setup_logging()
    began, seed = time.monotonic(), options.seed
    tokenizer, size = word_tokenizer()
    start = save_tiny(
        options.output / "start",
        seed,
        tokenizer=tokenizer,
        vocab_size=size,
        layers=4,
        hidden=128,
        kv_heads=4,
        max_positions=256,
    )
    held_out = rows(seed + 1, 128)
    base = options.base or train(
        "sft", options.output / "base", rows(seed, 64 * options.base_steps), held_out,
        model=start, max_steps=options.base_steps, learning_rate=3e-3, seed=seed,
    )  # fmt: skip
    trained = train(
        "context_compressor", options.output / "compressor", rows(seed + 3, 64 * options.steps), held_out,
        model=base, max_steps=options.steps, learning_rate=options.learning_rate, keep_end=QUESTION, chunk=64,
        ratios=list(RATIOS), seed=seed,
        summary=options.summary,
    )  # fmt: skip
    found = measure(base, trained, options.questions, seed)
    for one in found:
        share, error = one["accuracy"]
        print(f"{one['way']:12} {one['ratio']}x  {one['tokens']:5.1f} tokens  {share:.3f} ± {error:.3f}")
    print(f"{time.monotonic() - began:.0f} s")
    (options.output / "compression.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
