"""The one batch shape that serves every method: P prompts, and R responses that answer them.

SFT and KTO have one response a prompt, preference pairs two, groups G. `owner[r]` is the prompt that response r answers; a
prompt's tokens are stored once however many responses it has. Axes: P prompts, R responses, L prompt tokens, T response
tokens. Padding is on the right and is known by lengths alone, never by comparing ids with a padding id.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rlhf_core.infra.errors import PluginError

if TYPE_CHECKING:
    from rlhf_core.contracts.completion import Completion

_moved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tensor on a device → (where it came from on the host, the versions of both)."""


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor's values on the host, without waiting for a GPU where `Batch.to` moved them there."""
    if tensor.device.type == "cpu":
        return tensor
    source, versions = _moved.get(tensor, (None, None))
    if source is not None and versions == (source._version, tensor._version):  # neither was written to since
        return source
    return tensor.cpu()


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor; from the host, nobody waits until it is there, and `on_host` knows its values."""
    there = tensor.to(device, non_blocking=True)
    if tensor.device.type == "cpu" and there is not tensor:
        _moved[there] = (tensor, (tensor._version, there._version))
    return there


@dataclass(frozen=True)
class Batch:
    """Prompts, responses, and the columns that data and `experience` attach to them."""

    prompt_ids: Tensor
    """(P, L) long, right-padded. Every prompt has at least one token."""
    prompt_lengths: Tensor
    """(P,) long, at least 1."""
    response_ids: Tensor
    """(R, T) long, right-padded."""
    response_lengths: Tensor
    """(R,) long."""
    owner: Tensor
    """(R,) long: the prompt that each response answers."""
    loss_mask: Tensor
    """(R, T) bool: the response tokens that are in the loss or scored; False beyond each length."""
    rows: tuple[int, ...]
    """The row number of each prompt in its data, for messages and caches."""
    per_prompt: Mapping[str, Tensor] = field(default_factory=dict)
    """Columns (P, ...)."""
    per_response: Mapping[str, Tensor] = field(default_factory=dict)
    """Columns (R, ...)."""
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """Columns (R, T, ...), aligned with `response_ids`."""
    prompts: tuple[Any, ...] = ()
    """Each prompt as it is in the data, text or chat messages, for rewards; () where it isn't known."""
    records: tuple[Mapping[str, Any], ...] = ()
    """Each prompt's other columns, as they are in its record (an answer, step labels), for rewards."""
    places: tuple[int, ...] = ()
    """The place of each prompt in the run's order of rows, counted from 0 over epochs and processes: a row that comes again has
    the same number in `rows` and another place. () where it isn't known."""

    @classmethod
    def from_completions(cls, batch: Batch, completions: Sequence[Sequence[Completion]]) -> Batch:
        """Return a batch of the same prompts with completions as their responses, on the same device.

        Prompts keep their ids, rows, records and columns; the responses that the batch had are gone. Groups may be of any sizes.

        Args:
            completions: for each prompt its completions, in the order in which they become responses. `Completion.mask` is
                their loss mask; without one every token is in the loss, the end token included.

        Columns:
            `sampled_logps`, `raw_logps`, `kept_mass`: (R, T) float32, each from the field of a completion that bears its name,
                0 beyond the length; one that no completion has is left out.
            `truncated`: (R,) bool, whether the limit cut the completion off. `policy_version`: (R,) long.

        Raises:
            PluginError: a completion's fields are of unequal lengths, or there aren't as many groups as prompts.
        """
        if len(completions) != batch.num_prompts:
            raise PluginError(
                f"expected one group of completions per prompt, got {len(completions)} groups for {batch.num_prompts} prompts",
                place="completions",
            )
        sizes = [len(group) for group in completions]
        flat = [completion for group in completions for completion in group]
        names = [f"row {row}" for row, size in zip(batch.rows, sizes, strict=True) for _ in range(size)]
        lengths = torch.tensor([len(completion.ids) for completion in flat], dtype=torch.long)
        masks = [[True] * len(one.ids) if one.mask is None else one.mask for one in flat]
        columns = {
            column: _padded(values, lengths, names, field, torch.float32)
            for column, field in (
                ("sampled_logps", "logprobs"), ("raw_logps", "raw_logprobs"), ("kept_mass", "kept_mass"),
            )
            if any(map(len, values := [getattr(one, field) for one in flat])) or not lengths.any()
        }  # fmt: skip
        made = replace(
            batch,
            response_ids=_padded([one.ids for one in flat], lengths, names, "ids", torch.long),
            response_lengths=lengths,
            owner=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long)),
            loss_mask=_padded(masks, lengths, names, "mask", torch.bool),
            per_response={
                "truncated": torch.tensor([one.truncated for one in flat], dtype=torch.bool),
                "policy_version": torch.tensor([one.policy_version for one in flat], dtype=torch.long),
            },
            per_token=columns,
        )
        return made.to(batch.device)

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        """Return the batches' prompts and responses as one batch, in order, padded to the widest.

        Raises:
            ValueError: there is no batch, or a column isn't in all of them.
        """
        if not batches:
            raise ValueError("`Batch.cat` needs at least one batch")
        for kind in ("per_prompt", "per_response", "per_token"):
            held = [{*getattr(batch, kind)} for batch in batches]
            if different := sorted(set.union(*held) - set.intersection(*held)):
                raise ValueError(f"only some of the batches have the {kind} column {different[0]!r}")
        for kind in ("prompts", "records", "places"):
            # A batch without a prompt has none to show.
            if len({bool(getattr(batch, kind)) for batch in batches if batch.num_prompts}) > 1:
                raise ValueError(f"only some of the batches have `{kind}`")
        width = max(batch.prompt_ids.shape[1] for batch in batches)
        length = max(batch.response_ids.shape[1] for batch in batches)
        wide = [batch.pad(width - batch.prompt_ids.shape[1], length - batch.response_ids.shape[1]) for batch in batches]
        starts = itertools.accumulate((batch.num_prompts for batch in batches), initial=0)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(batch, name) for batch in wide])

        def columns(kind: str) -> dict[str, Tensor]:
            tables = [getattr(batch, kind) for batch in wide]
            return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}

        return replace(
            wide[-1],
            prompt_ids=joined("prompt_ids"),
            prompt_lengths=joined("prompt_lengths"),
            response_ids=joined("response_ids"),
            response_lengths=joined("response_lengths"),
            owner=torch.cat([batch.owner + start for batch, start in zip(wide, starts, strict=False)]),
            loss_mask=joined("loss_mask"),
            rows=tuple(row for batch in batches for row in batch.rows),
            per_prompt=columns("per_prompt"),
            per_response=columns("per_response"),
            per_token=columns("per_token"),
            prompts=tuple(prompt for batch in batches for prompt in batch.prompts),
            records=tuple(record for batch in batches for record in batch.records),
            places=tuple(place for batch in batches for place in batch.places),
        )

    @property
    def num_prompts(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def num_responses(self) -> int:
        return self.response_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.prompt_ids.device

    @property
    def num_tokens(self) -> int:
        """Real tokens: each prompt counted once, padding not at all."""
        return int(on_host(self.prompt_lengths).sum() + on_host(self.response_lengths).sum())

    @property
    def longest(self) -> int:
        """Length in tokens of the longest response together with its prompt."""
        return int((on_host(self.prompt_lengths)[on_host(self.owner)] + on_host(self.response_lengths)).max())

    @property
    def response_places(self) -> Tensor:
        """(R,) long: the place of each response's prompt in the run's order of rows, the same for any number of processes."""
        return torch.tensor(self.places or self.rows, dtype=torch.long)[self.owner.cpu()]

    @property
    def engine_logps(self) -> Tensor:
        """(R, T): log-probabilities of completions by the engine at its temperature, nats; 0 outside the loss mask.

        They are those from before top-p and top-k truncated the distribution: what the policy's own are compared with.
        """
        logps = self["sampled_logps"] + self["kept_mass"].clamp(min=1e-30).log()
        return torch.where(self.loss_mask, logps, 0.0)

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens inside the loss mask."""
        return int(on_host(self.loss_mask).sum())

    def __getitem__(self, name: str) -> Tensor:
        """Return the attached column of that name, wherever it is attached."""
        for columns in (self.per_response, self.per_prompt, self.per_token):
            if name in columns:
                return columns[name]
        known = [*self.per_prompt, *self.per_response, *self.per_token]
        raise KeyError(f"the batch has no column {name!r}; it has {known}")

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split a response column (2P, ...) of a preference batch into chosen and rejected, each (P, ...).

        A preference batch holds each prompt's chosen response directly before its rejected one.
        """
        if values.shape[0] != 2 * self.num_prompts:
            raise ValueError(f"expected two responses a prompt ({2 * self.num_prompts} rows), got {values.shape[0]}")
        chosen, rejected = values.unflatten(0, (self.num_prompts, 2)).unbind(1)
        return chosen, rejected

    def attach(
        self,
        *,
        per_prompt: Mapping[str, Tensor] | None = None,
        per_response: Mapping[str, Tensor] | None = None,
        per_token: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """Return the batch with columns added; each must have its axis's length."""
        for kind, columns, lead in (
            ("per_prompt", per_prompt, (self.num_prompts,)),
            ("per_response", per_response, (self.num_responses,)),
            ("per_token", per_token, tuple(self.response_ids.shape)),
        ):
            for name, column in (columns or {}).items():
                if tuple(column.shape[: len(lead)]) != lead:
                    raise ValueError(f"{kind} column {name!r} must start with shape {lead}, got {tuple(column.shape)}")
        return replace(
            self,
            per_prompt={**self.per_prompt, **(per_prompt or {})},
            per_response={**self.per_response, **(per_response or {})},
            per_token={**self.per_token, **(per_token or {})},
        )

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: to_device(tensor, device))

    def select(self, prompts: Sequence[int] | Tensor) -> Batch:
        """Return the batch of these prompts, in this order, with all responses of each, trimmed to the longest."""
        chosen = torch.as_tensor(prompts, dtype=torch.long, device=self.device)
        position = torch.full((self.num_prompts,), -1, dtype=torch.long, device=self.device)
        position[chosen] = torch.arange(len(chosen), device=self.device)
        owner = position[self.owner]
        # Stable: responses of one prompt keep their order (chosen before rejected).
        responses = torch.argsort(torch.where(owner < 0, self.num_prompts, owner), stable=True)[
            : int((owner >= 0).sum())
        ]
        width = _longest(self.prompt_lengths[chosen])
        length = _longest(self.response_lengths[responses])
        picks = chosen.tolist()
        return Batch(
            prompt_ids=self.prompt_ids[chosen, :width],
            prompt_lengths=self.prompt_lengths[chosen],
            response_ids=self.response_ids[responses, :length],
            response_lengths=self.response_lengths[responses],
            owner=owner[responses],
            loss_mask=self.loss_mask[responses, :length],
            rows=tuple(self.rows[p] for p in picks),
            per_prompt={name: column[chosen] for name, column in self.per_prompt.items()},
            per_response={name: column[responses] for name, column in self.per_response.items()},
            per_token={name: column[responses, :length] for name, column in self.per_token.items()},
            prompts=tuple(self.prompts[p] for p in picks) if self.prompts else (),
            records=tuple(self.records[p] for p in picks) if self.records else (),
            places=tuple(self.places[p] for p in picks) if self.places else (),
        )

    def prompt_tokens(self) -> Tensor:
        """Return (P,) the tokens of each prompt together with all of its responses."""
        return self.prompt_lengths.index_add(0, self.owner, self.response_lengths)

    def take(self, responses: Sequence[int] | Tensor) -> Batch:
        """Return the batch of these responses, in this order, and of the prompts that they answer, trimmed to the longest."""
        chosen = torch.as_tensor(responses, dtype=torch.long, device=self.device)
        prompts, owner = torch.unique(self.owner[chosen], return_inverse=True)
        part = replace(
            self,
            response_ids=self.response_ids[chosen],
            response_lengths=self.response_lengths[chosen],
            owner=self.owner[chosen],
            loss_mask=self.loss_mask[chosen],
            per_response={name: column[chosen] for name, column in self.per_response.items()},
            per_token={name: column[chosen] for name, column in self.per_token.items()},
        )
        found = part.select(prompts)
        # `select` puts responses in the order of their prompts; theirs was asked for.
        back = torch.argsort(torch.argsort(owner, stable=True))
        return found._reordered(back)

    def prompts_in_responses(self) -> Batch:
        """Return a batch in which each response begins with all but the first token of its prompt, so that a loss can reach them.

        There is a prompt of one token for each response. The tokens that moved are outside the loss mask, and 0 in columns per
        token.
        """
        owner, before = on_host(self.owner), on_host(self.prompt_lengths)[on_host(self.owner)] - 1  # (R,), (R,)
        lengths = before + on_host(self.response_lengths)
        steps = torch.arange(_longest(lengths), device=self.device)
        moved = to_device(before, self.device)[:, None]
        inside = steps < to_device(lengths, self.device)[:, None]  # (R, T')
        own = inside & (steps >= moved)
        at = (steps - moved).clamp(0, max(0, self.response_ids.shape[1] - 1))

        def behind(column: Tensor, front: Tensor | int = 0) -> Tensor:
            """Return a column (R, T, ...) behind `front`, as (R, T', ...)."""
            if not column.shape[1]:
                column = column.new_zeros(column.shape[0], 1, *column.shape[2:])
            shape = (*at.shape, *[1] * (column.ndim - 2))
            found = column.gather(1, at.view(shape).expand(*at.shape, *column.shape[2:]))
            return torch.where(own.view(shape), found, front)

        prompts = self.prompt_ids[self.owner]
        front = prompts.gather(1, (steps + 1).clamp(max=prompts.shape[1] - 1).expand(len(owner), -1))
        picks = owner.tolist()
        return Batch(
            prompt_ids=prompts[:, :1],
            prompt_lengths=torch.ones_like(self.owner),
            response_ids=behind(self.response_ids, torch.where(inside, front, 0)),
            response_lengths=to_device(lengths, self.device),
            owner=torch.arange(len(picks), device=self.device),
            loss_mask=behind(self.loss_mask).bool(),
            rows=tuple(self.rows[prompt] for prompt in picks),
            per_prompt={name: column[self.owner] for name, column in self.per_prompt.items()},
            per_response=dict(self.per_response),
            per_token={name: behind(column) for name, column in self.per_token.items()},
            prompts=tuple(self.prompts[prompt] for prompt in picks) if self.prompts else (),
            records=tuple(self.records[prompt] for prompt in picks) if self.records else (),
            places=tuple(self.places[prompt] for prompt in picks) if self.places else (),
        )

    def split(
        self, *, size: int | None = None, max_tokens: int | None = None, by_length: bool = True, divide: bool = False
    ) -> list[Batch]:
        """Cut into micro-batches of at most `size` prompts and so many tokens.

        Which rows share an optimiser step never depends on this cut, so the step's gradient doesn't either. With
        `by_length`, rows of like length share a micro-batch. With `divide`, the cut may fall between a prompt's responses, `size`
        counts responses, and prompts without any are left out; else they stay together. An entry longer than `max_tokens`
        gets a micro-batch of its own.
        """
        cost = self.prompt_tokens().tolist()
        order = sorted(range(self.num_prompts), key=cost.__getitem__) if by_length else list(range(self.num_prompts))
        if not divide:
            return [self.select(cut) for cut in _cuts(order, lambda prompt, _: cost[prompt], size, max_tokens)]
        lengths, owners = self.response_lengths.tolist(), self.owner.tolist()
        prompt_lengths = self.prompt_lengths.tolist()
        of_prompt: list[list[int]] = [[] for _ in range(self.num_prompts)]
        for response, owner in enumerate(owners):
            of_prompt[owner].append(response)

        def tokens(response: int, cut: Sequence[int]) -> int:
            known = bool(cut) and owners[cut[-1]] == owners[response]  # a prompt's responses are neighbours
            return int(lengths[response]) + (0 if known else int(prompt_lengths[owners[response]]))

        responses = [
            response
            for prompt in order
            for response in (sorted(of_prompt[prompt], key=lengths.__getitem__) if by_length else of_prompt[prompt])
        ]
        return [self.take(sorted(cut)) for cut in _cuts(responses, tokens, size, max_tokens)]

    def pad(self, prompt_tokens: int = 0, response_tokens: int = 0, *, value: int = 0) -> Batch:
        """Return the same batch with columns of padding added on the right. No result may depend on it."""

        def grow(tensor: Tensor, extra: int, fill: int | bool | float) -> Tensor:
            shape = (tensor.shape[0], extra, *tensor.shape[2:])
            return torch.cat([tensor, tensor.new_full(shape, fill)], dim=1)

        return replace(
            self,
            prompt_ids=grow(self.prompt_ids, prompt_tokens, value),
            response_ids=grow(self.response_ids, response_tokens, value),
            loss_mask=grow(self.loss_mask, response_tokens, False),
            per_token={name: grow(column, response_tokens, 0) for name, column in self.per_token.items()},
        )

    def _reordered(self, order: Tensor) -> Batch:
        """Return the batch with its responses in another order."""
        return replace(
            self,
            response_ids=self.response_ids[order],
            response_lengths=self.response_lengths[order],
            owner=self.owner[order],
            loss_mask=self.loss_mask[order],
            per_response={name: column[order] for name, column in self.per_response.items()},
            per_token={name: column[order] for name, column in self.per_token.items()},
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `change` applied to every tensor, columns included."""

        def each(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(column) for name, column in columns.items()}

        return replace(
            self,
            prompt_ids=change(self.prompt_ids),
            prompt_lengths=change(self.prompt_lengths),
            response_ids=change(self.response_ids),
            response_lengths=change(self.response_lengths),
            owner=change(self.owner),
            loss_mask=change(self.loss_mask),
            per_prompt=each(self.per_prompt),
            per_response=each(self.per_response),
            per_token=each(self.per_token),
        )


def _cuts(
    order: Sequence[int], tokens: Callable[[int, Sequence[int]], int], size: int | None, max_tokens: int | None
) -> list[list[int]]:
    """Divide `order` into successive runs of at most `size` entries and `max_tokens` tokens each.

    `tokens(entry, run)` returns how many tokens the entry adds to a run. An entry over `max_tokens` is a run of its own.
    """
    cuts: list[list[int]] = []
    used = 0
    for entry in order:
        full = cuts and (
            (size is not None and len(cuts[-1]) >= size)
            or (max_tokens is not None and used + tokens(entry, cuts[-1]) > max_tokens)
        )
        if not cuts or full:
            cuts.append([])
            used = 0
        used += tokens(entry, cuts[-1])
        cuts[-1].append(entry)
    return cuts


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _padded(
    values: Sequence[Sequence[Any]], lengths: Tensor, names: Sequence[str], field: str, dtype: torch.dtype
) -> Tensor:
    """Return (R, T) values of completions, 0 beyond each length.

    Raises:
        PluginError: a completion has another number of values than of tokens.
    """
    table = torch.zeros(len(values), _longest(lengths), dtype=dtype)
    for line, value, length, name in zip(table, values, lengths.tolist(), names, strict=True):
        if len(value) != length:
            raise PluginError(f"a completion's `{field}` has {len(value)} values for {length} tokens", place=name)
        line[:length] = torch.as_tensor(value, dtype=dtype)
    return table
