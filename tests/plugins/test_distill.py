"""Distillation: its divergences by hand, in float64 and in TRL, its loss in any chunks, on given responses and on its own."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from batches import random_batch, relative
from rlhf_plugins.trainers import distill
from rlhf_plugins.trainers.distill import (
    DistillationConfig,
    DistillationTrainer,
    compared,
    forward_kl,
    jensen_shannon,
    reverse_kl,
)
from torch import Tensor
from trainers_helpers import assert_refused, built, small_policy

from rlhf_core.infra.errors import ConfigError, ModelError, NumbersError
from rlhf_core.models import PolicyModel, logprobs
from rlhf_core.testing import TrainerContract
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, metrics_of, require_same_run
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Workbench

TASK = ArithmeticTask(terms=2, digits=1, wrong=0.0)
ROWS = list(TASK.rows("sft", 24))
PROMPTS = [{"prompt": row["prompt"], "answer": row["response"]} for row in ROWS]
HELD_OUT = list(TASK.rows("sft", 8, split="test"))
QUICK: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 3e-3,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "max_length": 64,
    "logging": {"progress": False},
}
SHORT = {"max_new_tokens": 6}

NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=0.3),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, wider than the student and of one layer more."""
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=9, hidden=48, heads=2, kv_heads=1, layers=3)


def run_of(teacher: Path, output: Path | None = None, kind: Any = DistillationTrainer, **given: Any) -> Any:
    """Return a trainer of the small policy; arguments of the trainer by name, the others are options."""
    own = {name: given.pop(name) for name in ("data", "eval_data", "rewards") if name in given}
    config = DistillationConfig.parse({**QUICK, "teacher": str(teacher), **given})
    return kind(config, model=small_policy(), output=output, **{"data": ROWS, **own})


# The divergences


