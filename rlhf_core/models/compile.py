"""torch.compile for the repeated blocks of a model."""

from __future__ import annotations

import logging

from torch import nn

log = logging.getLogger(__name__)


def compile_model(model: nn.Module, *, dynamic: bool = True) -> nn.Module:
    """Compile the repeated blocks of a model in place, once for all of them, and return it.

    Compiling a deep model as a whole takes minutes and is repeated for each shape. Parameter names, and so checkpoints, stay.

    Args:
        dynamic: whether one compilation serves all batch and sequence lengths.
    """
    blocks = max(
        (list(child) for child in model.modules() if isinstance(child, nn.ModuleList)), key=len, default=[model]
    )
    for block in blocks:
        block.compile(dynamic=dynamic)
    log.info("compiling %d blocks at their first use; the first steps are slow", len(blocks))
    return model
