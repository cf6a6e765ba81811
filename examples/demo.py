"""A whole pipeline on a tiny model, in minutes: SFT, reward models, GRPO, evaluations, a search, a merge, and a report.

    python examples/demo.py [--output runs/demo] [--seed 0] [--scale 1] [--resume]

The task is arithmetic in written steps (`rlhf_core.testing.arithmetic_task`). More than half of the demonstrations go wrong at
some step, so a model that imitates them well is as often wrong when it is sampled from; GRPO then learns from a verifier which of
its own answers were right. This program writes a model of random weights, the data and a recipe, runs the recipe as `rlhf run`
does, prints what the stages gained and what that shows, and writes the report as `rlhf report` does. Everything depends on the
seed alone. Each stage computes with one thread unless OMP_NUM_THREADS is set: more make a model of this size hardly faster, and
many times slower where cores are busy. Run again, it replaces the demo in its folder; a folder that holds anything else is
refused. `compare_methods.py` compares DPO, GRPO and PPO on the same task.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_core import RLHFOrchestrator, setup_logging
from rlhf_core.cli import exit_code
from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.evaluation.report import write_report
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.testing.arithmetic_task import ArithmeticTask, Row
from rlhf_core.testing.tiny import save_tiny

SFT_STEPS, REWARD_STEPS, ROLLOUTS = 450, 90, 45
TASK = ArithmeticTask("sums", terms=4, digits=1, wrong=0.62)
VALIDATOR = "numeric_answer"
MOST_TOKENS = 34
"""The longest answer that is sampled, in tokens; a right one has at most 31."""


@dataclass(frozen=True)
class Demo:
    """A folder, and what its pipeline is made from."""

    folder: Path
    seed: int = 0
    scale: float = 1.0
    """Multiplies steps, rows and problems; below 1 the demo is faster and shows less."""

    def claim(self, *, resume: bool) -> None:
        """Mark the folder as a demo's, so that the next one may replace it.

        Raises:
            StorageError: it is a file, or holds something that no demo has written.
            ConfigError: the demo that `resume` would go on with has another seed or scale.
        """
        mark, mine = self.folder / "demo.json", {"seed": self.seed, "scale": self.scale}
        if not mark.is_file():
            if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
                fix = "name an empty or a new folder with `--output`, or remove this one"
                raise StorageError("holds something that no demo wrote", place=str(self.folder), fix=fix)
            self.folder.mkdir(parents=True, exist_ok=True)
        elif resume and (begun := json.loads(mark.read_text(encoding="utf-8"))) != mine:
            fix = "give the same `--seed` and `--scale`, or leave out `--resume` to replace it"
            raise ConfigError("the demo there is another one", place=str(mark), got=begun, fix=fix)
        mark.write_text(json.dumps(mine) + "\n", encoding="utf-8")

    def scaled(self, count: int) -> int:
        """Return a number of steps, rows or problems times the scale."""
        return max(2, round(count * self.scale))

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def write(self, name: str, rows: Iterable[Row]) -> str:
        """Write rows to a JSONL file and return its path."""
        path = self.data / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    def rows(self, name: str, record: str, count: int, *, seed: int, split: Any = "train") -> str:
        """Write rows of the task and return their file."""
        return self.write(name, TASK.rows(record, count, split=split, seed=self.seed + seed))

    def recipe(self) -> dict[str, Any]:
        """Write the first model and the data, and return the recipe."""
        start = save_tiny(self.folder / "start", self.seed, layers=4, hidden=128, kv_heads=4, max_positions=128)
        problems = self.rows("problems-heldout", "reasoning", max(20, self.scaled(300)), seed=2, split="test")
        # What decides on a rollback is no part of what the result is measured on.
        guard = self.rows("problems-guard", "reasoning", max(20, self.scaled(100)), seed=4, split="test")
        pairs = self.rows("pairs", "preference", self.scaled(REWARD_STEPS) * 32, seed=3)
        pairs_heldout = self.rows("pairs-heldout", "preference", self.scaled(300), seed=3, split="test")
        verified = {"prompts": problems, "validator": VALIDATOR, "max_new_tokens": MOST_TOKENS, "n": 4}
        judge = {
            "model": "sft", "data": pairs, "eval_data": pairs_heldout, "max_steps": self.scaled(REWARD_STEPS), "batch_size": 32,
            "learning_rate": 1e-3,
        }  # fmt: skip
        drawing = {"max_new_tokens": MOST_TOKENS}
        return {
            "model": str(start),
            "output": str(self.folder / "pipeline"),
            "seed": self.seed,
            "defaults": {
                "max_length": 128, "dataset": {"wrap": "none"}, "logging": {"every": 20}, "warmup_ratio": 0.05,
                "optimizer": {"beta2": 0.99, "weight_decay": 0.01},
            },
            "capabilities": {
                "suites": [{
                    "name": "sums", "prompts": guard, "validator": VALIDATOR,
                    "generation": {"max_new_tokens": MOST_TOKENS, "temperature": 0.0},
                }],
            },
            "stages": [
                {
                    "method": "sft", "data": self.rows("demonstrations", "sft", self.scaled(SFT_STEPS) * 64, seed=0),
                    "eval_data": self.rows("demonstrations-heldout", "sft", self.scaled(256), seed=0, split="test"),
                    "batch_size": 64, "max_steps": self.scaled(SFT_STEPS), "learning_rate": 3e-3,
                },
                {"kind": "evaluate", "name": "before", **verified},
                {"method": "reward_model", **judge},
                {"method": "process_reward", "aggregation": "last", **judge},
                {
                    "kind": "sample", "name": "search", "model": "sft", "prompts": problems, "limit": self.scaled(80),
                    "samplers": [
                        {"method": "generate", **drawing},
                        {"name": "best_of_8", "method": "best_of_n", "reward": "reward_model", "candidates": 8, **drawing},
                        {"name": "majority_of_8", "method": "best_of_n", "choose": "majority", "candidates": 8, **drawing},
                        {"method": "mcts", "process_reward": "process_reward", "simulations": 24, **drawing},
                    ],
                },
                {
                    "method": "grpo", "model": "sft", "rewards": [VALIDATOR], "variant": "dr_grpo", "equal_groups": "skip",
                    "data": self.rows("problems", "reasoning", self.scaled(ROLLOUTS) * 64, seed=1), "batch_size": 64,
                    "group_size": 8, "minibatches": 4, "max_steps": 4 * self.scaled(ROLLOUTS), "learning_rate": 3e-4,
                    "generation": drawing,
                },
                {"kind": "evaluate", "name": "after", "compare": "before", **verified},
                {"kind": "merge", "name": "merged", "method": "linear", "models": ["sft", "grpo"]},
                {"kind": "evaluate", "name": "after_merge", "model": "merged", "compare": "after", **verified},
            ],
        }  # fmt: skip


def run(demo: Demo, *, resume: bool = False) -> int:
    """Run the pipeline, print what each stage gained, write the report, and return the exit code.

    Args:
        resume: go on with the demo in the folder; otherwise it is replaced.
    """
    began = time.monotonic()
    demo.claim(resume=resume)
    recipe, values = demo.folder / "recipe.yaml", demo.recipe()
    recipe.write_text(dump_yaml(values), encoding="utf-8")
    print(f"{len(values['stages'])} stages; what each logs is in {demo.folder / 'pipeline/stages'}", flush=True)
    result = RLHFOrchestrator(recipe).run_full_pipeline(resume=resume, overwrite=not resume)
    page = write_report(result.output)
    show(json.loads((result.output / "pipeline.json").read_text(encoding="utf-8")), Console())
    print(f"{time.monotonic() - began:.0f} s; the recipe is {recipe}, the report {page}")
    return result.exit_code


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print a line for each stage of a pipeline's record, and what they show together."""
    table = Table(title="What each stage gained", caption="± is one standard error", caption_justify="left")
    for heading in ("stage", "gain", "s"):
        table.add_column(heading, justify="right" if heading == "s" else "left")
    for stage in record["stages"]:
        table.add_row(stage["name"], gained(stage), f"{stage.get('seconds') or 0:.0f}")
    console.print(table)
    for text in explained(record):
        console.print(text, highlight=False, markup=False)


