"""The operations on sequence handles: prefill, fork, extend, append, score, free; and streams."""

from __future__ import annotations

import gc
import itertools
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import make_tiny

from rlhf_core.config.online import SamplingConfig
from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine, SequenceHandle
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.native_backend import NativeBackend
from rlhf_core.infra.errors import ConfigError, DataError, NumbersError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_policy, tiny_tokenizer

LONG = list(range(10, 90))
PROMPTS = [LONG, [40], [*LONG[:70], 3, 4, 5]]
OPEN = SamplingConfig(max_new_tokens=9, min_new_tokens=9)
"""Completions of nine tokens."""


def made(kind: str, **options: Any) -> PolicyModel:
    """Return a tiny policy whose weights are frozen and whose distributions aren't even."""
    model = tiny_model(**options) if kind == "tiny" else make_tiny(kind, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return PolicyModel(model.requires_grad_(False), tiny_tokenizer())


@pytest.fixture(scope="module", params=["tiny", "bloom", "window"])
def policy(request: pytest.FixtureRequest) -> PolicyModel:
    """Return a policy that is decoded over the paged cache, one by transformers' loop, and one that changes at a length."""
    return made("mistral", sliding_window=90) if request.param == "window" else made(request.param)


@pytest.fixture
def engine(policy: PolicyModel) -> Iterator[Engine]:
    engine = Engine(policy)
    yield engine
    assert held(engine) == 0  # each test frees what it made, or lets go of it


def held(engine: Engine) -> int:
    """Return how many sequences an engine holds, besides kept prompts."""
    native = engine.backend._native
    return 0 if native is None else native.cache.num_sequences - len(native.prefixes)


def forward_logps(policy: PolicyModel, ids: tuple[int, ...], count: int, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probabilities of the last tokens by transformers' own forward pass."""
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.tensor(ids[-count:])[:, None])[:, 0]


def test_scores_are_those_of_a_full_forward_pass(policy: PolicyModel, engine: Engine) -> None:
    handles = engine.prefill(PROMPTS)
    assert [handle.ids for handle in handles] == [tuple(ids) for ids in PROMPTS]
    tokens = [[7, 8, 9], [1, 200, 77, 31, 5], [250]]
    for temperature in (1.0, 0.7):
        for handle, ids, logps in zip(
            handles, tokens, engine.score(handles, tokens, temperature=temperature), strict=True
        ):
            assert logps.dtype == torch.float32
            expected = forward_logps(policy, (*handle.ids, *ids), len(ids), temperature)
            torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    # Scoring leaves handles as they were, and further tokens are scored behind appended ones.
    longer = engine.append(handles, tokens)
    assert [one.ids for one in longer] == [(*handle.ids, *ids) for handle, ids in zip(handles, tokens, strict=True)]
    for one, logps in zip(longer, engine.score(longer, [[60, 61]] * 3), strict=True):
        torch.testing.assert_close(logps, forward_logps(policy, (*one.ids, 60, 61), 2), atol=1e-4, rtol=0)
    engine.free([*handles, *longer])


def test_what_is_drawn_scores_what_was_reported(policy: PolicyModel, engine: Engine) -> None:
    handles = engine.prefill(PROMPTS)
    for _ in range(3):  # and again behind what was drawn
        extended = engine.extend(handles, OPEN, seeds=[1, 2, 3])
        logps = engine.score(handles, [one.completion.ids for one in extended])
        for before, one, scored in zip(handles, extended, logps, strict=True):
            assert one.handle.ids == (*before.ids, *one.completion.ids)
            torch.testing.assert_close(scored, torch.tensor(one.completion.raw_logprobs), atol=1e-4, rtol=0)
            torch.testing.assert_close(scored, forward_logps(policy, one.handle.ids, 9), atol=1e-4, rtol=0)
        engine.free(handles)
        handles = [one.handle for one in extended]


def test_extending_twice_is_extending_once(engine: Engine) -> None:
    handles = engine.prefill(PROMPTS)
    seeds = [5, 6, 7]
    whole = engine.extend(handles, OPEN, seeds=seeds)
    for first in (1, 4, 6):
        part = SamplingConfig(max_new_tokens=first, min_new_tokens=first)
        rest = SamplingConfig(max_new_tokens=9 - first, min_new_tokens=9 - first)
        begun = engine.extend(handles, part, seeds=seeds)
        ended = engine.extend([one.handle for one in begun], rest, seeds=seeds)
        assert [one.handle for one in ended] == [one.handle for one in whole]
        assert [[*a.completion.ids, *b.completion.ids] for a, b in zip(begun, ended, strict=True)] == [
            one.completion.ids for one in whole
        ]
    # A draft of which a part was accepted: the tokens behind it are those of the sequence that drew it all.
    accepted = engine.append(handles, [one.completion.ids[:5] for one in whole])
    rest = SamplingConfig(max_new_tokens=4, min_new_tokens=4)
    ended = engine.extend(accepted, rest, seeds=seeds)
    assert [one.handle.ids for one in ended] == [one.handle.ids for one in whole]
    other = engine.extend(accepted, rest, seeds=[8, 9, 10])
    assert [one.handle.ids for one in other] != [one.handle.ids for one in whole]
    engine.free([one.handle for one in whole])
    engine.free([one.handle for one in whole])  # as harmless as closing a file twice


def test_a_handle_draws_what_its_prompt_draws(policy: PolicyModel, engine: Engine) -> None:
    batch = prompt_batch(policy, ["a prompt of text", "b"])
    ids = [row[:length] for row, length in zip(batch.prompt_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.8, top_p=0.9)
    drawn = engine.generate(batch, 2, sampling, seeds=[[1, 2], [3, 4]])
    forks = [fork for handle in engine.prefill(ids) for fork in engine.fork(handle, 2)]
    extended = engine.extend(forks, sampling, seeds=[1, 2, 3, 4], chat=False)
    assert [one.completion.ids for one in extended] == [one.ids for group in drawn for one in group]
    assert [one.completion.text for one in extended] == [one.text for group in drawn for one in group]


@pytest.mark.parametrize("number", range(2))
def test_trees_of_forks(policy: PolicyModel, engine: Engine, number: int) -> None:
    """As a tree search would: nodes are extended, forked and freed in any order, and keep the tokens that they had."""
    random_state = random.Random(number)
    nodes = engine.prefill([LONG[:20], LONG[:21]])
    for step in range(10):
        chosen = random_state.sample(nodes, min(3, len(nodes)))
        action = random_state.choice(["fork", "extend", "extend", "append", "free"])
        if action == "fork":
            nodes += [fork for node in chosen for fork in engine.fork(node, 2)]
        elif action == "append":
            nodes += engine.append(chosen, [[random_state.randrange(7, 250) for _ in range(3)] for _ in chosen])
        elif action == "free" and len(nodes) > 4:
            nodes = [node for node in nodes if not any(node is one for one in chosen)]
            engine.free(chosen)
        else:
            few = SamplingConfig(max_new_tokens=random_state.randrange(1, 5), min_new_tokens=1)
            nodes += [
                one.handle for one in engine.extend(chosen, few, seeds=[step * 10 + k for k in range(len(chosen))])
            ]
    for node, logps in zip(nodes, engine.score(nodes, [[50, 51]] * len(nodes)), strict=True):
        torch.testing.assert_close(logps, forward_logps(policy, (*node.ids, 50, 51), 2), atol=1e-4, rtol=0)
    random_state.shuffle(nodes)
    engine.free(nodes)


def test_steps_end_at_a_separator_a_rule_or_the_limit(engine: Engine) -> None:
    (handle,) = engine.prefill([LONG[:9]])
    separator, seed, free = "\ufffd", 0, Completion("", [], [], "length")
    most = SamplingConfig(max_new_tokens=9)
    while "\ufffd" in separator or len(free.ids) < 9:  # a part of a character; or it ended early
        seed += 1
        free = engine.extend([handle], most, seeds=[seed])[0].completion
        separator = engine.policy.tokenizer.decode(free.ids[3:5])
    for stop in (separator, [separator, "never met"]):
        (step,) = engine.extend([handle], most, seeds=[seed], stop=stop)
        assert step.completion.stop_reason == "stop" and separator not in step.completion.text
        # The text is without the separator; the sequence holds it, so the next step begins behind it.
        assert step.handle.ids == (*handle.ids, *free.ids[: len(step.completion.ids)])
    seen: list[int] = []

    def rule(ids: Any) -> bool:
        seen.append(len(ids))
        return len(ids) == 4

    (ruled,) = engine.extend([handle], most, seeds=[seed], rule=rule)
    assert ruled.completion.stop_reason == "rule" and ruled.completion.ids == free.ids[:4] and seen == [1, 2, 3, 4]
    (limited,) = engine.extend([handle], SamplingConfig(max_new_tokens=2), seeds=[seed])
    assert limited.completion.stop_reason == "length" and limited.completion.ids == free.ids[:2]

    def broken(ids: Any) -> bool:
        raise KeyError("a rule of the caller's")

    with pytest.raises(KeyError):
        engine.extend([handle, handle], most, seeds=[seed, 4], rule=broken)
    assert engine.extend([handle], most, seeds=[seed])[0].completion.ids == free.ids


def test_nothing_and_wrong_calls(policy: PolicyModel, engine: Engine) -> None:
    assert engine.prefill([]) == engine.append([], []) == engine.score([], []) == engine.extend([], seeds=[]) == []
    engine.free([])
    (handle,) = engine.prefill([LONG])
    assert engine.fork(handle, 0) == []
    too_long = policy.max_positions or 2048
    wrong: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: engine.prefill([[5], []]), ConfigError, "at least one token"),
        (lambda: engine.score([handle], [[]]), ConfigError, "at least one token"),
        (lambda: engine.score([handle], []), ConfigError, "at least one token"),
        (lambda: engine.append([handle], [[1], [2]]), ConfigError, "at least one token"),
        (lambda: engine.score([handle], [[1]], temperature=0), ConfigError, "above 0"),
        (lambda: engine.extend([handle], seeds=[]), ConfigError, "one seed per handle"),
        (lambda: engine.extend([handle], seeds=[1], stop=""), ConfigError, "empty text"),
        (lambda: engine.extend([handle], SamplingConfig(stop_ids=[9999]), seeds=[1]), ConfigError, "vocabulary"),
        (lambda: Engine(policy, memory=0), ConfigError, "at least 1"),
        (lambda: Engine(policy, most_rows=0), ConfigError, "at least 1"),
    ]
    if policy.max_positions is not None:
        wrong += [
            (lambda: engine.prefill([[5] * (too_long + 1)]), DataError, "longer than the model's positions"),
            (lambda: engine.append([handle], [[5] * too_long]), DataError, "longer than the model's positions"),
        ]
    for call, kind, message in wrong:
        with pytest.raises(kind, match=message):
            call()
    # None of these changed the handle.
    (logps,) = engine.score([handle], [[50]])
    torch.testing.assert_close(logps, forward_logps(policy, (*LONG, 50), 1), atol=1e-4, rtol=0)


