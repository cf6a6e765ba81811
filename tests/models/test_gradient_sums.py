"""Gradients added to `Parameter.grad` where they are computed are those that autograd adds up."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import random_batch, relative
from torch import Tensor, nn

from rlhf_core.models import PolicyModel
from rlhf_core.models.gradient_sums import open_gradient, sum_embeddings_in_place, summing_in_place
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 2, 2], [0, 5, 2]])


def embedding(**options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(7, 4, **options)


def changed(layer: nn.Embedding) -> nn.Embedding:
    made = copy.deepcopy(layer)
    sum_embeddings_in_place(made)
    return made


def backward(layer: nn.Embedding, times: int = 1) -> Tensor:
    for _ in range(times):
        (layer(IDS).square().sum() * 3).backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_an_embedding_has_pytorchs_gradient(options: dict[str, Any]) -> None:
    ordinary = embedding(**options)
    expected = backward(copy.deepcopy(ordinary), 2)
    assert relative(backward(changed(ordinary), 2), expected) < 1e-6
    with summing_in_place():
        assert relative(backward(changed(ordinary), 2), expected) < 1e-6


def test_an_embedding_can_be_differentiated_twice() -> None:
    def second(layer: nn.Embedding) -> Tensor:
        (first,) = torch.autograd.grad(layer(IDS).pow(3).sum(), layer.weight, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), layer.weight)
        return found

    assert relative(second(changed(embedding())), second(embedding())) < 1e-6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_trains_its_own_weights(copied: Callable[[nn.Embedding], nn.Embedding]) -> None:
    layer = changed(embedding())
    other = copied(layer)
    with summing_in_place():
        backward(other)
    assert layer.weight.grad is None


def test_a_hook_gets_the_gradient() -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        layer, heard = changed(embedding()), list[Any]()
        getattr(layer.weight, register)(heard.append)
        with summing_in_place():
            found = backward(layer)
        assert len(heard) == 1 and torch.equal(found, backward(embedding()))


def test_nothing_is_added_in_place_outside_the_context() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    with torch.no_grad():
        assert open_gradient(weight) is None
        with summing_in_place():
            assert open_gradient(weight) is weight.grad
            assert open_gradient(weight * 2) is not None  # without a graph that is a leaf, too
        assert open_gradient(weight) is None
    with summing_in_place():
        assert open_gradient(weight) is None  # a second derivative is asked for


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_policys_gradients_over_micro_batches(tied: bool, precision: Any) -> None:
    policy = PolicyModel(tiny_model(tie_embeddings=tied), tiny_tokenizer()).set_options(precision=precision)
    gradients = []
    for in_place in (False, True):
        policy.zero_grad()
        for seed in (0, 1):
            loss = policy.token_logps(random_batch(seed=seed)).sum()
            if in_place:
                with summing_in_place():
                    loss.backward()
            else:
                loss.backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < (1e-5 if precision == "float32" else 1e-2), name
