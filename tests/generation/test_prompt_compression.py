"""Long prompts compressed before a policy reads them: what the engine draws behind soft tokens, and what is left of texts."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.config.compression import CompressionConfig, LongPromptsConfig
from rlhf_core.config.online import SamplingConfig
from rlhf_core.evaluation.evaluator import RLHFEvaluator
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import PromptTooLong, prompt_batch
from rlhf_core.generation.prompt_compression import PromptCompression, _end_of_context, detach, shortened_prompt
from rlhf_core.infra.errors import ConfigError, DataError, ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.models.context_compressor import ContextCompressor
from rlhf_core.models.soft_tokens import SOFT
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

LONG = "The river rises in the hills. Trout live in it. The town has a market on Fridays. When is the market?"
SHORT = "Hi?"
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0, min_new_tokens=6)


def soft_policy(seed: int = 0, *, ratio: float = 4.0) -> tuple[PolicyModel, PromptCompression]:
    policy = PolicyModel(tiny_model(seed, max_positions=96), tiny_tokenizer())
    compressor = ContextCompressor.on(
        PolicyModel(tiny_model(1, max_positions=96), tiny_tokenizer()), chunk=32, ratios=(2, 4), summary="memory"
    )
    config = CompressionConfig(over=32, ratio=ratio, keep_start=1, keep_end=10)
    compression = PromptCompression(config, policy.tokenizer, compressor=compressor)
    compression.attach(policy)
    return policy, compression


def test_a_long_prompt_becomes_soft_tokens_and_a_short_one_stays() -> None:
    policy, compression = soft_policy()
    batch = prompt_batch(policy, [LONG, SHORT])
    ids = [row[:n] for row, n in zip(batch.prompt_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]
    whole = policy.tokenizer(LONG).input_ids
    soft = [token for token in ids[0] if token >= SOFT]
    assert ids[0][:1] == whole[:1] and ids[0][-10:] == whole[-10:] and len(ids[0]) == 11 + len(soft)
    pieces = compression.compressor.pieces(len(whole) - 11, 4) if compression.compressor else []
    assert len(soft) == sum(count for _, count in pieces)
    assert ids[1] == policy.tokenizer(SHORT).input_ids
    assert batch.prompts == (LONG, SHORT)
    assert compression.counts == {"prompts": 2, "compressed": 1, "before": len(whole), "after": len(ids[0])}


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_greedy_completions_are_those_of_a_loop_over_embeddings(attention: Any) -> None:
    policy, _ = soft_policy()
    policy.set_options(attention=attention)  # with `eager` transformers' own cache is decoded over
    batch = prompt_batch(policy, [LONG, SHORT])
    found = Engine(policy).generate(batch, 1, GREEDY)
    embedding = policy.network.get_input_embeddings()
    ids = batch.prompt_ids[0, : int(batch.prompt_lengths[0])]
    embedded = embedding(ids).detach()
    detach(policy)
    drawn: list[int] = []
    for _ in range(6):
        logits = policy.network(inputs_embeds=embedded[None]).logits[0, -1].clone()
        logits[policy.tokenizer.eos_token_id] = -torch.inf
        drawn.append(int(logits.argmax()))
        embedded = torch.cat([embedded, embedding(torch.tensor([drawn[-1]]))])
    assert list(found[0][0].ids) == drawn
    assert list(found[1][0].ids) == list(Engine(policy).generate(prompt_batch(policy, [SHORT]), 1, GREEDY)[0][0].ids)


def test_completions_do_not_depend_on_what_is_compressed_beside_them() -> None:
    other = LONG.replace("river", "road")
    sampling = SamplingConfig(max_new_tokens=8, repetition_penalty=1.2)
    policy, _ = soft_policy()
    together = policy.generate([other, LONG], 2, max_new_tokens=8, repetition_penalty=1.2, seed=5)
    fresh, _ = soft_policy()
    alone = Engine(fresh, seed=5).generate(prompt_batch(fresh, [LONG]), 2, sampling)
    assert [one.ids for one in together[1]] == [one.ids for one in alone[0]]


def test_log_probabilities_behind_soft_tokens_are_those_of_the_forward_pass() -> None:
    policy, _ = soft_policy()
    batch = prompt_batch(policy, [LONG])
    (completions,) = Engine(policy).generate(batch, 1, SamplingConfig(max_new_tokens=8))
    scored = policy.token_logps(type(batch).from_completions(batch, [completions]))
    torch.testing.assert_close(scored[0], torch.tensor(completions[0].logprobs), atol=1e-4, rtol=0)


def test_soft_tokens_take_no_draft_and_need_an_attached_policy() -> None:
    policy, compression = soft_policy()
    batch = prompt_batch(policy, [LONG])
    with pytest.raises(ConfigError, match="takes no draft"):
        Engine(policy).generate(batch, 1, SamplingConfig(draft="ngram"))
    other = PolicyModel(tiny_model(max_positions=96), tiny_tokenizer())
    with pytest.raises(DataError, match="compressed for another policy"):
        Engine(other).generate(batch, 1, GREEDY)
    with pytest.raises(ConfigError, match="vocabulary has ids"):
        Engine(other).prefill([batch.prompt_ids[0].tolist()])
    with pytest.raises(ModelError, match="can't read"):
        compression.attach(PolicyModel(tiny_model(hidden=32), tiny_tokenizer()))
    with pytest.raises(ConfigError, match="too few memory tokens"):
        PromptCompression(CompressionConfig(ratio=1.5), policy.tokenizer, compressor=compression.compressor)


def test_a_prompt_longer_than_the_positions_fits_once_it_is_compressed() -> None:
    policy, _ = soft_policy()
    prompt = LONG * 2
    assert len(policy.tokenizer(prompt).input_ids) > 96
    assert len(policy.generate([prompt], max_new_tokens=4)[0][0].ids) <= 4
    detach(policy)
    with pytest.raises(PromptTooLong, match="leaves no room"):
        policy.generate([prompt], max_new_tokens=4)


def test_an_evaluation_measures_the_kl_behind_soft_tokens() -> None:
    policy, _ = soft_policy()
    reference = PolicyModel(tiny_model(0, max_positions=96), tiny_tokenizer())
    report = RLHFEvaluator(policy, prompts=[LONG], reference=reference, n=2, max_new_tokens=4).evaluate()
    assert report["kl/token"].value == pytest.approx(0, abs=1e-6)


def test_ends_are_those_of_the_compressor_s_training(caplog: pytest.LogCaptureFixture) -> None:
    policy = PolicyModel(tiny_model(max_positions=96), tiny_tokenizer())
    compressor = ContextCompressor.on(policy, chunk=32, ratios=(2,))
    compressor.kept = (1, 9)
    made = PromptCompression(CompressionConfig(over=32, compressor="here"), policy.tokenizer, compressor=compressor)
    assert (made.keep_start, made.keep_end) == (1, 9) and not caplog.records
    other = CompressionConfig(over=32, compressor="here", keep_end=4)
    assert PromptCompression(other, policy.tokenizer, compressor=compressor).keep_end == 4
    assert "trained with keep_start 1 and keep_end 9" in caplog.text
    with pytest.raises(ConfigError, match="keep_start has no meaning without a compressor"):
        LongPromptsConfig.parse({"keep_start": 1})


def test_prompts_of_which_nothing_can_be_compressed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    policy = PolicyModel(tiny_model(max_positions=512), tiny_tokenizer())
    PromptCompression(CompressionConfig(over=32, keep_end=400), policy.tokenizer).attach(policy)
    prompt_batch(policy, [LONG, SHORT])
    assert "1 of 2 prompts are longer than 32 tokens, and nothing of them could be compressed" in caplog.text


# Extraction


def shortened(prompt: Any, **options: Any) -> Any:
    return shortened_prompt(prompt, CompressionConfig(**{"ratio": 2, "keep_end": 19, **options}), tiny_tokenizer())


def test_a_text_keeps_its_end_and_what_the_end_asks_for() -> None:
    assert shortened(LONG) == "The town has a market on Fridays. When is the market?"


def test_of_a_chat_the_longest_message_is_shortened() -> None:
    context, question = LONG[: -len(" When is the market?")], "When is the market?"
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": context},
        {"role": "user", "content": question},
    ]
    assert [one["content"] for one in shortened(chat)] == ["Be brief.", "The town has a market on Fridays.", question]
    assert [one["content"] for one in shortened([chat[0], {"role": "user", "content": LONG}])] == [
        "Be brief.", "The town has a market on Fridays. When is the market?",
    ]  # fmt: skip


def tokens(text: str) -> int:
    return len(tiny_tokenizer()(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("text", ["天气很好。" * 100, "天气很好" * 100, '{"key":[1,2],"name":"x"},' * 60, "abc" * 300])
def test_text_without_blanks_is_shortened(text: str) -> None:
    found = shortened(text, ratio=4)
    assert text.endswith(found[-6:]) and 0.15 * tokens(text) < tokens(found) <= tokens(text) / 4 + 100


@pytest.mark.parametrize(("text", "keep", "end"), [
    ("Say what it is", 3, "is"), ("Say what it is", 1, "is"), ("Say what it is", 6, "it is"), ("Say what it is", 4, "it is"),
    ("它是什么", 3, "么"), ("a" * 100, 3, "aaa"), ('{"a":1,"bcd":2}', 5, 'bcd":2}'), ("Say", 3, "Say"),
])  # fmt: skip
def test_the_end_begins_with_a_word(text: str, keep: int, end: str) -> None:
    assert text[_end_of_context(text, keep, tiny_tokenizer()) :] == end


def test_a_blank_in_a_token_stays_with_the_context() -> None:
    def tokenizer(text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(offset_mapping=[match.span() for match in re.finditer(r" ?\w+|\W", text)])

    tokenizer.is_fast = True  # type: ignore[attr-defined]
    assert _end_of_context("It rained. When", 1, tokenizer) == len("It rained. ")


def test_system_messages_are_left_unless_there_are_no_others() -> None:
    rules = {"role": "system", "content": LONG * 3}
    user = {"role": "user", "content": "When is the market?"}
    assert shortened([rules, user]) == [rules, user]
    assert shortened([{**rules, "role": "developer"}, user])[0]["content"] == LONG * 3
    found = shortened([rules, {"role": "user", "content": LONG}])
    assert found[0] == rules and tokens(found[1]["content"]) < tokens(LONG)
    assert tokens(shortened([rules])[0]["content"]) < tokens(LONG * 3)


def test_many_middling_messages_are_shortened_together() -> None:
    roles = ("user", "assistant")
    chat = [{"role": roles[n % 2], "content": f"{LONG} This is number {n}."} for n in range(8)]
    chat += [{"role": "user", "content": "When is the market?"}]
    found = shortened(chat, ratio=3)
    before, after = (sum(tokens(one["content"]) for one in messages[:-1]) for messages in (chat, found))
    assert found[-1] == chat[-1] and before / 5 < after <= before / 3 + 1
    assert all("market" in one["content"] for one in found)


def test_short_messages_beside_a_long_one_stay_whole() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": []}
    chat = [
        {"role": "user", "content": "Read this, please."},
        calls,
        {"role": "tool", "content": LONG * 5},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "When is the market?"},
    ]
    found = shortened(chat, ratio=4)
    assert [one for n, one in enumerate(found) if n != 2] == [one for n, one in enumerate(chat) if n != 2]
    assert tokens(found[2]["content"]) < tokens(LONG * 5) / 4


def test_the_ends_of_the_question_and_of_the_last_message_stay() -> None:
    chat = [{"role": "user", "content": LONG * 2}, {"role": "assistant", "content": LONG * 2 + " So the answer is"}]
    found = shortened(chat)
    assert found[0]["content"].endswith("When is the market?") and found[1]["content"].endswith(" So the answer is")
    assert all(tokens(one["content"]) < tokens(LONG * 2) for one in found)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="fast tokenizer"):
        shortened_prompt(LONG, CompressionConfig(), object())


def test_extraction_through_a_policy() -> None:
    policy = PolicyModel(tiny_model(max_positions=96), tiny_tokenizer())
    compression = PromptCompression(CompressionConfig(over=32, ratio=2, keep_end=19), policy.tokenizer)
    compression.attach(policy)
    batch = prompt_batch(policy, [LONG, SHORT])
    text = policy.tokenizer.decode(batch.prompt_ids[0, : int(batch.prompt_lengths[0])], skip_special_tokens=True)
    assert text == "The town has a market on Fridays. When is the market?"
    assert batch.prompts[0] == LONG


def test_contexts_given_as_ids() -> None:
    _, compression = soft_policy()
    (one,) = compression.compress_ids([[9] * 12])
    assert one.embeddings is not None and len(one.ids) == len(one.embeddings) == 3 and one.length == 12
    tokenizer = tiny_tokenizer()
    context = tokenizer(LONG, add_special_tokens=False).input_ids
    (text,) = PromptCompression(CompressionConfig(ratio=2), tokenizer).compress_ids([context])
    assert text.embeddings is None and len(text.ids) <= len(context) / 2
