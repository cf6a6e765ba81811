"""Low-rank adapters through peft."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean, first_line, nearest

log = logging.getLogger(__name__)


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze a model and give it fresh adapters, which change nothing until they are trained.

    Which modules a target names is for peft to say. Adapters are kept in float32 whatever the base is stored in.

    Raises:
        ConfigError: peft takes no such target, or one of several names nothing in the model.
    """
    adapted = _adapted(model, _settings(model, config))
    found = _adapted_names(adapted)
    log.info("adapters on %s", ", ".join(f"{leaf} ({n})" for leaf, n in sorted(Counter(map(_short, found)).items())))
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return adapted


def _settings(model: nn.Module, config: LoraConfig) -> Any:
    """Return peft's configuration of an adapter for a model."""
    import peft

    modules, parameters = _targets(model, config)
    names = [name for name, _ in model.named_modules()]
    excluded = _by_name(config.exclude_modules, "lora.exclude_modules")
    if modules == "all-linear" and (unsuited := _unsuited(model)):
        if isinstance(excluded, str):
            excluded = [name for name in names if re.fullmatch(excluded, name)]
        excluded = [*excluded, *unsuited]
    if missing := _unmatched(config.modules_to_save, names):
        raise _no_such(model, missing, names, "lora.modules_to_save")
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=excluded or None,
        modules_to_save=config.modules_to_save or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION",
    )


def _adapted(model: nn.Module, settings: Any) -> Any:
    """Return peft's model, or raise a ConfigError where a target names nothing that it put an adapter on."""
    import peft

    modules, parameters = settings.target_modules, list(settings.target_parameters or [])
    names = [name for name, _ in model.named_modules()]
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by its old name, and warns of what folding tied embeddings would do,
            # which isn't folded blindly here: nothing that a user could mend.
            for kind in (FutureWarning, UserWarning, RuntimeWarning):
                warnings.simplefilter("ignore", kind)
            adapted: Any = peft.get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise _refused(model, modules, names, error) from error
    if not isinstance(modules, str):
        # Of a mixture whose experts are one tensor each, peft takes the names that they had one by one for parameters.
        kept = adapted.peft_config["default"].target_modules
        converted = set(modules) - set(kept) if adapted.base_model.targeted_parameter_names else set()
        wanted = sorted(set(modules) - converted)
        if missing := _unmatched(wanted, adapted.base_model.targeted_module_names):
            raise _no_such(model, missing, names, "lora.target_modules")
    if missing := _unmatched(parameters, adapted.base_model.targeted_parameter_names):
        every = [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and "lora_" not in name]
        raise _no_such(model, missing, every, "lora.target_parameters")
    return adapted


def _adapted_names(adapted: Any) -> set[str]:
    """Return the modules and parameters that an adapter is on, by their names in the base."""
    return {*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names}


def _short(name: str) -> str:
    """Return a module's own name, and of experts, which are parameters, the end of theirs."""
    return ".".join(name.split(".")[-2:]) if ".experts." in name else name.rpartition(".")[2]


def _targets(model: nn.Module, config: LoraConfig) -> tuple[list[str] | str, list[str]]:
    """Return the modules and the parameters to adapt, as peft takes them.

    A text that can only be a name is one; a name that the model gives a parameter, such as an expert projection, is that.
    """
    modules = _by_name(config.target_modules, "lora.target_modules")
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
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    # Routers compute in float32 whatever their weights are held in.
    return bool((found.float() - expected.float()).norm() <= 1e-2 * expected.float().norm())


def _by_name(targets: list[str] | str, place: str) -> list[str] | str:
    """Return a text that can only be names, between commas, as their list; another is `all-linear` or a regular expression.

    Raises:
        ConfigError: the text is no regular expression.
    """
    if not isinstance(targets, str):
        return targets
    if targets.lower() == "all-linear" and place == "lora.target_modules":
        return "all-linear"
    names = [name.strip() for name in targets.split(",") if name.strip()]
    if names and all(re.fullmatch(r"[\w.-]+", name) for name in names):
        return names
    try:
        re.compile(targets)
    except re.error as error:
        fix = "write names in a list, or an expression of whole names such as `.*\\.(q|v)_proj`"
        raise ConfigError(f"`{targets}` is no regular expression", place=place, got=str(error), fix=fix) from None
    return targets


def _unmatched(wanted: Sequence[str], names: Iterable[str]) -> str | None:
    """Return the first wanted name that is no name, nor the end of one."""
    ends = [f".{name}" for name in names]
    return next((name for name in wanted if not any(end.endswith(f".{name}") for end in ends)), None)


def _no_such(model: nn.Module, missing: str, names: Iterable[str], place: str) -> ConfigError:
    leaves = {part for name in names if (part := name.rsplit(".", 1)[-1]) and not part.isdigit()}
    ends = {".".join(name.split(".")[-2:]) for name in names}
    near = did_you_mean(missing.rsplit(".", 1)[-1] if missing not in leaves else missing, leaves)
    if "." in missing and (closest := nearest(missing, ends)):
        near = f"did you mean `{closest}`?"
    parameters = place.endswith("parameters")
    if place == "lora.target_modules" and (experts := _expert_parameters(model)):
        near = "; ".join(filter(None, [near, f"experts are parameters here: {experts}"]))
    return ConfigError(f"the model has no {'parameter' if parameters else 'module'} `{missing}`", place=place, fix=near)


