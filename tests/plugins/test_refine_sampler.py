"""`refine`: the contract of samplers, and its rounds against answers and critiques written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from rlhf_plugins.samplers.refine import IterativeRefiner, RefineConfig
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.tiny import tiny_policy

SHORT: dict[str, Any] = {
    "max_new_tokens": 6, "critique_tokens": 4, "rounds": 2, "critique_prompt": "{answer}?",
    "refine_prompt": "{answer}{critique}.",
}  # fmt: skip
PROMPTS = ["1+1=?", "2+2=?", "17+25=?", "9-3=?"]


class TestRefine(SamplerContract):
    method = "refine"
    options: ClassVar = {**SHORT, "max_new_tokens": 4, "critique_tokens": 2}
    # The tiny policy's critiques hold no such phrase, and no second round gains anything by the kit's reward.
    no_effect = ("decide", "min_gain", "done_phrase", "rounds")

    def token_logits(self, sampler: Sampler, batch: Batch, completions: Sequence[Completion]) -> Tensor:
        """Behind what was asked for each answer."""
        asked = [
            one.details["asked"] or batch.prompts[owner]
            for one, owner in zip(completions, batch.owner.tolist(), strict=True)
        ]
        own = Batch.from_completions(prompt_batch(sampler.policy, asked), [[one] for one in completions])
        states = sampler.policy.hidden_states(own, drop_last=True)
        return states.to_tokens(sampler.policy.logits(states.predicting()))


@pytest.mark.slow
class TestCritic(TestRefine):
    options: ClassVar = {**TestRefine.options, "decide": "critic"}
    no_effect = ("decide", "min_gain", "done_phrase")


def total(completions: Sequence[str], **columns: Any) -> list[float]:
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def sample(n: int = 1, prompts: Any = PROMPTS, reward: Any = total, **options: Any) -> list[Any]:
    config = RefineConfig(**{**SHORT, **options})
    models = {} if config.decide == "critic" else {"reward": reward}
    return IterativeRefiner(config, policy=tiny_policy(), **models).sample(prompts, n, seed=3)


def test_no_answer_ends_below_its_first_one() -> None:
    first = sample(n=6, rounds=1, reward=lambda completions: [0.0] * len(completions))  # equal: the first answers stay
    found = sample(n=6, rounds=4)
    starts = [sorted(total([one.text for one in group]), reverse=True) for group in first]
    for group, start in zip(found, starts, strict=True):
        ends = [one.score for one in group]
        assert ends == sorted(ends, reverse=True) and all(
            end >= begun - 1e-6 for end, begun in zip(ends, start, strict=True)
        )
        for one in group:
            assert one.score == pytest.approx(total([one.text])[0])  # the score is that of the text that is returned
            scored = [round["score"] for round in one.details["history"] if "score" in round]
            assert one.score >= max(scored, default=0) - 1e-6
    assert sum(one.details["rounds"] > 1 for group in found for one in group) > 0
    assert sum(map(sum, ([one.score for one in group] for group in found))) > sum(map(sum, starts))


def test_it_stops_where_nothing_is_gained() -> None:
    equal = sample(n=2, rounds=3, reward=lambda completions: [1.0] * len(completions))
    assert {(one.details["stopped"], one.details["rounds"]) for group in equal for one in group} == {("no_gain", 1)}
    high = sample(n=4, rounds=5, min_gain=10.0)
    assert all(one.details["rounds"] == 1 for group in high for one in group)
    # A gain that is too small to go on for is kept.
    assert [one.score for group in high for one in group] == [
        one.score for group in sample(n=4, rounds=1) for one in group
    ]


def test_the_critic_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and critiques by a script: the second critique finds nothing."""
    said = iter([["first"], ["too short"], ["second"], ["No Flaws here."]])
    original = Engine.generate

    def scripted(self: Engine, batch: Any, *arguments: Any, **options: Any) -> Any:
        drawn = original(self, batch, *arguments, **options)
        return [[replace(one, text=text) for one in group] for group, text in zip(drawn, next(said), strict=True)]

    monkeypatch.setattr(Engine, "generate", scripted)
    ((one,),) = sample(prompts=["1+1=?"], decide="critic", rounds=5)
    assert one.text == "second" and one.score is None and one.details["stopped"] == "critic"
    assert [round["critique"] for round in one.details["history"]] == ["too short", "No Flaws here."]


def test_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = Engine.generate

    def noting(self: Engine, batch: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(batch.prompts[0])
        return original(self, batch, *arguments, **options)

    monkeypatch.setattr(Engine, "generate", noting)
    plain = {"critique_prompt": "Errors?", "refine_prompt": "Again.", "max_new_tokens": 2, "critique_tokens": 2}
    ((one,),) = sample(prompts=["1+1=?\n"], decide="critic", rounds=1, **plain)
    start, critique, again = asked
    (round,) = one.details["history"]
    assert start == "1+1=?\n" and again == f"{critique}".rstrip("\n") + f"\n\n{round['critique']}\n\nAgain.\n\n"
    assert critique.startswith("1+1=?\n\n") and critique.endswith("\n\nErrors?\n\n") and one.text == round["answer"]
    asked.clear()
    chat = [{"role": "user", "content": "1+1=?"}]
    sample(prompts=[chat], decide="critic", rounds=1, **plain)
    roles = [[turn["role"] for turn in prompt] for prompt in asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user", "assistant", "user"]]
    assert asked[2][:3] == asked[1] and asked[2][4]["content"] == "Again."
    asked.clear()
    named = {**plain, "critique_prompt": "{prompt}|{answer}", "refine_prompt": "{critique}|{answer}|{prompt}"}
    ((one,),) = sample(prompts=["{answer}"], decide="critic", rounds=1, **named)
    first = asked[1].removeprefix("{answer}|")
    assert asked[1] == "{answer}|" + first and asked[2] == f"{one.details['history'][0]['critique']}|{first}|{{answer}}"


def test_a_request_that_doesnt_fit_ends_the_rounds() -> None:
    found = sample(critique_prompt="x" * 80)
    assert {one.details["stopped"] for (one,) in found} == {"no_room"} and all(
        one.score is not None for (one,) in found
    )
    assert [one.text for (one,) in found] == [
        one.text for (one,) in sample(rounds=1, min_gain=0, refine_prompt="y" * 80)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critique_prompt": " "}, "critique_prompt"),
        ({"decide": "critic", "min_gain": 1}, "min_gain"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RefineConfig.parse(options)
