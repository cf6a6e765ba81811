"""What the core promises an online method: the same update for any micro-batches, a schedule that ends, events, faults."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from online import DYNAMIC, KL, Broken, Watched, model, rows, trainer
from torch import Tensor

from rlhf_core import registry
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import ConfigError, NumbersError, PluginError, Stopped, StorageError
from rlhf_core.infra.safetensors_file import read_tensors
from rlhf_core.models import PolicyModel
from rlhf_core.registry.hooks import hookimpl
from rlhf_core.testing import simulate
from rlhf_core.testing.interrupted_runs import metrics_of, require_same_run
from rlhf_core.testing.workbench import Workbench
from rlhf_core.training.checkpoint import CheckpointManager
from rlhf_core.training.distribution import Distribution

TOLERANCE = 1e-5
"""Relative difference of a gradient in float32 that another cut may make by rounding."""


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all tensors."""
    assert found.keys() == expected.keys() and expected
    whole = [torch.cat([side[name].flatten().double() for name in expected]) for side in (found, expected)]
    return float((whole[0] - whole[1]).norm() / whole[1].norm())


def weights_of(run: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.models.named_parameters()}


def learned(run: Any) -> dict[str, Tensor]:
    """Return by how much each weight has moved from the model's."""
    start = {f"policy.{name}": p.detach() for name, p in model().named_parameters()}
    return {name: value - start[name] for name, value in weights_of(run).items() if name in start}


# Any micro-batches and processes. An epsilon of the size of gradients keeps AdamW from making a sign of what rounds to zero.

SMOOTH: dict[str, Any] = {"optimizer": {"epsilon": 1e-2}, "max_grad_norm": None, "learning_rate": 1e-2}
CUTS: list[dict[str, Any]] = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 3},
    {"batching": {"micro_batch_tokens": 60}},
]


@pytest.mark.parametrize("options", [{}, KL, DYNAMIC], ids=["plain", "kl", "dynamic"])
def test_any_micro_batch_learns_the_same(options: dict[str, Any]) -> None:
    """A rollout of four steps; groups of four are cut by 1, by 3 and by tokens."""
    shared = {**SMOOTH, **options, "max_steps": 4}
    whole = trainer(**shared)
    whole.train()
    expected = learned(whole)
    assert min(float(value.norm()) for value in expected.values()) > 0
    for cut in CUTS:
        run = trainer(**shared, **cut)
        run.train()
        assert [window.batch.rows for _, window in run.made] == [window.batch.rows for _, window in whole.made]
        assert apart(learned(run), expected) < 10 * TOLERANCE  # of four steps


@pytest.mark.parametrize("options", [{}, KL, {**KL, **DYNAMIC}], ids=["plain", "kl", "dynamic"])
def test_two_processes_make_the_windows_and_gradients_of_one(options: dict[str, Any]) -> None:
    def work(distribution: Distribution) -> list[tuple[tuple[int, ...], dict[str, Tensor]]]:
        bench = Workbench(trainer(max_grad_norm=None, **options), distribution)
        bench.perturb(0.01)
        found = []
        for window in itertools.islice(bench.windows(), 4):
            found.append((window.batch.rows, bench.step(window.batch).gradient))
            bench.steps += 1
        return found

    (alone,), shared = simulate(1, work), simulate(2, work)
    assert len(alone) == len(shared[0]) == 4
    for (whole, expected), *parts in zip(alone, *shared, strict=True):
        assert sorted(row for share, _ in parts for row in share) == sorted(whole)
        assert apart(parts[0][1], expected) < TOLERANCE
    if "dynamic_sampling" in options:  # groups that taught nothing were replaced, on whichever process they were
        assert sum(len(whole) for whole, _ in alone[:2]) >= 8


# Memory


class Hungry(PolicyModel):
    """Runs out of memory where it forwards more than so many sequences: without gradients, with them, or while it decodes."""

    most: dict[str, int] = {}  # noqa: RUF012
    refused: list[str] = []  # noqa: RUF012

    def use(self, kind: str, size: int) -> None:
        if size > self.most.get(kind, size):
            self.refused.append(kind)
            raise torch.OutOfMemoryError("CUDA out of memory")

    def token_logps(self, batch: Batch, **options: Any) -> Tensor:
        self.use("update" if torch.is_grad_enabled() else "forward", batch.num_responses)
        return super().token_logps(batch, **options)

    def next_token_logits(self, hidden: Tensor, **options: Any) -> Tensor:
        self.use("generate", len(hidden))
        return super().next_token_logits(hidden, **options)


