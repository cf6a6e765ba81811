"""A GGUF file is a model like any other: its weights, its tokenizer, its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import TOKENS, write_gguf

from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import CHAT_TEMPLATE, tiny_model

pytest.importorskip("gguf")
IDS = torch.tensor([[1, 40, 50, 60, 70, 263]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("quantised", "most"), [(False, 1e-6), (True, 0.3)])
def test_its_weights_are_read(tmp_path: Path, quantised: bool, most: float) -> None:
    model = tiny_model(vocab_size=len(TOKENS))
    policy = PolicyModel.from_pretrained(write_gguf(tmp_path / "model.gguf", model, quantised=quantised))
    assert (logits(policy.network) - logits(model)).abs().max() < most
    policy.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(PolicyModel.from_pretrained(tmp_path / "saved").network), logits(policy.network))


@pytest.mark.parametrize("tokens", [TOKENS, [*TOKENS, "<|endoftext|>"]], ids=["without it", "with it"])
def test_its_tokenizer_has_the_tokens_of_the_file_alone(tmp_path: Path, tokens: list[str]) -> None:
    """transformers adds `<|endoftext|>` to a vocabulary that lacks it, as that of Llama 3 does: a token without an embedding."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(vocab_size=len(tokens)), tokens=tokens)
    policy = PolicyModel.from_pretrained(path)
    tokenizer = policy.tokenizer
    assert len(tokenizer) == len(tokens) and tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    ids = tokenizer("this Ü 😀")["input_ids"]
    assert ids[0] == tokens.index("th") and tokenizer.decode(ids) == "this Ü 😀"
    assert tokenizer("<|user|>hi<|end|>")["input_ids"][:1] == [4]
    shown = tokenizer.decode(tokenizer("<|endoftext|>")["input_ids"])
    assert shown == "<|endoftext|>" and max(tokenizer(shown)["input_ids"]) < len(tokens)
    (one,), (two,) = policy.generate([[{"role": "user", "content": "Hi"}], "this"], max_new_tokens=5, seed=0)
    assert 0 < len(one.ids) <= 5 and 0 < len(two.ids) <= 5
