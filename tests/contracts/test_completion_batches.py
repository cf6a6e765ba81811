"""Batches made of completions, and batches joined: nothing is lost, moved or made up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from batches import random_batch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.infra.errors import PluginError

ONE = Completion("a", [5, 2], [-0.5, -1.0], "end", raw_logprobs=[-1.5, -2.0], kept_mass=[0.5, 1.0], policy_version=3)
CUT = Completion("b", [7], [-0.25], "length", raw_logprobs=[-0.75], kept_mass=[1.0], mask=[False], policy_version=4)


def asked(prompts: int = 2, seed: int = 0) -> Batch:
    """Return prompts with columns and a response each, which completions take the place of."""
    batch = random_batch(prompts, 1, seed=seed).attach(
        per_prompt={"margin": torch.arange(prompts)}, per_response={"old": torch.zeros(prompts)}
    )
    return replace(
        batch,
        rows=tuple(range(7, 7 + prompts)),
        prompts=tuple(f"p{n}" for n in range(prompts)),
        records=tuple({"answer": n} for n in range(prompts)),
    )


def test_completions_without_a_token_have_the_columns_of_others() -> None:
    nothing = Completion("", [], [], "end")
    made = Batch.from_completions(asked(), [[nothing], [nothing]])
    assert made.per_token.keys() == {"sampled_logps", "raw_logps", "kept_mass"} and made.response_ids.shape == (2, 0)
    assert Batch.cat([made, Batch.from_completions(asked(), [[ONE], [CUT]])]).response_lengths.tolist() == [0, 0, 2, 1]


def test_completions_become_the_responses() -> None:
    batch = asked()
    made = Batch.from_completions(batch, [[ONE, CUT], [ONE]])
    assert made.prompt_ids is batch.prompt_ids and made.rows == (7, 8)
    assert (made.prompts, made.records, made["margin"].tolist()) == (batch.prompts, batch.records, [0, 1])
    assert made.response_ids.tolist() == [[5, 2], [7, 0], [5, 2]] and made.response_lengths.tolist() == [2, 1, 2]
    assert made.owner.tolist() == [0, 0, 1]
    assert made.loss_mask.tolist() == [[True, True], [False, False], [True, True]]
    assert made["sampled_logps"].tolist() == [[-0.5, -1.0], [-0.25, 0.0], [-0.5, -1.0]]
    assert made["raw_logps"].tolist() == [[-1.5, -2.0], [-0.75, 0.0], [-1.5, -2.0]]
    assert made["kept_mass"].tolist() == [[0.5, 1.0], [1.0, 0.0], [0.5, 1.0]]
    assert made["truncated"].tolist() == [False, True, False] and made["truncated"].dtype == torch.bool
    assert made["policy_version"].tolist() == [3, 4, 3] and made["policy_version"].dtype == torch.long
    assert {column.dtype for column in made.per_token.values()} == {torch.float32}
    assert {*made.per_response} == {"truncated", "policy_version"}  # the old responses' columns are gone


def test_groups_may_be_empty_and_completions_too() -> None:
    made = Batch.from_completions(asked(), [[], [replace(ONE, ids=[], logprobs=[], raw_logprobs=[], kept_mass=[])]])
    assert made.response_ids.shape == (1, 0) and made.owner.tolist() == [1] and made.num_loss_tokens == 0
    empty = Batch.from_completions(asked().select([]), [])
    assert (empty.num_prompts, empty.num_responses) == (0, 0)
    assert {*empty.per_token} == {"sampled_logps", "raw_logps", "kept_mass"}  # as on processes that have rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [-1.0]}, r"row 8: a completion's `logprobs` has 1 values for 2 tokens"),
        ({"mask": [True]}, r"row 8: a completion's `mask` has 1 values for 2 tokens"),
        ({"kept_mass": []}, r"row 8: a completion's `kept_mass` has 0 values for 2 tokens"),
    ],
)
def test_fields_of_unequal_lengths_name_the_row(change: dict[str, list[float]], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Batch.from_completions(asked(), [[ONE], [replace(ONE, **change)]])
    with pytest.raises(PluginError, match="got 1 groups for 2 prompts"):
        Batch.from_completions(asked(), [[ONE]])


def test_what_no_completion_knows_is_no_column() -> None:
    bare = replace(ONE, raw_logprobs=(), kept_mass=())
    assert {*Batch.from_completions(asked(1), [[bare]]).per_token} == {"sampled_logps"}


@given(
    prompts=st.integers(1, 6), responses=st.integers(1, 3), cuts=st.lists(st.integers(0, 6)), seed=st.integers(0, 99)
)
def test_joining_undoes_cutting(prompts: int, responses: int, cuts: list[int], seed: int) -> None:
    whole = random_batch(prompts, responses, seed=seed, masked=True)
    # `pad` writes zeros, so padding is zeros from the start.
    inside = [
        torch.arange(ids.shape[1]) < lengths[:, None]
        for ids, lengths in ((whole.prompt_ids, whole.prompt_lengths), (whole.response_ids, whole.response_lengths))
    ]
    whole = replace(whole, prompt_ids=whole.prompt_ids * inside[0], response_ids=whole.response_ids * inside[1])
    whole = whole.attach(
        per_token={"twice": whole.response_ids * 2}, per_response={"old": torch.arange(whole.num_responses)}
    )
    whole = replace(whole, prompts=tuple("abcdef"[:prompts]), records=tuple({"id": n} for n in range(prompts)))
    edges = sorted({0, prompts, *(cut for cut in cuts if cut < prompts)})
    parts = [whole.select(range(low, high)) for low, high in itertools.pairwise(edges)]
    joined = Batch.cat([*parts, whole.select([])])
    trimmed = whole.select(range(prompts))
    for name, value in vars(trimmed).items():
        other = getattr(joined, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
        elif isinstance(value, dict):
            assert {*other} == {*value} and all(torch.equal(other[key], value[key]) for key in value), name
        else:
            assert other == value, name


def test_joining_refuses_batches_of_different_columns() -> None:
    batch = asked()
    with pytest.raises(ValueError, match="only some of the batches have the per_response column 'new'"):
        Batch.cat([batch, batch.attach(per_response={"new": torch.zeros(2)})])
    with pytest.raises(ValueError, match="only some of the batches have `records`"):
        Batch.cat([batch, replace(batch, records=())])
    with pytest.raises(ValueError, match="at least one batch"):
        Batch.cat([])
