"""Models with random weights in the shapes of real ones, and random rows: a benchmark's inputs where nothing can be fetched."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # Of SmolLM2-135M and of Llama 3.2 1B.
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
LENGTHS = {"135m": (55, 105), "1b": (55, 105), "tiny": (12, 16)}
"""Median tokens of prompts and responses: about those of GSM8K, and few for the tiny model."""
SPREAD = (0.37, 0.48)
"""Standard deviation of the logarithm of both, GSM8K's in characters."""
SPECIAL = ("<pad>", "<s>", "</s>")


def save_model(directory: Path, shape: str) -> Path:
    """Return the path of a random Llama model whose tokenizer splits at blanks; write it where it doesn't exist yet."""
    if directory.is_dir():
        return directory
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = SHAPES[shape]["vocab_size"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *_words(size)])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    # Another process never finds half a model.
    partial = directory.with_name(f"{directory.name}.{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(directory)
    except OSError:
        shutil.rmtree(partial)
    return directory


def make_rows(method: str, shape: str, count: int) -> list[dict[str, Any]]:
    """Return rows of random words, the same for the same arguments: prompts with a response, a pair, or a labelled response."""
    draw = random.Random(f"{method} {shape}")
    words = _words(SHAPES[shape]["vocab_size"])

    def text(kind: int) -> str:
        length = round(LENGTHS[shape][kind] * draw.lognormvariate(0, SPREAD[kind]))
        return " ".join(
            words[min(int(draw.expovariate(8) * len(words)), len(words) - 1)] for _ in range(max(length, 2))
        )

    rows = []
    for number in range(count):
        row: dict[str, Any] = {"prompt": text(0)}
        if method in ("dpo", "reward_model"):
            row |= {"chosen": " " + text(1), "rejected": " " + text(1)}
        else:
            row["response"] = " " + text(1)
        if method == "kto":
            row["label"] = ("desirable", "undesirable")[number % 2]
        rows.append(row)
    return rows


def _words(size: int) -> list[str]:
    return [f"w{number}" for number in range(size - len(SPECIAL))]
