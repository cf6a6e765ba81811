"""Long prompts, compressed before a policy reads them: to the sentences that matter most, or to a compressor's soft tokens.

Once it is attached to a policy, whatever completes prompts with it (samplers, evaluations, `PolicyModel.generate`) reads long
ones compressed. Rewards, rows and reports have the prompts as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.config.compression import CompressionConfig
from rlhf_core.contracts.records import Prompt
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.model_files import locate
from rlhf_core.models.context_compressor import ContextCompressor, check_reader, context_span
from rlhf_core.models.extractive_compression import extract
from rlhf_core.models.same_vocabulary import check_same_vocabulary
from rlhf_core.models.soft_tokens import SoftVocabulary, end_soft_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.models.policy_model import PolicyModel

log = logging.getLogger(__name__)

_LONGEST_QUESTION = 4000
"""Characters of a prompt's end that sentences are compared with; more would only blur what is asked."""
Encode = Callable[[Sequence[Mapping[str, Any]]], list[EncodedRow]]
"""Rows with a prompt, and tools → the encoded rows."""


@dataclass(frozen=True)
class CompressedPrompt:
    """A prompt as a policy reads it."""

    prompt: Prompt | None
    """Its text or chat: shortened by the extractive mode, as it was by a compressor; None where ids alone were given."""
    ids: tuple[int, ...]
    """The tokens that the policy reads; those from `SOFT` on stand for `embeddings`."""
    length: int
    """Tokens before."""
    embeddings: Tensor | None = None
    """(N, E) float32: of the soft tokens, in their order; None where there are none."""

    @property
    def compressed(self) -> bool:
        """Whether anything was left out or replaced."""
        return len(self.ids) < self.length or self.embeddings is not None


class PromptCompression:
    """Compresses prompts over a length.

    Args:
        config: the options.
        tokenizer: of the policies that will read the prompts.
        compressor: a trained one; None takes the sentences that matter most.

    Raises:
        ConfigError: the ratio is one that the compressor has too few memory tokens for.
    """

    def __init__(
        self, config: CompressionConfig, tokenizer: Any, *, compressor: ContextCompressor | None = None
    ) -> None:
        self.config, self.tokenizer, self.compressor = config, tokenizer, compressor
        self.soft = None if compressor is None else SoftVocabulary()
        kept = (0, 64) if compressor is None else compressor.kept
        self.keep_start = kept[0] if config.keep_start is None else config.keep_start
        self.keep_end = kept[1] if config.keep_end is None else config.keep_end
        self.counts = {"prompts": 0, "compressed": 0, "before": 0, "after": 0}
        """Prompts that were read, how many were compressed, and the tokens of these before and after."""
        self._warned = False
        if compressor is not None:
            compressor.pieces(compressor.chunk, config.ratio)
            self._warn_of_other_ends(compressor)
            described = json.dumps(compressor.describe()["files"], sort_keys=True)
            self._name = hashlib.sha256(described.encode()).hexdigest()

    @classmethod
    def load(cls, config: CompressionConfig, policy: PolicyModel) -> PromptCompression:
        """Return the compression that options describe, its compressor loaded on the policy's device.

        Raises:
            ModelError: the compressor can't be loaded, has other tokens than the policy, or makes embeddings of another width.
            ConfigError: see `PromptCompression`.
        """
        compressor = None
        if config.compressor is not None:
            locate(config.compressor)
            compressor = ContextCompressor.from_pretrained(config.compressor, frozen=True, device=policy.device)
            check_same_vocabulary("compressor", compressor, policy, main_is="the policy")
        made = cls(config, policy.tokenizer, compressor=compressor)
        made.attach(policy)
        return made

    def attach(self, *policies: PolicyModel) -> None:
        """Let policies read long prompts compressed, in place of an earlier compression of theirs.

        A reference that only scores what another policy has read is attached, too: it meets the same soft tokens.

        Raises:
            ModelError: a compressor's embeddings have another width than a policy's.
        """
        for policy in policies:
            if policy.prompt_compression is self:
                continue
            if self.compressor is not None:
                check_reader(self.compressor, policy)
            detach(policy)
            if self.soft is not None:
                self.soft.attach(policy.network)
            policy.prompt_compression = self

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCompression:
        """Return the same one: a copy of a policy shares it."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return what decides how prompts are compressed, as JSON values."""
        described = None if self.compressor is None else self.compressor.describe()
        return {"options": self.config.model_dump(mode="json"), "compressor": described}

    def _warn_of_other_ends(self, compressor: ContextCompressor) -> None:
        """Warn where other tokens count as context than in the compressor's training."""
        if (self.keep_start, self.keep_end) != compressor.kept:
            log.warning(
                "the compressor was trained with keep_start %d and keep_end %d, and is used with %d and %d",
                *compressor.kept, self.keep_start, self.keep_end,
            )  # fmt: skip

    # Prompts

    def compress(self, rows: Sequence[EncodedRow], tools: Sequence[Any], encode: Encode) -> list[CompressedPrompt]:
        """Return encoded prompts as a policy reads them, in order.

        Args:
            rows: the encoded prompts.
            tools: those of each prompt's chat, or None.
            encode: encodes rows as these were.
        """
        found = [CompressedPrompt(row.prompt, tuple(row.prompt_ids), len(row.prompt_ids)) for row in rows]
        long = [n for n, row in enumerate(rows) if len(row.prompt_ids) > self.config.over]
        if self.compressor is not None:
            softened = self._softened([found[n] for n in long])
        else:
            shorter = [shortened_prompt(rows[n].prompt, self._ends(), self.tokenizer) for n in long]
            again = encode([{"prompt": prompt, "tools": tools[n]} for n, prompt in zip(long, shorter, strict=True)])
            softened = [
                replace(found[n], prompt=prompt, ids=tuple(row.prompt_ids))
                for n, prompt, row in zip(long, shorter, again, strict=True)
            ]
        for n, one in zip(long, softened, strict=True):
            found[n] = one
        self._count(found)
        return found

    def compress_ids(self, contexts: Sequence[Sequence[int]]) -> list[CompressedPrompt]:
        """Return whole contexts compressed, given as token ids, whatever their length and without keeping their ends.

        The extractive mode takes the tokens of the sentences that matter most, encoded again.
        """
        found = [CompressedPrompt(None, tuple(ids), len(ids)) for ids in contexts]
        if self.compressor is not None:
            return self._softened(found, whole=True)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in contexts]
        kept = [
            extract(text, math.ceil(len(ids) / self.config.ratio), self._size)
            for text, ids in zip(texts, contexts, strict=True)
        ]
        return [replace(one, ids=tuple(self._ids(text))) for one, text in zip(found, kept, strict=True)]

    def _softened(self, prompts: Sequence[CompressedPrompt], *, whole: bool = False) -> list[CompressedPrompt]:
        """Return prompts with soft tokens in the place of their contexts."""
        compressor, soft, config = self.compressor, self.soft, self.config
        assert compressor is not None and soft is not None
        spans = [
            slice(0, one.length) if whole else context_span(one.length, self.keep_start, self.keep_end)
            for one in prompts
        ]
        contexts = [one.ids[span] for one, span in zip(prompts, spans, strict=True)]
        places = [
            soft.ids_of(
                f"{self._name} {config.ratio} {list(ids)}",
                sum(count for _, count in compressor.pieces(len(ids), config.ratio)),
            )
            for ids in contexts
        ]
        missing = [n for n, ids in enumerate(places) if ids not in soft]
        rows = compressor.compress([contexts[n] for n in missing], config.ratio)
        soft.add({places[n]: made for n, made in zip(missing, rows, strict=True)}, used=places)
        return [
            replace(
                one,
                ids=(*one.ids[: span.start], *ids, *one.ids[span.stop :]),
                embeddings=soft[ids] if len(ids) else None,
            )
            for one, span, ids in zip(prompts, spans, places, strict=True)
        ]

    def _count(self, prompts: Sequence[CompressedPrompt]) -> None:
        made = [one for one in prompts if one.compressed]
        before, after = sum(one.length for one in made), sum(len(one.ids) for one in made)
        first = made and not self.counts["compressed"]
        whole = [one for one in prompts if one.length > self.config.over and not one.compressed]
        if whole and not self._warned:
            self._warned = True
            log.warning(
                "%d of %d prompts are longer than %d tokens, and nothing of them could be compressed: `keep_end` keeps %d",
                len(whole), len(prompts), self.config.over, self.keep_end,
            )  # fmt: skip
        added = {"prompts": len(prompts), "compressed": len(made), "before": before, "after": after}
        self.counts = {name: value + added[name] for name, value in self.counts.items()}
        if first:
            how = "by a compressor" if self.compressor is not None else "to the sentences that matter most"
            log.info("prompts of more than %d tokens are compressed %s", self.config.over, how)

    def _ends(self) -> CompressionConfig:
        return self.config.model_copy(update={"keep_end": self.keep_end})

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _size(self, text: str) -> int:
        return len(self._ids(text))


