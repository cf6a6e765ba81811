"""A policy behind its address, asked by OpenAI's own client: answers are the engine's, whoever else asks."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.models import PolicyModel
from rlhf_core.serving.generation_worker import Failure, GenerationWorker, Job, Wanted
from rlhf_core.serving.server import PolicyServer, ServerOptions
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

openai = pytest.importorskip("openai", reason="the package openai isn't installed")
pytest.importorskip("starlette", reason="the extra `serve` isn't installed")

TOKEN = "a token of tests".replace(" ", "-")
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    """Return a policy whose distributions aren't even."""
    model = tiny_model(max_positions=512)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.7)
    return PolicyModel(model.requires_grad_(False), tiny_tokenizer())


@pytest.fixture(scope="module")
def server(policy: PolicyModel) -> Iterator[PolicyServer]:
    options = ServerOptions(port=0, token=TOKEN, name="tiny", most_waiting=40)
    with PolicyServer(policy, options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: PolicyServer) -> Any:
    return openai.OpenAI(base_url=server.url, api_key=server.token, max_retries=0, timeout=60)


def drawn(policy: PolicyModel, prompts: list[Any], n: int, seed: int, **options: Any) -> list[Completion]:
    """Return what the engine draws by itself."""
    made = Engine(policy, seed=seed).generate(prompt_batch(policy, prompts), n, SamplingConfig(**options))
    return [one for group in made for one in group]


def finish(completion: Completion) -> str:
    return "length" if completion.stop_reason == "length" else "stop"


# Answers


def test_models_are_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", 512)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="isn't served"):
        client.models.retrieve("other")


