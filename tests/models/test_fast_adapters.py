"""Fused LoRA layers compute what peft's do, change no weight, and leave to peft what they don't know."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from quantised import EightBits, quantised
from torch import Tensor, nn

from rlhf_core.models import fast_linears
from rlhf_core.models.fast_adapters import fast_adapters
from rlhf_core.testing.tiny import tiny_model

IDS = torch.randint(7, 263, (3, 9), generator=torch.Generator().manual_seed(0))
LAYERS = 14
"""Linear layers of the tiny model's blocks."""


def adapted(base: nn.Module | None = None, *, name: str | None = None, **options: Any) -> Any:
    """Return a tiny model with a random adapter on each linear layer, in evaluation mode."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(base or tiny_model(), peft.LoraConfig(**given))  # type: ignore[arg-type]
        if name is not None:
            model.add_adapter(name, peft.LoraConfig(**{**given, "r": 3}))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def gap(model: Any, fused: int) -> float:
    """Return how far logits under the fused layers are from the ordinary ones, of which so many must be fused."""
    ordinary = model(IDS).logits
    before = bits(model)
    with fast_adapters(model) as count:
        assert count == fused
        # The second pass shares products between layers that the first one found to read the same input.
        found = [model(IDS).logits for _ in range(2)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(IDS).logits, ordinary)
    return max(float((each - ordinary).abs().max()) for each in found)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}, {"lora_dropout": 0.3}],
    ids=["plain", "rslora", "some layers", "dropout"],
)
def test_logits_are_those_of_the_ordinary_forward_pass(options: dict[str, Any]) -> None:
    assert gap(adapted(**options), 4 if "target_modules" in options else LAYERS) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "v_proj"]}], ids=["every layer", "some layers"])
def test_adapters_packed_with_their_weights(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype, limit: float
) -> None:
    monkeypatch.setattr(fast_linears, "MARGINS", dict.fromkeys(fast_linears.MARGINS, float("inf")))
    fast_linears._way.cache_clear()
    model = adapted(name="second", **options)
    model.base_model.set_adapter(["default", "second"])
    fast = fast_linears.FastLinears(model)

    def difference() -> float:
        # A context each time: autocast keeps its copies of weights as long as one lasts.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            expected = model(IDS).logits.float()
            with fast_adapters(model), fast.running(pack=True):
                found = [model(IDS).logits.float() for _ in range(3)]
        return max(float((each - expected).norm() / expected.norm()) for each in found)

    before = bits(model)
    assert difference() < limit
    layers = dict(fast._products)
    assert layers and difference() < limit
    assert fast._products == layers and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(-3)
    assert difference() < limit
    model.base_model.set_adapter("second")
    assert difference() < limit
    with model.disable_adapter():
        assert difference() < limit
    assert not any("forward" in module.__dict__ for module in model.modules())
    fast_linears._way.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("pack", [False, True])
def test_adapters_switched_by_somebody_else_meanwhile(monkeypatch: pytest.MonkeyPatch, pack: bool) -> None:
    monkeypatch.setattr(fast_linears, "MARGINS", dict.fromkeys(fast_linears.MARGINS, float("inf")))
    fast_linears._way.cache_clear()
    model = adapted(name="second")
    ordinary = model(IDS).logits
    with model.disable_adapter():
        without = model(IDS).logits
    with fast_adapters(model), fast_linears.FastLinears(model).running(pack=pack):
        for _ in range(3):
            assert (model(IDS).logits - ordinary).abs().max() < 1e-5
        with model.disable_adapter():
            assert (model(IDS).logits - without).abs().max() < 1e-5
        model.base_model.set_adapter("second")
        second = model(IDS).logits
    assert (model(IDS).logits - second).abs().max() < 1e-5
    assert (second - ordinary).abs().max() > 1e-2
    fast_linears._way.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("pack", [False, True])
def test_another_thread_runs_the_layers_as_ever(monkeypatch: pytest.MonkeyPatch, pack: bool) -> None:
    monkeypatch.setattr(fast_linears, "MARGINS", dict.fromkeys(fast_linears.MARGINS, float("inf")))
    fast_linears._way.cache_clear()
    model = adapted()
    ordinary, ran = model(IDS).logits, list[bool]()
    with fast_adapters(model), fast_linears.FastLinears(model).running(pack=pack):
        for _ in range(3):
            model(IDS)
        calls: list[Any] = []
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        layer.lora_A["default"].register_forward_hook(lambda *given: calls.append(given))

        def other() -> None:
            with torch.no_grad():
                ran.append(bool((model(IDS).logits - ordinary).abs().max() < 1e-5))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert ran == [True] and len(calls) == 1
    fast_linears._way.cache_clear()


@torch.no_grad()
def test_hooks_of_the_layers_below_adapters_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_linears, "MARGINS", dict.fromkeys(fast_linears.MARGINS, float("inf")))
    fast_linears._way.cache_clear()
    model = adapted()
    bases = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    bases[1].register_forward_hook(lambda module, arguments, output: output * 2)
    bases[4].register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    expected = model(IDS).logits
    with fast_adapters(model), fast_linears.FastLinears(model).running(pack=True):
        for _ in range(3):
            assert (model(IDS).logits - expected).abs().max() < 1e-5
    fast_linears._way.cache_clear()


def test_several_active_adapters_add_up() -> None:
    model = adapted(name="second")
    model.base_model.set_adapter(["default", "second"])
    assert gap(model, LAYERS) < 1e-5


def test_the_adapter_that_is_active_counts() -> None:
    model = adapted(name="second")
    first = gap(model, LAYERS)
    with torch.no_grad():
        before = model(IDS).logits
        model.set_adapter("second")
        assert (model(IDS).logits - before).abs().max() > 1e-2
    assert max(first, gap(model, LAYERS)) < 1e-5


@pytest.mark.parametrize(
    "first, second",
    [
        (["q_proj", "k_proj", "v_proj"], ["k_proj", "v_proj"]),
        (["q_proj", "v_proj"], "all-linear"),
        ("all-linear", ["gate_proj", "up_proj"]),
    ],
)
def test_adapters_on_different_layers_take_turns(first: Any, second: Any) -> None:
    """Layers share a product while all of them have an adapter: those that lose theirs leave, and come back."""
    model = adapted(target_modules=first)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.add_adapter("second", peft.LoraConfig(r=8, lora_alpha=6, target_modules=second))
        for key, parameter in model.named_parameters():
            if "lora_B.second" in key:
                nn.init.normal_(parameter, std=0.1)
    model.eval()
    for name in ("default", "second", "default", "second"):
        model.set_adapter(name)
        ordinary = model(IDS).logits.detach()
        with torch.no_grad(), fast_adapters(model) as count:
            assert count
            for _ in range(2):
                assert (model(IDS).logits - ordinary).abs().max() < 1e-5


def test_weights_changed_between_two_contexts_count() -> None:
    model = adapted()
    assert gap(model, LAYERS) < 1e-5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-2)
    assert gap(model, LAYERS) < 1e-5


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_adapters_that_do_more_run_as_always(options: dict[str, Any]) -> None:
    assert gap(adapted(**options), 0) == 0


def test_modules_trained_whole_are_left_alone() -> None:
    assert gap(adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), 2) < 1e-5


def test_a_merged_adapter_and_one_that_is_off_are_left_alone() -> None:
    model = adapted()
    with model.disable_adapter():
        assert gap(model, 0) == 0
    model.merge_adapter()
    assert gap(model, 0) == 0


def test_a_layer_with_a_hook_inside_its_adapter_is_left_alone() -> None:
    model, seen = adapted(), []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert gap(model, LAYERS - 1) < 1e-5
    assert len(seen) == 4


def test_hooks_on_a_fused_layer_still_run() -> None:
    model, seen = adapted(), []
    model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    gap(model, LAYERS)
    assert len(seen) == 4


def test_dropout_in_training_draws_as_always() -> None:
    model = adapted(lora_dropout=0.5).train()
    with fast_adapters(model) as count:
        assert count == 0


def test_gradients_flow_as_always_inside_and_after() -> None:
    model = adapted()
    model(IDS).logits.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for inside in (True, False):
        model.zero_grad()
        with fast_adapters(model):
            with torch.no_grad():
                model(IDS)
            if inside:
                model(IDS).logits.square().mean().backward()
        if not inside:
            model(IDS).logits.square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys() and found
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = adapted()
    before = bits(model)
    with pytest.raises(RuntimeError, match="stop"), fast_adapters(model):
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_input_changed_in_place_between_two_layers_is_read_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            found = self.first(x)
            x.add_(1)
            return found + self.second(x)

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model: Any = peft.get_peft_model(Twice(), config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = model(torch.ones(3, 6))
        with fast_adapters(model):
            for _ in range(3):
                torch.testing.assert_close(model(torch.ones(3, 6)), wanted, rtol=1e-5, atol=1e-6)


def test_a_quantised_base_keeps_its_bits_and_computes_the_same() -> None:
    model = adapted(quantised(tiny_model()))
    assert gap(model, LAYERS) < 1e-5
    kept = [module.weight for module in model.modules() if isinstance(module, EightBits)]
    assert len(kept) == LAYERS and all(weight.dtype == torch.int8 for weight in kept)


@pytest.fixture(params=[False, True], ids=["bf16 base", "autocast"])
def narrow(request: pytest.FixtureRequest) -> Iterator[Any]:
    model = adapted(tiny_model() if request.param else tiny_model().bfloat16())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=request.param):
        yield model


@torch.no_grad()
def test_in_16_bits_they_are_as_near_to_float32(narrow: Any) -> None:
    with torch.autocast("cpu", enabled=False):
        exact = copy.deepcopy(narrow).float()(IDS).logits
    ordinary = narrow(IDS).logits.float()
    with fast_adapters(narrow):
        fused = narrow(IDS).logits.float()
    assert (fused - exact).abs().mean() < 1.2 * (ordinary - exact).abs().mean()


def test_a_copy_of_a_model_that_was_fused_is_a_model_of_its_own() -> None:
    model = adapted()
    gap(model, LAYERS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert gap(model, LAYERS) < 1e-5 and gap(other, LAYERS) < 1e-4


def test_layers_that_read_one_input_share_a_product() -> None:
    model, products = adapted(), []
    real = torch.mm

    def counted(*arguments: Any) -> Tensor:
        products.append(1)
        return real(*arguments)

    with torch.no_grad(), fast_adapters(model), pytest.MonkeyPatch.context() as patch:
        model(IDS)
        patch.setattr(torch, "mm", counted)
        model(IDS)
    assert len(products) == 2 * 4  # per block: q, k and v; o; gate and up; down
