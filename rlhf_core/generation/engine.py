"""The engine: completions for a batch of prompts, token ids in and token ids out, read from the policy as it is.

Everything that samples stands on five operations on sequence handles: `prefill`, `fork`, `extend`, `score` and `free`; `generate`
is the first three for a batch. A `Backend` draws the tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch, on_host
from rlhf_core.contracts.completion import Completion
from rlhf_core.data.chat_rendering import ChatTemplate
from rlhf_core.data.text_options import TextOptions
from rlhf_core.data.text_spans import TextSpanEncoder
from rlhf_core.generation.backend import Backend, OpenRun
from rlhf_core.generation.kept_backend import take_backend
from rlhf_core.generation.known_tokens import ScoredTokens
from rlhf_core.generation.memory import MOST_ROWS
from rlhf_core.generation.native_backend import NativeBackend
from rlhf_core.generation.open_batch import Joining, OpenBatch
from rlhf_core.generation.paged_cache import CachedSequence
from rlhf_core.generation.requests import UNFINISHED, Finished, Request
from rlhf_core.generation.stop_strings import StopStrings, settled_text
from rlhf_core.generation.watching import counting_forwarded
from rlhf_core.infra.errors import ConfigError, DataError, NumbersError
from rlhf_core.infra.seeds import completion_seeds
from rlhf_core.models.soft_tokens import SOFT, reads_soft_tokens

if TYPE_CHECKING:
    from rlhf_core.generation.drafting import Drafts
    from rlhf_core.models.policy_model import PolicyModel


@dataclass(frozen=True)
class SequenceHandle:
    """A sequence of tokens whose keys and values the engine keeps, until `Engine.free`. It never changes."""

    ids: tuple[int, ...]
    """All its tokens, the prompt's included."""
    prompt_length: int
    """How many of them `prefill` read. A token that `extend` draws gets the random number of its place behind these."""
    engine: Engine = field(repr=False, compare=False)
    """The engine that it is for."""
    cached: CachedSequence | None = field(default=None, repr=False, compare=False)
    """Keys and values of all tokens but the last; None where the model is decoded without a `PagedKVCache`."""
    confidence: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """The confidence of its last tokens, as far back as all were drawn with `min_confidence`."""

    def followed_by(
        self, ids: Sequence[int], cached: CachedSequence | None, confidence: Sequence[float] = ()
    ) -> SequenceHandle:
        """Return the handle of this sequence with further tokens, whose keys and values are kept there.

        Args:
            confidence: of each of these tokens; empty where it isn't known.
        """
        known = (*self.confidence, *confidence) if confidence else ()
        return replace(self, ids=(*self.ids, *ids), cached=cached, confidence=known)


@dataclass(frozen=True)
class Extension:
    """What `Engine.extend` drew for one handle."""

    handle: SequenceHandle
    """The sequence with the new tokens."""
    completion: Completion
    """The new tokens alone."""


@dataclass(frozen=True)
class _Draw:
    """What a request's completion is made of besides the tokens drawn."""

    request: Request
    prompt: int
    """Index of its prompt in the batch."""
    place: str
    """For messages."""
    text_of: Callable[[Sequence[int]], str]