def operations(engine: Engine, handle: SequenceHandle) -> list[Callable[[], object]]:
    return [
        lambda: engine.extend([handle], OPEN, seeds=[1]),
        lambda: engine.score([handle], [[1]]),
        lambda: engine.append([handle], [[1]]),
    ]


def test_freed_and_foreign_handles_are_refused() -> None:
    policy = made("tiny")
    engine, other = Engine(policy), Engine(policy)
    handle, second = engine.prefill([LONG, LONG[:9]])
    for call in [*operations(other, handle), lambda: other.fork(handle), lambda: other.free([handle])]:
        with pytest.raises(ConfigError, match="another engine's") as caught:
            call()
        assert caught.value.place == "handles[0]"
    fork = engine.fork(handle)[0]
    engine.free([handle])
    for call in [*operations(engine, handle), lambda: engine.fork(handle)]:
        with pytest.raises(ConfigError, match="was freed"):
            call()
    with pytest.raises(ConfigError, match="was freed") as caught:
        engine.score([second, handle], [[1], [1]])
    assert caught.value.place == "handles[1]"
    torch.testing.assert_close(
        engine.score([fork], [[50]])[0], forward_logps(policy, (*LONG, 50), 1), atol=1e-4, rtol=0
    )
    del fork, second, caught
    assert held(engine) == 0


