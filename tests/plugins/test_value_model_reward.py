"""`value_model`: the contract of rewards, the values of `ValueModel` itself, steps read once, and searches guided by values."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_plugins.rewards.value_model import ValueModelReward
from rlhf_plugins.samplers.mcts import MCTSConfig, MCTSGenerator

from rlhf_core.contracts.reward import Sample
from rlhf_core.data.collate import collate
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.step_trees import SearchStep, StepSearchConfig, StepTrees
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.model_files import reward_at
from rlhf_core.models import ProcessRewardModel, RewardModel, ValueModel
from rlhf_core.rewards import open_rewards
from rlhf_core.testing import RewardContract
from rlhf_core.testing.tiny import save_tiny, tiny_policy, tiny_tokenizer

PROMPT = "17+25=?"


@cache
def value_model() -> ValueModel:
    """A value model whose head isn't 0, as a new one's is."""
    model = ValueModel.adopt(tiny_policy(3), seed=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@cache
def saved() -> str:
    """A folder that lives as long as the tests, with a value model."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-value-")) / "model_value"
    value_model().save_pretrained(folder)
    return str(folder)


class TestValueModelReward(RewardContract):
    method = "value_model"
    options = property(lambda self: {"model": saved()})  # type: ignore[assignment]


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def sample_of(text: str, *, ended: bool = True) -> Sample:
    ids = ids_of(text) + [tiny_tokenizer().eos_token_id] * ended
    return Sample(PROMPT, text, completion_ids=ids, stop_reason="end" if ended else "length")


@torch.no_grad()
def values_of(text: str) -> list[float]:
    """Return the value of the state behind the prompt, and behind each token of a text, by the model's own forward pass."""
    model, ids = value_model(), [*ids_of(text), tiny_tokenizer().eos_token_id]
    batch = collate([EncodedRow(0, tiny_tokenizer()(PROMPT)["input_ids"], [ids], [[True] * len(ids)])])
    return model.token_values(batch)[0].tolist()


def test_scores_are_the_values_of_the_states_behind_steps() -> None:
    text = "17+25=\n42\nso 42"
    reward, values = ValueModelReward.of(value_model()), values_of(text)
    ends = [len(ids_of(part)) for part in ("17+25=\n", "17+25=\n42\n", text)]
    (steps,) = reward.score_steps([sample_of(text)])
    assert steps == pytest.approx([values[end] for end in ends], abs=1e-5)
    assert len(set(steps)) == 3
    assert reward.score([sample_of(text)]) == pytest.approx([values[-1]], abs=1e-5)


def test_the_end_token_adds_nothing_to_what_a_completion_is_worth() -> None:
    """Nothing is chosen behind it, so training gives the state there no value."""
    reward = ValueModelReward.of(value_model())
    ended, cut = reward.score([sample_of("4+2"), sample_of("4+2", ended=False)])
    assert ended == cut == pytest.approx(values_of("4+2")[-1], abs=1e-5)
    batch = collate([EncodedRow(0, tiny_tokenizer()(PROMPT)["input_ids"], [ids_of("4+2")], [[True] * 3])])
    with torch.no_grad():
        assert cut == pytest.approx(float(value_model().end_values(batch)), abs=1e-5)
    assert reward.score([sample_of("")]) == pytest.approx([values_of("")[0]], abs=1e-5)


def test_a_separator_of_ones_own_ends_steps() -> None:
    reward = ValueModelReward.of(value_model(), separator="+")
    (steps,) = reward.score_steps([sample_of("4+2+1")])
    values = values_of("4+2+1")
    assert steps == pytest.approx([values[2], values[4], values[5]], abs=1e-5)
    reader = reward.step_reader(tiny_tokenizer())
    assert reader is not None and reader.separator == "+"


def test_steps_behind_one_beginning_are_read_once_and_as_from_the_beginning() -> None:
    reward = ValueModelReward.of(value_model())
    reader = reward.step_reader(tiny_tokenizer())
    assert reader is not None and reader.separator is None
    kept = reader.begin([Sample(PROMPT, "")])
    prompt, first = reader.forwarded, sample_of("17+25=\n", ended=False)
    ((path, score),) = reader.follow(kept, [first], [len(first.completion_ids)])
    assert score == pytest.approx(values_of("17+25=\n")[-1], abs=1e-5)
    others = [sample_of("17+25=\n42"), sample_of("17+25=\n9\n", ended=False), sample_of("17+25=\n")]
    new = [len(one.completion_ids) - len(first.completion_ids) for one in others]
    found = reader.follow([path] * 3, others, new)
    for sample, (_, value) in zip(others, found, strict=True):
        assert value == pytest.approx(values_of(sample.completion)[-1], abs=1e-5)
    # The end token alone, behind what was read, needs no forward pass; no end token does.
    assert reader.forwarded == prompt + len(first.completion_ids) + 2 + 2
    reader.free([one for one, _ in found])
    ((_, again),) = reader.follow([path], [others[0]], [new[0]])
    assert again == pytest.approx(found[0][1], abs=1e-6)


def grown(trees: StepTrees, depth: int = 3) -> list[SearchStep]:
    heads = trees.roots
    for _ in range(depth):
        heads = trees.grow([head for head in heads if not head.ended for _ in range(2)])
    return [step for steps in trees.steps for step in steps if step.parent is not None]


def test_no_token_of_a_tree_is_read_twice() -> None:
    policy, reward = tiny_policy(), ValueModelReward.of(value_model())
    config = StepSearchConfig(max_new_tokens=12, max_step_tokens=4)
    trees = StepTrees(Engine(policy, seed=5), prompt_batch(policy, [PROMPT, "3*4=?"]), open_rewards(reward), config)
    before, steps = trees.reader.forwarded, grown(trees)
    ended = sum(step.stop_reason != "length" for step in steps)
    assert ended and trees.reader.forwarded - before == sum(trees.tokens) - ended
    whole = [step for step in steps if len(step.step_scores) == len(step.path)]  # no step without a text of its own
    assert len(whole) > len(steps) / 2
    assert [one.score for one in whole] == pytest.approx(
        reward.score([trees.sample_of(one) for one in whole]), abs=1e-5
    )


def test_tree_search_takes_values_in_place_of_a_process_reward() -> None:
    options = MCTSConfig(max_new_tokens=8, max_step_tokens=3, simulations=8, tree="json")
    sampler = MCTSGenerator.load(options, policy=tiny_policy(), process_reward=saved())
    ((found,),) = sampler.sample([PROMPT], seed=2)
    reward = ValueModelReward.of(value_model())
    sample = Sample(PROMPT, found.text, completion_ids=found.ids, stop_reason=found.stop_reason)
    assert [found.score] == pytest.approx(reward.score([sample]), abs=1e-5)
    assert sampler.forwarded["process_reward"] > 0


def test_another_separator_than_that_of_the_values_is_refused() -> None:
    sampler = MCTSGenerator(
        MCTSConfig(separator=";"),
        policy=tiny_policy(),
        process_reward=ValueModelReward.of(value_model(), separator="\n"),
    )
    with pytest.raises(ConfigError, match="another separator"):
        sampler.sample([PROMPT], seed=2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(ValueModel, "value_model"), (ProcessRewardModel, "process_reward"), (RewardModel, "reward_model")],
)
def test_a_directory_stands_for_the_reward_by_its_head(kind: Any, name: str, tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", hidden=32, heads=2, kv_heads=1)
    kind.from_pretrained(tiny, new_head=True).save_pretrained(tmp_path / "model")
    assert reward_at(tmp_path / "model") == name
