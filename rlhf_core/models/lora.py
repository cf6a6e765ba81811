"""Low-rank adapters through peft."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import nn

from rlhf_core.config import LoraConfig
from rlhf_core.errors import ConfigError, did_you_mean


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze a model and give it fresh adapters, which change nothing until they are trained.

    Adapters are kept in float32 whatever the base is stored in.

    Raises:
        ConfigError: a target module doesn't exist in the model.
    """
    import peft

    if isinstance(config.target_modules, list):
        leaves = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for target in config.target_modules:
            if target not in leaves and target not in dict(model.named_modules()):
                raise ConfigError(
                    f"the model has no module `{target}`", place="lora.target_modules", fix=did_you_mean(target, leaves)
                )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION",
    )
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by its old name: nothing that a user could mend.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return adapted


def quantization(config: LoraConfig | None) -> Any | None:
    """Return transformers' quantisation settings for the frozen base (QLoRA), or None for full weights.

    Raises:
        ConfigError: bitsandbytes isn't installed.
    """
    if config is None or config.quantize == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`lora.quantize: {config.quantize}` needs the package bitsandbytes",
            place="lora.quantize",
            fix='pip install "rlhf-core[qlora]", or set `lora.quantize: none`',
        )
    from transformers import BitsAndBytesConfig

    if config.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
