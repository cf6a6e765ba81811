"""What reward, process reward and value models share: heads on the hidden states of one or more backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from rlhf_core.config.training import TrainerConfig
from rlhf_core.infra.errors import ModelError
from rlhf_core.models.head_files import HeadFiles, missing_head, warn_of_heads
from rlhf_core.models.load_options import refuse_quantised
from rlhf_core.models.loading import ModelClass, kind_of_backbone, load_model
from rlhf_core.models.sequence_model import SequenceModel, model_hashes, parameter_counts


def load_backbone(source: str | Path, reading: dict[str, Any], *, has_head_files: bool) -> SequenceModel:
    """Load the backbone of a model with heads.

    Args:
        source: the whole model's directory or hub name.
        reading: arguments of `load_model`, from `reading_options`.
        has_head_files: whether `source` was saved as a model with heads; else it is a language model, whose backbone is taken.
    """
    trusted = reading.get("trust_remote_code", False)
    kind: ModelClass = kind_of_backbone(source, trust_remote_code=trusted) if has_head_files else "causal"
    return SequenceModel.of(load_model(source, kind=kind, headless=True, **reading), source).without_head()


class HeadedModel(nn.Module):
    """Heads on the hidden states of one or more backbones."""

    head_name: ClassVar[str]
    """Name of the head's files."""

    @property
    def backbone_list(self) -> list[SequenceModel]:
        """The backbones; the first one's tokenizer, device and precision are the model's."""
        raise NotImplementedError

    def head_facts(self) -> dict[str, Any]:
        """Return what `describe` says about the heads: JSON values."""
        return {}

    @classmethod
    def find_head(cls, source: str | Path, *, new_head: bool, fix: str, warn: bool = True) -> HeadFiles | None:
        """Return a checkpoint's head files; None where it has none and gets a new head.

        Args:
            new_head: whether a checkpoint without a head gets a new one.
            fix: what the user can do about a missing head.
            warn: whether heads of other kinds of models, which aren't used, are worth a warning.

        Raises:
            ModelError: the head, or one of its two files, is missing.
        """
        files = HeadFiles.find(source, cls.head_name)
        if files is None and not new_head:
            raise missing_head(cls.head_name, source, fix)
        if files is None and warn:
            warn_of_heads(source, own=cls.head_name)
        return files

    @property
    def tokenizer(self) -> Any:
        return self.backbone_list[0].tokenizer

    @property
    def device(self) -> torch.device:
        return self.backbone_list[0].device

    @property
    def source(self) -> str:
        """Where the model was loaded from; empty for one that was made in memory."""
        return str(self.backbone_list[0].source or "")

    @property
    def precision(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.backbone_list[0].precision

    @property
    def max_positions(self) -> int | None:
        """Most tokens in a sequence that the model has positions for; None where its configuration names no limit."""
        return self.backbone_list[0].max_positions

    def configure(self, config: TrainerConfig) -> Self:
        """Apply a trainer's options to every backbone, in place; return the model."""
        refuse_quantised(config.lora)
        for backbone in self.backbone_list:
            backbone.configure(config)
        return self

    def describe(self) -> dict[str, Any]:
        """Return what this model is, for a run's record: JSON values."""
        files = {"files": model_hashes(self, self.backbone_list)}
        return {**self.backbone_list[0].describe(), **files, **parameter_counts(self), **self.head_facts()}


def wrong_kind(given: object, *, wanted: type, allowed: str) -> ModelError:
    """Return the error of an object in memory that can't be used as a kind of model.

    Args:
        given: what was passed in.
        wanted: the class of the model that it should become.
        allowed: what it may be, in words: `a PolicyModel or a RewardModel`.
    """
    kind = type(given).__name__
    fix = f"pass a path, or {allowed}"
    if hasattr(given, "config") and hasattr(given, "get_input_embeddings"):
        fix = "wrap it with its tokenizer: `PolicyModel.in_memory(model, tokenizer)`"
    return ModelError(f"a {kind} can't be used as a {wanted.__name__}", place="model", got=kind, fix=fix)
