"""Stop strings: a completion ends with the first token after which its text holds one, however tokens and characters meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_core.config.online import SamplingConfig
from rlhf_core.data.text_spans import TextSpanEncoder
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.stop_strings import StopStrings
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

STOPS = ["one", "e t", "two\n", "\n\n", "é", "né", "你好😀", "好", "😀", "Question:", " ", "o-", "one two one two"]
TEXT = "one two\n\nthree two-one\nné né 你好 😀😀 one\n\ntwo three. Question: two? 你好😀"


def words() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with tokens of several characters, and of single bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's first: blanks at the beginning of words, a blank dropped at a text's beginning, bytes as tokens."""
    vocab = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    vocab += [
        (text, -float(len(text))) for text in ("▁", "▁one", "▁two", "one", "two", "o", "n", "e", "\n", "-", "né", "▁n")
    ]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


DECODERS: dict[str, tuple[PreTrainedTokenizerFast, Callable[[Sequence[int]], str]]] = {}
for _name, _tokenizer in {"bytes": tiny_tokenizer(), "words": words(), "pieces": pieces()}.items():
    DECODERS[_name] = _tokenizer, _tokenizer.decode
    DECODERS[f"{_name}, continued"] = _tokenizer, TextSpanEncoder(_tokenizer).text_of


def naive(stop: Sequence[str], text_of: Callable[[Sequence[int]], str], ids: Sequence[int]) -> tuple[int, str] | None:
    """Return after how many tokens the text holds a stop string, and the text before it, by decoding each beginning whole."""
    for length in range(1, len(ids) + 1):
        text = text_of(ids[:length])
        if found := [text.index(one) for one in stop if one in text]:
            return length, text[: min(found)]
    return None


def searched(strings: StopStrings, ids: Sequence[int]) -> tuple[int, str] | None:
    for length in range(1, len(ids) + 1):
        if (text := strings.text_before(ids[:length])) is not None:
            return length, text
    return None


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_the_search_is_that_in_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer, text_of = DECODERS[name]
    fragments = ["one", " two", "\n", "né", "你好", "😀", "-", " ", "o", "Question:", "x"]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=30)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Tokens in another order hold parts of characters, and characters that begin anywhere.
    if data.draw(st.booleans()):
        ids = data.draw(st.permutations(ids))
    stop = data.draw(
        st.lists(
            st.sampled_from(
                [
                    "one",
                    "e t",
                    "two\n",
                    "\n\n",
                    "é",
                    "né",
                    "你好😀",
                    "好",
                    "😀",
                    "Question:",
                    " ",
                    "o-",
                    "one two one two",
                ]
            ),
            min_size=1,
            max_size=3,
        )
    )
    assert searched(StopStrings(stop, text_of), ids) == naive(stop, text_of, ids)


def test_by_hand() -> None:
    tokenizer = tiny_tokenizer()
    strings = StopStrings(["b", "ab"], tokenizer.decode)
    ids = tokenizer("xab", add_special_tokens=False)["input_ids"]
    assert strings.text_before(ids) == "x"  # of two, the one that begins first
    assert strings.text_before(ids[:2]) is None
    again = tokenizer("ab ab", add_special_tokens=False)["input_ids"]
    assert strings.text_before(again[:2], least=2) is None
    assert [strings.text_before(again[:length], least=2) for length in (3, 4, 5)] == [None, None, "ab "]
    # Completed by the third token: it counts, though it began before.
    assert StopStrings(["ab "], tokenizer.decode).text_before(again[:3], least=2) == ""
    # A character whose first bytes are among those tokens is completed behind them.
    letter = tokenizer("aé", add_special_tokens=False)["input_ids"]
    assert StopStrings(["é"], tokenizer.decode).text_before(letter, least=2) == "a"
    assert StopStrings(["é"], tokenizer.decode).text_before(letter, least=3) is None
    assert (
        StopStrings(["<|tool|>"], tokenizer.decode).text_before([*ids, tokenizer.convert_tokens_to_ids("<|tool|>")])
        == "xab"
    )


def test_the_work_per_token_does_not_grow() -> None:
    decoded = 0
    tokenizer = tiny_tokenizer()

    def counted(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(tokenizer.decode(ids))

    strings = StopStrings(["\nQuestion:", "é"], counted)
    ids = tokenizer("Answer: : 😀 " * 200, add_special_tokens=False)["input_ids"]
    for length in range(1, len(ids) + 1):
        assert strings.text_before(ids[:length]) is None
    assert decoded < 60 * len(ids)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(tiny_model(), tiny_tokenizer())


def test_completions_end_at_stop_strings_and_ids(policy: PolicyModel) -> None:
    batch = prompt_batch(policy, ["a", [{"role": "user", "content": "hi"}]])
    options = {"max_new_tokens": 60, "temperature": 1.0}
    free = Engine(policy, seed=3).generate(batch, 12, SamplingConfig(**options))
    stop = ["e", "9", "é"]
    stopped = Engine(policy, seed=3).generate(batch, 12, SamplingConfig(stop=stop, **options))
    reasons = set()
    decode = policy.tokenizer.decode
    for group, without in zip(stopped, free, strict=True):
        for one, whole in zip(group, without, strict=True):
            reasons.add(one.stop_reason)
            ended = whole.stop_reason == "end"  # the text of an end token is no part of the completion's
            found = naive(stop, decode, whole.ids[: len(whole.ids) - ended])
            if found is None:
                assert one == whole  # one that is never met is no error
                continue
            length, text = found
            assert (one.text, one.stop_reason, one.ids) == (text, "stop", whole.ids[:length])
            assert one.logprobs == pytest.approx(whole.logprobs[:length])
    assert {"stop", "end"} <= reasons
    ids = policy.tokenizer.convert_tokens_to_ids(["e", "9"])
    for group in Engine(policy, seed=3).generate(batch, 12, SamplingConfig(stop_ids=ids, **options)):
        for one in group:
            assert (one.ids[-1] in ids) == (one.stop_reason == "stop") and not set(ids) & set(one.ids[:-1])
            assert one.text == policy.tokenizer.decode(one.ids[: len(one.ids) - (one.stop_reason != "length")])


def test_no_end_before_the_least_number_of_tokens(policy: PolicyModel) -> None:
    end = policy.tokenizer.eos_token_id
    with_end = SamplingConfig(min_new_tokens=9, max_new_tokens=200, stop_ids=[100], stop="e")
    drawn = Engine(policy, seed=0).generate(prompt_batch(policy, ["a"]), 40, with_end)[0]
    assert all(len(one.ids) > 9 for one in drawn)
    assert not {end, 100} & {token for one in drawn for token in one.ids[:9]}
    assert {one.stop_reason for one in drawn} == {"end", "stop"}
    assert any("e" in one.text for one in drawn)
    # What barring takes from the distribution is in the kept mass, as what truncation takes.
    assert all(max(one.kept_mass[:9]) < 1 and min(one.kept_mass[9:]) == 1 for one in drawn)


def test_without_stop_strings_nothing_is_decoded(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopStrings, "text_before", lambda *_: pytest.fail("searched"))
    Engine(policy, seed=0).generate(prompt_batch(policy, ["a"]), 2, SamplingConfig(max_new_tokens=4))
