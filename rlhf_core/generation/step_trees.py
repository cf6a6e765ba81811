"""Trees of reasoning steps: each node is a step that was drawn behind its parent, and nothing before it is computed again.

Searches over steps (beam search, DVTS, particle filtering, tree search) decide which steps get children; this draws and scores
them. A path's keys and values are forked, in the policy and in a process reward that keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch, on_host
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample, StepReader
from rlhf_core.generation.engine import Engine, SequenceHandle, prompt_keys
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.seeds import completion_seeds, stream_seed
from rlhf_core.rewards import Rewards

LINE_END = "\n"
"""The text that ends a step where neither the options nor the reward name another."""


class StepSearchConfig(SamplingConfig):
    """Options of every search over steps; those of sampling are about whole completions."""

    separator: str | None = Field(
        None,
        min_length=1,
        description="Text that ends a step. Null takes the one that the process reward was trained with, else a line's end; a"
        " rarer one makes longer steps.",
    )
    max_step_tokens: int = Field(
        128,
        ge=1,
        description="Most tokens in a step, which is cut off there; larger allows longer steps, 1 searches over tokens.",
    )
    aggregation: Literal["last", "min", "mean", "product"] = Field(
        "last",
        description="How the scores of a path's steps become the path's: the last one, the worst, their mean or their product.",
    )
    tree: Literal["none", "json", "svg"] = Field(
        "none",
        description="What a prompt's first completion reports of its tree in `details`: nothing, its steps (`tree`), or also a"
        " picture of them (`tree_svg`).",
    )


@dataclass(eq=False)
class SearchStep:
    """A node of a tree: a step, and the path from the prompt to its end."""

    prompt: int
    """Index of its prompt in the batch."""
    number: int
    """Its number in the prompt's tree, in the order in which steps were drawn; 0 is the root, which has no tokens."""
    parent: SearchStep | None
    ids: tuple[int, ...]
    """The tokens of its path, those of the prompt left out."""
    text: str
    """The text of its path."""
    own: Completion
    """Its own tokens alone."""
    ended: bool = False
    """Whether its path is a whole completion."""
    stop_reason: str = "length"
    """Why its path ended, as `Completion.stop_reason`."""
    step_scores: tuple[float, ...] = ()
    """The scores of its path's steps."""
    score: float = 0.0
    """Its path's score."""
    children: list[SearchStep] = field(default_factory=list)
    handle: SequenceHandle | None = None
    kept: Any = None
    """What the rewards keep for its path."""

    @property
    def path(self) -> list[SearchStep]:
        """The steps from the first one to this one; the root isn't one of them."""
        steps: list[SearchStep] = []
        at: SearchStep | None = self
        while at is not None and at.parent is not None:
            steps.append(at)
            at = at.parent
        return steps[::-1]


