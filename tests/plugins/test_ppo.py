"""PPO: it learns, resumes bit for bit, and learns the same however its rollouts are cut."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import relative
from rlhf_plugins.trainers.ppo import PPOConfig, PPOTrainer
from torch import Tensor
from trainers_helpers import assert_refused

from rlhf_core.contracts.batch import Batch
from rlhf_core.data import DataStream
from rlhf_core.infra.errors import ModelError, NumbersError
from rlhf_core.models import PolicyModel, RewardModel, ValueModel
from rlhf_core.testing import TrainerContract, simulate
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, metrics_of, require_same_run
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import NothingToLearn, Workbench
from rlhf_core.training.distribution import Distribution

SMALL: dict[str, Any] = {"hidden": 32, "heads": 2, "kv_heads": 1}
ROWS = list(ArithmeticTask(terms=2, digits=1).rows("prompt", 16))
SHARED: dict[str, Any] = {"value": {"share_backbone": True}}
BOTH = pytest.mark.parametrize("own", [{}, SHARED], ids=["apart", "shared"])
"""A value model of its own, a copy of the policy; and one on the policy's backbone."""


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
    "truncated": "score",  # hardly any response of so small a model ends by itself
    "kl_weight": 0.0,
    "learning_rate": 3e-3,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "max_length": 64,
    "logging": {"progress": False},
    # The first steps of AdamW go by a gradient's sign, which rounding decides where it is near 0; so large an ε goes by its size.
    "optimizer": {"epsilon": 1e-2},
}


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(tiny_model(**SMALL), tiny_tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by what is in them: a language model, and a reward model on another one."""
    folder = tmp_path_factory.mktemp("models")
    made = {"language": save_tiny(folder / "language", seed=5, **SMALL), "reward": folder / "reward"}
    RewardModel.from_pretrained(made["language"], new_head=True, seed=3).save_pretrained(made["reward"])
    return made


def trainer_of(policy: PolicyModel, output: Path | None = None, kind: Any = PPOTrainer, **options: Any) -> PPOTrainer:
    return kind(PPOConfig.parse({**OPTIONS, **options}), model=copy.deepcopy(policy), data=ROWS, output=output)


# The kit


class TestPPO(TrainerContract):
    method = "ppo"
    options = OPTIONS | {"kl_weight": 0.1}

    @pytest.mark.slow
    def test_every_option_does_something(self) -> None:
        super().test_every_option_does_something()


@pytest.mark.slow
class TestOnASharedBackbone(TrainerContract):
    method = "ppo"
    options = OPTIONS | SHARED | {"group_size": 3, "whiten_rewards": True, "truncated": "bootstrap"}
    # By bootstrap, only what ends by itself has a reward: so small a model then learns to end at once.
    learning = {"truncated": "score"}  # noqa: RUF012


# It learns


@BOTH
def test_it_learns(tmp_path: Path, policy: PolicyModel, own: dict[str, Any]) -> None:
    """The share of digits grows from 0.05 to 1, and the value model knows the returns, of which values of 0 would miss all."""
    options = {"max_steps": 60, "batch_size": 8, "minibatches": 1, "optimizer": {}, "value_clip": None}
    trainer_of(policy, tmp_path / "run", learning_rate=1e-2, **options, **own).train()
    rows = [row for row in metrics_of(tmp_path / "run") if "reward" in row]
    assert len(rows) == 30 and rows[0]["reward"] < 0.1 and rows[-1]["reward"] > 0.9
    assert rows[-1]["returns"] > 0.9 and rows[-1]["value_error"] < 0.1


# What a rollout is worth


@pytest.mark.parametrize("truncated", ["bootstrap", "score", "mask"])
def test_what_was_truncated_is_not_over(policy: PolicyModel, truncated: str) -> None:
    """With γ = λ = 1 each token's return is what its response brings: the value at its end, its score, or it isn't trained on."""
    generation = {"max_new_tokens": 6, "stop": [chr(code) for code in range(32, 127, 4)]}
    options = {"gae_lambda": 1.0, "minibatches": 1, "group_size": 8, "generation": generation}
    bench = Workbench(trainer_of(policy, truncated=truncated, **options))
    bench.perturb(0.1)
    window, trainer = bench.window(), bench.trainer
    cut = window["truncated"]
    assert bool(cut.any()) and not bool(cut.all())
    responses = zip(window.response_ids, window.response_lengths, ~cut, strict=True)  # a stop string isn't in the text
    texts = [trainer.policy.tokenizer.decode(ids[: int(length) - int(stop)]) for ids, length, stop in responses]
    scores = torch.tensor(digits([], texts))
    ends = trainer.value.end_values(window).detach()
    for r in range(window.num_responses):
        brings = ends[r] if cut[r] and truncated == "bootstrap" else scores[r]
        returns = window["returns"][r][window.loss_mask[r]]
        assert torch.allclose(returns, brings.expand(len(returns)), atol=1e-6)
        assert len(returns) == (0 if cut[r] and truncated == "mask" else window.response_lengths[r])
    assert float(trainer.weights(window)["policy"]) == window.num_loss_tokens
    if truncated == "mask":
        advantages = window["advantages"][window.loss_mask]
        assert float(advantages.square().mean()) == pytest.approx(1.0, abs=1e-4), "whitened over the tokens in the loss"


def test_rewards_are_whitened_over_the_responses_of_the_step(policy: PolicyModel) -> None:
    """Also where two processes have a half each. The mean stays; a reward's scale goes."""

    def returns(factor: float, distribution: Distribution | None = None) -> tuple[tuple[int, ...], Tensor]:
        options = {"whiten_rewards": True, "gae_lambda": 1.0, "rollout_epochs": 1, "minibatches": 1, "group_size": 4}
        trainer = trainer_of(policy, rewards=[], **options)
        trainer.rewards = [lambda completions: [factor * score for score in digits([], completions)]]
        bench = Workbench(trainer, distribution)
        window = bench.window()
        rows = tuple(window.rows[owner] for owner in window.owner.tolist())
        return rows, window["returns"][:, 0]

    rows, found = returns(1.0)
    assert float(found.var(correction=0)) == pytest.approx(1.0, abs=1e-4)
    mean = float(found.mean())
    assert 0 < mean < 0.5
    assert relative(returns(10.0)[1] - 10 * mean, found - mean) < 1e-4
    whole = sorted(zip(rows, found.tolist(), strict=True))
    halves = [pair for part in simulate(2, lambda process: returns(1.0, process)) for pair in zip(*part, strict=True)]
    for (row, value), (same_row, expected) in zip(sorted(halves), whole, strict=True):
        assert row == same_row and float(value) == pytest.approx(expected, abs=1e-5)


def test_a_window_holds_what_the_update_needs(policy: PolicyModel) -> None:
    """Advantages are white over the step, the ratio is 1 at the first window, and only the policy's tokens are in it."""
    bench = Workbench(trainer_of(policy, kl_weight=0.1, **SHARED))
    windows = list(islice(bench.windows(), 4))
    assert [window.last for window in windows] == [False, False, False, True]
    assert [window.batch.num_prompts for window in windows] == [2, 2, 2, 2]
    first = Batch.cat([window.batch for window in windows[:2]])
    inside = first["advantages"][first.loss_mask]
    assert abs(float(inside.mean())) < 1e-6 and float(inside.square().mean()) == pytest.approx(1.0, abs=1e-5)
    assert not first["advantages"][~first.loss_mask].any() and not first["returns"][~first.loss_mask].any()
    assert bench.step(windows[0].batch).metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    # Nothing was learned between the windows, so the second pass holds what the first did, in other parts.
    second = Batch.cat([window.batch for window in windows[2:]])
    assert sorted(first.rows) == sorted(second.rows) and len(set(first.rows)) == 4


@pytest.mark.parametrize("options", [{"kl_weight": 0.0}, {"kl_weight": 0.3}])
def test_the_update_is_the_papers(policy: PolicyModel, options: dict[str, Any]) -> None:
    """The loss of a window in which the policy has moved, from its columns, written out in float64."""
    bench = Workbench(trainer_of(policy, minibatches=1, value_clip=0.05, **options))
    bench.perturb(0.05)
    window = bench.window()
    bench.perturb(0.1)
    found, trainer = bench.step(window), bench.trainer
    with torch.no_grad():
        logps, values = trainer.policy.token_logps(window).double(), trainer.value.token_values(window).double()
    policy_term = value_term = 0.0
    clipped = 0
    for r, t in window.loss_mask.nonzero().tolist():
        advantage, target = float(window["advantages"][r, t]), float(window["returns"][r, t])
        ratio = math.exp(float(logps[r, t]) - float(window["old_logps"][r, t]))
        policy_term -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        clipped += not 0.8 < ratio < 1.2
        value, old = float(values[r, t]), float(window["old_values"][r, t])
        near = min(max(value, old - 0.05), old + 0.05)
        value_term += 0.5 * 0.5 * max((value - target) ** 2, (near - target) ** 2)
    assert clipped > 3
    expected = (policy_term + value_term) / window.num_loss_tokens
    assert found.loss == pytest.approx(expected, rel=1e-4, abs=1e-5)


# The KL


def test_the_penalty_is_k1_at_each_token(policy: PolicyModel) -> None:
    """Returns with and without it, at γ = λ = 1, differ by β times the log-ratios to come."""
    script: dict[float, tuple[Batch, PPOTrainer]] = {}
    for weight in (0.0, 0.25):
        bench = Workbench(trainer_of(policy, kl_weight=weight, gae_lambda=1.0, minibatches=1))
        bench.perturb(0.05)
        script[weight] = (bench.window(), bench.trainer)  # type: ignore[assignment]
    (plain, _), (window, trainer) = script.values()
    assert torch.equal(plain.response_ids, window.response_ids)
    with torch.no_grad():
        ratios = trainer.policy.token_logps(window) - trainer.reference.token_logps(window)
    to_come = ratios.flip(1).cumsum(1).flip(1) * window.loss_mask
    assert float(to_come.abs().max()) > 0.1
    assert relative(plain["returns"] - window["returns"], 0.25 * to_come) < 1e-4


def test_the_weight_follows_its_target_and_is_in_the_checkpoint(tmp_path: Path, policy: PolicyModel) -> None:
    """Equation by equation: β grows by at most a tenth of a fifth per rollout, and a resumed run continues with it."""
    options = {"kl_weight": 0.1, "kl_target": 0.01, "max_steps": 24, "checkpoint": {"every": 4}, "optimizer": {}}
    trainer = trainer_of(policy, tmp_path / "run", **options)
    trainer.train()
    rows = [row for row in metrics_of(tmp_path / "run") if "kl_weight" in row]
    weight = 0.1
    for row in rows:
        assert row["kl_weight"] == pytest.approx(weight, rel=1e-6)
        weight *= 1 + 0.1 * max(-0.2, min(row["kl_rollout"] / 0.01 - 1, 0.2))
    assert len(rows) == 6 and trainer.kl_weight == pytest.approx(weight) and trainer.kl_weight != pytest.approx(0.1)
    states = sorted((tmp_path / "run/checkpoints").glob("step-*/*.json"))
    assert any('"kl_weight": ' in state.read_text() for state in states)


def test_no_forward_pass_is_made_that_is_not_used(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(trainer_of(policy))
    assert set(bench.trainer.models) == {"policy", "value"}
    forwarded: list[str] = []
    token_logps = PolicyModel.token_logps

    def counted(*arguments: Any, **named: Any) -> Tensor:
        forwarded.append("policy")
        return token_logps(*arguments, **named)

    monkeypatch.setattr(PolicyModel, "token_logps", counted)
    plain = bench.window()
    assert not forwarded, "without a correction the engine's log-probabilities are not computed again"
    corrected = Workbench(trainer_of(policy, correction="token_truncated")).window()
    assert forwarded == ["policy"]
    assert torch.equal(plain.response_ids, corrected.response_ids)
    assert relative(corrected["old_logps"], plain["old_logps"]) < 1e-5
    assert relative(corrected["sample_weights"], plain["sample_weights"]) < 1e-5


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


@BOTH
def test_weights_are_the_same_for_any_micro_batch(policy: PolicyModel, own: dict[str, Any]) -> None:
    """Groups of three are divided, prompts are forwarded once or with each of their completions, rows are padded or packed."""
    whole, *cut = (
        learned(Workbench(trainer_of(policy, group_size=3, **options, **own)))
        for options in (
            {},
            {"micro_batch_size": 1},
            {"micro_batch_size": 4},
            {"batching": {"layout": "padded"}},
            {"batching": {"share_prompts": False}, "micro_batch_size": 2},
        )
    )
    for found in cut:
        same(found, whole)


@BOTH
def test_weights_are_the_same_for_two_processes(policy: PolicyModel, own: dict[str, Any]) -> None:
    def work(distribution: Distribution) -> dict[str, Tensor]:
        options = {"kl_weight": 0.1, "kl_target": 0.01, "whiten_rewards": True}
        return learned(Workbench(trainer_of(policy, **options, **own), distribution))

    expected = work(Distribution(torch.device("cpu")))
    for found in simulate(2, work):
        same(found, expected)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_last_step_of_few_rows_is_shared(policy: PolicyModel, rows: int) -> None:
    """A process without a row, or without one in a minibatch, takes part; weights are those of one process."""
    options = {"kl_weight": 0.1, "batch_size": 6, "whiten_rewards": True}
    whole = next(Workbench(trainer_of(policy, **options)).batches).select(range(rows))

    def work(distribution: Distribution) -> dict[str, Tensor]:
        bench = Workbench(trainer_of(policy, **options), distribution)
        bench.batches = iter([whole.select(range(distribution.rank, rows, distribution.world_size))])
        return learned(bench)

    expected = work(Distribution(torch.device("cpu")))
    for found in simulate(2, work):
        same(found, expected)


def test_a_row_that_comes_twice_in_a_step_is_answered_twice(policy: PolicyModel) -> None:
    """Where an epoch ends inside a step, also when two processes hold the row."""

    def work(distribution: Distribution) -> dict[str, Tensor]:
        trainer = trainer_of(policy)
        trainer.data = ROWS[:3]
        bench = Workbench(trainer, distribution)
        ranks = {"rank": distribution.rank, "world_size": distribution.world_size}
        bench.batches = DataStream(bench.batches.dataset, batch_size=4, epochs=None, **ranks)  # type: ignore[attr-defined]
        return learned(bench)

    expected = work(Distribution(torch.device("cpu")))
    for found in simulate(2, work):
        same(found, expected)


@pytest.mark.parametrize(("own", "passes"), [({}, 2), (SHARED, 1)], ids=["apart", "shared"])
def test_a_shared_backbone_is_forwarded_once(policy: PolicyModel, own: dict[str, Any], passes: int) -> None:
    bench = Workbench(trainer_of(policy, **own))
    (micro,) = bench.split_window(bench.window())
    bench.trainer.loss(micro)  # measures first how the network may be forwarded
    calls: list[int] = []
    backbones = {bench.trainer.policy.backbone, bench.trainer.value.backbone.backbone}
    for network in backbones:
        network.register_forward_hook(lambda *_: calls.append(1))
    bench.trainer.loss(micro)
    assert len(calls) == len(backbones) == passes


# A run


@BOTH
def test_a_run_resumes_bit_for_bit_behind_a_rollout(tmp_path: Path, policy: PolicyModel, own: dict[str, Any]) -> None:
    """Rollouts have four windows; a checkpoint asked for at step 6 waits for 8; a run broken off at 10 continues there."""
    options = {"max_steps": 16, "checkpoint": {"every": 3}, "kl_weight": 0.1, "kl_target": 0.01, "optimizer": {}} | own
    kind = interruptible(PPOTrainer)
    trainer_of(policy, tmp_path / "whole", kind, **options).train()
    broken = trainer_of(policy, tmp_path / "broken", kind, **options)
    broken.stop_after = 10  # type: ignore[attr-defined]
    with pytest.raises(StoppedEarly):
        broken.train()
    kept = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir())
    assert [name.lstrip("step-0") for name in kept if name.startswith("step")] == ["4", "8"]
    resumed = trainer_of(policy, tmp_path / "broken", kind, **options)
    resumed.train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")


def test_rewards_that_differ_between_prompts_alone_are_no_fault(tmp_path: Path, policy: PolicyModel) -> None:
    """The value model compares them; only where all rewards are equal, in groups of one, too, nothing can be learned."""

    def of_prompt(prompts: list[str], **columns: Any) -> list[float]:
        return [float(len(prompt) % 2 + int(prompt[0]) % 3) for prompt in prompts]

    def constant(prompts: list[str], **columns: Any) -> list[float]:
        return [0.1] * len(prompts)

    for size in (1, 2):
        options = {"rewards": [], "group_size": size, "max_steps": 16, "max_idle_batches": 2}
        trainer = trainer_of(policy, **options)
        trainer.rewards = [of_prompt]
        assert trainer.train().step == 16
        trainer = trainer_of(policy, **options)
        trainer.rewards = [constant]
        with pytest.raises(NumbersError, match=r"in 3 rollouts in a row all rewards are equal, so they teach nothing"):
            trainer.train()


def test_a_run_in_which_no_completion_ends_says_that_no_reward_counts(
    policy: PolicyModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Values stand for the rewards of truncated completions, however these differ."""

    def of_prompt(prompts: list[str], **columns: Any) -> list[float]:
        return [float(prompt[0]) for prompt in prompts]

    def run(truncated: str) -> PPOTrainer:
        generation = {"max_new_tokens": 2, "min_new_tokens": 2}
        trainer = trainer_of(
            policy, rewards=[], truncated=truncated, generation=generation, max_steps=16, max_idle_batches=2
        )
        trainer.rewards = [of_prompt]
        return trainer

    with pytest.raises(
        NumbersError, match=r"in 3 rollouts in a row no reward counts, as no completion has ended"
    ) as caught:
        run("bootstrap").train()
    assert "max_new_tokens" in caught.value.line() and "no reward counts" in caplog.text
    assert run("score").train().step == 16


def test_replayed_rollouts_give_the_same_weights(tmp_path: Path, policy: PolicyModel) -> None:
    """From the completions that a run kept, advantages and returns are computed again; a KL in the reward adapts, too."""
    options = {"kl_weight": 0.1, "kl_target": 0.01, "max_steps": 8, "optimizer": {}, "save_precision": "float32"}
    logging = {"progress": False, "rollouts": {"whole": True}}
    first = trainer_of(policy, tmp_path / "first", logging=logging, **options)
    first.train()
    again = trainer_of(policy, tmp_path / "again", logging=logging, replay=str(tmp_path / "first"), **options)
    again.train()
    for name, parameter in first.models.state_dict().items():
        assert torch.equal(again.models.state_dict()[name], parameter), name


@BOTH
def test_what_is_exported_loads_again_and_trains_on(tmp_path: Path, policy: PolicyModel, own: dict[str, Any]) -> None:
    trainer = trainer_of(policy, tmp_path / "run", max_steps=4, **own)
    trainer.train()
    batch = Workbench(trainer_of(policy)).window()
    loaded = PolicyModel.from_pretrained(tmp_path / "run/model")
    values = ValueModel.from_pretrained(tmp_path / "run/model_value")
    with torch.no_grad():
        assert relative(loaded.token_logps(batch), trainer.policy.token_logps(batch)) < 1e-6
        expected = trainer.value.values(batch)
        assert all(relative(a, b) < 1e-6 for a, b in zip(values.values(batch), expected, strict=True))
        assert bool(expected[0].any())
        start = {"path": str(tmp_path / "run/model_value"), **own.get("value", {})}
        again = Workbench(trainer_of(loaded, value=start)).trainer
        assert relative(again.value.values(batch)[0], expected[0]) < 1e-6
    models = json.loads((tmp_path / "run/models.json").read_text())
    assert models.keys() == {"policy", "value"} and all(model["files"] for model in models.values())


# Where the value model starts


@torch.no_grad()
def test_it_starts_where_the_reward_model_stands(policy: PolicyModel, saved: dict[str, Path]) -> None:
    """The first value at a response's end is the reward model's score of it, with the backbone that scored, or the policy's."""
    path = str(saved["reward"])
    bench = Workbench(trainer_of(policy, value={"path": path, "head": "reward"}))
    window, judge = bench.window(), RewardModel.from_pretrained(path).eval()
    assert torch.equal(bench.trainer.value.end_values(window), judge.score(window))
    on_policy = Workbench(trainer_of(policy, value={"path": path, "head": "reward", "share_backbone": True})).trainer
    assert on_policy.value.backbone is on_policy.policy
    judge.backbones[0] = on_policy.policy
    assert torch.equal(on_policy.value.end_values(window), judge.score(window))


@torch.no_grad()
def test_a_copy_is_the_policys_and_apart_from_it(policy: PolicyModel, saved: dict[str, Path]) -> None:
    """Also under LoRA, whose adapter it gets, while the reference is the policy with its adapter off: no third model."""
    for options in ({}, {"lora": {"rank": 2}, "kl_weight": 0.1}):
        trainer = PPOTrainer(PPOConfig.parse(OPTIONS | options), model=saved["language"], data=ROWS)
        bench = Workbench(trainer)
        window = bench.window()
        assert not trainer.value.token_values(window).any()
        states = (model.hidden_states(window).values for model in (trainer.policy, trainer.value.backbone))
        assert torch.equal(*states)
        assert not {id(p) for p in trainer.value.parameters()} & {id(p) for p in trainer.policy.parameters()}
        trained = [name for name in bench.parameters if name.startswith("value.")]
        assert trained and ("lora" not in options or all("lora_" in name or ".head." in name for name in trained))
        assert "lora" not in options or trainer.reference.mode == "adapter_off"


@pytest.mark.parametrize(
    ("own", "moved"),
    [({"learning_rate_factor": 10}, 10), (SHARED["value"] | {"learning_rate_factor": 5}, 5), ({"path": "reward"}, 1)],
)
def test_it_learns_at_a_rate_of_its_own(
    policy: PolicyModel, saved: dict[str, Path], own: dict[str, Any], moved: float
) -> None:
    """AdamW's first step moves a weight by the rate, whatever its gradient."""
    own = own | ({"path": str(saved["reward"])} if "path" in own else {})
    bench = Workbench(trainer_of(policy, value=own, optimizer={}, learning_rate=1e-3))
    before = {name: p.detach().clone() for name, p in bench.parameters.items()}
    bench.train_step(bench.window())
    found = {name: float((p.detach() - before[name]).abs().max()) for name, p in bench.parameters.items()}
    assert found["value.head.outer.bias"] == pytest.approx(moved * 1e-3, rel=1e-2)
    assert found["policy.model.model.norm.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_a_start_that_is_none_is_refused(policy: PolicyModel, saved: dict[str, Path], tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "wide", hidden=64, heads=2, kv_heads=1)
    RewardModel.from_pretrained(wide, new_head=True).save_pretrained(tmp_path / "wide_reward")
    ValueModel.from_pretrained(wide, new_head=True).save_pretrained(tmp_path / "wide_value")
    other = tiny_tokenizer()
    other.add_tokens(["<extra>"])
    save_tiny(tmp_path / "other", tokenizer=other, vocab_size=len(other), **SMALL)
    RewardModel.from_pretrained(tmp_path / "other", new_head=True).save_pretrained(tmp_path / "other_reward")
    mixed = tmp_path / "mixed"
    ValueModel.from_pretrained(saved["language"], new_head=True).save_pretrained(mixed)
    for name in ("value_head.json", "value_head.safetensors"):
        (mixed / name).write_bytes((tmp_path / "wide_value" / name).read_bytes())
    on_policy = {"share_backbone": True}
    for own, said in (
        ({"path": saved["language"], "head": "reward"}, "the checkpoint has no reward head.*rlhf train reward_model"),
        ({"path": saved["language"], "head": "reward"} | on_policy, "the checkpoint has no reward head"),
        ({"path": saved["language"]} | on_policy, "the checkpoint has no value head"),
        ({"path": tmp_path / "other_reward", "head": "reward"}, "the `value` has another vocabulary.*same tokenizer"),
        ({"path": mixed}, "the value head doesn't fit the backbone.*a head of width 64 for a backbone of 32"),
        (
            {"path": tmp_path / "wide_value"} | on_policy,
            "doesn't fit the backbone.*a head of width 64 for a backbone of 32",
        ),
        ({"path": tmp_path / "wide_reward", "head": "reward"} | on_policy, "a head of width 64 for a backbone of 32"),
    ):
        with pytest.raises(ModelError, match=said):
            Workbench(trainer_of(policy, value={**own, "path": str(own["path"])}))
    # A larger value model is fine on a backbone of its own.
    Workbench(trainer_of(policy, value={"path": str(tmp_path / "wide_value")})).window()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": {"head": "reward"}}, "head reward needs `path`"),
        ({"value": {"lora": {}}}, "trains under the run's `lora`"),
        ({"value": {"path": "x", "lora": {}, "share_backbone": True}}, "trains under the run's `lora`"),
        ({"value": {"precision": "bf16"}}, "has the run's `precision`"),
        ({"generation": {"temperature": 0.0}}, "completions of temperature 0 are all alike"),
        ({"kl_weight": 0, "kl_target": 0.1}, "kl_target needs a `kl_weight`"),
        ({"kl_gain": 0.5}, "kl_gain needs `kl_target`"),
        ({"lora": {"quantize": "4bit"}}, "can't be a copy of a quantised model"),
        ({"clip": "pppo"}, "`clip`: unknown clip `pppo`; fix: did you mean `ppo`"),
        ({"clip_options": {"lo": 0.1}}, "clip `ppo` has no option `lo`; got 0.1; fix: did you mean `low`"),
        ({"aggregation": "token", "aggregation_options": {"size": 1}}, "aggregation `token` has no option `size`"),
        ({"value": {"paht": "x"}}, "unknown option `value.paht`"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(PPOConfig, options, message)
