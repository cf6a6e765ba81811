"""The options that every kind of model is loaded with, in one place: `from_pretrained(path, **options)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean
from rlhf_core.models.adapters import AdapterUse
from rlhf_core.models.attention import Kernel
from rlhf_core.models.precision import Precision, frozen_dtype
from rlhf_core.models.sequence_model import LayoutName, SequenceModel


class LoadOptions(TypedDict, total=False):
    """Options of every `from_pretrained`. Those that `TrainerConfig` has too do what it says."""

    device: str | torch.device | None
    """Where the model is put; None leaves it on the host."""
    frozen: bool
    """Whether the model is only read: nothing in it is trained, all weights are held as frozen ones are, and dropout is off."""
    trust_remote_code: bool
    lora: LoraConfig | None
    adapter: AdapterUse
    precision: str
    frozen_precision: Precision
    save_precision: Precision
    attention: Kernel
    gradient_checkpointing: bool
    compile: bool
    layout: LayoutName
    share_prompts: bool


_OF_LOADING = ("trust_remote_code", "adapter", "lora", "frozen")
"""What counts while weights are read."""
_OF_THE_WHOLE = ("trust_remote_code", "adapter", "frozen", "device")
"""What no single backbone is given afterwards."""


def loading(options: LoadOptions, *, quantised: bool = True) -> dict[str, Any]:
    """Return what `load_model` needs of the options.

    Args:
        quantised: whether the kind of model may stand on a quantised base.

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
    if not quantised:
        refuse_quantised(options.get("lora"))
    if options.get("frozen") and options.get("lora") is not None:
        raise ConfigError(
            "a model that is only read is given no new adapter", place="lora", fix="leave `lora` or `frozen` out"
        )
    hold = frozen_dtype(options.get("precision", "float32"), options.get("frozen_precision", "auto"))
    return {name: value for name, value in options.items() if name in _OF_LOADING} | {"hold": hold}


def settle(model: nn.Module, backbones: Sequence[SequenceModel], options: LoadOptions) -> None:
    """Put a model that was loaded just now on its device, freeze it where it is only read, and set up its backbones."""
    if (device := options.get("device")) is not None:
        model.to(device)
    if options.get("frozen"):
        model.requires_grad_(False).eval()
    rest: dict[str, Any] = {"frozen_precision": "auto"}
    rest |= {name: value for name, value in options.items() if name not in _OF_THE_WHOLE}
    for backbone in backbones:
        backbone.set_options(**rest)


def refuse_quantised(lora: LoraConfig | None) -> None:
    """Refuse a quantised base: what is exported has the adapter merged in, and would be rounded to 4 or 8 bits again."""
    if lora is not None and lora.quantize != "none":
        raise ConfigError(
            "reward and value models aren't trained on a quantised base",
            place="lora.quantize",
            got=lora.quantize,
            fix="set `lora.quantize: none`",
        )
