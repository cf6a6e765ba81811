"""The engine: completions for a batch of prompts, token ids in and token ids out, through transformers' own decoding loop."""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from rlhf_core.generation.decoding import Drawing, Ended, decode, decoding_of, left_padded
from rlhf_core.generation.drawn_rows import DrawnRows, NewRow
from rlhf_core.generation.stop_strings import StopStrings
from rlhf_core.infra.errors import ConfigError, DataError, NumbersError
from rlhf_core.infra.out_of_memory import halve_until_fits
from rlhf_core.infra.seeds import completion_seeds
from rlhf_core.models.backbone import accepted
from rlhf_core.models.dropout import evaluating

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel

MOST_ROWS = 512
"""Most completions that are drawn in one decoding loop."""
HOST_BYTES = 2**31
"""Bytes that one decoding loop may use on a CPU; larger makes larger, faster batches."""


@dataclass(frozen=True)
class _Draw:
    """One completion to be drawn."""

    number: int
    """Its index among all completions of the call."""
    prompt: int
    """Index of its prompt in the batch."""
    ids: list[int]
    """The prompt's ids."""
    seed: int
    limit: int
    """Most new tokens."""
    chat: bool
    """Whether it is a turn of a chat; else it continues a text."""
    ends: tuple[int, ...]
    """The ids that end it."""


