"""The models of a run by role: what it was given to train, and others by path with options of their own."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rlhf_core.config.training import (
    DEFAULT_MAX_LENGTH,
    LoraConfig,
    ModelConfig,
    ReferenceMode,
    TrainedModelConfig,
    TrainerConfig,
)
from rlhf_core.contracts.trainer import Role, Trainer
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError, ModelError, PluginError
from rlhf_core.models import PolicyModel
from rlhf_core.models.headed_model import HeadedModel
from rlhf_core.models.precision import DTYPES, frozen_dtype
from rlhf_core.models.reference import Reference
from rlhf_core.models.sequence_model import SequenceModel
from rlhf_core.training.micro_batches import MicroBatches

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


class Loader:
    """Gives `Trainer.build` its models, placed on the device and with the run's options.

    A kind of model is a class with `from_pretrained(path, **options)` and `adopt(model, **own)`, such as `PolicyModel`,
    `RewardModel`, `ProcessRewardModel` or `ValueModel`.
    """

    def __init__(self, trainer: Trainer[Any], devices: DeviceManager, micro_batches: MicroBatches) -> None:
        self._trainer, self._devices, self._micro_batches = trainer, devices, micro_batches
        self._main: Any = None
        self.loaded: dict[str, Any] = {}
        """Models that `load` gave, by role."""
        self.factors: dict[str, float] = {}
        """Learning rates by role as multiples of the run's; 1 where a role isn't named."""
        self._loras: dict[str, LoraConfig | None] = {}

    @property
    def given(self) -> Any:
        """What `main` gave."""
        if self._main is None:
            raise PluginError(
                "`build` doesn't load what the run was given as `model`",
                place=self._place,
                fix=_FIRST,
            )
        return self._main

    @property
    def _place(self) -> str:
        return f"{type(self._trainer).__name__}.build"

    def main(self, kind: type[Model] | None = None, **own: Any) -> Model:
        """Return what the run was given as `model`, as a kind of model, a `PolicyModel` where None.

        Args:
            own: options of the kind beyond the run's, such as the members of a `RewardModel`.

        Raises:
            ConfigError: sequences of `max_length` don't fit its positions.
        """
        wanted: Any = kind or PolicyModel
        trainer, config, device = self._trainer, self._trainer.config, self._devices.device
        if self._main is not None:
            raise PluginError("`loader.main` gives its model once", place=self._place)
        if isinstance(trainer.model, str | Path):
            options = run_options(config) | {"lora": config.lora, "adapter": config.adapter}
            options |= {"trust_remote_code": config.trust_remote_code}
            model = wanted.from_pretrained(trainer.model, device=device, **options, **_may_begin(wanted), **own)
        else:
            model = wanted.adopt(trainer.model, **own).to(device)
            model.configure(config)
        trainer.config = _with_length(config, model.max_positions)
        self._main = widened(model)
        return model

    def load(
        self,
        role: str,
        kind: type[Model],
        given: ModelConfig | str | Path | nn.Module | None,
        *,
        own_tokens: bool = False,
        **own: Any,
    ) -> Model:
        """Return another model for a role, trained or frozen as the role is.

        Args:
            given: its options, its path or hub name, or a loaded model; None is an option that was left unset, and refused.
            own_tokens: whether it reads tokens of its own; else its tokenizer must be that of the model which `main` gave.
            own: options of the kind beyond those of `given`.

        Raises:
            ModelError: its tokens aren't those of the run's model.
            ConfigError: sequences of `max_length` don't fit its positions; an option of its own can't hold.
        """
        wanted: Any = kind
        if self._main is None:
            raise PluginError(
                f"`{role}` is loaded before what the run was given as `model`", place=self._place, fix=_FIRST
            )
        config, device, trained = self._trainer.config, self._devices.device, self._trained(role)
        if role in self.loaded:
            raise PluginError(f"`{role}` is loaded twice", place=self._place)
        if given is None:
            raise ConfigError("no model is given", place=role, fix="set its path")
        if of_config := sorted(own.keys() & {*run_options(config), "lora", "trust_remote_code", "frozen", "device"}):
            raise PluginError(
                f"`{of_config[0]}` of `{role}` is not an option of its kind",
                place=self._place,
                fix="give it in a `ModelConfig` or a `TrainedModelConfig`",
            )
        if isinstance(given, nn.Module):
            model = wanted.adopt(given, **own).to(device)
            for part in model.modules():
                if isinstance(part, SequenceModel):
                    part.loaded = (
                        False  # its weights may have been changed since, so the run's record goes by what they are
                    )
            # LoRA of the run is that of its own model.
            model.configure(config.model_copy(update={"lora": None})) if trained else model.requires_grad_(False).eval()
            self._loras[role] = None
        else:
            asked = given if isinstance(given, ModelConfig) else ModelConfig(path=str(given))
            options = run_options(config)
            if not trained:
                options = {name: options[name] for name in _OF_READING} | {"frozen": True}
            if isinstance(asked, TrainedModelConfig):
                self._trained_options(role, trained)
                options["lora"] = asked.lora
                self.factors[role] = asked.learning_rate_factor
            options["precision"] = self._precision(role, asked, narrow=not trained or options.get("lora") is not None)
            self._loras[role] = options.get("lora")
            options["trust_remote_code"] = asked.trust_remote_code
            options |= _may_begin(wanted) if trained else {}
            model = wanted.from_pretrained(asked.path, device=device, **options, **own)
        if not own_tokens:
            self._same_tokens(role, model)
            _fits(config.max_length, model.max_positions, f"the positions of the `{role}`")
        self.loaded[role] = widened(model) if trained else model
        return model

    def reference(self, policy: PolicyModel, mode: ReferenceMode = "auto") -> Reference:
        """Return the policy as it is now, kept to be compared with; see `ReferenceConfig` for the modes."""
        config = self._trainer.config
        return Reference.create(
            policy,
            mode,
            cut=self._micro_batches.cut,
            hold=frozen_dtype(config.precision, config.frozen_precision),
            products=DTYPES[config.precision],
        )

    def learning_rate(self, role: str, factor: float) -> None:
        """Give a role that `build` makes itself, such as a head on the policy, a multiple of the run's learning rate."""
        self._trained_options(role, self._trained(role))
        if not (math.isfinite(factor) and factor > 0):
            raise PluginError(f"the factor of `{role}` must be finite and above 0", place=self._place, got=factor)
        self.factors[role] = factor

    def lora(self, role: str) -> LoraConfig | None:
        """Return the adapters that were asked for on a role's model: of one that stands on the run's own model, the run's."""
        return self._loras.get(role, self._trainer.config.lora)

    def _trained(self, role: str) -> bool:
        roles = self._trainer.roles
        if role not in roles:
            raise PluginError(
                f"there is no role `{role}`",
                place=self._place,
                got=f"roles {sorted(roles)}",
            )
        return roles[role].trained

    def _trained_options(self, role: str, trained: bool) -> None:
        if not trained:
            raise PluginError(f"`{role}` is frozen, so it has no learning rate", place=self._place)

    def _precision(self, role: str, asked: ModelConfig, *, narrow: bool) -> str:
        """Return the precision of a model's products.

        Args:
            narrow: whether it has frozen weights that can be held in 16 bits.
        """
        precision = self._trainer.config.precision
        if asked.precision not in (None, precision) and precision != "float32":
            raise ConfigError(
                f"matrix products of a run in {precision} are in {precision}",
                place=f"{role}.precision",
                got=asked.precision,
                fix="leave it out, or set `precision: float32`",
            )
        if asked.precision not in (None, precision) and not narrow:
            raise ConfigError(
                "a model whose every weight is trained computes in the run's precision",
                place=f"{role}.precision",
                got=f"{asked.precision} in a run of {precision}",
                fix=f"leave it out, or set `{role}.lora`",
            )
        return asked.precision or precision

    def _same_tokens(self, role: str, model: Any) -> None:
        ours, theirs = self.given.tokenizer, model.tokenizer
        if ours is theirs or ours.get_vocab() == theirs.get_vocab():
            return
        raise ModelError(
            f"the `{role}` reads other tokens than the model that is trained",
            place=str(getattr(model, "source", role)),
            got=f"{len(theirs)} tokens for {len(ours)}"
            if len(theirs) != len(ours)
            else "another vocabulary of that size",
            fix="use a model of the same tokenizer",
        )


