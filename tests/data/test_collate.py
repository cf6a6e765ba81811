"""Batches from rows, and rows back from batches: only lengths tell padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data.collate import collate
from rlhf_core.data.encoder import EncodedRow

token = st.integers(0, 3)


@st.composite
def encoded_rows(draw, responses: int | None = None):
    count = responses if responses is not None else draw(st.integers(0, 3))
    rows = []
    for index in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=count, max_size=count))
        rows.append(
            EncodedRow(
                index=7 * index,
                prompt_ids=draw(st.lists(token, min_size=1, max_size=6)),
                responses=ids,
                masks=[draw(st.lists(st.booleans(), min_size=len(part), max_size=len(part))) for part in ids],
                per_prompt={"margin": float(index)},
                per_response={"desirable": [draw(st.booleans()) for _ in ids]},
                prompt=f"p{index}",
                record={"id": index},
            )
        )
    return rows


@settings(max_examples=100)
@given(encoded_rows())
def test_rows_come_back(rows):
    batch = collate(rows)
    assert batch.prompt_ids.dtype == batch.response_ids.dtype == batch.owner.dtype == torch.int64
    assert batch.rows == tuple(row.index for row in rows)
    assert batch.num_tokens == sum(row.num_tokens for row in rows)
    for number, row in enumerate(rows):
        assert batch.prompt_ids[number, : batch.prompt_lengths[number]].tolist() == row.prompt_ids
        mine = (batch.owner == number).nonzero().flatten().tolist()
        assert [batch.response_ids[r, : batch.response_lengths[r]].tolist() for r in mine] == row.responses
        assert [batch.loss_mask[r, : batch.response_lengths[r]].tolist() for r in mine] == row.masks
        assert batch.per_response["desirable"][mine].tolist() == row.per_response["desirable"]
        assert batch.per_prompt["margin"][number] == row.per_prompt["margin"]
        assert batch.records[number] == row.record and batch.prompts[number] == row.prompt


@settings(max_examples=100)
@given(encoded_rows(2))
def test_masks_come_from_lengths_whatever_the_ids(rows):
    # Ids are 0 to 3 and padding is 0, so a mask by `id == pad` would lose real tokens.
    batch = collate(rows)
    learnt = [mask for row in rows for mask in row.masks]
    assert batch.num_loss_tokens == sum(map(sum, learnt))
    inside = torch.arange(batch.loss_mask.shape[1]) < batch.response_lengths[:, None]
    assert not (batch.loss_mask & ~inside).any()


def test_no_rows_is_a_mistake():
    with pytest.raises(ValueError, match="at least one row"):
        collate([])
