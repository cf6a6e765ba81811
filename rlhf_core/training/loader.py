"""The model loader that `Trainer.build` gets: the run's own model, and others by path with their own options."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import (
    DEFAULT_MAX_LENGTH,
    LoraConfig,
    ModelConfig,
    ReferenceMode,
    TrainedModelConfig,
    TrainerConfig,
)
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.models import PolicyModel
from rlhf_core.models.fast_linears import product_dtype
from rlhf_core.models.frozen_layers import freeze_by_name, undo_freezing
from rlhf_core.models.headed_model import HeadedModel
from rlhf_core.models.precision import DTYPES, frozen_dtype_of
from rlhf_core.models.reference import Reference
from rlhf_core.models.same_vocabulary import check_same_vocabulary
from rlhf_core.models.sequence_model import SequenceModel
from rlhf_core.training.micro_batches import MicroBatches

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_MAIN_FIRST = "call `loader.main()` first"
_FROZEN_OPTIONS = ("attention", "frozen_precision", "layout", "share_prompts")
"""Options of a run that hold for frozen models, too."""


class Loader:
    """Gives `Trainer.build` its models, placed on the device and with the run's options.

    A kind of model is a class with `from_pretrained(path, **options)` and `adopt(model, **options)`, such as `PolicyModel`,
    `RewardModel`, `ProcessRewardModel` or `ValueModel`.
    """

    def __init__(self, trainer: Trainer[Any], devices: DeviceManager, micro_batches: MicroBatches) -> None:
        self._trainer, self._devices, self._micro_batches = trainer, devices, micro_batches
        self._main: Any = None
        self.loaded: dict[str, Any] = {}
        """Models that `load` returned, by role."""
        self.factors: dict[str, float] = {}
        """Learning rates by role as multiples of the run's; 1 where a role isn't named."""
        self._loras: dict[str, LoraConfig | None] = {}

    @property
    def main_model(self) -> Any:
        """The model that `main` returned."""
        if self._main is None:
            raise PluginError("`build` doesn't load the run's own `model`", place=self._place, fix=_MAIN_FIRST)
        return self._main

    @property
    def _place(self) -> str:
        return f"{type(self._trainer).__name__}.build"

    def main(self, kind: type[Model] | None = None, **own: Any) -> Model:
        """Return the run's own model (`Trainer.model`) as a model of class `kind`; a `PolicyModel` where that is None.

        Sets `max_length` in the trainer's configuration to a number where it was left unset.

        Args:
            own: options of the kind beyond the run's, such as the members of a `RewardModel`.

        Raises:
            ConfigError: sequences of `max_length` don't fit its positions, or `freeze` doesn't fit it.
        """
        wanted: Any = kind or PolicyModel
        trainer, config, device = self._trainer, self._trainer.config, self._devices.device
        if self._main is not None:
            raise PluginError("`loader.main` is called twice", place=self._place)
        if isinstance(trainer.model, str | Path):
            options = _run_options(config) | {"lora": config.lora, "adapter": config.adapter}
            options |= {"new_tokens": config.new_tokens}
            options |= {"trust_remote_code": config.trust_remote_code}
            model = wanted.from_pretrained(trainer.model, device=device, **options, **_new_head(wanted), **own)
        else:
            given = trainer.model
            if isinstance(given, tuple):
                given = PolicyModel.in_memory(*given)
            model = wanted.adopt(given, **own).to(device)
            undo_freezing(model)
            model.configure(config)
        trainer.config = with_length(config, model.max_positions, say=True)
        self._main = in_float32(model)
        if config.freeze:
            # Behind the conversion: what isn't trained is exported too, and keeps every bit.
            freeze_by_name(model, config.freeze)
            _check_rows_are_trained(model, config)
        dtype = DTYPES[config.precision]
        if dtype != torch.float32 and device.type == "cpu" and product_dtype(dtype) != dtype:
            log.warning(
                "this processor has no instructions for products in %s: training takes several times as long as in float32; "
                "fix: `precision: float32`",
                config.precision,
            )
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
            kind: its class, such as `PolicyModel` or `ValueModel`.
            given: its options, its path or hub name, or a loaded model; None, an option that was left unset, is refused.
            own_tokens: whether it has a tokenizer of its own; else its vocabulary must be that of the run's model.
            own: options of the kind beyond those of `given`.

        Raises:
            ModelError: its vocabulary isn't that of the run's model.
            ConfigError: sequences of `max_length` don't fit its positions; an option of its own can't hold.
        """
        if self._main is None:
            raise PluginError(f"`{role}` is loaded before the run's own `model`", place=self._place, fix=_MAIN_FIRST)
        config, trained = self._trainer.config, self._is_trained(role)
        if role in self.loaded:
            raise PluginError(f"`{role}` is loaded twice", place=self._place)
        if given is None:
            raise ConfigError("no model is given", place=role, fix="set its path")
        if of_config := sorted(own.keys() & {*_run_options(config), "lora", "trust_remote_code", "frozen", "device"}):
            raise PluginError(
                f"`{of_config[0]}` of `{role}` can't be an argument of `loader.load`",
                place=self._place,
                fix="give it in a `ModelConfig` or a `TrainedModelConfig`",
            )
        model: Any
        if isinstance(given, nn.Module):
            model = self._adopt(role, kind, given, trained, own)
        else:
            asked = given if isinstance(given, ModelConfig) else ModelConfig(path=str(given))
            model = self._from_path(role, kind, asked, trained, own)
        if not own_tokens:
            self._check_vocabulary(role, model)
            _check_length(config.max_length, model.max_positions, f"the positions of the `{role}`")
        self.loaded[role] = in_float32(model) if trained else model
        return model

    def _adopt(self, role: str, kind: Any, given: nn.Module, trained: bool, own: Mapping[str, Any]) -> Any:
        """Return a loaded model as a model of class `kind`, under the run's options; LoRA is for the run's own model alone."""
        config = self._trainer.config
        model = kind.adopt(given, **own).to(self._devices.device)
        for module in model.modules():
            if isinstance(module, SequenceModel):
                # Its weights may have been changed since it was read, so the run's record hashes them, not its files.
                module.is_as_loaded = False
        if trained:
            model.configure(config.model_copy(update={"lora": None}))
        else:
            model.requires_grad_(False).eval()
        self._loras[role] = None
        return model

    def _from_path(self, role: str, kind: Any, asked: ModelConfig, trained: bool, own: Mapping[str, Any]) -> Any:
        """Read a model from its path, under the run's options and its own."""
        options = _run_options(self._trainer.config)
        if not trained:
            options = {name: options[name] for name in _FROZEN_OPTIONS} | {"frozen": True}
        if isinstance(asked, TrainedModelConfig):
            self._require_trained(role, trained)
            options["lora"] = asked.lora
            self.factors[role] = asked.learning_rate_factor
        options["precision"] = self._precision(role, asked, narrow=not trained or options.get("lora") is not None)
        self._loras[role] = options.get("lora")
        options["trust_remote_code"] = asked.trust_remote_code
        options |= _new_head(kind) if trained else {}
        return kind.from_pretrained(asked.path, device=self._devices.device, **options, **own)

    def reference(self, policy: PolicyModel, mode: ReferenceMode = "auto") -> Reference:
        """Return the policy as it is now, kept to be compared with; see `ReferenceConfig` for the modes."""
        config = self._trainer.config
        return Reference.create(
            policy,
            mode,
            cut=self._micro_batches.cut,
            frozen_dtype=frozen_dtype_of(config.precision, config.frozen_precision),
            product_dtype=DTYPES[config.precision],
        )

    def learning_rate(self, role: str, factor: float) -> None:
        """Set the learning rate of a role that `build` makes itself, such as a head on the policy, to a multiple of the run's."""
        self._require_trained(role, self._is_trained(role))
        if not (math.isfinite(factor) and factor > 0):
            raise PluginError(
                f"the learning-rate factor of `{role}` must be finite and above 0", place=self._place, got=factor
            )
        self.factors[role] = factor

    def lora(self, role: str) -> LoraConfig | None:
        """Return the LoRA options of a role's model; of a role that `build` made on the run's own model, the run's."""
        return self._loras.get(role, self._trainer.config.lora)

    def _is_trained(self, role: str) -> bool:
        """Return whether the method declares a role as trained; refuse one that it doesn't declare."""
        roles = self._trainer.roles
        if role not in roles:
            raise PluginError(f"there is no role `{role}`", place=self._place, got=f"roles {sorted(roles)}")
        return roles[role].trained

    def _require_trained(self, role: str, trained: bool) -> None:
        """Refuse options of training for a frozen role."""
        if not trained:
            raise PluginError(f"`{role}` is frozen, so it has no learning rate", place=self._place)

    def _precision(self, role: str, asked: ModelConfig, *, narrow: bool) -> str:
        """Return the precision of a model's matrix products.

        Args:
            narrow: whether it has frozen weights that can be held in 16 bits.
        """
        precision = self._trainer.config.precision
        if asked.precision not in (None, precision) and precision != "float32":
            raise ConfigError(
                f"every model of a run in {precision} computes in {precision}",
                place=f"{role}.precision",
                got=asked.precision,
                fix="leave it out, or set the run's `precision: float32`",
            )
        if asked.precision not in (None, precision) and not narrow:
            raise ConfigError(
                "a model whose every weight is trained computes in the run's precision",
                place=f"{role}.precision",
                got=f"{asked.precision} in a run of {precision}",
                fix=f"leave it out, or set `{role}.lora`",
            )
        return asked.precision or precision

    def _check_vocabulary(self, role: str, model: Any) -> None:
        """Refuse a model whose token ids mean other tokens than those of the run's own model."""
        check_same_vocabulary(role, model, self.main_model, main_is="the model that is trained")


