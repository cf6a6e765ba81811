"""The example that merges specialists runs in small, by every merger that ships, and keeps what it promises."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_core import registry
from rlhf_core.testing.arithmetic_task import split_of, verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "merge_tasks.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_merge_tasks", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def test_held_out_problems_are_all_different(example: ModuleType, tmp_path: Path) -> None:
    problems = example.Workshop(tmp_path).problems
    for name in example.TASKS:
        validation, test = ([json.dumps(p) for p in problems[split][name]] for split in ("validation", "test"))
        assert len(validation) == example.VALIDATION and len(test) == example.TEST
        assert len({*validation, *test}) == len(validation) + len(test)
        assert all(split_of(prompt) == "test" for split in problems.values() for prompt in split[name])


def test_the_careless_teacher_is_never_right(example: ModuleType) -> None:
    for task in example.TASKS.values():
        for row in itertools.islice(example.careless(task, 0), 200):
            assert split_of(row["prompt"]) == "train" and not verify(row["prompt"], row["response"])


def test_options_belong_to_their_method(example: ModuleType, tmp_path: Path) -> None:
    models = [[tmp_path / "a1", tmp_path / "a2"], [tmp_path / "b1", tmp_path / "b2"]]
    for method, grid in example.GRIDS.items():
        known = {"share", *registry.get("merger", method).Config.model_fields}
        assert all(set(options) <= known for options in grid)
    config = example.plan("linear", {"share": 0.3}, tmp_path / "base", models, tmp_path / "out", 0)
    assert [(Path(entry.model).name, entry.weight) for entry in config.models] == [("a1", 0.7), ("b1", 0.3)]
    config = example.plan("layer_wise", {"t": 0.5}, tmp_path / "base", models, tmp_path / "out", 0)
    assert config.base == str(tmp_path / "a1") and [entry.model for entry in config.models] == [str(tmp_path / "b1")]
    config = example.plan("greedy_soup", {}, tmp_path / "base", models, tmp_path / "out", 0)
    assert len(config.models) == 4


@pytest.mark.slow
def test_merge_tasks_in_small(example: ModuleType, tmp_path: Path) -> None:
    """The whole of the example with too few steps to learn much: every merger is measured, and the soup keeps its promise."""
    report = example.run(tmp_path, seed=1, scale=0.03)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    rows = report["rows"]
    assert list(rows) == ["base", "sums 1", "sums 2", "products 1", "products 2", *registry.mergers]
    for name, row in rows.items():
        for column in (*example.TASKS, "mean"):
            share, error = row[column]
            assert 0 <= share <= 1 and 0 <= error <= 0.5, name
        if name in registry.mergers:
            assert (Path(row["model"]) / "config.json").is_file()
            assert row["validation"] == max(one["validation"] for one in row["tried"])
    soup = rows["greedy_soup"]
    own = [rows[name]["validation"] for name in ("sums 1", "sums 2", "products 1", "products 2")]
    assert list(soup["scores"].values()) == own and soup["score"] == soup["validation"] >= max(own)
    assert not list((tmp_path / "merged").glob("*.trial"))
