"""Merge models that were trained on different tasks into one that does both, by every method of the registry.

    python examples/merge_tasks.py [--output runs/merge-tasks] [--seed 0]

A tiny Llama imitates a careless teacher of two kinds of written arithmetic (`rlhf_core.testing.arithmetic_task`), whose last step
is always one too high: it gets to know both kinds and answers neither. From this base it is fine-tuned on right solutions of one
kind, and from the base again on those of the other, twice each. Every registered merger then makes one model of the
specialists, with the options that do best on validation problems, and the result answers test problems of both kinds. Neither
validation nor test problems are ever trained on, and they have none in common. Everything depends on the seed alone; one CPU
core needs less than six minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from rlhf_core import PolicyModel, registry, setup_logging
from rlhf_core.cli import exit_code
from rlhf_core.contracts.merger import Merger
from rlhf_core.contracts.records import Prompt
from rlhf_core.merging.config import MergeConfig, ModelEntry
from rlhf_core.merging.merge import ModelMerger
from rlhf_core.testing.arithmetic_task import ArithmeticTask, Row, solve, verify
from rlhf_core.testing.tiny import save_tiny

TASKS = {
    "sums": ArithmeticTask("sums", terms=4, digits=1, wrong=0.0, chat=True),
    "products": ArithmeticTask("mixed", terms=2, digits=1, wrong=0.0),
}
"""Sums, asked in a chat (`4+9-2+5=?`), and a product with a number, asked in plain text (`3*7+5=?`)."""
MIXTURE = ("products", "sums", "products", "products")
"""What the base learns, in equal parts; products take longer to learn, so they come more often."""
BATCH = 16
BASE_STEPS, BASE_RATE = 2000, 1.5e-3
STEPS, RATE = 300, 5e-4
MOST_TOKENS = 40
"""Most tokens in an answer; a right one is shorter."""
VALIDATION, TEST = 60, 130
"""Problems of each task. There are 193 of products that are held out, all of them different."""

Estimate = tuple[float, float]
"""A mean and its standard error."""
Split = Literal["validation", "test"]
Options = Mapping[str, Any]


def grid(**values: Sequence[Any]) -> list[Options]:
    """Return every combination of some options' values."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


SHARES = (0.35, 0.5, 0.65)
"""Weights of the second model that are tried; the first has the rest."""
GRIDS: dict[str, list[Options]] = {
    "linear": grid(share=SHARES),
    "slerp": grid(share=SHARES),
    "karcher": grid(share=SHARES),
    "layer_wise": grid(t=(*SHARES, [0.3, 0.7], [0.7, 0.3])),
    "task_arithmetic": grid(scale=(0.35, 0.5, 0.75, 1.0)),
    "ties": grid(density=(0.2, 0.5, 0.8), scale=(0.75, 1.0)),
    "dare": grid(density=(0.5, 0.8), scale=(0.5, 0.75)),
    "della": grid(density=(0.5, 0.8), scale=(0.75, 1.0)),
    "breadcrumbs": grid(density=(0.5, 0.9), scale=(0.5, 0.75)),
    "sce": grid(density=(0.1, 0.5, 1.0)),
}
"""Options that are tried, by method; a method that isn't here is tried with its own. `share` stands for the weights."""
SOUPS = ("uniform_soup", "greedy_soup")
"""Methods that get all specialists instead of one of each task."""


