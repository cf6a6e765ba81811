"""A language model small enough for any test: a byte-level tokenizer and a random Llama, made in memory.

Nothing is downloaded, and the global random state isn't used, so the same arguments give the same bits.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from rlhf_core.models.policy_model import PolicyModel

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SPECIAL_TOKENS = (PAD, BOS, END, *TURNS)
"""Special tokens, in the order of their ids; the 256 bytes follow."""
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# A turn is `<|role|>` content `<|end|>`; the end of a turn is also the end of a text, as in most chat models.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(*, add_bos: bool = True, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 263 tokens: 7 special ones and one per byte, so that every text survives a round trip.

    Args:
        add_bos: whether encoding text puts `<|bos|>` first, as Llama's tokenizer does. The chat template always writes one, so a
            rendered chat that is encoded as text has two.
        chat_template: whether it has a chat template; a base model's tokenizer has none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *letters))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, vocab[BOS])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(TURNS),
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    seed: int = 0,
    *,
    vocab_size: int = VOCAB_SIZE,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
    max_positions: int = 2048,
    tie_embeddings: bool = True,
) -> LlamaForCausalLM:
    """Return a Llama with random float32 weights that depend on the arguments alone, in evaluation mode.

    Args:
        seed: seed of the weights.
        intermediate: width of the feed-forward layers; three times `hidden` where None.
        max_positions: the longest sequence, in tokens.
        tie_embeddings: whether the output projection is the input embedding.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate or 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_embeddings,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
        # At so small a width, the usual 0.02 makes every layer's output nearly zero, and training hardly starts.
        initializer_range=hidden**-0.5,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.float().eval()


def tiny_policy(seed: int = 0) -> PolicyModel:
    """Return a random policy that ends a text after a few tokens."""
    return copy.deepcopy(_made(seed))


@functools.cache
def _made(seed: int) -> PolicyModel:
    """Return the policy of `tiny_policy`, made once; its end token has a large logit after any byte."""
    import torch

    from rlhf_core.generation.transformers_loop import decoding_of
    from rlhf_core.models.policy_model import PolicyModel

    model, tokenizer = tiny_model(seed, layers=1, max_positions=64, tie_embeddings=False), tiny_tokenizer()
    with torch.no_grad():
        hidden = model.model(torch.arange(7, 263)[None]).last_hidden_state[0].mean(dim=0)
        model.lm_head.weight[tokenizer.eos_token_id] = 3 * hidden / hidden.square().sum()
    policy = PolicyModel(model, tokenizer)
    decoding_of(policy)  # what was found by trying is copied, too
    return policy


def save_tiny(
    path: str | Path, seed: int = 0, *, tokenizer: PreTrainedTokenizerFast | None = None, **model: Any
) -> Path:
    """Write a Hugging Face directory (safetensors, tokenizer, chat template) and return its path.

    `model` are the arguments of `tiny_model`; `tokenizer` is `tiny_tokenizer()` where None.
    """
    path = Path(path)
    tiny_model(seed, **model).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path
