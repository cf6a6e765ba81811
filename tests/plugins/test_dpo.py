"""DPO's losses: golden numbers, limits, gradients, float64, and TRL's own code on the same log-probabilities."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from batches import random_batch, relative
from rlhf_plugins.trainers import dpo
from torch import Tensor

from rlhf_core.errors import ConfigError
from rlhf_core.models import PolicyModel, Reference
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

LOSS_NAMES = sorted(dpo.LOSSES)


def logps(seed: int = 0, pairs: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-30 * torch.rand(pairs, generator=generator) for _ in range(4)]


def loss64(kind: str, values: list[Tensor], beta: float, smoothing: float) -> Tensor:
    """The papers' formulae, written anew with exp and log in float64."""
    chosen, rejected, ref_chosen, ref_rejected = (v.double() for v in values)
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    if kind == "sigmoid":
        prefer = 1 / (1 + torch.exp(-beta * margin))
        return -(1 - smoothing) * torch.log(prefer) - smoothing * torch.log(1 - prefer)
    if kind == "hinge":
        return torch.maximum(torch.zeros_like(margin), 1 - beta * margin)
    return (margin - 1 / (2 * beta)).pow(2)


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.2), *((kind, 0.0) for kind in LOSS_NAMES)])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_losses_and_gradients_equal_float64(kind: str, beta: float, smoothing: float) -> None:
    values = [v.requires_grad_() for v in logps()]
    found = dpo.LOSSES[kind](dpo.preference_logits(*values), beta, smoothing)
    expected = loss64(kind, values, beta, smoothing)
    assert relative(found.double(), expected) < 1e-6
    ours = torch.autograd.grad(found.sum(), values[:2])
    theirs = torch.autograd.grad(expected.sum(), values[:2])
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a.double(), b.double()) < 1e-6


@pytest.mark.parametrize("kind", LOSS_NAMES)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_equal_trl(kind: str, beta: float) -> None:
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL isn't installed (extra `oracles`)").DPOTrainer
    values = [v.requires_grad_() for v in logps(1)]
    chosen, rejected, ref_chosen, ref_rejected = values
    # One token a response: TRL averages IPO's margin over a response's tokens, the paper sums it.
    pairs = len(chosen)
    per_token = torch.cat([chosen, rejected])[:, None]
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.zeros_like(per_token, dtype=torch.bool),
    )

    class Model(torch.nn.Module):
        def forward(self, **_: object) -> SimpleNamespace:
            return outputs

    stub = SimpleNamespace(
        model=Model(), beta=beta, loss_types=[kind], loss_weights=[1.0], label_smoothing=0.0, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, aux_loss_enabled=False,
        _tp_size=1, _total_train_tokens=0, _metrics={m: _Lists() for m in ("train", "eval")},
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2 * pairs, 2, dtype=torch.long),
        "attention_mask": torch.ones(2 * pairs, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]]).expand(2 * pairs, 2),
        "ref_chosen_logps": ref_chosen.detach(),
        "ref_rejected_logps": ref_rejected.detach(),
    }
    theirs = trainer._compute_loss(stub, stub.model, inputs, False)
    ours = dpo.LOSSES[kind](dpo.preference_logits(*values), beta, 0.0).mean()
    if kind == "ipo":
        # TRL counts the completion mask before the shift, here one token as well: nothing to rescale.
        assert int(inputs["completion_mask"].sum(1)[0]) == 1
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    a, b = (torch.autograd.grad(x, values[:2]) for x in (ours, theirs))
    for mine, other in zip(a, b, strict=True):
        assert relative(mine, other) < 1e-6


class _Lists(dict):  # type: ignore[type-arg]
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


def test_golden_numbers() -> None:
    zero = torch.zeros(1)
    assert dpo.sigmoid_loss(zero, 0.1).item() == pytest.approx(math.log(2), rel=1e-6)
    assert dpo.sigmoid_loss(zero, 0.1, 0.3).item() == pytest.approx(math.log(2), rel=1e-6)
    assert dpo.hinge_loss(zero, 0.1).item() == 1.0
    assert dpo.ipo_loss(zero, 0.1).item() == pytest.approx(25.0)
    # β h = 2: −log σ(2) = log(1 + e⁻²)
    assert dpo.sigmoid_loss(torch.tensor([20.0]), 0.1).item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)
    assert dpo.hinge_loss(torch.tensor([20.0]), 0.1).item() == 0.0
    assert dpo.ipo_loss(torch.tensor([5.0]), 0.1).item() == 0.0
    # (−1 − −2) − (−4 − −3) = 2
    assert dpo.preference_logits(*(torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0))).item() == 2.0


