"""The options that every kind of model is loaded with: `from_pretrained(path, **options)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean
from rlhf_core.models.attention import Kernel
from rlhf_core.models.precision import Precision, frozen_dtype_of
from rlhf_core.models.saved_adapters import AdapterUse
from rlhf_core.models.sequence_model import SequenceModel
from rlhf_core.models.shared_forward import LayoutName


class LoadOptions(TypedDict, total=False):
    """Options of every `from_pretrained`. Those that `TrainerConfig` has too mean what it says."""

    device: str | torch.device | None
    """Device that the model is moved to; None leaves it on the CPU."""
    frozen: bool
    """Whether the model is only read: no parameter is trained, all are held in the frozen dtype, and dropout is off."""
    trust_remote_code: bool
    lora: LoraConfig | None
    new_tokens: Sequence[str]
    adapter: AdapterUse
    precision: str
    frozen_precision: Precision
    save_precision: Precision
    attention: Kernel
    gradient_checkpointing: bool
    compile: bool
    layout: LayoutName
    share_prompts: bool


_FOR_READING = ("trust_remote_code", "adapter", "lora", "frozen")
"""Options that count while weights are read."""
_NOT_FOR_BACKBONES = ("trust_remote_code", "adapter", "frozen", "device")
"""Options of the whole model, which aren't passed on to each backbone."""


def reading_options(options: LoadOptions, *, may_be_quantised: bool = True) -> dict[str, Any]:
    """Check options and return the arguments of `load_model` that follow from them.

    Args:
        may_be_quantised: whether this kind of model may use a quantised base.

    Raises:
        TypeError: there is no option of that name.
        ConfigError: a new adapter, or a quantised base, where there can be none.
    """
    known = LoadOptions.__annotations__
    if unknown := next((name for name in options if name not in known), None):
        hint = did_you_mean(unknown, known)
        raise TypeError(
            f"from_pretrained() got an unexpected keyword argument {unknown!r}" + (f"; {hint}" * bool(hint))
        )
    if not may_be_quantised:
        refuse_quantised(options.get("lora"))
    if options.get("frozen") and options.get("lora") is not None:
        raise ConfigError(
            "a model that is only read gets no new adapter", place="lora", fix="leave `lora` or `frozen` out"
        )
    frozen_dtype = frozen_dtype_of(options.get("precision", "float32"), options.get("frozen_precision", "auto"))
    return {name: value for name, value in options.items() if name in _FOR_READING} | {"frozen_dtype": frozen_dtype}


def apply_load_options(model: nn.Module, backbones: Sequence[SequenceModel], options: LoadOptions) -> None:
    """Move a model just loaded to its device, freeze it where it is only read, and set the options of its backbones."""
    if (device := options.get("device")) is not None:
        model.to(device)
    if options.get("frozen"):
        model.requires_grad_(False).eval()
    of_backbones: dict[str, Any] = {"frozen_precision": "auto"}
    of_backbones |= {name: value for name, value in options.items() if name not in _NOT_FOR_BACKBONES}
    for backbone in backbones:
        backbone.set_options(**of_backbones)


def refuse_quantised(lora: LoraConfig | None) -> None:
    """Raise `ConfigError` for a quantised base: the export has the adapter merged in, which would be rounded to 4 or 8 bits."""
    if lora is not None and lora.quantize != "none":
        raise ConfigError(
            "reward and value models can't be trained on a quantised base",
            place="lora.quantize",
            got=lora.quantize,
            fix="set `lora.quantize: none`",
        )
