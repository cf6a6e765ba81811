"""Float32 products through oneDNN: PyTorch's values and gradients to a millionth, wherever a model's layers may be used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra import measured_choices
from rlhf_core.models import PolicyModel
from rlhf_core.models import cpu_products as module
from rlhf_core.models.cpu_products import add_product, multiply, multiply_into, speed_up_linears
from rlhf_core.models.fast_linears import FastLinears
from rlhf_core.models.logprobs import linear_token_logprobs
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

LIMIT = 1e-6


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Use oneDNN for products of any size, as if it were faster; return a list that grows with each."""
    found: list[int] = []
    ordinary = module.onednn_linear

    def counted(*given: Any) -> Tensor:
        found.append(1)
        return ordinary(*given)

    monkeypatch.setattr(module, "LEAST_WORK", 1)
    monkeypatch.setattr(module, "MARGIN", float("inf"))
    module.is_faster.cache_clear()
    if not module.is_faster(torch.get_num_threads()):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(module, "onednn_linear", counted)
    yield found
    module.is_faster.cache_clear()


def layer_of(kind: str, *, bias: bool = True) -> Any:
    torch.manual_seed(0)
    layer: Any = Conv1D(40, 24) if kind == "Conv1D" else nn.Linear(24, 40, bias=bias)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def fast(layer: Any) -> Any:
    made = copy.deepcopy(layer)
    assert speed_up_linears(made) > 0
    return made


def gradients(layer: Any, x: Tensor) -> list[Tensor]:
    """Return a layer's output and all gradients of a function of it."""
    given = x.detach().requires_grad_(x.requires_grad)
    found = layer(given)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    (found * direction).sum().backward()
    grads = [given.grad, *(parameter.grad for parameter in layer.parameters())]
    return [found.detach(), *(grad for grad in grads if grad is not None)]


INPUTS: dict[str, Callable[[], Tensor]] = {
    "three axes": lambda: torch.randn(2, 5, 24),
    "two axes": lambda: torch.randn(7, 24),
    "one row": lambda: torch.randn(1, 24),
    "one axis": lambda: torch.randn(24),
    "every second": lambda: torch.randn(6, 48)[:, ::2],
    "transposed": lambda: torch.randn(24, 9).t(),
    "expanded": lambda: torch.randn(24).expand(3, 4, 24),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("kind", "bias"), [("Linear", True), ("Linear", False), ("Conv1D", True)])
def test_values_and_gradients_are_the_layers_own(kind: str, bias: bool, name: str, calls: list[int]) -> None:
    layer = layer_of(kind, bias=bias)
    x = INPUTS[name]().requires_grad_()
    exact = gradients(copy.deepcopy(layer).double(), x.double())
    found = gradients(fast(layer), x)
    assert len(calls) == 3  # the output and two gradients
    assert len(found) == len(exact) == (4 if bias else 3)
    for mine, own in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == own.shape
        assert relative(mine.double(), own) < LIMIT
    assert all(torch.equal(one, two) for one, two in zip(found, gradients(fast(layer), x), strict=True))


@pytest.mark.parametrize(("input_learns", "weight_learns"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_costs_no_product(input_learns: bool, weight_learns: bool, calls: list[int]) -> None:
    plain = layer_of("Linear")
    plain.weight.requires_grad_(weight_learns)
    layer, x = fast(plain), torch.randn(7, 24, requires_grad=input_learns)
    found, own = gradients(layer, x), gradients(plain, x)
    assert len(calls) == 1 + input_learns + weight_learns and len(found) == len(own)
    assert all(relative(one, two) < LIMIT for one, two in zip(found, own, strict=True))
    with torch.no_grad():
        assert relative(layer(x), plain(x)) < LIMIT
        assert layer(x[:0]).shape == (0, 40)


def test_second_derivatives_are_those_of_pytorch() -> None:
    x = torch.randn(7, 24, requires_grad=True)
    results = []
    for layer in (layer_of("Linear"), fast(layer_of("Linear")), layer_of("Conv1D"), fast(layer_of("Conv1D"))):
        (first,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, layer.weight]))
    for plain, ours in (results[:2], results[2:]):
        assert all(relative(mine, own) < 1e-5 for mine, own in zip(ours, plain, strict=True))


