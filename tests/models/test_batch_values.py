"""Values of a whole batch, computed in parts: the same for any cut, on any axis, with memory or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from batches import random_batch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import NumbersError, PluginError
from rlhf_core.models.batch_values import Axis, batch_values

CPU = torch.device("cpu")


def token_values(batch: Batch) -> Tensor:
    """Return (R, T): each token's id and its prompt's length, 0 in the padding."""
    inside = torch.arange(batch.response_ids.shape[1]) < batch.response_lengths[:, None]
    return (batch.response_ids + batch.prompt_lengths[batch.owner][:, None]).double() * inside


FUNCTIONS: dict[Axis, Callable[[Batch], Tensor]] = {
    "token": token_values,
    "response": lambda batch: token_values(batch).sum(1),
    "prompt": lambda batch: batch.prompt_lengths.double(),
}

CUTS: list[Callable[[Batch], Sequence[Batch]]] = [
    lambda batch: [batch],
    lambda batch: batch.split(size=1),
    lambda batch: batch.split(max_tokens=25),
    lambda batch: batch.split(size=2, by_length=False),
]


@pytest.mark.parametrize("axis", FUNCTIONS)
@pytest.mark.parametrize("cut", CUTS)
def test_values_are_those_of_the_whole_batch(axis: Axis, cut: Callable[[Batch], Sequence[Batch]]) -> None:
    batch = random_batch(5, 3, seed=1)
    found = batch_values(batch, FUNCTIONS[axis], axis=axis, cut=cut, device=CPU)
    assert found.dtype == torch.float32
    assert torch.equal(found, FUNCTIONS[axis](batch).float())


def test_a_group_may_be_cut() -> None:
    batch = random_batch(2, 7, seed=3)
    found = batch_values(batch, token_values, axis="token", cut=lambda b: b.split(size=2, divide=True), device=CPU)
    assert torch.equal(found, token_values(batch).float())


def test_several_values_come_from_one_pass() -> None:
    batch, calls = random_batch(4, 2), 0

    def both(micro: Batch) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return micro.response_ids * 2, token_values(micro)[..., None].expand(-1, -1, 3)

    ids, values = batch_values(batch, both, axis="token", cut=lambda b: b.split(size=1), device=CPU)
    assert calls == 4
    inside = token_values(batch) > 0
    assert ids.dtype == torch.long and torch.equal(ids[inside], (batch.response_ids * 2)[inside])
    assert torch.equal(values[..., 1], token_values(batch).float())


@pytest.mark.parametrize("cut", [*CUTS, lambda batch: batch.split(size=2, divide=True)])
def test_values_of_different_axes_come_from_one_pass(cut: Callable[[Batch], Sequence[Batch]]) -> None:
    batch = random_batch(5, 3, seed=1)
    axes: tuple[Axis, ...] = ("token", "response")
    tokens, sums = batch_values(
        batch, lambda micro: tuple(FUNCTIONS[axis](micro) for axis in axes), axis=axes, cut=cut, device=CPU
    )
    assert torch.equal(tokens, token_values(batch).float()) and torch.equal(sums, token_values(batch).float().sum(1))


def test_as_many_axes_as_values() -> None:
    with pytest.raises(PluginError, match="2 axes are named for 1 tensors"):
        batch_values(random_batch(2, 2), token_values, axis=("token", "response"), cut=lambda b: [b], device=CPU)


def test_a_batch_without_rows_has_no_values() -> None:
    batch = random_batch(3, 2).select([])
    assert batch_values(batch, token_values, axis="token", cut=lambda b: [], device=CPU).shape == (0, 0)


def test_where_memory_runs_out_the_batch_is_halved_even_between_a_prompts_responses() -> None:
    batch, sizes = random_batch(2, 4, seed=2), []

    def small_only(micro: Batch) -> Tensor:
        sizes.append(micro.num_responses)
        if micro.num_responses > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_values(micro)

    found = batch_values(batch, small_only, axis="token")
    assert torch.equal(found, token_values(batch).float())
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_one_response_that_does_not_fit_is_reported() -> None:
    def never(micro: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(NumbersError, match="out of memory"):
        batch_values(random_batch(2, 2), never, cut=lambda b: [b], device=CPU)


def test_values_of_another_axis_are_refused() -> None:
    with pytest.raises(PluginError, match=r"axis `token` must begin with shape"):
        batch_values(random_batch(2, 2), FUNCTIONS["response"], axis="token", cut=lambda b: [b], device=CPU)
