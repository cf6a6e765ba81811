"""The batch: columns that fit, micro-batches that keep everything, padding that lengths define."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from batches import random_batch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.contracts.batch import Batch

sizes = st.integers(1, 6)


def filled(prompts: int = 3, responses: int = 2, seed: int = 0) -> Batch:
    """Return a batch with a column of each kind whose values tell where they belong, and records."""
    batch = random_batch(prompts, responses, seed=seed, masked=True).attach(
        per_prompt={"number": torch.arange(prompts)},
        per_response={"score": torch.arange(prompts * responses) * 10.0},
    )
    batch = batch.attach(per_token={"twice": batch.response_ids * 2})
    return Batch(**{**vars(batch), "records": tuple({"id": number} for number in range(prompts))})


def contents(batch: Batch) -> list[tuple[object, ...]]:
    """Return what each response is, without padding: everything that must survive any cut and order."""
    found = []
    for response, (owner, length) in enumerate(zip(batch.owner.tolist(), batch.response_lengths.tolist(), strict=True)):
        prompt = batch.prompt_ids[owner, : int(batch.prompt_lengths[owner])].tolist()
        tokens = [
            column[response, :length].tolist() for column in (batch.response_ids, batch.loss_mask, batch["twice"])
        ]
        own = (
            float(batch["score"][response]),
            int(batch["number"][owner]),
            batch.rows[owner],
            batch.records[owner]["id"],
        )
        found.append((tuple(prompt), *(tuple(each) for each in tokens), *own))
    return found


def test_tokens_are_real_and_each_prompt_counts_once() -> None:
    batch = random_batch(2, 3)
    assert batch.num_tokens == int(batch.prompt_lengths.sum()) + int(batch.response_lengths.sum())
    assert batch.pad(3, 4).num_tokens == batch.num_tokens
    expected = [
        int(batch.prompt_lengths[p] + sum(batch.response_lengths[r] for r in range(6) if batch.owner[r] == p))
        for p in (0, 1)
    ]
    assert batch.prompt_tokens().tolist() == expected
    assert batch.num_loss_tokens == int(batch.response_lengths.sum())


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("per_prompt", (6,), r"per_prompt column 'x' must start with shape \(3,\), got \(6,\)"),
        ("per_response", (3,), r"per_response column 'x' must start with shape \(6,\), got \(3,\)"),
        ("per_response", (), r"per_response column 'x' must start with shape \(6,\), got \(\)"),
        ("per_token", (6, 1), r"per_token column 'x' must start with shape \(6, \d+\), got \(6, 1\)"),
    ],
)
def test_a_column_of_another_length_is_never_broadcast(kind: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled().attach(**{kind: {"x": torch.zeros(shape)}})


def test_attaching_leaves_the_batch_as_it_was() -> None:
    batch = filled()
    more = batch.attach(per_response={"score": torch.zeros(6), "new": torch.zeros(6, 2)})
    assert more["new"].shape == (6, 2) and more["score"].sum() == 0
    assert batch["score"].sum() > 0 and "new" not in batch.per_response
    with pytest.raises(KeyError, match=r"no column 'nw'; it has \['number', 'score', 'new', 'twice'\]"):
        more["nw"]


def test_pairs_are_chosen_and_rejected_of_each_prompt() -> None:
    chosen, rejected = filled(3, 2).pairs(torch.arange(6))
    assert (chosen.tolist(), rejected.tolist()) == ([0, 2, 4], [1, 3, 5])
    wide, _ = filled(3, 2).pairs(torch.arange(12).view(6, 2))
    assert wide.tolist() == [[0, 1], [4, 5], [8, 9]]
    with pytest.raises(ValueError, match=r"expected two responses a prompt \(6 rows\), got 9"):
        filled(3, 3).pairs(torch.arange(9))


@given(sizes, st.integers(1, 4), st.data())
def test_a_selection_takes_whole_prompts_in_order(prompts: int, responses: int, data: st.DataObject) -> None:
    batch = filled(prompts, responses)
    picks = data.draw(st.lists(st.integers(0, prompts - 1), unique=True, min_size=1))
    chosen = batch.select(picks)
    everything = contents(batch)
    assert contents(chosen) == [everything[pick * responses + k] for pick in picks for k in range(responses)]
    assert chosen.prompt_ids.shape[1] == chosen.prompt_lengths.max()
    assert chosen.response_ids.shape[1] == chosen.response_lengths.max()
    assert chosen.rows == tuple(picks)


def test_selecting_nothing_is_an_empty_batch() -> None:
    empty = filled().select([])
    assert (empty.num_prompts, empty.num_responses, empty.num_tokens, empty.records) == (0, 0, 0, ())


@given(
    sizes,
    st.integers(1, 3),
    st.none() | st.integers(1, 7),
    st.none() | st.integers(1, 60),
    st.booleans(),
    st.integers(0, 3),
)
def test_a_cut_keeps_every_row_once_and_its_bounds(
    prompts: int, responses: int, max_prompts: int | None, max_tokens: int | None, by_length: bool, seed: int
) -> None:
    batch = filled(prompts, responses, seed)
    micros = batch.split(size=max_prompts, max_tokens=max_tokens, by_length=by_length)
    assert Counter(row for micro in micros for row in contents(micro)) == Counter(contents(batch))
    for micro in micros:
        assert micro.num_responses == responses * micro.num_prompts  # a prompt's responses stay together
        assert max_prompts is None or micro.num_prompts <= max_prompts
        assert max_tokens is None or micro.num_tokens <= max_tokens or micro.num_prompts == 1
    if not by_length:
        assert [row for micro in micros for row in micro.rows] == list(batch.rows)
    assert sum(micro.num_loss_tokens for micro in micros) == batch.num_loss_tokens


@given(sizes, st.integers(1, 3), st.integers(0, 4), st.integers(0, 4), st.integers(0, 199))
def test_padding_is_told_by_lengths_whatever_its_id(
    prompts: int, responses: int, more_prompt: int, more_response: int, value: int
) -> None:
    batch = filled(prompts, responses)
    padded = batch.pad(more_prompt, more_response, value=value)
    assert padded.prompt_ids.shape[1] == batch.prompt_ids.shape[1] + more_prompt
    assert padded.response_ids.shape == padded.loss_mask.shape == padded["twice"].shape
    assert contents(padded) == contents(batch) and padded.num_loss_tokens == batch.num_loss_tokens
    assert contents(padded.select(range(prompts))) == contents(batch)


def test_moving_takes_every_tensor() -> None:
    moved = filled().to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    tensors += [moved["number"], moved["score"], moved["twice"]]
    assert len(tensors) == 9 and {tensor.device.type for tensor in tensors} == {"meta"}


@given(
    prompts=sizes,
    responses=sizes,
    size=st.none() | st.integers(1, 8),
    max_tokens=st.none() | st.integers(1, 60),
    by_length=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_cut_between_a_prompts_responses_keeps_each_once(
    prompts: int, responses: int, size: int | None, max_tokens: int | None, by_length: bool, seed: int
) -> None:
    batch = filled(prompts, responses, seed)
    micros = batch.split(size=size, max_tokens=max_tokens, by_length=by_length, divide=True)
    assert Counter(entry for micro in micros for entry in contents(micro)) == Counter(contents(batch))
    for micro in micros:
        assert size is None or micro.num_responses <= size
        assert max_tokens is None or micro.num_tokens <= max_tokens or micro.num_responses == 1
        assert set(micro.owner.tolist()) == set(range(micro.num_prompts))  # no prompt without a response


@given(seed=st.integers(0, 99), chosen=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
def test_take_keeps_the_order_that_was_asked_for(seed: int, chosen: list[int]) -> None:
    batch = filled(4, 3, seed)
    every = contents(batch)
    assert contents(batch.take(chosen)) == [every[response] for response in chosen]


@given(prompts=sizes, responses=sizes, seed=sizes, padding=st.integers(0, 3))
def test_prompts_move_into_responses(prompts: int, responses: int, seed: int, padding: int) -> None:
    batch = filled(prompts, responses, seed)
    moved = batch.pad(padding, padding, value=7).prompts_in_responses()
    expected = [
        (prompt[:1], prompt[1:] + ids, (False,) * (len(prompt) - 1) + mask, (0,) * (len(prompt) - 1) + twice, *rest)
        for prompt, ids, mask, twice, *rest in contents(batch)
    ]
    assert contents(moved) == expected
    assert moved.num_loss_tokens == batch.num_loss_tokens
    beyond = torch.arange(moved.response_ids.shape[1]) >= moved.response_lengths[:, None]
    assert (
        not moved.loss_mask[beyond].any() and not moved.response_ids[beyond].any() and not moved["twice"][beyond].any()
    )