def test_limits() -> None:
    margins = torch.linspace(-40, 40, 9)
    assert torch.allclose(dpo.sigmoid_loss(margins, 1e-6), torch.full((9,), math.log(2)), atol=1e-4)
    # Far on the wrong side sigmoid's slope is that of hinge, and nothing overflows.
    huge = torch.tensor([-1e4], requires_grad=True)
    loss = dpo.sigmoid_loss(huge, 1.0)
    assert loss.item() == pytest.approx(1e4)
    assert torch.autograd.grad(loss, huge)[0].item() == pytest.approx(-1.0)
    # Half the labels flipped would leave nothing to learn at a zero margin.
    almost = torch.zeros(1, requires_grad=True)
    slope = torch.autograd.grad(dpo.sigmoid_loss(almost, 0.1, 0.499999), almost)[0]
    assert abs(slope.item()) < 1e-6


@pytest.mark.parametrize("kind", LOSS_NAMES)
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(kind: str) -> None:
    values = [torch.full((1,), -10.0, requires_grad=True) for _ in range(4)]
    loss = dpo.LOSSES[kind](dpo.preference_logits(*values), 0.1, 0.0)
    chosen, rejected = torch.autograd.grad(loss.sum(), values[:2])
    assert chosen.item() < 0 < rejected.item()


@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_smoothing_that_would_be_ignored_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="label_smoothing has no meaning") as caught:
        dpo.DPOConfig.parse({"loss_type": kind, "label_smoothing": 0.1})
    assert caught.value.exit_code == 2


def trainer(policy: PolicyModel, **options: object) -> dpo.DPOTrainer:
    made = dpo.DPOTrainer(dpo.DPOConfig(**options), model=policy, data=[])  # type: ignore[arg-type]
    made.models = torch.nn.ModuleDict({"policy": policy})
    return made


@pytest.mark.parametrize("mode", ["copy", "precompute"])
def test_the_first_loss_is_log_2_for_any_model_passed_in(mode: str) -> None:
    """The reference is the policy as passed in, changed weights and all: not the one its name would load."""
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made = trainer(policy)
    made.reference = Reference.create(policy, mode)  # type: ignore[arg-type]
    batch = random_batch(3, 2)
    if mode == "precompute":
        made.reference.precompute([batch])
    (window,) = made.experience(iter([batch]))
    loss = made.loss(window)
    weight = made.weights(window)["preference"]
    assert weight == 3
    assert loss.terms["preference"].item() / weight == pytest.approx(math.log(2), rel=1e-6)
    assert loss.metrics["accuracy"][0].tolist() == [0.5] * 3  # type: ignore[union-attr]
    assert abs(float(loss.metrics["kl"][0])) < 1e-4


def test_metrics_by_hand() -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    made = trainer(policy, beta=0.5)
    batch = random_batch(2, 2).attach(per_response={"ref_logps": torch.tensor([-3.0, -1.0, -5.0, -2.0])})
    logps = torch.tensor([-1.0, -2.0, -6.0, -2.5])
    margins = torch.tensor([3.0, -0.5])
    found = made._metrics(batch, logps, margins)
    assert float(found["rewards/chosen"][0]) == pytest.approx(0.5 * (2.0 - 1.0))
    assert float(found["rewards/rejected"][0]) == pytest.approx(0.5 * (-1.0 - 0.5))
    assert found["rewards/margin"][0].tolist() == pytest.approx([0.5 * 3.0, 0.5 * -0.5])  # type: ignore[union-attr]
    assert found["accuracy"][0].tolist() == [1.0, 0.0] and found["accuracy"][1] == 2  # type: ignore[union-attr]
    assert float(found["kl"][0]) == pytest.approx(-(2.0 - 1.0 - 1.0 - 0.5)) and found["kl"][1] == 4
