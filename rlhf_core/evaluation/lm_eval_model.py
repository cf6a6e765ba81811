"""An engine as lm-eval's `LM` object, tokenised as lm-eval's Hugging Face backend tokenises.

It needs the package lm-eval (the extra `lm-eval`), so it is imported where tasks are run, never before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from rlhf_core.config.online import SamplingConfig
from rlhf_core.data.collate import collate
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import ConfigError

SCORED_AT_ONCE = {"cpu": 1024, "cuda": 16384}
"""Most tokens whose likelihoods are computed in one pass; larger needs more memory."""
READ_AT_ONCE = 8192
"""Most tokens of contexts that are kept for one such pass; larger needs more memory for keys and values."""
MAX_GEN_TOKS = 256
"""Most tokens of an answer where a task doesn't say: lm-eval's own default."""
_NO_OPTION = ("do_sample", "until", "max_gen_toks", "use_cache")
"""Generation options that are read apart, and `use_cache`, which changes no text."""
_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class _Pair(NamedTuple):
    """A continuation whose likelihood is asked for."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    number: int
    """Of the request."""


class EngineLM(TemplateLM):
    """Answers lm-eval's requests with an engine: likelihoods, rolling likelihoods, and generated texts.

    Contexts that begin alike are read once, and the continuations of one context are scored behind it, in one pass with others.

    Args:
        engine: draws and scores with the weights that its policy has.
        template_options: further variables of the chat template, such as `enable_thinking`.
    """

    backend = "causal"

    def __init__(self, engine: Engine, *, template_options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.engine, self.policy = engine, engine.policy
        self.tokenizer: Any = engine.policy.tokenizer
        self.template_options = dict(template_options or {})

    # What lm-eval asks about the model

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else int(own)

    @property
    def max_length(self) -> int:
        """Most tokens that are read at once: what lm-eval's Hugging Face backend finds, within the policy's positions."""
        found = int(resolve_max_length(self.policy.network.config, self.tokenizer))
        return found if self.policy.max_positions is None else min(found, self.policy.max_positions)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    # Texts and tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return a text's ids; special tokens in front as the tokenizer adds them, but no second one behind one in the text."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [*self.tokenizer.encode(string, **more)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text; a system message is left out where the template refuses it, as lm-eval's backends do."""

        def rendered(turns: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **self.template_options,
                )
            )

        try:
            return rendered(chat_history)
        except jinja2.exceptions.TemplateError:
            return rendered([turn for turn in chat_history if turn["role"] != "system"])

    # Likelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """Return, for each (texts, context, continuation), its log-likelihood in nats, and whether greedy decoding writes it.

        What is longer than the model's positions loses tokens of its context, from the left.

        Raises:
            ConfigError: a continuation is longer than the model's positions.
        """
        pairs = [self._pair(number, context, tokens) for number, (_, context, tokens) in enumerate(requests)]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm) as bar:
            for chunk in _chunks(sorted(pairs), SCORED_AT_ONCE.get(self.policy.device.type, SCORED_AT_ONCE["cpu"])):
                found |= self._scored(chunk)
                bar.update(len(chunk))
        for number, (texts, _, _) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[number])
        return [found[number] for number in range(len(requests))]

    def _pair(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> _Pair:
        longest = self.max_length
        if not 0 < len(continuation) <= longest:
            problem = f"a continuation must have 1 to {longest} tokens, the model's positions"
            raise ConfigError(problem, place="lm-eval", got=f"{len(continuation)} tokens", fix="leave the task out")
        whole = [*context, *continuation][-(longest + 1) :]  # the last token is predicted alone, and needs no position
        return _Pair(tuple(whole[: -len(continuation)]), tuple(continuation), number)

    def _scored(self, pairs: Sequence[_Pair]) -> dict[int, tuple[float, bool]]:
        """Return each request's answer by its number."""
        contexts = list(dict.fromkeys(pair.context for pair in pairs))
        handles = dict(zip(contexts, self.engine.prefill(contexts), strict=True))
        try:
            scored = self.engine.score_with_top(
                [handles[pair.context] for pair in pairs], [pair.continuation for pair in pairs], 1
            )
        finally:
            self.engine.free([*handles.values()])
        return {
            pair.number: (float(one.logprobs.double().sum()), one.top.ids[:, 0].tolist() == list(pair.continuation))
            for pair, one in zip(pairs, scored, strict=True)
        }

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, in windows that don't overlap where it is long."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(make_disjoint_window, rolling):
                windows.append((None, context, tokens))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generated texts

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the policy writes behind each context, up to a stop string, the end token or a limit."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                options = requests[numbers[0]].args[1]
                contexts = [requests[number].args[0] for number in numbers]
                for number, context, text in zip(numbers, contexts, self._texts(contexts, options, bar), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", (context, options), text)
        return [texts[number] for number in range(len(requests))]

    def _texts(self, contexts: Sequence[str], options: Mapping[str, Any], bar: Any) -> list[str]:
        """Return what is written behind contexts under a task's generation options."""
        stop, sampling = self._sampling(options)
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                "the task asks for more new tokens than the model has positions", place="lm-eval, max_gen_toks",
                got=f"{sampling.max_new_tokens} of {self.max_length}", fix="set a smaller `max_gen_toks`",
            )  # fmt: skip
        encoded = [self.tok_encode(context)[-room:] for context in contexts]
        rows = [EncodedRow(number, ids) for number, ids in enumerate(encoded)]
        made = self.engine.generate(
            collate(rows).to(self.policy.device), sampling=sampling, finished=lambda *_: bar.update()
        )
        decoded = (self.tokenizer.decode(group[0].ids, skip_special_tokens=True) for group in made)
        return [postprocess_generated_text(text, stop, None) for text in decoded]

    def _sampling(self, options: Mapping[str, Any]) -> tuple[list[str], SamplingConfig]:
        """Return the texts that end an answer, and how its tokens are drawn.

        Raises:
            ConfigError: an option that the engine doesn't know, or a value out of its range.
        """
        found: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), MAX_GEN_TOKS))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stop = [text for text in handle_stop_sequences(found.get("until"), eos=eos) if text]
        unknown = [name for name in found if name not in (*_NO_OPTION, *_OPTIONS)]
        if unknown:
            raise ConfigError(
                "the engine doesn't know the generation option", place="lm-eval, generation_kwargs", got=f"`{unknown[0]}`",
                fix=f"use {', '.join((*_OPTIONS, 'until', 'max_gen_toks', 'do_sample'))}",
            )  # fmt: skip
        own = {name: found[name] for name in _OPTIONS if found.get(name) is not None}
        if not found.get("do_sample"):
            own = {"temperature": 0.0} | {name: own[name] for name in ("repetition_penalty",) if name in own}
        elif "temperature" not in options:
            own["temperature"] = 1.0
        values = own | {"max_new_tokens": found["max_gen_toks"], "stop": stop}
        return stop, SamplingConfig.parse(values, place="lm-eval, generation_kwargs")


def _chunks(pairs: Iterable[_Pair], most: int) -> Iterator[list[_Pair]]:
    """Yield pairs, in their order, that are scored together."""
    chunk: list[_Pair] = []
    scored = read = 0
    for pair in pairs:
        new = 0 if chunk and chunk[-1].context == pair.context else len(pair.context)
        if chunk and (scored + len(pair.continuation) > most or read + new > READ_AT_ONCE):
            yield chunk
            chunk, scored, read, new = [], 0, 0, len(pair.context)
        chunk.append(pair)
        scored, read = scored + len(pair.continuation), read + new
    if chunk:
        yield chunk
