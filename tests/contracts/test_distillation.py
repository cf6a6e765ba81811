"""Distillation from a frozen teacher given by path: it learns, resumes bit for bit, and learns the same however it is cut."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import relative
from distillation import DIVERGENCES, DistillationConfig, DistillationTrainer, compared
from processes import train
from safetensors.torch import load_file
from torch import Tensor

from rlhf_core import registry
from rlhf_core.cli import main
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, logprobs
from rlhf_core.testing import TrainerContract, simulate
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, metrics_of, require_same_run
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Workbench
from rlhf_core.training.distribution import Distribution

SMALL: dict[str, Any] = {"hidden": 32, "heads": 2, "kv_heads": 1}
TASK = ArithmeticTask(terms=2, digits=1, wrong=0.0)
ROWS = list(TASK.rows("sft", 48))
HELD_OUT = list(TASK.rows("sft", 12, split="test"))

OPTIONS: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 3e-3,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "max_length": 64,
    "logging": {"progress": False},
    # The first steps of AdamW go by a gradient's sign, which rounding decides where it is near 0; so large an ε goes by its size.
    "optimizer": {"epsilon": 1e-2},
}
OWN: dict[str, Any] = {"on_policy": 0.5, "generation": {"max_new_tokens": 6}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the task's form, wider than the student and of one layer more."""
    folder = tmp_path_factory.mktemp("teacher")
    start = save_tiny(folder / "start", seed=9, hidden=48, heads=2, kv_heads=1, layers=3)
    sft = registry.get("trainer", "sft")
    options = OPTIONS | {"max_steps": 60, "batch_size": 16, "optimizer": {}, "learning_rate": 1e-2}
    sft(sft.Config.parse(options), model=start, data=ROWS, output=folder / "run").train()
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def student() -> PolicyModel:
    return PolicyModel(tiny_model(**SMALL), tiny_tokenizer())


def trainer_of(
    student: PolicyModel, teacher: Any, output: Path | None = None, kind: Any = DistillationTrainer, **options: Any
) -> DistillationTrainer:
    config = DistillationConfig.parse({**OPTIONS, "teacher": teacher, **options})
    return kind(config, model=copy.deepcopy(student), data=ROWS, output=output)


# The maths, by hand


def test_divergences_by_hand() -> None:
    """Teacher (½, ½), student (¼, ¾), m = (⅜, ⅝): KL(p‖q) = ½ ln 4/3, KL(q‖p) = ¼ ln ½ + ¾ ln 3/2."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    of_mixture = [math.log(4 / 3) / 2 + math.log(4 / 5) / 2, math.log(2 / 3) / 4 + 3 * math.log(6 / 5) / 4]
    expected = {
        "forward_kl": math.log(4 / 3) / 2,  # 0.143841
        "reverse_kl": math.log(0.5) / 4 + 3 * math.log(1.5) / 4,  # 0.130812
        "jensen_shannon": sum(of_mixture) / 2,  # 0.033822
    }
    assert expected.keys() == DIVERGENCES.keys()
    for name, function in DIVERGENCES.items():
        assert float(function(student, teacher, 0.5)) == pytest.approx(expected[name], abs=1e-6)
        assert float(function(teacher, teacher, 0.5)) == pytest.approx(0.0, abs=1e-7)


def test_jensen_shannon_lies_between_both_kls() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 20, generator=generator, dtype=torch.float64).log_softmax(-1)
    for beta, name in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        found = DIVERGENCES["jensen_shannon"](q, p, beta) / min(beta, 1 - beta)
        assert torch.allclose(found, DIVERGENCES[name](q, p, 0.5), rtol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padded_vocabularies_and_tokens_left_out(divergence: Any) -> None:
    """Rows that only one model's table has don't count, and a token that both leave out gives no NaN."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(3, 12, generator=generator), torch.randn(3, 10, generator=generator)
    options: Any = {"divergence": divergence, "beta": 0.5, "temperature": 2.0}
    assert torch.equal(compared(student, teacher, **options), compared(student[:, :10], teacher, **options))
    student[:, 4] = teacher[:, 4] = -torch.inf
    student.requires_grad_()
    found = compared(student, teacher, **options)
    found[:, 0].sum().backward()
    assert bool(found.isfinite().all()) and bool(student.grad.isfinite().all())  # type: ignore[union-attr]


