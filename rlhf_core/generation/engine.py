"""Completions of a batch's prompts, tokens in and tokens out, through transformers' own decoding loop."""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from transformers import GenerationConfig

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch, on_host
from rlhf_core.contracts.completion import Completion
from rlhf_core.data.chat_rendering import ChatTemplate
from rlhf_core.data.text_options import TextOptions
from rlhf_core.data.text_spans import TextSpanEncoder
from rlhf_core.generation.decoding import decode, decoding_of, left_padded
from rlhf_core.generation.sampling import Drawing, Ended
from rlhf_core.infra.errors import ConfigError, DataError, NumbersError
from rlhf_core.infra.out_of_memory import halve_until_fits
from rlhf_core.infra.seeds import completion_seeds
from rlhf_core.models.backbone import accepted
from rlhf_core.models.dropout import evaluating

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel

MOST_ROWS = 512
HOST_BYTES = 2**31
"""Bytes that one decoding loop may take where nobody says how many are free; more makes faster, larger batches."""


@dataclass(frozen=True)
class _Row:
    """One completion to be drawn."""

    number: int
    """Its place among all."""
    prompt: int
    ids: list[int]
    seed: int
    limit: int
    """Most tokens that it may have."""
    chat: bool
    """Whether it is a turn of a chat, and not the continuation of a text."""
    ends: tuple[int, ...]
    """The ids that end it."""


