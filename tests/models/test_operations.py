"""How many operations a layer launches on a GPU, counted without one: beside transformers' own, which a small model is bound by.

Kernels that only a GPU has are stood in for by functions with as many operations as they are: one forwards, one backwards.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch
from torch import Tensor

from rlhf_core.models import PolicyModel
from rlhf_core.models import attention as attentions
from rlhf_core.models.fused_norms import fuse_norms
from rlhf_core.models.segment_attention import attend_varlen
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


class OneOperation(torch.autograd.Function):
    """The first input, by one operation; gradients of the others cost nothing more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [other.shape for other in others]
        return x * 1

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return upstream * 1, *(upstream.new_empty(shape) for shape in ctx.shapes)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that counts a layer's operations in bf16, both passes: those of two layers less those of one."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from step_profile import Operations

    def passes(loss: Any) -> int:
        with Operations() as operations:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss()
            value.backward()
        return operations.count

    def a_layer(loss: Any, *, as_on_a_gpu: bool) -> int:
        counts = []
        for layers in (1, 2):
            model = tiny_model(layers=layers)
            if as_on_a_gpu:
                fuse_norms(model, devices=("cpu",))
            policy = PolicyModel(model, tiny_tokenizer()).set_options()
            for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
                with context:
                    loss(policy)  # the longest sequence so far is tried once, and norms are compared with the kernel
            with monkeypatch.context() as patch:
                if as_on_a_gpu:
                    kernel = lambda q, k, v, *_, **__: OneOperation.apply(q, k, v)  # noqa: E731
                    attend = functools.partial(attend_varlen, kernel=kernel)
                    patch.setattr(attentions, "segment_attention", attend)
                    rms_norm = lambda x, shape, weight, _: OneOperation.apply(x, weight)  # noqa: E731
                    patch.setattr(torch.nn.functional, "rms_norm", rms_norm)
                counts.append(passes(functools.partial(loss, policy)))
        return counts[1] - counts[0]

    return a_layer


def padded(policy: PolicyModel) -> Tensor:
    ids = torch.randint(200, (6, 20))
    logits = policy.causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float().log_softmax(-1)[..., 0].sum()


@pytest.mark.parametrize(("responses", "most"), [(1, 0.72), (2, 0.8)])
def test_a_layer_launches_fewer_operations_than_transformers_own(responses: int, most: float, count: Any) -> None:
    """With two responses the gradients of the prompt that they share are added up, and half as many rows are forwarded."""
    batch = random_batch(3, responses)
    ours = count(lambda policy: policy.token_logps(batch).sum(), as_on_a_gpu=True)
    own = count(padded, as_on_a_gpu=False)
    assert ours <= most * own
