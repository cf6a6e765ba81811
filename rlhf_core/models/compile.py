"""torch.compile, where it helps."""

from __future__ import annotations

import logging

from torch import nn

log = logging.getLogger(__name__)


def compile_model(model: nn.Module, *, dynamic: bool = True) -> nn.Module:
    """Compile the repeated blocks of a model in place, one compilation serving all of them, and return it.

    Whole-model compilation of a deep stack takes minutes and is repeated for each shape; a block is compiled once.
    Parameter names don't change, so checkpoints don't either.
    """
    blocks = max(
        (list(child) for child in model.modules() if isinstance(child, nn.ModuleList)), key=len, default=[model]
    )
    for block in blocks:
        block.compile(dynamic=dynamic)
    log.info("compiling %d blocks at their first use; the first steps are slow", len(blocks))
    return model