# The kit


class TestDistillation(TrainerContract):
    trainer = DistillationTrainer

    @pytest.fixture(autouse=True)
    def by_path(self, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "options", OPTIONS | {"teacher": str(teacher), "optimizer": {}})


# It learns


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("divergence", "own", "factor"),
    [
        ("forward_kl", 0.0, 8),
        pytest.param("reverse_kl", 0.0, 2.5, marks=SLOW),
        pytest.param("jensen_shannon", 0.0, 4, marks=SLOW),
        pytest.param("reverse_kl", 1.0, 1.8, marks=SLOW),
    ],
)
def test_it_learns(
    tmp_path: Path, student: PolicyModel, teacher: Path, divergence: str, own: float, factor: float
) -> None:
    """The divergence on held-out rows falls by a factor in 60 steps, and both have the same token most likely far more often."""
    options = {"divergence": divergence, "max_steps": 60, "batch_size": 16, "eval_steps": 60, "learning_rate": 1e-2}
    options |= {"on_policy": own, "generation": {"max_new_tokens": 12}} if own else {}
    trainer = trainer_of(student, str(teacher), tmp_path / "run", optimizer={}, **options)
    trainer.eval_data = HELD_OUT
    trainer.train()
    events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    start, end = (event["metrics"] for event in events if event["event"] == "evaluated")
    assert end["eval_loss"] < start["eval_loss"] / factor
    assert start["eval_same_token"] < 0.05 and end["eval_same_token"] > 0.3
    assert {row["on_policy"] for row in metrics_of(tmp_path / "run")} == {own}


# The same weights, however it is cut


def learned(bench: Workbench) -> Tensor:
    """Train on three windows; return by how much each weight moved."""
    start = [parameter.detach().clone() for parameter in bench.parameters.values()]
    for window in islice(bench.windows(), 3):
        bench.train_step(window.batch)
        bench.steps += 1
    return torch.cat([(p.detach() - q).flatten() for p, q in zip(bench.parameters.values(), start, strict=True)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_are_the_same_for_any_micro_batch(student: PolicyModel, teacher: Path, divergence: str) -> None:
    whole, *cut = (
        learned(Workbench(trainer_of(student, str(teacher), divergence=divergence, **OWN, **options)))
        for options in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"batching": {"layout": "padded"}})
    )
    for found in cut:
        assert float(whole.norm()) > 1e-3 and relative(found, whole) < 1e-5


def test_weights_are_the_same_for_two_processes(student: PolicyModel, teacher: Path) -> None:
    def work(distribution: Distribution) -> Tensor:
        return learned(Workbench(trainer_of(student, str(teacher), **OWN), distribution))

    expected = work(Distribution(torch.device("cpu")))
    for found in simulate(2, work):
        assert relative(found, expected) < 1e-5