_FIRST = "call `loader.main()` first"
_OF_READING = ("attention", "frozen_precision", "layout", "share_prompts")
"""Options of a run that hold for models which are only read, too."""


def _may_begin(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the option by which a model that is trained gets a new head where its checkpoint has none."""
    return {"new_head": True} if issubclass(kind, HeadedModel) else {}


def run_options(config: TrainerConfig) -> dict[str, Any]:
    """Return the options under which every trained model of a run is loaded."""
    return {
        "attention": config.attention,
        "precision": config.precision,
        "frozen_precision": config.frozen_precision,
        "save_precision": config.save_precision,
        "gradient_checkpointing": config.gradient_checkpointing,
        "compile": config.compile,
        "layout": config.batching.layout,
        "share_prompts": config.batching.share_prompts,
    }


def widened(model: Model) -> Model:
    """Have trained weights in float32, whatever the precision of products: an update of 16-bit weights rounds away."""
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        log.info("%d trained tensors of 16 bits are kept in float32", len(narrow))
    return model


def reference_of(trainer: Trainer[Any]) -> Reference | None:
    """Return the method's reference, where it has one."""
    return getattr(trainer, "reference", None)


def check_roles(trainer: Trainer[Any]) -> None:
    """Refuse roles that no run can have, before anything is loaded.

    Raises:
        PluginError: names what is wrong with `roles`.
    """
    place, roles = f"{type(trainer).__name__}.roles", trainer.roles
    if not isinstance(roles, Mapping) or not all(isinstance(role, Role) for role in roles.values()):
        raise PluginError("must map names to `TRAINED`, `FROZEN` or a `Role`", place=place, got=repr(roles))
    for name in roles:
        # They name directories and the parameters' groups.
        if not str(name).isidentifier() or hasattr(nn.ModuleDict, str(name)):
            raise PluginError("a role can't have that name", place=place, got=repr(name), fix="use a plain word")
    if "reference" in roles and roles["reference"].trained:
        raise PluginError("the reference is the policy at the start, so it isn't trained", place=place)


def roles_of(trainer: Trainer[Any], built: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
    """Return what `build` returned, by role, once it is what the method's `roles` say.

    Raises:
        PluginError: a role is missing or undeclared, was loaded and left out, can't be exported, or is frozen and shares weights
            with a trained one.
    """
    place, roles = f"{type(trainer).__name__}.build", trainer.roles
    _ = loader.given
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
    if unused := sorted(loader.loaded.keys() - built.keys()):
        raise PluginError(f"loads a model for `{unused[0]}` and doesn't return it", place=place)
    trained: dict[int, str] = {}
    for role, model in built.items():
        if isinstance(model, Reference) != (role == "reference"):
            raise PluginError(
                "what `loader.reference` gives is the role `reference`, and nothing else is",
                place=place,
                got=f"{type(model).__name__} for `{role}`",
            )
        if isinstance(model, Reference):
            continue
        if not isinstance(model, nn.Module):
            raise PluginError(f"`{role}` is not a module", place=place, got=type(model).__name__)
        if roles[role].trained:
            if not callable(getattr(model, "save_pretrained", None)):
                raise PluginError(
                    f"`{role}` can't be exported: {type(model).__name__} has no `save_pretrained(directory)`",
                    place=place,
                    fix="use a model of the core, such as `ValueModel`, or give the class one",
                )
            trained = {id(p): role for p in model.parameters()} | trained
    for role, model in built.items():
        if isinstance(model, Reference) or roles[role].trained:
            continue
        if shared := next((trained[id(p)] for p in model.parameters() if id(p) in trained), None):
            raise PluginError(f"the frozen `{role}` shares weights with the trained `{shared}`", place=place)
    return dict(built)


def _fits(max_length: int | None, positions: int | None, what: str) -> None:
    if positions is not None and (max_length or 0) > positions:
        raise ConfigError(
            f"longer than {what}",
            place="max_length",
            got=f"{max_length} for a model of {positions}",
            fix=f"set `max_length: {positions}` or less",
        )


def _with_length(config: TrainerConfig, positions: int | None) -> TrainerConfig:
    """Return the configuration with a `max_length` that is a number and fits the model's positions."""
    _fits(config.max_length, positions, "the model's positions")
    if config.max_length is not None:
        return config
    length = min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    why = "all of the model's positions" if length == positions else "the default"
    log.info("max_length: %d, %s; longer rows are cut or dropped as `dataset.truncation` says", length, why)
    return config.model_copy(update={"max_length": length})
