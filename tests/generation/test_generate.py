"""Completions: their ids, log-probabilities and stop reasons are those of the model that drew them."""

from __future__ import annotations

import pytest
import torch
from batches import uneven_policy
from tokenizers.decoders import Metaspace

from rlhf_core.contracts.batch import Batch
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return uneven_policy()


def scored(policy: PolicyModel, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
    one = torch.tensor([0])
    batch = Batch(
        torch.tensor([prompt]), torch.tensor([len(prompt)]), torch.tensor([ids]), torch.tensor([len(ids)]), one,
        torch.ones(1, len(ids), dtype=torch.bool), (0,),
    )  # fmt: skip
    return policy.token_logps(batch, temperature=temperature)[0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers(policy: PolicyModel, temperature: float) -> None:
    """The path that trains scores what was drawn as the path that drew it did, prompts of unequal length side by side."""
    prompts = ["a", "a longer prompt", [{"role": "user", "content": "hi"}]]
    drawn = policy.generate(prompts, n=3, max_new_tokens=12, temperature=temperature, seed=1)
    assert [len(group) for group in drawn] == [3, 3, 3]
    encoded = [policy.tokenizer(p).input_ids for p in prompts[:2]]
    encoded.append(policy.tokenizer.apply_chat_template(prompts[2], add_generation_prompt=True)["input_ids"])
    for prompt, group in zip(encoded, drawn, strict=True):
        for completion in group:
            ids = list(completion.ids)
            assert completion.logprobs == pytest.approx(scored(policy, prompt, ids, temperature), abs=1e-4)
            assert completion.raw_logprobs == pytest.approx(scored(policy, prompt, ids, 1.0), abs=1e-4)
            ended = ids[-1] == policy.tokenizer.eos_token_id
            assert completion.stop_reason == ("end" if ended else "length")
            assert ended or len(ids) == 12


def test_the_seed_decides_and_the_global_state_is_left_alone(policy: PolicyModel) -> None:
    state = torch.get_rng_state()
    policy.train()
    first, second, other = (policy.generate(["a", "b"], n=2, max_new_tokens=8, seed=s) for s in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state) and policy.training


def test_greedy_and_truncation(policy: PolicyModel) -> None:
    greedy = policy.generate(["abc"], n=2, max_new_tokens=8, temperature=0)[0]
    assert greedy[0] == greedy[1] and set(greedy[0].logprobs) == {0.0}
    only = policy.generate(["abc"], max_new_tokens=8, top_k=1, seed=3)[0][0]
    assert only.ids == greedy[0].ids and only.logprobs == pytest.approx([0.0] * len(only.ids), abs=1e-6)
    kept = policy.generate(["abc"], max_new_tokens=8, top_k=5, seed=3)[0][0]
    # What truncation removed makes the kept tokens likelier than the model's own distribution does.
    assert all(a > b for a, b in zip(kept.logprobs, kept.raw_logprobs, strict=True))


def test_no_prompt_is_dropped(policy: PolicyModel) -> None:
    """Answers would shift to other prompts: one that can't be answered is named."""
    positions = policy.max_positions
    assert positions is not None
    with pytest.raises(DataError, match="the prompt leaves no room for a completion") as caught:
        policy.generate(["a", "b" * (positions - 1), "c"], max_new_tokens=8)
    assert caught.value.exit_code == 3 and caught.value.place == "prompts[1]"
    assert caught.value.got == f"{positions} tokens for {positions} positions"


def test_the_models_own_settings_do_not_bend_the_distribution() -> None:
    from transformers import GenerationConfig

    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    own = GenerationConfig(repetition_penalty=1.8, min_p=0.2, do_sample=True, temperature=0.3, top_k=3)
    policy.causal_lm.generation_config = own
    drawn = policy.generate(["abc"], n=4, max_new_tokens=8, seed=1)[0]
    for completion in drawn:
        assert completion.logprobs == pytest.approx(completion.raw_logprobs, abs=1e-5)
    assert policy.causal_lm.generation_config is own


@pytest.mark.parametrize(
    "option", [{"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_options_out_of_range(policy: PolicyModel, option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        policy.generate(["a"], **option)


def test_a_row_s_tools_reach_the_template(policy: PolicyModel) -> None:
    tokenizer, before = policy.tokenizer, policy.tokenizer.chat_template
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + before
    row = {"prompt": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": {"name": "f"}}]}
    try:
        with_tools, without = policy.generate([row, row["prompt"]], max_new_tokens=4, temperature=0)
        ids = tokenizer.apply_chat_template(row["prompt"], tools=row["tools"], add_generation_prompt=True)["input_ids"]
    finally:
        tokenizer.chat_template = before
    (completion,) = with_tools
    assert scored(policy, ids, list(completion.ids), 1.0) == pytest.approx(completion.raw_logprobs, abs=1e-4)
    assert completion.raw_logprobs != without[0].raw_logprobs


def test_the_text_of_a_continued_prompt_keeps_its_first_blank() -> None:
    from data_helpers import metaspace_tokenizer

    from rlhf_core.data.text_spans import TextSpanEncoder

    tokenizer = metaspace_tokenizer()
    tokenizer.backend_tokenizer.decoder = Metaspace(prepend_scheme="always")
    ids = tokenizer.convert_tokens_to_ids(["▁", "4"])
    assert tokenizer.decode(ids) == "4" and TextSpanEncoder(tokenizer).text_of(ids) == " 4"


def test_progress_counts_what_has_ended(policy: PolicyModel) -> None:
    """The callback hears of each completion as it ends, and changes nothing that is drawn."""
    seen: list[tuple[int, int]] = []
    watched = policy.generate(
        ["a", "b"], n=2, max_new_tokens=8, seed=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert watched == policy.generate(["a", "b"], n=2, max_new_tokens=8, seed=1)


def test_prompts_may_be_token_ids(policy: PolicyModel) -> None:
    texts = ["ab", "a longer one"]
    ids = [policy.tokenizer(text)["input_ids"] for text in texts]
    expected = policy.generate(texts, 2, max_new_tokens=5, seed=3)
    for given in (ids, [tuple(one) for one in ids], [torch.tensor(one) for one in ids]):
        assert policy.generate(given, 2, max_new_tokens=5, seed=3) == expected
    assert prompt_batch(policy, ids).prompts == tuple(map(policy.tokenizer.decode, ids))
    with pytest.raises(DataError, match=r"prompts\[1\]: the model's vocabulary has ids 0 to \d+; got 99999"):
        policy.generate([[5], [6, 99999]])
    with pytest.raises(DataError, match=r"prompts\[0\]: the prompt leaves no room"):
        policy.generate([[5] * (policy.max_positions or 0)])
