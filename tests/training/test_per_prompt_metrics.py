"""Standard errors of held-out averages: against hand numbers and limiting cases, and out of a real evaluation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from batches import random_batch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import PluginError
from rlhf_core.infra.statistics import ratio_standard_error
from rlhf_core.training.per_prompt_metrics import (
    Entries,
    MetricsByPrompt,
    MetricsByRow,
    merge_entries,
    number_prompts,
    row_values,
    standard_errors,
)

Pairs = Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]


def entries(batch: Batch, metrics: Pairs) -> Entries:
    kept = MetricsByRow("Method")
    kept.add(batch, metrics)
    return kept.entries


SCORES = st.lists(st.floats(-10, 10), min_size=2, max_size=20)


@given(SCORES)
def test_one_row_a_prompt_gives_the_usual_error_of_a_mean(scores: list[float]) -> None:
    found = ratio_standard_error([(score, 1.0) for score in scores])
    assert found == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)), rel=1e-6, abs=1e-9)


@given(SCORES, st.integers(2, 5))
def test_the_same_rows_again_make_nothing_surer(scores: list[float], copies: int) -> None:
    once = ratio_standard_error([(score, 1.0) for score in scores])
    again = ratio_standard_error([(score * copies, float(copies)) for score in scores])
    assert again == pytest.approx(once, rel=1e-6, abs=1e-9)


def test_by_hand() -> None:
    # Two prompts, 3 of 4 and 1 of 2 right: r = 4/6, residuals 3 - 8/3 and 1 - 4/3, so sqrt(2 * 2/9) / 6.
    assert ratio_standard_error([(3.0, 4.0), (1.0, 2.0)]) == pytest.approx(1 / 9)


def test_one_prompt_has_no_error() -> None:
    assert ratio_standard_error([(3.0, 4.0)]) is None


def test_rows_of_one_prompt_are_one_observation_whichever_process_saw_them() -> None:
    batch = random_batch(prompts=3).select([0, 1, 2])
    batch = replace(batch, prompt_ids=batch.prompt_ids[[0, 1, 0]], prompt_lengths=batch.prompt_lengths[[0, 1, 0]])
    right = torch.tensor([1.0, 0.0, 1.0])
    whole = entries(batch, {"accuracy": (right, 3), "total": (torch.tensor(2.0), 3)})
    parts = [entries(batch.select(rows), {"accuracy": (right[rows], torch.ones(len(rows)))}) for rows in ([2, 1], [0])]
    expected = ratio_standard_error([(2.0, 2.0), (0.0, 1.0)])
    assert standard_errors(whole) == standard_errors(merge_entries(parts)) == {"accuracy": pytest.approx(expected)}
    assert merge_entries(parts) == whole
    assert row_values(whole)["accuracy"].tolist() == right.tolist()
    assert entries(batch.pad(prompt_tokens=3, value=7), {"accuracy": (right, 3)}) == whole


def test_rows_that_count_nothing_are_left_out() -> None:
    found = entries(random_batch(prompts=3), {"gain": (torch.tensor([2.0, 0.0, 4.0]), torch.tensor([1.0, 0.0, 2.0]))})
    assert row_values(found)["gain"].tolist() == [2.0, 2.0]
    assert standard_errors(found)["gain"] == pytest.approx(0.0)


def test_a_wrong_number_of_entries_is_the_plugins_fault() -> None:
    with pytest.raises(PluginError, match=r"metric `accuracy` must be one number, or one entry per prompt"):
        entries(random_batch(prompts=3), {"accuracy": (torch.zeros(2), 2)})


def test_whole_numbers_and_no_rows_at_all_count_like_any_others() -> None:
    """Three responses over two prompts are one and a half each, whatever type the sums are of."""
    batch = random_batch(2, 1)
    assert [entry[3] for entry in entries(batch, {"right": (torch.tensor([1, 0]), 3)})["right"]] == [1.5, 1.5]
    sums = MetricsByPrompt(2)
    sums.add(number_prompts(batch), {"right": (torch.tensor([True, True]), 3)})
    total, count = sums.pairs()["right"]
    assert isinstance(total, torch.Tensor) and isinstance(count, torch.Tensor)
    assert (total.tolist(), count.tolist()) == ([1, 1], [1.5, 1.5])
    assert entries(batch.select([]), {"right": (torch.zeros(0), 3)}) == {"right": []}