@pytest.mark.filterwarnings("ignore:TF32")
def test_other_dtypes_autocast_transforms_and_compiled_code_run_as_ever(calls: list[int]) -> None:
    plain = layer_of("Linear")
    layer, x = fast(plain), torch.randn(7, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(fast(plain.double())(x.double()), plain(x.double()))
    plain.float()
    weights = dict(layer.named_parameters())

    def total(parameters: Any, given: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, parameters, (given,)).square().sum()
        return found

    slopes = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(weights, x)
    assert slopes["weight"].shape == (7, 40, 24)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert relative(compiled(x), plain(x)) < LIMIT
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(layer(x), plain(x))
    assert not calls
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(7, 23))


def test_small_products_run_as_ever(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(module, "LEAST_WORK", 7 * 24 * 40)
    layer = fast(layer_of("Linear"))
    layer(torch.randn(6, 24))
    assert not calls
    layer(torch.randn(7, 24))
    assert calls


@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 3, 24)])
def test_outputs_and_weights_may_change_in_place_as_ever(shape: tuple[int, ...]) -> None:
    layer, x = fast(layer_of("Linear")), torch.randn(shape, requires_grad=True)
    (layer(x).mul_(2)).sum().backward()
    assert relative(x.grad, 2 * layer.weight.detach().sum(0).expand(shape)) < LIMIT
    found = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_hooks_and_checkpointing_see_a_plain_layer(calls: list[int]) -> None:
    x, results = torch.randn(7, 24), []
    for layer in (layer_of("Linear"), fast(layer_of("Linear"))):
        seen: list[Any] = []
        layer.register_forward_hook(lambda *given, seen=seen: seen.append(given[2].shape))
        layer.register_full_backward_hook(lambda *given, seen=seen: seen.append(given[2][0].shape))
        given = x.clone().requires_grad_()
        checkpoint(layer, given, use_reentrant=False).square().sum().backward()
        results.append((seen, given.grad, layer.weight.grad))
    assert len(calls) == 4  # the output twice
    (own_seen, *own), (seen, *found) = results
    assert seen == own_seen and len(seen) >= 2
    assert all(relative(mine, plain) < LIMIT for mine, plain in zip(found, own, strict=True))


# Whole models


def policy(*, speed: bool, **options: Any) -> PolicyModel:
    made = PolicyModel(tiny_model(), tiny_tokenizer()).set_options(**options)
    if not speed:
        for layer in made.modules():
            if module.has_fast_products(layer):
                del layer.forward
    return made


def randomise_adapter(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"lora": LoraConfig(rank=4)}, {"layout": "padded"}, {"precision": "bf16"}],
    ids=str,
)
def test_a_policys_gradients_are_those_without(options: dict[str, Any], calls: list[int]) -> None:
    batch, found, products = random_batch(2, 2), [], []
    for speed in (False, True):
        model = policy(speed=speed, **options).train()
        randomise_adapter(model)
        with torch.no_grad():
            model.token_logps(batch)  # with the comparisons that a first batch brings
        calls.clear()
        logps = model.token_logps(batch)
        logps.square().sum().backward()
        products.append(len(calls))
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        found.append((logps.detach(), grads))
    # Under autocast layers run as ever.
    assert products == [0, 0] if options.get("precision") == "bf16" else products[1] > products[0] > 0
    (logps, grads), (fast_logps, fast_grads) = found
    assert relative(fast_logps, logps) < LIMIT and grads.keys() == fast_grads.keys() and grads
    for name, own in grads.items():
        assert relative(fast_grads[name], own) < 1e-5, name


