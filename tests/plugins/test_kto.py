"""KTO: golden numbers, limits, float64 and TRL's own code; its reference point, and data that it refuses."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from batches import random_batch
from rlhf_plugins.trainers.kto import KTOConfig, KTOTrainer, kto_loss, mismatched_pairs, next_other_prompts
from torch import Tensor
from trainers_helpers import TrlMetrics, assert_same, built, move

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.testing import TrainerContract, run_context, simulate
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.tiny import save_tiny

LABELS = torch.tensor([True, False, True, True, False, False])


class TestKTO(TrainerContract):
    method = "kto"


@pytest.mark.slow
class TestKTOWithMovingAverage(TrainerContract):
    method = "kto"
    options: ClassVar[dict[str, Any]] = {"kl": "ema", "desirable_weight": 1.2}


def ratios(seed: int = 0) -> Tensor:
    return 8 * torch.randn(len(LABELS), generator=torch.Generator().manual_seed(seed))


def test_golden_numbers() -> None:
    both, zero = torch.tensor([True, False]), torch.zeros(2)
    assert kto_loss(zero, both, torch.tensor(0.0), 0.1).tolist() == [0.5, 0.5]
    # β (r − z₀) = 0.5 (3 − 1) = 1, and β (z₀ − r) = −1.
    found = kto_loss(torch.tensor([3.0, 3.0]), both, torch.tensor(1.0), 0.5, 2.0, 3.0)
    below = 1 / (1 + math.e)
    assert found.tolist() == pytest.approx([2 * below, 3 * (1 - below)], rel=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("point", [0.0, 2.5])
def test_loss_and_gradient_equal_float64(beta: float, point: float) -> None:
    values = ratios().requires_grad_()
    found = kto_loss(values, LABELS, torch.tensor(point), beta, 1.5, 0.7)
    exact = values.double()
    good = 1.5 * (1 - 1 / (1 + torch.exp(-beta * (exact - point))))
    bad = 0.7 * (1 - 1 / (1 + torch.exp(-beta * (point - exact))))
    expected = torch.where(LABELS, good, bad)
    assert_same(found, expected, [values])


def test_the_gradient_raises_the_good_and_lowers_the_bad() -> None:
    values = ratios().requires_grad_()
    (slope,) = torch.autograd.grad(kto_loss(values, LABELS, torch.tensor(1.0), 0.1).sum(), values)
    assert ((slope < 0) == LABELS).all()


def test_limits() -> None:
    values = ratios()
    weights = torch.where(LABELS, 1.5, 0.7)
    assert torch.allclose(kto_loss(values, LABELS, torch.tensor(3.0), 1e-9, 1.5, 0.7), weights / 2)
    far = kto_loss(torch.tensor([1e4, -1e4]), torch.tensor([True, False]), torch.tensor(0.0), 1.0)
    assert far.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kl", [-3.0, 2.0])
def test_loss_equals_trl(kl: float) -> None:
    peer = pytest.importorskip("trl.trainer.kto_trainer", reason="TRL isn't installed (extra `oracles`)").KTOTrainer
    policy, reference = (ratios(seed).requires_grad_(seed == 1) for seed in (1, 2))
    rows = len(LABELS)

    class Model(torch.nn.Module):
        def forward(self, **_: object) -> SimpleNamespace:
            zeros = torch.zeros(rows, 1)
            return SimpleNamespace(log_probs=policy[:, None], entropy=zeros, mean_logits=zeros)

    stub: Any = SimpleNamespace(
        model=Model(), beta=0.3, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.7, calculate_KL=True,
        precompute_ref_logps=True, aux_loss_enabled=False, _tp_size=1, _total_train_tokens=0,
        _metrics={mode: TrlMetrics() for mode in ("train", "eval")}, _compute_kl_logps=lambda *_: torch.full((rows,), kl),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(rows, 2, dtype=torch.long),
        "attention_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]]).expand(rows, 2),
        "label": LABELS,
        "ref_logps": reference,
        "ref_KL_logps": torch.zeros(rows),
    }
    theirs = peer._compute_loss(stub, stub.model, inputs, False)
    ours = kto_loss(policy - reference, LABELS, torch.tensor(max(kl, 0.0)), 0.3, 1.5, 0.7).mean()
    assert_same(ours, theirs, [policy])


def test_mismatched_pairs_are_the_same_responses_behind_other_prompts() -> None:
    batch = random_batch(4, 1, longest=9)
    prompts = [batch.prompt_ids[p, : batch.prompt_lengths[p]].tolist() for p in (1, 2, 3, 0)]
    other = mismatched_pairs(batch, prompts, max_length=100)
    assert other.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    assert torch.equal(other.response_lengths, batch.response_lengths)
    longest = int(batch.prompt_lengths.max())
    short = mismatched_pairs(batch, prompts, max_length=longest + 2)
    assert (short.prompt_lengths[short.owner] + short.response_lengths <= longest + 2).all()
    assert not (short.loss_mask & (torch.arange(short.loss_mask.shape[1]) >= short.response_lengths[:, None])).any()
    assert mismatched_pairs(batch, [prompts[0], None, None, prompts[1]], 100).rows == (0, 3)
    assert mismatched_pairs(batch, [None] * 4, 100).num_responses == 0


def test_rows_of_one_prompt_are_no_mismatch_and_processes_change_nothing() -> None:
    trainer, batch = made()
    run = run_context(trainer)
    twice = replace(
        batch, prompt_ids=batch.prompt_ids[[0, 0, 2, 3, 4]], prompt_lengths=batch.prompt_lengths[[0, 0, 2, 3, 4]]
    )
    whole = next_other_prompts(twice, run)
    ids = [twice.prompt_ids[p, : twice.prompt_lengths[p]].tolist() for p in range(5)]
    assert whole == [ids[2], ids[2], ids[3], ids[4], ids[0]]
    assert next_other_prompts(batch.select([2]), run) == [None]
    shares = [twice.select([0, 2, 4]), twice.select([1, 3])]
    found = simulate(
        2, lambda process: next_other_prompts(shares[process.rank], run_context(trainer, distribution=process))
    )
    assert found == [[whole[0], whole[2], whole[4]], [whole[1], whole[3]]]


def made(**options: Any) -> tuple[KTOTrainer, Batch]:
    """Return a trainer whose policy has moved from its reference, and a batch of five labelled responses."""
    trainer = built(KTOTrainer, **options)
    move(trainer.policy)
    return trainer, random_batch(5, 1).attach(per_response={"desirable": torch.arange(5) % 2 == 0})


def reference_point(trainer: KTOTrainer, batch: Batch) -> float:
    """Return the reference point z₀ of the window that `experience` makes of a batch."""
    (window,) = trainer.experience(iter([batch]), run_context(trainer))
    (point,) = set(window["kl"].tolist())
    return point


def estimate(trainer: KTOTrainer, batch: Batch) -> float:
    """The mean log-ratio of every response behind the next prompt, one row at a time."""
    total = 0.0
    for response in range(5):
        row = batch.select([response])
        prompt = batch.select([(response + 1) % 5])
        pair = Batch(
            prompt.prompt_ids, prompt.prompt_lengths, row.response_ids, row.response_lengths, row.owner,
            row.loss_mask, rows=(0,),
        )  # fmt: skip
        with torch.no_grad():
            total += float(trainer.policy.response_logps(pair) - trainer.reference.response_logps(pair))
    return total / 5


def test_the_reference_point_by_hand() -> None:
    trainer, batch = made()
    expected = estimate(trainer, batch)
    assert reference_point(trainer, batch) == pytest.approx(max(expected, 0.0), rel=1e-5, abs=1e-6)
    assert reference_point(made(kl="zero")[0], batch) == 0.0


def test_the_moving_average_by_hand_and_over_a_resume() -> None:
    trainer, batch = made(kl="ema", kl_decay=0.5)
    once = estimate(trainer, batch)
    reference_point(trainer, batch)
    assert trainer.state_dict() == {"moving_kl": pytest.approx(once, rel=1e-5, abs=1e-6)}
    trainer.load_state_dict({"moving_kl": 10.0})
    assert reference_point(trainer, batch) == pytest.approx(max(0.5 * 10 + 0.5 * once, 0), rel=1e-5)
    assert trainer.state_dict() == {"moving_kl": pytest.approx(5 + 0.5 * once, rel=1e-5)}


def test_a_step_of_one_row_has_no_reference_point() -> None:
    trainer, batch = made()
    assert reference_point(trainer, batch.select([0])) == 0.0
    with pytest.raises(ConfigError, match="a step of one row has no mismatched pair"):
        KTOConfig.parse({"batch_size": 1})
    assert KTOConfig.parse({"batch_size": 1, "kl": "zero"}).kl == "zero"
    with pytest.raises(ConfigError, match="kl_decay has no effect with kl batch; only ema uses it"):
        KTOConfig.parse({"kl_decay": 0.5})


def test_identical_models_have_no_kl_and_a_loss_of_one_half() -> None:
    trainer = built(KTOTrainer)
    (window,) = trainer.experience(iter([made()[1]]), run_context(trainer))
    loss = trainer.loss(window)
    assert window["kl"].tolist() == pytest.approx([0.0] * 5, abs=1e-4)
    assert loss.terms["kto"].item() / trainer.weights(window)["kto"] == pytest.approx(0.5, rel=1e-4)


def rows(good: int, bad: int) -> list[dict[str, str]]:
    labels = ["desirable"] * good + ["undesirable"] * bad
    return [{"prompt": f"{i} + 1 =", "response": f" {i + 1}", "label": label} for i, label in enumerate(labels)]


def run(tmp_path: Path, data: list[dict[str, str]], **options: Any) -> KTOTrainer:
    config = KTOConfig.parse({"max_steps": 2, "batch_size": 4, "logging": {"progress": False}, **options})
    return KTOTrainer(config, model=save_tiny(tmp_path / "model", hidden=32, layers=1), data=data)


@pytest.mark.parametrize(("good", "bad", "missing"), [(6, 0, "undesirable"), (0, 6, "desirable")])
def test_one_class_is_refused_and_the_missing_label_named(tmp_path: Path, good: int, bad: int, missing: str) -> None:
    with pytest.raises(DataError, match=f"no row has the label `{missing}`") as caught:
        run(tmp_path, rows(good, bad)).train()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("steps", [None, 3])
def test_one_class_is_refused_where_a_stream_has_been_gone_through(tmp_path: Path, steps: int | None) -> None:
    with pytest.raises(DataError, match=r"data: no row has the label `undesirable`.*8 rows, all `desirable`; fix: add"):
        options = {"max_steps": steps, "lr_schedule": "constant", "warmup_ratio": 0, "dataset": {"streaming": True}}
        run(tmp_path, rows(8, 0), **options).train()


@pytest.mark.parametrize(("good", "bad", "missing"), [(300, 0, "undesirable"), (0, 300, "desirable"), (299, 1, None)])
def test_one_class_at_a_streams_beginning_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, good: int, bad: int, missing: str | None
) -> None:
    data = rows(good, bad)
    options = {"max_steps": 3, "batch_size": 90, "kl": "zero", "dataset": {"streaming": True, "shuffle": False}}
    run(tmp_path, data if missing else data[::-1], **options).train()
    reported = [record.getMessage() for record in caplog.records if "of the first" in record.getMessage()]
    assert [f"data: none of the first 256 rows has the label `{missing}`" in line for line in reported] == [
        True
    ] * bool(missing)


def test_a_batch_of_one_class_is_trained_on(tmp_path: Path) -> None:
    data = rows(4, 4)
    result = run(tmp_path, data, dataset={"shuffle": False}).train()
    assert math.isfinite(result.metrics["loss"]) and "rewards/desirable" not in result.metrics


@pytest.mark.parametrize(
    ("good", "bad", "weights", "said"),
    [
        (8, 2, {}, "the weighted desirable rows are 4 times the weighted undesirable ones (8 and 2 rows); the paper recommends"
                   " 1 to"
         " 1.33: set `desirable_weight` to 0.25 to 0.333"),
        (4, 8, {"undesirable_weight": 2.0}, "are 0.25 times the weighted undesirable ones (4 and 8 rows); the paper recommends"
                                            " 1 to"
         " 1.33: set `desirable_weight` to 4 to 5.33"),
        (8, 2, {"desirable_weight": 0.25}, None),
    ],
)  # fmt: skip
def test_unbalanced_weights_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, good: int, bad: int, weights: dict[str, float], said: str | None
) -> None:
    with caplog.at_level(logging.WARNING, "rlhf_plugins"):
        run(tmp_path, rows(good, bad), **weights).train()
    warned = [record.getMessage() for record in caplog.records if "weighted" in record.getMessage()]
    assert (said is None and not warned) or (said is not None and said in warned[0])


def test_kto_learns_to_tell_good_from_bad(tmp_path: Path) -> None:
    task = ArithmeticTask(terms=2, digits=1)
    data = list(task.rows("unpaired", 64, seed=1))
    trainer = run(tmp_path, data, max_steps=12, batch_size=32, learning_rate=5e-3, beta=0.5, eval_steps=12)
    trainer.eval_data = data
    result = trainer.train()
    assert result.eval_metrics["eval_auc"] > 0.8
    assert result.eval_metrics["eval_rewards/desirable"] > result.eval_metrics["eval_rewards/undesirable"]
    assert result.eval_metrics["eval_rewards/desirable_se"] > 0
