"""The pages on metrics name everything that the trainers that ship report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import registry
from rlhf_core.testing.arithmetic_task import ArithmeticTask, answer
from rlhf_core.testing.tiny import save_tiny

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("metrics.md", "online-methods.md", "reinforcement-learning.md")
SHORT = {"max_new_tokens": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "cpo": {"sft_weight": 0.5},
    "dpo": {"sft_weight": 0.5},
    "simpo": {"sft_weight": 0.5},
    "reward_model": {"ensemble": {"size": 3}, "centre_weight": 0.01},
    "process_reward": {},
    "grpo": {"rewards": ["numeric_answer", "repetition"], "group_size": 4, "generation": SHORT, "kl_weight": 0.1,
             "kl_budget": 9.0, "shaping": ["group_normalised"], "eval_samples": 4},
    "ppo": {"rewards": ["numeric_answer"], "generation": SHORT, "kl_target": 0.1, "minibatches": 2},
    "distill": {"on_policy": 0.5, "rewards": ["numeric_answer"], "generation": SHORT},
    "context_compressor": {"keep_end": 4, "chunk": 4, "ratios": [2.0]},
}  # fmt: skip
"""Trainer → options with which it reports as much as it can."""


def documented() -> list[re.Pattern[str]]:
    """Return what the first cells of the pages' tables name; a word in capitals, `k` and `n` stand for anything."""
    names = []
    for page in PAGES:
        for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
            if line.startswith("| `"):
                names += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return [re.compile(re.sub(r"@[kn]", r"@\\d+", re.sub(r"[A-Z]{2,}", r"\\S+", re.escape(name)))) for name in names]


def reported(name: str, folder: Path, start: str) -> Iterator[str]:
    """Yield the names of everything that a short run of a trainer reports."""
    trainer = registry.trainers[name]
    rows = list(ArithmeticTask("sums", terms=3, digits=1).rows(trainer.record, 12))
    if name == "context_compressor":
        rows = [{**row, "prompt": "The town has a market on Fridays. " + row["prompt"]} for row in rows]
    options = {"max_steps": 2, "batch_size": 4, "eval_steps": 1, "dataset": {"wrap": "none"}, **OPTIONS.get(name, {})}
    if name == "distill":
        options["teacher"] = start
        rows = [{**row, "answer": answer(row["prompt"])} for row in rows]
    config = trainer.Config.parse(options)
    result = trainer(config, model=start, data=rows, eval_data=rows[:8], output=folder / name).train()
    yield from result.eval_metrics
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        yield from json.loads(line)


@pytest.mark.parametrize(
    "name", sorted(plugin.name for plugin in registry.find("trainer") if plugin.distribution == "rlhf-core")
)
def test_all_that_a_trainer_reports_is_documented(name: str, tmp_path: Path) -> None:
    start = str(save_tiny(tmp_path / "model", layers=1, hidden=32, kv_heads=2))
    known = documented()
    found = {one.removesuffix("_se") if one.startswith("eval_") else one for one in reported(name, tmp_path, start)}

    def is_known(metric: str) -> bool:
        return any(one.fullmatch(metric) or one.fullmatch(metric.removeprefix("eval_")) for one in known)

    assert not [metric for metric in sorted(found) if not is_known(metric)]


def test_a_name_that_no_page_has_is_missing() -> None:
    known = documented()
    for name in ("no_such_metric", "rewards/other", "scores/p50x", "loss2"):
        assert not any(one.fullmatch(name) for one in known)
    for name in (
        "loss_sft",
        "eval_pass@4",
        "reward/repetition",
        "nll/at_2",
        "eval_scores/p50",
        "eval_disagreement/auc",
    ):
        assert any(one.fullmatch(name) or one.fullmatch(name.removeprefix("eval_")) for one in known)