def test_copies_pickles_and_files_are_a_plain_models(tmp_path: Path, calls: list[int]) -> None:
    model, batch = policy(speed=True), random_batch(2, 2)
    before = model.token_logps(batch).detach()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.1)
    assert torch.equal(reference.token_logps(batch), before)
    assert not torch.equal(model.token_logps(batch), before)
    again = pickle.loads(pickle.dumps(reference.network))
    ids = torch.arange(20)[None]
    assert relative(again(ids).logits, reference.network(ids).logits) < LIMIT
    layers = sum(type(layer) is nn.Linear for layer in again.modules())
    assert speed_up_linears(again) == speed_up_linears(reference.network) == layers
    reference.save_pretrained(tmp_path / "ours")
    policy(speed=False).save_pretrained(tmp_path / "plain")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    assert saved == {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()}


def test_generation_runs_its_own_layers_on_top_and_leaves_these(calls: list[int]) -> None:
    layers = nn.Sequential(fast(layer_of("Linear")), nn.Linear(40, 24))
    x = torch.randn(7, 24)
    with FastLinears(layers).running(pack=False):
        assert relative(layers(x).detach(), layers[1](layer_of("Linear")(x)).detach()) < 1e-5
        assert not module.has_fast_products(layers[0])
    assert module.has_fast_products(layers[0]) and "forward" not in vars(layers[1])


# Products with the vocabulary


@pytest.mark.parametrize("block", [1, 2**20])
def test_products_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    whole, b = torch.randn(9, 64), torch.randn(31, 17)
    for a in (torch.randn(9, 31), whole[:, ::2][:, :31], torch.randn(31, 9).t(), whole[:, 3:34]):
        for other in (b, b.t().contiguous().t(), torch.randn(31, 40)[:, 5:22]):
            exact = a.double() @ other.double()
            assert relative(multiply(a, other).double(), exact) < LIMIT
            assert relative(multiply_into(torch.empty(9, 17), a, other).double(), exact) < LIMIT
            assert relative(add_product(torch.ones(9, 17), a, other).double(), exact + 1) < LIMIT
    assert calls


@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("weight_learns", [False, True])
def test_logprobs_of_a_large_vocabulary(
    kept: int, weight_learns: bool, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    from rlhf_core.models import logprobs

    monkeypatch.setattr(logprobs, "CPU_CHUNK_BYTES", 4 * 500 * 8)
    monkeypatch.setattr(logprobs, "KEPT_CHUNKS", kept)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 100 * 8)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(21, 16), torch.randn(500, 16), torch.randint(0, 500, (21,))
    results = []
    for dtype in (torch.float64, torch.float32):
        h = hidden.to(dtype).requires_grad_()
        w = weight.to(dtype).requires_grad_(weight_learns)
        logps = (
            (h @ w.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            if dtype == torch.float64
            else linear_token_logprobs(h, w, targets)
        )
        logps.square().sum().backward()
        results.append([logps.detach().double(), h.grad.double(), *([w.grad.double()] if weight_learns else [])])
    assert calls
    assert all(relative(mine, own) < LIMIT for own, mine in zip(*results, strict=True))


@pytest.mark.parametrize("taken", ["oneDNN", "PyTorch"])
def test_a_recorded_choice_is_followed_and_not_measured(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    record = {module.CHOICE: {"taken": taken, "share_of_time": 0.5, "threads": threads}}
    monkeypatch.setattr(measured_choices, "_recorded", {})
    monkeypatch.setattr(measured_choices, "_made", {})
    monkeypatch.setattr(module, "least_seconds", lambda *works, **options: pytest.fail("it was measured"))
    measured_choices.take_recorded(record)
    module.is_faster.cache_clear()
    assert module.is_faster(threads) == (taken == "oneDNN")
    assert measured_choices.measured_choices() == record


def test_a_choice_under_other_circumstances_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_choices, "_recorded", {})
    measured_choices.take_recorded({module.CHOICE: {"taken": "PyTorch", "threads": torch.get_num_threads() + 1}})
    module.is_faster.cache_clear()
    assert module.is_faster(torch.get_num_threads())  # as `MARGIN` is infinite here