CHANGES: dict[str, Callable[[PolicyModel], object]] = {
    "in place": lambda policy: policy.causal_lm.model.norm.weight.mul_(1.1),
    "an optimiser's step": lambda policy: optimise(policy),
    ".data": lambda policy: policy.causal_lm.model.layers[0].mlp.up_proj.weight.data.mul_(1.1),
    "loaded": lambda policy: policy.causal_lm.load_state_dict(
        {name: tensor * 1.1 for name, tensor in policy.causal_lm.state_dict().items()}
    ),
    "replaced": lambda policy: setattr(
        policy.causal_lm.model.norm, "weight", torch.nn.Parameter(torch.full((64,), 1.2), requires_grad=False)
    ),
    "precision": lambda policy: policy.set_options(precision="bf16"),
}


def optimise(policy: PolicyModel) -> None:
    parameter = policy.causal_lm.model.layers[0].self_attn.v_proj.weight
    parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW([parameter], lr=1e-2)
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    parameter.requires_grad_(False)


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_other_weights_computed_is_used(change: str) -> None:
    policy = made("tiny")
    engine = Engine(policy)
    (handle,) = engine.prefill([LONG])
    before = engine.score([handle], [[50, 51]])[0]
    with torch.no_grad():
        CHANGES[change](policy)
    for call in operations(engine, handle):
        with pytest.raises(ConfigError, match="weights have changed since the sequence was read"):
            call()
    engine.free([handle])
    after = engine.score(engine.prefill([LONG]), [[50, 51]])[0]  # nor is the prompt that was kept
    tolerance = 0.05 if change == "precision" else 1e-4
    torch.testing.assert_close(after, forward_logps(policy, (*LONG, 50, 51), 2), atol=tolerance, rtol=0)
    assert not torch.equal(before, after)