def hungry(**most: int) -> Hungry:
    plain = model()
    Hungry.most, Hungry.refused = most, []
    return Hungry(plain.network, plain.tokenizer)


@pytest.mark.parametrize("where", ["generate", "forward", "update"])
def test_running_out_of_memory_changes_nothing(where: str) -> None:
    shared = {**SMOOTH, **KL, "max_steps": 4}
    whole = trainer(**shared, policy=hungry())
    whole.train()
    assert not Hungry.refused
    run = trainer(**shared, policy=hungry(**{where: 6}))
    run.train()
    assert {*Hungry.refused} == {where}
    for (_, found), (_, expected) in zip(run.made, whole.made, strict=True):
        assert torch.equal(found.batch.response_ids, expected.batch.response_ids)
    assert apart(learned(run), learned(whole)) < 10 * TOLERANCE


# Steps, schedule, events


def test_dynamic_sampling_ends_with_the_data_and_the_schedule_with_it(tmp_path: Path) -> None:
    options = {**DYNAMIC, "max_steps": None, "epochs": 4.0, "lr_schedule": "linear", "warmup_ratio": 0.1}
    run = trainer(tmp_path, **options)
    result = run.train()
    rates = [row["learning_rate"] for row in metrics_of(tmp_path)]
    assert result.step == len(run.made) == len(rates) and result.step % 4 == 0
    taken = json.loads((tmp_path / "checkpoints" / f"step-{result.step}" / "state.json").read_text())["ranks"][0]
    assert taken["stream"]["rows"] == 4 * len(rows())
    # 20 batches, 2 of them warm-up: after the last one, 1/18 of the way down is left.
    assert rates[-1] == pytest.approx(3e-3 / 18) and max(rates) <= 3e-3
    assert (rates[4:] == sorted(rates[4:], reverse=True) and rates[0] < 3e-3 / 2) or rates[0] > rates[-1]


def test_dynamic_sampling_fills_its_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, **DYNAMIC, max_steps=9)
    assert run.train().step == 9
    for first in (0, 4):
        rollout = [window.batch for _, window in run.made[first : first + 2]]
        assert 8 <= sum(batch.num_prompts for batch in rollout) <= 15
        for batch in rollout:
            groups = batch["rewards"].view(-1, 4)
            assert (groups.amax(1) > groups.amin(1)).all()
    assert [window.last for _, window in run.made[:8]] == [False, False, False, True] * 2


