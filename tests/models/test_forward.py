"""The shared-prompt forward pass: the same numbers for any layout, padding and cut, and transformers' own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import random_batch, relative, uneven_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, segment_attention
from rlhf_core.models import attention as attentions
from rlhf_core.models.layout import Segment, Segments, packed_layout, padded_layout
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-5
"""Of gradients through weights four times as large as at initialisation: on some processors, rounding in float32 reaches 2e-5 in
one of 300 batches."""


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return uneven_policy()


def logps_and_gradient(policy: PolicyModel, batch: Batch, layout: str, share: bool = True) -> tuple[Tensor, Tensor]:
    policy.shared_forward.layout, policy.shared_forward.share_prompts = layout, share  # type: ignore[assignment]
    policy.zero_grad()
    logps = policy.token_logps(batch)
    (logps.sum(dim=1) * torch.linspace(0.5, 2, len(logps))).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return logps.detach(), gradient


def own_logps(policy: PolicyModel, batch: Batch) -> Tensor:
    """Log-probabilities by transformers alone, each response a sequence of its own, in float64."""
    model = tiny_model().double()
    model.load_state_dict({k: v.double() for k, v in policy.causal_lm.state_dict().items()})
    out = torch.zeros(batch.loss_mask.shape, dtype=torch.float64)
    for r in range(batch.num_responses):
        owner, length = int(batch.owner[r]), int(batch.response_lengths[r])
        prompt = int(batch.prompt_lengths[owner])
        ids = torch.cat([batch.prompt_ids[owner, :prompt], batch.response_ids[r, :length]])
        with torch.no_grad():
            logps = model(ids[None]).logits[0].log_softmax(-1)
        out[r, :length] = logps[prompt - 1 : -1].gather(1, ids[prompt:, None]).squeeze(1)
    return out * batch.loss_mask


@pytest.mark.parametrize("responses", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_every_layout_gives_the_models_own_logprobs(policy: PolicyModel, responses: int, masked: bool) -> None:
    batch = random_batch(3, responses, masked=masked, seed=responses)
    expected = own_logps(policy, batch)
    for layout, share in (("packed", True), ("packed", False), ("padded", True)):
        found, _ = logps_and_gradient(policy, batch, layout, share)
        assert relative(found.double(), expected) < TOLERANCE, (layout, share)


@settings(max_examples=20, deadline=None)
@given(prompts=st.integers(1, 4), responses=st.integers(1, 4), seed=st.integers(0, 10**6), masked=st.booleans())
def test_the_gradient_is_the_same_for_any_layout(
    policy: PolicyModel, prompts: int, responses: int, seed: int, masked: bool
) -> None:
    batch = random_batch(prompts, responses, seed=seed, masked=masked)
    if not batch.num_loss_tokens:
        return
    _, padded = logps_and_gradient(policy, batch, "padded")
    _, shared = logps_and_gradient(policy, batch, "packed", True)
    _, apart = logps_and_gradient(policy, batch, "packed", False)
    assert relative(shared, padded) < GRADIENT_TOLERANCE
    assert relative(apart, padded) < GRADIENT_TOLERANCE


def test_padding_changes_nothing(policy: PolicyModel) -> None:
    batch = random_batch(3, 2)
    wider = batch.pad(5, 4, value=7)
    for layout in ("packed", "padded"):
        plain, gradient = logps_and_gradient(policy, batch, layout)
        padded, other = logps_and_gradient(policy, wider, layout)
        assert relative(padded[:, : plain.shape[1]], plain) < TOLERANCE
        assert not padded[:, plain.shape[1] :].any()
        assert relative(other, gradient) < TOLERANCE


def test_packed_neighbours_do_not_leak(policy: PolicyModel) -> None:
    """Resetting positions alone would leave them visible: change one row and look at the others."""
    batch = random_batch(4, 2)
    before, _ = logps_and_gradient(policy, batch, "packed")
    prompts, responses = batch.prompt_ids.clone(), batch.response_ids.clone()
    prompts[0] = (prompts[0] + 1) % 200
    responses[:2] = (responses[:2] + 1) % 200
    after, _ = logps_and_gradient(policy, replace(batch, prompt_ids=prompts, response_ids=responses), "packed")
    assert not torch.allclose(before[:2], after[:2], atol=1e-2)
    assert relative(after[2:], before[2:]) < TOLERANCE


def test_the_leak_that_reset_positions_leave_is_seen(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain causal attention over the packed row the numbers are wrong, and the probe notices."""

    def leaking(query: Tensor, key: Tensor, value: Tensor, segments: object, *, scale: float, dropout: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, scale=scale).transpose(1, 2)

    monkeypatch.setattr(attentions, "segment_attention", leaking)
    seen = PolicyModel(policy.causal_lm, policy.tokenizer)
    assert seen.probe_result.arrangement == "padded" and "packed" in seen.probe_result.obstacles


