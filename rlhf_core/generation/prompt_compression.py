"""Long prompts, compressed before a policy reads them: to the sentences that matter most, or to a compressor's soft tokens.

Once it is attached to a policy, whatever completes prompts with it (samplers, evaluations, `PolicyModel.generate`) reads long
ones compressed. Rewards, rows and reports have the prompts as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.config.compression import CompressionConfig
from rlhf_core.contracts.records import Prompt
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.model_files import locate
from rlhf_core.models.context_compressor import ContextCompressor, check_reader, context_span
from rlhf_core.models.extractive_compression import UNSPACED, extract
from rlhf_core.models.same_vocabulary import check_same_vocabulary
from rlhf_core.models.soft_tokens import SoftVocabulary, end_soft_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.models.policy_model import PolicyModel

log = logging.getLogger(__name__)

_LONGEST_QUESTION = 4000
"""Characters of a prompt's end that sentences are compared with; more would only blur what is asked."""
_LONGEST_WORD = 40
_IN_A_WORD = re.compile(rf"[^\W{UNSPACED}]{{2}}")
"""Two letters between which no word begins."""
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
            extract(text, math.ceil(len(ids) / self.config.ratio), lambda text: token_starts(text, self.tokenizer))
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


def detach(policy: PolicyModel) -> None:
    """Let a policy read prompts as they are again."""
    if policy.prompt_compression is not None and policy.prompt_compression.soft is not None:
        end_soft_tokens(policy.network)
    policy.prompt_compression = None


def shortened_prompt(prompt: Prompt, config: CompressionConfig, tokenizer: Any) -> Prompt:
    """Return a prompt with the sentences of its context that matter most, and its last tokens as they are.

    A text's context is all but its last `keep_end` tokens, counted back to a word's beginning. Of a chat, the messages are
    context, the last one and the user's last one, the question, without their ends. `system` and `developer` messages aren't,
    unless there are no others. The longest message is shortened; if that isn't enough, the next longest ones are, too.

    Raises:
        ConfigError: the tokenizer doesn't say where tokens begin.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [message["content"] if isinstance(message.get("content"), str) else "" for message in messages]
    last = len(texts) - 1
    asking = max((at for at, message in enumerate(messages) if message.get("role") == "user"), default=last)
    free = [at for at, message in enumerate(messages) if message.get("role") not in ("system", "developer")]
    ends = [len(text) for text in texts]
    keep = 64 if config.keep_end is None else config.keep_end
    for at in {asking, last}:
        ends[at] = _end_of_context(texts[at], keep, tokenizer)
    sizes = {at: len(token_starts(texts[at][: ends[at]], tokenizer)) for at in free or range(len(texts))}
    found = list(texts)
    for at, budget in _budgets(sizes, config.ratio).items():
        context, end = texts[at][: ends[at]], texts[at][ends[at] :]
        question = (end if at == asking else texts[asking])[-_LONGEST_QUESTION:]
        found[at] = extract(context, budget, lambda text: token_starts(text, tokenizer), question=question) + end
    if isinstance(prompt, str):
        return found[0]
    return [
        {**message, "content": text} if isinstance(message.get("content"), str) else message
        for message, text in zip(prompt, found, strict=True)
    ]


def _budgets(sizes: Mapping[int, int], ratio: float) -> dict[int, int]:
    """Return how many tokens are to be left of which contexts, so that all together are one of `ratio`.

    As few as possible are shortened, the longest first, each to the same share of its tokens (at least one token), which isn't
    less than half of what the ratio alone would leave.

    Args:
        sizes: tokens by context.
        ratio: tokens for one that is left.
    """
    shortened, taken = list[int](), 0
    whole = sum(sizes.values())
    left = math.ceil(whole / ratio) - whole  # for those shortened, when the others stay whole
    for at in sorted(sizes, key=lambda at: -sizes[at]):
        shortened.append(at)
        taken += sizes[at]
        left += sizes[at]
        if left * 2 * ratio >= taken:
            break
    return {at: max(left * sizes[at] // taken, 1) for at in shortened if sizes[at]}


def _end_of_context(text: str, keep: int, tokenizer: Any) -> int:
    """Return the place in a text from which on it is kept: a word's beginning, so many tokens before its end or a little more.

    A place in a run of letters that is longer than words are, or of a script without spaces, is where a token begins.
    """
    starts = token_starts(text, tokenizer)
    at = 0 if len(starts) <= keep else starts[-keep]
    if text[at : at + 1] == " " and not text[at - 1 : at].isspace():
        at += 1  # A token has the blank before its word, which divides the context from it.
    back = at
    while back and at - back < _LONGEST_WORD and _IN_A_WORD.fullmatch(text, back - 1, back + 1):
        back -= 1
    return at if at - back == _LONGEST_WORD else back


def token_starts(text: str, tokenizer: Any) -> list[int]:
    """Return the place in a text where each of its tokens begins.

    Raises:
        ConfigError: the tokenizer doesn't know.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("compression needs a fast tokenizer", place="compress", got=type(tokenizer).__name__)
    return [start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping]
