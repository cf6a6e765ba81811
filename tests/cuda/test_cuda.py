"""On a GPU: the numbers of the CPU, from attention to whole steps and merges, and what only a GPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch
from safetensors.torch import load_file, save_file

from rlhf_core import registry
from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.reward import Sample
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.merging import MergeConfig, ModelMerger
from rlhf_core.models import PolicyModel, RewardModel
from rlhf_core.models.attention import kernel_obstacle, segment_attention, torch_varlen
from rlhf_core.models.fused_norms import fuse_norms
from rlhf_core.models.layout import Segment, Segments
from rlhf_core.models.logprobs import linear_token_logprobs
from rlhf_core.models.segment_attention import attend_in_padded_rows
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from rlhf_core.training.logger import TIMING

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

TRAINERS = ["cpo", "dpo", "kto", "orpo", "process_reward", "reward_model", "sft", "simpo"]
MERGERS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare": {"density": 0.5, "election": "ties"},
    "della": {},
    "breadcrumbs": {},
    "sce": {},
    "model_stock": {},
    "slerp": {},
    "karcher": {},
}
"""Method → options."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", layers=2, hidden=64)


# Once accelerate has taken a device, its process keeps it.
WORKER = """
import json, sys
from rlhf_core import registry
from rlhf_core.testing.arithmetic_task import ArithmeticTask
method, model, output, options = sys.argv[1:]
trainer = registry.get("trainer", method)
rows = list(ArithmeticTask("sums", terms=2, digits=1).rows(trainer.record, 32))
given = {"batch_size": 8, "max_steps": 4, "max_length": 64, "learning_rate": 1e-3, **json.loads(options)}
trainer(trainer.Config.parse(given), model=model, data=rows, output=output).train()
"""


