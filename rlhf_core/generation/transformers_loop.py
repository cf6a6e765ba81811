"""transformers' decoding loop, and which way of running it gives the logits that a model is trained on.

Nothing here relies on what a configuration claims: a few tokens are decoded, and their logits compared with the plain pass.

Axes: B rows, L prompt tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf_core.generation.drawn_rows import DrawnRows
from rlhf_core.infra.errors import ModelError
from rlhf_core.models.backbone import accepted, plain_ids
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.precision import exact_products
from rlhf_core.models.probe import FAILURES, deviation

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel

log = logging.getLogger(__name__)

Together = Literal["any", "equal", "none"]
"""Which prompts are decoded in one batch: any, those of equal lengths, or each alone."""


@dataclass(frozen=True)
class Decoding:
    """How a model is decoded so that its logits are those of its plain forward pass."""

    together: Together
    """Which prompts are decoded in one batch."""
    cache: bool = True
    """Whether keys, values and states are kept from token to token; else each step computes the sequence from its beginning."""


def decode(
    policy: PolicyModel,
    ids: Tensor,
    mask: Tensor,
    processor: LogitsProcessor,
    *criteria: StoppingCriteria,
    most: int,
    cache: bool,
) -> None:
    """Run transformers' decoding loop on left-padded prompts; the logits processor draws the tokens and keeps them.

    Args:
        ids: (B, L). mask: (B, L), 1 at real tokens.
        processor: gets each step's logits (B, V).
        criteria: when to stop before `most` tokens.
        most: most new tokens.
        cache: whether keys, values and states are kept from token to token.
    """
    generation_config = GenerationConfig(
        max_new_tokens=most, pad_token_id=policy.tokenizer.pad_token_id or 0, do_sample=False, use_cache=cache
    )
    policy.causal_lm.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=generation_config,
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList(criteria),
    )


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (B, L) ids with zeros on the left, and (B, L) 1 where they are real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + [*row] for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


class Drawing(LogitsProcessor):
    """Draws the next token of each row at every step of the decoding loop, and leaves the loop no choice but that one.

    Args:
        rows: what draws; its rows are those of the batch.
        filler: id that an ended row gets while others continue.
        rules: for each row, what ends it, given the ids drawn so far, by returning True; None where nothing does.
    """

    def __init__(
        self, rows: DrawnRows, *, filler: int, rules: Sequence[Callable[[Sequence[int]], bool] | None] = ()
    ) -> None:
        self.rows, self.filler = rows, filler
        self._rules = {row: rule for row, rule in enumerate(rules) if rule is not None}
        self.ruled: set[int] = set()
        """Rows that a rule has ended."""
        self.ended = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        """(B,) bool: which rows have their last token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw one token per row from the logits (B, V) of a step; return scores (B, V) that are -inf at all other tokens."""
        tokens = self.rows.draw(scores).where(~self.ended, self.filler)
        for row, _ in self.rows.ended():
            self.ended[row] = True
        for row, rule in self._rules.items():
            if not self.ended[row] and rule(self.rows.completion(row).ids):
                self.ended[row] = True
                self.ruled.add(row)
        return scores.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)  # a copy that the loop made for this


class Ended(StoppingCriteria):
    """Ends the decoding loop once each row has its last token.

    Args:
        after_token: called after each step of the loop, once its tokens are drawn.
    """

    def __init__(self, drawing: Drawing, after_token: Callable[[], None] | None = None) -> None:
        self.drawing, self.after_token = drawing, after_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.after_token is not None:
            self.after_token()
        return self.drawing.ended


class _Forced(LogitsProcessor):
    """Makes the loop choose known tokens, one per step, and keeps the first row's logits (V,) of each step."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.logits = tokens, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the logits (B, V) of a step, and return scores that leave the loop the step's known token."""
        self.logits.append(scores[0].clone())
        chosen = torch.full_like(scores[:, :1], self.tokens[len(self.logits) - 1], dtype=torch.long)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def decoding_of(policy: PolicyModel) -> Decoding:
    """Return how to decode a policy, measured once."""
    return policy.measured(measure_decoding)


@torch.no_grad()
def measure_decoding(policy: PolicyModel) -> Decoding:
    """Measure how to decode a policy (which prompts together, with or without a cache) so that its logits are those of training.

    Training uses one plain forward pass. Left padding changes recurrent states and positions in some models; some count positions
    differently with a cache. Returns the fastest way that gives the same logits; logs a warning where none does.

    Raises:
        ModelError: the model has no decoding loop.
    """
    if not getattr(policy.causal_lm, "can_generate", lambda: False)():
        raise ModelError(
            "the model can't generate: transformers has no decoding loop for it", place=policy.source,
            got=type(policy.causal_lm).__name__, fix="use a model whose class inherits GenerationMixin",
        )  # fmt: skip
    ids = plain_ids(policy.network, 15)
    short, long, tokens = ids[:4].tolist(), ids[4:12].tolist(), ids[12:].tolist()
    flash, kind = policy.attention.kernel == "flash", policy.device.type
    limit, error = 3e-2 if flash else 1e-4, float("inf")
    most_together: Together = "none" if policy.probe_result.arrangement == "alone" else "any"
    if most_together == "any" and policy.shared_forward.depends_on_length:
        most_together = "equal"
    own, policy.causal_lm.generation_config = policy.causal_lm.generation_config, GenerationConfig()
    try:
        with (
            evaluating(policy),
            exact_products(policy.network),
            torch.autocast(kind, dtype=policy.precision, enabled=flash),
        ):
            wanted = forward_logits(policy, short, tokens)
            for way in (Decoding("any"), Decoding("equal"), Decoding("equal", cache=False)):
                if way.together == "any" and most_together != "any":
                    continue
                prompts = [short, long] if way.together == "any" else [short]
                with contextlib.suppress(*FAILURES):
                    error = deviation(_decoded_logits(policy, prompts, tokens, way.cache), wanted)
                if error < limit:
                    return Decoding("none" if most_together == "none" else way.together, way.cache)
    finally:
        policy.causal_lm.generation_config = own
    log.warning(
        "%s: generation logits differ from training logits by %.0e (relative) however it is decoded: importance ratios are off",
        policy.source, error,
    )  # fmt: skip
    return Decoding("none" if most_together == "none" else "equal")


def forward_logits(policy: PolicyModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """Return float32 logits (len(tokens), V) that predict the tokens behind a prompt, from one plain forward pass."""
    ids = torch.tensor([prompt + tokens], device=policy.device)
    logits = policy.network(input_ids=ids, **accepted(policy.network.forward, use_cache=False)).logits
    return logits[0, len(prompt) - 1 : -1].float()


def _decoded_logits(policy: PolicyModel, prompts: list[list[int]], tokens: list[int], cache: bool) -> Tensor:
    """Return the first prompt's logits (len(tokens), V) while the decoding loop is made to generate these tokens for all."""
    forced = _Forced(tokens)
    decode(policy, *left_padded(prompts, policy.device), forced, most=len(tokens), cache=cache)
    return torch.stack(forced.logits)
