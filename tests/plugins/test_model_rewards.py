"""Rewards by models: the contract, the same scores as in training, doubt, texts that come again, and ids that were drawn."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_plugins.rewards.process_reward import ProcessRewardReward, ProcessRewardRewardConfig
from rlhf_plugins.rewards.reward_model import RewardModelReward, RewardModelRewardConfig
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rlhf_core import registry
from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.reward import Sample
from rlhf_core.data import GRPODataset, SFTDataset
from rlhf_core.data.collate import collate
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import ConfigError, DataError, ModelError
from rlhf_core.models import PolicyModel, ProcessRewardModel, RewardModel
from rlhf_core.models.model_reward import SampleScores, ScoringConfig
from rlhf_core.rewards import open_rewards, rewards_changed, samples_of
from rlhf_core.testing import RewardContract
from rlhf_core.testing.arithmetic_task import ArithmeticTask, split_steps
from rlhf_core.testing.tiny import VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer


@functools.cache
def saved(kind: str) -> str:
    """A folder that lives as long as the tests, with a model of that kind."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-rewards-"))
    tiny = save_tiny(folder / "tiny", hidden=32, heads=2, kv_heads=1)
    if kind == "process":
        ProcessRewardModel.from_pretrained(tiny, new_head=True, seed=1).save_pretrained(folder / "model")
    else:
        model = RewardModel.from_pretrained(tiny, new_head=True, members=1 if kind == "single" else 3, seed=1)
        model.centred = kind != "loose"
        model.save_pretrained(folder / "model")
    return str(folder / "model")


class TestRewardModelReward(RewardContract):
    method = "reward_model"

    def config(self) -> Any:
        return RewardModelRewardConfig(model=saved("ensemble"), doubt_weight=0.5)

    options = property(lambda self: {"model": saved("ensemble")})  # type: ignore[assignment]


class TestProcessRewardReward(RewardContract):
    method = "process_reward"

    def config(self) -> Any:
        return ProcessRewardRewardConfig(model=saved("process"), aggregation="product")

    options = property(lambda self: {"model": saved("process")})  # type: ignore[assignment]


def samples(count: int = 5) -> list[Sample]:
    return [Sample(row["prompt"], row["response"]) for row in ArithmeticTask().rows("sft", count)]


