"""Linear layers over packed weights: the same products up to rounding, inside the context alone, from the weights as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_core.models import cpu_products
from rlhf_core.models import fast_linears as module
from rlhf_core.models.fast_linears import FastLinears, packed, product


@pytest.fixture(autouse=True)
def _found_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "MARGINS", dict.fromkeys(module.MARGINS, float("inf")))
    monkeypatch.setattr(
        module, "follow_record", lambda choice, *, threads: None
    )  # of a run that an earlier test resumed
    module._way.cache_clear()
    yield
    module._way.cache_clear()


class Layers(nn.Module):
    """Three layers that read one input, one of them without a bias, and one that reads what they give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(24, 40), nn.Linear(24, 8, bias=False), Conv1D(8, 24)
        self.out = nn.Linear(56, 24, bias=False)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.cat([self.q(x), self.k(x + 1 if self.apart else x), self.v(x)], dim=-1))
        return found


def shared(fast: FastLinears) -> int:
    """Return how many products serve how many layers, the second beyond the first."""
    return len(fast._products) - len(set(map(id, fast._products.values())))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_are_those_of_the_layers_before_and_after_packing(dtype: torch.dtype, limit: float) -> None:
    layers, x = Layers(), torch.randn(2, 5, 24)
    before = [parameter.clone() for parameter in layers.parameters()]
    fast = FastLinears(layers)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = layers(x)
        with fast.running(pack=True):
            for _ in range(3):
                found = layers(x)
                assert found.dtype == expected.dtype == dtype
                assert (found - expected).abs().max() < limit
            assert layers(x[:0]).shape == (0, 5, 24)
            assert shared(fast) == 2  # q, k and v are one product
    assert all("forward" not in vars(layer) for layer in layers.modules())
    assert all(torch.equal(one, other) for one, other in zip(before, layers.parameters(), strict=True))


@torch.no_grad()
def test_packed_weights_stay_from_call_to_call_until_the_layers_change() -> None:
    layers, x = Layers(), torch.randn(3, 24)
    fast = FastLinears(layers)
    with fast.running(pack=True):
        layers(x), layers(x)
    kept = dict(fast._products)
    assert kept
    with fast.running(pack=False):
        layers(x)
        assert fast._products == kept
    layers.k.weight.mul_(2)
    with fast.running(pack=False):
        assert not fast._products
        assert (layers(x) - Layers.forward(layers, x)).abs().max() < 1e-5
    with fast.running(pack=True):
        assert (layers(x) - layers(x)).abs().max() < 1e-5


@torch.no_grad()
def test_layers_that_read_other_inputs_after_all_have_products_of_their_own() -> None:
    layers, x = Layers(), torch.randn(3, 24)
    fast = FastLinears(layers)
    with fast.running(pack=True):
        layers(x), layers(x)
        assert shared(fast) == 2
        layers.apart = True
        for _ in range(2):
            found = layers(x)
        assert shared(fast) == 0
    assert (found - layers(x)).abs().max() < 1e-5


@torch.no_grad()
def test_an_input_that_was_changed_in_place_is_read_again() -> None:
    layers, x = Layers(), torch.randn(3, 24)
    with FastLinears(layers).running(pack=True):
        layers(x), layers(x)
        q = layers.q(x)
        x.mul_(2)
        k = layers.k(x)
    assert (k - layers.k(x)).abs().max() < 1e-5
    assert (q - layers.q(x / 2)).abs().max() < 1e-5


def test_inference_mode_counts_no_changes_and_shares_nothing() -> None:
    layers = Layers()
    fast = FastLinears(layers)
    with torch.inference_mode():
        x = torch.randn(3, 24)
        expected = layers(x)
        with fast.running(pack=True):
            assert all((layers(x) - expected).abs().max() < 1e-5 for _ in range(3))
    assert fast._products and shared(fast) == 0


@torch.no_grad()
def test_nothing_is_packed_where_memory_is_short_or_few_passes_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = Layers(), torch.randn(3, 24)
    fast = FastLinears(layers)
    with fast.running(pack=False):
        assert (layers(x) + layers(x) - 2 * Layers.forward(layers, x)).abs().max() < 1e-5
    assert not fast._products
    room = 4 * 4 * layers.out.weight.numel()
    monkeypatch.setattr(module, "available_bytes", lambda: room)
    with fast.running(pack=True):
        for _ in range(3):
            found = layers(x)
    assert len(set(map(id, fast._products.values()))) == 1  # the second has no room
    assert (found - layers(x)).abs().max() < 1e-5