class StepTrees:
    """One tree of steps for each prompt of a batch.

    A prompt's steps are a function of its seed and of the order in which its own tree grows: not of the other prompts.

    Args:
        engine: draws the steps.
        rewards: score them; None leaves their scores to the search.
        options: how steps are drawn, where they end, and how a path is scored.

    Raises:
        ConfigError: a reward isn't step-wise, or was trained with another separator.
    """

    def __init__(self, engine: Engine, batch: Batch, rewards: Rewards | None, options: StepSearchConfig) -> None:
        self.engine, self.options = engine, options
        self.reader: StepReader = _NoReader() if rewards is None else rewards.step_reader(engine.policy.tokenizer)
        own = self.reader.separator
        if options.separator is not None and own not in (None, options.separator):
            raise ConfigError(
                "the process reward was trained with another separator", place="separator",
                got=f"{options.separator!r} for {own!r}", fix="leave `separator` out",
            )  # fmt: skip
        self.separator = options.separator or own or LINE_END
        self._sampling = SamplingConfig(**{name: getattr(options, name) for name in SamplingConfig.model_fields})
        self._chat = [engine.is_chat(batch, prompt) for prompt in range(batch.num_prompts)]
        lengths = on_host(batch.prompt_lengths).tolist()
        prompts = [ids[:length] for ids, length in zip(on_host(batch.prompt_ids).tolist(), lengths, strict=True)]
        seeds = completion_seeds(engine.seed, "search", rows=prompt_keys(batch), places=batch.places, n=1)
        self._seeds = [own for (own,) in seeds]
        self._drawn = [0] * len(prompts)
        self._samples = [
            Sample(batch.prompts[at], "", ids, columns=batch.records[at] if batch.records else {}, group=at)
            for at, ids in enumerate(prompts)
        ]
        handles = engine.prefill(prompts) if prompts else []
        nothing = Completion("", (), (), "length")
        self.roots = [
            SearchStep(at, 0, None, (), "", nothing, handle=handle, kept=kept)
            for at, (handle, kept) in enumerate(zip(handles, self.reader.begin(self._samples), strict=True))
        ]
        """One step without tokens for each prompt, from which its tree grows."""
        self.steps = [[root] for root in self.roots]
        """For each prompt all steps of its tree, by number."""
        self.tokens = [0] * len(prompts)
        """For each prompt, the tokens of all steps of its tree."""
        self.facts: dict[SearchStep, Mapping[str, Any]] = {}
        """What a search knows of steps besides their scores, as JSON values, which is reported with the tree."""

    def grow(self, parents: Sequence[SearchStep]) -> list[SearchStep]:
        """Draw and score one more child for each of some steps, all at once; a step may be named several times.

        Raises:
            ValueError: a step has ended, or was released.
        """
        return self._grow(parents, whole=False)

    def _grow(self, parents: Sequence[SearchStep], *, whole: bool) -> list[SearchStep]:
        """Draw and score children; where `whole`, each is all the rest of its completion."""
        if any(one.ended or one.handle is None for one in parents):
            raise ValueError("a step that has ended, or was released, can't get a child")
        found: list[SearchStep | None] = [None] * len(parents)
        groups: dict[tuple[bool, bool], list[int]] = {}
        seeds = [self._next_seed(one.prompt) for one in parents]
        for at, one in enumerate(parents):
            groups.setdefault((self._chat[one.prompt], one.parent is None), []).append(at)
        for (chat, first), numbers in groups.items():
            extended = self.engine.extend(
                [_handle(parents[at]) for at in numbers],
                # The first step has the least number of tokens of the completion, so later ones need none.
                self._sampling if first else self._sampling.updated(min_new_tokens=0),
                seeds=[seeds[at] for at in numbers],
                stop=self._sampling.stop if whole else [self.separator, *self._sampling.stop],
                limits=[self._room(parents[at], whole=whole) for at in numbers],
                chat=chat,
            )
            for at, extension in zip(numbers, extended, strict=True):
                found[at] = self._child(parents[at], extension.completion, extension.handle)
        grown = [one for one in found if one is not None]
        self._score(grown)
        for child in grown:
            child.number = len(self.steps[child.prompt])
            self.steps[child.prompt].append(child)
            self.tokens[child.prompt] += len(child.own.ids)
            if child.parent is not None:
                child.parent.children.append(child)
        return grown

    def release(self, steps: Sequence[SearchStep]) -> None:
        """Give up the keys and values that some steps hold; they get no more children."""
        held = [one for one in steps if one.handle is not None]
        self.engine.free([_handle(one) for one in held])
        self.reader.free([one.kept for one in held])
        for one in held:
            one.handle = one.kept = None

    def close(self) -> None:
        """Give up all keys and values; the trees stay."""
        for steps in self.steps:
            self.release(steps)

    def completion(self, step: SearchStep) -> Completion:
        """Return the path to a step as one completion, with its score."""
        path = [one.own for one in step.path]
        return Completion(
            text=step.text,
            ids=step.ids,
            logprobs=[value for one in path for value in one.logprobs],
            raw_logprobs=[value for one in path for value in one.raw_logprobs],
            kept_mass=[value for one in path for value in one.kept_mass],
            confidence=[value for one in path for value in one.confidence],
            stop_reason=step.stop_reason,
            score=step.score,
            policy_version=self.engine.policy_version,
        )

    def forwarded(self, prompt: int) -> int:
        """Return how many tokens the policy was run on for a prompt: each token of its tree once.

        The last token of a path is forwarded as a child's first token is drawn, by each child; so are the prompt's others once.
        """
        return len(self._samples[prompt].prompt_ids) - 1 + self.tokens[prompt]

    def seed_of(self, prompt: int) -> int:
        """Return the seed of a prompt's tree, for random choices of a search."""
        return self._seeds[prompt]

    def sample_of(self, step: SearchStep) -> Sample:
        """Return the path to a step as a reward takes it."""
        sample = self._samples[step.prompt]
        return replace(sample, completion=step.text, completion_ids=step.ids, stop_reason=step.stop_reason)

    def value_by_rollouts(self, steps: Sequence[SearchStep], rewards: Rewards, count: int) -> None:
        """Score steps by the mean reward of completions drawn from them; one that has ended by its own reward.

        Each rollout is an ended step of the tree itself, a child of the step that it begins at.

        Args:
            count: completions per step.
        """
        ends: list[tuple[SearchStep, SearchStep]] = [(one, one) for one in steps if one.ended]
        from_here = [one for one in steps if not one.ended for _ in range(count)]
        ends += zip(from_here, self._grow(from_here, whole=True), strict=True)
        if not ends:
            return
        totals = rewards.score([self.sample_of(end) for _, end in ends]).total.tolist()
        found: dict[SearchStep, list[float]] = {}
        for (step, end), score in zip(ends, totals, strict=True):
            found.setdefault(step, []).append(score)
            end.score, end.step_scores = score, (score,)
        for step, scores in found.items():
            step.score = sum(scores) / len(scores)
            step.step_scores = (step.score,)

    # One step

    def _next_seed(self, prompt: int) -> int:
        self._drawn[prompt] += 1
        return stream_seed(self._seeds[prompt], "step", self._drawn[prompt])

    def _room(self, parent: SearchStep, *, whole: bool) -> int:
        """Return how many tokens a child may have, one that is all the rest where `whole`."""
        left = self._left(parent.prompt, len(parent.ids))
        return left if whole else min(self.options.max_step_tokens, left)

    def _left(self, prompt: int, length: int) -> int:
        """Return how many tokens a path of a length may still get."""
        positions = self.engine.policy.max_positions
        left = self.options.max_new_tokens - length
        return left if positions is None else min(left, positions - len(self._samples[prompt].prompt_ids) - length)

    def _child(self, parent: SearchStep, own: Completion, handle: SequenceHandle) -> SearchStep:
        """Return a step that was drawn, without its score."""
        ids = (*parent.ids, *own.ids)
        decode = self.engine.text_of(self._chat[parent.prompt])
        by_id = own.stop_reason == "stop" and ids[-1] in self._sampling.stop_ids
        text = decode(ids[:-1] if own.stop_reason == "end" or by_id else ids)
        stops = [at for stop in self._sampling.stop if (at := text.find(stop)) >= 0]
        reason, ended = own.stop_reason, True
        if own.stop_reason == "end":
            pass
        elif by_id or stops:
            reason, text = "stop", text[: min(stops, default=len(text))]
        elif own.stop_reason == "confidence":
            pass
        elif self._left(parent.prompt, len(ids)) < 1:
            reason = "length"
        else:
            reason, ended = "length", False
        return SearchStep(
            parent.prompt, 0, parent, ids, text, own, ended, reason, parent.step_scores, parent.score, handle=handle
        )

    def _score(self, steps: Sequence[SearchStep]) -> None:
        """Score the last step of each path."""
        samples = [
            replace(self._samples[one.prompt], completion=one.text, completion_ids=one.ids, stop_reason=one.stop_reason)
            for one in steps
        ]
        kept = [None if one.parent is None else one.parent.kept for one in steps]
        found = self.reader.follow(kept, samples, [len(one.own.ids) for one in steps])
        for one, (state, score) in zip(steps, found, strict=True):
            before = () if one.parent is None else one.parent.step_scores
            one.kept = state
            blank = bool(before) and one.parent is not None and self._is_blank(one.parent.text, one.text)
            # As in training, what holds no text, such as an end token behind a separator, is no step.
            one.step_scores = before if blank else (*before, score)
            one.score = AGGREGATED[self.options.aggregation](one.step_scores)

    def _is_blank(self, before: str, text: str) -> bool:
        """Tell whether a step begins behind a separator and has no text of its own."""
        _, separator, begun = before.rpartition(self.separator)
        return bool(separator) and not (begun + text[len(before) :]).strip()


