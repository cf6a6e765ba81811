"""Completions from a policy through transformers' own decoding loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from rlhf_core.data.encode import Encoder, Outcome
from rlhf_core.data.sources import Cursor, Rows
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.interfaces import Completion
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.precision import within_products

if TYPE_CHECKING:
    from rlhf_core.models.policy import PolicyModel

SCORE_BYTES = 2**30
"""Most bytes of scores that one call of the decoding loop keeps, for the log-probabilities."""
MOST_ROWS = 256


@torch.no_grad()
def generate(
    policy: PolicyModel,
    prompts: Sequence[Any],
    *,
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[list[Completion]]:
    """Return n completions for each prompt, in the order in which they were drawn.

    Args:
        policy: the model; it is read in evaluation mode and left in the mode that it was in.
        prompts: texts, or lists of chat messages, encoded as in training; or rows with a `prompt` and the `tools` of its chat.
        n: completions a prompt.
        max_new_tokens: most tokens in a completion, its end token included.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: keeps the most likely tokens whose mass reaches it. top_k: keeps so many; 0 keeps all.
        seed: of the random numbers; the global random state is left as it was.

    Raises:
        ConfigError: an option is out of its range.
    """
    for name, good, wanted in (
        ("n", n >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature >= 0, "0 or more"),
        ("top_p", 0 < top_p <= 1, "above 0, at most 1"),
        ("top_k", top_k >= 0, "0 or more"),
    ):
        if not good:
            raise ConfigError(f"must be {wanted}", place=f"generate({name}=…)", got=locals()[name])
    encoder = Encoder(policy.tokenizer, "prompt", max_length=policy.max_positions or 2**31)
    asked = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
    outcomes = encoder.encode(list(Rows(asked, "prompts").rows(Cursor())))
    ids = [_fitting(outcome, max_new_tokens, policy.max_positions) for outcome in outcomes]
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    model = policy.causal_lm
    own_settings = model.generation_config
    stops = _stops(policy, encoder)
    cuda = [policy.device] if policy.device.type == "cuda" else []
    completions: list[Completion] = []
    try:
        with evaluating(policy), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            # What a model brings of its own (a repetition penalty, min-p) would fill in what isn't set here, and the
            # log-probabilities would be of another distribution.
            model.generation_config = GenerationConfig()
            rows = [row for row in ids for _ in range(n)]
            for part in _parts(rows, max_new_tokens, model.config.get_text_config().vocab_size):
                completions += _decode(policy, part, max_new_tokens, sampling, stops)
    finally:
        model.generation_config = own_settings
    for number, completion in enumerate(completions):
        tokens = completion.ids[:-1] if completion.stop_reason == "end" else completion.ids
        # The blank that a continued text begins with is a part of it; a chat's turn begins a text.
        continues = isinstance(asked[number // n]["prompt"], str) and encoder.wrap != "chat"
        text = encoder.pieces.text_of(tokens) if continues else policy.tokenizer.decode(tokens)
        completions[number] = replace(completion, text=text)
    return [completions[i * n : (i + 1) * n] for i in range(len(ids))]


def _fitting(outcome: Outcome, max_new_tokens: int, positions: int | None) -> list[int]:
    """Return a prompt's ids; raise where it was refused or leaves no room for the completion."""
    if outcome.row is None:
        raise DataError(f"the prompt can't be answered: {outcome.refused}", place=outcome.place)
    length = len(outcome.row.prompt_ids)
    if positions is not None and length + max_new_tokens > positions:
        raise DataError(
            "prompt and completion are longer than the model's positions",
            place=outcome.place,
            got=f"{length} + {max_new_tokens} tokens for {positions} positions",
            fix="shorten the prompt or lower max_new_tokens",
        )
    return outcome.row.prompt_ids


def _stops(policy: PolicyModel, encoder: Encoder) -> list[int]:
    """Return the tokens that end a completion: the tokenizer's end token, the model's own, and for chats the template's."""
    own = policy.causal_lm.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    return [*dict.fromkeys([policy.tokenizer.eos_token_id, *own, *(encoder.template.stops if encoder.chats else ())])]


def _parts(rows: list[list[int]], max_new_tokens: int, vocabulary: int) -> Iterator[list[list[int]]]:
    size = max(1, min(MOST_ROWS, SCORE_BYTES // (8 * max_new_tokens * vocabulary)))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _decode(
    policy: PolicyModel, rows: list[list[int]], max_new_tokens: int, sampling: dict[str, Any], stops: list[int]
) -> list[Completion]:
    """Return completions whose texts are still to be decoded."""
    tokenizer, device = policy.tokenizer, policy.device
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        use_cache=True,
        **sampling,
    )
    with within_products(policy.network):
        out = policy.causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    drawn = out.sequences[:, width:]  # (B, T)
    # Under the distribution that drew the token, and under the model's own; greedy decoding draws with certainty.
    used = _at(out.scores, drawn) if sampling["do_sample"] else torch.zeros(drawn.shape)
    raw = _at(out.logits, drawn)
    completions = []
    for row in range(len(rows)):
        tokens = drawn[row].tolist()
        end = next((number for number, token in enumerate(tokens) if token in stops), None)
        length = len(tokens) if end is None else end + 1
        completions.append(
            Completion(
                text="",
                ids=tokens[:length],
                logprobs=used[row, :length].tolist(),
                raw_logprobs=raw[row, :length].tolist(),
                stop_reason="length" if end is None else "end",
            )
        )
    return completions


def _at(scores: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    """Return (B, T) float32 log-probabilities of the tokens under each step's scores (B, V)."""
    steps = [step.float().log_softmax(-1).gather(1, tokens[:, t, None]) for t, step in enumerate(scores)]
    return torch.cat(steps, dim=1).cpu()