def gained(stage: Mapping[str, Any]) -> str:
    """Return in words what a stage gained; of a merge, which measures nothing itself, its capability tests."""
    changes = (stage.get("capabilities") or {}).get("changes", [])
    tests = [f"{one['suite']} {one['before']['value']:.3f} → {one['after']['value']:.3f}" for one in changes]
    tested = ", ".join(tests) if stage.get("kind") == "merge" else ""
    return str(tested or stage.get("gain") or stage.get("reason") or ", ".join(tests))


def explained(record: Mapping[str, Any]) -> list[str]:
    """Return a few sentences on what the table shows: each only where the numbers of this run say so."""
    stages = {stage["name"]: stage for stage in record["stages"] if stage.get("status") == "finished"}
    return [*about_search(stages), *about_merge(stages)]


def about_search(stages: Mapping[str, Any]) -> list[str]:
    """Say why the best of eight by the reward model is worse than one sample, where it is, and what else eight samples hold."""
    if not {"search", "reward_model"} <= {*stages}:
        return []
    by_name = {one["name"]: one for one in stages["search"]["metrics"]["samplers"]}
    one, best, majority = (by_name[name] for name in ("generate", "best_of_8", "majority_of_8"))
    agreed = stages["reward_model"]["metrics"]["last"].get("eval_accuracy")
    if agreed is None or not clearly(-best["difference"], best["difference_error"]):
        return []
    texts = [
        f"best_of_8 is right less often than one sample, {best['accuracy']:.3f} against {one['accuracy']:.3f}: it takes the"
        f" answer that the reward model scores highest. That model prefers the right answer in {agreed:.3f} of the held-out"
        " pairs, where guessing has 0.5, and among eight answers those that it overrates win."
    ]
    if clearly(majority["difference"], majority["difference_error"]):
        texts.append(
            f"The commonest of eight answers (majority_of_8), which asks no model, is right in {majority['accuracy']:.3f}."
        )
    return [" ".join(texts)]