def test_shared_prompts_are_computed_once() -> None:
    batch = random_batch(3, 5)
    real = int(batch.prompt_lengths.sum() + batch.response_lengths.sum())
    assert packed_layout(batch).num_positions == real == batch.num_tokens
    assert packed_layout(batch, drop_last=True).num_positions == real - batch.num_responses
    apart = packed_layout(batch, share_prompts=False).num_positions
    assert apart == int(5 * batch.prompt_lengths.sum() + batch.response_lengths.sum())
    assert padded_layout(batch).num_positions > apart


def test_micro_batches_cover_the_batch_and_keep_groups(policy: PolicyModel) -> None:
    batch = random_batch(7, 2, seed=3)
    whole, gradient = logps_and_gradient(policy, batch, "packed")
    for cut in ({"size": 1}, {"size": 2}, {"max_tokens": 25}, {"size": 3, "by_length": False}):
        micros = batch.split(**cut)  # type: ignore[arg-type]
        assert sorted(row for micro in micros for row in micro.rows) == list(range(7))
        for micro in micros:
            assert micro.num_responses == 2 * micro.num_prompts
            rows = torch.tensor(micro.rows).repeat_interleave(2) * 2 + torch.tensor([0, 1]).repeat(micro.num_prompts)
            found = policy.token_logps(micro)
            assert relative(found, whole[rows, : found.shape[1]]) < TOLERANCE
            if "max_tokens" in cut:
                assert micro.num_tokens <= 25 or micro.num_prompts == 1
    assert gradient.isfinite().all()


def test_mismatched_owners_are_the_same_batch_with_another_owner(policy: PolicyModel) -> None:
    batch = random_batch(4, 1)
    turned = replace(batch, owner=torch.tensor([1, 2, 3, 0]))
    expected = own_logps(policy, turned)
    for layout in ("packed", "padded"):
        found, _ = logps_and_gradient(policy, turned, layout)
        assert relative(found.double(), expected) < TOLERANCE


