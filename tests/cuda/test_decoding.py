"""On a GPU: decoding through a library's kernel and in CUDA graphs gives the completions of the CPU and of plain launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import make_tiny

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.generation.block_table_attention import library_kernels, paged_kernel, paged_kernel_obstacle
from rlhf_core.generation.device_steps import DeviceRow, DeviceSteps
from rlhf_core.generation.drawn_rows import DrawnRows
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

PROMPTS = ["a", "a longer prompt than the others", "middling"]


def policy_on(device: str, kind: str = "", precision: str = "float32") -> PolicyModel:
    torch.manual_seed(0)
    model = make_tiny(kind) if kind else tiny_model(hidden=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    policy = PolicyModel(model, tiny_tokenizer()).requires_grad_(False).to(device)
    return policy.set_options(precision=precision)


def ids_of(engine: Engine, sampling: SamplingConfig, n: int = 3) -> list[list[Sequence[int]]]:
    groups = engine.generate(prompt_batch(engine.policy, PROMPTS), n, sampling)
    return [[one.ids for one in group] for group in groups]


def steps_of(engine: Engine) -> DeviceSteps:
    """Return what decodes for an engine over a paged cache."""
    backend: Any = engine.backend
    return backend._native._device_steps


@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 128), (16, 16, 64), (8, 1, 256), (4, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_some_librarys_kernel_over_block_tables_is_right_here(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels want compute capability 8.0")
    obstacles = {
        kernel.__name__: paged_kernel_obstacle(kernel, device, dtype, *heads, 256) for kernel in library_kernels(device)
    }
    assert None in obstacles.values(), obstacles
    assert paged_kernel(device, dtype, *heads, 256) is not None
    assert paged_kernel(device, torch.float32, *heads, 256) is None


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.2}, {"stop": ["e"]}]
)
def test_completions_in_graphs_are_those_of_plain_launches_and_of_the_cpu(options: dict[str, Any]) -> None:
    sampling = SamplingConfig(**{"max_new_tokens": 60, "min_new_tokens": 50, **options})
    engine = Engine(policy_on("cuda"), seed=1)
    found = ids_of(engine, sampling)
    assert steps_of(engine)._captured
    assert ids_of(Engine(engine.policy, seed=1, cuda_graphs=False), sampling) == found
    assert ids_of(Engine(policy_on("cpu"), seed=1), sampling) == found
    # Again, in the graphs that are there, and with weights that changed in place.
    assert ids_of(engine, sampling) != found or sampling.temperature == 0
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            parameter.mul_(1.01)
    plain = Engine(engine.policy, seed=2, cuda_graphs=False)
    engine.seed = 2
    engine.begin("again")
    plain.begin("again")
    assert ids_of(engine, sampling) == ids_of(plain, sampling)


@pytest.mark.parametrize("trained", [False, True])
def test_in_16_bits_log_probabilities_are_near_those_that_are_trained_on(trained: bool) -> None:
    policy = policy_on("cuda", precision="bf16").requires_grad_(trained)
    batch, sampling = prompt_batch(policy, PROMPTS), SamplingConfig(max_new_tokens=60, min_new_tokens=60)
    for _ in range(2):
        made = Batch.from_completions(batch, Engine(policy, seed=1).generate(batch, 4, sampling))
        with torch.no_grad(), policy.product_precision():
            gap = (policy.token_logps(made) - made["raw_logps"]).abs()
        assert gap.mean() < 0.05 and gap.max() < 0.5  # in the loop of the CPU 0.026 and 0.22
        if trained:
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.05)


def test_sequences_longer_than_a_block_are_decoded_as_they_are_scored() -> None:
    policy = policy_on("cuda")
    if policy.max_positions is not None and policy.max_positions < 400:
        pytest.skip("the model has too few positions")
    batch = prompt_batch(policy, ["a" * 250, "b" * 300, "c"])
    drawn = Engine(policy, seed=1).generate(batch, 2, SamplingConfig(max_new_tokens=40, min_new_tokens=40))
    made = Batch.from_completions(batch, drawn)
    with torch.no_grad():
        assert (policy.token_logps(made) - made["raw_logps"]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen3"])
def test_other_models_decode_the_same_with_and_without_graphs(kind: str) -> None:
    """Learned positions; experts, which may wait for the device and then aren't captured; norms of queries and keys."""
    policy, sampling = policy_on("cuda", kind), SamplingConfig(max_new_tokens=40, min_new_tokens=40)
    found = ids_of(Engine(policy, seed=1), sampling)
    assert ids_of(Engine(policy, seed=1, cuda_graphs=False), sampling) == found


def test_steps_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    run = DeviceSteps.run

    def counted(
        self: DeviceSteps, rows: Sequence[DeviceRow], drawing: DrawnRows, steps: int, logits: Callable[..., Any]
    ) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(self, rows, drawing, steps, logits)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing" in str(one.message) for one in caught))

    monkeypatch.setattr(DeviceSteps, "run", counted)
    engine = Engine(policy_on("cuda"), seed=1)
    ids_of(engine, SamplingConfig(max_new_tokens=120, min_new_tokens=120))
    # Two copies to the device begin each call, which is eight steps; one call makes the graph.
    assert len(counts) == 15 and sorted(counts)[len(counts) // 2] <= 2