def about_merge(stages: Mapping[str, Any]) -> list[str]:
    """Say what the merge is compared with and whether it lost, and why it was kept all the same."""
    if not {"before", "after", "merged", "after_merge"} <= {*stages}:
        return []
    metric = f"accuracy/{VALIDATOR}"
    apart = stages["after_merge"]["metrics"].get("differences", {}).get(metric)
    if apart is None or not clearly(abs(apart["value"]), apart["error"]):
        return []
    before, after, merged = (
        stages[name]["metrics"]["metrics"][metric]["value"] for name in ("before", "after", "after_merge")
    )
    lost = "lost" if apart["value"] < 0 else "gained"
    text = (
        f"after_merge is compared with after: the mean of the weights of sft and grpo {lost}"
        f" {100 * abs(apart['value']):.1f} ± {100 * apart['error']:.1f} points against grpo alone"
    )
    if before < merged < after:
        text += f", and lies between sft ({before:.3f}) and grpo ({after:.3f})"
    changes = (stages["merged"].get("capabilities") or {}).get("changes", [])
    if apart["value"] < 0 and changes:
        text += (
            ". The merge was kept because the capability tests judge the likeliest answer, not sampled ones, and there the change"
            f" is {changes[0]['points']:+.1f} points"
        )
    return [f"{text}."]


def clearly(difference: float, error: float | None) -> bool:
    """Tell whether a difference is above 0 by more than two standard errors."""
    return error is not None and difference > 2 * error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        help="folder to write: a new one, or a demo's, which is replaced (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, rows and problems (default: 1)")
    parser.add_argument("--resume", action="store_true", help="go on where the demo was stopped")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the stages' processes
    setup_logging()
    return run(Demo(options.output, options.seed, options.scale), resume=options.resume)


if __name__ == "__main__":
    sys.exit(exit_code(main))