def test_a_completion_knows_which_policy_wrote_it() -> None:
    run = trainer(max_steps=12)
    run.train()
    for number, (_, window) in enumerate(run.made):
        assert set(window.batch["policy_version"].tolist()) == {4 * (number // 4)}


def test_the_first_update_of_a_rollout_has_ratio_one_at_any_temperature(tmp_path: Path) -> None:
    generation = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9}
    trainer(tmp_path, generation=generation, minibatches=1, max_steps=4).train()
    ratios = [row["ratio"] for row in metrics_of(tmp_path)]
    assert ratios[0] == pytest.approx(1, abs=1e-5) and ratios[2] == pytest.approx(1, abs=1e-5)
    assert abs(ratios[1] - 1) > 1e-3


def test_listeners_hear_of_rollouts_and_whose_they_are() -> None:
    scored: list[tuple[int, list[Sample], list[float], bool]] = []

    class Listener:
        @hookimpl
        def rollouts_scored(self, step, samples, rewards, evaluating):
            scored.append((step, samples, rewards, evaluating))

    registry.register("hook", "listener", Listener())
    trainer(max_steps=8, held_out=5, eval_steps=8).train()
    assert [(step, len(samples), evaluating) for step, samples, _, evaluating in scored] == [
        (0, 5, True), (0, 32, False), (4, 32, False), (8, 5, True),
    ]  # fmt: skip
    for _, samples, rewards, evaluating in scored:
        assert len(rewards) == len(samples) and samples[0].columns.keys() == {"answer"}
        assert [sample.group for sample in samples] == [n // (1 if evaluating else 4) for n in range(len(samples))]
        for sample, reward in zip(samples, rewards, strict=True):
            share = sum(one.isdigit() for one in sample.completion) / max(len(sample.completion), 1)
            assert reward == pytest.approx(share + 0.1 * (sample.stop_reason == "end"))


def samples_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def test_some_completions_of_each_rollout_are_kept_and_of_each_evaluation(tmp_path: Path) -> None:
    trainer(tmp_path, held_out=5, eval_steps=8, logging={"samples": {"rollouts": 3}, "progress": False}).train()
    found = samples_of(tmp_path)
    assert [(row["step"], row["kind"]) for row in found] == [
        (step, kind)
        for step, kind in ((0, "evaluation"), (0, "rollout"), (4, "rollout"), (8, "evaluation"))
        for _ in range(3)
    ]
    data = {number: row["prompt"] for number, row in enumerate(rows())}
    for row in found:
        assert row["kind"] == "evaluation" or data[row["row"]] == row["prompt"]
        assert row["rewards"].keys() == {"digits", "ends"} and row["stop_reason"] in ("end", "length")
        assert row["reward"] == pytest.approx(row["rewards"]["digits"] + 0.5 * row["rewards"]["ends"])
        assert 1 <= row["tokens"] <= 8 and row["sample"] in range(1 if row["kind"] == "evaluation" else 4)
    assert len({row["prompt"] for row in found[3:6]}) == 3  # of different prompts


def test_no_more_are_kept_where_a_rollout_takes_several_batches_and_none_where_none_are_asked_for(
    tmp_path: Path,
) -> None:
    trainer(tmp_path / "some", **DYNAMIC, max_steps=4, logging={"samples": {"rollouts": 5}, "progress": False}).train()
    assert len(samples_of(tmp_path / "some")) == 5
    trainer(tmp_path / "none", max_steps=4, logging={"samples": {"rollouts": 0}, "progress": False}).train()
    assert not (tmp_path / "none" / "samples.jsonl").exists()


def test_fixed_prompts_are_completed_between_rollouts_as_the_method_draws_and_training_is_the_same(
    tmp_path: Path,
) -> None:
    samples = {"prompts": ["1 + 1 = "], "every": 3, "rollouts": 0}
    trainer(tmp_path / "with", **KL, max_steps=16, logging={"samples": samples, "progress": False}).train()
    trainer(tmp_path / "without", **KL, max_steps=16).train()
    require_same_run(tmp_path / "with", tmp_path / "without")
    found = samples_of(tmp_path / "with")
    # A rollout has four steps, so what is due after step 3 is done after step 4.
    assert [row["step"] for row in found] == [0, 4, 8, 12, 16] and {row["kind"] for row in found} == {"prompt"}
    assert max(row["tokens"] for row in found) == 8  # the method's `generation.max_new_tokens`


def test_samples_are_cut_back_on_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 16, "checkpoint": {"every": 4}, "held_out": 5, "eval_steps": 8}
    trainer(tmp_path / "whole", **options).train()
    broken = trainer(tmp_path / "broken", **options)
    broken.fail_at = 10
    with pytest.raises(Broken):
        broken.train()
    path = tmp_path / "broken" / "samples.jsonl"
    assert samples_of(tmp_path / "broken")[-1]["step"] == 8
    with path.open("a") as file:
        file.write('{"step": 8, "evalu')  # a kill in the middle of a line
    trainer(tmp_path / "broken", **options).train(resume=True)
    assert path.read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


class Asked(Watched):
    """Is asked to stop while it makes a rollout that teaches nothing."""

    api = 1
    record = "prompt"
    stop = False

    def rollout(self, batch: Batch, run: Any) -> Batch:
        made = super().rollout(batch, run)
        self.drawn = getattr(self, "drawn", 0) + 1
        if self.drawn == 3:
            made["differs"].fill_(False)
            if self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
        return made


def test_what_a_skipped_rollout_logged_is_reported_after_a_resume_too(tmp_path: Path) -> None:
    whole, stopped = (
        trainer(tmp_path / name, kind=Asked, max_steps=12, logging=WHOLE) for name in ("whole", "stopped")
    )
    whole.train()
    stopped.stop = True
    with pytest.raises(Stopped):
        stopped.train()
    again = trainer(tmp_path / "stopped", kind=Asked, max_steps=12, logging=WHOLE)
    again.drawn = 3
    again.train(resume=True)
    require_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert rollouts_of(tmp_path / "stopped") == rollouts_of(tmp_path / "whole")
    # The third rollout and the fourth share a row: 64 completions.
    assert [row["step"] for row in metrics_of(tmp_path / "whole") if "reward" in row] == [1, 5, 9]


# Truncation, the reference


def test_truncated_completions_may_be_left_out_of_the_loss_and_not_of_their_group() -> None:
    run = trainer(learn_from_truncated=False, max_steps=1, rewards=["online_rewards:ends_or_digits"])
    run.train()
    batch = run.made[0][1].batch
    assert batch["truncated"].any()
    assert not batch.loss_mask[batch["truncated"]].any()
    torch.testing.assert_close(
        batch["advantages"],
        (batch["rewards"].view(-1, 4) - batch["rewards"].view(-1, 4).mean(1, keepdim=True)).flatten(),
    )


def test_no_reference_is_kept_where_nothing_is_compared_with_it() -> None:
    plain, compared = trainer(max_steps=1), trainer(max_steps=1, **KL)
    plain.train(), compared.train()
    assert not hasattr(plain, "reference") and compared.reference.mode == "copy"


def test_a_fresh_adapter_is_its_own_reference(tmp_path: Path) -> None:
    run = trainer(tmp_path, **KL, lora={"rank": 4}, max_steps=8, learning_rate=1e-2)
    run.train()
    kls = [row["kl"] for row in metrics_of(tmp_path)]
    assert run.reference.mode == "adapter_off" and kls[0] == pytest.approx(0, abs=1e-6) and max(map(abs, kls)) > 1e-4


def test_the_weight_of_the_kl_follows_its_target(tmp_path: Path) -> None:
    trainer(tmp_path, kl_weight=0.1, kl_target=10.0, max_steps=12).train()
    found = [row["kl_weight"] for row in metrics_of(tmp_path) if "kl_weight" in row]
    # Far below the target: 2 % less each time.
    assert found == pytest.approx([0.1 * 0.98, 0.1 * 0.98**2, 0.1 * 0.98**3])


# Faults


def test_a_misspelt_reward_ends_it_before_anything_is_loaded(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", policy=tmp_path / "no-model", rewards=["online_rewards:digit"])
    with pytest.raises((ConfigError, PluginError), match="digit"):
        run.train()
    assert not (tmp_path / "run").exists()
    run = trainer(tmp_path / "run", policy=tmp_path / "no-model", rewards=["endz"])
    with pytest.raises((ConfigError, PluginError), match="endz"):
        run.train()


def test_no_rewards_and_greedy_draws_are_refused() -> None:
    with pytest.raises(ConfigError, match="no rewards are given"):
        trainer(rewards=[]).train()
    with pytest.raises(ConfigError, match="learns from rewards, and none is given; got an empty list"):
        trainer(objects=[]).train()
    with pytest.raises(ConfigError, match="temperature"):
        trainer(generation={"temperature": 0.0})


def test_a_reward_whose_source_changed_refuses_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "mine" / "my_changing_reward.py"
    source.parent.mkdir()
    monkeypatch.syspath_prepend(str(source.parent))
    text = "def mine(completions, **columns):\n    return [float(len(one)) for one in completions]\n"
    source.write_text(text)
    options: dict[str, Any] = {"rewards": ["my_changing_reward:mine"], "checkpoint": {"every": 4}}
    trainer(tmp_path / "run", **options).train()
    trainer(tmp_path / "run", **options).train(resume=True)
    source.write_text(text.replace("len(one)", "2 * len(one)"))
    with pytest.raises(PluginError, match=r"the rewards changed since the run was started.*its source changed"):
        trainer(tmp_path / "run", **options).train(resume=True)
    sys.modules.pop("my_changing_reward", None)


def test_a_reward_that_raises_names_its_rows() -> None:
    def broken(prompts: list[str], completions: list[str]) -> list[float]:
        raise ZeroDivisionError("no digits")

    run = trainer(objects=[broken])
    with pytest.raises(PluginError, match=r"no digits") as caught:
        run.train()
    assert "broken" in caught.value.line() and "row" in caught.value.line()


@pytest.mark.parametrize("dynamic", [False, True])
def test_rewards_that_are_all_alike_end_the_run(dynamic: bool) -> None:
    run = trainer(max_idle_batches=5, dynamic_sampling=dynamic, rewards=["online_rewards:alike"])
    with pytest.raises(
        NumbersError, match=r"5 batches in a row gave nothing to learn from.*rewards row \d+: alike 1, 1"
    ):
        run.train()


# Other processes


def start(output: Path, processes: int = 1, **job: Any) -> subprocess.CompletedProcess[str]:
    """Run a job of `online.py`."""
    output.mkdir(exist_ok=True, parents=True)
    path = output.parent / f"{output.name}.json"
    path.write_text(json.dumps({"output": str(output), **job}))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(Path(__file__).with_name("online.py")), str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [KL, {**KL, **DYNAMIC}], ids=["kl", "dynamic"])
def test_killed_inside_a_rollout_it_resumes_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**options, "max_steps": 16, "checkpoint": {"every": 4}, "eval_steps": 8, "kl_budget": 100.0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, options=options, held_out=5).returncode == 0
    for stop in (6, 7):  # after a checkpoint at 4 a second time, on the way from there
        done = start(killed, options=options, held_out=5, fail_at=stop, how="kill", resume=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert start(killed, options=options, held_out=5, resume=True).returncode == 0
    require_same_run(killed, whole)
    assert rollouts_of(killed) == rollouts_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "phases", "own"),
    [
        (None, 7, KL),
        ("grpo", 7, {"kl_weight": 0.05, "equal_groups": "skip"}),
        ("ppo", 8, {"group_size": 2, "truncated": "score", "kl_target": 0.02}),
    ],
    ids=["a third party's", "grpo", "ppo"],
)
def test_killed_at_random_moments_of_each_phase_it_resumes_exactly(
    tmp_path: Path, method: str | None, phases: int, own: dict[str, Any]
) -> None:
    """Each rollout enters so many phases: rollout, reward, what the method forwards, and four updates.

    One kill falls into each of them, and three into a phase of the rollout after that, past one more checkpoint.
    """
    options = {**own, "max_steps": 16, "checkpoint": {"every": 4}, "logging": WHOLE}
    chance = random.Random(0)
    numbers = [*range(1, 5), phases + 2, 5, 6, phases + 3, *range(7, phases + 1), phases + 1]
    job = {"method": method, "options": options, "folder": str(tmp_path)}
    job["moments"] = [(number, chance.uniform(0, 0.01)) for number in numbers]
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("online.py")), "kills", str(path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    require_same_run(killed, whole)
    # The same prompts in the same order, none skipped and none twice, with the same completions, bit for bit.
    assert rollouts_of(killed) == rollouts_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [KL, {**KL, **DYNAMIC}], ids=["kl", "dynamic"])
