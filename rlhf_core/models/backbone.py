"""The backbone of a transformers model: found by running the model on a few tokens, since attribute names promise nothing."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.models.dropout import evaluating
from rlhf_core.models.precision import within_products


def hidden_of(output: Any) -> Tensor:
    """Return the last hidden states (B, T, D) in a backbone's output: B rows, T tokens, D width."""
    hidden = getattr(output, "last_hidden_state", None)
    return hidden if hidden is not None else output[0]


def find_backbone(network: Any) -> nn.Module:
    """Return the part of a model that maps token ids to hidden states; the model itself where it has no head.

    Candidates are the modules that return hidden states while the model runs. Of these the one that transformers calls the base
    model is taken, else the outermost.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:
            found.append(module)

    names = {module: name for name, module in network.named_modules()}
    hooks = [module.register_forward_hook(note) for module in names]
    try:
        with evaluating(network), torch.no_grad(), within_products(network):
            network(input_ids=plain_ids(network, 2)[None], **accepted(network.forward, use_cache=False))
    finally:
        for hook in hooks:
            hook.remove()
    named = getattr(network, getattr(network, "base_model_prefix", ""), None)
    if not found:
        return named if isinstance(named, nn.Module) else network
    if network in found or named not in found:
        return min(reversed(found), key=lambda module: names[module].count(".") + bool(names[module]))
    return named


def without_head(network: Any) -> nn.Module:
    """Return what transformers saves of a model without its head: its base model, or its backbone where it names none."""
    base = network.base_model
    return base if base is not network else find_backbone(network)


def loads_alone(inner: Any) -> bool:
    """Tell whether transformers can load a base model by itself: whether a model of its configuration has no further tensors.

    The decoder of an encoder-decoder pair can't be loaded so, nor a model without the pooling layer of its class.
    """
    from transformers import MODEL_MAPPING, AutoModel

    if getattr(inner.config, "auto_map", None):
        return True  # its class is in its repository's code
    if type(inner.config) not in MODEL_MAPPING:
        return False
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = AutoModel.from_config(copy.deepcopy(inner.config))
    return made.state_dict().keys() <= inner.state_dict().keys()


def plain_ids(network: Any, count: int) -> Tensor:
    """Return (count,) long: different ordinary token ids from all over the vocabulary, on the model's device.

    Ids with a meaning in the configuration (padding, images) are left out where there are enough others.
    """
    config = network.config
    embeddings = network.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    special = set[int]()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index")):
                special |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    spread = max(1, vocabulary // (4 * count))
    ids = [index for index in range(0, vocabulary, spread) if index not in special]
    ids = (ids or [0]) * count
    step = max(1, len(ids) // count // 2) if len(ids) > 2 * count else 1
    return torch.tensor(ids[::step][:count], device=embeddings.weight.device)


def accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Return those of some keyword arguments that a function accepts."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


@contextlib.contextmanager
def captured(module: nn.Module) -> Iterator[list[Any]]:
    """Collect, in a list, what a module returns each time it runs inside the context."""
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


@contextlib.contextmanager
def replaced_hidden(backbone: nn.Module, hidden: Tensor, output_type: Callable[..., Any]) -> Iterator[None]:
    """Make a backbone return given hidden states (B, T, D) inside the context, in its own type of output, and compute nothing."""
    output: Any = (hidden,) if output_type is tuple else output_type(last_hidden_state=hidden)
    before = vars(backbone).get("forward")
    backbone.forward = lambda *arguments, **options: output
    try:
        yield
    finally:
        del backbone.forward
        if before is not None:
            backbone.forward = before