def test_a_chat_is_the_engines(policy: PolicyModel, client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, n=3, seed=7, max_completion_tokens=12, temperature=0.9, top_p=0.9,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    wanted = drawn(policy, [CHAT], 3, 7, max_new_tokens=12, temperature=0.9, top_p=0.9)
    assert [choice.message.content for choice in answer.choices] == [one.text for one in wanted]
    assert [choice.finish_reason for choice in answer.choices] == [finish(one) for one in wanted]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.choices[0].message.role == "assistant"
    prompt = int(prompt_batch(policy, [CHAT]).prompt_lengths[0])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, sum(len(one.ids) for one in wanted))
    for choice, one in zip(answer.choices, wanted, strict=True):
        tokens = choice.logprobs.content
        assert [token.logprob for token in tokens] == pytest.approx(one.raw_logprobs, abs=1e-4)
        for token in tokens:
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob
            assert token.logprob <= token.top_logprobs[0].logprob
            assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_texts_are_the_engines(policy: PolicyModel, client: Any) -> None:
    prompts = ["one", "another prompt", "one"]
    answer = client.completions.create(model="tiny", prompt=prompts, n=2, seed=3, max_tokens=9, logprobs=2)
    wanted = drawn(policy, prompts, 2, 3, max_new_tokens=9)
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted]
    assert len({choice.text for choice in answer.choices}) > 3  # a prompt that comes again has other random numbers
    for choice, one in zip(answer.choices, wanted, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx(one.raw_logprobs, abs=1e-4)
        assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    assert client.completions.create(model="tiny", prompt="one").usage.completion_tokens <= 16


def test_token_ids_are_taken_as_they_are(policy: PolicyModel, client: Any) -> None:
    ids = policy.tokenizer("some text")["input_ids"]
    greedy: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    alone = client.completions.create(prompt=ids, **greedy)
    (wanted,) = drawn(policy, ["some text"], 1, 0, max_new_tokens=8, temperature=0)
    assert alone.choices[0].text == wanted.text and alone.usage.prompt_tokens == len(ids)
    both = client.completions.create(prompt=[ids, [40, 41]], **greedy)
    assert both.choices[0].text == wanted.text and len(both.choices) == 2
    assert both.usage.prompt_tokens == len(ids) + 2


def test_a_prompts_own_tokens_are_scored(policy: PolicyModel, client: Any) -> None:
    texts = ["a text that is scored", "b"]
    for more in (0, 1):
        answer = client.completions.create(
            model="tiny", prompt=texts, max_tokens=more, echo=True, logprobs=1, temperature=0
        )
        for text, choice in zip(texts, answer.choices, strict=True):
            ids = policy.tokenizer(text)["input_ids"]
            with torch.no_grad():
                logps = policy.causal_lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [float(logps[place, token]) for place, token in enumerate(ids[1:])]
            found = choice.logprobs
            assert len(found.tokens) == len(ids) + more and choice.text.startswith(text)
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
            assert found.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
            likeliest = [max(top.values()) for top in found.top_logprobs[1 : len(ids)]]
            assert likeliest == pytest.approx(logps[:-1].amax(dim=-1).tolist(), abs=1e-4)
        assert answer.usage.completion_tokens == more * len(texts)
    assert client.completions.create(model="tiny", prompt=[5], echo=True, logprobs=0, max_tokens=0).choices[0].text


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_pieces_of_a_stream_are_the_whole(client: Any, logprobs: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": CHAT, "n": 2, "seed": 11, "max_tokens": 24}
    options |= {"stop": ["e", "zz"], "logprobs": logprobs}
    whole = client.chat.completions.create(**options)
    texts, reasons, tokens, usage = ["", ""], [None, None], [[], []], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs is not None:
                tokens[choice.index] += [(each.token, each.logprob) for each in choice.logprobs.content]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    if logprobs:
        for found, choice in zip(tokens, whole.choices, strict=True):
            assert [text for text, _ in found] == [each.token for each in choice.logprobs.content]
            assert [value for _, value in found] == pytest.approx(
                [each.logprob for each in choice.logprobs.content], abs=1e-4
            )


def test_the_pieces_of_a_text_with_its_prompt_are_the_whole(client: Any) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["ab", "c"],
        "seed": 2,
        "max_tokens": 6,
        "echo": True,
        "logprobs": 1,
    }
    whole = client.completions.create(**options)
    texts, offsets, logprobs = ["", ""], [[], []], [[], []]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset
            logprobs[choice.index] += choice.logprobs.token_logprobs
    for index, choice in enumerate(whole.choices):
        assert texts[index] == choice.text and len(offsets[index]) == len(choice.logprobs.text_offset)
        assert logprobs[index][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)


def test_a_stop_string_ends_a_completion(policy: PolicyModel, client: Any) -> None:
    (free,) = drawn(policy, [CHAT], 1, 5, max_new_tokens=40)
    end = next(letter for letter in free.text[len(free.text) // 2 :] if letter.isascii())
    answer = client.chat.completions.create(model="tiny", messages=CHAT, seed=5, max_tokens=40, stop=end)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == free.text[: free.text.index(end)]


# Many clients


def test_a_seed_gives_its_text_whatever_else_is_drawn(policy: PolicyModel, client: Any) -> None:
    def ask(seed: int) -> str:
        options = {"temperature": 0.5 + 0.1 * (seed % 4), "max_tokens": 8 + seed % 5}
        answer = client.completions.create(model="tiny", prompt=f"prompt {seed % 3}", seed=seed, **options)
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(24)))
    for seed, text in enumerate(together):
        options = {"temperature": 0.5 + 0.1 * (seed % 4), "max_new_tokens": 8 + seed % 5}
        assert text == drawn(policy, [f"prompt {seed % 3}"], 1, seed, **options)[0].text


def test_a_request_joins_others_that_are_being_drawn(client: Any) -> None:
    long = client.completions.create(model="tiny", prompt="long", max_tokens=120, seed=0, stream=True, temperature=0.3)
    next(iter(long))
    client.completions.create(model="tiny", prompt="short", max_tokens=2)  # ends though the first one goes on
    assert sum(1 for _ in long) > 5


def test_without_a_seed_answers_differ(client: Any) -> None:
    found = [client.completions.create(model="tiny", prompt="a", max_tokens=12).choices[0].text for _ in range(3)]
    assert len(set(found)) > 1


def test_a_client_that_leaves_frees_its_rows(policy: PolicyModel, server: PolicyServer, client: Any) -> None:
    wait = {"model": "tiny", "prompt": "x", "n": 20, "max_tokens": 400, "temperature": 0.2}
    stream = client.completions.create(**wait, stream=True)
    next(iter(stream))
    body = json.dumps(wait)
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))
    connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {TOKEN}"})
    time.sleep(0.2)
    with pytest.raises(openai.RateLimitError, match="try again later"):
        client.completions.create(model="tiny", prompt="y", n=20, max_tokens=2)
    stream.close()
    connection.close()
    until = time.monotonic() + 20
    while True:  # as soon as the server has seen it
        try:
            assert len(client.completions.create(model="tiny", prompt="y", n=40, max_tokens=2).choices) == 40
            break
        except openai.RateLimitError:
            assert time.monotonic() < until
            time.sleep(0.05)


