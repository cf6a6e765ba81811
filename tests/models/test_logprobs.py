"""Token log-probabilities from the output layer: values and gradients against float64, for any chunk size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import relative
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.models import logprobs as module
from rlhf_core.models.logprobs import exact_log_softmax, linear_token_logprobs, module_token_logprobs
from rlhf_core.models.output_layer import OutputLayer


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    logits = hidden.double() @ weight.double().t() * scale
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, scale: float, frozen: bool) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary, device: chunk)
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=not frozen)
    targets, upstream = torch.randint(0, 11, (7,)), torch.randn(7)
    found = linear_token_logprobs(hidden, weight, targets, scale=scale)
    expected = reference(hidden, weight, targets, scale)
    assert relative(found.double(), expected) < 1e-6
    wanted = [hidden] if frozen else [hidden, weight]
    ours = torch.autograd.grad((found * upstream).sum(), wanted)
    theirs = torch.autograd.grad((expected * upstream).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a.double(), b.double()) < 1e-6


def test_a_uniform_distribution_gives_minus_log_v() -> None:
    found = linear_token_logprobs(torch.ones(1, 4), torch.zeros(8, 4), torch.tensor([3]))
    assert found.item() == pytest.approx(-math.log(8), rel=1e-6)


def test_no_gradient_no_work() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(8, 4)
    assert not linear_token_logprobs(hidden, weight, torch.tensor([0, 1, 2])).requires_grad


def test_nothing_to_score() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    assert linear_token_logprobs(hidden, torch.randn(8, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_any_output_layer(cap: float | None) -> None:
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(5, 11), torch.randn(7, 5, requires_grad=True), torch.randint(0, 11, (7,))
    layer = OutputLayer(slope=1.5, cap=cap)
    found = module_token_logprobs(lambda states: layer.apply(head(states)), hidden, targets, scale=0.5)
    logits = 1.5 * (hidden.double() @ head.weight.double().t() + head.bias.double())
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    expected = (logits * 0.5).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert relative(found.double(), expected) < 1e-6
    ours, theirs = (torch.autograd.grad(x.sum(), [hidden, head.weight, head.bias]) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a.double(), b.double()) < 1e-5


def test_probabilities_of_a_large_vocabulary_add_up_to_one() -> None:
    """Logits as a model's, of 150,000 tokens, whose sum in float32 one after another is off by 1e-5 of it."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(8, 150_000)).requires_grad_()
    upstream, exact = torch.randn(logits.shape), logits.double().log_softmax(-1)
    found = exact_log_softmax(logits)
    assert found.dtype == torch.float32
    errors = (found.detach().double() - exact.detach()).abs()
    assert float(errors.max()) < 4e-6 and float((found - exact).detach().mean().abs()) < 3e-7
    ours, wanted = (torch.autograd.grad((logps * upstream).sum(), logits)[0] for logps in (found, exact))
    assert relative(ours, wanted) < 1e-6
    targets = torch.arange(8)
    of_module = module_token_logprobs(lambda states: states, logits, targets)
    assert float((of_module.double() - exact[range(8), targets]).detach().mean().abs()) < 1e-6
    with torch.no_grad():
        assert torch.equal(exact_log_softmax(logits), found)


def test_a_masked_token_has_no_probability_and_no_gradient() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0], requires_grad=True)
    found = exact_log_softmax(logits)
    assert found[1] == -torch.inf and float(found.exp().sum()) == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(found[0] + found[2], logits)
    assert bool(gradient.isfinite().all()) and gradient[1] == 0


def test_the_weights_gradient_is_summed_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks must not lose more than one does."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 16), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (512,))

    def gradient(rows: int) -> Tensor:
        monkeypatch.setattr(module, "chunk_rows", lambda vocabulary, device: rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.autograd.grad(linear_token_logprobs(hidden, weight, targets).sum(), weight)[0]

    exact = torch.autograd.grad(reference(hidden, weight, targets, 1.0).sum(), weight)[0]
    one, many = relative(gradient(1000), exact), relative(gradient(8), exact)
    assert gradient(8).dtype == torch.float32
    assert many < 1.2 * one


def test_autocast_keeps_the_softmax_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 32), torch.randn(500, 32), torch.randint(0, 500, (64,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_token_logprobs(hidden, weight, targets)
    assert found.dtype == torch.float32
    assert relative(found.double(), reference(hidden, weight, targets, 1.0)) < 1e-2
    # exp of the log-probabilities of all tokens sums to one: no bf16 rounding of the normaliser.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        every = linear_token_logprobs(hidden[:1].expand(500, -1), weight, torch.arange(500))
    assert every.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [1, 100])
def test_a_sure_token_keeps_its_small_gradient_in_bf16(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, rows: int
) -> None:
    """Softmax at the target is 0.998: rounded to bf16 before the one is taken off it would be 1, and the gradient wrong."""
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary, device: rows)
    torch.manual_seed(0)
    weight = torch.randn(20, 16).bfloat16().float().requires_grad_(not frozen)
    targets = torch.arange(12)
    hidden = (0.5 * weight.detach()[targets]).bfloat16().float().requires_grad_()
    expected = reference(hidden, weight, targets, 1.0)
    assert expected.exp().max() > 0.99
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_token_logprobs(hidden, weight, targets)
    wanted = [hidden] if frozen else [hidden, weight]
    ours, theirs = (torch.autograd.grad(x.sum(), wanted) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        sure = expected.exp() > 0.99
        if a is ours[0]:
            a, b = a[sure], b[sure]
        assert relative(a.double(), b.double()) < 2e-2


class Divisions(TorchDispatchMode):
    """Counts divisions of a whole chunk of logits, which only a gradient needs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.div_.Tensor
        return func(*args, **(kwargs or {}))


def test_without_gradients_no_work_is_done_for_them() -> None:
    """A trained weight requires gradients; scoring under `no_grad` must not pay for them."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    with torch.no_grad(), Divisions() as without:
        found = linear_token_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    with Divisions() as with_gradients:
        again = linear_token_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    assert torch.equal(found, again.detach())
    assert (without.count, with_gradients.count) == (0, 1)
