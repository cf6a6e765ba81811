"""Several models that draw each token together, as one: their logits or their probabilities are averaged.

Each model keeps its own keys and values, and reads a prompt once for all its completions. In a step every model reads the last
token of each row, and one `DrawnRows` draws from what their logits come to; so options, seeds, limits and what ends a
completion are those of any other completion. A row takes part while it has a place in the memory of every model; the others
wait. Where a model's cache runs full, the row that joined last leaves all models, and begins again later with the same random
numbers.

Axes: R rows, V vocabulary, M models.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.backend import ALWAYS, Backend, Capabilities
from rlhf_core.generation.drawn_rows import DrawnCompletion, DrawnRows
from rlhf_core.generation.member_rows import CachedRows, MemberRows, PlainRows
from rlhf_core.generation.memory import MOST_ROWS, free_bytes
from rlhf_core.generation.native_backend import NativeBackend, run_in_memory
from rlhf_core.generation.plain import new_row
from rlhf_core.generation.requests import Finished, Request
from rlhf_core.generation.watching import counting_forwarded, report_tokens
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, NumbersError
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.models.same_vocabulary import check_same_vocabulary

Pooling = Literal["logits", "probabilities"]


def pooled_logits(logits: Iterable[Tensor], weights: Sequence[float], pooling: Pooling, *, size: int) -> Tensor:
    """Return (R, V) the logits of the distribution that several models' distributions are pooled to.

    `logits` is the weighted mean of logits: softmax(Σ wₘ zₘ), the geometric mean of the distributions, normalised (log-linear
    pooling, Genest & Zidek 1986). What a model adds to all its logits of a token drops out. `probabilities` is the logarithm of
    Σ wₘ softmax(zₘ), the arithmetic mean (linear pooling). Of a single model the logits are returned as they are.

    Args:
        logits: (R, at least V) of each model, used before the next is asked for.
        weights: one per model, above 0; their sum is 1.
        size: V, the ids that all models have: a distribution is the one over these, where a padded embedding has more.
    """
    if len(weights) == 1:
        return next(iter(logits))
    total: Tensor | None = None
    for own, weight in zip(logits, weights, strict=True):
        part = own[:, :size].float()
        if pooling == "logits":
            total = part * weight if total is None else total.add_(part, alpha=weight)
        else:
            part = part.log_softmax(dim=-1).add_(math.log(weight))
            total = part if total is None else torch.logaddexp(total, part, out=total)
    assert total is not None
    return total


@dataclass(frozen=True)
class _Member:
    """One of the models."""

    number: int
    policy: PolicyModel
    weight: float
    backend: NativeBackend
    """Keeps its prompts between calls."""


@dataclass
class LockstepRow:
    """A completion that all models draw together."""

    request: Request
    ids: list[int]
    """The prompt's tokens and those drawn."""
    before: DrawnCompletion | None = None
    """What it had drawn before it had to leave."""
    left_alone_at: int | None = None
    """How many tokens it had when it left though it was the only one."""

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.request.limit - (len(self.ids) - len(self.request.ids))


