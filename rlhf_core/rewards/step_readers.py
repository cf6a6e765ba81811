"""Score the steps of growing completions with the rewards of a run: by what keeps earlier steps, or by whole completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.contracts.reward import Sample, StepReader
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.rewards.score_checks import checked_numbers, checked_steps
from rlhf_core.rewards.session import WeightedReward

if TYPE_CHECKING:
    from rlhf_core.rewards.scoring import Rewards


class WeightedStepReader(StepReader):
    """Scores a step by the weighted sum of the scores that all rewards of a run give to it.

    Args:
        rewards: whose time limits and checks hold.
        entries: the rewards of `rewards`.
        tokenizer: that of the policy.

    Raises:
        ConfigError: a reward isn't step-wise, or two of them end steps by different texts.
    """

    def __init__(self, rewards: Rewards, entries: Sequence[WeightedReward], tokenizer: Any) -> None:
        require_steps(rewards, place="rewards")
        self._rewards, self._entries = rewards, entries
        self._readers = [entry.reward.step_reader(tokenizer) for entry in entries]
        separators = {one.separator for one in self._readers if one is not None and one.separator is not None}
        if len(separators) > 1:
            got = " and ".join(sorted(map(repr, separators)))
            raise ConfigError("two step-wise rewards end steps by different texts", place="rewards", got=got)
        self.separator = next(iter(separators), None)

    @property
    def forwarded(self) -> int:  # type: ignore[override]
        """Tokens that the rewards' models were run on, as far as they count them."""
        return sum(one.forwarded for one in self._readers if one is not None)

    def begin(self, samples: Sequence[Sample]) -> list[Any]:
        kept = [[None] * len(samples) if one is None else one.begin(samples) for one in self._readers]
        return list(zip(*kept, strict=True))

    def follow(self, kept: Sequence[Any], samples: Sequence[Sample], new: Sequence[int]) -> list[tuple[Any, float]]:
        if not samples:
            return []
        columns: list[list[Any]] = []
        totals = [0.0] * len(samples)
        with self._rewards.scoring() as session:
            for number, entry in enumerate(self._entries):
                found = session.in_main(
                    entry, samples, None, self._check(number, [one[number] for one in kept], new), "scoring steps"
                )
                columns.append([state for state, _ in found])
                totals = [total + entry.weight * score for total, (_, score) in zip(totals, found, strict=True)]
        return list(zip(zip(*columns, strict=True), totals, strict=True))

    def _check(self, number: int, kept: Sequence[Any], new: Sequence[int]) -> Any:
        """Return a function that scores the last step of each sample by one reward, as `ScoringSession.in_main` calls it."""
        reader = self._readers[number]

        def last_steps(reward: Any, samples: Sequence[Sample], *, rows: Any, name: str) -> list[tuple[Any, float]]:
            if reader is not None:
                found = reader.follow(kept, samples, new)
                scores = checked_numbers([score for _, score in found], len(samples), name)
                return [(state, score) for (state, _), score in zip(found, scores, strict=True)]
            steps = checked_steps(reward, samples, rows=rows, name=name)
            if steps is None:
                raise _not_step_wise((name,), f"reward `{name}`")
            if empty := [at for at, scores in enumerate(steps) if not scores]:
                place = f"reward `{name}`, sample {empty[0]}"
                raise PluginError(
                    "a completion has no step score", place=place, fix="return at least one per completion"
                )
            return [(None, scores[-1]) for scores in steps]

        return last_steps

    def free(self, kept: Sequence[Any]) -> None:
        for number, reader in enumerate(self._readers):
            if reader is not None:
                reader.free([one[number] for one in kept])


def require_steps(rewards: Rewards, *, place: str) -> None:
    """Raise `ConfigError` where one of some rewards gives no scores to steps.

    Args:
        place: for the message: `BeamSampler(process_reward=…)`.
    """
    if rewards.without_steps:
        raise _not_step_wise(rewards.without_steps, place)


def _not_step_wise(names: Sequence[str], place: str) -> ConfigError:
    return ConfigError(
        "a search over steps needs a reward that scores steps", place=place,
        got=", ".join(f"`{name}`, which scores whole completions" for name in names),
        fix="give it a process reward (`rlhf train process_reward` trains one) or a reward with `score_steps`",
    )  # fmt: skip
