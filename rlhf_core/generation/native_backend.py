"""The engine's own backend: it draws with the policy's modules as they are, and keeps keys and values between calls.

Which loop decodes is measured: the one over a `PagedKVCache` where it gives the logits that the policy is trained on, else
transformers' own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.backend import ALWAYS, Backend, Capabilities
from rlhf_core.generation.block_table_attention import KERNEL_BLOCK
from rlhf_core.generation.device_steps import DEVICES
from rlhf_core.generation.drafting import Drafts
from rlhf_core.generation.known_tokens import ScoredTokens, scores_by_forward, scores_of_hidden
from rlhf_core.generation.lookup_drafts import NgramDrafter, SuffixDrafter
from rlhf_core.generation.memory import free_bytes
from rlhf_core.generation.native import NativeDecoding, measure_native, new_cache
from rlhf_core.generation.open_run import NativeOpenRun
from rlhf_core.generation.paged_cache import CachedSequence
from rlhf_core.generation.plain import PlainDecoding
from rlhf_core.generation.requests import UNFINISHED, Finished, Request
from rlhf_core.generation.weights_state import weight_versions, weights_state
from rlhf_core.infra.devices import is_out_of_memory, release_memory
from rlhf_core.infra.errors import ConfigError, NumbersError
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.fast_adapters import FusedAdapters, fast_adapters
from rlhf_core.models.fast_linears import FastLinears
from rlhf_core.models.patches import turn_of

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel

log = logging.getLogger(__name__)

BLOCK_SIZE = {"cpu": 64, "cuda": KERNEL_BLOCK}
"""Tokens per block of the cache, by device."""


IDLE_SHARE = 8
"""While nothing is drawn, kept prompts may take this part of the memory for keys and values; larger keeps fewer."""
PACK_FOR = 16
"""Weights are packed where a completion may have at least so many tokens: packing takes as long as a few decoding steps."""


DRAFTERS: dict[str, type[NgramDrafter | SuffixDrafter]] = {"ngram": NgramDrafter, "suffix": SuffixDrafter}
"""What `SamplingConfig.draft` names."""


class _Said:
    """Whether something was logged about a policy."""

    def __init__(self, policy: PolicyModel) -> None:
        self.said = False


class _Undrafted(_Said):
    """Whether it was said that drafts have no use for a policy."""


def run_in_memory(
    attempt: Callable[[Sequence[Request], int], Generator[Finished]],
    requests: Sequence[Request],
    most_rows: int,
    device: torch.device,
) -> Generator[Finished]:
    """Yield completions as they end, in half as many rows at once wherever memory runs out.

    Args:
        attempt: yields the completions of the requests that it gets, in so many rows at once.

    Raises:
        NumbersError: memory doesn't suffice for one completion.
    """
    left, rows = {request.number: request for request in requests}, min(most_rows, max(len(requests), 1))
    while left:
        failed = False
        try:
            with contextlib.closing(attempt(list(left.values()), rows)) as running:
                for one in running:
                    if one.reason != UNFINISHED:
                        del left[one.number]
                    yield one
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        # Outside the handler: the error's traceback keeps the failed pass's tensors alive.
        if failed:
            release_memory(device)
            if rows == 1:
                raise NumbersError(
                    "out of memory with one completion at a time",
                    fix="set a smaller `max_length` (`generation.max_new_tokens` for completions), or `precision: bf16`",
                )
            rows = max(1, rows // 2)
            log.warning("out of memory: trying again with %d completions at a time", rows)


class LentLoop(NamedTuple):
    """What `NativeBackend.lending_by_pass` lends."""

    decoding: NativeDecoding | None
    """None for a model that only transformers' own loop decodes, or sequences longer than its sliding window."""
    computing: Callable[[], AbstractContextManager[None]]
    """Returns the context that a forward pass needs. No two policies' may be entered at once."""
    weight: Tensor | None
    """See `PolicyModel.head_weight`."""


