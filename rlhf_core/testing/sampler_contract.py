"""What every sampler promises, as tests to inherit.

class TestDistinct(SamplerContract):
    method = "acme-distinct"  # a registered name, or `sampler = DistinctSampler`
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, ClassVar

from rlhf_core.interfaces import Completion, Sampler
from rlhf_core.testing.arithmetic import Arithmetic
from rlhf_core.testing.contract import Contract, is_number, require

STOP_REASONS = ("end", "length")


class SamplerContract(Contract):
    """The conformance tests of a sampler."""

    kind = "sampler"
    sampler: ClassVar[type[Sampler] | None] = None
    """The class under test, in place of `method`."""

    def instance(self) -> Sampler:
        """Return a new sampler with `options`."""
        return self.subject()(self.config())

    def prompts(self) -> list[Any]:
        """Return prompts as text."""
        return list(islice(Arithmetic().problems(seed=1), 3))

    def chats(self) -> list[Any]:
        """Return prompts as chat messages."""
        return list(islice(Arithmetic(chat=True).problems(seed=1), 2))

    def test_n_completions_for_each_prompt(self) -> None:
        """Each prompt gets n completions, in the order of the prompts; no prompts, no completions."""
        sampler, prompts = self.instance(), self.prompts()
        for n in (1, 3):
            found = sampler.sample(prompts, n)
            require(len(found) == len(prompts), f"{len(found)} lists for {len(prompts)} prompts")
            for number, completions in enumerate(found):
                require(len(completions) == n, f"prompt {number} gets {len(completions)} completions, not n = {n}")
                kinds = {type(one).__name__ for one in completions if not isinstance(one, Completion)}
                require(not kinds, f"prompt {number} gets {', '.join(sorted(kinds))} in place of a Completion")
        empty = sampler.sample([], 2)
        require(len(empty) == 0, f"{len(empty)} lists for no prompt")

    def test_one_completion_by_default(self) -> None:
        """Without n, each prompt gets one completion."""
        counts = [len(completions) for completions in self.instance().sample(self.prompts())]
        require(counts == [1] * len(self.prompts()), f"without n, the prompts get {counts} completions")

    def test_chat_messages_are_prompts_too(self) -> None:
        """Prompts may be chat messages, as in training."""
        chats = self.chats()
        found = [len(completions) for completions in self.instance().sample(chats, 2)]
        require(found == [2] * len(chats), f"{len(chats)} chats get {found} completions, not 2 each")

    def test_best_first(self) -> None:
        """Scores, where there are any, are finite and fall: the best completion stands first."""
        for number, completions in enumerate(self.instance().sample(self.prompts(), 4)):
            scores = [one.score for one in completions]
            if all(score is None for score in scores):
                continue
            numbers = [score for score in scores if score is not None and is_number(score)]
            require(len(numbers) == len(scores), f"prompt {number}: not all scores are finite floats: {scores}")
            require(numbers == sorted(numbers, reverse=True), f"prompt {number}: the best isn't first: {numbers}")

    def test_completions_tell_how_they_were_drawn(self) -> None:
        """Each token has a log-probability, at most 0, and each completion a reason for its end."""
        for number, completions in enumerate(self.instance().sample(self.prompts(), 2)):
            for one in completions:
                place = f"prompt {number}"
                require(
                    len(one.logprobs) == len(one.ids), f"{place}: {len(one.logprobs)} logprobs for {len(one.ids)} ids"
                )
                raw = len(one.raw_logprobs)
                require(raw in (0, len(one.ids)), f"{place}: {raw} raw_logprobs for {len(one.ids)} ids")
                wrong = [value for value in (*one.logprobs, *one.raw_logprobs) if not _is_logprob(value)]
                require(not wrong, f"{place}: not a log-probability: {wrong[:4]}")
                known = one.stop_reason in STOP_REASONS
                require(known, f"{place}: stop_reason is {one.stop_reason!r}, not one of {', '.join(STOP_REASONS)}")


def _is_logprob(value: float) -> bool:
    # The sum of a softmax may exceed one by rounding.
    return math.isfinite(value) and value <= 1e-5
