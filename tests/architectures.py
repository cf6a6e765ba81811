"""Every causal language model of the installed transformers, made tiny by rules: a small value for each size that a configuration
has, whatever it is called, and a few exceptions for what must fit together."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from rlhf_core.contracts.batch import Batch
from rlhf_core.testing.tiny import VOCAB_SIZE

SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB_SIZE + 1),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim_model", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dim_ff", "dff", "encoder_ffn_dim", "decoder_ffn_dim",
         "ffn_hidden_size", "intermediate_size_mlp", "mamba_d_ssm"), 64,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_encoder_layers", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_tok",
         "num_experts_per_token", "top_k_experts", "num_key_value_heads", "num_kv_heads", "linear_num_key_heads",
         "mamba_expand", "kv_n_heads"), 2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads",
         "time_step_rank", "mamba_dt_rank", "conv_kernel", "laurel_rank", "rotary_dim"), 4,
    ),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "dim_head", "kv_channels", "kv_lora_rank", "qk_rope_head_dim",
         "qk_nope_head_dim", "v_head_dim", "state_size", "ssm_state_size", "mamba_d_state", "mamba_n_heads",
         "mamba_num_heads", "mamba_d_head", "mamba_headdim", "mamba_head_dim", "linear_key_head_dim",
         "linear_value_head_dim", "hidden_size_per_layer_input", "index_head_dim", "index_topk"), 8,
    ),
    **dict.fromkeys(("q_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "router_hidden_size"), 32
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "mamba_ngroups", "mamba_n_groups",
                     "n_groups", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "window_size"), 64),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
ALWAYS = ("num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")
"""Set even where a configuration's default is none."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{
        name: {"num_key_value_heads": 4}
        for name in ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
                     "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu")
    },
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{name: {"is_decoder": True} for name in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl")},
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_head": 8, "mamba_n_heads": 8, "mamba_d_ssm": 64},
    "rembert": {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 48},
    "roc_bert": {"is_decoder": True, "pronunciation_vocab_size": 32, "shape_vocab_size": 32},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "bailing_hybrid": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3": {"vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                                 "image_size": 32, "patch_size": 16}, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "qk_dim_factor": 1.0, "mode": "train", "return_last_states": False},
    "xlm": {"emb_dim": 32, "n_words": VOCAB_SIZE + 1, "causal": True},
}  # fmt: skip


def kinds() -> list[str]:
    """Return the model types that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def most_parameters(kind: str) -> int:
    """Return how many parameters `make_tiny` would make, without making them."""
    architecture, config = _described(kind, {})
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in architecture(config).parameters())


def make_tiny(kind: str, seed: int = 0, **options: Any) -> Any:
    """Return a random model of a model type, in evaluation mode, its weights larger than at initialisation.

    Args:
        kind: a model type of transformers, such as `llama`.
        options: values of its configuration.

    At initialisation attention is so even, and logits are so small, that most mistakes would hide.
    """
    architecture, config = _described(kind, options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = architecture(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in name for part in ("A_log", "conv", "embed", "wte", "shared.")):
                parameter.mul_(3)
    return model


@torch.no_grad()
def own_logps(network: Any, batch: Batch) -> torch.Tensor:
    """Return (R, T) log-probabilities by transformers alone, each response in a forward pass of its own, without a cache."""
    out = torch.zeros(batch.loss_mask.shape)
    for r in range(batch.num_responses):
        owner, length = int(batch.owner[r]), int(batch.response_lengths[r])
        prompt = int(batch.prompt_lengths[owner])
        ids = torch.cat([batch.prompt_ids[owner, :prompt], batch.response_ids[r, :length]])
        logps = network.eval()(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        out[r, :length] = logps[prompt - 1 : -1].gather(1, ids[prompt:, None]).squeeze(1)
    return out.where(batch.loss_mask, 0.0)


def _described(kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the class and the tiny configuration of a model type."""
    config = _shrunk(CONFIG_MAPPING[kind], EXCEPTIONS.get(kind, {}) | options)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if architecture.config_class is not type(config):
        config = config.get_text_config()
    return architecture, config


def _shrunk(config: type, over: dict[str, Any], depth: int = 0) -> Any:
    own = vars(config())
    values: dict[str, Any] = {
        name: size for name, size in SIZES.items() if name in own and (own[name] is not None or name in ALWAYS)
    }
    for name, value in own.items():
        if name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types") and value:
            kinds = list(dict.fromkeys(value))
            values[name] = (kinds * 2)[: max(2, len(kinds))]
            depths = ("num_hidden_layers", "n_layer", "n_layers")
            values |= {depth: max(values[depth], len(values[name])) for depth in depths if depth in values}
    for name, inner in getattr(config, "sub_configs", {}).items():
        if own.get(name) is not None and hasattr(inner, "model_type") and depth < 2:
            values[name] = _shrunk(type(own[name]), {}, depth + 1).to_dict()
    return config(**{**values, **over})
