"""A policy with a critic of its own: it learns, resumes bit for bit, and learns the same however its rollouts are cut."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import relative
from critic import (
    CriticConfig,
    CriticTrainer,
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    token_rewards,
    whitened,
)
from processes import train
from safetensors.torch import load_file
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.data import DataStream
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, ValueModel
from rlhf_core.testing import TrainerContract, simulate
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, metrics_of, require_same_run
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import NothingToLearn, Workbench
from rlhf_core.training.distribution import Distribution

SMALL: dict[str, Any] = {"hidden": 32, "heads": 2, "kv_heads": 1}
ROWS = list(ArithmeticTask(terms=2, digits=1).rows("prompt", 16))


def digits(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Reward the share of digits among the six tokens that there may be."""
    return [sum(letter.isdigit() for letter in text) / 6 for text in completions]


OPTIONS: dict[str, Any] = {
    "rewards": f"{__name__}:digits",
    "generation": {"max_new_tokens": 6},
    "group_size": 2,
    "rollout_epochs": 2,
    "minibatches": 2,
    "batch_size": 4,
    "cut_off": "score",  # hardly any response of so small a model ends by itself
    "learning_rate": 3e-3,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "max_length": 64,
    "logging": {"progress": False},
    # The first steps of AdamW go by a gradient's sign, which rounding decides where it is near 0; so large an ε goes by its size.
    "optimizer": {"epsilon": 1e-2},
}


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("critic") / "model", seed=5, **SMALL)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(tiny_model(**SMALL), tiny_tokenizer())


def trainer_of(
    policy: PolicyModel, critic: Path | None, output: Path | None = None, kind: Any = CriticTrainer, **options: Any
) -> CriticTrainer:
    own = {"critic": {"path": str(critic)} | options.pop("of_critic", {})} if critic else {"share_backbone": True}
    config = CriticConfig.parse({**OPTIONS, **own, **options})
    return kind(config, model=copy.deepcopy(policy), data=ROWS, output=output)


# The maths, by hand


def test_advantages_by_hand() -> None:
    """γ = ½, λ = ½. δ₂ = 4 + ½·0 − 2 = 2; δ₁ = 1 + ½·2 − 1 = 1 and A₁ = 1 + ¼·2 = 1.5; δ₀ = 0 + ½·1 − 3 = −2.5, A₀ = −2.125."""
    rewards, values = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = generalized_advantages(rewards, values, mask, torch.zeros(1), gamma=0.5, lam=0.5)
    assert found.tolist() == [[-2.125, 1.5, 2.0]]
    # Cut off where 8 could still be had: δ₂ = 4 + ½·8 − 2 = 6, A₁ = 1 + ¼·6, A₀ = −2.5 + ¼·2.5.
    cut = generalized_advantages(rewards, values, mask, torch.tensor([8.0]), gamma=0.5, lam=0.5)
    assert cut.tolist() == [[-1.875, 2.5, 6.0]]


def test_advantages_carry_over_tokens_of_others() -> None:
    """A tool's output between two tokens, and padding behind them, change nothing, whatever stands there."""
    rewards, values = torch.tensor([[0.0, 9.0, 1.0, 9.0, 4.0, 9.0]]), torch.tensor([[3.0, 7.0, 1.0, 7.0, 2.0, 7.0]])
    mask = torch.tensor([[True, False, True, False, True, False]])
    found = generalized_advantages(rewards, values, mask, torch.zeros(1), gamma=0.5, lam=0.5)
    assert found.tolist() == [[-2.125, 0.0, 1.5, 0.0, 2.0, 0.0]]


def test_with_lambda_1_advantages_are_returns_less_values() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.bool)
    found = generalized_advantages(rewards, values, mask, torch.zeros(3, dtype=torch.float64), gamma=1.0, lam=1.0)
    assert torch.allclose(found, rewards.flip(1).cumsum(1).flip(1) - values, atol=1e-12)