class Engine:
    """Draws completions from a policy with the weights that it has at the moment of the call.

    Prompts that were read are kept, and what a later prompt begins with isn't read again, until the weights change. An engine
    with the default options takes over what the last such engine of the policy kept.

    Args:
        policy: computes in evaluation mode, without gradients; afterwards its modules have their earlier modes again.
        seed: from which completions' seeds are derived where none are given; None takes one from torch's global random state.
        memory: most bytes for keys and values; None takes half of a GPU's free memory, or a quarter of a computer's but at least
            2 GiB. Where they don't suffice for all completions at once, some wait, or are computed again later: the completions
            are the same.
        most_rows: most completions that are decoded at once.
        cuda_graphs: whether decoding steps on a GPU are captured as CUDA graphs, where they can be.
        backend: draws the tokens; None takes the native one, which is the one that the three options before are for.
        counted: called with the number of tokens of each forward pass, as they are added to `forwarded`.
        drafts: guesses next tokens, several of which one pass verifies, for speculative decoding: completions stay the same,
            and `Completion.details` say how many guesses were right. None takes what `SamplingConfig.draft` names.

    Raises:
        ConfigError: options of the native backend for another one, or a backend that takes no drafts.
    """

    def __init__(
        self,
        policy: PolicyModel,
        *,
        seed: int | None = 0,
        memory: int | None = None,
        most_rows: int | None = None,
        cuda_graphs: bool = True,
        backend: Backend | None = None,
        counted: Callable[[int], None] | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        own = {"memory": memory is not None, "most_rows": most_rows is not None, "cuda_graphs": not cuda_graphs}
        if backend is not None and any(own.values()):
            given = next(name for name, is_given in own.items() if is_given)
            raise ConfigError(
                "the option is for the native backend", place=f"Engine({given}=…)", got=f"the backend `{backend.name}`",
                fix="set it in the backend",
            )  # fmt: skip
        for option, number in (("memory", memory), ("most_rows", most_rows)):
            if number is not None and number < 1:
                raise ConfigError("must be at least 1", place=f"Engine({option}=…)", got=str(number))
        self.policy = policy
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        if backend is None and not any(own.values()):
            backend = take_backend(self, policy)
        self.backend = backend or NativeBackend(
            policy, memory=memory, most_rows=most_rows or MOST_ROWS, cuda_graphs=cuda_graphs
        )
        if drafts is not None:
            self.backend.require("drafts", purpose="speculative decoding")
        self.drafts = drafts
        self.policy_version = 0
        self.forwarded = 0
        """Tokens that the policy was run on for this engine: each as often as a forward pass held it. What is taken from kept
        prompts, and from handles, isn't run again and doesn't count. Only the native backend counts."""
        self._stream: tuple[Any, ...] = ()
        self._met: Counter[tuple[int, ...]] = Counter()
        self._counted = counted
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

    # Completions of a batch

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        n: int = 1,
        sampling: SamplingConfig | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[Sequence[int]] | None = None,
        min_confidences: Sequence[float] | None = None,
        policy_version: int | None = None,
        finished: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, in the order of their seeds.

        A completion depends on its prompt's ids and its seed alone, up to the rounding of logits: not on what else is drawn in
        the same call, nor on how memory divides the work.

        Args:
            batch: its encoded prompts are completed; its responses are ignored.
            sampling: how tokens are drawn, and what ends a completion; None takes the defaults.
            seeds: for each prompt, one per completion. None derives them from the engine's seed and, after `begin`, from row
                numbers and places in the data, else from the prompts' ids; a prompt that comes again gets other seeds.
            limits: for each prompt, most tokens of each of its completions, where that is fewer than `max_new_tokens`.
            min_confidences: for each prompt, `min_confidence` of its completions in place of the options' own, which must be set.
            policy_version: optimiser steps that the policy has made; None takes what `begin` was given.
            finished: called with a prompt's index, a completion's index among the prompt's, and the completion, as soon as it has
                ended and while others are still being drawn.

        Raises:
            ConfigError: n is below 1, there is another number of seeds, limits or confidences, or one out of range, a stop id
                isn't in the vocabulary, or the backend doesn't follow an option.
            DataError: a prompt leaves no room for a token among the model's positions.
            ModelError: the model can't generate.
            NumbersError: logits aren't finite, or memory doesn't suffice for one completion.
        """
        sampling = sampling or SamplingConfig()
        n = whole_count(n)
        if seeds is None:
            seeds = self._next_seeds(batch, n)
        _check_seeds_and_limits(seeds, limits, batch.num_prompts, n)
        if min_confidences is not None:
            _check_confidences(min_confidences, batch.num_prompts, sampling)
        self._check(sampling)
        self._check_drafts(sampling)
        draws = self._draws(batch, seeds, sampling, limits, min_confidences)
        version = self.policy_version if policy_version is None else policy_version
        made: list[list[Completion | None]] = [[None] * n for _ in range(batch.num_prompts)]
        outside = _autocast_as_here(self.policy.device)
        with self._counting(), contextlib.closing(self._run(draws, sampling)) as running:
            for one in running:
                completion = self._completion(draws[one.number], one, version)
                prompt, index = divmod(one.number, n)
                made[prompt][index] = completion
                if finished is not None:
                    with outside:
                        finished(prompt, index, completion)
        return [[one for one in group if one is not None] for group in made]

    @torch.no_grad()
    def stream(
        self, batch: Batch, sampling: SamplingConfig | None = None, *, seed: int | None = None
    ) -> Iterator[Completion]:
        """Yield the completion of one prompt as it grows, after each token; the last one yielded is whole.

        Texts on the way leave out what may still change: a character of which bytes are missing, and what could become a stop
        string.

        Args:
            batch: one prompt.
            seed: of this completion; None derives it as `generate` does.

        Raises:
            ConfigError: another number of prompts, a stop id isn't in the vocabulary, or the backend can't stream.
            DataError, ModelError, NumbersError: as `generate`.
        """
        sampling = sampling or SamplingConfig()
        self.backend.require("streaming", purpose="a stream")
        if batch.num_prompts != 1:
            raise ConfigError("a stream completes one prompt", place="stream", got=f"{batch.num_prompts} prompts")
        self._check(sampling)
        if seed is None:
            seed = self._next_seeds(batch, 1)[0][0]
        (draw,) = self._draws(batch, [[seed]], sampling)
        with contextlib.closing(self.backend.run([draw.request], sampling, partly=True)) as running:
            while True:
                with self._counting():
                    one = next(running, None)
                if one is None:
                    return
                completion = self._completion(draw, one, self.policy_version)
                if one.reason == UNFINISHED:
                    completion = replace(completion, text=settled_text(completion.text, sampling.stop))
                yield completion

    def open(self, sampling: SamplingConfig | None = None) -> OpenBatch:
        """Begin a batch that prompts join and leave while others are drawn. Close it at the end.

        Sequence handles may be used between its steps; they have their part of the memory.

        Args:
            sampling: the options of completions that have none of their own; None takes the defaults.

        Raises:
            ConfigError: the backend can't, or doesn't follow an option; `draft` is set, since guesses need a whole batch.
        """
        shared = sampling or SamplingConfig()
        self.backend.require("joining", purpose="an open batch")
        if self.drafts is not None or shared.draft is not None:
            raise ConfigError("an open batch takes no draft", place="open", fix="leave it out")
        self._check(shared)

        def joining(number: int, ids: tuple[int, ...], seed: int, sampling: SamplingConfig, chat: bool) -> Joining:
            self._check_length(ids, "prompt")
            check_seeds([seed], "join(seed=…)")
            draw = self._draw(number, ids, seed, sampling, chat=chat, place="prompt")
            return Joining(draw.request, lambda one: self._completion(draw, one, self.policy_version))

        def step(run: OpenRun) -> list[Finished]:
            with torch.no_grad(), self._counting():
                return run.step()

        return OpenBatch(self.backend.open(shared), joining, shared, step=step)

    # Sequence handles

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[SequenceHandle]:
        """Read prompts, given as token ids, and return a handle for each. What prompts have in common is read once.

        Raises:
            ConfigError: a prompt is empty, or the backend can't keep sequences.
            DataError: a prompt has more tokens than the model has positions.
            NumbersError: memory doesn't suffice.
        """
        self.backend.require("fork", purpose="a sequence handle")
        for number, ids in enumerate(prompts):
            self._check_length(ids, f"prompts[{number}]")
        with self._counting():
            kept = self.backend.prefill(prompts)
        return [SequenceHandle(tuple(ids), len(ids), self, one) for ids, one in zip(prompts, kept, strict=True)]

    def fork(self, handle: SequenceHandle, n: int = 1) -> list[SequenceHandle]:
        """Return n handles of the same sequence, each to be freed by itself, in constant time per handle.

        Raises:
            ConfigError: the handle was freed, or is another engine's.
        """
        self._check_handles([handle])
        cached = handle.cached
        return [replace(handle, cached=None if cached is None else cached.fork()) for _ in range(n)]

    @torch.no_grad()
    def extend(
        self,
        handles: Sequence[SequenceHandle],
        sampling: SamplingConfig | None = None,
        *,
        seeds: Sequence[int],
        stop: str | Sequence[str] | None = None,
        limits: Sequence[int] | None = None,
        rule: Callable[[Sequence[int]], bool] | None = None,
        chat: bool = True,
    ) -> list[Extension]:
        """Draw tokens behind sequences until an end token, a limit, a stop string or a rule ends each; return the new sequences.

        The given handles stay as they are. All options are about the new tokens alone: `max_new_tokens` and `min_new_tokens`
        count them, and stop strings are looked for in their text; but the window of `min_confidence` reaches back to what was
        drawn with it before. The new sequence holds every token drawn, those of a stop string too.

        Args:
            seeds: one per handle. A token's random number is a function of the seed and of the token's place behind the prompt
                that `prefill` read, so a sequence that is extended twice with one seed is the one that is extended once; forks
                need different seeds to differ.
            stop: stop strings, such as a separator of steps, in place of those of `sampling`.
            limits: for each handle, most new tokens, where that is fewer than `max_new_tokens`.
            rule: called with the new ids, after each token; True ends the sequence.
            chat: whether texts are decoded alone; else as continuations of a text.

        Raises:
            ConfigError: another number of seeds or limits, a limit below 1, an invalid stop string or id, a handle that was
                freed or is another engine's, or one that was read with weights that have changed since.
            DataError: a sequence leaves no room for a token.
            NumbersError: as `generate`.
        """
        sampling = sampling or SamplingConfig()
        if stop is not None:
            options = sampling.model_dump() | {"stop": stop if isinstance(stop, str) else list(stop)}
            sampling = SamplingConfig.parse(options, place="extend")
        self._check(sampling)
        if rule is not None:
            self.backend.require("rules", purpose="a stopping rule")
        self._check_handles(handles)
        _check_extension(handles, seeds, limits)
        draws = self._draws_behind(handles, seeds, sampling, limits, rule=rule, chat=chat)
        made: dict[int, Extension] = {}
        with self._counting(), contextlib.closing(self._run(draws, sampling)) as running:
            for one in running:
                completion = self._completion(draws[one.number], one, self.policy_version)
                extended = handles[one.number].followed_by(one.drawn.ids, one.sequence, one.drawn.confidence)
                made[one.number] = Extension(extended, completion)
        return [made[number] for number in range(len(handles))]

    @torch.no_grad()
    def append(self, handles: Sequence[SequenceHandle], tokens: Sequence[Sequence[int]]) -> list[SequenceHandle]:
        """Return sequences with given tokens behind them, such as the accepted part of a draft, or a tool's output.

        Raises: as `score`.
        """
        return [extended for extended, _ in self._follow(handles, tokens, room=0)]

    @torch.no_grad()
    def score(
        self, handles: Sequence[SequenceHandle], tokens: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """Return the log-probabilities of given tokens behind sequences, in one forward pass.

        The distribution is softmax(logits / temperature). The handles stay as they are.

        Args:
            tokens: for each handle, at least one id.

        Returns:
            For each handle (T,) float32, nats.

        Raises:
            ConfigError: a temperature that isn't above 0, no tokens for a handle, or a handle that was freed, is another
                engine's, or was read with weights that have changed since.
            DataError: a sequence without its last token, which isn't read, would be longer than the model's positions.
            NumbersError: logits aren't finite, or memory doesn't suffice.
        """
        return [scored.logprobs for scored in self.score_with_top(handles, tokens, 0, temperature=temperature)]

    @torch.no_grad()
    def score_with_top(
        self, handles: Sequence[SequenceHandle], tokens: Sequence[Sequence[int]], k: int, *, temperature: float = 1.0
    ) -> list[ScoredTokens]:
        """Return what `score` does, and the k most likely tokens in the place of each given one.

        Raises: as `score`; `ConfigError` for k below 0.
        """
        if not temperature > 0:
            raise ConfigError("must be above 0", place="score(temperature=…)", got=str(temperature))
        if k < 0:
            raise ConfigError("must be at least 0", place="score_with_top(k=…)", got=str(k))
        followed = self._follow(handles, tokens, temperature=temperature, top=k, room=1)
        self.free([extended for extended, _ in followed])
        return [scored for _, scored in followed]

    def free(self, handles: Sequence[SequenceHandle]) -> None:
        """Give up handles; memory that no other handle shares is released.

        A handle that nothing refers to any more is freed by itself; a handle that was freed stays so.

        Raises:
            ConfigError: a handle is another engine's.
        """
        self._check_handles(handles, freed=True)
        self.backend.free([handle.cached for handle in handles])

    def _follow(
        self,
        handles: Sequence[SequenceHandle],
        tokens: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        top: int = 0,
        room: int,
    ) -> list[tuple[SequenceHandle, ScoredTokens]]:
        """Return, for each handle, a new one with tokens behind it, and their scores; `room` as in `_check_length`."""
        self._check_handles(handles)
        if [len(ids) > 0 for ids in tokens] != [True] * len(handles):
            problem = "each handle needs at least one token"
            raise ConfigError(problem, place="tokens", got=f"{[len(ids) for ids in tokens]} for {len(handles)} handles")
        whole = [(*handle.ids, *ids) for handle, ids in zip(handles, tokens, strict=True)]
        for number, ids in enumerate(whole):
            self._check_length(ids, f"handles[{number}]", room=room)
        with self._counting():
            followed = self.backend.follow(
                [handle.cached for handle in handles],
                whole,
                [len(ids) for ids in tokens],
                temperature=temperature,
                top=top,
            )
        for number, (_, scored) in enumerate(followed):
            if scored.logprobs.isnan().any():
                self.backend.forget()  # what is kept isn't finite, either
                raise NumbersError(
                    "the model's logits aren't finite", place=f"handles[{number}]", fix="check its weights"
                )
        return [
            (handle.followed_by(ids, kept), scored)
            for handle, ids, (kept, scored) in zip(handles, tokens, followed, strict=True)
        ]

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Add to `forwarded`, and to what the engine was made to add to, the tokens that are forwarded inside the context."""
        with counting_forwarded(self._add_forwarded, of=self.policy.network):
            yield

    def _add_forwarded(self, count: int) -> None:
        self.forwarded += count
        if self._counted is not None:
            self._counted(count)

    def _check_handles(self, handles: Sequence[SequenceHandle], *, freed: bool = False) -> None:
        """Raise `ConfigError` for handles of another engine and, unless allowed, for those that were freed."""
        for number, handle in enumerate(handles):
            if handle.engine is not self:
                raise ConfigError(
                    "the sequence is another engine's", place=f"handles[{number}]",
                    fix="use it with the engine that made it, or call `prefill` with its `ids`",
                )  # fmt: skip
            if not freed and handle.cached is not None and handle.cached.freed:
                raise ConfigError(
                    "the sequence was freed", place=f"handles[{number}]",
                    fix="free it later, or fork it before; or call `prefill` with its `ids`",
                )  # fmt: skip

    def _run(self, draws: Sequence[_Draw], sampling: SamplingConfig) -> Generator[Finished]:
        """Return the run of the backend that draws completions."""
        requests = [draw.request for draw in draws]
        if self.drafts is None:
            return self.backend.run(requests, sampling)
        backend: Any = self.backend  # one that declares `drafts`
        run: Generator[Finished] = backend.run(requests, sampling, drafts=self.drafts)
        return run

    # Which completions are drawn

    def seeds(self, batch: Batch, n: int) -> Sequence[Sequence[int]]:
        """Return the n seeds for each prompt that the next `generate` would draw with, for a caller that draws them in parts.

        A prompt's first seeds are the same for every n. Prompts that come again get other seeds, as in `generate`.
        """
        return self._next_seeds(batch, n)

    def _next_seeds(self, batch: Batch, n: int) -> Sequence[Sequence[int]]:
        """Return n seeds for each prompt: a function of the stream and of rows, or without a stream of the prompts' ids; and of
        places, where the batch has them."""
        rows = batch.rows if self._stream else prompt_keys(batch)
        return completion_seeds(
            self.seed, *(self._stream or ("generate",)), rows=rows, places=batch.places, n=n, met=self._met
        )

    def _draws(
        self,
        batch: Batch,
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        limits: Sequence[Sequence[int]] | None = None,
        min_confidences: Sequence[float] | None = None,
    ) -> list[_Draw]:
        """Return the completions to be drawn, prompt by prompt.

        Raises:
            DataError: a prompt leaves no room for a token.
        """
        draws: list[_Draw] = []
        lengths = on_host(batch.prompt_lengths).tolist()
        for prompt, (ids, length) in enumerate(zip(on_host(batch.prompt_ids).tolist(), lengths, strict=True)):
            chat, place = self.is_chat(batch, prompt), f"row {batch.rows[prompt]}"
            own = tuple(ids[:length])
            if max(own) >= SOFT and not reads_soft_tokens(self.policy.network):
                fix = "let the policy read them, by `PromptCompression.attach`"
                raise DataError("the prompt was compressed for another policy", place=place, fix=fix)
            draws += [
                self._draw(
                    len(draws) + k,
                    own,
                    seed,
                    sampling,
                    chat=chat,
                    place=place,
                    prompt=prompt,
                    limit=None if limits is None else limits[prompt][k],
                    min_confidence=None if min_confidences is None else min_confidences[prompt],
                )
                for k, seed in enumerate(seeds[prompt])
            ]
        return draws

    def _draws_behind(
        self,
        handles: Sequence[SequenceHandle],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        limits: Sequence[int] | None,
        *,
        rule: Callable[[Sequence[int]], bool] | None,
        chat: bool,
    ) -> list[_Draw]:
        """Return the completions to be drawn behind sequences, one each.

        Raises:
            DataError: a sequence leaves no room for a token.
        """
        return [
            self._draw(
                number,
                handle.ids,
                seed,
                sampling,
                chat=chat,
                place=f"handles[{number}]",
                limit=None if limits is None else limits[number],
                of=handle,
                rule=rule,
            )
            for number, (handle, seed) in enumerate(zip(handles, seeds, strict=True))
        ]

    def _draw(
        self,
        number: int,
        ids: tuple[int, ...],
        seed: int,
        sampling: SamplingConfig,
        *,
        chat: bool,
        place: str,
        prompt: int = 0,
        limit: int | None = None,
        of: SequenceHandle | None = None,
        rule: Callable[[Sequence[int]], bool] | None = None,
        min_confidence: float | None = None,
    ) -> _Draw:
        """Return a completion to be drawn; `place` is for messages, `of` is the handle that it extends, which has these ids."""
        positions = self.policy.max_positions
        most = sampling.max_new_tokens if limit is None else min(limit, sampling.max_new_tokens)
        room = most if positions is None else min(most, positions - len(ids))
        if room < 1:
            raise DataError(
                "the prompt leaves no room for a completion among the model's positions",
                place=place,
                got=f"{len(ids)} tokens for {positions} positions",
                fix="shorten the prompt, or set a smaller `max_length`",
            )
        request = Request(
            number=number,
            ids=ids,
            seed=seed,
            limit=room,
            ends=self._own_ends + (self._turn_ends if chat else ()),
            stops=self._stop_strings(chat, *sampling.stop) if sampling.stop else None,
            rule=rule,
            base=None if of is None else of.cached,
            skipped=0 if of is None else len(ids) - of.prompt_length,
            earlier_confidence=() if of is None else of.confidence,
            min_confidence=min_confidence,
            keep=of is not None,
        )
        return _Draw(request, prompt, place, self.text_of(chat))

    def _check_length(self, ids: Sequence[int], place: str, *, room: int = 0) -> None:
        """Raise where a sequence is empty, holds an unknown id, or is longer than the model's positions and `room` together.

        A last token that is only predicted, never read, needs no position.
        """
        if not ids:
            raise ConfigError("a sequence needs at least one token", place=place)
        size = self.policy.network.config.get_text_config().vocab_size
        known = reads_soft_tokens(self.policy.network)  # beyond every vocabulary
        if (wrong := next((id for id in ids if not 0 <= id < size and not (known and id >= SOFT)), None)) is not None:
            raise ConfigError(f"the model's vocabulary has ids 0 to {size - 1}", place=place, got=str(wrong))
        positions = self.policy.max_positions
        if positions is not None and len(ids) > positions + room:
            got = f"{len(ids)} tokens for {positions} positions"
            raise DataError("the sequence is longer than the model's positions", place=place, got=got, fix="shorten it")

    def _check(self, sampling: SamplingConfig) -> None:
        """Refuse options that the backend doesn't follow, and stop ids that the model can't draw.

        Raises:
            ConfigError: an option isn't followed, or a stop id isn't in the vocabulary.
        """
        self.backend.check_options(sampling)
        size = self.policy.network.config.get_text_config().vocab_size
        for token in sampling.stop_ids:
            if token >= size:
                problem = f"the model's vocabulary has {size} tokens, ids 0 to {size - 1}"
                raise ConfigError(problem, place="`stop_ids`", got=str(token), fix="leave it out")

    def _check_drafts(self, sampling: SamplingConfig) -> None:
        """Refuse drafts for a policy that reads soft tokens, which no draft knows."""
        if (self.drafts is not None or sampling.draft is not None) and reads_soft_tokens(self.policy.network):
            fix = "leave it out, or compress prompts without a compressor"
            raise ConfigError("a policy that reads soft tokens takes no draft", place="draft", fix=fix)

    def _completion(self, draw: _Draw, one: Finished, policy_version: int) -> Completion:
        """Return what was drawn as a `Completion`.

        Raises:
            NumbersError: logits weren't finite.
        """
        drawn = one.drawn
        if not all(map(math.isfinite, (*drawn.raw_logprobs, *drawn.logprobs))):
            self.backend.forget()  # keys and values that it keeps may not be finite, either
            raise NumbersError("the model's logits aren't finite", place=draw.place, fix="check its weights")
        without_last = one.reason == "end" or (one.reason == "stop" and one.text is None)
        text = one.text if one.text is not None else draw.text_of(drawn.ids[:-1] if without_last else drawn.ids)
        return Completion(
            text=text,
            ids=drawn.ids,
            logprobs=drawn.logprobs,
            raw_logprobs=drawn.raw_logprobs,
            kept_mass=drawn.kept_mass,
            confidence=drawn.confidence,
            stop_reason=one.reason,
            policy_version=policy_version,
            details={} if self.drafts is None or one.drafted is None else one.drafted.report(),
        )

    # Texts

    def is_chat(self, batch: Batch, prompt: int) -> bool:
        """Tell whether a prompt was encoded with the chat template. One whose source isn't in the batch counts as plain text."""
        source = batch.prompts[prompt] if batch.prompts else ""
        return not isinstance(source, str) or (
            bool(source) and TextOptions.saved_with(self.policy.tokenizer).wrap == "chat"
        )

    def text_of(self, chat: bool) -> Callable[[Sequence[int]], str]:
        """Return what decodes a completion: alone after a chat; as a continuation of a text prompt, its leading space kept."""
        return self.policy.tokenizer.decode if chat else self._pieces.text_of

    def _stop_strings(self, chat: bool, *stop: str) -> StopStrings:
        """Return what looks for stop strings in the completions of chats, or of text prompts; it is kept between calls."""
        if len(self._stops) >= 256:  # stop strings of many clients
            self._stops.clear()
        if (chat, *stop) not in self._stops:
            self._stops[chat, *stop] = StopStrings(stop, self.text_of(chat))
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


def check_seeds(seeds: Sequence[int], place: str) -> None:
    """Raise `ConfigError` for a seed that isn't a whole number from 0 to 2¹²⁸ − 1."""
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, SupportsIndex) or not 0 <= operator.index(seed) < 2**128:
            raise ConfigError("a seed must be a whole number, at least 0", place=place, got=repr(seed))