def test_two_real_processes_learn_what_one_does_and_resume_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**SMOOTH, **options, "max_steps": 8, "checkpoint": {"every": 4}}
    one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
    assert start(one, options=options).returncode == 0
    assert (done := start(two, 2, options=options)).returncode == 0, done.stderr[-3000:]
    found, expected = (
        {name: value - model().state_dict()[name.removeprefix("policy.")] for name, value in weights.items()}
        for weights in (read_tensors(path / "weights.safetensors") for path in (two, one))
    )
    assert apart(found, expected) < 1e-3  # of eight steps, the second rollout drawn from the first one's weights
    shares = [json.loads((two / f"report.{rank}.json").read_text())["rows"] for rank in (0, 1)]
    whole = json.loads((one / "report.0.json").read_text())["rows"]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(rows) for rows in whole]
    start(broken, 2, options=options, fail_at=6)
    assert (done := start(broken, 2, options=options, resume=True)).returncode == 0, done.stderr[-3000:]
    require_same_run(broken, two)
    assert rollouts_of(broken) == rollouts_of(two)
    assert [(row["step"], row["place"], row["completion"]) for row in rollouts_of(two) if not row["step"]] == [
        (row["step"], row["place"], row["completion"]) for row in rollouts_of(one) if not row["step"]
    ]