@pytest.mark.parametrize("responses", [1, 2, 5])
@pytest.mark.parametrize("attend", ["attend_in_padded_rows", "attend_varlen"])
def test_attention_kernels_agree(attend: str, responses: int) -> None:
    layout = packed_layout(random_batch(3, responses))
    assert layout.segments is not None
    tokens = layout.num_positions
    torch.manual_seed(0)
    shapes = ((1, 4, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = segment_attention.attend_each_segment(*inputs, layout.segments, scale=0.3)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    extra = {"kernel": varlen_reference} if attend == "attend_varlen" else {}
    for _ in range(2):  # the second time by the plan of the first
        found = getattr(segment_attention, attend)(*inputs, layout.segments, scale=0.3, **extra)
        assert found.shape == expected.shape
        assert relative(found, expected) < TOLERANCE
        for mine, other in zip(torch.autograd.grad(found, inputs, upstream), gradients, strict=True):
            assert relative(mine, other) < TOLERANCE
    assert len(layout.segments.__dict__["plans"]) == 1


@pytest.mark.parametrize(
    ("prompts", "responses", "width", "chosen"),
    [(8, 4, 8, "attend_in_padded_rows"), (1, 2, 8, "attend_each_segment"), (8, 4, 65536, "attend_each_segment")],
)
def test_a_cpu_pads_many_small_segments(
    prompts: int, responses: int, width: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two segments, and products that are worth a call, are computed one by one."""
    layout = packed_layout(random_batch(prompts, responses))
    heard = []
    for name in ("attend_in_padded_rows", "attend_each_segment"):
        monkeypatch.setattr(
            segment_attention, name, lambda q, *_, name=name, **__: heard.append(name) or q.transpose(1, 2)
        )
    query = torch.zeros(1, 4, 1, 1).expand(1, 4, layout.num_positions, width)
    assert isinstance(layout.segments, Segments)
    segment_attention.attend_on_cpu(query, query, query, layout.segments, scale=1.0)
    assert heard == [chosen]


def test_a_cpu_pads_no_long_row_among_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [400, *[4] * 40]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    segments = Segments(Segment(start, length) for start, length in zip(starts, lengths, strict=True))
    assert segment_attention._padded_pairs(segments, torch.device("cpu")) == 41 * 400**2
    query = torch.zeros(1, 2, sum(lengths), 8)
    monkeypatch.setattr(segment_attention, "attend_in_padded_rows", None)
    assert segment_attention.attend_on_cpu(query, query, query, segments, scale=1.0).shape == (1, sum(lengths), 2, 8)


@pytest.mark.parametrize("share", [True, False])
def test_a_models_gradient_through_a_gpus_attention_is_the_same(
    policy: PolicyModel, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    batch = random_batch(4, 3)
    expected = logps_and_gradient(policy, batch, "packed", share)
    monkeypatch.setattr(attentions, "segment_attention", segment_attention.attend_in_padded_rows)
    found = logps_and_gradient(policy, batch, "packed", share)
    assert relative(found[0], expected[0]) < TOLERANCE
    assert relative(found[1], expected[1]) < GRADIENT_TOLERANCE


class Waits(TorchDispatchMode):
    """Counts what a GPU's host waits for: values that it reads, and small tensors that it makes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += any(
            part in name for part in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "_to_copy")
        )
        if name.startswith("aten.index.Tensor"):  # by a mask, it waits for how many are chosen
            self.count += any(x is not None and x.dtype == torch.bool for x in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attend", ["attend_in_padded_rows", "attend_varlen"])
def test_no_layer_makes_the_host_wait(attend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: Callable[..., Tensor] = getattr(segment_attention, attend)
    if attend == "attend_varlen":
        # Any kernel will do for counting: this one leaves queries as they are.
        chosen = functools.partial(chosen, kernel=lambda q, *rest, **options: q * 1)
    models = [PolicyModel(tiny_model(layers=layers), tiny_tokenizer()) for layers in (1, 4)]
    for model in models:
        model.token_logps(random_batch(3, 3))  # the longest sequence so far is tried once
        assert model.probe_result.arrangement == "packed"
    monkeypatch.setattr(attentions, "segment_attention", chosen)
    counts = []
    for model in models:
        with Waits() as waits:
            model.token_logps(random_batch(3, 3)).sum().backward()
        counts.append(waits.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("responses", [2, 8, 32])
def test_gradients_of_shared_keys_are_rounded_once(responses: int) -> None:
    layout = packed_layout(random_batch(2, responses))
    assert layout.segments is not None
    plan = layout.segments.cached_plan(segment_attention.PaddedPlan.make, torch.device("cpu"))
    torch.manual_seed(0)
    x = torch.randn(layout.num_positions, 2, 16).bfloat16().requires_grad_()
    taken = segment_attention.gather_rows(x, plan.keys, plan.key_copies)
    real = torch.zeros(len(plan.keys), dtype=torch.bool)
    real[plan.key_copies.first] = True
    if plan.key_copies.others is not None:
        real[plan.key_copies.others[~plan.key_copies.missing.squeeze()]] = True
    upstream = torch.randn(taken.shape).bfloat16() * real[:, None, None]
    (found,) = torch.autograd.grad(taken, x, upstream)
    exact = torch.zeros(x.shape, dtype=torch.float64).index_add_(0, plan.keys, upstream.double())
    assert relative(found.double(), exact) < 1.05 * relative(exact.bfloat16().double(), exact) + 1e-6


def varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_longest: int, k_longest: int,
    *, dropout_p: float, softmax_scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """What flash-attn's variable-length kernel computes: causal, aligned to the end of each sequence's keys."""
    assert causal and not dropout_p
    groups = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for i in range(len(q_starts) - 1):
        a, b, c, d = q_starts[i], q_starts[i + 1], k_starts[i], k_starts[i + 1]
        assert b - a <= q_longest and d - c <= k_longest
        keys, values = (x[c:d].repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * softmax_scale
        visible = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def test_gradient_checkpointing_changes_nothing() -> None:
    batch = random_batch(3, 2)
    plain = PolicyModel(tiny_model(), tiny_tokenizer())
    saving = PolicyModel(tiny_model(), tiny_tokenizer())
    saving.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saving.train()
    plain.train()
    _, expected = logps_and_gradient(plain, batch, "packed")
    _, found = logps_and_gradient(saving, batch, "packed")
    assert relative(found, expected) < TOLERANCE


def test_a_sliding_window_that_a_row_overruns_is_honoured() -> None:
    """Segments know no window, so such a row is padded, and the model's own mask applies."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=263, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, max_position_embeddings=128,
    )  # fmt: skip
    policy = PolicyModel(MistralForCausalLM(config).eval(), tiny_tokenizer())
    batch = random_batch(2, 2, longest=12, seed=1)
    found = policy.token_logps(batch)
    for r in range(batch.num_responses):
        owner, length = int(batch.owner[r]), int(batch.response_lengths[r])
        prompt = int(batch.prompt_lengths[owner])
        ids = torch.cat([batch.prompt_ids[owner, :prompt], batch.response_ids[r, :length]])
        logps = policy.causal_lm(ids[None]).logits[0].log_softmax(-1)
        expected = logps[prompt - 1 : -1].gather(1, ids[prompt:, None]).squeeze(1)
        assert torch.allclose(found[r, :length], expected, atol=1e-4)


def test_a_model_without_replaceable_attention_is_padded() -> None:
    """GPT-2-like models with learnt positions pack; a state-space model can't, and says so when told to."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=263, hidden_size=32, num_hidden_layers=2, state_size=4)
    policy = PolicyModel(MambaForCausalLM(config).eval(), tiny_tokenizer())
    batch = random_batch(2, 2)
    found = policy.token_logps(batch)
    owner, length = int(batch.owner[1]), int(batch.response_lengths[1])
    prompt = int(batch.prompt_lengths[owner])
    ids = torch.cat([batch.prompt_ids[owner, :prompt], batch.response_ids[1, :length]])
    logps = policy.causal_lm(ids[None]).logits[0].log_softmax(-1)
    assert torch.allclose(found[1, :length], logps[prompt - 1 : -1].gather(1, ids[prompt:, None]).squeeze(1), atol=1e-4)


def test_flash_attention_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="the device is cpu") as caught:
        attentions.OptimizedAttention.select("flash", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert caught.value.exit_code == 2
    chosen = attentions.OptimizedAttention.select("auto", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert chosen.kernel == "sdpa" and "cpu" in chosen.reason