def test_scores_are_those_of_training() -> None:
    given = samples()
    model = RewardModel.from_pretrained(saved("ensemble")).eval()
    data = SFTDataset([{"prompt": s.prompt, "response": s.completion} for s in given], model.tokenizer)
    with torch.no_grad():
        scores = model.scores(collate([data[i] for i in range(len(given))]))
    plain, careful = (
        RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), doubt_weight=weight)).score(given)
        for weight in (0.0, 2.0)
    )
    assert plain == pytest.approx(scores.mean(dim=1).tolist(), rel=1e-5, abs=1e-6)
    assert careful == pytest.approx((scores.mean(dim=1) - 2 * scores.std(dim=1)).tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "loose",
            r"doubt_weight: the ensemble was trained without `centre_weight`.*got 0.5 for .*fix: train .* `centre_weight`",
        ),
        (
            "single",
            r"doubt_weight: `doubt_weight` needs an ensemble; this reward model has one member; got 0.5 for .*ensemble.size",
        ),
    ],
)
def test_a_doubt_weight_that_means_nothing_is_refused(kind: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardModelReward(RewardModelRewardConfig(model=saved(kind), doubt_weight=0.5)).score(samples(1))
    assert len(RewardModelReward(RewardModelRewardConfig(model=saved(kind))).score(samples(1))) == 1


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches of which a reward model computes scores."""
    seen: list[Any] = []
    scores = RewardModel.scores

    def noted(self: RewardModel, batch: Any) -> torch.Tensor:
        seen.append(batch)
        return scores(self, batch)

    monkeypatch.setattr(RewardModel, "scores", noted)
    return seen


def test_a_sample_that_occurs_again_is_not_computed_again(forwarded: list[Any]) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), cache_size=6))

    def computed() -> int:
        count = sum(batch.num_responses for batch in forwarded)
        forwarded.clear()
        return count

    given = samples(4)
    first = reward.score([*given, given[0]])
    assert computed() == 4 and first[0] == first[4]
    assert reward.score(given[::-1]) == first[3::-1] and computed() == 0
    reward.score(samples(9)[4:])  # nine samples with room for six: the three that were used longest ago are forgotten
    assert computed() == 5
    reward.score([*samples(9)[4:], given[0]])
    assert computed() == 0
    reward.score(given)
    assert computed() == 3


def test_samples_of_one_prompt_share_it_and_passes_are_bounded(forwarded: list[Any]) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), batch_tokens=60))
    reward.score([Sample("2+2=", str(number)) for number in range(8)])
    assert [(batch.num_prompts, batch.num_tokens) for batch in forwarded] == [(1, 1 + 4 + 8 * 2)]
    forwarded.clear()
    reward.score(samples(6))
    assert len(forwarded) > 1 and all(batch.num_prompts == 1 or batch.num_tokens <= 60 for batch in forwarded)


def test_an_empty_completion_has_a_score() -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble")))
    assert len(set(reward.score([Sample("2+2=", ""), Sample("2+2=", "4")]))) == 2


def test_a_prompt_without_room_is_refused() -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), max_length=8))
    with pytest.raises(DataError, match=r"sample 0: the sample can't be scored.*raise `max_length`"):
        reward.score([Sample("a long prompt", "4")])


def test_truncated_completions_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), max_length=16))
    given = [Sample("1+1=", text) for text in ("2", "9" * 20, "3" * 30, "3" * 8)]
    reward.score(given[::3])
    assert not _ours(caplog)
    reward.score(given)
    reward.score([Sample("1+2=", "9" * 20)])
    # Of the four, two had a score already.
    said = (
        "2 of 2 samples are longer than 16 tokens and are scored without their ends (reported once): raise `max_length`"
    )
    assert _ours(caplog) == [said]


def _ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the core warned of: it says other things, too, and so do the libraries below."""
    ours = (one for one in caplog.records if one.name.startswith("rlhf_core") and one.levelno >= logging.WARNING)
    return [record.getMessage() for record in ours]


def test_a_completion_beyond_the_models_positions_is_told(caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), max_length=100_000))
    positions = reward.model.max_positions
    assert positions is not None
    reward.score([Sample("1+1=", "9" * positions), Sample("1+1=", "2")])
    assert f"1 of 2 samples are longer than {positions} tokens" in caplog.text
    assert f"use shorter prompts or completions: the model has {positions} positions" in caplog.text


def test_steps_have_probabilities() -> None:
    given = samples()
    steps = ProcessRewardReward(ProcessRewardRewardConfig(model=saved("process"))).score_steps(given)
    assert [len(of_sample) for of_sample in steps] == [len(split_steps(s.completion)) for s in given]
    assert all(0 < value < 1 for of_sample in steps for value in of_sample)


@pytest.mark.parametrize("name", ["reward_model", "process_reward"])
def test_a_model_without_a_head_is_refused(name: str, tmp_path: Path) -> None:
    cls: Any = registry.get("reward", name)
    with pytest.raises(ModelError, match="its scores would be random"):
        cls(cls.Config(model=str(save_tiny(tmp_path / "tiny", hidden=32)))).score(samples(1))
    with pytest.raises(ConfigError, match="`model` is missing"):
        cls.Config.parse({})


# Scores of the ids that were drawn


