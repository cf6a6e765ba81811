"""The hidden states of a batch, and how to take from them those that a head reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch, on_host, to_device
from rlhf_core.models.layout import Layout


@dataclass(frozen=True)
class HiddenStates:
    """The last hidden states of one forward pass over a batch.

    Pass them to every head on the same backbone (`policy.token_logps(batch, states=states)`), which is then forwarded once.

    Axes: N positions of the forward pass, R responses, T response tokens, S chosen tokens, D width.
    """

    values: Tensor
    """(N, D), in the order of the forward pass."""
    layout: Layout
    """Which of the N belong to which response and token."""
    batch: Batch
    """The batch that was forwarded."""

    def predicting(self, where: Tensor | None = None) -> Tensor:
        """Return (S, D): the states that predict response tokens, each from the position before its token, response by response.

        Args:
            where: (R, T) bool, which tokens; None takes the loss mask.
        """
        return self.values[self.layout.before.flatten()[self.places(where)]]

    def at(self, where: Tensor | None = None) -> Tensor:
        """Return (S, D): the states at response tokens, response by response.

        Args:
            where: (R, T) bool, which tokens; None takes the loss mask.
        """
        return self.values[self._at.flatten()[self.places(where)]]

    def last(self) -> Tensor:
        """Return (R, D): the state at each response's last token, or at its prompt's end where it is empty."""
        if not self.batch.response_ids.shape[1]:
            return self.values[self.layout.prompt_end]
        lengths = self.batch.response_lengths
        at = self._at.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        return self.values[torch.where(lengths > 0, at, self.layout.prompt_end)]

    def to_tokens(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Return (R, T, ...) with values (S, ...) at their tokens and 0 elsewhere: the reverse of `predicting` and `at`.

        Args:
            values: one per token, response by response.
            where: (R, T) bool, the S tokens; None takes the loss mask.
        """
        shape = self.batch.loss_mask.shape
        table = values.new_zeros(shape.numel(), *values.shape[1:])
        return table.index_copy(0, self.places(where), values).view(*shape, *values.shape[1:])

    def places(self, where: Tensor | None = None) -> Tensor:
        """Return (S,) long: the indices in the flattened (R, T) at which a mask is true; a CPU mask needs no wait for a GPU.

        Raises:
            ValueError: the mask has another shape, or is true beyond a response's end.
        """
        return self._in_loss if where is None else self._places(where)

    @functools.cached_property
    def _in_loss(self) -> Tensor:
        return self._places(self.batch.loss_mask)

    def _places(self, where: Tensor) -> Tensor:
        """See `places`."""
        batch, mask = self.batch, on_host(where)
        if mask.shape != batch.response_ids.shape:
            raise ValueError(f"the mask must be of shape {tuple(batch.response_ids.shape)}, got {tuple(mask.shape)}")
        beyond = torch.arange(mask.shape[1]) >= on_host(batch.response_lengths)[:, None]
        if bool((mask & beyond).any()):
            raise ValueError("the mask is true beyond a response's end")
        return to_device(mask.flatten().nonzero().squeeze(1), self.values.device)

    def detach(self) -> HiddenStates:
        """Return the same states without gradients: a head on them then doesn't train the backbone."""
        return replace(self, values=self.values.detach())

    def check(self, batch: Batch) -> None:
        """Raise ValueError where these states are another batch's; their own batch with more columns is fine."""
        if self.batch.response_ids is not batch.response_ids or self.batch.prompt_ids is not batch.prompt_ids:
            raise ValueError("the given hidden states are those of another batch")

    @property
    def _at(self) -> Tensor:
        """(R, T) flat indices of the states at response tokens."""
        if self.layout.at is None:
            raise ValueError("the states at last tokens were left out: call `hidden_states` without `drop_last`")
        return self.layout.at