def test_gradients_and_other_dtypes_take_the_layers_own_way() -> None:
    layers, x = Layers(), torch.randn(3, 24)
    fast = FastLinears(layers)
    with fast.running(pack=True):
        with torch.no_grad():
            layers(x), layers(x)
        layers(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            assert layers.q(x).dtype == torch.float16
    assert layers.q.weight.grad is not None and layers.out.weight.grad is not None


@torch.no_grad()
def test_a_packed_layer_that_becomes_another_runs_as_that_one() -> None:
    layers, x = Layers(), torch.randn(3, 24)
    fast = FastLinears(layers)
    with fast.running(pack=True):
        layers(x), layers(x)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(layers.k, "weight", Double())
    expected = layers(x)
    for _ in range(2):
        with fast.running(pack=True):
            assert all((layers(x) - expected).abs().max() < 1e-5 for _ in range(3))


@torch.no_grad()
def test_contexts_within_contexts() -> None:
    layers, x = Layers(), torch.randn(3, 24)
    fast, other = FastLinears(layers), FastLinears(layers)
    expected = layers(x)
    with fast.running(pack=True):
        layers(x)
        with fast.running(pack=False), other.running(pack=True):
            assert all((layers(x) - expected).abs().max() < 1e-5 for _ in range(3))
        assert all((layers(x) - expected).abs().max() < 1e-5 for _ in range(3))
        assert shared(fast) == 2
    assert all("forward" not in vars(layer) for layer in layers.modules())


def test_layers_get_their_forward_back_after_an_error() -> None:
    layers = Layers()
    with pytest.raises(KeyError), FastLinears(layers).running(pack=True):
        raise KeyError
    assert all("forward" not in vars(layer) for layer in layers.modules())


@torch.no_grad()
def test_a_single_weight_may_be_packed() -> None:
    weight, x = torch.randn(40, 24), torch.randn(3, 24)
    assert (product(x, packed(weight)) - x @ weight.t()).abs().max() < 1e-5
    double = torch.randn(40, 24, dtype=torch.float64)
    assert packed(double) is double


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", [False, True])
def test_products_of_16_bits_run_in_float32_where_that_is_much_faster(
    monkeypatch: pytest.MonkeyPatch, pack: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "WIDE_MARGIN", float("inf"))
    layers, x = Layers(), torch.randn(4, 24)
    rounded = [one.to(dtype).double() for one in (x, layers.q.weight, layers.q.bias)]
    exact = (rounded[0] @ rounded[1].T + rounded[2]).to(dtype)
    last_place = {"rtol": torch.finfo(dtype).eps, "atol": 0}  # float32 lies between the exact sum and the rounded one
    fast = FastLinears(layers)
    with torch.autocast("cpu", dtype=dtype), fast.running(pack=pack):
        for _ in range(3):
            torch.testing.assert_close(layers.q(x), exact, **last_place)
            layers(x)
    assert {one._weight.dtype for one in fast._products.values()} == ({torch.float32} if pack else set())
    weight = layers.q.weight.to(dtype)
    found = product(x.to(dtype), packed(weight))
    torch.testing.assert_close(found, (rounded[0] @ rounded[1].T).to(dtype), **last_place)
    assert module.product_dtype(dtype) == torch.float32 and module.product_dtype(torch.float64) == torch.float64


def test_a_way_that_another_process_took_is_taken_where_this_one_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE_MARGIN", float("inf"))
    for taken, way in (("oneDNN in float32", torch.float32), ("PyTorch", None), ("oneDNN", torch.float32)):
        monkeypatch.setattr(module, "_is_right", lambda dtype, way: way == torch.float32)
        monkeypatch.setattr(module, "follow_record", lambda choice, *, threads, taken=taken: taken)
        module._way.cache_clear()
        assert (
            module._way(torch.bfloat16, 2) == way
        )  # packed bf16 isn't to be had here: measured, the margins are infinite
    monkeypatch.setattr(module, "_is_right", lambda dtype, way: False)
    module._way.cache_clear()
    assert module._way(torch.bfloat16, 2) is None


@torch.no_grad()
@pytest.mark.parametrize("part", [1, 100, 1000])
def test_a_weight_that_is_not_packed_is_widened_in_parts_and_for_few_tokens_not_at_all(
    monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(module, "WIDE_MARGIN", float("inf"))
    monkeypatch.setattr(module, "PART", part)
    layers, x, seen = Layers().bfloat16(), torch.randn(2, 5, 24).bfloat16(), []
    wide = layers.q.weight.double(), layers.q.bias.double()

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(weight.numel())
        return cpu_products.onednn_linear(x, weight, bias)

    assert module._way(torch.bfloat16, torch.get_num_threads()) == torch.float32
    monkeypatch.setattr(module, "onednn_linear", noted)
    with FastLinears(layers).running(pack=False):
        torch.testing.assert_close(layers.q(x), (x.double() @ wide[0].T + wide[1]).bfloat16())
        assert sum(seen) == layers.q.weight.numel() and max(seen) <= max(part, 24)
        seen.clear()
        assert torch.equal(layers.q(x[:, :1]), torch.nn.functional.linear(x[:, :1], layers.q.weight, layers.q.bias))
        assert not seen
