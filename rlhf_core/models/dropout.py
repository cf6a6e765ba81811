"""Dropout: a model's forward pass in training is the one of evaluation, its own dropout off, unless the user asks for it.

The modules that draw random numbers are found by trying, not by name: dropout may be a module, a number that an attention
function reads, an option that a layer reads, a skipped layer, or noise in a router. Just these modules stay in evaluation mode
while the rest is in training mode, so gradient checkpointing and adapters work as usual and no configuration changes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_core.infra.seeds import RandomState
from rlhf_core.models.precision import within_products

log = logging.getLogger(__name__)

_NO_DROPOUT = "_rlhf_no_dropout"
"""Attribute of a module that stays in evaluation mode while the others are in training mode."""
_ROUNDS = 8
"""Most forward passes to find the modules that draw: one can hide others, such as the layers that it skips."""


def set_training(module: nn.Module) -> None:
    """Put a module into training mode, all but the submodules that `disable_dropout` marked."""
    module.train()
    for part in module.modules():
        if getattr(part, _NO_DROPOUT, False):
            part.training = False


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside the context; afterwards each submodule has its earlier mode again."""
    modes = [(part, part.training) for part in module.modules()]
    if any(mode for _, mode in modes):
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            if part.training is not mode:  # writing a module's attribute takes long
                part.training = mode


def allow_dropout(module: nn.Module) -> None:
    """Remove the marks of `disable_dropout`: in training mode every submodule draws again."""
    for part in module.modules():
        part.__dict__.pop(_NO_DROPOUT, None)
        checkpoint = getattr(part, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, functools.partial) and checkpoint.func is _checkpoint_without_dropout:
            part._gradient_checkpointing_func = checkpoint.args[1]


def disable_dropout(module: nn.Module, *, adapters: bool, context: Callable[[], Any] = contextlib.nullcontext) -> int:
    """Mark the submodules that draw random numbers in training, so that `set_training` keeps them in evaluation mode.

    Warns about a model whose forward pass still differs between training and evaluation.

    Args:
        module: a role's model, heads and adapters included.
        adapters: whether adapters are marked too; False leaves them the dropout that `lora.dropout` asks for.
        context: returns the context that forward passes run in (autocast).

    Returns:
        How many submodules draw.
    """
    allow_dropout(module)
    ignored = set() if adapters else _adapter_parts(module)
    plain = [part for part in module.modules() if isinstance(part, _DropoutNd) and part not in ignored]
    _mark(set(plain))
    found: set[nn.Module] = {part for part in plain if part.p > 0}
    modes = [(part, part.training) for part in module.modules()]
    state = RandomState.capture()
    try:
        # With gradients: a layer that recomputes itself takes another way without.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), context():
            for model in _networks(module):
                with within_products(model):
                    found |= _mark_drawing(model, ignored)
    finally:
        state.restore()
        for part, mode in modes:
            part.training = mode
    return len(found)


def _mark_drawing(model: nn.Module, ignored: set[nn.Module]) -> set[nn.Module]:
    """Mark submodules that draw until none is left, compare training with evaluation, and warn where they differ.

    Args:
        model: a transformers or peft model.
        ignored: submodules that may draw random numbers, and aren't marked.

    Returns:
        The submodules that drew.
    """
    found: set[nn.Module] = set()
    marked: set[nn.Module] = set()
    try:
        for _ in range(_ROUNDS):
            set_training(model)
            drawing = _draws(model) - ignored
            found |= drawing
            # A marked module that still draws has submodules that no hook sees, so all of these are marked next.
            parts = {part for drawn in drawing for part in (drawn.modules() if drawn in marked else (drawn,))} - marked
            if not parts:
                break
            _mark(parts)
            marked |= parts
        for part in ignored:
            part.training = False
        trained = _forward(model).detach()
        model.eval()
        difference = float((trained - _forward(model).detach()).norm() / trained.norm())
    except Exception as error:
        # A model that fails on these plain inputs may still be one that trains.
        log.warning(
            "couldn't measure this model's dropout (%s: %s): if it has any, log-probabilities are noisy in training",
            type(error).__name__,
            error,
        )
        return found
    parameter = next(model.parameters())
    limit = 1e-4 if parameter.dtype == torch.float32 and not torch.is_autocast_enabled(parameter.device.type) else 3e-2
    if drawing or difference > limit:
        log.warning(
            "this model's forward pass in training differs from that in evaluation even with its dropout off (relative"
            " difference %.1e): losses against a reference are off by as much, and gradients depend on the micro-batch",
            difference,
        )
    return found


def _draws(model: nn.Module) -> set[nn.Module]:
    """Forward a few tokens; return the modules whose own code, not a submodule's, drew random numbers."""
    found: set[nn.Module] = set()
    running: list[nn.Module] = []
    last = _random_state()

    def note() -> None:
        nonlocal last
        now = _random_state()
        if now != last and running:
            found.add(running[-1])
        last = now

    def enter(module: nn.Module, arguments: Any) -> None:
        note()
        running.append(module)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        note()
        running.pop()

    hooks = [
        hook
        for part in model.modules()
        for hook in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave))
    ]
    try:
        _forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _forward(model: Any) -> Tensor:
    """Return a model's float32 logits (2, 8, V) for 16 token ids, or hidden states (2, 8, D) where it has no head."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(16, device=embedding.device).remainder(embedding.shape[0]).view(2, 8)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    values: Tensor = output.logits if getattr(output, "logits", None) is not None else output[0]
    return values.float()


def _random_state() -> tuple[Any, ...]:
    """Return the states of all random number generators that a module may use, for comparison."""
    device = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_available() else b""
    if not device and torch.backends.mps.is_available():
        device = torch.mps.get_rng_state().cpu().numpy().tobytes()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), device, random.getstate(), numpy["key"].tobytes(), numpy["pos"]


def _mark(parts: set[nn.Module]) -> None:
    """Mark modules to stay in evaluation mode."""
    for part in parts:
        if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing:
            # Such a layer recomputes itself in training mode only: it stays in that mode, and runs its code in evaluation mode.
            checkpoint = part._gradient_checkpointing_func
            part._gradient_checkpointing_func = functools.partial(_checkpoint_without_dropout, part, checkpoint)
        else:
            setattr(part, _NO_DROPOUT, True)


def _checkpoint_without_dropout(
    layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *given: Any
) -> Any:
    """Run a layer's `forward` through its gradient checkpointing, with the layer itself in evaluation mode meanwhile."""

    def in_evaluation(*arguments: Any) -> Any:
        mode, layer.training = layer.training, False
        try:
            return forward(*arguments)
        finally:
            layer.training = mode

    return checkpoint(in_evaluation, *given)


def _networks(module: nn.Module) -> list[nn.Module]:
    """Return the transformers models inside a module, outermost first, with the adapters around them."""
    if isinstance(module, PreTrainedModel) or hasattr(module, "peft_config"):
        return [module]
    return [model for child in module.children() for model in _networks(child)]


def _adapter_parts(module: nn.Module) -> set[nn.Module]:
    """Return the modules that adapters add to a model, without the base's layers inside them."""
    parts: set[nn.Module] = set()
    for layer in module.modules():
        base = getattr(layer, "base_layer", None)
        if hasattr(layer, "adapter_layer_names") and isinstance(base, nn.Module):
            parts |= set(layer.modules()) - set(base.modules())
    return parts
