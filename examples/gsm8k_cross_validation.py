"""Rank every pair of GSM8K by a reward model that never met its question: cross-validation of an ensemble.

    python examples/fetch_smollm2.py                                  the model, once
    python examples/gsm8k_split.py --source ../shared/data/gsm8k      the rows, once
    python examples/gsm8k_cross_validation.py [--folds 5] [--steps 126] [--fold 0] [--output runs/gsm8k-cross-validation]

Trains `gsm8k_reward_model.yaml` once a fold, each time with the questions of one fold left out, and scores that fold's pairs with
it. Printed are the share of pairs ranked rightly, by fold and in all, and how far the members disagree on the pairs ranked
wrongly and rightly; standard errors take the questions as the observations. `--fold` trains one fold only, so that several
processes may share the work; a fold that is there already, of the same rows, model and options, is not trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf_core import registry, setup_logging
from rlhf_core.cli import exit_code
from rlhf_core.config.run_file import RunConfig
from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.contracts.reward import Sample
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.infra.files import replace_json
from rlhf_core.infra.statistics import auc, ratio_standard_error
from rlhf_core.models import RewardModel
from rlhf_core.models.model_reward import SampleScores, ScoringConfig

CONFIGURATION = Path(__file__).parent / "gsm8k_reward_model.yaml"
Row = dict[str, Any]


def read(folder: Path) -> list[Row]:
    """Return all pairs, of both sides of the split."""
    rows: list[Row] = []
    for path in (folder / "preferences.train.jsonl", folder / "preferences.heldout.jsonl"):
        if not path.is_file():
            raise DataError("no such file", place=str(path), fix="run examples/gsm8k_split.py first")
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    return rows


def fold_of(row: Row, folds: int) -> int:
    """Return the fold of a row, by its question alone."""
    return hashlib.sha256(f"fold {_question(row)}".encode()).digest()[0] % folds


def margins(model: Path, rows: list[Row], config: Any) -> list[list[float]]:
    """Return by how much each member scores the chosen response above the rejected one, one list a pair."""
    loaded = RewardModel.from_pretrained(str(model), device=DeviceManager().device, precision=config.precision).eval()
    scoring = ScoringConfig(max_length=config.length_limit)
    score = SampleScores[list[float]](lambda batch: loaded.scores(batch).tolist(), loaded, scoring)
    sides = [
        score([Sample(prompt=row["prompt"], completion=row[side]) for row in rows]) for side in ("chosen", "rejected")
    ]
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(*sides, strict=True)]


def cross_validated(rows: list[Row], fold: int, options: argparse.Namespace) -> list[Row]:
    """Return the margins of a fold's pairs by a model of the other folds, trained unless that was done before."""
    values, places = load_yaml(CONFIGURATION)
    run = RunConfig.parse({key: values.pop(key) for key in RunConfig.KEYS if key in values}, place=places)
    trainer = registry.get("trainer", run.method)
    config = trainer.Config.parse({**values, "max_steps": options.steps, "seed": fold}, place=places)
    model = options.model or run.model
    what = json.dumps([rows, model, options.folds, config.model_dump(mode="json")])
    path = options.output / f"fold-{fold}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.json"
    if path.is_file():
        return list(json.loads(path.read_text(encoding="utf-8")))
    left_out = [row for row in rows if fold_of(row, options.folds) == fold]
    training_rows = [row for row in rows if fold_of(row, options.folds) != fold]
    if not left_out or not training_rows:
        raise DataError("a fold without questions", place=f"fold {fold}", fix="set fewer --folds, and at least 2")
    result = trainer(config, model=model, data=training_rows, output=path.with_suffix("")).train(overwrite=True)
    found = margins(result.model_dir, left_out, config)
    lines = [{"question": _question(row), "margins": one} for row, one in zip(left_out, found, strict=True)]
    replace_json(path, lines)
    return lines


def summarise(found: list[list[Row]]) -> dict[str, Any]:
    """Print and return what the folds' margins say."""
    for fold, pairs in enumerate(found):
        print(f"fold {fold}: {_accuracy(pairs)}")
    pairs = [pair for fold in found for pair in fold]
    print(f"all: {_accuracy(pairs)}")
    table = torch.tensor([pair["margins"] for pair in pairs])
    right, doubt = table.mean(1) > 0, table.sigmoid().std(1)
    report: dict[str, Any] = {"pairs": len(pairs), "accuracy": float(right.float().mean())}
    if right.all() or not right.any():
        return report
    by_question: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_question.setdefault(pair["question"], []).append(number)
    groups = [torch.tensor(numbers) for numbers in by_question.values()]
    draws = numpy.random.default_rng(0).integers(len(groups), size=(1000, len(groups)))
    chosen = [torch.cat([groups[i] for i in draw]) for draw in draws]
    again = [_doubt(right[one], doubt[one]) for one in chosen if right[one].any() and not right[one].all()]
    errors = torch.tensor(again).std(0).tolist()
    report["questions"] = len(groups)
    for name, value, error in zip(("wrong", "right", "difference", "auc"), _doubt(right, doubt), errors, strict=True):
        report[f"disagreement/{name}"] = [value, error]
        print(f"disagreement, {name}: {value:.4f} ± {error:.4f}")
    return report


def _doubt(right: Tensor, doubt: Tensor) -> tuple[float, float, float, float]:
    wrong, well = doubt[~right], doubt[right]
    return float(wrong.mean()), float(well.mean()), float(wrong.mean() - well.mean()), auc(wrong, well)


def _accuracy(pairs: list[Row]) -> str:
    clusters: dict[str, tuple[float, float]] = {}
    for pair in pairs:
        total, count = clusters.get(pair["question"], (0.0, 0.0))
        clusters[pair["question"]] = (total + (sum(pair["margins"]) > 0), count + 1)
    total, count = (sum(part) for part in zip(*clusters.values(), strict=True))
    error = ratio_standard_error(list(clusters.values()))
    error = float("nan") if error is None else error  # of one question
    return f"{total / count:.3f} ± {error:.3f} of {count:.0f} pairs of {len(clusters)} questions"


def _question(row: Row) -> str:
    return str(row["prompt"][-1]["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("data/gsm8k"), help="folder of the split (default: %(default)s)"
    )
    parser.add_argument("--model", help="the model to start from (default: that of the configuration)")
    parser.add_argument("--folds", type=int, default=5, help="parts of the questions (default: %(default)s)")
    parser.add_argument("--fold", type=int, help="train this one only, and sum nothing up")
    parser.add_argument("--steps", type=int, default=126, help="optimiser steps a fold (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gsm8k-cross-validation"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args()
    setup_logging()
    if options.fold is not None and not 0 <= options.fold < options.folds:
        raise ConfigError("there is no such fold", place="--fold", got=options.fold, fix=f"0 to {options.folds - 1}")
    rows = read(options.data)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = range(options.folds) if options.fold is None else [options.fold]
    found = [cross_validated(rows, fold, options) for fold in wanted]
    if options.fold is None:
        report = summarise(found)
        (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))
