"""The engine: what it draws is what is trained on, whatever is drawn beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import make_tiny

from rlhf_core.config.online import SamplingConfig
from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.drawn_rows import DrawnRows
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.transformers_loop import Decoding, decoding_of
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, NumbersError
from rlhf_core.infra.seeds import completion_seeds
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_policy, tiny_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
PROMPTS = ["a", "a longer prompt than the others", CHAT, "middling"]


def sharp(model: Any, factor: float = 2) -> Any:
    """Return a model whose distributions are far from even."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(sharp(tiny_model()), tiny_tokenizer())


def differences(
    policy: PolicyModel, prompts: Sequence[Any], temperature: float = 1.0, **options: Any
) -> tuple[float, float, list[list[Completion]]]:
    """Return how far the drawn log-probabilities are from those of the path that trains, tempered and raw."""
    batch = prompt_batch(policy, prompts)
    sampling = SamplingConfig(temperature=temperature, **{"max_new_tokens": 12, **options})
    drawn = Engine(policy, seed=1).generate(batch, 3, sampling)
    made = Batch.from_completions(batch, drawn)
    tempered = made["sampled_logps"] + made["kept_mass"].log().where(made.loss_mask, 0)
    with torch.no_grad():
        scored, raw = policy.token_logps(made, temperature=temperature), policy.token_logps(made)
    return float((scored - tempered).abs().max()), float((raw - made["raw_logps"]).abs().max()), drawn


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.6, "top_p": 0.8},
        {"top_k": 5},
        {"temperature": 0.5, "top_k": 9, "top_p": 0.6},
    ],
)
def test_log_probabilities_are_those_of_the_path_that_trains(policy: PolicyModel, options: dict[str, float]) -> None:
    tempered, raw, drawn = differences(policy, PROMPTS, **options)
    assert tempered < 2e-5 and raw < 2e-5
    truncated = "top_p" in options or "top_k" in options
    masses = [mass for group in drawn for one in group for mass in one.kept_mass]
    assert all(0 < mass <= 1 for mass in masses) and (min(masses) < 1) == truncated
    assert {one.stop_reason for group in drawn for one in group} <= {"end", "length"}


def test_the_padding_token_may_be_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    policy = PolicyModel(sharp(tiny_model()), tokenizer)
    with torch.no_grad():
        # The end token is likely, so that rows end at different steps.
        policy.causal_lm.model.embed_tokens.weight[tokenizer.eos_token_id] *= 3
    tempered, raw, drawn = differences(policy, PROMPTS, temperature=0.8, max_new_tokens=30)
    assert tempered < 2e-5 and raw < 2e-5
    every = [one for group in drawn for one in group]
    lengths = {len(one.ids) for one in every}
    assert len(lengths) > 3 and any(one.stop_reason == "end" for one in every)
    for one in every:
        assert (one.ids[-1] == tokenizer.eos_token_id) == (one.stop_reason == "end")
        assert tokenizer.eos_token_id not in one.ids[:-1]
        assert one.stop_reason == "end" or len(one.ids) == 30


