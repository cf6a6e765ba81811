"""Steps scored as completions grow: the scores of whole completions, each token read once, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from rlhf_plugins.rewards.process_reward import ProcessRewardReward

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.models import ProcessRewardModel
from rlhf_core.rewards import open_rewards
from rlhf_core.testing.tiny import tiny_policy, tiny_tokenizer

STEPS = ["17+25=\n", "42\n", "so 42"]


def process_reward() -> ProcessRewardReward:
    return ProcessRewardReward.of(ProcessRewardModel.adopt(tiny_policy(3), seed=1))


def growing() -> list[Sample]:
    """Return a completion after each of its steps; the last one has ended."""
    tokenizer, ids, text, found = tiny_tokenizer(), list[int](), "", []
    for number, step in enumerate(STEPS):
        ids, text = [*ids, *tokenizer(step, add_special_tokens=False)["input_ids"]], text + step
        last = number == len(STEPS) - 1
        own = [*ids, tokenizer.eos_token_id] if last else ids
        found.append(Sample("17+25=?", text, completion_ids=own, stop_reason="end" if last else "length"))
    return found


class Lines(RewardFn):
    """Scores each line by its number of digits."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [0.0] * len(samples)

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]]:
        return [[float(sum(map(str.isdigit, line))) for line in one.completion.splitlines()] for one in samples]


def test_a_process_rewards_step_scores_are_those_of_the_whole_completion_and_no_token_is_read_twice() -> None:
    reward, samples = process_reward(), growing()
    (wanted,) = reward.score_steps(samples[-1:])
    reader = reward.step_reader(tiny_policy().tokenizer)
    assert reader is not None
    assert reader.separator == "\n"
    (kept,) = reader.begin([Sample("17+25=?", "")])
    prompt, before, found = reader.forwarded, 0, []
    for sample in samples:
        new = len(sample.completion_ids) - before
        before += new
        ((kept, score),) = reader.follow([kept], [sample], [new])
        found.append(score)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert reader.forwarded == prompt + len(samples[-1].completion_ids)


def test_steps_that_follow_one_beginning_do_not_change_it() -> None:
    reward, samples = process_reward(), growing()
    reader = reward.step_reader(tiny_policy().tokenizer)
    assert reader is not None
    kept = reader.begin([Sample("17+25=?", "")])
    size = len(samples[0].completion_ids)
    tokenizer = tiny_tokenizer()
    other = Sample("17+25=?", "9\n", completion_ids=tokenizer("9\n", add_special_tokens=False)["input_ids"])
    together = reader.follow(kept * 2, [samples[0], other], [size, len(other.completion_ids)])
    (again,) = reader.follow(kept, [samples[0]], [size])
    assert together[0][1] == pytest.approx(again[1], abs=1e-6)
    assert together[0][1] != together[1][1]


def test_weighted_rewards_add_up_with_and_without_a_reader() -> None:
    own, samples = process_reward(), growing()
    rewards = open_rewards([own, Lines()])
    reader = rewards.step_reader(tiny_policy().tokenizer)
    kept = reader.begin([Sample("17+25=?", "")])
    ((_, score),) = reader.follow(kept, samples[:1], [len(samples[0].completion_ids)])
    assert score == pytest.approx(own.score_steps(samples[:1])[0][0] + 4, abs=1e-6)


def test_a_reward_without_step_scores_is_refused() -> None:
    def plain(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(
        ConfigError, match="needs a reward that scores steps; got `plain`, which scores whole completions"
    ):
        open_rewards(plain).step_reader(tiny_policy().tokenizer)


def test_a_step_score_that_is_no_number_names_the_reward() -> None:
    class Broken(Lines):
        def score_steps(self, samples: Sequence[Sample]) -> list[list[float]]:
            return [[float("nan")] for _ in samples]

    reader = open_rewards(Broken()).step_reader(tiny_policy().tokenizer)
    with pytest.raises(PluginError, match="finite number"):
        reader.follow(reader.begin([Sample("1", "")]), growing()[:1], [1])