class NativeBackend(Backend):
    """Draws completions in this process, with the policy's own modules.

    Args:
        memory: most bytes for keys and values; None takes what `free_bytes` allows.
        most_rows: most completions that are decoded at once.
        cuda_graphs: whether decoding steps on a GPU are captured as CUDA graphs, where they can be.
    """

    name = "native"
    capabilities = Capabilities(
        live_weights=True,
        exact_logprobs=True,
        fork=True,
        streaming=True,
        rules=True,
        joining=True,
        drafts=True,
        options=frozenset(SamplingConfig.model_fields) - ALWAYS,
    )

    def __init__(self, policy: PolicyModel, *, memory: int | None, most_rows: int, cuda_graphs: bool = True) -> None:
        self.policy, self.memory, self.most_rows, self.cuda_graphs = policy, memory, most_rows, cuda_graphs
        self._native: NativeDecoding | None = None
        self._read_with: Any = None
        """State of the weights with which the prompts that are kept were read, and which are packed."""
        self._linears = FastLinears(policy.network)
        self._drafts: dict[str, Drafts] = {}
        """What was learned about drafts without a model, by their names."""

    def run(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        partly: bool = False,
        drafts: Drafts | None = None,
    ) -> Generator[Finished]:
        """Yield completions as they end, in half as many rows at once wherever memory runs out.

        Args:
            partly: yield them, unfinished, after each token, too.
            drafts: guesses tokens that one pass verifies; None takes those that `sampling.draft` names.

        Raises:
            NumbersError: memory doesn't suffice for one completion.
        """
        if drafts is None and sampling.draft is not None:
            drafts = self._drafts.setdefault(sampling.draft, Drafts(DRAFTERS[sampling.draft]()))

        def attempt(left: Sequence[Request], rows: int) -> Generator[Finished]:
            return self._run(left, sampling, rows, partly=partly, drafts=drafts)

        try:
            with contextlib.closing(run_in_memory(attempt, requests, self.most_rows, self.policy.device)) as running:
                yield from running
        finally:
            self._release_if_trained()

    def _run(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        rows: int,
        *,
        partly: bool,
        drafts: Drafts | None = None,
    ) -> Generator[Finished]:
        """Yield completions as they end, or as they grow; see `run`.

        Raises:
            ConfigError: weights change while a completion grows.
        """
        pack = max(request.limit for request in requests) >= PACK_FOR
        # What takes long to make is made once: a stream enters the context for each of its pieces.
        with self._adapters() as adapters:
            with self._for_decoding(adapters=adapters):
                decoding = self._decoding_for(requests, rows)
            if not partly:
                with contextlib.ExitStack() as stack:
                    if drafts is not None and isinstance(decoding, NativeDecoding):
                        stack.enter_context(drafts.drafter.running(requests))
                        run = decoding.run(requests, sampling, drafts=drafts)
                    else:
                        if drafts is not None:
                            self._say_undrafted()
                        run = decoding.run(requests, sampling)
                    stack.enter_context(contextlib.closing(run))
                    stack.enter_context(self._for_decoding(pack=pack, adapters=adapters))
                    yield from run
                return
            with contextlib.closing(decoding.run(requests, sampling, partly=True)) as running:
                # Whoever reads a stream may do anything between its pieces: read another one, or train.
                versions = weight_versions(self.policy)
                while True:
                    with self._for_decoding(pack=pack, adapters=adapters):
                        one = next(running, None)
                    if one is None:
                        return
                    yield one
                    if weight_versions(self.policy) != versions:
                        problem = "the policy's weights have changed while a completion was being drawn"
                        fix = "read streams to their end, or close them, before"
                        raise ConfigError(problem, place="stream", fix=fix)

    def open(self, sampling: SamplingConfig) -> NativeOpenRun:
        held = contextlib.ExitStack()
        adapters = held.enter_context(self._adapters())
        held.callback(self._release_if_trained)

        def loop_for(requests: Sequence[Request], rows: int, current: NativeDecoding | None) -> NativeDecoding | None:
            native = self._native_with_room_for(requests)
            if native is None or (current is not None and current.cache is native.cache):
                return None if native is None else current
            return native.idle(most_rows=rows)

        return NativeOpenRun(
            self.policy,
            sampling,
            most_rows=self.most_rows,
            computing=functools.partial(self._for_decoding, pack=True, adapters=adapters),
            loop_for=loop_for,
            plain=lambda rows: PlainDecoding(self.policy, memory=self.memory, most_rows=rows),
            close=held.close,
        )

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[CachedSequence | None]:
        native = self._native_for(max(map(len, prompts), default=0), [len(ids) for ids in prompts])
        if native is None:
            return [None] * len(prompts)
        with self._for_decoding():
            return [*native.prefill([ids[:-1] for ids in prompts])]

    def free(self, kept: Sequence[CachedSequence | None]) -> None:
        super().free(kept)
        if self._native is not None and self._native.cache.num_sequences == len(self._native.prefixes):
            self._release_if_trained()

    def _release_if_trained(self) -> None:
        """Release the memory of a policy whose weights are about to change: training needs it."""
        if not any(parameter.requires_grad for parameter in self.policy.parameters()):
            return
        self._linears.release()
        if self._native is not None:
            self._native.prefixes.clear()
            if not self._native.cache.num_sequences:
                self._native = None

    def follow(
        self,
        kept: Sequence[CachedSequence | None],
        whole: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        temperature: float,
        top: int = 0,
    ) -> list[tuple[CachedSequence | None, ScoredTokens]]:
        if not whole:
            return []
        # Of a sequence of which nothing is kept, all is read.
        whole_runs = [len(ids) for one, ids in zip(kept, whole, strict=True) if one is None]
        native = self._native_for(max(map(len, whole)), [*counts, *whole_runs])
        with self._for_decoding():
            if native is None:
                return [
                    (None, scores_by_forward(self.policy, ids, count, temperature=temperature, top=top))
                    for ids, count in zip(whole, counts, strict=True)
                ]
            self._check_kept(kept, native)
            before = [
                # Nothing is kept of a sequence that was too long for this loop, or shares the call with one.
                native.prefill([ids[: -count - 1]])[0] if one is None else one
                for one, ids, count in zip(kept, whole, counts, strict=True)
            ]
            read = native.follow(before, whole)
            return [
                (sequence, scores_of_hidden(self.policy, hidden, ids[-count:], temperature=temperature, top=top))
                for (sequence, hidden), ids, count in zip(read, whole, counts, strict=True)
            ]

    def forget(self) -> None:
        self._native = None

    def rest(self) -> None:
        """Release most memory, while nothing is drawn: prompts are kept in an eighth of what generation may use."""
        self._linears.release()
        native = self._native
        if native is None:
            return
        if native.cache.num_sequences > len(native.prefixes):  # somebody still has sequences
            self._native = None
            return
        most = self._most_blocks(native.cache.block_size) // IDLE_SHARE
        while native.cache.used_blocks > most and native.prefixes.drop_oldest():
            pass
        native.cache.compact(native.prefixes)

    def _decoding_for(self, requests: Sequence[Request], rows: int) -> NativeDecoding | PlainDecoding:
        """Return the loop that draws some completions, with room for them as far as memory is allowed."""
        longest = max(len(request.ids) + request.limit for request in requests)
        prompts = {request.ids for request in requests if request.base is None}
        native = self._native_for(longest, [*map(len, prompts), *(request.limit for request in requests)])
        if native is None:
            return PlainDecoding(self.policy, memory=self.memory, most_rows=rows)
        self._check_kept([request.base for request in requests], native)
        return native.idle(most_rows=rows)

    @contextlib.contextmanager
    def lending(self, requests: Sequence[Request]) -> Iterator[NativeDecoding | None]:
        """Lend the loop over a `PagedKVCache`, with room for as many tokens as some requests have, in the state to decode.

        None where sequences are longer than the model's sliding window.
        """
        native = self._native_with_room_for(requests)
        with self._for_decoding(pack=True):
            yield native

    @contextlib.contextmanager
    def lending_by_pass(self, requests: Sequence[Request]) -> Iterator[LentLoop]:
        """Lend the loop over a `PagedKVCache`, as `lending` does, to whoever puts the policy into its state for each pass alone.

        So several policies of different precisions can take turns.
        """
        pack = max(request.limit for request in requests) >= PACK_FOR
        with self._adapters() as adapters:
            computing = functools.partial(self._for_decoding, pack=pack, adapters=adapters)
            try:
                with self._for_decoding(adapters=adapters):
                    native = self._native_with_room_for(requests)
                    weight = self.policy.head_weight()
                yield LentLoop(None if native is None else native.idle(most_rows=self.most_rows), computing, weight)
            finally:
                self._release_if_trained()

    def _native_with_room_for(self, requests: Sequence[Request]) -> NativeDecoding | None:
        longest = max(len(request.ids) + request.limit for request in requests)
        prompts = {tuple(request.ids) for request in requests}
        return self._native_for(longest, [*map(len, prompts), *(request.limit for request in requests)])

    def _check_kept(self, kept: Sequence[CachedSequence | None], native: NativeDecoding) -> None:
        """Raise `ConfigError` for sequences that were read with weights that the policy no longer has."""
        for number, one in enumerate(kept):
            if one is not None and one.cache is not native.cache:
                raise ConfigError(
                    "the policy's weights have changed since the sequence was read", place=f"handles[{number}]",
                    fix="call `prefill` with its `ids`",
                )  # fmt: skip

    def _native_for(self, longest: int, runs: Sequence[int]) -> NativeDecoding | None:
        """Return the loop over a `PagedKVCache`, emptied where weights have changed; None where another one is needed.

        Args:
            longest: tokens of the longest sequence.
            runs: tokens of each stretch that will need blocks of its own, for which there should be room.
        """
        facts, policy = self.policy.measured(measure_native), self.policy
        state = policy.precision, weights_state(policy)
        if state != self._read_with:
            self._native, self._read_with = None, state
            self._linears.release()
        window = policy.probe_result.window
        if facts.obstacle is not None or (window is not None and longest > window):
            self._say_plain(facts.obstacle or f"sequences are longer than its sliding window of {window} tokens")
            return None
        size = BLOCK_SIZE.get(policy.device.type, BLOCK_SIZE["cpu"])
        most = self._most_blocks(size)
        # Where blocks must be full, each stretch begins with a copy of the last block before it.
        spare = 2 if policy.device.type in DEVICES else 1
        wanted = sum(tokens // size + spare for tokens in runs)
        if self._native is None or self._native.cache.block_size != size:
            cache = new_cache(max(1, min(most, wanted)), size, policy.device)
            self._native = NativeDecoding(policy, cache, most_rows=self.most_rows, cuda_graphs=self.cuda_graphs)
        elif wanted > self._native.cache.free_blocks:
            self._native.cache.grow(min(most, self._native.cache.used_blocks + wanted))
        return self._native

    def _most_blocks(self, size: int) -> int:
        """Return how many blocks of so many tokens may be in use."""
        number = 4 if self.policy.precision == torch.float32 else 2
        bytes_per_block = self.policy.measured(measure_native).elements * size * number
        return max(1, (free_bytes(self.policy.device) if self.memory is None else self.memory) // bytes_per_block)

    def _say_plain(self, reason: str) -> None:
        """Log, once per policy, that its completions are drawn through transformers' loop, and why."""
        if not self.policy.measured(_Said).said:
            self.policy.measured(_Said).said = True
            log.info("%s generates through transformers' own loop, which is slower: %s", self.policy.source, reason)

    def _say_undrafted(self) -> None:
        """Log, once per policy, that drafts have no use for it."""
        if not self.policy.measured(_Undrafted).said:
            self.policy.measured(_Undrafted).said = True
            log.info("%s: no draft is used, since transformers' own loop draws token by token", self.policy.source)

    @contextlib.contextmanager
    def _adapters(self) -> Iterator[FusedAdapters]:
        """Make the fused adapters of a call, and close them at its end, while no other thread draws from the policy."""
        turn = turn_of(self.policy.network)
        with turn:
            adapters = FusedAdapters(self.policy)
        try:
            yield adapters
        finally:
            with turn:
                adapters.close()

    @contextlib.contextmanager
    def _for_decoding(self, *, pack: bool = False, adapters: FusedAdapters | None = None) -> Iterator[None]:
        """Put the policy, inside the context, into evaluation mode and its own precision, without its own generation options.

        One thread at a time: others wait.

        Args:
            pack: whether weights are packed for it; see `FastLinears`.
            adapters: its fused adapters, where they are made already.
        """
        policy = self.policy
        with contextlib.ExitStack() as stack:
            stack.enter_context(turn_of(policy.network))
            model, own = policy.causal_lm, policy.causal_lm.generation_config
            model.generation_config = GenerationConfig()
            stack.callback(setattr, model, "generation_config", own)
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(policy))
            stack.enter_context(fast_adapters(policy) if adapters is None else adapters.in_place())
            stack.enter_context(self._linears.running(pack=pack))
            stack.enter_context(policy.product_precision())
            if policy.compiled:
                # A block would be compiled again for the cache, and for each length of it.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