def test_an_adapter_that_is_turned_off_is_another_model() -> None:
    torch.manual_seed(0)
    policy = made("tiny").set_options(lora=LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy.requires_grad_(False)
    engine = Engine(policy)
    (handle,) = engine.prefill([LONG])
    on = engine.score([handle], [[50, 51]])[0]
    with policy.model.disable_adapter():
        with pytest.raises(ConfigError, match="weights have changed"):
            engine.score([handle], [[50, 51]])
        off = engine.score(engine.prefill([LONG]), [[50, 51]])[0]
        torch.testing.assert_close(off, forward_logps(policy, (*LONG, 50, 51), 2), atol=1e-4, rtol=0)
    assert float((on - off).abs().max()) > 1e-2
    torch.testing.assert_close(engine.score(engine.prefill([LONG]), [[50, 51]])[0], on, atol=1e-4, rtol=0)


def test_weights_that_are_no_numbers_are_named() -> None:
    policy = made("tiny")
    engine = Engine(policy)
    (handle,) = engine.prefill([LONG])
    policy.causal_lm.model.norm.weight.data.fill_(torch.nan)
    for number in (1, 2):
        (handle,) = engine.prefill([LONG])
        with pytest.raises(NumbersError, match="aren't finite") as caught:
            operations(engine, handle)[number]()
        assert caught.value.place == "handles[0]"


# Streams


@pytest.mark.parametrize("kind", ["tiny", "bloom", "mamba"])
def test_a_stream_grows_into_what_generate_returns(kind: str) -> None:
    policy = made(kind)
    engine = Engine(policy)
    batch = prompt_batch(policy, ["a prompt"])
    partial = stopped = 0
    for seed in range(6):
        sampling = SamplingConfig(max_new_tokens=16, temperature=1.5)
        (whole,) = Engine(policy).generate(batch, 1, sampling, seeds=[[seed]])[0]
        # A stop string that is in the text, for which the beginnings of it must be held back.
        pairs = [whole.text[at : at + 2] for at in range(2, len(whole.text) - 1)]
        stop = next((pair for pair in pairs if seed % 2 and "\ufffd" not in pair), "")
        sampling = SamplingConfig(max_new_tokens=16, temperature=1.5, stop=[stop] if stop else [])
        (whole,) = Engine(policy).generate(batch, 1, sampling, seeds=[[seed]])[0]
        pieces = list(engine.stream(batch, sampling, seed=seed))
        assert (pieces[-1].ids, pieces[-1].text) == (whole.ids, whole.text)
        assert pieces[-1].stop_reason == whole.stop_reason
        for piece, later in itertools.pairwise(pieces):
            assert later.text.startswith(piece.text) and later.ids[: len(piece.ids)] == piece.ids
            assert len(later.ids) == len(piece.ids) + 1
            assert stop or not piece.text.endswith(
                "\ufffd"
            )  # before what could become a stop string, bytes are settled
            partial += policy.tokenizer.decode(piece.ids).endswith("\ufffd")
        if stop:
            assert all(stop not in piece.text for piece in pieces)
            stopped += whole.stop_reason == "stop"
    assert partial and stopped
    assert held(engine) == 0


def test_characters_of_several_bytes_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    text = "né€ 🙂b"
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    from rlhf_core.generation import drawn_rows

    place = iter(ids)

    def scripted(logits: torch.Tensor, *args: Any, **options: Any) -> Any:
        drawn = real(logits, *args, **options)
        return drawn._replace(tokens=torch.full_like(drawn.tokens, next(place)))

    real = drawn_rows.draw_tokens
    monkeypatch.setattr(drawn_rows, "draw_tokens", scripted)
    pieces = list(Engine(policy).stream(prompt_batch(policy, ["a"]), SamplingConfig(max_new_tokens=len(ids)), seed=0))
    assert [piece.text for piece in pieces] == [
        "n",
        "n",
        "né",
        "né",
        "né",
        "né€",
        "né€ ",
        *["né€ "] * 3,
        "né€ 🙂",
        text,
    ]


def test_streams_of_one_policy_can_be_read_in_turns() -> None:
    policy = made("tiny").set_options(precision="bf16")
    own = policy.causal_lm.generation_config
    policy.train()
    first, second = Engine(policy), Engine(policy)
    batches = [prompt_batch(policy, [text]) for text in ("one", "another")]
    expected = [[list(piece.ids) for piece in first.stream(batch, OPEN, seed=1)] for batch in batches]
    streams = [first.stream(batches[0], OPEN, seed=1), second.stream(batches[1], OPEN, seed=1)]
    found: list[list[list[int]]] = [[], []]
    for _ in range(9):
        for number, stream in enumerate(streams):
            found[number].append(list(next(stream).ids))
            # Whoever reads has the policy as it was, with gradients and in the precision of his own.
            assert policy.training and policy.causal_lm.generation_config is own
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert found == expected
    # Of one engine too, ended in the order in which they were begun, or never.
    one, two, never = (first.stream(batch, OPEN, seed=1) for batch in (*batches, batches[0]))
    pairs = [(next(one), next(two), next(never)) for _ in range(4)]
    rest = [list(one), list(two)]
    assert [
        [*(list(pair[k].ids) for pair in pairs), *(list(piece.ids) for piece in rest[k])] for k in (0, 1)
    ] == expected
    assert held(first) == 1
    never.close()
    assert held(first) == held(second) == 0 and policy.training and policy.causal_lm.generation_config is own


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "handed_over"]