def test_a_completion_does_not_depend_on_its_company(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingConfig(max_new_tokens=10, temperature=0.9)
    batch = prompt_batch(policy, PROMPTS)
    seeds = completion_seeds(5, "rollout", 2, rows=batch.rows, n=3)
    whole = Engine(policy).generate(batch, 3, sampling, seeds=seeds)
    for number in range(len(PROMPTS)):
        alone = Engine(policy).generate(batch.select([number]), 2, sampling, seeds=[seeds[number][:2]])[0]
        assert [one.ids for one in alone] == [one.ids for one in whole[number][:2]]
        for one, other in zip(alone, whole[number], strict=False):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    cut = Engine(policy, most_rows=1).generate(batch, 3, sampling, seeds=seeds)
    assert [[one.ids for one in group] for group in cut] == [[one.ids for one in group] for group in whole]
    monkeypatch.setattr("rlhf_core.generation.drawn_rows.BLOCK", 3)
    longer = Engine(policy).generate(batch, 3, SamplingConfig(max_new_tokens=20, temperature=0.9), seeds=seeds)
    assert [[one.ids[:10] for one in group] for group in longer] == [[one.ids for one in group] for group in whole]


def test_a_stream_goes_by_rows_and_without_one_by_prompts(policy: PolicyModel) -> None:
    sampling = SamplingConfig(max_new_tokens=6)
    batch = prompt_batch(policy, ["a", "b", "a"])

    def ids(engine: Engine, rows: list[int], n: int = 2) -> list[list[list[int]]]:
        return [[list(one.ids) for one in group] for group in engine.generate(batch.select(rows), n, sampling)]

    engine = Engine(policy, seed=4)
    engine.begin("rollout", 3)
    together = ids(engine, [0, 1, 2])
    engine.begin("rollout", 3)
    # In two calls, in another order: the same draws, and other ones for a row that comes again.
    assert [*ids(engine, [2]), *ids(engine, [1, 0])] == [together[2], together[1], together[0]]
    assert ids(engine, [0]) != [together[0]]
    engine.begin("rollout", 4, policy_version=9)
    assert ids(engine, [0, 1, 2]) != together
    assert engine.generate(batch, 1, sampling)[0][0].policy_version == 9
    assert together[0] != together[2]  # one prompt in two rows
    first = ids(Engine(policy, seed=4), [0, 1, 2])
    assert ids(Engine(policy, seed=4), [1, 2]) == [first[1], first[0]]  # by prompts: the first `a`
    assert first[0] != first[2] and ids(Engine(policy, seed=5), [0]) != first[:1]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_running_out_of_memory_halves_the_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop over the paged cache, and in transformers' own."""
    policy = PolicyModel(sharp(make_tiny(kind)), tiny_tokenizer())
    sampling = SamplingConfig(max_new_tokens=5, min_new_tokens=5)
    batch = prompt_batch(policy, PROMPTS)
    whole = Engine(policy, seed=1).generate(batch, 2, sampling)
    sizes: list[int] = []
    draw, most = DrawnRows.draw, 3

    def small(rows: DrawnRows, logits: torch.Tensor) -> torch.Tensor:
        sizes.append(len(logits))
        if len(logits) > most:
            raise torch.OutOfMemoryError
        return draw(rows, logits)

    monkeypatch.setattr(DrawnRows, "draw", small)
    halved = Engine(policy, seed=1).generate(batch, 2, sampling)
    assert [[one.ids for one in group] for group in halved] == [[one.ids for one in group] for group in whole]
    assert sizes[:2] == [8, 4] and set(sizes[2:]) == {2}
    most = 0
    with pytest.raises(NumbersError, match="one completion at a time"):
        Engine(policy).generate(batch.select([0]), 1, sampling)


def test_room_at_the_end_of_the_positions() -> None:
    policy = PolicyModel(sharp(make_tiny("gpt2"), 1), tiny_tokenizer())  # learnt positions: 256, and none behind
    positions = policy.max_positions
    assert positions == 256
    batch = prompt_batch(policy, ["a", "b" * 200, "c" * 240, "d" * 249, "e" * 254])
    lengths = batch.prompt_lengths.tolist()
    drawn = Engine(policy, seed=3).generate(batch, 1, SamplingConfig(max_new_tokens=20))
    for length, (one,) in zip(lengths, drawn, strict=True):
        assert len(one.ids) <= min(20, positions - length)
        assert one.stop_reason == "end" or len(one.ids) == min(20, positions - length)
    full = batch.select([0]).pad(prompt_tokens=255 + lengths[0])
    full = Batch(**{**vars(full), "prompt_lengths": torch.tensor([256]), "rows": (17,)})
    with pytest.raises(DataError, match="no room for a completion") as caught:
        Engine(policy).generate(full, 1)
    assert caught.value.place == "row 17"


@pytest.mark.parametrize(
    "kind", ["gpt2", "mistral", "gemma2", "gemma3_text", "bloom", "mamba", "qwen3_next", "opt", "mixtral", "dory"]
)
def test_models_of_other_kinds(kind: str) -> None:
    """Learnt positions, windows shorter than the text, capped logits, alibi, states that run along the row, experts."""
    options = {"sliding_window": 8} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    policy = PolicyModel(make_tiny(kind, **options), tiny_tokenizer())
    tempered, raw, _ = differences(policy, ["a", "some prompt of text", "b" * 40], temperature=0.8)
    assert tempered < 2e-4 and raw < 2e-4


def test_a_model_whose_loop_counts_positions_otherwise_is_said(caplog: pytest.LogCaptureFixture) -> None:
    policy = PolicyModel(make_tiny("roberta"), tiny_tokenizer())
    assert decoding_of(policy) == Decoding("equal")
    decoding_of(policy)
    (line,) = [record.getMessage() for record in caplog.records if "differ from training logits" in record.getMessage()]
    assert line.startswith("in memory: generation logits differ")


def test_the_plain_path_and_its_reason_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = PolicyModel(make_tiny("bloom"), tiny_tokenizer())
    with caplog.at_level("INFO"):
        for _ in range(2):
            policy.generate(["a"], max_new_tokens=2, seed=0)
    (line,) = [line for line in caplog.messages if "transformers' own loop" in line]
    assert line.startswith("in memory generates through transformers' own loop, which is slower: ")


def test_training_mode_checkpointing_adapters_and_compilation() -> None:
    lora = LoraConfig(rank=4)
    torch.manual_seed(0)  # the adapter's first half
    policy = PolicyModel(sharp(tiny_model()), tiny_tokenizer()).set_options(lora=lora, gradient_checkpointing=True)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    policy.train()
    tempered, raw, _ = differences(policy, PROMPTS, temperature=0.8)
    assert tempered < 1e-5 and raw < 1e-5 and policy.training
    assert all(parameter.grad is None for parameter in policy.parameters())
    compiled = PolicyModel(sharp(tiny_model()), tiny_tokenizer()).set_options(compile=True)
    plain = Engine(PolicyModel(sharp(tiny_model()), tiny_tokenizer()), seed=2)
    sampling = SamplingConfig(max_new_tokens=6)
    ours = Engine(compiled, seed=2).generate(prompt_batch(compiled, PROMPTS), 1, sampling)
    assert [one.ids for (one,) in ours] == [
        one.ids for (one,) in plain.generate(prompt_batch(compiled, PROMPTS), 1, sampling)
    ]


def test_products_run_in_the_policys_precision() -> None:
    policy = PolicyModel(sharp(tiny_model()), tiny_tokenizer()).set_options(precision="bf16")
    batch = prompt_batch(policy, PROMPTS)
    made = Batch.from_completions(batch, Engine(policy, seed=1).generate(batch, 2, SamplingConfig(max_new_tokens=8)))
    exact = PolicyModel(sharp(tiny_model()), tiny_tokenizer())
    with torch.no_grad():
        narrow, wide = ((one.token_logps(made) - made["raw_logps"]).abs().mean() for one in (policy, exact))
    assert narrow < wide


def test_ends_are_those_of_chat_or_text() -> None:
    """A chat's turn ends where the template ends it; a text beside it goes on."""
    tokenizer = tiny_tokenizer()
    tool = tokenizer.convert_tokens_to_ids("<|tool|>")
    tokenizer.chat_template = tokenizer.chat_template.replace("~ eos_token", "~ '<|tool|>'")
    policy = PolicyModel(tiny_model(), tokenizer)
    with torch.no_grad():
        policy.causal_lm.model.embed_tokens.weight[tool] *= 8
    drawn = Engine(policy, seed=0).generate(prompt_batch(policy, ["text", CHAT]), 40, SamplingConfig(max_new_tokens=20))
    text, chat = ([one for one in group if tool in one.ids] for group in drawn)
    assert chat and text
    assert all(one.ids.index(tool) == len(one.ids) - 1 and one.stop_reason == "end" for one in chat)
    assert any(one.ids.index(tool) < len(one.ids) - 1 for one in text)
    assert all("<|tool|>" not in one.text for one in chat)


def test_wrong_calls(policy: PolicyModel) -> None:
    batch = prompt_batch(policy, ["a", "b"])
    with pytest.raises(ConfigError, match="need 2 seeds per prompt"):
        Engine(policy).generate(batch, 2, seeds=[[1, 2]])
    with pytest.raises(ConfigError, match="at least 1"):
        Engine(policy).generate(batch, 0)
    assert Engine(policy).generate(prompt_batch(policy, []), 3) == []
    still = PolicyModel(make_tiny("bloom"), tiny_tokenizer())  # decoded by transformers' loop
    still.causal_lm.can_generate = lambda: False
    with pytest.raises(ModelError, match="no decoding loop"):
        still.generate(["a"])
    broken = PolicyModel(tiny_model(), tiny_tokenizer())
    assert decoding_of(broken).together == "any"
    with torch.no_grad():
        broken.causal_lm.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NumbersError, match="aren't finite") as caught:
        broken.generate(["a"], seed=0)
    assert caught.value.place == "row 0"


def test_without_a_seed_every_call_draws_anew(policy: PolicyModel) -> None:
    torch.manual_seed(0)
    first, second = (policy.generate(["a"], max_new_tokens=12) for _ in range(2))
    assert first[0][0].ids != second[0][0].ids
    torch.manual_seed(0)
    assert policy.generate(["a"], max_new_tokens=12)[0][0].ids == first[0][0].ids


def test_rows_that_end_early_change_no_other_row() -> None:
    """Their blocks are free among those of other rows, and may lie between blocks that several rows share."""
    policy = tiny_policy()
    prompts = ["What is 1+2?", "a prompt that fills more than one block of the cache", "c3+4=", CHAT, " another"]
    batch = prompt_batch(policy, prompts)
    for seed in range(6):
        drawn = Engine(policy, seed=seed).generate(batch, 4, SamplingConfig(max_new_tokens=40))
        made = Batch.from_completions(batch, drawn)
        with torch.no_grad():
            assert float((policy.token_logps(made) - made["raw_logps"]).abs().max()) < 1e-5
