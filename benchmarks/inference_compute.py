"""Voting, best of n and searches over steps at equal tokens of the policy, on the embedded task with a trained process reward.

    python benchmarks/inference_compute.py [--prompts 200] [--budgets 4 16 64] [--models DIR] [--plot FILE] [--json]

A tiny model learns sums of 3 to 6 numbers of one digit in written steps, from right demonstrations, for a few steps. A process
reward begins with a model that learned the same for longer, as judges know more than those they judge, and learns from the
policy's own wrong answers, and then from made ones, beside right ones, with a label for each step. Both never see a held-out
problem. Every sampler then answers the same
held-out problems. A budget of N is what N whole completions cost: N candidates, N steps drawn at each depth, N particles, or a
tree of so many tokens. Differences are to the majority vote of the same budget, prompt by prompt; errors are standard errors
over prompts. All is a function of the seed, up to rounding.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from confidence import MOST_TOKENS, streams

from rlhf_core import PolicyModel, registry, setup_logging
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.evaluation.sampler_comparison import (
    SamplerScore,
    check_plot,
    compare_samplers,
    plot_comparison,
    standard_error,
)
from rlhf_core.testing.arithmetic_task import Row, Split, solve, split_steps, step_labels, verify
from rlhf_core.testing.tiny import save_tiny

WRITTEN = re.compile(r"(?:[-+*=# 0-9]+\n)*[-+*=# 0-9]+\n?")
"""Answers that look like the task's: what an untrained model writes teaches nothing about steps."""
KINDS = ((1, 3), (1, 4), (1, 5), (1, 6))
"""Digits of the numbers in a problem, and how many numbers there are."""
SAMPLES = 4
"""Answers of the policy to each problem that the process reward learns from."""
OWN_PAIRS = 8000
"""Most pairs with an answer of the policy; further ones have a slip that the task makes, which takes no time to draw."""


