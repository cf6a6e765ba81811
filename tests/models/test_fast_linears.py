"""Linear layers through oneDNN: the same products up to rounding, inside the context alone, where nothing speaks against it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from rlhf_core.models import fast_linears as module
from rlhf_core.models.fast_linears import fast_linears


@pytest.fixture(autouse=True)
def _found_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "MARGIN", float("inf"))
    module._is_faster.cache_clear()
    yield
    module._is_faster.cache_clear()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 16, bias=False), nn.Linear(16, 8, dtype=torch.bfloat16))


@torch.no_grad()
def test_products_are_those_of_the_layers_and_nothing_is_changed() -> None:
    layers, x = network(), torch.randn(2, 5, 24)
    before = [parameter.clone() for parameter in layers.parameters()]
    expected = layers[:2](x)
    with fast_linears(layers):
        assert "forward" in vars(layers[0]) and "forward" not in vars(layers[2])
        assert (layers[:2](x) - expected).abs().max() < 1e-5
        assert layers[:2](x[:0]).shape == (0, 5, 16)
    assert all("forward" not in vars(layer) for layer in layers)
    assert all(torch.equal(one, other) for one, other in zip(before, layers.parameters(), strict=True))


def test_gradients_and_autocast_take_the_layers_own_way() -> None:
    layers, x = network(), torch.randn(3, 24)
    with fast_linears(layers):
        layers[:2](x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert layers[0](x).dtype == torch.bfloat16
    assert layers[0].weight.grad is not None


def test_layers_get_their_forward_back_after_an_error() -> None:
    layers = network()
    with pytest.raises(KeyError), fast_linears(layers):
        raise KeyError
    assert all("forward" not in vars(layer) for layer in layers)
