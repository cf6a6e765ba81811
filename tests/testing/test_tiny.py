import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core.testing.tiny import SPECIAL_TOKENS, VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_tokenizer_has_distinct_special_tokens_and_fits_the_model() -> None:
    assert len(TOKENIZER) == VOCAB_SIZE == tiny_model().config.vocab_size
    ids = (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert ids == (0, 1, 2)
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert set(TOKENIZER.all_special_tokens) == set(SPECIAL_TOKENS)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_every_text_survives_a_round_trip_one_token_a_byte(text: str) -> None:
    if any(token in text for token in SPECIAL_TOKENS):
        return
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_bos_is_added_to_text_and_stands_once_in_a_chat() -> None:
    assert TOKENIZER("ab").input_ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.bos_token_id not in tiny_tokenizer(add_bos=False)("ab").input_ids
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    ids = TOKENIZER.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.decode(ids) == "<|bos|><|user|>hi<|end|><|assistant|>yo<|end|>"


def test_chat_prompt_is_a_prefix_of_the_whole_chat() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    prompt = TOKENIZER.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert whole == prompt + "yo<|end|>"


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(Exception, match="unknown role judge"):
        TOKENIZER.apply_chat_template([{"role": "judge", "content": "hi"}])


def test_base_tokenizer_has_no_chat_template() -> None:
    assert tiny_tokenizer(chat_template=False).chat_template is None


def test_model_depends_on_the_seed_alone_and_leaves_the_global_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny_model(3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = tiny_model(3).state_dict(), tiny_model(4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@pytest.mark.parametrize("tie", [True, False])
def test_saved_directory_loads_to_the_same_logits(tmp_path, tie: bool) -> None:
    path = save_tiny(tmp_path / "tiny", seed=5, tie_embeddings=tie)
    assert (path / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer("17+25=").input_ids])
    assert ids.tolist() == [TOKENIZER("17+25=").input_ids]
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token == "<|end|>"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(5, tie_embeddings=tie)(ids).logits)
