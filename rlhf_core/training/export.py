"""The export of trained models as plain Hugging Face directories, which appear whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.files import fsync_directory, remove_tree, replaced_path, storage_errors, temporary_path
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.setup import trained_roles

PRIMARY = "policy"
"""The role that is exported to `model/`."""


def export_models(trainer: Trainer, distribution: Distribution) -> Path | None:
    """Write the trained policy to `model/`, every other trained role to `model_ROLE/`; return the first directory.

    Where no policy is trained, the first trained role is written to `model/`. Without a run directory nothing is written.
    """
    output = trainer.output
    if output is None:
        return None
    trained = trained_roles(trainer)
    main = PRIMARY if PRIMARY in trained else trained[0]
    for role in trained:
        target = output / ("model" if role == main else f"model_{role}")
        distribution.on_main(partial(_export, trainer.models[role], target))
    return output / "model"


def _export(module: nn.Module, target: Path) -> None:
    """Save a model beside its directory and rename it, so that a kill leaves the earlier directory or the new one."""
    temporary, old = temporary_path(target), replaced_path(target)
    with storage_errors(target, sum(parameter.nbytes for parameter in module.parameters())):
        for leftover in (temporary, old):
            remove_tree(leftover)
        temporary.mkdir()
        module.save_pretrained(temporary)  # type: ignore[operator]
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        fsync_directory(target.parent)
        remove_tree(old)