@dataclass
class Workshop:
    """What the steps share: where they write, how much of everything they do, and the problems that are held out."""

    folder: Path
    seed: int = 0
    scale: float = 1.0
    """Multiplies steps, and below 1 problems; below 1 is a quick look."""
    problems: dict[Split, dict[str, list[Prompt]]] = field(init=False)

    def __post_init__(self) -> None:
        validation, test = (max(2, round(count * min(1.0, self.scale))) for count in (VALIDATION, TEST))
        self.problems = {"validation": {}, "test": {}}
        for name, task in TASKS.items():
            # All different, so that the two splits have none in common and each problem counts once.
            drawn = itertools.islice(task.problems(split="test", seed=self.seed), 100 * (validation + test))
            prompts = list({json.dumps(prompt): prompt for prompt in drawn}.values())
            self.problems["validation"][name] = prompts[:validation]
            self.problems["test"][name] = prompts[validation : validation + test]

    def scaled(self, steps: int) -> int:
        return max(2, round(steps * self.scale))

    def train(self, name: str, start: Path, rows: Sequence[Iterator[Row]], steps: int, rate: float, seed: int) -> Path:
        """Fine-tune every weight of a model on rows of some sources in turn; return the new model."""
        data = self.folder / "data" / f"{name}.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        taken = itertools.islice(itertools.chain.from_iterable(zip(*rows, strict=False)), steps * BATCH)
        data.write_text("".join(json.dumps(row) + "\n" for row in taken), encoding="utf-8")
        sft = registry.get("trainer", "sft")
        config = sft.Config(
            seed=seed,
            max_length=128,
            learning_rate=rate,
            warmup_ratio=0.05,
            batch_size=BATCH,
            max_steps=steps,
            optimizer={"beta2": 0.99, "weight_decay": 0.01},
            logging={"every": 100},
        )
        model: Path = sft(config, model=start, data=data, output=self.folder / name).train(overwrite=True).model_dir
        return model

    def answers(self, model: Path, split: Split) -> dict[str, list[float]]:
        """Let a model answer the problems of a split, each token the most likely one; return 1 a right answer, else 0."""
        policy = PolicyModel.from_pretrained(model)
        right = {}
        for name, prompts in self.problems[split].items():
            drawn = policy.generate(prompts, max_new_tokens=MOST_TOKENS, temperature=0.0)
            right[name] = [float(verify(prompt, one.text)) for prompt, (one,) in zip(prompts, drawn, strict=True)]
        return right

    def validate(self, model: Path) -> float:
        """Return the mean accuracy over the tasks on validation problems, by which options and ingredients are chosen."""
        return fmean(fmean(right) for right in self.answers(model, "validation").values())

    def test(self, model: Path) -> dict[str, Estimate]:
        """Return the accuracy on the test problems of each task, and the mean over tasks."""
        tasks = {name: estimate(right) for name, right in self.answers(model, "test").items()}
        error = math.hypot(*(error for _, error in tasks.values())) / len(tasks)
        return {**tasks, "mean": (fmean(share for share, _ in tasks.values()), error)}


def careless(task: ArithmeticTask, seed: int) -> Iterator[Row]:
    """Yield demonstrations without end whose last step is one too high."""
    for prompt in task.problems(seed=seed):
        yield {"prompt": prompt, "response": "\n".join(solve(prompt, slip_at=len(solve(prompt)) - 2, slip=1))}


