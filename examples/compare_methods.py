"""Train a tiny language model from nothing and watch it improve: SFT on noisy demonstrations, then DPO and GRPO on its answers.

    python examples/compare_methods.py [--output runs/compare-methods] [--seed 0] [--methods dpo grpo]

The task is arithmetic in written steps (`rlhf_core.testing.arithmetic_task`). More than half of the demonstrations go wrong at
some step, so a model that imitates them well is as often wrong when it is sampled from. What follows learns from the model's own
answers and from a verifier, which sees the last line alone. Each method begins with the SFT model: DPO learns from pairs that
are drawn once, a right answer and a wrong one; GRPO, or PPO with `--methods ppo`, draws new answers for each rollout and is
rewarded for right ones. After every stage the model answers the same held-out problems. Everything depends on the seed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_core import PolicyModel, registry, setup_logging
from rlhf_core.cli import exit_code
from rlhf_core.contracts.records import Prompt
from rlhf_core.infra.errors import DataError
from rlhf_core.testing.arithmetic_task import ArithmeticTask, Row, Split, step_labels, verify
from rlhf_core.testing.tiny import save_tiny

TASK = ArithmeticTask("sums", terms=4, digits=1, wrong=0.62)
MOST_TOKENS = 34
"""The longest answer that is sampled, in tokens; a right one has at most 31."""
SHOW_EVERY = 5.0
"""Seconds between two lines about how many answers are drawn."""
Estimate = tuple[float, float]
"""A mean and its standard error."""
Measured = dict[str, Any]
"""What a stage measured: numbers and estimates, by name."""


@dataclass
class Demo:
    """What the stages share: the folder that they write to, the models that they made, the seed and the scale of the run."""

    folder: Path
    seed: int = 0
    scale: float = 1.0
    """Multiplies steps, rows and problems; below 1 the demo is faster and shows less."""
    models: dict[str, Path] = field(default_factory=dict)
    """The model's directory after each stage."""

    def scaled(self, count: int) -> int:
        """Return a number of steps, rows or problems times the scale."""
        return max(2, round(count * self.scale))

    def write(self, name: str, rows: Iterable[Row]) -> Path:
        """Write rows to a JSONL file and return its path."""
        path = self.folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def train(self, method: str, after: str, *, data: Path, **given: Any) -> Measured:
        """Train the model of an earlier stage with a method of the registry.

        Args:
            given: `eval_data` and `rewards` of the run, and the method's options.

        Returns:
            Steps, tokens, the seconds of the training alone, and the metrics on held-out rows.
        """
        trainer = registry.get("trainer", method)
        of_run = {name: given.pop(name) for name in ("eval_data", "rewards") if name in given}
        options = {"seed": self.seed, "max_length": 128, "dataset": {"wrap": "none"}, "logging": {"every": 20}}
        config = trainer.Config.parse({**options, **given})
        print(f"  training for {config.max_steps} steps", flush=True)
        began = time.monotonic()
        made = trainer(config, model=self.models[after], data=data, output=self.folder / method, **of_run)
        result = made.train(overwrite=True)
        self.models[method] = result.model_dir
        seconds = time.monotonic() - began
        return {"steps": result.step, "tokens": result.tokens, "training_seconds": seconds, **result.eval_metrics}


def start(demo: Demo) -> Measured:
    """Write a Llama model of 0.9 M random weights."""
    demo.models["start"] = save_tiny(
        demo.folder / "start", demo.seed, layers=4, hidden=128, kv_heads=4, max_positions=128
    )
    return {}


def sft(demo: Demo) -> Measured:
    """Imitate demonstrations, more than half of which are wrong."""
    steps, batch = demo.scaled(500), 64
    return demo.train(
        "sft",
        "start",
        data=demo.write("demonstrations", TASK.rows("sft", steps * batch, seed=demo.seed)),
        eval_data=demo.write(
            "demonstrations-heldout", TASK.rows("sft", demo.scaled(256), split="test", seed=demo.seed)
        ),
        learning_rate=3e-3,
        warmup_ratio=0.05,
        batch_size=batch,
        max_steps=steps,
        optimizer={"beta2": 0.99, "weight_decay": 0.01},
    )