# Refusals


def test_only_who_bears_the_token_is_answered(server: PolicyServer) -> None:
    for key in ("wrong", TOKEN[:-1], TOKEN + "x"):
        stranger = openai.OpenAI(base_url=server.url, api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.completions.create(model="tiny", prompt="a")


def ask(server: PolicyServer, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str, Any]:
    """Return status, text and headers of an answer to a plain request."""
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.split(":")[2].split("/")[0]), timeout=30)
    connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_a_page_of_another_site_gets_nothing(server: PolicyServer) -> None:
    assert ask(server, "GET", "/v1/models", Host="evil.example")[0] == 400  # a name that was made to point here
    assert ask(server, "GET", "/v1/models", Host="localhost:1")[0] == 200
    status, _, headers = ask(server, "GET", "/v1/models", Origin="https://evil.example")
    assert "access-control-allow-origin" not in headers and status == 200
    assert ask(server, "OPTIONS", "/v1/models", Authorization="")[0] == 401
    status, text, _ = ask(server, "GET", "/v1/nothing")
    assert status == 404 and json.loads(text)["error"]["code"] == "unknown_url"
    assert ask(server, "GET", "/v1/completions")[0] == 405


def test_a_body_must_be_json_of_a_bounded_size(server: PolicyServer) -> None:
    for body in ("", "[1]", "{", '{"model": NaN}', "[" * 100_000):
        status, text, _ = ask(server, "POST", "/v1/completions", body)
        assert status == 400 and json.loads(text)["error"]["code"] == "invalid_json"
    assert ask(server, "POST", "/v1/completions", " " * (8 * 2**20 + 1))[0] == 413


@pytest.mark.parametrize(
    ("options", "param", "problem"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty", "isn't supported"),
        ({"presence_penalty": 1}, "presence_penalty", "isn't supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "isn't supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "isn't supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "isn't supported"),
        ({"user": 3}, "user", "of a wrong type: got int"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "isn't supported"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean `temperature`"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 10**400}, "temperature", "too large"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 41}, "n", "at most 40"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_tokens": 5000}, "max_tokens", "512 positions"),
        ({"top_logprobs": 3}, "top_logprobs", "without `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without `stream`"),
        ({"stop": [""]}, None, "empty text"),
        ({"stop": ["a"] * 33}, "stop", "at most 32"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": "1"}, "seed", "valid integer"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages", "must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages", "name` isn't supported"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "no room for a completion"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages", "is unknown; got 'nobody'"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(
    client: Any, options: dict[str, Any], param: str | None, problem: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=problem) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": CHAT, **options})
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("options", "param", "problem"),
    [
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [999]}, "prompt", "ids 0 to 262"),
        ({"prompt": [[1.5]]}, "prompt", "valid"),
        ({"max_tokens": 0}, "max_tokens", "nothing is echoed"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "stream", "nothing is drawn"),
        ({"best_of": 3}, "best_of", "isn't supported"),
        ({"suffix": "x"}, "suffix", "isn't supported"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "x" * 600}, "prompt", "no room for a completion"),
    ],
)
def test_texts_that_cannot_be_drawn_are_refused(client: Any, options: dict[str, Any], param: str, problem: str) -> None:
    with pytest.raises(openai.BadRequestError, match=problem) as raised:
        client.completions.create(**{"model": "tiny", "prompt": "a", **options})
    assert raised.value.param == param