def test_no_more_than_a_few_rows_of_logits_exist_at_once(
    student: PolicyModel, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for 8 rows of both tables, no larger one is compared, and loss and gradient stay what they are."""
    bench = Workbench(trainer_of(student, str(teacher)))
    window = bench.window()
    expected, seen = bench.step(window), []
    whole = DIVERGENCES["forward_kl"]

    def noting(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        seen.append(len(student))
        return whole(student, teacher, beta)

    monkeypatch.setitem(DIVERGENCES, "forward_kl", noting)
    monkeypatch.setattr(logprobs, "CPU_CHUNK_BYTES", 8 * 4 * 2 * 263)
    found = bench.step(window)
    # Each is computed twice, the second time for the backward pass.
    assert max(seen) == 8 and sum(seen) == 2 * window.num_loss_tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert max(relative(found.gradient[name], value) for name, value in expected.gradient.items()) < 1e-5


# A run


@pytest.mark.parametrize("own", [{}, OWN])
def test_a_run_resumes_bit_for_bit(tmp_path: Path, student: PolicyModel, teacher: Path, own: dict[str, Any]) -> None:
    options = {"max_steps": 7, "checkpoint": {"every": 3}, "optimizer": {}} | own
    kind = interruptible(DistillationTrainer)
    trainer_of(student, str(teacher), tmp_path / "whole", kind, **options).train()
    broken = trainer_of(student, str(teacher), tmp_path / "broken", kind, **options)
    broken.stop_after = 4  # type: ignore[attr-defined]
    with pytest.raises(StoppedEarly):
        broken.train()
    trainer_of(student, str(teacher), tmp_path / "broken", kind, **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")
    if own:
        assert {row["on_policy"] for row in metrics_of(tmp_path / "whole")} == {0.0, 1.0}


def test_only_the_student_is_checkpointed_and_exported(tmp_path: Path, student: PolicyModel, teacher: Path) -> None:
    trainer = trainer_of(student, str(teacher), tmp_path / "run", max_steps=1)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("model")) == [
        "model", "models.json"
    ]  # fmt: skip
    state = load_file(next((tmp_path / "run" / "checkpoints").glob("step-*/model*.safetensors")))
    assert state and all(name.startswith("policy.") for name in state)
    models = json.loads((tmp_path / "run" / "models.json").read_text())
    assert models["teacher"]["source"] == str(teacher) and "model.safetensors" in models["teacher"]["files"]
    assert models["teacher"]["trainable"] == 0


@pytest.mark.parametrize("run", [{"teacher": {"precision": "bf16"}}, {"precision": "bf16"}])
def test_a_teacher_in_half_precision(student: PolicyModel, teacher: Path, run: dict[str, Any]) -> None:
    """Beside a student in float32, or with it: loss and gradient stay near those of float32."""
    exact, bench = (
        Workbench(trainer_of(student, {"path": str(teacher)} | options.pop("teacher", {}), **options))
        for options in ({}, dict(run))
    )
    window = exact.window()
    expected, found = exact.step(window), bench.step(window)
    weight = bench.trainer.models["teacher"].network.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16 and found.loss == pytest.approx(expected.loss, rel=0.01)
    assert {gradient.dtype for gradient in found.gradient.values()} == {torch.float32}
    assert all(relative(found.gradient[name], value) < 0.1 for name, value in expected.gradient.items())


@pytest.fixture
def registered() -> Iterator[None]:
    registry.register("trainer", "distillation", DistillationTrainer)
    yield
    registry.unregister("trainer", "distillation")


@pytest.mark.parametrize("way", ["--teacher", "--teacher.path", "text", "group"])
def test_the_teacher_by_flag_and_by_file(
    tmp_path: Path, student: PolicyModel, teacher: Path, way: str, registered: None, capsys: pytest.CaptureFixture[str]
) -> None:
    student.save_pretrained(tmp_path / "student")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    run = {"model": tmp_path / "student", "data": tmp_path / "rows.jsonl", "output": tmp_path / "run", "max_steps": 1}
    if way.startswith("--"):
        flags = [text for name, value in run.items() for text in (f"--{name}", str(value))]
        command = ["train", "distillation", *flags, way, str(teacher)]
    else:
        stated = f"teacher: {teacher}" if way == "text" else f"teacher:\n  path: {teacher}"
        lines = ["method: distillation", *(f"{name}: {value}" for name, value in run.items()), stated]
        (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
        command = ["train", str(tmp_path / "run.yaml")]
    assert main([*command, "--dry-run"]) == 0
    assert f"# teacher: directory {teacher}" in capsys.readouterr().out
    assert main(command) == 0
    models = json.loads((tmp_path / "run" / "models.json").read_text())
    assert models["teacher"]["source"] == str(teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "teacher"),
        ({"teacher": "x", "beta": 0.3}, "beta has no meaning with divergence forward_kl"),
        ({"teacher": "x", "generation": {"top_k": 3}}, "generation has no meaning without on_policy"),
        ({"teacher": {"path": "x", "lora": {}}}, "teacher.lora"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(**options)


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path: Path, teacher: Path) -> None:
    """Real processes: weights that differ by rounding alone."""
    options = OPTIONS | OWN | {"teacher": str(teacher), "max_steps": 4, "save_precision": "float32"}
    one, two = (
        train("distillation:DistillationTrainer", options, tmp_path / str(count), count=count, model=SMALL)
        for count in (1, 2)
    )
    for row, same_row in zip(metrics_of(two), metrics_of(one), strict=True):
        assert row == pytest.approx(same_row, rel=1e-3, abs=1e-5)
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (two, one))
    assert max(relative(found[name], value) for name, value in expected.items()) < 1e-5
