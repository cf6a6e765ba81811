"""`ensemble`: the contract of samplers, its models by role, and its vote against one written out on the same candidates."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rlhf_plugins.samplers.best_of_n import BestOfNConfig, BestOfNSampler
from rlhf_plugins.samplers.ensemble import EnsemblePolicy, EnsemblePolicyConfig
from rlhf_plugins.samplers.generate import GenerateConfig, GenerateSampler
from torch import Tensor

from rlhf_core.cli import main
from rlhf_core.config.training import ModelConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.sampler_models import policies_of
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.rewards.answer_votes import answer_key
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_policy, tiny_tokenizer

SHORT: dict[str, Any] = {"max_new_tokens": 8}
PROMPTS = ["1+1=?", "2+2=?", "17+25=?", "9-3=?"]


def logps_of(policy: PolicyModel, batch: Batch) -> Tensor:
    """Return (R, T, V) what one model gives to the tokens of a batch."""
    states = policy.hidden_states(batch, drop_last=True)
    return states.to_tokens(policy.logits(states.predicting()).log_softmax(dim=-1))


class _Ensemble(SamplerContract):
    """The contract, with what the models come to computed by itself."""

    method = "ensemble"

    def token_logits(self, sampler: Sampler, batch: Batch, completions: Sequence[Completion]) -> Tensor:
        assert isinstance(sampler.config, EnsemblePolicyConfig)
        each = torch.stack([logps_of(policy, batch) for policy in policies_of(sampler).values()])  # (M, R, T, V)
        if sampler.config.combine == "vote":
            return torch.stack([each[one.details["member"], row] for row, one in enumerate(completions)])
        weights = torch.tensor(sampler.config.weights or [1.0] * len(each))
        shares = (weights / weights.sum())[:, None, None, None]
        return (shares * each).sum(0) if sampler.config.combine == "logits" else (shares * each.exp()).sum(0).log()


@pytest.mark.slow
class TestLogits(_Ensemble):
    options: ClassVar = {**SHORT, "weights": [3, 2, 1]}
    no_effect = ("candidates",)  # of a vote


@pytest.mark.slow
class TestProbabilities(_Ensemble):
    options: ClassVar = {**SHORT, "combine": "probabilities"}
    no_effect = ("candidates", "weights")  # one weight for each of three models


@pytest.mark.slow
class TestVote(_Ensemble):
    options: ClassVar = {**SHORT, "combine": "vote", "weights": [1, 2, 3]}


def ids_of(found: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[list(one.ids) for one in group] for group in found]


def ensemble(members: Sequence[PolicyModel], **options: Any) -> EnsemblePolicy:
    return EnsemblePolicy(EnsemblePolicyConfig(**{**SHORT, **options}), policy=tiny_policy(), members=members)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_one_model_alone_is_what_generate_draws(combine: str) -> None:
    wanted = GenerateSampler(GenerateConfig(**SHORT), policy=tiny_policy()).sample(PROMPTS, 3, seed=1)
    alone = ensemble([tiny_policy(1)], combine=combine, weights=[1, 0])
    alike = ensemble([tiny_policy(), tiny_policy()], combine=combine)
    for sampler in (alone, alike):
        found = sampler.sample(PROMPTS, 3, seed=1)
        assert ids_of(found) == ids_of(wanted) and all(one.score is None for group in found for one in group)
        for group, others in zip(found, wanted, strict=True):
            for one, other in zip(group, others, strict=True):
                assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-5)
    prompts = int(prompt_batch(tiny_policy(), PROMPTS).prompt_lengths.sum()) - len(PROMPTS)
    tokens = prompts + sum(len(one.ids) for group in wanted for one in group)
    assert alone.forwarded == {"policy": tokens}  # a model of weight 0 isn't run
    assert alike.forwarded == {"policy": tokens, "members": 2 * tokens}


def test_tokens_forwarded_are_those_of_all_models() -> None:
    sampler = ensemble([tiny_policy(1), tiny_policy(2)])
    found = sampler.sample(PROMPTS, 2, seed=0)
    assert sum(group[0].details["tokens_forwarded"] for group in found) == sum(sampler.forwarded.values())
    voting = ensemble([tiny_policy(1), tiny_policy(2)], combine="vote", weights=[1, 0, 1])
    found = voting.sample(PROMPTS, 2, seed=0)
    assert sum(group[0].details["tokens_forwarded"] for group in found) == sum(voting.forwarded.values())


def test_a_vote_by_brute_force_on_the_same_candidates() -> None:
    models, weights = [tiny_policy(0), tiny_policy(1), tiny_policy(2)], [2.0, 1.0, 1.5]
    sampler = EnsemblePolicy(
        EnsemblePolicyConfig(**SHORT, combine="vote", weights=weights, candidates=5),
        policy=models[0],
        members=models[1:],
    )
    found = sampler.sample(PROMPTS, 3, seed=7)
    candidates: list[list[tuple[float, Completion]]] = [[] for _ in PROMPTS]
    for number, (model, weight) in enumerate(zip(models, weights, strict=True)):
        drawn = Engine(model, seed=7).generate(prompt_batch(model, PROMPTS), 15, GenerateConfig(**SHORT))
        for own, group in zip(candidates, drawn, strict=True):
            own += [(weight, one) for one in group[5 * number : 5 * number + 5]]
    for group, own in zip(found, candidates, strict=True):
        votes: defaultdict[Any, float] = defaultdict(float)
        for weight, one in own:
            if (key := answer_key(one.text, complete=not one.truncated)) is not None:
                votes[key] += weight
        scores = sorted(
            (votes.get(answer_key(one.text, complete=not one.truncated), 0) for _, one in own), reverse=True
        )
        total = sum(votes.values()) or 1.0
        assert [one.score for one in group] == pytest.approx([score / total for score in scores[:3]])
        assert all(one.details["candidates"] == 15 for one in group)
        assert all(list(one.ids) in [list(other.ids) for _, other in own] for one in group)


def test_a_vote_of_models_alike_is_the_majority_of_one() -> None:
    found = ensemble([tiny_policy()], combine="vote", candidates=4).sample(PROMPTS, 2, seed=3)
    one = BestOfNSampler(BestOfNConfig(**SHORT, choose="majority", candidates=8), policy=tiny_policy())
    wanted = one.sample(PROMPTS, 2, seed=3)
    assert ids_of(found) == ids_of(wanted)
    assert [[one.score for one in group] for group in found] == [[one.score for one in group] for group in wanted]


def test_a_vote_of_models_with_other_tokenizers() -> None:
    """Each gets the prompt by its own tokenizer, here with and without a token at its beginning."""
    plain = PolicyModel(tiny_model(3), tiny_tokenizer(add_bos=False))
    longer = tiny_tokenizer()
    longer.add_tokens(["1+1"])
    other = PolicyModel(tiny_model(4, vocab_size=264), longer)
    sampler = ensemble([plain, other], combine="vote", candidates=2)
    (group,) = sampler.sample(["1+1=?"], 6, seed=0)
    assert sorted(one.details["member"] for one in group) == [0, 0, 1, 1, 2, 2]
    prompts = [prompt_batch(policy, ["1+1=?"]).prompt_lengths.item() - 1 for policy in policies_of(sampler).values()]
    assert prompts == [5, 4, 3]
    for number, role in enumerate(("policy", "members")):
        drawn = sum(len(one.ids) for one in group if (one.details["member"] > 0) == (number == 1))
        assert sampler.forwarded[role] == (prompts[0] if number == 0 else prompts[1] + prompts[2]) + drawn
    with pytest.raises(ModelError, match=r"`members\[1\]` has another vocabulary than the policy.*'1\+1'"):
        ensemble([plain, other])


def test_members_are_loaded_from_paths(tmp_path: Path) -> None:
    paths = [save_tiny(tmp_path / str(seed), seed=seed) for seed in range(3)]
    config = EnsemblePolicyConfig(**SHORT)
    loaded = EnsemblePolicy.load(config, policy=paths[0], members=[str(paths[1]), ModelConfig(path=str(paths[2]))])
    given = [PolicyModel.from_pretrained(path) for path in paths]
    mixed = EnsemblePolicy.load(config, policy=given[0], members=[given[1], {"path": str(paths[2])}])
    wanted = EnsemblePolicy(config, policy=given[0], members=tuple(given[1:]))
    assert isinstance(loaded.models["members"], tuple) and [*policies_of(loaded)] == [
        "policy",
        "members[0]",
        "members[1]",
    ]
    for sampler in (loaded, mixed):
        assert ids_of(sampler.sample(PROMPTS, seed=2)) == ids_of(wanted.sample(PROMPTS, seed=2))


def test_options_and_roles_are_checked() -> None:
    one, other = tiny_policy(), tiny_policy(1)
    for models, message in (
        ({"policy": one}, r"no model is given for the sampler's role `members`.*a list of PolicyModels"),
        ({"policy": one, "members": []}, r"the list of models for the role `members` is empty"),
        ({"policy": one, "members": other}, r"(?s)the role `members` takes a list of models.*fix: `members=\[…\]`"),
        ({"policy": one, "members": ["B"]}, r"must be a PolicyModel; got 'B'.*load\(members=PATH\)"),
        ({"policy": one, "members": [one]}, r"the same model is given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            EnsemblePolicy(EnsemblePolicyConfig(), **models)
    with pytest.raises(ConfigError, match=r"`members` takes a list of models; got 'B'"):
        EnsemblePolicy.load(policy=one, members="B")
    for combine in ("logits", "vote"):
        with pytest.raises(ConfigError, match=r"one weight per model, the policy's first; got 3 for 2 models"):
            ensemble([other], combine=combine, weights=[1, 1, 1])
    for options, message in (
        ({"weights": [1, -1]}, "must be at least 0 each"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"candidates": 3}, "candidates has no meaning with combine logits"),
        ({"draft": "ngram"}, "draft has no meaning with combine logits"),
        ({"combine": "mean"}, "combine"),
    ):
        with pytest.raises(ConfigError, match=message):
            EnsemblePolicyConfig.parse(options)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(save_tiny(tmp_path / str(seed), seed=seed)) for seed in range(3)]
    output = tmp_path / "out.jsonl"
    models = ["--model", paths[0], "--members", paths[1], "--members", paths[2]]
    own = ["sample", "ensemble", *models, "--prompts", "1+1=?", "--prompts", "2+2=?", "--max-new-tokens", "8"]
    more = ["--weights", "1", "--weights", "2", "--weights", "0.5", "--output", str(output)]
    assert main([*own, *more]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    given = [PolicyModel.from_pretrained(path) for path in paths]
    sampler = EnsemblePolicy(EnsemblePolicyConfig(**SHORT, weights=[1, 2, 0.5]), policy=given[0], members=given[1:])
    wanted = sampler.sample(["1+1=?", "2+2=?"], seed=0)
    assert [row["completion"] for row in rows] == [one.text for (one,) in wanted]
    assert [row["details"] for row in rows] == [dict(one.details) for (one,) in wanted]
    record = json.loads((tmp_path / "out.run.json").read_text())
    assert [*record["models"]] == ["policy", "members[0]", "members[1]"]
    assert record["models"]["members[0]"]["files"] != record["models"]["members[1]"]["files"]
    assert [one["path"] for one in record["options"]["members"]] == paths[1:]
    capsys.readouterr()
    assert main([*own[:4], "--prompts", "1+1=?"]) == 2
    assert "`members` is missing, the sampler's role `members`; fix: give `--members PATH`" in capsys.readouterr().err
    assert main([*own[:5], str(tmp_path / "nowhere"), "--prompts", "1+1=?"]) != 0
    assert "nowhere" in capsys.readouterr().err