@pytest.mark.slow
def test_processes_that_take_different_numbers_of_batches_resume_each_at_its_own_place(tmp_path: Path) -> None:
    options = {**KL, **DYNAMIC, "max_steps": 16, "checkpoint": {"every": 4}, "max_idle_batches": 12}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert (done := start(whole, 2, options=options, apart=True)).returncode == 0, done.stderr[-3000:]
    ranks = json.loads((whole / "checkpoints" / "step-16" / "state.json").read_text())["ranks"]
    assert ranks[0]["stream"]["rows"] != ranks[1]["stream"]["rows"] and ranks[0]["batches"] != ranks[1]["batches"]
    start(broken, 2, options=options, apart=True, fail_at=10)
    assert CheckpointManager(broken / "checkpoints").steps() == [4, 8]
    assert (done := start(broken, 2, options=options, apart=True, resume=True)).returncode == 0, done.stderr[-3000:]
    require_same_run(broken, whole)


class Questioned(RewardFn):
    """Notes what a run asks of it."""

    api = 1

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def describe(self) -> dict[str, Any]:
        self.asked.append("describe")
        return {}

    def prepare(self) -> None:
        self.asked.append("prepare")

    def score(self, samples: Any) -> list[float]:
        self.asked.append("score")
        return [float(len(sample.completion_ids)) for sample in samples]


