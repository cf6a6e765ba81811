"""A response continues its prompt in text as it does in a chat: what is trained is the two texts end to end, no space between."""

from __future__ import annotations

import pytest
from data_helpers import bpe_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_core.data.encoder import Encoder
from rlhf_core.data.open_source import open_source

LETTERS = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(33, 127)), "▁4", "▁a", "=4"])}
MERGES = [("▁", "4"), ("▁", "a"), ("=", "4")]


def sentencepiece(scheme: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama's: `legacy` marks a text's beginning in the normaliser, the others in the pre-tokenizer."""
    backend = Tokenizer(models.BPE(vocab=LETTERS, merges=MERGES, unk_token="<unk>"))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def collapsing() -> PreTrainedTokenizerFast:
    """Return a unigram tokenizer that takes a newline for a space and drops what a text begins with, as XGLM's does."""
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((token, -1.0) for token in LETTERS if len(token) <= 2 and token != "\n")]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace("\n", " "), normalizers.Strip(left=True, right=False)]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


KINDS = {
    "first": sentencepiece("first"),
    "always": sentencepiece("always"),
    "never": sentencepiece("never"),
    "legacy": sentencepiece("legacy"),
    "gemma": sentencepiece("gemma"),
    "collapsing": collapsing(),
    "byte-level": bpe_tokenizer(),
}
PAIRS = [("2+2=", "4"), ("f(x", ")"), ("Answer: ", "4"), ("Answer:", " 4"), ("a\n", "a"), ("a", "\na"), ("x=", "4a")]


def row(kind: str, values: dict, record: str = "sft"):
    return Encoder(KINDS[kind], record).encode(list(open_source([values]).rows()))[0].row


def text(kind: str, ids: list[int]) -> str:
    return KINDS[kind].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "response"), PAIRS)
def test_prompt_and_response_are_trained_end_to_end(kind, prompt, response):
    pair = row(kind, {"prompt": prompt, "response": response})
    whole = KINDS[kind](prompt + response)["input_ids"]
    if kind == "collapsing":
        prompt, response = prompt.replace("\n", " "), response.replace("\n", " ")
    assert text(kind, pair.prompt_ids + pair.responses[0]).lstrip() == prompt + response
    # The prompt's own tokens are what a sampler meets, whatever answers it.
    assert pair.prompt_ids == row(kind, {"prompt": prompt}, "prompt").prompt_ids
    if not (prompt.endswith("=") and response.startswith("4")) and not prompt.endswith(" ") and kind != "byte-level":
        assert pair.prompt_ids + pair.responses[0][:-1] == whole


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_labelled_rows_too(kind):
    pair = row(kind, {"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "preference")
    assert [text(kind, pair.prompt_ids + ids).lstrip() for ids in pair.responses] == ["2+2=4", "2+2=5"]
    labelled = row(kind, {"prompt": "2+2=", "response": "4", "label": "desirable"}, "unpaired")
    assert labelled.responses[0] == pair.responses[0]


def test_the_answer_to_an_empty_prompt_begins_a_text():
    assert row("first", {"prompt": "", "response": "4"}).responses[0] == KINDS["first"]("4")["input_ids"] + [2]
