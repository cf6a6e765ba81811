"""The roles of a method: what it declares, what its `build` returned for them, and which of these models train."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from rlhf_core.contracts.trainer import Role, Trainer
from rlhf_core.infra.errors import PluginError
from rlhf_core.models.dropout import set_training
from rlhf_core.models.reference import Reference


def check_declared_roles(trainer: Trainer[Any]) -> None:
    """Refuse `Trainer.roles` that no run can have, before anything is loaded.

    Raises:
        PluginError: names what is wrong with `roles`.
    """
    place, roles = f"{type(trainer).__name__}.roles", trainer.roles
    if not isinstance(roles, Mapping) or not all(isinstance(role, Role) for role in roles.values()):
        raise PluginError("must map names to `TRAINED`, `FROZEN` or a `Role`", place=place, got=repr(roles))
    for name in roles:
        # A role's name is part of a directory's name and of its parameters' names.
        if not str(name).isidentifier() or hasattr(nn.ModuleDict, str(name)):
            raise PluginError("a role can't have that name", place=place, got=repr(name), fix="use a plain word")
    if "reference" in roles and roles["reference"].trained:
        raise PluginError("the reference is the policy at the start, so it isn't trained", place=place)


def check_built_models(trainer: Trainer[Any], built: Any, loaded: Collection[str]) -> dict[str, Any]:
    """Return the models that `Trainer.build` returned, by role, if they are what `Trainer.roles` declares.

    Args:
        built: what `build` returned.
        loaded: the roles that it loaded a model for.

    Raises:
        PluginError: a role is missing or undeclared, was loaded and left out, can't be exported, or is frozen and shares weights
            with a trained one.
    """
    place, roles = f"{type(trainer).__name__}.build", trainer.roles
    if not isinstance(built, Mapping):
        raise PluginError("must return a mapping from roles to models", place=place, got=type(built).__name__)
    if undeclared := sorted(built.keys() - roles.keys()):
        raise PluginError(
            f"`{undeclared[0]}` is not among the method's `roles`", place=place, got=f"roles {sorted(roles)}"
        )
    if missing := [role for role, how in roles.items() if role not in built and not how.optional]:
        raise PluginError(
            f"returns no `{missing[0]}`, which is among `roles`", place=place, got=f"roles {sorted(built)}"
        )
    if unused := sorted(set(loaded) - built.keys()):
        raise PluginError(f"loads a model for `{unused[0]}` and doesn't return it", place=place)
    for role, model in built.items():
        _check_kind(role, model, trained=roles[role].trained, place=place)
    _check_frozen_apart(built, roles, place)
    return dict(built)


def _check_kind(role: str, model: Any, *, trained: bool, place: str) -> None:
    """Refuse a model of a class that can't have its role."""
    if isinstance(model, Reference) != (role == "reference"):
        raise PluginError(
            "what `loader.reference` gives is the role `reference`, and nothing else is",
            place=place,
            got=f"{type(model).__name__} for `{role}`",
        )
    if isinstance(model, Reference):
        return
    if not isinstance(model, nn.Module):
        raise PluginError(f"`{role}` is not a module", place=place, got=type(model).__name__)
    if trained and not callable(getattr(model, "save_pretrained", None)):
        raise PluginError(
            f"`{role}` can't be exported: {type(model).__name__} has no `save_pretrained(directory)`",
            place=place,
            fix="use a model of the core, such as `ValueModel`, or give the class one",
        )


def _check_frozen_apart(built: Mapping[str, Any], roles: Mapping[str, Role], place: str) -> None:
    """Refuse a frozen model that has a parameter of a trained one, which training would change."""
    modules = {role: model for role, model in built.items() if not isinstance(model, Reference)}
    trained: dict[int, str] = {}
    for role, model in modules.items():
        if roles[role].trained:
            trained = {id(p): role for p in model.parameters()} | trained
    for role, model in modules.items():
        if roles[role].trained:
            continue
        if shared := next((trained[id(p)] for p in model.parameters() if id(p) in trained), None):
            raise PluginError(f"the frozen `{role}` shares weights with the trained `{shared}`", place=place)


def trained_roles(trainer: Trainer[Any]) -> list[str]:
    """Return the roles whose models are trained."""
    return [role for role in trainer.models if trainer.roles[role].trained]


def reference_of(trainer: Trainer[Any]) -> Reference | None:
    """Return the method's reference, where it has one."""
    return getattr(trainer, "reference", None)


def set_training_mode(trainer: Trainer[Any], training: bool) -> None:
    """Switch the trained models to training or to evaluation mode; frozen ones are always in evaluation mode."""
    for role, module in trainer.models.items():
        if training and trainer.roles[role].trained:
            set_training(module)
        else:
            module.eval()