def prompt_keys(batch: Batch) -> list[int]:
    """Return one number per prompt, a hash of its ids."""
    lengths = on_host(batch.prompt_lengths).tolist()
    return [prompt_key(ids[:length]) for ids, length in zip(on_host(batch.prompt_ids).tolist(), lengths, strict=True)]


def prompt_key(ids: Sequence[int]) -> int:
    """Return a hash of a prompt's ids, in place of its row number where it has none."""
    return int.from_bytes(hashlib.sha256(repr([*ids]).encode()).digest()[:8], "little") >> 1


def whole_count(n: object) -> int:
    """Return a number of completions as an int; raise `ConfigError` where it isn't a whole number, at least 1."""
    if isinstance(n, bool) or not isinstance(n, SupportsIndex) or operator.index(n) < 1:
        raise ConfigError("n must be a whole number, at least 1", place="generate(n=…)", got=repr(n))
    return operator.index(n)


def _autocast_as_here(device: torch.device) -> torch.autocast:
    """Return a context with the autocast of the caller, for what is called meanwhile: generation has its own precision."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


def _check_seeds_and_limits(
    seeds: Sequence[Sequence[int]], limits: Sequence[Sequence[int]] | None, prompts: int, n: int
) -> None:
    """Raise `ConfigError` unless each of the n completions of each prompt has a seed and, where there are any, a limit."""
    _check_one_each(seeds, "seeds", prompts, n)
    check_seeds([seed for each in seeds for seed in each], "generate(seeds=…)")
    if limits is None:
        return
    _check_one_each(limits, "limits", prompts, n)
    if (low := min((limit for each in limits for limit in each), default=1)) < 1:
        raise ConfigError("a completion has at least one token", place="generate(limits=…)", got=str(low))


def _check_extension(handles: Sequence[SequenceHandle], seeds: Sequence[int], limits: Sequence[int] | None) -> None:
    """Raise `ConfigError` unless each handle has a seed and, where there are any, a limit."""
    if len(seeds) != len(handles):
        problem = "an extension needs one seed per handle"
        raise ConfigError(problem, place="extend(seeds=…)", got=f"{len(seeds)} for {len(handles)}")
    check_seeds(seeds, "extend(seeds=…)")
    if limits is not None and (len(limits) != len(handles) or min(limits, default=1) < 1):
        problem = "an extension needs one limit per handle, at least 1"
        raise ConfigError(problem, place="extend(limits=…)", got=f"{list(limits)} for {len(handles)}")


def _check_confidences(given: Sequence[float], prompts: int, sampling: SamplingConfig) -> None:
    """Raise `ConfigError` unless `given` has a least confidence for each prompt, and the options report confidences."""
    place = "generate(min_confidences=…)"
    if sampling.min_confidence is None:
        problem = "without the option `min_confidence` no confidence is computed"
        raise ConfigError(problem, place=place, fix="set it, to 0 where these alone should count")
    if len(given) != prompts:
        problem = f"{prompts} prompts need one least confidence each"
        raise ConfigError(problem, place=place, got=f"{len(given)} numbers")
    if (wrong := next((one for one in given if not 0 <= one < math.inf), None)) is not None:
        raise ConfigError("must be a finite number, at least 0", place=place, got=str(wrong))


def _check_one_each(given: Sequence[Sequence[int]], name: str, prompts: int, n: int) -> None:
    """Raise `ConfigError` unless `given`, which is called `name`, has a number for each of the n completions of each prompt."""
    if [len(each) for each in given] != [n] * prompts:
        problem = f"{n} completions of {prompts} prompts need {n} {name} per prompt"
        raise ConfigError(problem, place=f"generate({name}=…)", got=f"{[len(each) for each in given]} {name}")
