"""Hidden states of a batch, and how to find in them what a head reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch, on_host, to_device
from rlhf_core.models.layout import Layout


@dataclass(frozen=True)
class HiddenStates:
    """The last hidden states of one forward pass over a batch. Axes: R responses, T response tokens, D hidden width.

    Give them to whatever stands on the same backbone (`policy.token_logps(batch, states=states)`), and it is forwarded once.
    """

    values: Tensor
    """(N, D): in whatever order the forward pass had them."""
    layout: Layout
    """Where each response's states stand among the N."""
    batch: Batch
    """What was forwarded."""

    def predicting(self, where: Tensor | None = None) -> Tensor:
        """Return (S, D): the states that predict response tokens, each at the token before, row by row.

        Args:
            where: (R, T) bool, the S tokens that are predicted; None takes the loss mask.
        """
        return self.values[self.layout.before.flatten()[self.places(where)]]

    def at(self, where: Tensor | None = None) -> Tensor:
        """Return (S, D): the states at response tokens, row by row.

        Args:
            where: (R, T) bool, the S tokens; None takes the loss mask.
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
        """Return (R, T, ...) with values (S, ...) at their tokens and 0 elsewhere: what `predicting` and `at` take apart.

        Args:
            values: one for each of the S tokens, row by row.
            where: (R, T) bool, the tokens; None takes the loss mask.
        """
        shape = self.batch.loss_mask.shape
        table = values.new_zeros(shape.numel(), *values.shape[1:])
        return table.index_copy(0, self.places(where), values).view(*shape, *values.shape[1:])

    def places(self, where: Tensor | None = None) -> Tensor:
        """Return (S,) long: where in the flattened (R, T) a mask is true; a GPU isn't waited for where the host knows the mask.

        Raises:
            ValueError: the mask has another shape, or holds places beyond a response's end.
        """
        return self._in_loss if where is None else self._places(where)

    @functools.cached_property
    def _in_loss(self) -> Tensor:
        return self._places(self.batch.loss_mask)

    def _places(self, where: Tensor) -> Tensor:
        batch, mask = self.batch, on_host(where)
        if mask.shape != batch.response_ids.shape:
            raise ValueError(f"the mask must be of shape {tuple(batch.response_ids.shape)}, got {tuple(mask.shape)}")
        beyond = torch.arange(mask.shape[1]) >= on_host(batch.response_lengths)[:, None]
        if bool((mask & beyond).any()):
            raise ValueError("the mask holds places beyond a response's end")
        return to_device(mask.flatten().nonzero().squeeze(1), self.values.device)

    def detach(self) -> HiddenStates:
        """Return the same states without gradients: what stands on them doesn't move the backbone."""
        return replace(self, values=self.values.detach())

    def check(self, batch: Batch) -> None:
        """Raise where these are another batch's states: columns may be added to a batch, and nothing else.

        Raises:
            ValueError: they are.
        """
        if self.batch.response_ids is not batch.response_ids or self.batch.prompt_ids is not batch.prompt_ids:
            raise ValueError("these are the hidden states of another batch")

    @property
    def _at(self) -> Tensor:
        if self.layout.at is None:
            raise ValueError("the states at last tokens were left out: forward the batch without `drop_last`")
        return self.layout.at