class Engine:
    """Draws completions from a policy, live: what it is trained to between two calls counts in the second.

    Args:
        policy: read in evaluation mode, without gradients, and left in the mode that it was in.
        seed: of every draw for which no seeds are given; None takes one from torch's global state.
    """

    def __init__(self, policy: PolicyModel, *, seed: int | None = 0) -> None:
        self.policy = policy
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self.policy_version = 0
        self._stream: tuple[Any, ...] = ()
        self._met: Counter[tuple[int, ...]] = Counter()

    def begin(self, name: str, *index: int, policy_version: int = 0) -> None:
        """Begin a stream of draws: what is drawn from here on is a function of (seed, name, index), row number and occurrence.

        For the core, which begins one for each step, so that a resumed run draws what the run would have drawn.

        Args:
            policy_version: optimiser steps that the policy has made.
        """
        self._stream, self._met, self.policy_version = (name, *index), Counter(), policy_version

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        n: int = 1,
        sampling: SamplingConfig | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        policy_version: int | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, in the order in which they were drawn.

        A completion depends on its prompt's ids and its seed alone, up to the rounding of logits: not on what is drawn with it,
        nor on how memory cuts the work.

        Args:
            batch: its prompts are taken as they are encoded; its responses don't matter.
            sampling: how tokens are drawn; the defaults where None.
            seeds: for each prompt, one for each completion. None takes the engine's own: functions of its seed and, between
                `begin` and the next, of row numbers and places, else of the prompts' ids; the same prompt again is another draw.
            policy_version: optimiser steps that the policy has made; None takes what `begin` was given.

        Raises:
            ConfigError: n is below 1, or there aren't as many seeds.
            DataError: a prompt leaves no room for a token among the model's positions.
            ModelError: the model can't generate.
            NumbersError: logits aren't finite, or memory doesn't suffice for one completion.
        """
        sampling = sampling or SamplingConfig()
        if isinstance(n, bool) or not isinstance(n, SupportsIndex) or operator.index(n) < 1:
            raise ConfigError("must be a whole number, at least 1", place="generate(n=…)", got=repr(n))
        n = operator.index(n)
        if seeds is None:
            rows, places = (batch.rows, batch.places) if self._stream else (prompt_keys(batch), ())
            stream = self._stream or ("generate",)
            seeds = completion_seeds(self.seed, *stream, rows=rows, places=places, n=n, met=self._met)
        if [len(each) for each in seeds] != [n] * batch.num_prompts:
            raise ConfigError(f"must be {n} seeds for each of {batch.num_prompts} prompts", place="generate(seeds=…)")
        rows_to_draw = self._rows(batch, seeds, sampling.max_new_tokens)
        version = self.policy_version if policy_version is None else policy_version
        drawn: list[Completion | None] = [None] * len(rows_to_draw)
        with self._reading():
            for part in self._parts(rows_to_draw):
                work = halve_until_fits(
                    part,
                    lambda rows: self._decode(batch, rows, sampling, version),
                    lambda rows: [half for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if half],
                    device=self.policy.device,
                    unit="completion",
                )
                for row, completion in zip(part, (one for piece in work for one in piece), strict=True):
                    drawn[row.number] = completion
        found = [completion for completion in drawn if completion is not None]
        return [found[start : start + n] for start in range(0, len(found), n)]

    # What is drawn together

    def _rows(self, batch: Batch, seeds: Sequence[Sequence[int]], max_new_tokens: int) -> list[_Row]:
        rows: list[_Row] = []
        positions = self.policy.max_positions
        lengths = on_host(batch.prompt_lengths).tolist()
        for prompt, (ids, length) in enumerate(zip(on_host(batch.prompt_ids).tolist(), lengths, strict=True)):
            room = max_new_tokens if positions is None else min(max_new_tokens, positions - length)
            if room < 1:
                raise DataError(
                    "the prompt leaves no room for a completion among the model's positions",
                    place=f"row {batch.rows[prompt]}",
                    got=f"{length} tokens for {positions} positions",
                    fix="shorten the prompt, or set a smaller `max_length`",
                )
            chat = self._is_chat(batch, prompt)
            ends = self._own_ends + (self._turn_ends if chat else ())
            rows += [
                _Row(len(rows) + k, prompt, ids[:length], seed, room, chat, ends)
                for k, seed in enumerate(seeds[prompt])
            ]
        return rows

    def _parts(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Yield rows that may be drawn together: of like length, and not more than are likely to fit in memory."""
        company, positions = decoding_of(self.policy).company, self.policy.max_positions or 2**31
        fixed, per_token, room = *self._bytes(), _free_bytes(self.policy.device)
        part: list[_Row] = []
        for row in sorted(rows, key=lambda row: len(row.ids)):
            length = len(row.ids)
            if part:
                apart = company == "none" or (company == "equal" and length != len(part[0].ids))
                # A row that has ended runs on until all have: none may run out of positions.
                apart = apart or length + part[0].limit > positions
                size = fixed + per_token * (length + part[0].limit)
                if apart or len(part) == MOST_ROWS or (len(part) + 1) * size > room:
                    yield part
                    part = []
            part.append(row)
        if part:
            yield part

    def _bytes(self) -> tuple[int, int]:
        """Return about how many bytes a row takes for the work on its logits, and for each token's keys and values."""
        config = self.policy.network.config.get_text_config()

        def said(name: str, default: int) -> int:
            try:
                value = getattr(config, name, None)
            except Exception:
                value = None  # a number for each layer, which is not to be asked for as one
            return value if isinstance(value, int) and value > 0 else default

        heads = said("num_attention_heads", 1)
        width = said("head_dim", self.policy.width // heads)
        held, layers = said("num_key_value_heads", heads), said("num_hidden_layers", 1)
        size = 4 if self.policy.precision == torch.float32 else 2
        vocabulary = said("vocab_size", len(self.policy.tokenizer))
        # A layer's cache is copied as it grows; softmax, order and sums are each of the vocabulary, some in float64.
        every = 0 if accepted(self.policy.network.forward, logits_to_keep=1) else 4 * vocabulary
        return 40 * vocabulary, 2 * (layers + 1) * held * width * size + every

    # The decoding loop

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Have the policy compute as it does when it is scored, and nothing of its own settings touch its logits."""
        policy = self.policy
        model, own = policy.causal_lm, policy.causal_lm.generation_config
        model.generation_config = GenerationConfig()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(evaluating(policy))
                stack.enter_context(policy.product_precision())
                if policy.compiled:
                    # A block would be compiled again for the cache, and for each length of it.
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                yield
        finally:
            model.generation_config = own

    def _decode(
        self, batch: Batch, rows: Sequence[_Row], sampling: SamplingConfig, policy_version: int
    ) -> list[Completion]:
        device = self.policy.device
        drawing = Drawing(
            sampling,
            seeds=[row.seed for row in rows],
            limits=[row.limit for row in rows],
            ends=[row.ends for row in rows],
            filler=self.policy.tokenizer.pad_token_id or 0,
            device=device,
        )
        ids, mask = left_padded([row.ids for row in rows], device)
        most, cache = max(row.limit for row in rows), decoding_of(self.policy).cache
        decode(self.policy, ids, mask, drawing, Ended(drawing), most=most, cache=cache)
        made = []
        for row, length, tokens, logprobs, raw, mass in zip(rows, *drawing.columns(), strict=True):
            tokens = tokens[:length]
            ended = tokens[-1] in row.ends
            if not all(map(math.isfinite, (*raw[:length], *logprobs[:length]))):
                raise NumbersError(
                    "the model's logits aren't finite", place=f"row {batch.rows[row.prompt]}", fix="check its weights"
                )
            made.append(
                Completion(
                    text=self._text(row, tokens[:-1] if ended else tokens),
                    ids=tokens,
                    logprobs=logprobs[:length],
                    raw_logprobs=raw[:length],
                    kept_mass=mass[:length],
                    stop_reason="end" if ended else "length",
                    policy_version=policy_version,
                )
            )
        return made

    # Texts

    def _is_chat(self, batch: Batch, prompt: int) -> bool:
        """Tell whether a prompt went through the chat template; one that isn't known is taken for a text."""
        asked = batch.prompts[prompt] if batch.prompts else ""
        return not isinstance(asked, str) or (bool(asked) and TextOptions.of(self.policy.tokenizer).wrap == "chat")

    def _text(self, row: _Row, ids: list[int]) -> str:
        """Return the text of a completion; the blank that a continued text begins with is a part of it, a turn begins a text."""
        return str(self.policy.tokenizer.decode(ids)) if row.chat else self._pieces.text_of(ids)

    @cached_property
    def _own_ends(self) -> tuple[int, ...]:
        """The tokenizer's end token, and what the model itself says ends its texts."""
        own = getattr(self.policy.causal_lm.generation_config, "eos_token_id", None)
        own = [own] if isinstance(own, int) else own or []
        return tuple(token for token in dict.fromkeys([self.policy.tokenizer.eos_token_id, *own]) if token is not None)

    @cached_property
    def _turn_ends(self) -> tuple[int, ...]:
        """What ends a turn by the chat template."""
        return ChatTemplate(self.policy.tokenizer).stops

    @cached_property
    def _pieces(self) -> TextSpanEncoder:
        return TextSpanEncoder(self.policy.tokenizer)


def prompt_keys(batch: Batch) -> list[int]:
    """Return a number for each prompt that is a function of its ids."""
    keys = []
    for ids, length in zip(on_host(batch.prompt_ids).tolist(), on_host(batch.prompt_lengths).tolist(), strict=True):
        digest = hashlib.sha256(repr(ids[:length]).encode()).digest()
        keys.append(int.from_bytes(digest[:8], "little") >> 1)
    return keys


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused) // 2