class EnsembleBackend(Backend):
    """Draws each token from the distributions of several models, pooled.

    The engine that it is for is one on the first model, with whose tokenizer prompts are encoded. `raw_logprobs` are those of the
    pooled distribution; temperature, truncation and all other options apply to it. A model of weight 0 isn't run.

    Args:
        policies: the models, all of one vocabulary and on one device.
        weights: one per model, at least 0, whatever their sum; None weighs all alike.
        pooling: see `pooled_logits`.
        memory: most bytes for all keys and values; None takes what `free_bytes` allows. Each model gets an equal part.
        most_rows: most completions that are decoded at once.
        counted: called with a model's number and how many tokens it was run on, after each forward pass.

    Raises:
        ConfigError: another number of weights, one below 0, none above 0, the same model twice, or models on different devices.
        ModelError: the vocabularies differ, or a model has no logits for some of its tokens.
    """

    name = "ensemble"
    capabilities = Capabilities(
        live_weights=True,
        exact_logprobs=True,
        rules=True,
        options=frozenset(SamplingConfig.model_fields) - ALWAYS - {"draft"},
    )

    def __init__(
        self,
        policies: Sequence[PolicyModel],
        weights: Sequence[float] | None = None,
        pooling: Pooling = "logits",
        *,
        memory: int | None = None,
        most_rows: int = MOST_ROWS,
        counted: Callable[[int, int], None] | None = None,
    ) -> None:
        shares = checked_weights(weights, len(policies))
        check_members(policies)
        self.pooling, self.memory, self.most_rows, self.counted = pooling, memory, most_rows, counted
        self._members = [
            _Member(number, policy, share, NativeBackend(policy, memory=None, most_rows=most_rows))
            for number, (policy, share) in enumerate(zip(policies, shares, strict=True))
            if share > 0
        ]
        self._device = policies[0].device
        self._size = min(_num_logits(one.policy) for one in self._members)
        for policy in policies:
            if (missing := max(policy.tokenizer.get_vocab().values()) + 1 - self._size) > 0:
                least = min(self._members, key=lambda one: _num_logits(one.policy)).policy
                raise ModelError(
                    "the model has no logits for all tokens of its tokenizer", place=least.source,
                    got=f"{self._size:,} logits, {missing:,} fewer than ids", fix="use a model of the whole vocabulary",
                )  # fmt: skip

    def run(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, partly: bool = False
    ) -> Generator[Finished]:
        """Yield completions as they end, in half as many rows at once wherever memory runs out.

        A completion has no more tokens than the model with the fewest positions has room for.

        Raises:
            DataError: a prompt leaves no room for a token among a model's positions.
            NumbersError: memory doesn't suffice for one completion.
        """
        fitting = [self._fitting(request) for request in requests]

        def attempt(left: Sequence[Request], rows: int) -> Generator[Finished]:
            return self._run(left, sampling, rows)

        try:
            with contextlib.closing(run_in_memory(attempt, fitting, self.most_rows, self._device)) as running:
                yield from running
        finally:
            for member in self._members:
                member.backend.rest()

    def forget(self) -> None:
        for member in self._members:
            member.backend.forget()

    def _fitting(self, request: Request) -> Request:
        """Return a request with the limit that all models' positions allow."""
        limit = request.limit
        for member in self._members:
            positions = member.policy.max_positions
            if positions is not None and positions <= len(request.ids):
                raise DataError(
                    "the prompt leaves no room for a completion among a model's positions", place=member.policy.source,
                    got=f"{len(request.ids)} tokens for {positions} positions", fix="shorten the prompt",
                )  # fmt: skip
            limit = limit if positions is None else min(limit, positions - len(request.ids))
        return replace(request, limit=limit)

    def _run(self, requests: Sequence[Request], sampling: SamplingConfig, most_rows: int) -> Generator[Finished]:
        memory = free_bytes(self._device) if self.memory is None else self.memory
        with contextlib.ExitStack() as stack:
            members: list[MemberRows] = []
            for member in self._members:
                member.backend.memory = max(1, memory // len(self._members))
                lent = stack.enter_context(member.backend.lending_by_pass(requests))
                counting = partial(self._counting, member)
                kind = PlainRows if lent.decoding is None else CachedRows
                members.append(kind(member.policy, lent, counting, memory=member.backend.memory))
                stack.callback(members[-1].keep, [])
            weights = [member.weight for member in self._members]

            def logits(rows: Sequence[LockstepRow]) -> Tensor:
                each = (member.logits(rows) for member in members)
                return pooled_logits(each, weights, self.pooling, size=self._size)

            yield from _Lockstep(members, logits, DrawnRows(sampling, device=self._device), most_rows).run(requests)

    @contextlib.contextmanager
    def _counting(self, member: _Member) -> Iterator[None]:
        """Let whoever counts know what a model is run on inside the context."""
        if self.counted is None:
            yield
        else:
            with counting_forwarded(partial(self.counted, member.number), of=member.policy.network):
                yield


class _Lockstep:
    """The loop: rows join, all models read their last tokens, one token is drawn for each, and rows that have ended leave.

    Args:
        members: where each model keeps the rows.
        logits: what the models make of the rows together.
    """

    def __init__(
        self,
        members: Sequence[MemberRows],
        logits: Callable[[Sequence[LockstepRow]], Tensor],
        drawing: DrawnRows,
        most_rows: int,
    ) -> None:
        self._members, self._logits, self._drawing, self._most_rows = members, logits, drawing, most_rows
        self._waiting: deque[LockstepRow] = deque()
        self._rows: list[LockstepRow] = []
        """In the order in which they joined, which is that of every model's rows and of `_drawing`."""

    def run(self, requests: Iterable[Request]) -> Generator[Finished]:
        """Yield completions in the order in which they end."""
        self._waiting.extend(LockstepRow(request, list(request.ids)) for request in requests)
        while self._waiting or self._rows:
            self._admit()
            self._make_places()
            if self._rows:
                self._drawing.draw(self._logits(self._rows))
                yield from self._ended()

    def _admit(self) -> None:
        """Let waiting rows join as far as every model has room; of none at all the first one joins nonetheless."""
        room = self._most_rows - len(self._rows)
        for member in self._members:
            room = member.reserve(list(islice(self._waiting, room)), active=len(self._rows))
        joining = [self._waiting.popleft() for _ in range(room)]
        for member in self._members:
            member.join(joining)
        self._rows += joining
        self._drawing.join([new_row(row.request, row.before) for row in joining])

    def _make_places(self) -> None:
        """Make places for each row's last token in every model; rows that joined last leave where there are none.

        Raises:
            NumbersError: memory doesn't suffice for one row.
        """
        while self._rows and not all(member.make_places(self._rows) for member in self._members):
            row = self._rows[-1]
            if len(self._rows) == 1:
                if row.left_alone_at == len(row.ids):
                    raise NumbersError(
                        "the memory for keys and values doesn't suffice for one completion", place="generation",
                        got=f"no room for {len(row.ids):,} tokens in each of {len(self._members)} models",
                        fix="shorten prompts or `max_new_tokens`, or allow more memory",
                    )  # fmt: skip
                row.left_alone_at = len(row.ids)
                for member in self._members:
                    member.clear()
            row.before = self._drawing.completion(len(self._rows) - 1)
            self._keep(range(len(self._rows) - 1))
            self._waiting.appendleft(row)

    def _ended(self) -> list[Finished]:
        """Return the completions that have ended with the tokens just drawn; their rows leave."""
        ended = dict(self._drawing.ended())
        for index, row in enumerate(self._rows):
            row.ids += self._drawing.fresh(index)
            rule = row.request.rule
            if rule is not None and index not in ended and rule(row.ids[len(row.request.ids) :]):
                ended[index] = "rule"
        report_tokens(len(self._rows))
        found = []
        for index, reason in ended.items():
            drawn = self._drawing.completion(index)
            found.append(Finished(self._rows[index].request.number, drawn, reason, drawn.text, None))
        if ended:
            self._keep([index for index in range(len(self._rows)) if index not in ended])
        return found

    def _keep(self, indices: Sequence[int]) -> None:
        for member in self._members:
            member.keep(indices)
        self._drawing.keep(indices)
        self._rows = [self._rows[index] for index in indices]


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one weight per model, whose sum is 1.

    Raises:
        ConfigError: another number of weights, one that isn't a number of at least 0, or none above 0.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigError(
            "an ensemble needs one weight per model, the policy's first", place="`weights`",
            got=f"{len(weights)} for {count} models",
        )  # fmt: skip
    if any(not (math.isfinite(weight) and weight >= 0) for weight in weights) or not any(weights):
        problem = "weights must be numbers of at least 0, and not all 0"
        raise ConfigError(problem, place="`weights`", got=", ".join(f"{weight:g}" for weight in weights))
    return [weight / sum(weights) for weight in weights]


def check_members(policies: Sequence[PolicyModel]) -> None:
    """Refuse models that can't draw a token together.

    Raises:
        ConfigError: the same model twice, or models on different devices.
        ModelError: the vocabularies differ.
    """
    first, *others = policies
    for number, other in enumerate(others):
        if any(other is earlier for earlier in policies[: number + 1]):
            raise ConfigError(
                "the same model is given twice", place=f"`members[{number}]`", got=str(other.source),
                fix="give it once, with a larger weight",
            )  # fmt: skip
        if other.device != first.device:
            raise ConfigError(
                "the models must be on one device", place=f"`members[{number}]`",
                got=f"{other.device}, and {first.device} for the policy", fix="load both on the same device",
            )  # fmt: skip
        check_same_vocabulary(f"members[{number}]", other, first, main_is="the policy")


def _num_logits(policy: PolicyModel) -> int:
    size: int = policy.network.config.get_text_config().vocab_size
    return size
