"""DPO's table of losses: golden numbers, limits, signs, float64 formulae, TRL's own code, and a whole step's ranks."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from batches import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from rlhf_plugins.trainers.dpo import DPOTrainer
from rlhf_plugins.trainers.dpo_losses import LOSSES, LossType, PreferencePairs, aot_partners, aot_unpaired_partners
from torch import Tensor
from trainers_helpers import TrlMetrics, assert_same, gradients

from rlhf_core.testing import TrainerContract, run_context, simulate
from rlhf_core.training.distribution import Distribution

KINDS = list(LOSSES)
SORTED = [kind for kind, row in LOSSES.items() if row.find_partners]
SMOOTHED = [kind for kind, row in LOSSES.items() if "label_smoothing" in row.options]
TOKENS = ([2, 3, 1, 7, 4, 30], [5, 3, 2, 1, 9, 11])
LOG2 = math.log(2)


def logps(seed: int = 0, pairs: int = 6, scale: float = 32.0) -> list[Tensor]:
    """Return chosen, rejected and both references, the first two with gradients; sums of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    values = [-scale * torch.randint(1 << 10, (pairs,), generator=generator) / (1 << 10) for _ in range(4)]
    return [values[0].requires_grad_(), values[1].requires_grad_(), *values[2:]]


def losses(kind: Any, values: list[Tensor], beta: float = 0.1, **options: Any) -> Tensor:
    """Return a row's losses, as the trainer computes them when these pairs are the whole step."""
    row = LOSSES[kind]
    partners = None
    if row.find_partners is not None:
        step = torch.stack([value.detach().double() for value in values], dim=1)
        chosen, rejected = row.find_partners(step).float().unbind(1)
        partners = chosen, rejected
    count = len(values[0])
    tokens = [torch.tensor((column * count)[:count]) for column in TOKENS]
    return row.loss(PreferencePairs(*values, *tokens, beta=beta, partners=partners, **options))