def test_streams_of_transformers_loop_leave_the_policy_alone_between_pieces() -> None:
    policy = made("mistral", sliding_window=4).set_options(precision="bf16")
    own = policy.causal_lm.generation_config
    policy.train()
    batches = [prompt_batch(policy, [text]) for text in ("one", "another")]
    wholes = [Engine(policy).generate(batch, 1, OPEN, seeds=[[1]])[0][0] for batch in batches]
    streams = [Engine(policy).stream(batch, OPEN, seed=1) for batch in batches]
    found: list[list[list[int]]] = [[], []]
    for _ in range(9):
        for number, stream in enumerate(streams):
            found[number].append(list(next(stream).ids))
            assert policy.training and policy.causal_lm.generation_config is own
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert found == [[list(whole.ids[: count + 1]) for count in range(9)] for whole in wholes]
    assert all(next(stream, None) is None for stream in streams) and not threads()


def test_the_thread_of_transformers_loop_ends_with_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made("mistral", sliding_window=4)
    batch = prompt_batch(policy, ["one"])
    stream = Engine(policy).stream(batch, OPEN, seed=1)
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert not threads()
    # By an error in the loop, which is raised where the stream is read, and whose tensors nothing keeps.
    stream = Engine(policy).stream(batch, OPEN, seed=1)
    next(stream)
    forward, kept = type(policy.causal_lm).forward, []

    def failing(*args: Any, **options: Any) -> Any:
        logits = forward(*args, **options).logits
        kept.append(weakref.ref(logits))
        raise ValueError("a fault of the model")

    with monkeypatch.context() as patch:
        patch.setattr(type(policy.causal_lm), "forward", failing)
        gc.disable()
        try:
            with pytest.raises(ValueError, match="a fault of the model") as caught:
                next(stream)
            caught.value.with_traceback(None)
            del caught
            assert kept[0]() is None
        finally:
            gc.enable()
    assert not threads()
    # By Ctrl-C, which keeps what was drawn.
    stream = Engine(policy).stream(batch, OPEN, seed=1)
    first = next(stream)
    main = threading.main_thread().ident
    assert main is not None

    def pressed(*args: Any, **options: Any) -> Any:
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)
        return forward(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(policy.causal_lm), "forward", pressed)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert len(first.ids) == 1 and not threads()