@functools.cache
def merging() -> Any:
    """A tokenizer that writes `42` as one token, though a policy may draw `4` and `2`."""
    plain = tiny_tokenizer()
    about = json.loads(plain.backend_tokenizer.to_str())
    about["model"]["vocab"]["42"] = VOCAB_SIZE
    about["model"]["merges"] = [["4", "2"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(about)),
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = plain.chat_template
    return tokenizer


@functools.cache
def merged(cls: Any) -> Any:
    """A model with that tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-rewards-"))
    save_tiny(folder, hidden=32, heads=2, kv_heads=1, vocab_size=VOCAB_SIZE + 1, tokenizer=merging())
    return cls.from_pretrained(folder, new_head=True, seed=1).eval()


def drawn(text: str, ids: Sequence[int], prompt: Any = "6*7=", stop_reason: str = "end") -> Sample:
    return Sample(prompt, text, completion_ids=tuple(ids), stop_reason=stop_reason)


def of_ids(model: RewardModel, prompt: str, ids: list[int]) -> float:
    """The score of a prompt's text with the response of these ids."""
    row = EncodedRow(0, merging()(prompt, add_special_tokens=False)["input_ids"], [ids], [[True] * len(ids)])
    with torch.no_grad():
        return float(model.score(collate([row])))


def test_ids_that_were_drawn_are_scored_as_they_are() -> None:
    tokenizer, model = merging(), merged(RewardModel)
    four, two, both, end = (tokenizer.convert_tokens_to_ids(token) for token in ("4", "2", "42", "<|end|>"))
    assert tokenizer("42", add_special_tokens=False)["input_ids"] == [both]
    reward = RewardModelReward.of(model)
    apart, joined, text = reward.score([drawn("42", [four, two, end]), drawn("42", [both, end]), Sample("6*7=", "42")])
    assert apart == pytest.approx(of_ids(model, "<|bos|>6*7=", [four, two, end]), rel=1e-5, abs=1e-6)
    assert text == pytest.approx(joined, rel=1e-5, abs=1e-6)
    assert joined == pytest.approx(of_ids(model, "<|bos|>6*7=", [both, end]), rel=1e-5, abs=1e-6)
    assert abs(apart - joined) > 1e-4
    chat = [{"role": "user", "content": "6*7="}]
    wanted = of_ids(model, "<|bos|><|user|>6*7=<|end|><|assistant|>", [four, two, end])
    assert reward.score([drawn("42", [four, two, end], chat)]) == [pytest.approx(wanted, rel=1e-5, abs=1e-6)]


def test_a_completion_that_was_cut_off_is_scored_as_if_it_ended_there() -> None:
    four, two, end = (merging().convert_tokens_to_ids(token) for token in ("4", "2", "<|end|>"))
    reward = RewardModelReward.of(merged(RewardModel))
    ended, cut = reward.score([drawn("42", [four, two, end]), drawn("42", [four, two], stop_reason="length")])
    assert ended == cut
    short = RewardModelReward.of(merged(RewardModel), max_length=7)  # room for two tokens behind the prompt's five
    wanted = of_ids(merged(RewardModel), "<|bos|>6*7=", [four, two])
    assert short.score([drawn("42", [four, two, end])]) == [pytest.approx(wanted, rel=1e-5, abs=1e-6)]
    with pytest.raises(DataError, match="sample 0: the sample can't be scored: the prompt leaves no response token"):
        RewardModelReward.of(merged(RewardModel), max_length=5).score([drawn("42", [four, two, end])])


@pytest.mark.parametrize("prompt", ["6*7=", [{"role": "user", "content": "6*7="}]], ids=["text", "chat"])
def test_what_a_policy_with_the_same_tokenizer_draws_is_scored_by_its_ids(prompt: Any) -> None:
    policy = PolicyModel(tiny_model(vocab_size=VOCAB_SIZE + 1, hidden=32, heads=2, kv_heads=1), merging())
    batch = collate([GRPODataset([{"prompt": prompt}], merging())[0]])
    drawn_here = Engine(policy).generate(batch, 32, SamplingConfig(max_new_tokens=6))
    given = samples_of(batch, drawn_here)
    scorer = SampleScores(lambda batch: [0.0] * batch.num_responses, merged(RewardModel), ScoringConfig())
    ended = [sample.stop_reason == "end" for sample in given]
    wanted = [list(s.completion_ids)[: -1 if end else None] for s, end in zip(given, ended, strict=True)]
    assert [scorer.own_ids(sample) for sample in given] == wanted
    again = [merging()(sample.completion, add_special_tokens=False)["input_ids"] for sample in given]
    assert sum(one != ids for one, ids in zip(again, wanted, strict=True)) > 8  # bytes that are no text


@pytest.mark.parametrize("ids", [(9, 9, 2), (VOCAB_SIZE + 7, 2), (-1, 2), (2,), ()])
def test_ids_of_another_tokenizer_are_not_taken_for_its_own(ids: tuple[int, ...]) -> None:
    reward = RewardModelReward.of(merged(RewardModel))
    assert reward.score([drawn("42", ids)]) == reward.score([Sample("6*7=", "42")])


def test_another_tokenizer_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not where ids are merely followed by a stop string, a special token, or nothing."""
    four, two, end = (merging().convert_tokens_to_ids(token) for token in ("4", "2", "<|end|>"))
    reward = RewardModelReward.of(merged(RewardModel))
    reward.score(
        [drawn("4", [four, two], stop_reason="stop"), drawn("4", [end, four, two]), drawn("", [end]), drawn("4", ())]
    )
    assert not _ours(caplog)
    for ids in ((two, end), (9, 9, end)):
        reward.score([drawn("42", ids)])
    (said,) = _ours(caplog)
    assert said.endswith("has another tokenizer than the policy: it scores completions by their text (reported once)")


def test_a_byte_that_is_no_text_is_scored_by_its_id() -> None:
    byte, end = merging().convert_tokens_to_ids("Ã"), merging().eos_token_id
    text = merging().decode([byte])
    assert text == "\ufffd"
    (found,) = RewardModelReward.of(merged(RewardModel)).score([drawn(text, [byte, end])])
    assert found == pytest.approx(of_ids(merged(RewardModel), "<|bos|>6*7=", [byte, end]), rel=1e-5, abs=1e-6)


def test_steps_are_those_of_the_ids() -> None:
    ids = merging()("4\n", add_special_tokens=False)["input_ids"] + [merging().convert_tokens_to_ids(t) for t in "42"]
    reward = ProcessRewardReward.of(merged(ProcessRewardModel))
    apart, joined = reward.score_steps([drawn("4\n42", [*ids, 2]), Sample("6*7=", "4\n42")])
    assert len(apart) == len(joined) == 2 and apart[0] == pytest.approx(joined[0], rel=1e-5)
    assert abs(apart[1] - joined[1]) > 1e-5


# A model in memory


def test_a_model_in_memory_is_used_as_it_is() -> None:
    path = saved("ensemble")
    model = RewardModel.from_pretrained(path)
    model.train()
    reward = RewardModelReward.of(model, doubt_weight=0.5)
    by_path = RewardModelReward(RewardModelRewardConfig(model=path, doubt_weight=0.5))
    assert reward.model is model and model.training
    assert reward.score(samples()) == pytest.approx(by_path.score(samples()), rel=1e-6)
    assert reward.describe() == by_path.describe() and reward.describe()["files"].keys() >= {"reward_head.safetensors"}
    assert open_rewards([reward]).score(samples()).total.shape == (5,)
    with pytest.raises(ModelError, match="can't be used as a RewardModel; got ProcessRewardModel"):
        RewardModelReward.of(ProcessRewardModel.from_pretrained(saved("process")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the ensemble was trained without `centre_weight`"):
        RewardModelReward.of(RewardModel.from_pretrained(saved("loose")), doubt_weight=1.0)


def test_a_models_options_stand_with_its_path() -> None:
    reward = RewardModelReward(RewardModelRewardConfig.parse({"model": {"path": saved("single"), "precision": "bf16"}}))
    assert reward.model.precision is torch.bfloat16
    exact = RewardModelReward(RewardModelRewardConfig(model=saved("single"))).score(samples())
    found = reward.score(samples())
    assert found != exact and found == pytest.approx(exact, rel=0.1, abs=0.1)
    again = RewardModelReward.of(reward.model)
    assert again.config.model == reward.config.model and again.score(samples()) == found


def test_another_model_is_noticed(tmp_path: Path) -> None:
    for seed in (1, 2):
        model = RewardModel.from_pretrained(save_tiny(tmp_path / "tiny", hidden=32), new_head=True, seed=seed)
        model.save_pretrained(tmp_path / f"model-{seed}")
    before = open_rewards([{"name": "reward_model", "options": {"model": str(tmp_path / "model-1")}}]).describe()
    shutil.rmtree(tmp_path / "model-1")
    (tmp_path / "model-2").rename(tmp_path / "model-1")
    now = open_rewards([{"name": "reward_model", "options": {"model": str(tmp_path / "model-1")}}]).describe()
    assert rewards_changed(before, now) == ["`reward_model`: the file reward_head.safetensors changed"]


def test_a_path_without_a_model_keeps_its_kind_of_error(tmp_path: Path) -> None:
    rewards = open_rewards([{"name": "reward_model", "options": {"model": str(tmp_path / "none")}}])
    with pytest.raises(ModelError, match=r"reward `reward_model`, .*no such model directory"):
        rewards.score(samples())