def losses64(kind: str, values: list[Tensor], beta: float, eps: float = 0.0, tau: float = 0.05) -> Tensor:
    """The papers' formulae, written with exp and log in float64; AOT's with sorts that gradients pass through."""
    w, l, rw, rl = (v.double() for v in values)  # noqa: E741
    a, b = w - rw, l - rl
    h = a - b

    def s(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    def smooth(x: Tensor) -> Tensor:
        return -(1 - eps) * torch.log(s(x)) - eps * torch.log(s(-x))

    nw, nl = (torch.tensor((column * len(w))[: len(w)]) for column in TOKENS)
    m = s(beta * h / tau)
    formulae = {
        "sigmoid": lambda: smooth(beta * h),
        "robust": lambda: (-(1 - eps) * s(beta * h).log() + eps * s(-beta * h).log()) / (1 - 2 * eps),
        "hinge": lambda: torch.maximum(torch.zeros_like(h), 1 - beta * h),
        "ipo": lambda: (h - 0.5 / beta).pow(2),
        "ipo_length": lambda: (a / nw - b / nl - 0.5 / beta).pow(2),
        "apo_zero": lambda: 1 - s(beta * a) + s(beta * b),
        "apo_down": lambda: s(beta * a) + 1 - s(beta * h),
        "sppo_hard": lambda: (a - 0.5 / beta).pow(2) + (b + 0.5 / beta).pow(2),
        "nca": lambda: -s(beta * a).log() - 0.5 * s(-beta * a).log() - 0.5 * s(-beta * b).log(),
        "discopop": lambda: (m - 1) * s(beta * h).log() + m * torch.exp(-beta * h),
        "aot": lambda: smooth(beta * ((w - l).sort().values - (rw - rl).sort().values)),
        "aot_unpaired": lambda: smooth(beta * (a.sort().values - b.sort().values)),
    }
    return formulae[kind]()


def test_the_option_offers_every_row() -> None:
    assert get_args(LossType) == tuple(LOSSES)


def check_float64(kind: str, values: list[Tensor], beta: float, eps: float, tau: float = 0.05) -> None:
    found = losses(kind, values, beta, label_smoothing=eps, tau=tau)
    expected = losses64(kind, values, beta, eps, tau)
    assert found.shape == (len(values[0]),)
    if kind in SORTED:  # in another order
        assert found.sum().item() == pytest.approx(expected.sum().item(), rel=1e-6)
    else:
        assert relative(found.double(), expected) < 1e-6
    ours, theirs = gradients(found, values[:2]), gradients(expected, values[:2])
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


@pytest.mark.parametrize(("kind", "eps"), [*((k, 0.0) for k in KINDS), *((k, 0.2) for k in SMOOTHED)])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_losses_and_gradients_equal_float64(kind: str, eps: float, beta: float) -> None:
    check_float64(kind, logps(), beta, eps)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_discopop_equals_float64_at_other_temperatures(tau: float) -> None:
    check_float64("discopop", logps(), 0.1, 0.0, tau)


TRL_NAMES = {"ipo_length": "ipo", "nca": "nca_pair"}
"""Our names → TRL's, where they differ. TRL's `ipo` is normalised by length."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_equal_trl(kind: str, beta: float) -> None:
    smoothing = 0.2 if kind in SMOOTHED and kind != "sigmoid" else 0.0
    values = logps(1)
    # TRL's in float64: some of its forms, such as 1 − σ(x), lose digits in float32.
    theirs = trl_loss(TRL_NAMES.get(kind, kind), [value.double() for value in values], beta, smoothing)
    found = losses(kind, values, beta, label_smoothing=smoothing).mean()
    assert_same(found, theirs, values[:2])


def test_ipo_equals_trl_where_responses_have_one_token() -> None:
    values = logps(1)
    ours = losses("ipo", values).mean()
    assert ours.item() == pytest.approx(trl_loss("ipo", values, 0.1, 0.0, one_token=True).item(), rel=1e-6)


def trl_loss(kind: str, values: list[Tensor], beta: float, smoothing: float, one_token: bool = False) -> Tensor:
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL isn't installed (extra `oracles`)").DPOTrainer
    chosen, rejected, ref_chosen, ref_rejected = values
    lengths = torch.tensor(TOKENS[0] + TOKENS[1]) if not one_token else torch.ones(2 * len(chosen), dtype=torch.long)
    completion = (torch.arange(32) >= 1) & (torch.arange(32) < 1 + lengths[:, None])  # after one prompt token
    # All of a response's log-probability on its first token: losses see the sum and the count.
    per_token = torch.nn.functional.pad(torch.cat([chosen, rejected])[:, None], (0, 30))
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
        model=Model(), beta=beta, loss_types=[kind], loss_weights=[1.0], label_smoothing=smoothing, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, aux_loss_enabled=False,
        args=SimpleNamespace(discopop_tau=0.05), _tp_size=1, _total_train_tokens=0,
        _metrics={mode: TrlMetrics() for mode in ("train", "eval")},
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(len(lengths), 32, dtype=torch.long),
        "attention_mask": torch.ones(len(lengths), 32, dtype=torch.long),
        "completion_mask": completion.long(),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trainer._compute_loss(stub, stub.model, inputs, False)


def one(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float) -> list[Tensor]:
    return [torch.tensor([value]) for value in (chosen, rejected, ref_chosen, ref_rejected)]


# ρ_w = 10, ρ_l = −10, β = 0.1: βρ = ±1, βh = 2; two and five tokens.
GOLDEN = {
    "sigmoid": math.log1p(math.exp(-2)),
    "robust": math.log1p(math.exp(-2)),
    "hinge": 0.0,
    "ipo": 15.0**2,
    "ipo_length": (5 + 2 - 5) ** 2,
    "apo_zero": 2 / (1 + math.e),
    "apo_down": 1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(2)),
    "sppo_hard": 50.0,
    "nca": 1.5 * math.log1p(math.exp(-1)) + 0.5 * math.log1p(math.e),
    "discopop": math.exp(-2),
    "aot": math.log1p(math.exp(-2)),
    "aot_unpaired": math.log1p(math.exp(-2)),
}
# The policy is the reference.
AT_REFERENCE = {
    "sigmoid": LOG2,
    "robust": LOG2,
    "hinge": 1.0,
    "ipo": 25.0,
    "ipo_length": 25.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo_hard": 50.0,
    "nca": 2 * LOG2,
    "discopop": 0.5 * LOG2 + 0.5,
    "aot": LOG2,
    "aot_unpaired": LOG2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_numbers(kind: str) -> None:
    assert losses(kind, one(-20.0, -35.0, -30.0, -25.0)).item() == pytest.approx(GOLDEN[kind], rel=1e-6)
    assert losses(kind, one(-20.0, -35.0, -20.0, -35.0)).item() == pytest.approx(AT_REFERENCE[kind], rel=1e-6)


def test_golden_numbers_of_options() -> None:
    pair = one(-20.0, -35.0, -30.0, -25.0)
    good, bad = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    for kind in ("sigmoid", "aot", "aot_unpaired"):
        assert losses(kind, pair, label_smoothing=0.2).item() == pytest.approx(0.8 * good + 0.2 * bad, rel=1e-6)
    robust = losses("robust", pair, label_smoothing=0.2).item()
    assert robust == pytest.approx((0.8 * good - 0.2 * bad) / 0.6, rel=1e-6)
    share = 1 / (1 + math.exp(-2))
    blended = losses("discopop", pair, tau=1.0).item()
    assert blended == pytest.approx((1 - share) * good + share * math.exp(-2), rel=1e-6)


def test_aot_compares_pairs_of_the_same_rank() -> None:
    zeros = torch.zeros(2)
    # The policy's margins are 3 and 1, the reference's 5 and −1: 3 stands beside 5, and 1 beside −1.
    values = [torch.tensor([3.0, 1.0]), zeros, torch.tensor([5.0, -1.0]), zeros]
    margins = losses("aot", values, 1.0)
    assert margins.tolist() == pytest.approx([math.log1p(math.exp(2)), math.log1p(math.exp(-2))], rel=1e-6)
    values = [torch.tensor([1.0, 3.0]), zeros, torch.tensor([5.0, -1.0]), zeros]
    assert losses("aot", values, 1.0).tolist() == pytest.approx(margins.tolist()[::-1], rel=1e-6)


def test_unpaired_aot_compares_log_ratios_of_the_same_rank() -> None:
    zeros = torch.zeros(2)
    # Chosen log-ratios 4 and 0, rejected ones −1 and 2: 4 stands beside 2, and 0 beside −1.
    values = [torch.tensor([4.0, 0.0]), torch.tensor([-1.0, 2.0]), zeros, zeros]
    far, near = math.log1p(math.exp(-2)), math.log1p(math.exp(-1))
    found = losses("aot_unpaired", values, 1.0)
    # The first pair's chosen belongs to the first comparison, its rejected to the second; a pair takes half of each.
    assert found.tolist() == pytest.approx([(far + near) / 2] * 2, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_limit_of_small_beta(kind: str) -> None:
    """As β falls to 0 logistic losses forget the pairs, and squared ones their margins beside the target."""
    beta = 1e-6
    found = losses(kind, [value.detach() for value in logps()], beta)
    squared = {"ipo": 0.25, "ipo_length": 0.25, "sppo_hard": 0.5}
    if kind in squared:
        assert torch.allclose(found * beta**2, torch.full((6,), squared[kind]), atol=1e-4)
    else:
        assert torch.allclose(found, torch.full((6,), AT_REFERENCE[kind]), atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_nothing_overflows_far_from_the_reference(kind: str, side: float) -> None:
    values = [(value * 300).detach().requires_grad_() for value in one(-10 + 9 * side, -10 - 9 * side, -10.0, -10.0)]
    found = losses(kind, values, 1.0)
    assert bool(found.isfinite().all())
    for slope in torch.autograd.grad(found.sum(), values[:2]):
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("apo_down", "discopop")])
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(kind: str) -> None:
    values = [torch.full((1,), -10.0, requires_grad=True) for _ in range(4)]
    chosen, rejected = torch.autograd.grad(losses(kind, values).sum(), values[:2])
    assert chosen.item() < 0 < rejected.item()


def test_apo_down_lowers_both_and_the_rejected_more() -> None:
    values = [value.requires_grad_() for value in one(-9.0, -12.0, -10.0, -10.0)]
    chosen, rejected = torch.autograd.grad(losses("apo_down", values).sum(), values[:2])
    assert 0 < chosen.item() < rejected.item()


def test_discopop_rises_just_above_the_reference_and_falls_beyond() -> None:
    """Its slope at h = 0 is β [(1 − log 2) / 4τ − 3/4]: with τ = 0.05 the blend rises there; with τ = 1 it falls everywhere."""
    for tau, sign in ((0.05, 1), (1.0, -1)):
        values = [value.requires_grad_() for value in one(-7.0, -7.0, -7.0, -7.0)]
        slope = torch.autograd.grad(losses("discopop", values, tau=tau).sum(), values[0])[0].item()
        assert slope == pytest.approx(0.1 * ((1 - LOG2) / (4 * tau) - 0.75), rel=1e-6) and slope * sign > 0
    for margin in (-10.0, 10.0):
        values = [value.requires_grad_() for value in one(-7.0 + margin, -7.0, -7.0, -7.0)]
        assert torch.autograd.grad(losses("discopop", values).sum(), values[0])[0].item() < 0


def test_identical_responses_cannot_be_told_apart() -> None:
    """What depends on the margin alone pushes two equal responses apart by equal and opposite slopes."""
    for kind in ("sigmoid", "robust", "hinge", "ipo", "discopop", "aot", "aot_unpaired"):
        values = [value.requires_grad_() for value in one(-7.0, -7.0, -5.0, -5.0)]
        found = losses(kind, values)
        assert found.item() == pytest.approx(AT_REFERENCE[kind], rel=1e-6)
        chosen, rejected = torch.autograd.grad(found.sum(), values[:2])
        assert chosen.item() == pytest.approx(-rejected.item(), rel=1e-6)


def test_robust_loss_is_dpo_on_the_right_labels_on_average() -> None:
    w, l, rw, rl = (value.detach() for value in logps())  # noqa: E741
    straight = losses("robust", [w, l, rw, rl], label_smoothing=0.3)
    flipped = losses("robust", [l, w, rl, rw], label_smoothing=0.3)
    assert torch.allclose(0.7 * straight + 0.3 * flipped, losses("sigmoid", [w, l, rw, rl]), rtol=1e-5, atol=1e-6)


def test_half_of_the_labels_wrong_would_leave_nothing_to_learn() -> None:
    values = [value.requires_grad_() for value in one(-7.0, -7.0, -5.0, -5.0)]
    slope = torch.autograd.grad(losses("sigmoid", values, label_smoothing=0.499999).sum(), values[0])[0]
    assert abs(slope.item()) < 1e-6


COARSE = st.integers(-8, 8).map(lambda n: n / 2)  # with ties


@given(step=st.lists(st.tuples(COARSE, COARSE, COARSE, COARSE), min_size=1, max_size=12), data=st.data())
@settings(max_examples=80, deadline=None)
def test_partners_are_those_of_the_whole_step_however_it_is_divided(
    step: list[tuple[float, ...]], data: st.DataObject
) -> None:
    count = len(step)
    shuffled = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1))) if count > 1 else set())
    parts = [list(shuffled[a:b]) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    values = torch.tensor(step, dtype=torch.float64)
    trainer = DPOTrainer(model="unused", data=[])
    for rule in (aot_partners, aot_unpaired_partners):

        def share(process: Distribution, rule: Any = rule) -> torch.Tensor:
            own = parts[process.rank]
            return run_context(trainer, distribution=process).over_step(rule, values[own], rows=own)

        whole = rule(values)
        for part, found in zip(parts, simulate(len(parts), share), strict=True):
            assert torch.equal(found, whole[part])
    paired = aot_partners(values)
    assert Counter(map(tuple, paired.tolist())) == Counter(row[2:] for row in step)
    margins = torch.tensor([row[0] - row[1] for row in step])
    other = paired[:, 0] - paired[:, 1]
    # Greater margins stand beside margins that are no smaller.
    assert bool(((margins[:, None] <= margins) | (other[:, None] >= other)).all())


def test_a_loss_that_sorts_needs_partners() -> None:
    values, tokens = logps(), torch.ones(6)
    with pytest.raises(ValueError, match="this loss needs `partners`"):
        LOSSES["aot"].loss(PreferencePairs(*values, tokens, tokens, beta=0.1))


def contract(**given_options: Any) -> TrainerContract:
    return type("Contract", (TrainerContract,), {"method": "dpo", "options": given_options})()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sigmoid"])
@pytest.mark.parametrize(
    "check",
    [
        "test_padding_changes_nothing",
        pytest.param("test_micro_batches_change_nothing", marks=pytest.mark.slow),
        "test_every_term_has_a_weight",
    ],
)
def test_the_contract_holds_for_every_row(kind: str, check: str) -> None:
    getattr(contract(loss_type=kind, sft_weight=0.5), check)()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sigmoid"])
@pytest.mark.parametrize("check", ["test_loss_falls", "test_order_of_rows_changes_nothing", "test_resume_is_exact"])
def test_runs_hold_for_every_row(kind: str, check: str) -> None:
    getattr(contract(loss_type=kind), check)()
