"""What models with heads of their own share: scores stand on the hidden states of one or more backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from rlhf_core.config.training import TrainerConfig
from rlhf_core.infra.errors import ModelError
from rlhf_core.models.load_options import refuse_quantised
from rlhf_core.models.loading import Kind, kind_of_backbone, load_model
from rlhf_core.models.sequence_model import SequenceModel, model_hashes


def load_backbone(source: str | Path, settings: dict[str, Any], *, saved: bool) -> SequenceModel:
    """Load what heads stand on, with the settings of `load_model`.

    Args:
        saved: whether a model with a head of its own was saved there, and not a whole model that has none yet.
    """
    trusted = settings.get("trust_remote_code", False)
    kind: Kind = kind_of_backbone(source, trust_remote_code=trusted) if saved else "causal"
    return SequenceModel.of(load_model(source, kind=kind, headless=True, **settings), source).without_head()


class HeadedModel(nn.Module):
    """Heads on the hidden states of one or more backbones."""

    @property
    def _backbones(self) -> list[SequenceModel]:
        """The backbones, the first of which lends its tokenizer."""
        raise NotImplementedError

    def _about(self) -> dict[str, Any]:
        """Return what `describe` says besides what it says of every model."""
        return {}

    @property
    def tokenizer(self) -> Any:
        return self._backbones[0].tokenizer

    @property
    def device(self) -> torch.device:
        return self._backbones[0].device

    @property
    def source(self) -> str:
        """Where the model was loaded from; empty for one that was made in memory."""
        return str(self._backbones[0].source or "")

    @property
    def precision(self) -> torch.dtype:
        """The type of matrix products."""
        return self._backbones[0].precision

    @property
    def max_positions(self) -> int | None:
        return self._backbones[0].max_positions

    def configure(self, config: TrainerConfig) -> Self:
        """Apply a trainer's options to every backbone, in place; return the model."""
        refuse_quantised(config.lora)
        for backbone in self._backbones:
            backbone.configure(config)
        return self

    def describe(self) -> dict[str, Any]:
        """Return what this model is, for a run's record."""
        return {
            **self._backbones[0].describe(),
            "files": model_hashes(self, self._backbones),
            "parameters": sum(p.numel() for p in self.parameters()),
            "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            **self._about(),
        }


def wrong_kind(given: object, *, wanted: type, allowed: str) -> ModelError:
    """Return the error of a model in memory that is of another kind than can be used.

    Args:
        given: what was passed in.
        wanted: what it should become.
        allowed: the kinds that it can be made of, in words.
    """
    kind = type(given).__name__
    fix = f"pass a path, or {allowed}"
    if hasattr(given, "config") and hasattr(given, "get_input_embeddings"):
        fix = "wrap it with its tokenizer: `PolicyModel(model, tokenizer)`"
    return ModelError(f"can't be used as a {wanted.__name__}", place="model", got=kind, fix=fix)