def _expert_parameters(model: nn.Module) -> str:
    """Return the option that targets a mixture's experts where they are stacked in parameters; empty where they aren't."""
    stacks = {
        ".".join(name.replace(".base_layer", "").split(".")[-3:])
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in name and "lora_" not in name
    }
    return f"`lora.target_parameters: [{', '.join(sorted(stacks))}]`" if stacks else ""


def _refused(model: nn.Module, modules: Iterable[str] | str, names: list[str], error: Exception) -> ConfigError:
    """Return peft's refusal as an error that names the option."""
    if not isinstance(modules, str) and "without also targeting" not in str(error):
        missing = _unmatched(sorted(modules), names)
        if missing is not None:
            return _no_such(model, missing, names, "lora.target_modules")
    if option := re.search(r"ParamWrapper does not work with (lora_dropout|use_dora)", str(error)):
        setting = {"lora_dropout": "lora.dropout: 0", "use_dora": "lora.use_dora: false"}[option[1]]
        return ConfigError(
            "peft can't put these adapters on parameters, as experts are here",
            place=setting.partition(":")[0],
            got=first_line(error),
            fix=f"set `{setting}`, or name modules without experts in `lora.target_modules`",
        )
    # A module's description may take many lines.
    kind = re.match(r"Target module (\w+)\(", str(error))
    got = f"a module {kind[1]}, which is not supported" if kind else first_line(error)
    fit = {
        leaf
        for name, module in model.named_modules()
        if (leaf := name.rpartition(".")[2]) and not leaf.isdigit() and getattr(module, "weight", None) is not None
        if module.weight.ndim == 2 and "lora_" not in name and leaf != "base_layer"
    }
    experts = _expert_parameters(model)
    return ConfigError(
        "peft can't put these adapters on the model",
        place="lora",
        got=got,
        fix=f"name modules of the model ({', '.join(sorted(fit)[:12])}) or a regular expression of whole names, or leave some out"
        " by `lora.exclude_modules`" + (f"; experts are parameters here: {experts}" if experts else ""),
    )


def lora_difference(held: Any, wanted: LoraConfig) -> str | None:
    """Return how an adapter's settings differ from the options that were set, in words; None where they don't.

    What its targets stand for in the model is for `target_difference` to compare.
    """
    names = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "use_rslora": "use_rslora",
        "use_dora": "use_dora",
        "init_lora_weights": "init_lora_weights",
    }
    for option in sorted(wanted.model_fields_set & names.keys()):
        if not hasattr(held, names[option]):
            return "no LoRA in the model"
        found, asked = getattr(held, names[option]), getattr(wanted, option)
        if option == "init_lora_weights" and found is True:
            found = "default"
        if found != asked:
            return f"{option} {_said(found)} in the model, {_said(asked)} asked for"
    return None


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | str) or value is None else f"{value:g}"


@dataclass(frozen=True)
class Targets:
    """What options stand for in a model: the modules and parameters that get an adapter, and those trained whole."""

    adapted: frozenset[str]
    whole: frozenset[str]

    @classmethod
    def of(cls, adapted: Any) -> Targets:
        """Return those of a peft model."""
        from peft.utils import ModulesToSaveWrapper

        inside = adapted.get_base_model().named_modules()
        whole = frozenset(name for name, module in inside if isinstance(module, ModulesToSaveWrapper))
        return cls(frozenset(_adapted_names(adapted)), whole)

    def difference(self, wanted: Targets) -> str | None:
        """Return how wanted ones differ from these, in words; None where they don't."""
        pairs = ((self.adapted, wanted.adapted, "an adapter on `{}`"), (self.whole, wanted.whole, "`{}` trained whole"))
        for found, asked, words in pairs:
            if odd := sorted(found ^ asked):
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                where = "in the model, not" if odd[0] in found else "not in the model, but"
                return f"{words.format(odd[0])}{more} {where} asked for"
        return None


def wanted_targets(model: nn.Module, config: LoraConfig) -> Targets | None:
    """Return what the targets that were set stand for in a model without adapters; None where none were set.

    Raises:
        ConfigError: one of them names nothing in the model.
    """
    if not config.model_fields_set & {"target_modules", "exclude_modules", "target_parameters", "modules_to_save"}:
        return None
    # peft itself tells, on a copy without weights; how its updates start and scale takes weights and changes no target.
    settings = dataclasses.replace(
        _settings(model, config), r=1, use_dora=False, use_rslora=False, init_lora_weights=True
    )
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():  # quantised
            memo[id(module)] = nn.Linear(module.in_features, module.out_features, device="meta")
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return Targets.of(_adapted(copy.deepcopy(model, memo), settings))


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
