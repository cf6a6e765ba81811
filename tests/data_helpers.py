"""Rows, files and tokenizers that tests of data share."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with merges, ChatML and pad equal to eos, as SmolLM2 and Qwen have them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["system user assistant What is the answer to the question? The answer is two.\n"] * 20, trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks the beginning of every text with a space and adds `<s>`, as Llama 2's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127)]
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", "▁", "\n", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
        "{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_as(rows: Sequence[Any], folder: Path, form: str) -> Path:
    """Write rows as `jsonl`, `gz`, `zst` or `parquet` and return the path."""
    if form == "parquet":
        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
        return path
    path = folder / ("rows.jsonl" if form == "jsonl" else f"rows.jsonl.{form}")
    if form == "zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines(rows))
    else:
        path.write_bytes(gzip.compress(lines(rows)) if form == "gz" else lines(rows))
    return path


def gsm8k() -> Path:
    """Return the folder of the GSM8K records, or skip the test."""
    root = os.environ.get("RLHF_DATA") or Path(__file__).parents[2] / "shared" / "data"
    folder = Path(root) / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"no GSM8K records in {folder} (set RLHF_DATA to their parent folder)")
    return folder


def sft_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + {i}?", "response": f"It is {2 * i}." + "!" * (i % 5)} for i in range(count)]


def in_words(tokenizer: PreTrainedTokenizerFast, row: Any) -> list[str]:
    """Return each response of an encoded row behind its prompt, as text; what is in the loss stands between « and »."""
    texts = []
    for ids, mask in zip(row.responses or [[]], row.masks or [[]], strict=True):
        text = tokenizer.decode(row.prompt_ids)
        for number, (token, learned) in enumerate(zip(ids, mask, strict=True)):
            before = number > 0 and mask[number - 1]
            text += "«" * (learned and not before) + "»" * (before and not learned) + tokenizer.decode([token])
        texts.append(text + "»" * bool(mask and mask[-1]))
    return texts