def test_the_score_is_at_the_policys_last_token() -> None:
    mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    found = token_rewards(torch.tensor([3.0, 5.0]), torch.full((2, 5), 0.5), mask)
    assert found.tolist() == [[-0.5, -0.5, 0.0, 2.5, 0.0], [0.0] * 5]


def test_losses_by_hand() -> None:
    zero = torch.zeros(4)
    logps = torch.tensor([0.0, 1.0, -1.0, 1.0])
    advantages = torch.tensor([2.0, 1.0, 1.0, -1.0])
    # Ratios 1, e, 1/e, e: −2; clipped to −1.2; −1/e; and with a bad token e, not clipped.
    assert clipped_policy_loss(logps, zero, advantages, 0.2).tolist() == pytest.approx(
        [-2, -1.2, -0.367879, 2.718282], abs=1e-6
    )
    # V = 1, V_old = 0: ½ max((1 − R)², (0.2 − R)²) for R = 2 and 0: ½ · 1.8² and ½ · 1.
    value = clipped_value_loss(torch.ones(2), torch.zeros(2), torch.tensor([2.0, 0.0]), 0.2)
    assert value.tolist() == pytest.approx([1.62, 0.5], abs=1e-6)
    assert whitened(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0] and not whitened(torch.full((3,), 2.0)).any()


# The kit


class TestOfASharedBackbone(TrainerContract):
    trainer = CriticTrainer
    options = OPTIONS | {"share_backbone": True, "kl_weight": 0.1, "group_size": 3}


