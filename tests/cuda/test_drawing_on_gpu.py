"""On a GPU: tokens are drawn as on the CPU, without waiting for the device, and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.drawn_rows import DrawnRows, NewRow
from rlhf_core.generation.sampling import Barred, draw_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"top_k": 40, "temperature": 1.3},
    {"top_k": 500, "top_p": 0.95, "min_p": 0.001},
    {"min_p": 0.02},
    {"repetition_penalty": 1.3, "top_p": 0.8},
    {"temperature": 0.0},
]
ROWS, SIZE = 32, 32_003


def arguments(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": (torch.randn(ROWS, SIZE, generator=generator) * 3).to(dtype),
        "uniform": torch.rand(ROWS, generator=generator, dtype=torch.float64),
        "seen": torch.randint(SIZE, (ROWS, 50), generator=generator),
        "barred": Barred(torch.tensor([7, 31_000]), torch.tensor([[True, False], [True, True]] * (ROWS // 2))),
    }


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: Barred(value.ids.cuda(), value.rows.cuda()) if isinstance(value, Barred) else value.cuda()
        for name, value in options.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES)
def test_tokens_are_those_of_the_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    given, sampling = arguments(dtype), SamplingConfig(**options)
    wanted = draw_tokens(sampling=sampling, **given)
    found = draw_tokens(sampling=sampling, **on_gpu(given))
    # A random number within rounding of the edge between two tokens may fall to either.
    same = found.tokens.cpu() == wanted.tokens
    assert int((~same).sum()) <= 1
    for name in ("logprobs", "raw_logprobs", "kept_mass"):
        torch.testing.assert_close(getattr(found, name).cpu()[same], getattr(wanted, name)[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", CASES)
def test_drawing_is_captured_in_a_graph(options: dict[str, Any]) -> None:
    sampling, given = SamplingConfig(**options), on_gpu(arguments(torch.bfloat16))
    other = torch.roll(given["logits"], 1, dims=0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        draw_tokens(sampling=sampling, **given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw_tokens(sampling=sampling, **given)
    given["logits"].copy_(other)
    graph.replay()
    for value, expected in zip(drawn, draw_tokens(sampling=sampling, **given), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "options", [*CASES, {"min_new_tokens": 5, "stop_ids": [3]}, {"min_confidence": 4.0, "confidence_window": 3}]
)
def test_a_step_does_not_wait_for_the_device(options: dict[str, Any]) -> None:
    rows = DrawnRows(SamplingConfig(**options), device=torch.device("cuda"))
    rows.join([NewRow(seed=k, limit=9, ends=[2], prompt_ids=[1, 5]) for k in range(ROWS)])
    logits = arguments(torch.bfloat16)["logits"].cuda()
    rows.draw(logits)  # the first random numbers are copied to the device here
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            rows.draw(logits)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for _ in range(9):
        rows.draw(logits)
        rows.ended()
    assert {rows.completion(k).stop_reason for k in range(ROWS)} <= {"length", "end", "stop", "confidence"}