class _NoReader(StepReader):
    """Stands in where a search scores its steps itself."""

    def begin(self, samples: Sequence[Sample]) -> list[Any]:
        return [None] * len(samples)

    def follow(self, kept: Sequence[Any], samples: Sequence[Sample], new: Sequence[int]) -> list[tuple[Any, float]]:
        return [(None, 0.0)] * len(samples)


def distinct_first(steps: Sequence[SearchStep], n: int) -> list[SearchStep]:
    """Return n of at least n steps, the highest scores first; of paths with the same tokens one, unless others lack."""
    chosen: list[SearchStep] = []
    repeated: list[SearchStep] = []
    met: set[tuple[int, ...]] = set()
    for one in sorted(steps, key=lambda one: (-one.score, one.number)):
        (repeated if one.ids in met else chosen).append(one)
        met.add(one.ids)
    return sorted([*chosen, *repeated][:n], key=lambda one: (-one.score, one.number))


def _product(scores: Sequence[float]) -> float:
    total = 1.0
    for score in scores:
        total *= score
    return total


AGGREGATED: Mapping[str, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "mean": lambda scores: sum(scores) / len(scores),
    "product": _product,
}
"""How the scores of a path's steps become the path's, by name."""


def _handle(step: SearchStep) -> SequenceHandle:
    if step.handle is None:
        raise ValueError("the step was released")
    return step.handle