@pytest.mark.slow
class TestOfAModelOfItsOwn(TrainerContract):
    trainer = CriticTrainer

    @pytest.fixture(autouse=True)
    def by_path(self, critic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options = OPTIONS | {"critic": {"path": str(critic)}, "cut_off": "bootstrap", "kl_weight": 0.1}
        monkeypatch.setattr(type(self), "options", options)


# It learns


def test_it_learns(tmp_path: Path, policy: PolicyModel, critic: Path) -> None:
    """The share of digits grows from 0.04 to 1, and the critic knows the returns, of which values of 0 would miss all."""
    options = {"max_steps": 40, "batch_size": 8, "minibatches": 1, "optimizer": {}, "value_clip": 10.0}
    trainer_of(policy, critic, tmp_path / "run", learning_rate=1e-2, **options).train()
    rows = [row for row in metrics_of(tmp_path / "run") if "reward" in row]
    assert len(rows) == 20 and rows[0]["reward"] < 0.1 and rows[-1]["reward"] > 0.9
    assert rows[-1]["return"] > 0.9 and rows[-1]["value_error"] < 0.1


def test_what_was_cut_off_is_not_over(policy: PolicyModel, critic: Path) -> None:
    """With γ = λ = 1 each token's return is what its response brings: the value at its end, or its score as it stands."""
    for cut_off in ("bootstrap", "score"):
        bench = Workbench(trainer_of(policy, critic, cut_off=cut_off, gae_lambda=1.0, minibatches=1))
        bench.perturb(0.1)
        window, trainer = bench.window(), bench.trainer
        cut = window["truncated"]
        assert bool(cut.any()) and bool(window.loss_mask[cut].all())
        texts = trainer.policy.tokenizer.batch_decode(window.response_ids)
        scores = torch.tensor(digits([], texts))
        brings = scores if cut_off == "score" else trainer.value.end_values(window).detach()
        assert relative(window["returns"][cut], brings[cut, None].expand(-1, 6)) < 1e-5


# The same weights, however it is cut


def learned(bench: Workbench) -> dict[str, Tensor]:
    """Train on every window of one rollout; return by how much each weight moved."""
    start = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    for window in islice(bench.windows(), 4):
        with suppress(NothingToLearn):  # of fewer rows than minibatches, some are empty for all
            bench.train_step(window.batch)
        bench.steps += 1
    return {name: parameter.detach() - start[name] for name, parameter in bench.parameters.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare what was learned by each role, relative to how much that was."""
    for role in ("policy", "value"):
        a, b = (torch.cat([w[name].flatten() for name in expected if name.startswith(role)]) for w in (found, expected))
        assert float(b.norm()) > 1e-3 and relative(a, b) < 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_the_same_for_any_micro_batch(policy: PolicyModel, critic: Path, shared: bool) -> None:
    path = None if shared else critic
    whole, *cut = (
        learned(Workbench(trainer_of(policy, path, **options)))
        for options in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"batching": {"layout": "padded"}})
    )
    for found in cut:
        same(found, whole)


@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_the_same_for_two_processes(policy: PolicyModel, critic: Path, shared: bool) -> None:
    path = None if shared else critic

    def work(distribution: Distribution) -> dict[str, Tensor]:
        return learned(Workbench(trainer_of(policy, path, kl_weight=0.1), distribution))

    expected = work(Distribution(torch.device("cpu")))
    for found in simulate(2, work):
        same(found, expected)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_last_step_of_few_rows_is_shared(policy: PolicyModel, critic: Path, rows: int) -> None:
    """A process without a row, or without one in a minibatch, takes part; weights are those of one process."""

    whole = next(Workbench(trainer_of(policy, critic, batch_size=6)).batches).select(range(rows))

    def work(distribution: Distribution) -> dict[str, Tensor]:
        trainer = trainer_of(policy, critic, kl_weight=0.1, batch_size=6)
        bench = Workbench(trainer, distribution)
        share = range(distribution.rank, rows, distribution.world_size)
        bench.batches = iter([whole.select(share)])
        return learned(bench)

    expected = work(Distribution(torch.device("cpu")))
    for found in simulate(2, work):
        same(found, expected)


def test_a_row_that_comes_twice_in_a_step_is_answered_twice(policy: PolicyModel, critic: Path) -> None:
    """Where an epoch ends inside a step, also when two processes hold the row."""

    def work(distribution: Distribution) -> dict[str, Tensor]:
        trainer = trainer_of(policy, critic)
        trainer.data = ROWS[:3]
        bench = Workbench(trainer, distribution)
        ranks = {"rank": distribution.rank, "world_size": distribution.world_size}
        bench.batches = DataStream(bench.batches.dataset, batch_size=4, epochs=None, **ranks)  # type: ignore[attr-defined]
        return learned(bench)

    expected = work(Distribution(torch.device("cpu")))
    for found in simulate(2, work):
        same(found, expected)


def test_a_window_holds_what_the_update_needs(policy: PolicyModel) -> None:
    """Advantages are white over the step, the ratio is 1 at the first window, and only the policy's tokens are in it."""
    bench = Workbench(trainer_of(policy, None, kl_weight=0.1))
    windows = list(islice(bench.windows(), 4))
    assert [window.last for window in windows] == [False, False, False, True]
    assert [window.batch.num_prompts for window in windows] == [2, 2, 2, 2]
    first = Batch.cat([window.batch for window in windows[:2]])
    inside = first["advantages"][first.loss_mask]
    assert abs(float(inside.mean())) < 1e-6 and float(inside.square().mean()) == pytest.approx(1.0, abs=1e-5)
    assert not first["advantages"][~first.loss_mask].any()
    assert bench.step(windows[0].batch).metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    # Nothing was learned between the windows, so the second pass holds what the first did, in other parts.
    second = Batch.cat([window.batch for window in windows[2:]])
    assert sorted(first.rows) == sorted(second.rows) and len(set(first.rows)) == 4


@pytest.mark.parametrize(("shared", "passes"), [(True, 1), (False, 2)])
def test_a_shared_backbone_is_forwarded_once(policy: PolicyModel, critic: Path, shared: bool, passes: int) -> None:
    bench = Workbench(trainer_of(policy, None if shared else critic))
    (micro,) = bench.split_window(bench.window())
    calls: list[int] = []
    for role in ("policy", "value"):
        model = bench.trainer.models[role]
        network = (model if role == "policy" else model.backbone).backbone
        if role == "policy" or not shared:
            network.register_forward_hook(lambda *_: calls.append(1))
    bench.trainer.loss(micro)
    assert len(calls) == passes


# A run


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_resumes_bit_for_bit_behind_a_rollout(
    tmp_path: Path, policy: PolicyModel, critic: Path, shared: bool
) -> None:
    """Rollouts have four windows; a checkpoint asked for at step 6 waits for 8, and a run broken off at 10 goes on from there."""
    options = {"max_steps": 16, "checkpoint": {"every": 3}, "kl_weight": 0.1, "optimizer": {}}
    path = None if shared else critic
    kind = interruptible(CriticTrainer)
    trainer_of(policy, path, tmp_path / "whole", kind, **options).train()
    broken = trainer_of(policy, path, tmp_path / "broken", kind, **options)
    broken.stop_after = 10  # type: ignore[attr-defined]
    with pytest.raises(StoppedEarly):
        broken.train()
    kept = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir())
    assert [name.lstrip("step-0") for name in kept if name.startswith("step")] == ["4", "8"]
    trainer_of(policy, path, tmp_path / "broken", kind, **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_exported_loads_again(tmp_path: Path, policy: PolicyModel, critic: Path, shared: bool) -> None:
    trainer = trainer_of(policy, None if shared else critic, tmp_path / "run", max_steps=4)
    trainer.train()
    batch = Workbench(trainer_of(policy, None, micro_batch_size=None)).window()
    loaded = PolicyModel.from_pretrained(tmp_path / "run" / "model")
    values = ValueModel.from_pretrained(tmp_path / "run" / "model_value")
    with torch.no_grad():
        assert relative(loaded.token_logps(batch), trainer.policy.token_logps(batch)) < 1e-6
        expected = trainer.value.values(batch)
        assert all(relative(a, b) < 1e-6 for a, b in zip(values.values(batch), expected, strict=True))
    assert bool(expected[0].any())
    models = json.loads((tmp_path / "run" / "models.json").read_text())
    assert models.keys() == {"policy", "value"} and all(model["files"] for model in models.values())


def test_held_out_rows_are_answered_and_scored(tmp_path: Path, policy: PolicyModel) -> None:
    trainer = trainer_of(policy, None, tmp_path / "run", max_steps=4)
    trainer.eval_data = ROWS[:5]
    result = trainer.train()
    assert 0 <= result.eval_metrics["eval_reward"] <= 1 and "eval_reward_se" in result.eval_metrics
    assert "eval_loss" not in result.eval_metrics and "eval_reward/digits_se" in result.eval_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either `critic`"),
        ({"critic": "x", "share_backbone": True}, "give either `critic`"),
        ({"critic": "x", "head_learning_rate_factor": 2.0}, "needs share_backbone"),
        ({"share_backbone": True, "generation": {"temperature": 0.0}}, "draws nothing to learn from"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CriticConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_two_processes_learn_the_same(tmp_path: Path, critic: Path, shared: bool) -> None:
    """Two rollouts of four steps, real processes: the same draws and rewards, and weights that differ by rounding alone."""
    own: dict[str, Any] = {"share_backbone": True} if shared else {"critic": str(critic)}
    options = OPTIONS | own | {"max_steps": 8, "kl_weight": 0.1, "save_precision": "float32"}
    one, two = (
        train("critic:CriticTrainer", options, tmp_path / str(count), count=count, model=SMALL) for count in (1, 2)
    )
    for row, same_row in zip(metrics_of(two), metrics_of(one), strict=True):
        assert row == pytest.approx(same_row, rel=1e-3, abs=1e-5)
    for role in ("model", "model_value"):
        found, expected = (load_file(run / role / "model.safetensors") for run in (two, one))
        assert max(relative(found[name], value) for name, value in expected.items()) < 1e-5