def estimate(values: Sequence[float]) -> Estimate:
    """Return a mean over problems and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def plan(
    method: str, options: Options, base: Path, specialists: Sequence[Sequence[Path]], output: Path, seed: int
) -> MergeConfig:
    """Return the merge of the specialists, a list of models for each task, by a method with some options.

    A method for a single model goes from the specialist in the one task, as its base, to that in the other.
    """
    options = dict(options)
    share = options.pop("share", None)
    most = registry.get("merger", method).models[1]
    firsts = [models[0] for models in specialists]
    models = [one for of_task in specialists for one in of_task] if method in SOUPS else firsts
    if most == 1:
        base, models = firsts[0], firsts[1:]
    weights = [1.0] * len(models) if share is None else [1 - share, share]
    entries = [ModelEntry(model=str(one), weight=weight) for one, weight in zip(models, weights, strict=True)]
    return MergeConfig(
        method=method, base=str(base), models=entries, options=options, output=str(output), seed=seed, device="cpu"
    )


def merge(shop: Workshop, method: str, base: Path, specialists: Sequence[Sequence[Path]]) -> dict[str, Any]:
    """Merge by a method with each of its options, keep what does best on validation problems, and test that."""
    tried: list[dict[str, Any]] = []
    output = shop.folder / "merged" / method
    trial = output.with_name(f"{method}.trial")
    # A method that merges in its own way does so to evaluate; the others take no evaluation.
    evaluate = shop.validate if registry.get("merger", method).merge is not Merger.merge else None
    for options in GRIDS.get(method, [{}]):
        config = plan(method, options, base, specialists, trial, shop.seed)
        done = ModelMerger(config, evaluate=evaluate).merge(overwrite=True)
        tried.append({"options": options, "validation": shop.validate(done.output), **done.details})
        if tried[-1]["validation"] > max((one["validation"] for one in tried[:-1]), default=-1.0):
            shutil.rmtree(output, ignore_errors=True)
            trial.rename(output)
    shutil.rmtree(trial, ignore_errors=True)
    best = max(tried, key=lambda one: one["validation"])
    return {"model": str(output), **best, "tried": tried, **shop.test(output)}


def run(folder: Path, *, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Train, merge, print what was measured, and write and return the report (`report.json`)."""
    shop, began = Workshop(folder, seed, scale), time.monotonic()
    steps = shop.scaled(BASE_STEPS)
    say(f"train a base on careless demonstrations: {steps} steps")
    start = save_tiny(folder / "start", seed, layers=4, hidden=128, kv_heads=4, max_positions=128)
    sources = [careless(TASKS[name], len(MIXTURE) * seed + part) for part, name in enumerate(MIXTURE)]
    base = shop.train("base", start, sources, steps, BASE_RATE, seed)
    rows: dict[str, dict[str, Any]] = {"base": shop.test(base)}
    specialists: list[list[Path]] = []
    steps = shop.scaled(STEPS)
    for name, task in TASKS.items():
        say(f"train two specialists for {name} from the base: {steps} steps each")
        specialists.append([])
        for twin in (1, 2):
            right = task.rows("sft", steps * BATCH, seed=1000 * twin + seed)
            model = shop.train(f"{name}-{twin}", base, [right], steps, RATE, 1000 * twin + seed)
            specialists[-1].append(model)
            rows[f"{name} {twin}"] = {"model": str(model), "validation": shop.validate(model), **shop.test(model)}
    trained = time.monotonic() - began
    for method in registry.mergers:
        say(f"merge by {method}")
        rows[method] = merge(shop, method, base, specialists)
    report = {
        "seed": seed,
        "scale": scale,
        "training_seconds": trained,
        "seconds": time.monotonic() - began,
        "rows": rows,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report, folder)
    soup = rows["greedy_soup"]
    assert soup["validation"] >= max(soup["scores"].values()), "the greedy soup is worse than its best ingredient"
    return report


def say(text: str) -> None:
    print(text, flush=True)


def show(report: dict[str, Any], folder: Path) -> None:
    """Print a report as a table."""
    console = Console()
    table = Table(title="Test problems answered rightly, percent ± standard error")
    table.add_column("model", no_wrap=True)
    table.add_column("options")
    for name in (*TASKS, "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in report["rows"].items():
        options = ", ".join(f"{key} {value}" for key, value in row.get("options", {}).items())
        table.add_row(name, options, *(percent(row[key]) for key in (*TASKS, "mean")))
        if name in ("base", f"{list(TASKS)[-1]} 2"):
            table.add_section()
    console.print(table)
    soup = report["rows"]["greedy_soup"]
    console.print(
        f"greedy soup on the problems that it was chosen by: {100 * soup['validation']:.1f} %, its best ingredient"
        f" {100 * max(soup['scores'].values()):.1f} %; {len(soup['chosen'])} of {len(soup['scores'])} models taken"
    )
    console.print(f"{report['seconds']:.0f} s; models and report.json are in {folder}")


def percent(share: Estimate) -> str:
    return f"{100 * share[0]:.1f} ± {100 * share[1]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/merge-tasks"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and problems (default: 1)")
    options = parser.parse_args()
    setup_logging()
    logging.getLogger("rlhf_core.models").setLevel(logging.WARNING)  # else a line for each of a hundred models
    run(options.output, seed=options.seed, scale=options.scale)


if __name__ == "__main__":
    sys.exit(exit_code(main))