def test_by_hand() -> None:
    """Teacher (½, ½), student (¼, ¾), m = (⅜, ⅝): KL(p‖q) = ½ ln 4/3, KL(q‖p) = ¼ ln ½ + ¾ ln 3/2."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(forward_kl(student, teacher)) == pytest.approx(math.log(4 / 3) / 2, abs=1e-6)  # 0.143841
    assert float(reverse_kl(student, teacher)) == pytest.approx(math.log(0.5) / 4 + 0.75 * math.log(1.5), abs=1e-6)
    of_teacher = math.log(4 / 3) / 2 + math.log(4 / 5) / 2
    of_student = math.log(2 / 3) / 4 + 3 * math.log(6 / 5) / 4
    half = float(jensen_shannon(student, teacher, beta=0.5))
    assert half == pytest.approx((of_teacher + of_student) / 2, abs=1e-6)  # 0.033822


def logits_pair(dtype: torch.dtype = torch.float32, rows: int = 6, width: int = 40) -> tuple[Tensor, Tensor]:
    """Return logits (rows, width) of a student and a teacher, the student's with gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def in_numpy(student: np.ndarray, teacher: np.ndarray, name: str, beta: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Return a divergence (S,) and its gradient by the student's logits (S, V), each written out in probabilities.

    By a log-probability log q the derivatives are −p, q (log q − log p + 1) and (1 − β) q log(q / m); those of a function f by
    logits are g − q Σ g for its derivatives g by log q.
    """
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))
    m = beta * p + (1 - beta) * q
    if name == "forward_kl":
        value, by_logq = p * np.log(p / q), -p
    elif name == "reverse_kl":
        value, by_logq = q * np.log(q / p), q * (np.log(q / p) + 1)
    else:
        value = beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)
        by_logq = (1 - beta) * q * np.log(q / m)
    return value.sum(-1), by_logq - q * by_logq.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", NAMED)
def test_values_and_gradients_equal_float64(name: str) -> None:
    student, teacher = logits_pair()
    value, gradient = in_numpy(student.detach().double().numpy() / 2, teacher.double().numpy() / 2, name)
    found = compared(student, teacher, divergence=NAMED[name], temperature=2.0)
    found[:, 0].sum().backward()
    assert relative(found[:, 0].detach().double(), torch.from_numpy(value)) < 1e-6
    assert student.grad is not None and relative(student.grad.double(), torch.from_numpy(gradient / 2)) < 1e-6
    same = student.argmax(-1) == teacher.argmax(-1)
    assert torch.equal(found[:, 1].detach() == 1, same)


@pytest.mark.parametrize("name", NAMED)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    student, _ = logits_pair(torch.float64)
    found = compared(student, student.detach(), divergence=NAMED[name], temperature=1.0)
    found[:, 0].sum().backward()
    assert float(found[:, 0].detach().abs().max()) < 1e-12 and bool((found[:, 1] == 1).all())
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-12


def test_jensen_shannon_at_the_ends_of_beta() -> None:
    """Divided by β or 1 − β it tends to the two KLs, which it is at 0 and 1; at ½ it is symmetric and at most ln 2."""
    student, teacher = (x.detach().log_softmax(-1) for x in logits_pair(torch.float64))
    for end, near, whole in ((0.0, 1e-9, forward_kl), (1.0, 1 - 1e-9, reverse_kl)):
        expected = whole(student, teacher)
        assert torch.equal(jensen_shannon(student, teacher, beta=end), expected)
        assert torch.allclose(jensen_shannon(student, teacher, beta=near) / 1e-9, expected, rtol=1e-3)
    half = jensen_shannon(student, teacher, beta=0.5)
    assert torch.allclose(half, jensen_shannon(teacher, student, beta=0.5))
    assert bool((half > 0).all()) and bool((half < math.log(2)).all())


@pytest.mark.parametrize("name", NAMED)
def test_padded_tables_and_masked_tokens(name: str) -> None:
    """Rows that only one model's table has don't count, and a token that both models mask gives no NaN."""
    student, teacher = logits_pair()
    options: Any = {"divergence": NAMED[name], "temperature": 1.0}
    narrow = teacher[:, :37]
    assert torch.equal(compared(student, narrow, **options), compared(student[:, :37], narrow, **options))
    masked = torch.zeros(40)
    masked[4] = -torch.inf
    found = compared(student + masked, teacher + masked, **options)
    found[:, 0].sum().backward()
    assert student.grad is not None and bool(found.isfinite().all()) and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", NAMED)
def test_a_token_that_the_teacher_alone_masks(name: str, teacher: Path) -> None:
    """It makes the reverse divergence infinite, which is refused, and no other."""
    made, batch = built(DistillationTrainer, teacher=str(teacher), divergence=name), random_batch(4, 1)
    logits = made.teacher.logits

    def masking(states: Tensor) -> Tensor:
        found = logits(states).clone()
        found[..., 4] = -torch.inf
        return found

    made.teacher.logits = masking  # type: ignore[method-assign]
    if name == "reverse_kl":
        with pytest.raises(
            NumbersError, match=r"the divergence is infinite: one model gives no probability to a token"
        ):
            made.loss(batch)
    else:
        assert bool(made.loss(batch).terms["divergence"].isfinite())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_equals_trl(beta: float, teacher: Path) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL isn't installed (extra `oracles`)")
    options = {"divergence": "jensen_shannon", "beta": beta, "temperature": 1.5}
    made, batch = built(DistillationTrainer, teacher=str(teacher), **options), random_batch(4, 1, masked=True)
    loss = made.loss(batch).terms["divergence"] / made.weights(batch)["divergence"]
    tables = [
        model.logits(model.hidden_states(batch, drop_last=True).predicting())[None]
        for model in (made.policy, made.teacher)
    ]
    labels = torch.zeros(tables[0].shape[:2], dtype=torch.long)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(*tables, labels=labels, beta=beta, temperature=1.5)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


# The loss of a batch


@pytest.mark.parametrize("average", ["token", "response"])
def test_what_the_loss_is_a_mean_over(average: str, teacher: Path) -> None:
    """Against whole float64 models, their logits in one table."""
    made = built(DistillationTrainer, teacher=str(teacher), average=average)
    batch = random_batch(3, 2, masked=True)
    loss = made.loss(batch)
    student, other = (copy.deepcopy(model).double() for model in (made.policy, made.teacher))
    per_response = []
    for response, owner in enumerate(batch.owner.tolist()):
        prompt = batch.prompt_ids[owner, : int(batch.prompt_lengths[owner])]
        ids = torch.cat([prompt, batch.response_ids[response, : int(batch.response_lengths[response])]])
        rows = len(prompt) - 1 + batch.loss_mask[response].nonzero()[:, 0]
        q, p = (model.causal_lm(ids[None]).logits[0, rows].log_softmax(-1) for model in (student, other))
        per_response.append((p.exp() * (p - q)).sum(-1))
    means = [values.mean() for values in per_response if len(values)]
    expected = torch.cat(per_response).mean() if average == "token" else torch.stack(means).mean()
    found = loss.terms["divergence"] / made.weights(batch)["divergence"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    total, count = loss.metrics["divergence"]
    assert isinstance(total, Tensor) and isinstance(count, Tensor) and total.shape == count.shape == (3,)
    assert float(total.sum() / count.sum()) == pytest.approx(torch.cat(per_response).mean().item(), rel=1e-5)


def test_no_more_logits_than_a_chunk_exist_at_once(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 8 rows of both tables no larger one is compared, and loss and gradient stay what they are."""
    bench = Workbench(run_of(teacher))
    window = bench.window()
    expected, seen = bench.step(window), []

    def noting(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append(len(student))
        return forward_kl(student, teacher)

    monkeypatch.setattr(DistillationTrainer, "_divergence", property(lambda self: noting))
    monkeypatch.setattr(logprobs, "CPU_CHUNK_BYTES", 8 * 4 * 2 * 263)
    found = bench.step(window)
    # Each row is compared twice, the second time for the backward pass.
    assert max(seen) == 8 and sum(seen) == 2 * window.num_loss_tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert max(relative(found.gradient[name], value) for name, value in expected.gradient.items()) < 1e-5


# The kit


class Kit(TrainerContract):
    """The conformance kit with a teacher by path, and a method's options."""

    method = "distill"
    own: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def by_path(self, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "options", {"teacher": str(teacher), **self.own})


class TestOnResponses(Kit):
    """On the data's responses."""

    @pytest.mark.slow
    def test_every_option_does_something(self) -> None:
        super().test_every_option_does_something()


@pytest.mark.slow
class TestOnOwnCompletions(Kit):
    """On completions of the student, from rows that are prompts alone."""

    own: ClassVar = {"on_policy": 1.0, "prompts_only": True, "divergence": "jensen_shannon"}


# Runs


def test_the_steps_are_mixed_as_asked_and_resume_bit_for_bit(tmp_path: Path, teacher: Path) -> None:
    options = {"on_policy": 0.5, "generation": SHORT, "group_size": 2, "max_steps": 7, "checkpoint": {"every": 3}}
    kind = interruptible(DistillationTrainer)
    run_of(teacher, tmp_path / "whole", kind, **options).train()
    broken = run_of(teacher, tmp_path / "broken", kind, **options)
    broken.stop_after = 4
    with pytest.raises(StoppedEarly):
        broken.train()
    run_of(teacher, tmp_path / "broken", kind, **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")
    assert {row["on_policy"] for row in metrics_of(tmp_path / "whole")} == {0.0, 1.0}


def test_several_windows_of_own_completions(teacher: Path) -> None:
    """Two passes in two minibatches are four windows on the same completions, of which the last alone allows a checkpoint."""
    options = {"on_policy": 1.0, "generation": SHORT, "group_size": 3, "rollout_epochs": 2, "minibatches": 2}
    bench = Workbench(run_of(teacher, **options))
    made = list(islice(bench.windows(), 4))
    assert [window.last for window in made] == [False, False, False, True]
    assert [window.batch.num_responses for window in made] == [6] * 4
    rows = [row for window in made for row in window.batch.rows]
    assert sorted(rows[:4]) == sorted(rows[4:]) and len(set(rows)) == 4


def test_held_out_rows_are_compared_on_their_responses(tmp_path: Path, teacher: Path) -> None:
    run = run_of(teacher, tmp_path / "run", max_steps=30, eval_steps=30, learning_rate=1e-2, eval_data=HELD_OUT)
    run.train()
    events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    start, end = (event["metrics"] for event in events if event["event"] == "evaluated")
    assert end["eval_loss"] == pytest.approx(end["eval_divergence"]) and end["eval_divergence_se"] > 0
    assert end["eval_divergence"] < start["eval_divergence"] / 2
    assert end["eval_same_token"] > start["eval_same_token"]


def answers(completions: list[str], answer: list[str]) -> list[float]:
    """Return the share of each row's answer's characters that its completion has: any column reaches a reward."""
    return [
        sum(letter in text for letter in right) / len(right) for text, right in zip(completions, answer, strict=True)
    ]


def test_prompts_alone_suffice_for_own_completions(tmp_path: Path, teacher: Path) -> None:
    """Rewards are reported, of training's completions and of held-out prompts', and change no weight."""
    options = {"on_policy": 1.0, "prompts_only": True, "generation": SHORT, "max_steps": 3, "data": PROMPTS}
    plain, scored = (
        run_of(teacher, tmp_path / name, eval_data=PROMPTS[:4], **options, **rewards)
        for name, rewards in (("plain", {}), ("scored", {"rewards": [answers]}))
    )
    without, found = plain.train(), scored.train()
    assert 0 <= found.metrics["reward"] <= 1 and "eval_reward_se" in found.eval_metrics
    assert "reward" not in without.metrics and found.eval_metrics["eval_divergence"] > 0
    for (name, one), (_, other) in zip(plain.models.named_parameters(), scored.models.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """The message names both models, and the first id that means another token."""
    other = tiny_tokenizer()
    other.add_tokens(["<|more|>"])
    other_path = save_tiny(tmp_path / "other", tokenizer=other, vocab_size=264)
    student = tmp_path / "student"
    PolicyModel(tiny_model(), tiny_tokenizer()).save_pretrained(student)
    with pytest.raises(ModelError) as caught:
        built(DistillationTrainer, model=str(student), teacher=str(other_path))
    line = str(caught.value)
    assert str(other_path) in line and f"264 tokens, 263 in {student}" in line
    assert f"id 263 is '<|more|>', no token in {student}" in line


def test_the_students_own_completions_may_be_chosen_by_a_sampler(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = {"name": "best_of_n", "options": {"candidates": 4, "choose": "majority"}}
    run_of(teacher, tmp_path, on_policy=1.0, rollout_sampler=sampler, generation=SHORT, max_steps=1).train()
    (row,) = metrics_of(tmp_path)
    assert row["forwarded/policy"] > 4 * row["length"] / 2
    assert "chooses completions" not in caplog.text  # a divergence holds on any text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "teacher"),
        ({"teacher": "x", "beta": 0.3}, "beta has no meaning with divergence forward_kl"),
        ({"teacher": "x", "beta": 1.3, "divergence": "jensen_shannon"}, "beta"),
        ({"teacher": "x", "prompts_only": True, "on_policy": 0.5}, "prompts_only needs `on_policy: 1`"),
        ({"teacher": "x", "group_size": 4}, "group_size has no meaning without on_policy"),
        ({"teacher": "x", "rollout_sampler": "generate"}, "rollout_sampler has no meaning without on_policy"),
        ({"teacher": {"path": "x", "lora": {}}}, "teacher.lora"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(DistillationConfig, options, message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generation": {"top_k": 3}}, "nothing is generated"),
        ({"eval_sampler": "generate", "eval_data": HELD_OUT}, "without rewards no held-out completions are drawn"),
        ({"on_policy": 1.0, "rollout_sampler": "best_of_n"}, "nothing is given for the sampler's role `reward`"),
        ({"rewards": [answers]}, "rewards are reported of the student's own completions"),
    ],
)
def test_what_nothing_would_use_is_refused(given: dict[str, Any], message: str, teacher: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(teacher, max_steps=1, **given).train()


def test_every_divergence_is_an_option() -> None:
    """The options name the functions that the tests above compare."""
    assert set(distill.Divergence.__args__) == NAMED.keys()  # type: ignore[attr-defined]
