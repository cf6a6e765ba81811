"""On a GPU the host never waits for a forward or backward pass: what it needs to know, it knows. Shown on the device `meta`,
which has no values to read, so that whoever waits for one fails."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from batches import random_batch

from rlhf_core.contracts.batch import on_host, to_device
from rlhf_core.models import PolicyModel, ValueModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast doesn't know the device `meta`."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("responses", [1, 3])
def test_no_value_is_read_in_a_forward_and_a_backward_pass(responses: int) -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    policy.token_logps(random_batch(2, 2))  # tries the model, which reads what it finds
    policy.to("meta")
    policy.token_logps(random_batch(3, responses).to("meta")).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_no_value_is_read_where_a_policy_and_its_critic_share_a_forward_pass() -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    policy.token_logps(random_batch(2, 2))
    value = ValueModel.on(policy).to("meta")
    batch = random_batch(3, 2, masked=True).to("meta")
    states = policy.hidden_states(batch)
    tokens, ends = value.values(batch, states=states)
    entropy = policy.token_entropy(states.predicting())
    (policy.token_logps(batch, states=states).sum() + tokens.sum() + ends.sum() + entropy.sum()).backward()
    assert all(parameter.grad is not None for parameter in value.parameters())


def test_what_was_moved_is_known_until_it_is_written_to() -> None:
    source: Any = torch.arange(4)
    there = to_device(source, "meta")
    assert on_host(there) is source and on_host(source) is source
    with pytest.raises((NotImplementedError, RuntimeError)):  # a part of it isn't known
        on_host(there[:2])
    source.add_(1)
    with pytest.raises((NotImplementedError, RuntimeError)):
        on_host(there)
    again = to_device(source, "meta")
    again.mul_(2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        on_host(again)