def detach(policy: PolicyModel) -> None:
    """Let a policy read prompts as they are again."""
    if policy.prompt_compression is not None and policy.prompt_compression.soft is not None:
        end_soft_tokens(policy.network)
    policy.prompt_compression = None


def shortened_prompt(prompt: Prompt, config: CompressionConfig, tokenizer: Any) -> Prompt:
    """Return a prompt with the sentences of its context that matter most, and its last tokens as they are.

    A text's context is all but its last `keep_end` tokens, counted back to a word's beginning. Of a chat, the longest message is
    shortened: where that is the last one its end is kept so, where it is another one the last one is the question.
    """

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    def shorter(text: str, question: str) -> str:
        return extract(text, math.ceil(size(text) / config.ratio), size, question=question[-_LONGEST_QUESTION:])

    def with_end(text: str) -> str:
        at = _end_of_context(text, 64 if config.keep_end is None else config.keep_end, tokenizer)
        return shorter(text[:at], text[at:]) + text[at:]

    if isinstance(prompt, str):
        return with_end(prompt)
    texts = [message["content"] if isinstance(message.get("content"), str) else "" for message in prompt]
    longest = max(range(len(texts)), key=lambda at: len(texts[at]))
    last = longest == len(texts) - 1
    content = with_end(texts[longest]) if last else shorter(texts[longest], texts[-1])
    return [{**message, "content": content} if at == longest else message for at, message in enumerate(prompt)]


def _end_of_context(text: str, keep: int, tokenizer: Any) -> int:
    """Return the place in a text from which on it is kept: a word's beginning, so many tokens before its end or a little more."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("compression needs a fast tokenizer", place="compress", got=type(tokenizer).__name__)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    at = 0 if len(offsets) <= keep else offsets[-keep][0]
    while at and not text[at - 1].isspace():
        at -= 1
    return at