@pytest.fixture
def steps(model: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that trains a few steps on a device and returns their metrics."""

    def run(method: str, device: str, **options: Any) -> list[dict[str, Any]]:
        output = tmp_path / f"{method}-{device}-{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, "-c", WORKER, method, str(model), str(output), json.dumps(options)]
        on_cpu = {"ACCELERATE_USE_CPU": "1"} if device == "cpu" else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **on_cpu}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((output / "run.json").read_text())["device"]["kind"] == device
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]

    return run


@pytest.mark.parametrize("method", TRAINERS)
def test_training_gives_the_numbers_of_the_cpu(method: str, steps: Callable[..., list[dict[str, Any]]]) -> None:
    here, there = steps(method, "cuda"), steps(method, "cpu")
    assert len(here) == len(there) == 4
    for mine, other in zip(here, there, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=2e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3)


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_16_bits_stays_near(
    method: str, precision: str, steps: Callable[..., list[dict[str, Any]]]
) -> None:
    here, there = steps(method, "cuda", precision=precision), steps(method, "cuda")
    for mine, other in zip(here, there, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.02)


@pytest.mark.parametrize("options", [{"lora": {"rank": 4}}, {"gradient_checkpointing": True}])
def test_options_give_the_numbers_of_the_cpu(
    options: dict[str, Any], steps: Callable[..., list[dict[str, Any]]]
) -> None:
    here, there = steps("dpo", "cuda", **options), steps("dpo", "cpu", **options)
    for mine, other in zip(here, there, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-4)


def test_attention_in_padded_rows_is_that_of_segments() -> None:
    generator = torch.Generator().manual_seed(0)
    segments = Segments([Segment(0, 5), Segment(5, 3, 0, 5), Segment(8, 7, 0, 5), Segment(15, 1), Segment(16, 9)])
    shapes = ((1, 4, 25, 16), (1, 2, 25, 16), (1, 2, 25, 16))
    plain = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    moved = [tensor.detach().cuda().requires_grad_() for tensor in plain]
    upstream = torch.randn(1, 25, 4, 16, generator=generator)
    expected = segment_attention(*plain, segments, scale=0.25)
    found = attend_in_padded_rows(*moved, segments, scale=0.25)
    (expected * upstream).sum().backward()
    (found * upstream.cuda()).sum().backward()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(moved, plain, strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 64), (16, 16, 128), (4, 2, 16)])
def test_pytorchs_variable_length_kernel_is_right_here(heads: tuple[int, int, int]) -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernel wants compute capability 8.0")
    assert kernel_obstacle(torch_varlen, device, torch.bfloat16, *heads) is None


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_waits_for_nothing_once_it_has_its_plan(precision: torch.dtype) -> None:
    segments = Segments([Segment(0, 5), Segment(5, 3, 0, 5), Segment(8, 7, 0, 5), Segment(15, 1), Segment(16, 9)])
    inputs = [torch.randn(1, heads, 25, 16, device="cuda", dtype=precision, requires_grad=True) for heads in (4, 2, 2)]
    segment_attention(*inputs, segments, scale=0.25).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        segment_attention(*inputs, segments, scale=0.25).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("responses", [1, 3])
def test_a_forward_and_a_backward_pass_wait_for_nothing(responses: int) -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer()).cuda().set_options(precision="bf16")

    def passes() -> None:
        batch = random_batch(4, responses).to("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = policy.token_logps(batch).sum()
        loss.backward()

    passes()  # tries kernels and norms, once
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            passes()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)] == []


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_norms_take_the_kernel_and_give_the_same_numbers(precision: torch.dtype) -> None:
    plain, fused = (tiny_model(hidden=64).cuda().to(precision) for _ in range(2))
    assert fuse_norms(fused) == 5
    ids = torch.arange(40, device="cuda").view(2, 20)
    found, expected = (model(ids).logits.float().log_softmax(-1) for model in (fused, plain))
    assert all(module._fused == {precision: True} for module in fused.modules() if hasattr(module, "_fused"))
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_a_softmax(precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).cuda().to(precision).requires_grad_()
    weight = torch.randn(5000, 64, generator=generator).cuda().to(precision).requires_grad_()
    targets = torch.randint(5000, (300,), generator=generator).cuda()
    found = linear_token_logprobs(hidden, weight, targets)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    found.sum().backward()
    expected.sum().backward()
    for mine, other in zip((hidden, weight), exact, strict=True):
        assert float((mine.grad.double() - other.grad).norm() / other.grad.norm()) < tolerance


def test_rewards_score_as_on_the_cpu(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RewardModel.from_pretrained(str(model), new_head=True, members=3, seed=1).save_pretrained(tmp_path / "reward")
    samples = [Sample(prompt=f"{n}+1=", completion=str(n + 1)) for n in range(20)]
    reward: Any = registry.get("reward", "reward_model")
    found = {}
    for device in ("cuda", "cpu"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1" if device == "cpu" else "0")
        made = reward(reward.Config(model=str(tmp_path / "reward")))
        found[device] = made.score(samples)
        assert made.model.device.type == device
    assert found["cuda"] == pytest.approx(found["cpu"], abs=1e-5)


@pytest.mark.parametrize("method", MERGERS)
def test_merges_give_the_numbers_of_the_cpu(method: str, model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    for number in range(2):
        save_tiny(tmp_path / f"near-{number}", 0, layers=2, hidden=64)
        generator = torch.Generator().manual_seed(number)
        near = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()
        }
        save_file(near, tmp_path / f"near-{number}" / "model.safetensors", metadata={"format": "pt"})
    made = {}
    for device in ("cuda", "cpu"):
        config = MergeConfig(
            method=method,
            base=str(model),
            models=[{"model": str(tmp_path / f"near-{number}")} for number in range(2)],
            output=str(tmp_path / device),
            options=MERGERS[method],
            device=device,
        )
        ModelMerger(config).merge()
        made[device] = load_file(tmp_path / device / "model.safetensors")
    for name, tensor in made["cpu"].items():
        # Thresholds are exact and random words are the same, so the same entries are kept; what is left is rounding.
        torch.testing.assert_close(made["cuda"][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 7}, {"temperature": 0.0}])
def test_completions_are_drawn_as_they_are_scored_and_alone_as_together(model: Path, options: dict[str, float]) -> None:
    policy = PolicyModel.from_pretrained(model, device="cuda")
    batch = prompt_batch(policy, ["a", "a longer prompt", "middling"])
    sampling = SamplingConfig(**{"max_new_tokens": 40, "temperature": 0.8, **options})
    drawn = Engine(policy, seed=1).generate(batch, 4, sampling)
    made = Batch.from_completions(batch, drawn)
    assert made.device.type == "cuda"
    with torch.no_grad():
        assert (policy.token_logps(made) - made["raw_logps"]).abs().max() < 1e-4
        if sampling.temperature:
            own = policy.token_logps(made, temperature=sampling.temperature)
            told = made["sampled_logps"] + made["kept_mass"].log().where(made.loss_mask, 0)
            assert (own - told).abs().max() < 1e-4
    for number in range(3):
        (alone,) = Engine(policy, seed=1).generate(batch.select([number]), 4, sampling)
        assert [one.ids for one in alone] == [one.ids for one in drawn[number]]
