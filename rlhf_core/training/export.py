"""The export of trained models as plain Hugging Face directories, which appear whole."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.errors import StorageError, describe_error
from rlhf_core.infra.files import fsync_directory, remove_tree, replaced_path, storage_errors, temporary_path
from rlhf_core.infra.model_card import CARD, is_own, write_card
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.setup import trained_roles

Card = Callable[[str, Path], str]
"""Returns the card of a role's model that was just saved in a directory."""

log = logging.getLogger(__name__)

PRIMARY = "policy"
"""The role that is exported to `model/` where it is trained."""


def export_models(trainer: Trainer, distribution: Distribution, card: Card) -> Path | None:
    """Write the trained policy to `model/`, every other trained role to `model_ROLE/`; return the first directory.

    Where no policy is trained, the first trained role is written to `model/`. Without a run directory nothing is written. Each
    directory has a card, unless one of the user's own is there already.
    """
    output = trainer.output
    if output is None:
        return None
    trained = trained_roles(trainer)
    main = primary_role(trainer)
    for role in trained:
        target = output / ("model" if role == main else f"model_{role}")
        distribution.on_main(partial(_export, trainer.models[role], target, partial(card, role)))
    return output / "model"


def primary_role(trainer: Trainer) -> str:
    """Return the role that is exported to `model/`."""
    trained = trained_roles(trainer)
    return PRIMARY if PRIMARY in trained else trained[0]


def _export(module: nn.Module, target: Path, card: Callable[[Path], str]) -> None:
    """Save a model beside its directory and rename it, so that a kill leaves the earlier directory or the new one."""
    temporary, old = temporary_path(target), replaced_path(target)
    with storage_errors(target, sum(parameter.nbytes for parameter in module.parameters())):
        for leftover in (temporary, old):
            remove_tree(leftover)
        temporary.mkdir()
        module.save_pretrained(temporary)  # type: ignore[operator]
        if is_own(target):
            shutil.copyfile(target / CARD, temporary / CARD)
        else:
            _write_card(temporary, card)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        fsync_directory(target.parent)
        remove_tree(old)


def _write_card(directory: Path, card: Callable[[Path], str]) -> None:
    """Write a model's card; a fault in it is a warning, for a model must not be lost for the sake of its description."""
    try:
        write_card(directory, card(directory))
    except StorageError:
        raise
    except Exception as error:
        log.warning("the model card couldn't be written: %s", describe_error(error))
        log.debug("the model card couldn't be written", exc_info=True)