def _new_head(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the option by which a trained model of a kind with a head gets a new one where its files hold none."""
    return {"new_head": True} if issubclass(kind, HeadedModel) else {}


def _run_options(config: TrainerConfig) -> dict[str, Any]:
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


def in_float32(model: Model) -> Model:
    """Hold a model's trained weights in float32, whatever the precision of products: an update of 16-bit weights rounds away."""
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        log.info("%d trained tensors of 16 bits are kept in float32", len(narrow))
    return model


def _check_rows_are_trained(model: nn.Module, config: TrainerConfig) -> None:
    """Refuse new tokens whose embeddings `freeze` keeps as they are."""
    for part in model.modules() if config.new_tokens else ():
        if isinstance(part, SequenceModel) and not part.network.get_input_embeddings().weight.requires_grad:
            raise ConfigError(
                "the embeddings of `new_tokens` would stay the mean of the others",
                place="freeze",
                got=", ".join(config.freeze),
                fix="leave the embeddings out of it",
            )


def _check_length(max_length: int | None, positions: int | None, what: str) -> None:
    """Refuse a `max_length` above a model's positions."""
    if positions is not None and (max_length or 0) > positions:
        raise ConfigError(
            f"longer than {what}",
            place="max_length",
            got=f"{max_length} for a model of {positions}",
            fix=f"set `max_length: {positions}` or less",
        )


def _check_new_tokens(config: TrainerConfig, positions: int | None) -> None:
    """Refuse a `generation.max_new_tokens`, where it was set, that the model has no positions for after any prompt."""
    if not isinstance(config, OnlineConfig) or positions is None:
        return
    asked = config.generation.max_new_tokens
    if asked >= positions and "max_new_tokens" in config.generation.model_fields_set:
        raise ConfigError(
            "no prompt leaves room for as many tokens among the model's positions",
            place="generation.max_new_tokens",
            got=f"{asked} for a model of {positions}",
            fix=f"set less than {positions}, by the longest prompt",
        )


def with_length(config: TrainerConfig, positions: int | None, *, say: bool = False) -> TrainerConfig:
    """Return the configuration with a `max_length` that is a number and fits the model's positions.

    Args:
        positions: most tokens in a sequence of the model; None where that isn't known.
        say: whether to log the number where it was left unset.

    Raises:
        ConfigError: it doesn't fit them.
    """
    _check_length(config.max_length, positions, "the model's positions")
    _check_new_tokens(config, positions)
    if config.max_length is not None:
        return config
    length = min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    why = "all of the model's positions" if length == positions else "the default"
    if say:
        log.info("max_length: %d, %s; longer rows are truncated or dropped as `dataset.truncation` says", length, why)
    return config.model_copy(update={"max_length": length})