def test_a_reward_is_described_then_prepared_then_asked_for_scores(tmp_path: Path) -> None:
    """The record of files comes first, so that a run which continues with others ends before they are loaded."""
    reward = Questioned()
    trainer(tmp_path / "run", objects=[reward], max_steps=1).train()
    assert reward.asked[:3] == ["describe", "prepare", "score"] and reward.asked.count("prepare") == 1


# Metrics


def test_every_rollout_reports_its_rewards_lengths_and_phases_and_the_gap_of_its_first_update(tmp_path: Path) -> None:
    trainer(tmp_path, **KL).train()
    found = metrics_of(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    of_rollout = {
        "reward", "reward_std", "reward/digits", "reward/ends", "groups_without_variance", "entropy", "length", "truncated",
        "length_wrong", "logprob_gap", "logprob_gap_max",
    }  # fmt: skip
    for number, (row, line) in enumerate(zip(found, lines, strict=True)):
        assert row.keys() >= {"ratio", "ratio_positive", "ratio_negative", "clipped", "kl_sampled", "kl"}
        assert (of_rollout <= row.keys()) if number in (0, 4) else not of_rollout & row.keys()
        assert row.keys() & line.keys() == row.keys() and not any("seconds" in name for name in row)
        phases = ("rollout", "reward", "reference", "update")
        assert all((line[f"seconds/{name}"] > 0) == (name == "update" or number in (0, 4)) for name in phases)
        assert (
            sum(line[f"seconds/{name}"] for name in phases) <= line["seconds"] and line["tokens_per_second/update"] > 0
        )
        assert ("tokens_per_second/reference" in line) == (number in (0, 4))
    assert 0 <= found[0]["logprob_gap"] < 1e-5 and found[0]["logprob_gap"] <= found[0]["logprob_gap_max"] < 1e-4
    assert 0 < found[0]["entropy"] < 6 and found[0]["reward_std"] > 0


def test_the_gap_before_the_first_update_is_printed_and_ends_the_run_past_its_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="rlhf_core"):
        trainer(tmp_path / "run", max_steps=1).train()
    assert "engine and trainer differ by" in caplog.text and "before the first update" in caplog.text
    (event,) = [
        one
        for one in map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
        if one["event"] == "logprob_gap_measured"
    ]
    assert event["step"] == 0 and event["mean"] <= event["max"] < 1e-4 and event["tokens"] > 16
    run = trainer(max_steps=1, max_logprob_gap=1e-12)
    with pytest.raises(NumbersError, match=r"aren't those of the trainer.*`max_logprob_gap`"):
        run.train()
    assert not any(value.any() for value in learned(run).values())


def test_a_kl_budget_ends_the_run_between_rollouts(tmp_path: Path) -> None:
    options: dict[str, Any] = {**KL, "kl_weight": 1e-6, "kl_target": None, "learning_rate": 2e-2, "max_steps": 40}
    result = trainer(tmp_path, **options, kl_budget=0.02).train()
    mean, expected = 0.0, []
    for row in metrics_of(tmp_path):
        mean = 0.9 * mean + 0.1 * row["kl"]
        expected.append(mean)
    found = [row["kl_mean"] for row in metrics_of(tmp_path)]
    assert found == pytest.approx(expected)
    assert result.stopped_early and result.step == len(found) < 40 and result.step % 4 == 0
    assert found[-1] > 0.02 and all(value <= 0.02 for value in found[3:-1:4])
    again = trainer(tmp_path, **options, kl_budget=0.02).train(resume=True)
    assert again.step == result.step and again.stopped_early
    with pytest.raises(ConfigError, match="reports no KL to the reference"):
        trainer(kl_budget=0.02).train()


def test_equal_rewards_in_all_groups_end_a_run_that_still_makes_steps(caplog: pytest.LogCaptureFixture) -> None:
    """The KL gives a loss, so no batch is idle; the error shows rewards."""
    run = trainer(**{**KL, "kl_target": None}, minibatches=1, max_steps=40, max_idle_batches=2,
                  rewards=["online_rewards:alike"])  # fmt: skip
    with pytest.raises(
        NumbersError, match=r"in 3 rollouts in a row all rewards of each prompt are equal.*alike 1, 1, 1, 1"
    ):
        run.train()
    assert caplog.text.count("so they teach nothing: row") == 1


