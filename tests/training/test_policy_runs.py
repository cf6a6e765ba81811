"""The loop with the real policy, data and methods, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_plugins.trainers.dpo import DPOConfig, DPOTrainer
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss
from rlhf_core.infra.errors import ModelError, NumbersError, RLHFError
from rlhf_core.infra.safetensors_file import read_tensors
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny
from rlhf_core.training.logger import without_timing

PAIRS = [{"prompt": f"{i} + {i} = ", "chosen": str(2 * i), "rejected": str(2 * i + 1) * (1 + i % 3)} for i in range(16)]
BASE: dict[str, Any] = {"batch_size": 4, "max_steps": 4, "max_length": 64, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", layers=2, hidden=32)


def dpo(model: Path, output: Path | None = None, *, kind: type[DPOTrainer] = DPOTrainer, **options: Any) -> DPOTrainer:
    config = DPOConfig.parse({**BASE, **options})
    return kind(config, model=model, data=PAIRS, eval_data=PAIRS[:8], output=output)


def rows(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [without_timing(line) for line in lines]


class Crashing(DPOTrainer):
    crash = True

    def loss(self, batch: Batch) -> Loss:
        if self.crash and self.config.seed == 1 and self.policy.training and self._steps() == 3:
            raise KeyboardInterrupt
        return super().loss(batch)

    def _steps(self) -> int:
        assert self.output is not None
        path = self.output / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("lora", "reference"), [(None, "copy"), (None, "precompute"), ({"rank": 4, "dropout": 0.1}, "adapter_off")]
)
def test_dpo_starts_at_log_two_and_resumes_exactly(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any, reference: str
) -> None:
    options: dict[str, Any] = {"lora": lora, "reference": reference, "seed": 1, "checkpoint": {"every": 2}}
    with pytest.raises(KeyboardInterrupt):
        dpo(model, tmp_path / "a", kind=Crashing, **options).train()
    monkeypatch.setattr(Crashing, "crash", False)
    dpo(model, tmp_path / "a", kind=Crashing, **options).train(resume=True)
    scores = dpo(model, tmp_path / "b", kind=Crashing, **options).train().eval_metrics
    # Eight held-out pairs of eight prompts.
    right = scores["eval_accuracy"]
    assert scores["eval_accuracy_se"] == pytest.approx(math.sqrt(right * (1 - right) / 7), abs=1e-9)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "b")[-1]["loss"] < math.log(2)
    if not lora:  # Dropout moves an adapter's first loss off the reference's, which is scored without it.
        assert rows(tmp_path / "b")[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    saved = read_tensors(tmp_path / "b" / "checkpoints" / "step-4" / "model.safetensors")
    if lora:
        assert saved and all("lora_" in name for name in saved)
        assert (tmp_path / "b" / "model" / "adapter_model.safetensors").exists()
    else:
        assert not [name for name in saved if name.endswith("lm_head.weight")]  # Tied: stored once.


def test_an_adapter_that_was_trained_is_no_fresh_one(model: Path, tmp_path: Path) -> None:
    """A second run on the same model in memory refers to what it was passed, not to the base below."""
    policy = PolicyModel.from_pretrained(model)
    first = DPOTrainer(DPOConfig.parse({**BASE, "lora": {"rank": 4}}), model=policy, data=PAIRS)
    first.train()
    assert first.reference.mode == "adapter_off"
    config = DPOConfig.parse({**BASE, "lora": {"rank": 4}})
    second = DPOTrainer(config, model=policy, data=PAIRS, output=tmp_path / "run")
    second.train()
    assert second.reference.mode == "copy"
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_sft_learns_and_what_it_saves_can_be_loaded(model: Path, tmp_path: Path, precision: str) -> None:
    data = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
    options = {**BASE, "max_steps": 20, "precision": precision}
    config = SFTConfig.parse({**options, "eval_steps": 10})
    result = SFTTrainer(config, model=model, data=data, eval_data=data, output=tmp_path / "run").train()
    begin = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[1])
    assert begin["event"] == "evaluated" and begin["step"] == 0
    assert result.eval_metrics["eval_loss"] < 0.7 * begin["metrics"]["eval_loss"]
    again = PolicyModel.from_pretrained(result.model_dir or "")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    trained = SFTTrainer(SFTConfig.parse(options), model=again, data=data)
    assert trained.train().metrics["loss"] < 0.7 * begin["metrics"]["eval_loss"]


def test_memory_that_runs_out_in_experience_is_reported(model: Path) -> None:
    class Hungry(DPOTrainer):
        def experience(self, stream: Any, run: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")
            yield

    with pytest.raises(NumbersError, match="out of memory while the method made its experience") as caught:
        dpo(model, kind=Hungry).train()
    assert caught.value.exit_code == 6 and isinstance(caught.value, RLHFError)


@pytest.mark.parametrize("every", [0, 2])
def test_streamed_epochs_of_a_scored_reference_resume_exactly(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Scoring the reference counts the rows; a resume reads the scores back and must still know how many there are."""
    options: dict[str, Any] = {
        "max_steps": None, "epochs": 1.25, "dataset": {"streaming": True, "shuffle_block": 8}, "reference": "precompute",
        "checkpoint": {"every": every}, "seed": 1,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        dpo(model, tmp_path / "a", kind=Crashing, **options).train()
    monkeypatch.setattr(Crashing, "crash", False)
    result = dpo(model, tmp_path / "a", kind=Crashing, **options).train(resume=True)
    dpo(model, tmp_path / "b", kind=Crashing, **options).train()
    assert result.step == 5 and rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_resume_with_another_model_in_memory_is_refused(model: Path, tmp_path: Path) -> None:
    def train(policy: PolicyModel, steps: int, *, resume: bool) -> None:
        config = SFTConfig.parse({**BASE, "max_steps": steps, "lr_schedule": "constant", "checkpoint": {"every": 1}})
        data = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
        SFTTrainer(config, model=policy, data=data, output=tmp_path / "run").train(resume=resume)

    train(PolicyModel.from_pretrained(model), 2, resume=False)
    # The same weights go on, whatever object holds them.
    train(PolicyModel.from_pretrained(model), 2, resume=True)
    changed = PolicyModel.from_pretrained(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.5)
    with pytest.raises(ModelError, match=r"files of the model `policy` changed since .*; got weights in memory"):
        train(changed, 2, resume=True)
