"""What every sampler needs: its models by role, loaded or given, and the choice of the best completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.online import RewardConfig
from rlhf_core.config.training import ModelConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError, PluginError, did_you_mean, shortened
from rlhf_core.infra.model_files import reward_at
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.rewards import Rewards, open_rewards

ROLE_KINDS = ("policy", "policies", "reward")
"""Kinds of model that a sampler's role may name: a `PolicyModel`, a list of them, or anything that is accepted as a reward."""
_WHAT = {
    "policy": "a PolicyModel",
    "policies": "a list of PolicyModels",
    "reward": "a reward: a name, a function, a RewardFn, or a reward model's path",
}
"""Kind → what is given for it, for messages."""


def models_by_role(sampler: type[Sampler], config: BaseConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's models by role: policies as given, lists of them as tuples, and rewards as `Rewards`.

    Args:
        config: decides which roles are needed, by `Sampler.roles_for`.
        given: role → a `PolicyModel`, a list of them, or a reward in any accepted form.

    Raises:
        ConfigError: a role is missing, unknown, not used, or has another kind of model than it needs.
        PluginError: the sampler declares an unknown kind of model.
    """
    _check_roles(sampler, config, given)
    return {role: _model(sampler, role, kind, given[role]) for role, kind in sampler.roles_for(config).items()}


def load_models(sampler: type[Sampler], config: BaseConfig, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's models by role; policies given by path are loaded frozen, on this process's device.

    Args:
        sources: role → a path, a `ModelConfig` or its mapping, a model in memory, or a list of these.

    Raises:
        ConfigError: as `models_by_role`.
        ModelError: a model can't be loaded.
    """
    _check_roles(sampler, config, sources)
    loaded = dict(sources)
    for role, kind in sampler.roles_for(config).items():
        place = f"{sampler.__name__}.load({role}=…)"
        if kind == "policy":
            loaded[role] = _loaded(sources[role], role, place)
        elif kind == "policies":
            loaded[role] = [_loaded(one, role, place) for one in _several(sources[role], role, place)]
    return loaded


def policies_of(sampler: Sampler) -> dict[str, PolicyModel]:
    """Return the policies of a sampler by the names of their roles; those of a list are `members[0]`, `members[1]` and so on."""
    found: dict[str, PolicyModel] = {}
    for role, kind in sampler.roles_for(sampler.config).items():
        if kind == "policy":
            found[role] = sampler.models[role]
        elif kind == "policies":
            found |= {f"{role}[{number}]": one for number, one in enumerate(sampler.models[role])}
    return found


def _loaded(source: Any, role: str, place: str) -> PolicyModel:
    return source if isinstance(source, PolicyModel) else load_policy(source, role, place=place)


def _several(given: Any, role: str, place: str) -> list[Any]:
    """Return what was given for a role of kind `policies` as a list.

    Raises:
        ConfigError: it isn't a list, or is empty.
    """
    if isinstance(given, str | Path | Mapping) or not isinstance(given, Iterable):
        problem = f"the role `{role}` takes a list of models"
        raise ConfigError(problem, place=place, got=shortened(given), fix=f"`{role}=[…]`")
    if not (several := list(given)):
        raise ConfigError(f"the list of models for the role `{role}` is empty", place=place, fix="give at least one")
    return several


def load_policy(source: Any, role: str, *, place: str) -> PolicyModel:
    """Load a frozen policy from a path, a `ModelConfig` or its mapping, on this process's device; `place` is for errors."""
    if isinstance(source, str | Path):
        source = ModelConfig(path=str(source))
    elif isinstance(source, Mapping):
        source = ModelConfig.parse(source, place=place)
    if not isinstance(source, ModelConfig):
        problem = f"the model of the role `{role}` must be a path, or a PolicyModel"
        raise ConfigError(problem, place=place, got=shortened(source))
    device = DeviceManager()
    precision = source.precision or "float32"
    device.check(precision)
    return PolicyModel.from_pretrained(
        Path(source.path).expanduser() if source.path.startswith("~") else source.path,
        precision=precision,
        trust_remote_code=source.trust_remote_code,
        frozen=True,
        device=device.device,
    )


def best_first(completions: Sequence[Sequence[Completion]], scores: Sequence[float], n: int) -> list[list[Completion]]:
    """Return for each prompt its n completions with the highest scores, best first, with `score` set.

    Args:
        completions: for each prompt, at least n.
        scores: one per completion, prompt by prompt; of equal scores the completion drawn first comes first.

    Raises:
        ValueError: a prompt has fewer completions than n, or there is another number of scores.
    """
    sizes = [len(group) for group in completions]
    if sum(sizes) != len(scores):
        raise ValueError(f"{len(scores)} scores for {sum(sizes)} completions")
    if min(sizes, default=n) < n:
        raise ValueError(f"a prompt has {min(sizes)} completions, fewer than n = {n}")
    left = iter(scores)
    scored = [[replace(one, score=float(next(left))) for one in group] for group in completions]
    return [sorted(group, key=lambda one: -(one.score or 0.0))[:n] for group in scored]


def reward_by_path(reward: RewardConfig) -> RewardConfig:
    """Return a reward that is named by a model's directory as the plugin that reads it, with its path; any other as it is."""
    path = Path(reward.name).expanduser()
    if not path.is_dir():
        return reward
    return reward.updated(name=reward_at(path), options={"model": str(path), **reward.options})


def _check_roles(sampler: type[Sampler], config: BaseConfig, given: Mapping[str, Any]) -> None:
    """Raise where a sampler declares an unknown kind of model, or the roles given aren't those that it declares."""
    name, roles = sampler.__name__, sampler.roles
    for role, kind in roles.items():
        if kind not in ROLE_KINDS:
            raise PluginError(
                f"a sampler's role names an unknown kind of model, `{kind}`",
                place=f"{name}.roles[{role!r}]",
                fix=f"use {', '.join(ROLE_KINDS[:-1])} or {ROLE_KINDS[-1]}",
            )
    if unknown := next((role for role in given if role not in roles), None):
        raise ConfigError(
            f"the sampler has no role `{unknown}`", place=f"{name}({unknown}=…)", fix=did_you_mean(unknown, roles)
        )
    needed = sampler.roles_for(config)
    if unused := next((role for role, model in given.items() if role not in needed and model is not None), None):
        problem = f"the sampler doesn't use its role `{unused}` with these options"
        raise ConfigError(problem, place=f"{name}({unused}=…)", fix="leave it out")
    if missing := [role for role in needed if given.get(role) is None]:
        role = missing[0]
        raise ConfigError(
            f"no model is given for the sampler's role `{role}`",
            place=f"{name}({role}=…)",
            fix=f"give it {_WHAT[roles[role]]}",
        )


def _model(sampler: type[Sampler], role: str, kind: str, given: Any) -> Any:
    """Return what was given for a role as the kind of model that it needs; see `models_by_role`."""
    place = f"{sampler.__name__}({role}=…)"
    if kind == "policies":
        return tuple(_policy(sampler, role, one, place) for one in _several(given, role, place))
    if kind == "policy":
        return _policy(sampler, role, given, place)
    if isinstance(given, Rewards):
        return given
    if isinstance(given, Path) or (isinstance(given, str) and Path(given).expanduser().is_dir()):
        given = {"name": reward_at(Path(given)), "options": {"model": str(Path(given).expanduser())}}
    opened = open_rewards(given, place=place)
    if not len(opened):
        raise ConfigError(f"the list of rewards for the role `{role}` is empty", place=place)
    return opened


def _policy(sampler: type[Sampler], role: str, given: Any, place: str) -> PolicyModel:
    if not isinstance(given, PolicyModel):
        fix = f"`{sampler.__name__}.load({role}=PATH)` loads one" if isinstance(given, str | Path) else None
        problem = f"the model of the role `{role}` must be a PolicyModel"
        raise ConfigError(problem, place=place, got=shortened(given), fix=fix)
    return given
