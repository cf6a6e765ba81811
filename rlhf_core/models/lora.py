"""New LoRA adapters through peft: which modules and parameters the options select, and adapters on them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean, first_line, nearest

log = logging.getLogger(__name__)


def apply_lora(model: nn.Module, config: LoraConfig, *, rows: Mapping[str, list[int]] | None = None) -> nn.Module:
    """Freeze a model and put fresh adapters on it, which change nothing until they are trained; return the peft model.

    peft decides which modules a target selects. Adapters are float32, whatever dtype the base has.

    Args:
        rows: rows of embeddings that are trained beside the adapters, by the full name of their module, unless that is trained
            whole.

    Raises:
        ConfigError: peft can't use a target, or one of several names nothing in the model.
    """
    held = _peft_config(model, config)
    whole = config.modules_to_save
    alone = {name: ids for name, ids in (rows or {}).items() if all(_unmatched([one], [name]) for one in whole)}
    held.trainable_token_indices = alone or None
    adapted = _peft_model(model, held)
    found = _adapter_places(adapted)
    log.info(
        "LoRA adapters on %s", ", ".join(f"{leaf} ({n})" for leaf, n in sorted(Counter(map(_short, found)).items()))
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return adapted


def _peft_config(model: nn.Module, config: LoraConfig) -> Any:
    """Return peft's `LoraConfig` for a model and our options.

    Raises:
        ConfigError: a module to train whole isn't in the model.
    """
    import peft

    modules, parameters = _targets(model, config)
    names = [name for name, _ in model.named_modules()]
    excluded = _names_or_pattern(config.exclude_modules, "lora.exclude_modules")
    if modules == "all-linear" and (unsuited := _unsuited(model)):
        if isinstance(excluded, str):
            excluded = [name for name in names if re.fullmatch(excluded, name)]
        excluded = [*excluded, *unsuited]
    if missing := _unmatched(config.modules_to_save, names):
        raise _unknown_target(model, missing, names, "lora.modules_to_save")
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


def _peft_model(model: nn.Module, peft_config: Any) -> Any:
    """Return the peft model of a model and peft's config.

    Raises:
        ConfigError: peft refuses it, or put no adapter on something that a target names.
    """
    import peft

    modules, parameters = peft_config.target_modules, list(peft_config.target_parameters or [])
    names = [name for name, _ in model.named_modules()]
    try:
        with warnings.catch_warnings():
            # peft reads an attribute of transformers under its old name, and warns of what merging tied embeddings would do,
            # which `fold_adapter` takes care of: a user can't do anything about either.
            for kind in (FutureWarning, UserWarning, RuntimeWarning):
                warnings.simplefilter("ignore", kind)
            adapted: Any = peft.get_peft_model(model, peft_config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise _peft_error(model, modules, names, error) from error
    if not isinstance(modules, str):
        # Where all experts of a layer are one tensor, peft converts the names of their modules into that parameter's.
        kept = adapted.peft_config["default"].target_modules
        converted = set(modules) - set(kept) if adapted.base_model.targeted_parameter_names else set()
        wanted = sorted(set(modules) - converted)
        if missing := _unmatched(wanted, adapted.base_model.targeted_module_names):
            raise _unknown_target(model, missing, names, "lora.target_modules")
    if missing := _unmatched(parameters, adapted.base_model.targeted_parameter_names):
        every = [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and "lora_" not in name]
        raise _unknown_target(model, missing, every, "lora.target_parameters")
    return adapted


def _adapter_places(adapted: Any) -> set[str]:
    """Return the full names, in the base, of the modules and parameters that an adapter is on."""
    return {*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names}


def _short(name: str) -> str:
    """Return the last part of a full name, or its last two for experts: `q_proj`, `experts.gate_up_proj`."""
    return ".".join(name.split(".")[-2:]) if ".experts." in name else name.rpartition(".")[2]


def _targets(model: nn.Module, config: LoraConfig) -> tuple[list[str] | str, list[str]]:
    """Return what to put adapters on, as peft wants it: module names (or a pattern), and parameter names.

    A target that is no module but a matrix of parameters in this model, such as stacked experts, becomes a parameter.
    """
    modules = _names_or_pattern(config.target_modules, "lora.target_modules")
    if isinstance(modules, str):
        return modules, list(config.target_parameters)
    if not modules and not config.target_parameters:
        fix = "name modules, write `all-linear`, or leave the option out"
        raise ConfigError("names no module", place="lora.target_modules", fix=fix)
    names = [name for name, _ in model.named_modules()]
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    as_parameters = [name for name in modules if _unmatched([name], names) and not _unmatched([name], matrices)]
    parameters = list(config.target_parameters)
    for short in as_parameters:
        found = sorted({".".join(name.split(".")[-3:]) for name in matrices if f".{name}".endswith(f".{short}")})
        log.info(
            "`lora.target_modules`: `%s` is a parameter and no module, so the adapter is put on the parameter %s",
            short,
            ", ".join(found),
        )
        parameters += found
    return [name for name in modules if name not in as_parameters], parameters


def _unsuited(model: nn.Module) -> list[str]:
    """Return the full names of linear layers that can't have an adapter, and that `all-linear` leaves out.

    These are layers that do more than multiply, such as routers that return choices, and the output layers of state-space
    mixers, whose kernels read the weight directly.
    """
    from transformers import PreTrainedModel

    code = {type(module).__module__ for module in model.modules() if isinstance(module, PreTrainedModel)}
    found = []  # Quantised layers override `forward` too, but in a library's code.
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
            "`all-linear` leaves out %s, which can't have adapters",
            ", ".join(sorted({name.rpartition(".")[2] for name in found})),
        )
    return found


@torch.no_grad()
def _is_product(module: nn.Linear) -> bool:
    """Tell, by trying it, whether a layer computes input · weightᵀ + bias and nothing else."""
    inputs = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    try:
        found = module(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = nn.functional.linear(inputs, module.weight, module.bias)
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    # Routers compute in float32 even where their weights are narrower.
    return bool((found.float() - expected.float()).norm() <= 1e-2 * expected.float().norm())


def _names_or_pattern(targets: list[str] | str, place: str) -> list[str] | str:
    """Return the list of names that a comma-separated text holds; any other text as it is: `all-linear`, or a regular expression.

    Args:
        place: the option, for the error.

    Raises:
        ConfigError: the text is no regular expression.
    """
    if not isinstance(targets, str):
        # One entry may hold several names, as a flag's value does.
        return [name.strip() for entry in targets for name in entry.split(",") if name.strip()]
    if targets.lower() == "all-linear" and place == "lora.target_modules":
        return "all-linear"
    names = [name.strip() for name in targets.split(",") if name.strip()]
    if names and all(re.fullmatch(r"[\w.-]+", name) for name in names):
        return names
    try:
        re.compile(targets)
    except re.error as error:
        fix = "write names in a list, or an expression of whole names such as `.*\\.(q|v)_proj`"
        raise ConfigError(
            f"`{targets}` is neither names nor a regular expression", place=place, got=str(error), fix=fix
        ) from None
    return targets


def _unmatched(wanted: Sequence[str], names: Iterable[str]) -> str | None:
    """Return the first wanted name that equals none of the full names, nor the end of one after a dot; None where all do."""
    ends = [f".{name}" for name in names]
    return next((name for name in wanted if not any(end.endswith(f".{name}") for end in ends)), None)


def _unknown_target(model: nn.Module, missing: str, names: Iterable[str], place: str) -> ConfigError:
    """Return the error of a target that the model doesn't have, with the nearest name.

    Args:
        names: full names of what it could be. place: the option.
    """
    leaves = {part for name in names if (part := name.rsplit(".", 1)[-1]) and not part.isdigit()}
    ends = {".".join(name.split(".")[-2:]) for name in names}
    if missing.casefold().replace("_", "-") in ("all-linear", "all", "linear") and place == "lora.target_modules":
        return ConfigError(
            f"the model has no module `{missing}`", place=place, fix="write `all-linear` for every linear layer"
        )
    near = did_you_mean(missing.rsplit(".", 1)[-1] if missing not in leaves else missing, leaves)
    if "." in missing and (closest := nearest(missing, ends)):
        near = f"did you mean `{closest}`?"
    parameters = place.endswith("parameters")
    if place == "lora.target_modules" and (experts := _expert_parameters(model)):
        near = "; ".join(filter(None, [near, f"this model's experts are parameters: {experts}"]))
    return ConfigError(f"the model has no {'parameter' if parameters else 'module'} `{missing}`", place=place, fix=near)


def _expert_parameters(model: nn.Module) -> str:
    """Return the option that targets a mixture's experts, as text, where they are stacked in parameters; empty elsewhere."""
    stacks = {
        ".".join(name.replace(".base_layer", "").split(".")[-3:])
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in name and "lora_" not in name
    }
    return f"`lora.target_parameters: [{', '.join(sorted(stacks))}]`" if stacks else ""