def test_what_cannot_change_an_answer_is_taken(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": CHAT, "seed": 3, "max_tokens": 6}
    sent = {"user": "me", "metadata": {"run": "a"}, "store": True, "service_tier": "flex", "parallel_tool_calls": True}
    sent |= {"extra_body": {"safety_identifier": "me", "prompt_cache_key": "a", "prompt_cache_retention": "24h"}}
    plain, noted = client.chat.completions.create(**options), client.chat.completions.create(**options, **sent)
    assert noted.choices[0].message.content == plain.choices[0].message.content


def test_what_means_nothing_is_taken(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}], max_tokens=2, n=1,
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, response_format={"type": "text"}, stop=None, seed=None,
        extra_body={"top_k": 5, "min_p": 0.1, "tool_choice": "none"},
    )  # fmt: skip
    assert answer.usage.completion_tokens <= 2
    with pytest.raises(openai.NotFoundError, match="`tiny` is"):
        client.completions.create(model="gpt", prompt="a")


def test_what_goes_wrong_while_drawing_is_told(policy: PolicyModel) -> None:
    broken = PolicyModel(tiny_model(), tiny_tokenizer())
    with torch.no_grad():
        broken.check()
        broken.causal_lm.model.embed_tokens.weight[70].fill_(float("nan"))
    ids = [10, 70, 11]
    with PolicyServer(broken, ServerOptions(port=0, name="tiny")) as server:
        asking = openai.OpenAI(base_url=server.url, api_key=server.token, max_retries=0)
        for _ in range(2):  # the server goes on
            with pytest.raises(openai.InternalServerError, match="aren't finite"):
                asking.completions.create(model="tiny", prompt=ids)
        with pytest.raises(openai.APIError, match="aren't finite"):
            list(asking.completions.create(model="tiny", prompt=ids, stream=True))


def test_a_fault_while_prompts_are_scored_leaves_nobody_waiting(
    policy: PolicyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a fault")

    engine = Engine(policy)
    monkeypatch.setattr(engine, "score_with_top", fails)
    worker = GenerationWorker(engine)
    drawing, scoring = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
    # The second job joins the batch of the first, and asks for nothing but its prompt's probabilities.
    worker.submit(Job([Wanted([10, 11], 1, SamplingConfig(max_new_tokens=40), chat=False)], drawing.put))
    worker.submit(Job([], scoring.put, [([10, 11], 0)]))
    worker.start()
    try:
        assert all(isinstance(events.get(timeout=60), Failure) for events in (drawing, scoring))
    finally:
        worker.stop()


def test_a_server_that_ends_lets_requests_end(policy: PolicyModel) -> None:
    found: list[Any] = []
    with PolicyServer(policy, ServerOptions(port=0, name="tiny", grace=30)) as server:
        asking = openai.OpenAI(base_url=server.url, api_key=server.token, max_retries=0)
        options: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 60, "temperature": 0.3, "seed": 4}
        stream = asking.completions.create(**options, stream=True)
        first = next(iter(stream))
        reading = threading.Thread(target=lambda: found.extend(stream))
        reading.start()
    reading.join()
    text = first.choices[0].text + "".join(chunk.choices[0].text for chunk in found)
    assert text == drawn(policy, ["a"], 1, 4, max_new_tokens=60, temperature=0.3)[0].text
    with pytest.raises(openai.APIConnectionError):
        asking.models.list()
