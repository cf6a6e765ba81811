"""An online method as a third party writes it: its maths, the core's contract, and whole runs with figures."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from online import DYNAMIC, KL, Broken, model, trainer
from online_rewards import Ends, digits
from policy_gradient import PolicyGradientTrainer, clipped, group_advantages, kl_loss

from rlhf_core.testing import TrainerContract
from rlhf_core.testing.interrupted_runs import metrics_of, require_same_run
from rlhf_core.testing.workbench import Workbench
from rlhf_core.training.checkpoint import CheckpointManager


class TestContract(TrainerContract):
    trainer = PolicyGradientTrainer
    options: ClassVar[dict[str, Any]] = {
        "generation": {"max_new_tokens": 8}, "rollout_epochs": 2, "minibatches": 2,
        "rewards": ["online_rewards:digits"], **KL,
    }  # fmt: skip


@pytest.mark.slow
class TestContractOfDynamicSampling(TestContract):
    options: ClassVar[dict[str, Any]] = {**TestContract.options, "dynamic_sampling": True, "scale": "group"}


# Its maths


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert group_advantages(rewards).tolist() == [[0.0, -1.0, -1.0, 2.0], [0.0] * 4]
    # Deviation sqrt((0 + 1 + 1 + 4) / 4) = sqrt(1.5).
    scaled = group_advantages(rewards, scaled=True)[0]
    assert scaled.tolist() == pytest.approx([value / math.sqrt(1.5) for value in (0, -1, -1, 2)], rel=1e-5)


def test_clipping_by_hand() -> None:
    ratio = torch.tensor([[1.5, 0.5, 1.0]])
    assert clipped(ratio, torch.tensor([[1.0]]), 0.2, 0.3).tolist() == [pytest.approx([1.3, 0.5, 1.0])]
    assert clipped(ratio, torch.tensor([[-1.0]]), 0.2, 0.3).tolist() == [pytest.approx([-1.5, -0.8, -1.0])]


def test_the_gradient_of_the_kl_is_that_of_the_exact_one_off_policy_too() -> None:
    """Averaged over all tokens that the sampling policy may draw, it is the gradient of KL(π ‖ π_ref)."""
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    old, ref = old.log_softmax(0), ref.log_softmax(0)
    logits.requires_grad_()
    logps = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), logits, retain_graph=True)
    weight = (logps.detach() - old).exp()
    (found,) = torch.autograd.grad((old.exp() * kl_loss(logps, ref, weight)).sum(), logits)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_gradient_is_that_of_plain_transformers(layout: str) -> None:
    """Off the policy that drew, at another temperature, top-p and all, against the formula written out over whole sequences."""
    generation = {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9}
    bench = Workbench(
        trainer(generation=generation, max_grad_norm=None, batching={"layout": layout}, kl_weight=0.3, clip_high=0.05)
    )
    window = bench.window()
    bench.perturb(0.02)
    found = bench.step(window)
    plain, start = copy.deepcopy(bench.trainer.policy.network), model().network

    def logps(network: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
        logits = network(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    policy, kl, counts = torch.zeros(()), torch.zeros(()), [0, 0]
    rewards = window["rewards"].view(-1, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    for response, owner in enumerate(window.owner.tolist()):
        prompt = window.prompt_ids[owner, : window.prompt_lengths[owner]].tolist()
        ids = window.response_ids[response, : window.response_lengths[response]].tolist()
        mass = window["kept_mass"][response, : len(ids)]
        now, then = logps(plain, prompt, ids), logps(start, prompt, ids).detach()
        drawn = window["sampled_logps"][response, : len(ids)]
        torch.testing.assert_close(drawn + mass.log(), then, rtol=1e-4, atol=1e-4)
        ratio = (now - then).exp()
        bounded = torch.where(advantages[response] > 0, ratio.clamp(max=1.05), ratio.clamp(min=0.8))
        policy = policy - (mass * bounded * advantages[response]).sum()
        kl = kl + (mass * ratio.detach() * (now - then).square() / 2).sum()
        counts[1] += len(ids)
        counts[0] += len(ids) if rewards[owner].amax() > rewards[owner].amin() else 0
    loss = policy / counts[0] + 0.3 * kl / counts[1]
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert found.metrics["clipped"] > 0.1
    for name, parameter in plain.named_parameters():
        wanted = parameter.grad
        assert float((found.gradient[f"policy.model.{name}"] - wanted).norm()) < 1e-4 * float(wanted.norm()) + 1e-7


# Runs


def events(output: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def test_it_learns_a_dense_reward_from_a_random_model(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, held_out=40, max_steps=64, learning_rate=1e-2, eval_samples=4, eval_temperature=1.0, eval_steps=64
    )
    after = run.train().eval_metrics
    before = events(tmp_path, "evaluated")[0]["metrics"]
    # Of 160 completions each: 0.033 ± 0.005 before, 0.994 ± 0.002 after.
    assert before["eval_reward/digits"] < 0.1 and after["eval_reward/digits"] > 0.5
    gain = after["eval_reward/digits"] - before["eval_reward/digits"]
    assert gain > 8 * math.hypot(after["eval_reward/digits_se"], before["eval_reward/digits_se"])
    rewards = [row["reward"] for row in metrics_of(tmp_path) if "reward" in row]
    assert len(rewards) == 16 and sum(rewards[-4:]) > sum(rewards[:4]) + 1
    assert {"eval_reward", "eval_reward_se", "eval_reward/ends"} <= after.keys()


@pytest.mark.parametrize("options", [{}, KL, DYNAMIC], ids=["plain", "kl", "dynamic"])
@pytest.mark.parametrize("stop", [6, 9])
def test_a_run_that_breaks_off_inside_a_rollout_resumes_exactly(
    tmp_path: Path, options: dict[str, Any], stop: int
) -> None:
    options = {**options, "max_steps": 16, "checkpoint": {"every": 4}}
    trainer(tmp_path / "whole", **options).train()
    broken = trainer(tmp_path / "broken", **options)
    broken.fail_at = stop
    with pytest.raises(Broken):
        broken.train()
    assert CheckpointManager(tmp_path / "broken" / "checkpoints").steps() == [4, 8][: stop // 4]
    trainer(tmp_path / "broken", **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")


def test_checkpoints_wait_for_the_end_of_a_rollout(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=30, checkpoint={"every": 7, "keep": 9}).train()
    assert [event["step"] for event in events(tmp_path, "checkpoint_saved")] == [8, 16, 24, 28, 30]


def test_rewards_as_objects_learn_what_names_do(tmp_path: Path) -> None:
    by_name, in_python = (
        trainer(tmp_path / "a"),
        trainer(tmp_path / "b", objects=[digits, (Ends(Ends.Config(worth=0.2)), 0.5)]),
    )
    assert by_name.train().step == in_python.train().step == 8
    first, second = ([row["loss"] for row in metrics_of(tmp_path / name)] for name in "ab")
    assert first == second
