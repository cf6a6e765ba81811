"""Hidden states are a value: every place in a response is found in them, and one forward pass serves all that stands on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import make_tiny
from batches import random_batch, relative, with_empty
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


def policy_of(network: Any) -> PolicyModel:
    return PolicyModel(network.eval(), tiny_tokenizer())


@torch.no_grad()
def alone(policy: PolicyModel, batch: Batch) -> list[Tensor]:
    """Return the hidden states (L, D) of each response with its prompt, by transformers alone."""
    found = []
    for r, (owner, length) in enumerate(zip(batch.owner.tolist(), batch.response_lengths.tolist(), strict=True)):
        ids = torch.cat([batch.prompt_ids[owner, : batch.prompt_lengths[owner]], batch.response_ids[r, :length]])
        found.append(policy.backbone(input_ids=ids[None]).last_hidden_state[0])
    return found


# Packed rows, padded rows, and sequences that are forwarded one by one.
@pytest.mark.parametrize("kind", ["llama", "bloom", "doge"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_place_is_found_whatever_the_layout(kind: str, drop_last: bool) -> None:
    policy = policy_of(make_tiny(kind, **({"keep_window_size": 16} if kind == "doge" else {})))
    batch = with_empty(random_batch(4, 2, masked=True, longest=30 if kind == "doge" else 9), 3)
    states, own = policy.hidden_states(batch, drop_last=drop_last), alone(policy, batch)
    prompts = batch.prompt_lengths[batch.owner].tolist()
    rows = [(r, t) for r, row in enumerate(batch.loss_mask.tolist()) for t, inside in enumerate(row) if inside]
    assert relative(states.predicting(), torch.stack([own[r][prompts[r] + t - 1] for r, t in rows])) < 1e-5
    whole = torch.arange(batch.response_ids.shape[1]) < batch.response_lengths[:, None]
    assert states.predicting(whole).shape[0] == int(batch.response_lengths.sum())
    table = states.to_tokens(torch.arange(1.0, len(rows) + 1))
    assert [table[r, t].item() for r, t in rows] == list(range(1, len(rows) + 1)) and int((table > 0).sum()) == len(
        rows
    )
    if states.layout.at is None:
        for read in (states.at, states.last):
            with pytest.raises(ValueError, match="without `drop_last`"):
                read()
        return
    assert relative(states.at(), torch.stack([own[r][prompts[r] + t] for r, t in rows])) < 1e-5
    assert relative(states.last(), torch.stack([of[-1] for of in own])) < 1e-5


def test_a_mask_that_does_not_fit_is_refused() -> None:
    batch = with_empty(random_batch(2, 2), 1)
    states = policy_of(tiny_model()).hidden_states(batch)
    with pytest.raises(ValueError, match="must be of shape"):
        states.predicting(batch.loss_mask[:, :1])
    with pytest.raises(ValueError, match="beyond a response's end"):
        states.at(torch.ones_like(batch.loss_mask))


def test_known_states_are_forwarded_once_and_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tiny_model())
    batch = random_batch(3, 2, masked=True)
    expected = policy.token_logps(batch, temperature=0.7)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    calls: list[int] = []
    policy.backbone.register_forward_hook(lambda *_: calls.append(1))
    states = policy.hidden_states(batch)
    # Columns may be added to the batch meanwhile.
    more = batch.attach(per_token={"more": torch.zeros(batch.response_ids.shape)})
    found = policy.token_logps(more, temperature=0.7, states=states)
    assert relative(policy.response_logps(batch, temperature=0.7, states=states), expected.sum(dim=1)) < 1e-6
    found.square().sum().backward()
    assert len(calls) == 1 and relative(found, expected) < 1e-6
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and relative(parameter.grad, gradients[name]) < 1e-5, name
    with pytest.raises(ValueError, match="another batch"):
        policy.token_logps(random_batch(3, 2, masked=True), states=states)


def test_detached_states_do_not_move_the_backbone() -> None:
    policy = policy_of(tiny_model())
    states = policy.hidden_states(random_batch(2, 1))
    assert states.last().requires_grad and not states.detach().last().requires_grad


def test_a_batch_without_rows_has_no_states() -> None:
    policy = policy_of(tiny_model())
    none = random_batch(2, 2).select([])
    states = policy.hidden_states(none)
    assert states.values.shape == (0, policy.width) and states.last().shape == (0, policy.width)
    assert states.predicting().shape == states.at().shape == (0, policy.width)
    assert policy.token_logps(none).shape == (0, 0) and policy.response_logps(none, states=states).shape == (0,)