def dpo(demo: Demo) -> Measured:
    """Sample answers from the SFT model, and prefer those that the verifier finds right over the wrong ones."""
    policy = PolicyModel.from_pretrained(demo.models["sft"])
    pairs = sample_pairs(demo, policy, demo.scaled(2500), "train")
    heldout = sample_pairs(demo, policy, demo.scaled(300), "test")
    measured = demo.train(
        "dpo",
        "sft",
        data=demo.write("pairs", pairs),
        eval_data=demo.write("pairs-heldout", heldout),
        beta=1.0,
        learning_rate=2e-4,
        warmup_ratio=0.1,
        batch_size=64,
        max_steps=demo.scaled(60),
    )
    # A single held-out pair, as a small --scale may leave, has no standard error.
    known = "eval_accuracy_se" in measured
    return (
        {**measured, "pair_accuracy": (measured["eval_accuracy"], measured["eval_accuracy_se"])} if known else measured
    )


def grpo(demo: Demo) -> Measured:
    """Answer new problems with the SFT model eight times each, and make answers likelier that are better than the others."""
    return online(
        demo,
        "grpo",
        rollouts=90,
        prompts=64,
        variant="dr_grpo",
        equal_groups="skip",
        group_size=8,
        minibatches=4,
        learning_rate=3e-4,
        warmup_ratio=0.05,
        optimizer={"beta2": 0.99},
    )


def ppo(demo: Demo) -> Measured:
    """Answer new problems with the SFT model, and learn to predict at each token how likely the answer is to be right."""
    return online(
        demo,
        "ppo",
        rollouts=65,
        prompts=512,
        rollout_epochs=1,
        minibatches=4,
        learning_rate=3e-4,
        value={"learning_rate_factor": 3},
        value_clip=None,
        kl_weight=0,
        truncated="score",
        warmup_ratio=0.05,
        optimizer={"beta2": 0.99},
    )


def online(demo: Demo, method: str, *, rollouts: int, prompts: int, **options: Any) -> Measured:
    """Train the SFT model on its own answers to new problems, a rollout's at a time, rewarded where they are right."""
    rollouts, prompts = demo.scaled(rollouts), demo.scaled(prompts)
    per_rollout = options["minibatches"] * options.get("rollout_epochs", 1)
    return demo.train(
        method,
        "sft",
        data=demo.write(f"{method}-problems", TASK.rows("prompt", rollouts * prompts, seed=demo.seed + 1)),
        rewards=[right],
        generation={"max_new_tokens": MOST_TOKENS},
        batch_size=prompts,
        max_steps=rollouts * per_rollout,
        logging={"every": 5 * per_rollout},
        **options,
    )


