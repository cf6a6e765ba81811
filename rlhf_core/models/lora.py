"""Low-rank adapters through peft."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rlhf_core.config import LoraConfig
from rlhf_core.errors import ConfigError, did_you_mean, nearest
from rlhf_core.infra.model_files import first_line

log = logging.getLogger(__name__)


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze a model and give it fresh adapters, which change nothing until they are trained.

    Which modules a target names is for peft to say. Adapters are kept in float32 whatever the base is stored in.

    Raises:
        ConfigError: peft takes no such target, or one of several names nothing in the model.
    """
    import peft

    modules, parameters = _targets(model, config)
    excluded = _by_name(config.exclude_modules) or None
    if modules == "all-linear" and excluded is None:
        excluded = _unsuited(model) or None
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=excluded,
        modules_to_save=config.modules_to_save or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION",
    )
    names = [name for name, _ in model.named_modules()]
    if missing := _unmatched(config.modules_to_save, names):
        raise _no_such(missing, names, "lora.modules_to_save")
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by its old name, and warns of what folding tied embeddings would do,
            # which isn't folded blindly here: nothing that a user could mend.
            for kind in (FutureWarning, UserWarning, RuntimeWarning):
                warnings.simplefilter("ignore", kind)
            adapted = peft.get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise _refused(modules, names, error) from error
    if isinstance(modules, list) and (missing := _unmatched(modules, adapted.base_model.targeted_module_names)):
        raise _no_such(missing, names, "lora.target_modules")
    if missing := _unmatched(parameters, adapted.base_model.targeted_parameter_names):
        every = [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and "lora_" not in name]
        raise _no_such(missing, every, "lora.target_parameters")
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return adapted


def _targets(model: nn.Module, config: LoraConfig) -> tuple[list[str] | str, list[str]]:
    """Return the modules and the parameters to adapt, as peft takes them.

    A text that can only be a name is one; a name that the model gives a parameter, such as an expert projection, is that.
    """
    modules = config.target_modules if config.target_modules == "all-linear" else _by_name(config.target_modules)
    if isinstance(modules, str):
        return modules, list(config.target_parameters)
    names = [name for name, _ in model.named_modules()]
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    as_parameters = [name for name in modules if _unmatched([name], names) and not _unmatched([name], matrices)]
    parameters = list(config.target_parameters)
    for short in as_parameters:
        found = sorted({".".join(name.split(".")[-3:]) for name in matrices if f".{name}".endswith(f".{short}")})
        log.info("`%s` is no module but a parameter: an adapter is put on %s", short, ", ".join(found))
        parameters += found
    return [name for name in modules if name not in as_parameters], parameters


def _unsuited(model: nn.Module) -> list[str]:
    """Return the linear layers that can't take an adapter, which `all-linear` does without.

    These are layers that do more than multiply, such as routers that return choices, and the output of state-space mixers,
    whose weight kernels read past any adapter.
    """
    from transformers import PreTrainedModel

    code = {type(module).__module__ for module in model.modules() if isinstance(module, PreTrainedModel)}
    found = []  # Quantised layers have code of their own too, but a library's.
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parent, _, leaf = name.rpartition(".")
        own = type(module).forward is not nn.Linear.forward and type(module).__module__ in code
        mixer = model.get_submodule(parent)
        if (own and not _is_product(module)) or (
            leaf == "out_proj" and hasattr(mixer, "A_log") and hasattr(mixer, "D")
        ):
            found.append(name)
    if found:
        log.info(
            "no adapters on %s, which can't take any", ", ".join(sorted({name.rpartition(".")[2] for name in found}))
        )
    return found


@torch.no_grad()
def _is_product(module: nn.Linear) -> bool:
    """Tell whether a layer gives the product of its input and weight, and its bias, by trying it."""
    inputs = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    try:
        found = module(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = nn.functional.linear(inputs, module.weight, module.bias)
    return (
        isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2)
    )


def _by_name(targets: list[str] | str) -> list[str] | str:
    """Return a text that can only be a name as a list of one; another text is a regular expression."""
    return [targets] if isinstance(targets, str) and re.fullmatch(r"[\w.-]+", targets) else targets


def _unmatched(wanted: Sequence[str], names: Iterable[str]) -> str | None:
    """Return the first wanted name that is no name, nor the end of one."""
    ends = [f".{name}" for name in names]
    return next((name for name in wanted if not any(end.endswith(f".{name}") for end in ends)), None)


def _no_such(missing: str, names: Iterable[str], place: str) -> ConfigError:
    leaves = {part for name in names if (part := name.rsplit(".", 1)[-1]) and not part.isdigit()}
    ends = {".".join(name.split(".")[-2:]) for name in names}
    near = did_you_mean(missing.rsplit(".", 1)[-1] if missing not in leaves else missing, leaves)
    if "." in missing and (closest := nearest(missing, ends)):
        near = f"did you mean `{closest}`?"
    what = "parameter" if place.endswith("parameters") else "module"
    return ConfigError(f"the model has no {what} `{missing}`", place=place, fix=near)


def _refused(modules: list[str] | str, names: list[str], error: Exception) -> ConfigError:
    """Return peft's refusal as an error that names the option."""
    if isinstance(modules, list) and (missing := _unmatched(modules, names)):
        return _no_such(missing, names, "lora.target_modules")
    leaves = sorted({part for name in names if (part := name.rsplit(".", 1)[-1]) and not part.isdigit()})
    return ConfigError(
        "peft can't put these adapters on the model",
        place="lora",
        got=first_line(error),
        fix=f"name modules of the model ({', '.join(leaves[:12])}) or a regular expression of whole names, or leave some out"
        " by `lora.exclude_modules`",
    )


def lora_difference(held: Any, wanted: LoraConfig) -> str | None:
    """Return how an adapter differs from the options that were set for one, in words; None where it doesn't."""
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    for option in sorted(wanted.model_fields_set & names.keys()):
        found, asked = getattr(held, names[option], None), getattr(wanted, option)
        if found != asked:
            return (
                f"{option} {found:g} in the model, {asked:g} asked for" if found is not None else "no LoRA in the model"
            )
    return None


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