def _peft_error(model: nn.Module, modules: Iterable[str] | str, names: list[str], error: Exception) -> ConfigError:
    """Return an exception that peft raised as an error that names our option.

    Args:
        modules: the target modules. names: full names of the model's modules.
    """
    if not isinstance(modules, str) and "without also targeting" not in str(error):
        missing = _unmatched(sorted(modules), names)
        if missing is not None:
            return _unknown_target(model, missing, names, "lora.target_modules")
    if option := re.search(r"ParamWrapper does not work with (lora_dropout|use_dora)", str(error)):
        value = {"lora_dropout": "lora.dropout: 0", "use_dora": "lora.use_dora: false"}[option[1]]
        return ConfigError(
            "peft can't add these LoRA adapters to parameters, which the experts of this model are",
            place=value.partition(":")[0],
            got=first_line(error),
            fix=f"set `{value}`, or name modules without experts in `lora.target_modules`",
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
        "peft can't add these LoRA adapters to the model",
        place="lora",
        got=got,
        fix=f"name modules of the model ({', '.join(sorted(fit)[:12])}) or a regular expression of whole names, or leave some out"
        " by `lora.exclude_modules`" + (f"; this model's experts are parameters: {experts}" if experts else ""),
    )


def lora_difference(held: Any, wanted: LoraConfig) -> str | None:
    """Return how an adapter differs from the options that were set, in words; None where it doesn't.

    Targets aren't compared here: see `Targets.difference`.

    Args:
        held: peft's config of the adapter.
        wanted: the options; those left at their defaults aren't compared.
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
            return f"{option} {_as_text(found)} in the model, {_as_text(asked)} in the options"
    return None


def _as_text(value: Any) -> str:
    """Return an option's value as YAML has it."""
    return str(value).lower() if isinstance(value, bool | str) or value is None else f"{value:g}"