def test_a_resumed_run_counts_on_where_rewards_teach_nothing(tmp_path: Path) -> None:
    options = {**KL, "kl_target": None, "minibatches": 1, "rewards": ["online_rewards:alike"], "max_idle_batches": 3}
    stopped = trainer(tmp_path, kind=Asked, max_steps=40, **options)
    stopped.stop = True
    with pytest.raises(Stopped):
        stopped.train()
    with pytest.raises(NumbersError, match=r"step 7: in 4 rollouts in a row all rewards of each prompt are equal"):
        trainer(tmp_path, kind=Asked, max_steps=40, **options).train(resume=True)


def test_an_evaluation_draws_several_completions_and_estimates_pass_at_k(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, held_out=6, eval_steps=4, max_steps=4, eval_samples=4, rewards=["online_rewards:rare"], right_from=1.0
    )
    found = run.train().eval_metrics
    assert 0 < found["eval_avg@4"] == found["eval_reward"] < found["eval_pass@2"] < found["eval_pass@4"] <= 1
    names = ("avg@4", "pass@2", "pass@4", "reward", "reward/rare", "length", "truncated")
    assert all(found[f"eval_{name}_se"] >= 0 and f"eval_{name}" in found for name in names)
    with pytest.raises(ConfigError, match="all alike"):
        trainer(eval_samples=2, eval_temperature=0.0)


# rollouts.jsonl

WHOLE: dict[str, Any] = {"progress": False, "rollouts": {"whole": True}}


def rollouts_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{}, DYNAMIC], ids=["plain", "dynamic"])
def test_completions_are_kept_by_group_with_what_they_were_trained_with(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = trainer(tmp_path, **options, logging={"progress": False, "rollouts": {"groups": None}})
    run.train()
    found = rollouts_of(tmp_path)
    data = {number: row["prompt"] for number, row in enumerate(rows())}
    for step, first in ((0, 0), (4, 4)):
        mine = [row for row in found if row["step"] == step]
        assert len({(row["place"], row["sample"]) for row in mine}) == len(mine) >= 32 and len(mine) % 4 == 0
        trained = {row["place"] for row in mine if row["advantage"] is not None}
        windows = [window.batch for _, window in run.made[first : first + 2]]
        assert trained == {place for batch in windows for place in batch.places}
        for batch in windows:
            for number, owner in enumerate(batch.owner.tolist()):
                (row,) = [
                    row for row in mine if row["place"] == batch.places[owner] and row["sample"] == number - 4 * owner
                ]
                assert (
                    row["advantage"] == float(batch["advantages"][number])
                    and row["tokens"] == batch.response_lengths[number]
                )
                assert row["reward"] == float(batch["rewards"][number]) and row["row"] == batch.rows[owner]
                # Only the first of two minibatches was updated by the policy that drew it.
                assert (row["logprob_gap"] is not None) == (batch is windows[0] and row["tokens"] > 0)
        assert all(data[row["row"]] == row["prompt"] for row in mine)
        assert all(row["logprob_gap"] is None or 0 <= row["logprob_gap"] < 1e-4 for row in mine)
        assert all(row["stop_reason"] in ("end", "length") for row in mine)


class FirstWindowIdle(Watched):
    """Has nothing to learn in the first window of each rollout."""

    api = 1
    record = "prompt"

    def windows(self, rollout: Batch, run: Any) -> Any:
        for number, window in enumerate(super().windows(rollout, run)):
            window.batch["differs"].logical_and_(torch.tensor(number > 0))
            yield window


def test_a_rollout_whose_first_window_makes_no_step_is_kept_with_its_second(tmp_path: Path) -> None:
    run = trainer(tmp_path, kind=FirstWindowIdle, max_steps=6, logging=WHOLE)
    run.train()
    found = rollouts_of(tmp_path)
    assert [row["step"] for row in found] == [0] * 32 + [3] * 32
    of_window = [set(window.batch.places) for _, window in run.made]
    for step, second in ((0, of_window[1]), (3, of_window[5])):
        assert second == {row["place"] for row in found if row["step"] == step and row["logprob_gap"] is not None}
    assert ["logprob_gap" in row for row in metrics_of(tmp_path)] == [True, False, False] * 2


def test_how_much_of_rollouts_is_kept_is_bounded_and_some_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="rlhf_core"):
        options: dict[str, Any] = {"progress": False, "rollouts": {"groups": 3}}
        trainer(tmp_path / "few", max_steps=8, logging=options).train()
    found = rollouts_of(tmp_path / "few")
    assert [row["step"] for row in found] == [0] * 12 + [4] * 12 and len({row["place"] for row in found}) == 6
    assert caplog.text.count("completion of some prompts") == 1 and "advantage  tokens  end" in caplog.text
    size = (tmp_path / "few" / "rollouts.jsonl").stat().st_size
    options["rollouts"] = {"groups": 3, "megabytes": size * 0.75 / 1e6}
    trainer(tmp_path / "full", max_steps=8, logging=options).train()
    assert {row["step"] for row in rollouts_of(tmp_path / "full")} == {0} and "aren't kept" in caplog.text
    trainer(tmp_path / "none", max_steps=4, logging={"progress": False, "rollouts": {"groups": 0}}).train()
    assert not (tmp_path / "none" / "rollouts.jsonl").exists()
    with pytest.raises(ConfigError, match="`whole` keeps every group"):
        trainer(logging={"rollouts": {"groups": 3, "whole": True}})