class Engine:
    """Draws completions from a policy with the weights that it has at the moment of the call.

    Args:
        policy: computes in evaluation mode, without gradients; afterwards its modules have their earlier modes again.
        seed: from which completions' seeds are derived where none are given; None takes one from torch's global random state.
    """

    def __init__(self, policy: PolicyModel, *, seed: int | None = 0) -> None:
        self.policy = policy
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self.policy_version = 0
        self._stream: tuple[Any, ...] = ()
        self._met: Counter[tuple[int, ...]] = Counter()
        self._stops: dict[tuple[bool | str, ...], StopStrings] = {}

    def begin(self, name: str, *index: int, policy_version: int = 0) -> None:
        """Begin a stream of draws: from here on seeds are a function of (engine's seed, name, index), row number and occurrence.

        The core begins one per step, so that a resumed run draws what the uninterrupted run would have drawn.

        Args:
            name: of the stream, such as `rollout`.
            index: numbers that tell streams of one name apart, such as the step.
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
        finished: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, in the order in which they were drawn.

        A completion depends on its prompt's ids and its seed alone, up to the rounding of logits: not on what else is drawn in
        the same call, nor on how memory divides the work.

        Args:
            batch: its encoded prompts are completed; its responses are ignored.
            sampling: how tokens are drawn, and what ends a completion; None takes the defaults.
            seeds: for each prompt, one per completion. None derives them from the engine's seed and, after `begin`, from row
                numbers and places in the data, else from the prompts' ids; a prompt that comes again gets other seeds.
            policy_version: optimiser steps that the policy has made; None takes what `begin` was given.
            finished: called with (prompt index, k, completion) as completions end, the k-th of that prompt, in no defined order.

        Raises:
            ConfigError: n is below 1, there is another number of seeds, or a stop id isn't in the vocabulary.
            DataError: a prompt leaves no room for a token among the model's positions.
            ModelError: the model can't generate.
            NumbersError: logits aren't finite, or memory doesn't suffice for one completion.
        """
        sampling = sampling or SamplingConfig()
        if isinstance(n, bool) or not isinstance(n, SupportsIndex) or operator.index(n) < 1:
            raise ConfigError("n must be a whole number, at least 1", place="generate(n=…)", got=repr(n))
        n = operator.index(n)
        if seeds is None:
            rows, places = (batch.rows, batch.places) if self._stream else (prompt_keys(batch), ())
            stream = self._stream or ("generate",)
            seeds = completion_seeds(self.seed, *stream, rows=rows, places=places, n=n, met=self._met)
        if [len(each) for each in seeds] != [n] * batch.num_prompts:
            problem = f"{n} completions of {batch.num_prompts} prompts need {n} seeds per prompt"
            raise ConfigError(problem, place="generate(seeds=…)", got=f"{[len(each) for each in seeds]} seeds")
        self._check_stop_ids(sampling)
        draws = self._draws(batch, seeds, sampling.max_new_tokens)
        version = self.policy_version if policy_version is None else policy_version
        made: list[Completion | None] = [None] * len(draws)
        with self._for_decoding():
            for together in self._batches(draws):
                decoded = halve_until_fits(
                    together,
                    lambda some: self._decode(batch, some, sampling, version),
                    lambda some: [half for half in (some[: len(some) // 2], some[len(some) // 2 :]) if half],
                    device=self.policy.device,
                    unit="completion",
                )
                for one, completion in zip(together, (c for some in decoded for c in some), strict=True):
                    made[one.number] = completion
                    if finished is not None:
                        finished(one.prompt, one.number % n, completion)
        found = [completion for completion in made if completion is not None]
        return [found[start : start + n] for start in range(0, len(found), n)]

    # Which completions are drawn together

    def _draws(self, batch: Batch, seeds: Sequence[Sequence[int]], max_new_tokens: int) -> list[_Draw]:
        """Return the completions to be drawn, prompt by prompt.

        Raises:
            DataError: a prompt leaves no room for a token.
        """
        draws: list[_Draw] = []
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
            draws += [
                _Draw(len(draws) + k, prompt, ids[:length], seed, room, chat, ends)
                for k, seed in enumerate(seeds[prompt])
            ]
        return draws

    def _batches(self, draws: list[_Draw]) -> Iterator[list[_Draw]]:
        """Yield completions to draw in one decoding loop: with prompts of like length, and few enough to fit in memory."""
        together, positions = decoding_of(self.policy).together, self.policy.max_positions or 2**31
        fixed, per_token, room = *self._bytes(), _free_bytes(self.policy.device)
        batch: list[_Draw] = []
        for draw in sorted(draws, key=lambda draw: len(draw.ids)):
            length = len(draw.ids)
            if batch:
                apart = together == "none" or (together == "equal" and length != len(batch[0].ids))
                # A row that has ended continues until all have ended: none may run out of positions.
                apart = apart or length + batch[0].limit > positions
                size = fixed + per_token * (length + batch[0].limit)
                if apart or len(batch) == MOST_ROWS or (len(batch) + 1) * size > room:
                    yield batch
                    batch = []
            batch.append(draw)
        if batch:
            yield batch

    def _bytes(self) -> tuple[int, int]:
        """Estimate how many bytes one completion needs for the work on its logits, and how many per token in the cache."""
        config = self.policy.network.config.get_text_config()

        def number(name: str, default: int) -> int:
            try:
                value = getattr(config, name, None)
            except Exception:
                value = None  # some configurations have one number per layer, and raise when asked for one
            return value if isinstance(value, int) and value > 0 else default

        heads = number("num_attention_heads", 1)
        width = number("head_dim", self.policy.width // heads)
        held, layers = number("num_key_value_heads", heads), number("num_hidden_layers", 1)
        size = 4 if self.policy.precision == torch.float32 else 2
        vocabulary = number("vocab_size", len(self.policy.tokenizer))
        # A layer's cache is copied as it grows; softmax, sorting and sums each need the vocabulary's size, some in float64.
        every = 0 if accepted(self.policy.network.forward, logits_to_keep=1) else 4 * vocabulary
        return 40 * vocabulary, 2 * (layers + 1) * held * width * size + every

    def _check_stop_ids(self, sampling: SamplingConfig) -> None:
        """Refuse stop ids that the model can't draw.

        Raises:
            ConfigError: a stop id isn't in the vocabulary.
        """
        size = self.policy.network.config.get_text_config().vocab_size
        for token in sampling.stop_ids:
            if token >= size:
                problem = f"the model's vocabulary has {size} tokens, ids 0 to {size - 1}"
                raise ConfigError(problem, place="`stop_ids`", got=str(token), fix="leave it out")

    # The decoding loop

    @contextlib.contextmanager
    def _for_decoding(self) -> Iterator[None]:
        """Put the policy, inside the context, into evaluation mode and its own precision, without its own generation options."""
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
        self, batch: Batch, draws: Sequence[_Draw], sampling: SamplingConfig, policy_version: int
    ) -> list[Completion]:
        """Draw some completions in one decoding loop.

        Raises:
            NumbersError: logits aren't finite.
        """
        device = self.policy.device
        rows = DrawnRows(sampling, device=device)
        rows.join(
            [
                NewRow(
                    draw.seed,
                    draw.limit,
                    ends=draw.ends,
                    stops=self._stop_strings(draw.chat, *sampling.stop) if sampling.stop else None,
                    prompt_ids=draw.ids,
                )
                for draw in draws
            ]
        )
        drawing = Drawing(rows, filler=self.policy.tokenizer.pad_token_id or 0)
        ids, mask = left_padded([draw.ids for draw in draws], device)
        most, cache = max(draw.limit for draw in draws), decoding_of(self.policy).cache
        decode(self.policy, ids, mask, drawing, Ended(drawing), most=most, cache=cache)
        made = []
        for draw, drawn in zip(draws, map(rows.completion, range(len(draws))), strict=True):
            reason, text = drawn.stop_reason or "length", drawn.text
            if text is None:
                text = self._text_of(draw.chat)(drawn.ids if reason == "length" else drawn.ids[:-1])
            if not all(map(math.isfinite, (*drawn.raw_logprobs, *drawn.logprobs))):
                place = f"row {batch.rows[draw.prompt]}"
                raise NumbersError("the model's logits aren't finite", place=place, fix="check its weights")
            made.append(
                Completion(
                    text=text,
                    ids=drawn.ids,
                    logprobs=drawn.logprobs,
                    raw_logprobs=drawn.raw_logprobs,
                    kept_mass=drawn.kept_mass,
                    stop_reason=reason,
                    policy_version=policy_version,
                )
            )
        return made

    # Texts

    def _is_chat(self, batch: Batch, prompt: int) -> bool:
        """Tell whether a prompt was encoded with the chat template. One whose source isn't in the batch counts as plain text."""
        source = batch.prompts[prompt] if batch.prompts else ""
        return not isinstance(source, str) or (
            bool(source) and TextOptions.saved_with(self.policy.tokenizer).wrap == "chat"
        )

    def _text_of(self, chat: bool) -> Callable[[Sequence[int]], str]:
        """Return what decodes a completion: alone after a chat; as a continuation of a text prompt, its leading space kept."""
        return self.policy.tokenizer.decode if chat else self._pieces.text_of

    def _stop_strings(self, chat: bool, *stop: str) -> StopStrings:
        """Return what looks for stop strings in the completions of chats, or of text prompts; it is kept between calls."""
        if (chat, *stop) not in self._stops:
            self._stops[chat, *stop] = StopStrings(stop, self._text_of(chat))
        return self._stops[chat, *stop]

    @cached_property
    def _own_ends(self) -> tuple[int, ...]:
        """Ids that end any completion: the tokenizer's end token, and those in the model's generation config."""
        own = getattr(self.policy.causal_lm.generation_config, "eos_token_id", None)
        own = [own] if isinstance(own, int) else own or []
        return tuple(token for token in dict.fromkeys([self.policy.tokenizer.eos_token_id, *own]) if token is not None)

    @cached_property
    def _turn_ends(self) -> tuple[int, ...]:
        """Ids that end a turn by the chat template."""
        return ChatTemplate(self.policy.tokenizer).stops

    @cached_property
    def _pieces(self) -> TextSpanEncoder:
        return TextSpanEncoder(self.policy.tokenizer)


def prompt_keys(batch: Batch) -> list[int]:
    """Return one number per prompt, a hash of its ids."""
    keys = []
    for ids, length in zip(on_host(batch.prompt_ids).tolist(), on_host(batch.prompt_lengths).tolist(), strict=True):
        digest = hashlib.sha256(repr(ids[:length]).encode()).digest()
        keys.append(int.from_bytes(digest[:8], "little") >> 1)
    return keys


def _free_bytes(device: torch.device) -> int:
    """Return how many bytes a decoding loop may use: on a GPU half of what is free, elsewhere a constant."""
    if device.type != "cuda":
        return HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused) // 2