@dataclass(frozen=True)
class Targets:
    """What an adapter's options select in a model, as full names."""

    adapted: frozenset[str]
    """Modules and parameters that have an adapter."""
    whole: frozenset[str]
    """Modules that are trained whole."""

    @classmethod
    def of(cls, adapted: Any) -> Targets:
        """Return the targets of a peft model."""
        from peft.utils import ModulesToSaveWrapper

        inside = adapted.get_base_model().named_modules()
        whole = frozenset(name for name, module in inside if isinstance(module, ModulesToSaveWrapper))
        return cls(frozenset(_adapter_places(adapted)), whole)

    def difference(self, wanted: Targets) -> str | None:
        """Return how wanted targets differ from these, in words; None where they don't."""
        pairs = ((self.adapted, wanted.adapted, "an adapter on `{}`"), (self.whole, wanted.whole, "`{}` trained whole"))
        for found, asked, words in pairs:
            if odd := sorted(found ^ asked):
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                where = "in the model, not" if odd[0] in found else "not in the model, but"
                return f"{words.format(odd[0])}{more} {where} in the options"
        return None


def wanted_targets(model: nn.Module, config: LoraConfig) -> Targets | None:
    """Return what the targets in the options select in a model without adapters; None where the options set no targets.

    Raises:
        ConfigError: a target names nothing in the model.
    """
    if not config.model_fields_set & {"target_modules", "exclude_modules", "target_parameters", "modules_to_save"}:
        return None
    # peft itself says, on a copy without weights; options of initialisation and scale need weights and change no target.
    peft_config = dataclasses.replace(
        _peft_config(model, config), r=1, use_dora=False, use_rslora=False, init_lora_weights=True
    )
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():  # quantised
            memo[id(module)] = nn.Linear(module.in_features, module.out_features, device="meta")
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return Targets.of(_peft_model(copy.deepcopy(model, memo), peft_config))
