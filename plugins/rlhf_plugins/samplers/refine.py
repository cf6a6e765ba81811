"""Self-refinement: an answer is criticised and written again, as long as that makes it better."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.plugin import (
    BaseConfig,
    Batch,
    Completion,
    Engine,
    Prompt,
    PromptTooLong,
    Sampler,
    SamplingConfig,
    prompt_batch,
    random_generator,
    samples_of,
    whole_count,
)

_NAMES = re.compile(r"\{(prompt|answer|critique)\}")
_CRITIQUE, _REFINE = 1, 2
"""What tells the random numbers of a round's two completions apart."""


class RefineConfig(SamplingConfig):
    """Options of self-refinement, and of every answer that is drawn."""

    rounds: int = Field(
        3, ge=1, description="Most times that an answer is written again; larger may find better ones, and costs more."
    )
    decide: Literal["reward", "critic"] = Field(
        "reward",
        description="What tells a gain: `reward`, an answer's score, of which the best is kept; `critic`, the critique alone,"
        " which needs no reward.",
    )
    min_gain: float = Field(
        0.0, ge=0, description="A round's gain in reward must be above it (reward); larger stops sooner."
    )
    critique_prompt: str = Field(
        "Review the answer above. Point out every error and every weakness, and be specific. If there is none, write: no flaws.",
        description="Request for a critique, behind the prompt and its answer. One that names `{prompt}` or `{answer}` has them"
        " in its text, and of a text prompt it stands alone.",
    )
    refine_prompt: str = Field(
        "Write the whole answer again, and mend what the critique found. Write the answer alone.",
        description="Request for another answer, behind the critique, which it may name as `{critique}`, and as above.",
    )
    done_phrase: str = Field(
        "no flaws",
        min_length=1,
        description="Text by which a critique says that nothing is left to mend, in any case of letters.",
    )
    critique_tokens: int = Field(256, ge=1, description="Most tokens in a critique; larger allows more detailed ones.")

    @field_validator("critique_prompt", "refine_prompt")
    @classmethod
    def _asks(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must ask for something")
        return text

    @model_validator(mode="after")
    def _gain_is_used(self) -> RefineConfig:
        if self.decide == "critic" and self.min_gain:
            raise ValueError("min_gain has no meaning with decide critic, which scores nothing")
        return self


@dataclass
class _Chain:
    """One answer of a prompt with the rounds that it went through."""

    prompt: int
    seed: int
    best: Completion
    score: float | None = None
    asked: Prompt | None = None
    """The request behind which the best answer was drawn; None for the first answer's own prompt."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Per round the `critique`, and unless it ended the chain the `answer` and its `score`."""
    stopped: str | None = None
    """`critic` (nothing to mend), `no_gain`, `no_room` in the model's positions, `empty` (a request of empty texts alone), or
    `rounds`; None while it goes on."""

    def seed_of(self, round: int, kind: int) -> int:
        return int(random_generator(self.seed, round, kind).integers(2**62))

    def completion(self) -> Completion:
        """Return the best answer with its score and what happened."""
        about = {"rounds": len(self.rounds), "stopped": self.stopped, "asked": self.asked, "history": self.rounds}
        return replace(self.best, score=self.score, details={**self.best.details, **about})


class IterativeRefiner(Sampler):
    """Self-refinement: answers, criticises the answer, and writes it again, until that gains nothing.

    Madaan et al. 2023 ("Self-Refine", arXiv 2303.17651), with one deviation: by a reward, an answer that scores no more than
    the best one so far ends the rounds and isn't kept, so that a result never scores less than the first answer did. By the
    critic alone, as in the paper, the last answer is kept. Critiques and answers are the policy's own. In a chat the requests
    are further turns of the user's; behind a text prompt they are text, with blank lines between.
    """

    api = 1
    Config = RefineConfig
    config: RefineConfig
    roles: ClassVar = {"policy": "policy", "reward": "reward"}
    # Tokens are drawn behind a critique, so their probabilities aren't those behind the prompt.
    draws_from_policy = False

    @classmethod
    def roles_for(cls, config: BaseConfig) -> Mapping[str, str]:
        """Return all roles; the critic alone needs no reward."""
        critic = isinstance(config, RefineConfig) and config.decide == "critic"
        return {"policy": "policy"} if critic else cls.roles

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return n refined answers per prompt, by a reward best first with their scores, else as drawn without any.

        `Completion.details` have the number of `rounds`, why they `stopped`, their `history`, and what was `asked` for the
        answer, behind which its log-probabilities are; null for the prompt itself.
        """
        n = whole_count(n)
        batch, engine = prompt_batch(self.policy, prompts), self.engine(seed)
        seeds = engine.seeds(batch, n)
        drawn = engine.generate(batch, n, self.config, seeds=seeds)
        chains = [
            _Chain(number, seeds[number][index], one)
            for number, group in enumerate(drawn)
            for index, one in enumerate(group)
        ]
        if self.config.decide == "reward":
            for chain, score in zip(chains, self._scores(batch, [(one, one.best) for one in chains]), strict=True):
                chain.score = score
        for round in range(self.config.rounds):
            if not (going := [chain for chain in chains if chain.stopped is None]):
                break
            self._round(engine, batch, going, round)
        for chain in chains:
            chain.stopped = chain.stopped or "rounds"
        found: list[list[Completion]] = [[] for _ in range(batch.num_prompts)]
        for chain in chains:
            found[chain.prompt].append(chain.completion())
        return [sorted(group, key=lambda one: -(one.score or 0.0)) for group in found]

    def _round(self, engine: Engine, batch: Batch, chains: Sequence[_Chain], round: int) -> None:
        """Criticise each chain's answer and write it again, unless there is nothing to mend or no room for it."""
        asked = [
            (chain, _critique_request(batch.prompts[chain.prompt], chain.best.text, self.config)) for chain in chains
        ]
        options = {name: getattr(self.config, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        critic = SamplingConfig(max_new_tokens=self.config.critique_tokens, **options)
        again = []
        for chain, request, critique in self._drawn(engine, batch, asked, critic, round, _CRITIQUE):
            chain.rounds.append({"critique": critique.text})
            if self.config.done_phrase.casefold() in critique.text.casefold():
                chain.stopped = "critic"
            else:
                asked_first = batch.prompts[chain.prompt]
                again.append(
                    (chain, _refine_request(request, asked_first, chain.best.text, critique.text, self.config))
                )
        refined = self._drawn(engine, batch, again, self.config, round, _REFINE)
        answers = [(chain, one) for chain, _, one in refined]
        scores = self._scores(batch, answers) if self.config.decide == "reward" else [None] * len(refined)
        for (chain, request, one), score in zip(refined, scores, strict=True):
            chain.rounds[-1] |= {"answer": one.text, "score": score}
            if score is not None and score <= (chain.score or 0.0) + self.config.min_gain:
                chain.stopped = "no_gain"
                # A gain below the least that counts is kept all the same: it costs nothing any more.
                if score <= (chain.score or 0.0):
                    continue
            chain.best, chain.score, chain.asked = one, score, request

    def _drawn(
        self,
        engine: Engine,
        batch: Batch,
        asked: Sequence[tuple[_Chain, Prompt]],
        sampling: SamplingConfig,
        round: int,
        kind: int,
    ) -> list[tuple[_Chain, Prompt, Completion]]:
        """Return one completion per request; a chain whose request is too long for the model stops instead."""
        fitting: list[tuple[_Chain, Prompt]] = []
        for chain, prompt in asked:
            if isinstance(prompt, str) and not prompt.strip():
                chain.stopped = "empty"
                continue
            try:
                prompt_batch(self.policy, [_row(batch, chain, prompt)])
                fitting.append((chain, prompt))
            except PromptTooLong:
                chain.stopped = "no_room"
        if not fitting:
            return []
        requests = prompt_batch(self.policy, [_row(batch, chain, prompt) for chain, prompt in fitting])
        seeds = [[chain.seed_of(round, kind)] for chain, _ in fitting]
        found = engine.generate(requests, 1, sampling, seeds=seeds)
        return [(chain, prompt, one) for (chain, prompt), (one,) in zip(fitting, found, strict=True)]

    def _scores(self, batch: Batch, answers: Sequence[tuple[_Chain, Completion]]) -> list[float]:
        """Return the rewards of answers, in their order, to the prompts that were asked first."""
        groups: list[list[Completion]] = [[] for _ in range(batch.num_prompts)]
        for chain, one in answers:
            groups[chain.prompt].append(one)
        if not answers:
            return []
        rows = [row for row, group in zip(batch.rows, groups, strict=True) for _ in group]
        totals = iter(self.models["reward"].score(samples_of(batch, groups), rows).total.tolist())
        # Chains are in the order of their prompts, as samples are.
        return [float(total) for total in totals]


def _row(batch: Batch, chain: _Chain, prompt: Prompt) -> dict[str, Any]:
    """Return a request as a row, with the tools of the prompt that was asked first."""
    tools = batch.records[chain.prompt].get("tools") if batch.records else None
    return {"prompt": prompt} | ({} if tools is None else {"tools": tools})


def _critique_request(prompt: Prompt, answer: str, config: RefineConfig) -> Prompt:
    """Return the prompt that asks for a critique."""
    return _asked(prompt, answer, config.critique_prompt, {"prompt": _text(prompt), "answer": answer})


def _refine_request(request: Prompt, asked: Prompt, answer: str, critique: str, config: RefineConfig) -> Prompt:
    """Return the prompt that asks for another answer: what asked for the critique, the critique, and the request.

    Args:
        request: the prompt that asked for the critique.
        asked: the prompt that was asked first.
    """
    values = {"prompt": _text(asked), "answer": answer, "critique": critique}
    return _asked(request, critique, config.refine_prompt, values)


def _asked(before: Prompt, reply: str, template: str, values: Mapping[str, str]) -> Prompt:
    """Return a prompt, what the policy replied, and a request; in a chat as turns, in a text with blank lines between.

    A request of a text prompt that names a value stands alone: it says itself where the others belong.
    """
    request = _NAMES.sub(lambda name: values.get(name[1], name[0]), template)  # in one pass: values may hold names
    if not isinstance(before, str):
        turns = [{"role": "assistant", "content": reply}, {"role": "user", "content": request}]
        return [*before, *turns]  # type: ignore[list-item]
    if any(name in values for name in _NAMES.findall(template)):
        return request
    return "\n\n".join([before.rstrip("\n"), reply, request]) + "\n\n"


def _text(prompt: Prompt) -> str:
    """Return a prompt as text: of a chat the text of its last turn."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