def test_a_resumed_run_continues_its_rollouts_without_double_rows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 16, "checkpoint": {"every": 4}}
    trainer(tmp_path / "whole", **options).train()
    broken = trainer(tmp_path / "broken", **options)
    broken.fail_at = 10
    with pytest.raises(Broken):
        broken.train()
    path = tmp_path / "broken" / "rollouts.jsonl"
    assert rollouts_of(tmp_path / "broken")[-1]["step"] == 8
    with path.open("a") as file:
        file.write('{"step": 8, "ro')  # a kill in the middle of a line
    trainer(tmp_path / "broken", **options).train(resume=True)
    assert path.read_text() == (tmp_path / "whole" / "rollouts.jsonl").read_text()
    assert {row["step"] for row in rollouts_of(tmp_path / "broken")} == {0, 4, 8, 12}


# Replay


@pytest.mark.parametrize("options", [KL, {**DYNAMIC, "generation": {"max_new_tokens": 8, "top_p": 0.9}}])
def test_rollouts_that_were_kept_whole_give_the_same_updates_bit_for_bit(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer(tmp_path / "first", **options, logging=WHOLE)
    first.train()

    def generate(*_: Any, **__: Any) -> Any:
        raise AssertionError("a replay draws nothing")

    monkeypatch.setattr(Engine, "generate", generate)
    again = trainer(tmp_path / "again", **options, logging=WHOLE, replay=str(tmp_path / "first"))
    again.train()
    assert {*weights_of(again)} == {*weights_of(first)}
    assert all(torch.equal(value, weights_of(first)[name]) for name, value in weights_of(again).items())
    assert metrics_of(tmp_path / "again") == metrics_of(tmp_path / "first")
    assert (tmp_path / "again" / "rollouts.jsonl").read_bytes() == (tmp_path / "first" / "rollouts.jsonl").read_bytes()


def test_a_replay_under_another_loss_takes_the_completions_and_other_rewards_score_them_again(tmp_path: Path) -> None:
    trainer(tmp_path / "first", max_steps=4, logging=WHOLE).train()
    # Without the second reward's weight.
    trainer(
        tmp_path / "other",
        max_steps=4,
        logging=WHOLE,
        replay=str(tmp_path / "first"),
        rewards=["online_rewards:digits"],
    ).train()
    before, now = rollouts_of(tmp_path / "first"), rollouts_of(tmp_path / "other")
    assert [row["drawn"] for row in now] == [row["drawn"] for row in before]
    assert [row["reward"] for row in now] == pytest.approx([row["rewards"]["digits"] for row in before])
    assert all(row["rewards"].keys() == {"digits"} for row in now)


def test_what_can_not_be_replayed_says_why(tmp_path: Path) -> None:
    trainer(tmp_path / "some", max_steps=4).train()
    with pytest.raises(ConfigError, match=r"kept no whole rollouts.*logging\.rollouts\.whole"):
        trainer(replay=str(tmp_path / "some")).train()
    with pytest.raises(StorageError, match="is not a run's directory"):
        trainer(replay=str(tmp_path / "none")).train()
    trainer(tmp_path / "first", max_steps=4, logging=WHOLE).train()
    with pytest.raises(ConfigError, match=r"drawn in another way.*temperature"):
        trainer(replay=str(tmp_path / "first"), generation={"max_new_tokens": 8, "temperature": 0.5}).train()
    with pytest.raises(ConfigError, match=r"step 4, row \d+: the run kept no rollout to replay here"):
        trainer(replay=str(tmp_path / "first"), max_steps=8).train()
    with pytest.raises(ConfigError, match=r"completion 5 of 5 isn't there"):
        trainer(replay=str(tmp_path / "first"), group_size=5, max_steps=4).train()
    with pytest.raises(ConfigError, match=r"the prompt there has other tokens"):
        trainer(replay=str(tmp_path / "first"), data=list(reversed(rows())), max_steps=4).train()