def test_rows_with_limits_of_their_own_stay_within_a_models_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made("gpt2")
    assert policy.max_positions is not None
    room = policy.max_positions - int(prompt_batch(policy, ["a"]).prompt_lengths[0])
    monkeypatch.setattr(NativeBackend, "_native_for", lambda *_: None)  # as for a model that only transformers decodes
    batch = prompt_batch(policy, ["a", "b", "c" * 50])
    sampling = SamplingConfig(max_new_tokens=room, min_new_tokens=room)
    drawn = Engine(policy).generate(batch, 1, sampling, limits=[[1], [room], [10]], seeds=[[1], [2], [3]])
    assert [len(one.ids) for (one,) in drawn] == [1, room, 10]
    for number, (one,) in enumerate(drawn):
        limits, seeds = [[(1, room, 10)[number]]], [[number + 1]]
        ((alone,),) = Engine(policy).generate(batch.select([number]), 1, sampling, limits=limits, seeds=seeds)
        assert alone.ids == one.ids


def test_weights_that_change_between_pieces_end_a_stream() -> None:
    policy = made("tiny")
    engine = Engine(policy)
    stream = engine.stream(prompt_batch(policy, ["a"]), OPEN, seed=1)
    next(stream)
    policy.causal_lm.model.norm.weight.mul_(2)
    with pytest.raises(ConfigError, match="changed while a completion was being drawn"):
        next(stream)
    assert held(engine) == 0


def test_an_adapter_that_is_switched_off_between_pieces_ends_a_stream() -> None:
    policy = made("tiny").set_options(lora=LoraConfig(rank=4))
    engine = Engine(policy)
    stream = engine.stream(prompt_batch(policy, ["a"]), OPEN, seed=1)
    next(stream)
    with policy.adapter_off(), pytest.raises(ConfigError, match="changed while a completion was being drawn"):
        next(stream)