def right(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
    """Return the reward of each answer: 1 where its last line is right, else 0."""
    return [float(verify(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


FIRST: dict[str, Callable[[Demo], Measured]] = {"start": start, "sft": sft}
"""The stages that make the model which the methods begin with, in their order."""
METHODS: dict[str, Callable[[Demo], Measured]] = {"dpo": dpo, "grpo": grpo, "ppo": ppo}
"""The stages that each begin with the SFT model and learn from its own answers."""


class Drawn:
    """Prints now and then how many answers are drawn; it is a progress callback: `drawn(done, total)`."""

    def __init__(self, what: str) -> None:
        self.shown = time.monotonic()
        print(f"  {what}", flush=True)

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.shown > SHOW_EVERY:
            self.shown = time.monotonic()
            print(f"    {done:,} of {total:,} answers", flush=True)


def sample_pairs(demo: Demo, policy: PolicyModel, count: int, split: Split) -> list[Row]:
    """Sample four answers to each of `count` problems; return a preference pair per problem with right and wrong answers."""
    prompts = list(islice(TASK.problems(split=split, seed=demo.seed + 1), count))
    progress = Drawn(f"sampling four answers to each of {count:,} problems, for pairs ({split})")
    drawn = policy.generate(prompts, n=4, max_new_tokens=MOST_TOKENS, seed=demo.seed, progress=progress)
    complete = [[sample.text for sample in samples if sample.stop_reason == "end"] for samples in drawn]
    rows = [row for prompt, answers in zip(prompts, complete, strict=True) if (row := pair(prompt, answers))]
    if not rows:
        raise DataError("no problem has both a right and a wrong answer", place=f"{split} pairs", fix="raise --scale")
    return rows


def pair(prompt: Prompt, answers: Sequence[str]) -> Row | None:
    """Return a pair of a right answer and the wrong one with the most right steps; None where all are right or all wrong.

    The steps before the first wrong one are common to both answers and cancel in DPO's loss. The steps after it are mostly right,
    given the wrong value that they start from, so the fewer of them are trained against, the better.
    """
    right = [text for text in answers if verify(prompt, text)]
    wrong = [text for text in answers if text.strip() and not verify(prompt, text)]
    if not right or not wrong:
        return None
    last = max(wrong, key=lambda text: sum(step_labels(prompt, text)))
    return {"prompt": prompt, "chosen": right[0], "rejected": last}


@dataclass(frozen=True)
class Score:
    """How a model answers the held-out problems: one share per problem."""

    greedy_right: list[float]
    """Right answers in greedy decoding: 1 or 0."""
    sampled_right: list[float]
    """Right answers among samples at temperature 1."""
    steps_right: list[float]
    """Right steps, of those written in the samples, up to the first wrong one."""


def evaluate(demo: Demo, model: Path) -> Score:
    """Let a model answer held-out problems, the same ones after every stage."""
    policy = PolicyModel.from_pretrained(model)
    prompts = list(islice(TASK.problems(split="test", seed=demo.seed + 2), demo.scaled(300)))
    progress = Drawn(
        f"answering {len(prompts)} held-out problems once with the likeliest tokens and four times at random"
    )
    greedy = policy.generate(prompts, max_new_tokens=MOST_TOKENS, temperature=0.0, progress=progress)
    sampled = policy.generate(prompts, n=4, max_new_tokens=MOST_TOKENS, seed=demo.seed + 2, progress=progress)
    return Score(
        [float(verify(prompt, only.text)) for prompt, (only,) in zip(prompts, greedy, strict=True)],
        [fmean(verify(p, sample.text) for sample in samples) for p, samples in zip(prompts, sampled, strict=True)],
        [fmean(fmean(step_labels(p, s.text)) for s in samples) for p, samples in zip(prompts, sampled, strict=True)],
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean over problems and its standard error; samples of one problem are not independent."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Return by how much a mean rose, with the standard error of the paired difference."""
    return estimate([new - old for old, new in zip(before, after, strict=True)])


def run(folder: Path, *, seed: int = 0, scale: float = 1.0, methods: Sequence[str] = ("dpo", "grpo")) -> dict[str, Any]:
    """Run the first stages and some methods, print what improved, and write and return the report (`report.json`)."""
    demo, began = Demo(folder, seed, scale), time.monotonic()
    scores: dict[str, Score] = {}
    stages: list[Measured] = []
    chosen = {**FIRST, **{name: METHODS[name] for name in methods}}
    for number, (name, stage) in enumerate(chosen.items(), 1):
        stage_began = time.monotonic()
        what = (stage.__doc__ or name).splitlines()[0].rstrip(".")
        print(f"{number} of {len(chosen)}, {name}: {what[0].lower()}{what[1:]}", flush=True)
        measured = stage(demo)
        scores[name] = evaluate(demo, demo.models[name])
        seconds = time.monotonic() - stage_began
        shares = {kind: estimate(values) for kind, values in vars(scores[name]).items()}
        stages.append({"stage": name, "model": str(demo.models[name]), "seconds": seconds, **measured, **shares})
    gains = {
        name: {kind: gain(before, getattr(scores[name], kind)) for kind, before in vars(scores["sft"]).items()}
        for name in methods
    }
    report = {"seed": seed, "scale": scale, "seconds": time.monotonic() - began, "stages": stages, "gains": gains}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report, folder)
    return report


def show(report: dict[str, Any], folder: Path) -> None:
    """Print a report as a table."""
    console = Console()
    table = Table(title="Held-out problems, percent ± standard error")
    columns = {"stage": "after", "greedy_right": "greedy", "sampled_right": "sampled"}
    columns |= {"pair_accuracy": "pairs", "training_seconds": "training, s", "seconds": "all, s"}
    for name, heading in columns.items():
        table.add_column(heading, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in report["stages"]:
        cells = [stage.get(name) for name in columns]
        table.add_row(*(percent(cell) if isinstance(cell, tuple) else _plain(cell) for cell in cells))
    console.print(table)
    console.print("greedy, sampled: right answers; sampled at temperature 1")
    console.print("pairs: the right answer gained on the wrong one (the reference: 50)")
    for name, gains in report["gains"].items():
        greedy, sampled = (percent(gains[kind], "+") for kind in ("greedy_right", "sampled_right"))
        console.print(f"{name} against sft: {sampled} points more samples right, {greedy} greedy")
    console.print(f"{report['seconds']:.0f} s; runs, data and report.json are in {folder}")


def percent(share: Estimate, sign: str = "") -> str:
    return f"{100 * share[0]:{sign}.1f} ± {100 * share[1]:.1f}"


def _plain(cell: str | float | None) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else f"{cell:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare-methods"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, rows and problems (default: 1)")
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=list(METHODS),
        default=["dpo", "grpo"],
        help="what follows SFT, each from the SFT model (default: dpo grpo)",
    )
    options = parser.parse_args()
    setup_logging()
    run(options.output, seed=options.seed, scale=options.scale, methods=options.methods)


if __name__ == "__main__":
    sys.exit(exit_code(main))
