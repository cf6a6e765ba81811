"""A sampler behind the address: its answers, under a request's options, and by name what it can't do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rlhf_plugins.samplers.best_of_n import BestOfNConfig, BestOfNSampler

from rlhf_core.cli import main
from rlhf_core.models import PolicyModel
from rlhf_core.serving.server import PolicyServer, ServerOptions
from rlhf_core.testing.tiny import tiny_policy

openai = pytest.importorskip("openai", reason="the package openai isn't installed")
pytest.importorskip("starlette", reason="the extra `serve` isn't installed")


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(text.count(letter) for letter in "aeiou")) for text in completions]


@pytest.fixture(scope="module")
def sampler() -> BestOfNSampler:
    return BestOfNSampler(BestOfNConfig(candidates=4, max_new_tokens=6), policy=tiny_policy(), reward=vowels)


@pytest.fixture(scope="module")
def client(sampler: BestOfNSampler) -> Iterator[Any]:
    policy: PolicyModel = sampler.policy
    with PolicyServer(policy, ServerOptions(port=0, name="best"), sampler=sampler) as server:
        yield openai.OpenAI(base_url=server.url, api_key=server.token, max_retries=0, timeout=60)


def test_answers_are_the_samplers(client: Any, sampler: BestOfNSampler) -> None:
    prompts = ["2+2=?\n", "3+4=?\n"]
    answer = client.completions.create(model="best", prompt=prompts, n=2, seed=5)
    expected = [one.text for group in sampler.sample(prompts, 2, seed=5) for one in group]
    assert [choice.text for choice in answer.choices] == expected and answer.usage.completion_tokens > 0
    # What a request says comes before the sampler's own options.
    short = BestOfNSampler(sampler.config.updated(max_new_tokens=2, temperature=0.5), **sampler.models)
    asked = client.completions.create(model="best", prompt=prompts[0], max_tokens=2, temperature=0.5, seed=5)
    assert asked.choices[0].text == short.sample(prompts[:1], 1, seed=5)[0][0].text
    chat = [{"role": "user", "content": "hi"}]
    told = client.chat.completions.create(model="best", messages=chat, seed=1)
    assert told.choices[0].message.content == sampler.sample([chat], 1, seed=1)[0][0].text


@pytest.mark.parametrize(
    ("options", "param", "problem"),
    [
        ({"stream": True}, "stream", "isn't supported by the sampler BestOfNSampler"),
        ({"logprobs": 1}, "logprobs", "leave out `logprobs`"),
        ({"echo": True}, "echo", "leave out `echo`"),
        ({"prompt": [1, 2]}, "prompt", "give prompts as text"),
        ({"max_tokens": 5000}, "max_tokens", "positions"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(client: Any, options: dict[str, Any], param: str, problem: str) -> None:
    with pytest.raises(openai.APIStatusError, match=problem) as raised:
        client.completions.create(**{"model": "best", "prompt": "a", **options})
    assert raised.value.param == param
    assert client.completions.create(model="best", prompt="a").choices  # the server goes on


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--sampler", "best_off_n"], "did you mean `best_of_n`?"),
        (["--sampler", "best_of_n"], "`reward` is missing"),
        (["--sampler", "best_of_n", "--reward", "repetition", "--candidatez", "2"], "did you mean `--candidates`?"),
        (["--sampler", "generate", "--n", "2"], "isn't for a server"),
        (["--sampler", "generate", "--max-rows", "2"], "--max-rows"),
        (["--prot", "2"], "unknown option"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(
    tmp_path: Path, flags: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path / "gone"), *flags]) == 2
    assert text in capsys.readouterr().err