def main() -> None:
    options = parse()
    setup_logging()
    if options.plot:
        check_plot(options.plot)
    models = options.models or train(options)
    policy = PolicyModel.from_pretrained(models / "policy").requires_grad_(requires_grad=False)
    held_out = streams("prompt", -(-options.prompts // len(KINDS)), "test", options.seed + 8, KINDS)
    rows = list(islice((row for rows in zip(*held_out, strict=True) for row in rows), options.prompts))
    made = {
        one.name: one.make(policy, models / "process_reward")
        for one in contenders(options.budgets, completion_tokens(policy, rows), options.temperature)
    }

    def found(score: SamplerScore) -> None:
        if not options.json:
            print(f"  {score.name}: {100 * score.accuracy:.1f} %, {score.seconds:.0f} s", flush=True)

    scores = compare_samplers(made, rows, seed=options.seed, together=options.together, found=found)
    report = {"prompts": len(rows), "seed": options.seed, "budgets": options.budgets, "rows": as_rows(scores)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "inference_compute.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report) if options.json else table(report["rows"]))
    if options.plot:
        plot_comparison(scores, options.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="held-out problems")
    parser.add_argument("--budgets", type=square, nargs="+", default=[4, 16, 64], help="in completions, squares from 4")
    parser.add_argument("--steps", type=int, default=200, help="of the policy's training; more make a better one")
    parser.add_argument("--base-steps", type=int, default=1000, help="of what the process reward begins with")
    parser.add_argument("--reward-steps", type=int, default=3000, help="of the process reward's training")
    parser.add_argument("--temperature", type=float, default=0.7, help="of all samplers but greedy decoding")
    parser.add_argument("--together", type=int, default=100, help="prompts that a sampler gets at once")
    parser.add_argument(
        "--models", type=Path, help="the --output of an earlier run, whose models are taken; trains none"
    )
    parser.add_argument("--plot", type=Path, help="also draw accuracy against tokens to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, default=Path("runs/inference_compute"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def square(text: str) -> int:
    """Return a budget: a square of at least 2, so that a search can have as many beams as expansions."""
    value = int(text)
    if round(value**0.5) ** 2 != value or value < 4:
        raise argparse.ArgumentTypeError(f"a budget must be a square number of at least 4, such as 16; got {value}")
    return value


def train(options: argparse.Namespace, *, batch: int = 64) -> Path:
    """Train a policy of 0.9 M weights from nothing, then a process reward; return the directory of both."""
    output, seed = options.output, options.seed
    start = save_tiny(output / "start", seed, layers=4, hidden=128, kv_heads=4, max_positions=128)
    made = {}
    for name, steps in (("policy", options.steps), ("base", options.base_steps)):
        demonstrations = write(output / f"{name}.jsonl", problems("sft", steps * batch, "train", seed))
        made[name] = fit("sft", start, demonstrations, output / name, steps, batch, seed, learning_rate=3e-3)
    # Half as many pairs are as many solutions.
    pairs = list(own_pairs(made["policy"], options.reward_steps * batch // 2, "train", options))
    Random(seed).shuffle(pairs)
    held_out = write(output / "pairs-heldout.jsonl", own_pairs(made["policy"], 200, "test", options))
    fit(
        "process_reward", made["base"], write(output / "pairs.jsonl", pairs), output / "process_reward",
        options.reward_steps, min(batch // 2, len(pairs)), seed + 1, learning_rate=1e-3, aggregation="last",
        eval_data=held_out,
    )  # fmt: skip
    return output


def problems(
    record: str, count: int, split: Split, seed: int, kinds: Sequence[tuple[int, int]] = KINDS
) -> Iterator[Row]:
    """Yield so many rows, of a kind chosen at random each."""
    sources, rng = [iter(rows) for rows in streams(record, count, split, seed, kinds)], Random(seed)
    for _ in range(count):
        yield next(rng.choice(sources))


def own_pairs(path: Path, count: int, split: Split, options: argparse.Namespace) -> Iterator[Row]:
    """Yield preferences of the right solution over a wrong one, with labels of steps: the policy's own answers, then slips."""
    seed = options.seed + (1 if split == "train" else 2)
    policy = PolicyModel.from_pretrained(path).requires_grad_(requires_grad=False)
    sampler = registry.get("sampler", "generate")
    own = min(count, OWN_PAIRS)
    rows = list(problems("prompt", -(-own // 2), split, seed))  # with about two wrong answers each
    config = sampler.Config(max_new_tokens=MOST_TOKENS, temperature=options.temperature)
    answers = sampler(config, policy=policy).sample(rows, SAMPLES, seed=seed)
    made = 0
    for row, group in zip(rows, answers, strict=True):
        texts = [one.text for one in group if WRITTEN.fullmatch(one.text)]
        wrong = dict.fromkeys(text for text in texts if not verify(row["prompt"], text))
        for text in wrong:
            if made == own:
                break
            made += 1
            pair = ("\n".join(solve(row["prompt"])), text)
            yield {
                "prompt": row["prompt"], "chosen": pair[0], "rejected": pair[1],
                "steps": [split_steps(one) for one in pair], "labels": [step_labels(row["prompt"], one) for one in pair],
            }  # fmt: skip
    yield from problems("preference", count - made, split, seed)


def fit(
    method: str, model: Path, data: Path, output: Path, steps: int, batch: int, seed: int, *, learning_rate: float,
    eval_data: Path | None = None, **options: Any,
) -> Path:  # fmt: skip
    """Train a model by a method of the registry, move it to `output`, and return that; prints the metrics on held-out rows."""
    trainer = registry.get("trainer", method)
    config = trainer.Config.parse(
        {
            "seed": seed, "max_length": 128, "dataset": {"wrap": "none"}, "logging": {"every": 50}, "warmup_ratio": 0.05,
            "learning_rate": learning_rate, "batch_size": batch, "max_steps": steps,
            "optimizer": {"beta2": 0.99, "weight_decay": 0.01}, **options,
        }
    )  # fmt: skip
    run = output.with_name(f"{output.name}-run")
    result = trainer(config, model=model, data=data, output=run, eval_data=eval_data).train(overwrite=True)
    output.unlink(missing_ok=True)
    output.symlink_to(result.model_dir.resolve(), target_is_directory=True)
    (output.parent / f"{output.name}.json").write_text(json.dumps(dict(result.eval_metrics)) + "\n", encoding="utf-8")
    return output


def write(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows to a JSONL file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def completion_tokens(policy: PolicyModel, rows: Sequence[Row]) -> float:
    """Return the mean number of tokens of a right solution, its end included: what one completion costs."""
    return 1 + fmean(len(policy.tokenizer("\n".join(solve(row["prompt"])))["input_ids"]) for row in rows)


@dataclass(frozen=True)
class Contender:
    """A sampler at one budget, by its options."""

    label: str
    budget: int
    """In completions."""
    method: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.label} {self.budget}"

    def make(self, policy: PolicyModel, process_reward: Path) -> Sampler:
        """Return the sampler; the process reward, loaded for it alone, takes whichever role a reward has."""
        cls = registry.get("sampler", self.method)
        config = cls.Config.parse({**self.options, "max_new_tokens": MOST_TOKENS})
        # By its last step, as the searches value a path, not by the model's score of the whole completion.
        reward = {"name": "process_reward", "options": {"model": str(process_reward), "aggregation": "last"}}
        roles = {role: policy if kind == "policy" else reward for role, kind in cls.roles_for(config).items()}
        made: Sampler = cls(config, **roles)
        return made


def contenders(budgets: Sequence[int], tokens: float, temperature: float) -> list[Contender]:
    """Return all samplers at all budgets, greedy and a single draw first.

    Args:
        tokens: what one completion costs.
        temperature: of all but greedy decoding.
    """
    drawing = {"temperature": temperature}
    made = [Contender("greedy", 1, "generate", {"temperature": 0.0}), Contender("sampled", 1, "generate", drawing)]
    for budget in sorted(budgets):
        # A search that keeps w paths and draws w steps behind each draws w² steps at each depth.
        width, drawn = round(budget**0.5), {"candidates": budget}
        choices: dict[str, tuple[str, dict[str, Any]]] = {
            "majority": ("best_of_n", {"choose": "majority", **drawn}),
            "best_of_n": ("best_of_n", {"choose": "reward", **drawn}),
            "weighted": ("best_of_n", {"choose": "weighted", "vote_weight": "sigmoid", **drawn}),
            "beam": ("beam", {"beams": width, "expansions": width}),
            "dvts": ("dvts", {"subtrees": width, "expansions": width}),
            "particles": ("particles", {"particles": budget}),
            "mcts": ("mcts", {"simulations": None, "max_tokens": round(budget * tokens), "leaves": width, "tree": "none"}),
            "adaptive": ("adaptive", {"choose": "majority", "budget": budget}),
            "confidence": ("confidence", {"warmup": max(2, budget // 4), "confidence_window": 4, **drawn}),
        }  # fmt: skip
        made += [Contender(label, budget, method, drawing | chosen) for label, (method, chosen) in choices.items()]
    return made


def as_rows(scores: Sequence[SamplerScore]) -> list[dict[str, Any]]:
    """Return for each sampler its figures; those of one budget are compared with its majority, by prompt."""
    by_name = {one.name: one for one in scores}
    found = []
    for one in scores:
        label, _, budget = one.name.partition(" ")
        more: list[float] | None = None
        if label != "majority" and (majority := by_name.get(f"majority {budget}")):
            more = [own - other for own, other in zip(one.by_prompt, majority.by_prompt, strict=True)]
        # What a sampler counts is by role; that of a reward which scores whole completions isn't counted by anyone.
        policy, reward = (one.forwarded.get(role) for role in ("policy", "process_reward"))
        found.append(
            {
                "sampler": label, "budget": int(budget), "accuracy": one.accuracy, "error": one.error,
                "difference": None if more is None else fmean(more),
                "difference_error": None if more is None else standard_error(more),
                "policy_tokens": (policy or 0) / len(one.by_prompt),
                "process_reward_tokens": None if reward is None else reward / len(one.by_prompt),
                "seconds": round(one.seconds, 1),
            }
        )  # fmt: skip
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown, in percent and points."""
    lines = [
        "| sampler | budget | right, % | to majority, points | policy tokens | process reward's tokens | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reward = "–" if row["process_reward_tokens"] is None else f"{row['process_reward_tokens']:.0f}"
        cells = (
            row["sampler"], row["budget"], percent(row["accuracy"], row["error"]),
            percent(row["difference"], row["difference_error"], "+"), f"{row['policy_tokens']:.0f}", reward,
            f"{row['seconds']:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def percent(share: float | None, error: float | None, sign: str = "") -> str:
    return "–" if share is None else f"{100 * share:{sign}.1f} ± {100 * (error or 0):.1f}"


if __name__ == "__main__":
    main()