def test_threads_take_turns_with_one_policy() -> None:
    """Two draw, under an adapter, while a third computes log-probabilities: nobody sees what another one patches."""
    policy = made("tiny").set_options(lora=LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    policy.eval()
    batch, ids = prompt_batch(policy, ["ab", "c"]), torch.tensor([[40, 50, 60, 70]])
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=ids).logits
    expected = [[c.ids for c in group] for group in Engine(policy, seed=3).generate(batch, 2, OPEN)]
    wrong: list[object] = []

    def draw() -> None:
        for _ in range(6):
            found = [[c.ids for c in group] for group in Engine(policy, seed=3).generate(batch, 2, OPEN)]
            wrong.extend([found] if found != expected else [])

    def score() -> None:
        with torch.no_grad():
            for _ in range(60):
                gap = float((policy.causal_lm(input_ids=ids).logits - logits).abs().max())
                wrong.extend([gap] if gap > 1e-4 else [])

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(draw), pool.submit(draw), pool.submit(score)]:
            done.result()
    assert not wrong
    assert not any("forward" in vars(module) for module in policy.modules() if hasattr(module, "lora_A"))


def test_there_is_room_for_sequences_of_which_nothing_was_kept() -> None:
    """Beside a prompt longer than the window, short ones are read by transformers' loop; later they are read whole."""
    windowed = PolicyModel(make_tiny("mistral", sliding_window=128), tiny_tokenizer())
    engine = Engine(windowed)
    _, *short = engine.prefill([[40] * 130, [45, 55] * 50, [46, 56] * 50, [47, 57] * 50])
    assert all(handle.cached is None for handle in short)
    scored = engine.score(short, [[41, 42]] * 3)
    for handle, logps in zip(short, scored, strict=True):
        whole = torch.tensor([[*handle.ids, 41, 42]])
        with torch.no_grad():
            expected = windowed.network(input_ids=whole).logits[0, -3:-1].log_softmax(-1).gather(1, whole[0, -2:, None])
        assert (logps - expected[:, 0]).abs().max() < 1e-4


def test_the_most_likely_tokens_beside_given_ones(policy: PolicyModel, engine: Engine) -> None:
    handles, tokens = engine.prefill(PROMPTS), [[7, 8, 9], [1, 200], [250]]
    plain = engine.score(handles, tokens, temperature=0.8)
    for handle, ids, alone, scored in zip(
        handles, tokens, plain, engine.score_with_top(handles, tokens, 4, temperature=0.8), strict=True
    ):
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=torch.tensor([[*handle.ids, *ids]])).logits[0, -len(ids) - 1 : -1]
        values, likeliest = torch.log_softmax(logits / 0.8, dim=-1).topk(4)
        torch.testing.assert_close(scored.logprobs, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(scored.top.logprobs, values, atol=1e-4, rtol=0)
        assert torch.equal(scored.top.ids, likeliest)
    (scored,) = engine.score_with_top(handles[:1], tokens[:1], 10**6)
    assert scored.top.ids.shape == (3, policy.causal_lm.config.vocab_size)
    with pytest.raises(ConfigError, match="at least 0"):
        engine.score_with_top(handles[:1], tokens[:1], -1)
    engine.free(handles)


@pytest.mark.parametrize("kind", ["tiny", "gpt2"])
def test_a_token_behind_the_last_position_is_scored(kind: str) -> None:
    policy = made(kind)
    ids = [5 + number % 50 for number in range((policy.max_positions or 0) + 1)]
    engine = Engine(policy)
    (handle,) = engine.prefill([ids[:-3]])
    (logps,) = engine.score([handle], [ids[-3:]])
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor([ids[:-1]])).logits[0, -3:]
    expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[-3:])[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    with pytest.raises(DataError, match="longer than the model's positions"):
        engine.append([handle], [ids[-3:]])
    with pytest.raises(DataError, match="longer than the model's positions"):
        engine.score([handle], [ids[-4:]])
    engine.free([handle])
