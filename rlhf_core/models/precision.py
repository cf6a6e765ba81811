"""The dtype in which frozen weights are held while a model is trained or read, and the one in which its products run.

Trained weights are float32. A frozen weight that matrix products read would be rounded to their dtype there anyway, so it is
held in that dtype, at half the memory. All else (norms, biases, recurrences) stays float32; embeddings are held in 16 bits where
that loses no bit. Hidden states between layers are float32 as before, so nothing that is computed changes, with one exception:
products of a mixture's experts, which autocast leaves in the dtype of their weights, run in 16 bits too.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_core.infra.errors import ConfigError, first_line

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bf16", "fp16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NARROW = (torch.bfloat16, torch.float16)
_PRODUCT_DTYPE = "_rlhf_product_dtype"
"""Attribute of a network whose frozen weights are held in 16 bits: the dtype that its products must run in."""


def frozen_dtype_of(precision: str, frozen_precision: Precision) -> torch.dtype:
    """Return the dtype that frozen weights are held in, for the options `precision` and `frozen_precision`.

    Raises:
        ConfigError: 16-bit weights for float32 products.
    """
    if precision == "float32" and frozen_precision in ("bf16", "fp16"):
        # The words of the same check in `TrainerConfig`.
        problem = f"frozen_precision {frozen_precision} needs `precision: bf16` or `fp16`"
        raise ConfigError(problem, place="config")
    return DTYPES[precision if frozen_precision == "auto" else frozen_precision]


def narrow_frozen(network: Any, frozen_dtype: torch.dtype, *, product_dtype: torch.dtype) -> None:
    """Hold a network's frozen weights in a 16-bit dtype, in place, where that changes nothing that is computed.

    Args:
        network: a transformers model, adapters inside it.
        frozen_dtype: bf16 or fp16; float32 leaves weights as they are, except that with products in float32 a network narrowed
            before is widened.
        product_dtype: dtype of matrix products from now on.
    """
    if frozen_dtype not in _NARROW:
        return _change_product_dtype(network, product_dtype)
    plan = list(_wanted_dtypes(network, frozen_dtype))
    for module in network.modules() if plan else ():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in _NARROW:
                setattr(module, name, buffer.float())
    for parameter, wanted in plan:
        if parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
    if plan:
        _mark_narrowed(network, product_dtype)
        size = sum(parameter.nbytes for parameter, _ in plan)
        log.info(
            "frozen weights of matrix products are held in %s (%s MiB in all)",
            str(frozen_dtype).removeprefix("torch."),
            f"{size / 2**20:,.0f}",
        )
    return None


def _change_product_dtype(network: Any, product_dtype: torch.dtype) -> None:
    """Note another dtype of products for a network narrowed before; for float32 products, widen its weights again."""
    if getattr(network, _PRODUCT_DTYPE, None) is None:
        return
    if product_dtype in _NARROW:
        setattr(network, _PRODUCT_DTYPE, product_dtype)
        return
    for parameter in network.parameters():
        if parameter.dtype in _NARROW:
            parameter.data = parameter.data.float()
    delattr(network, _PRODUCT_DTYPE)


def narrowed_copy(model: Any, frozen_dtype: torch.dtype, *, product_dtype: torch.dtype) -> Any:
    """Return a frozen copy of a model in evaluation mode, its weights held as by `narrow_frozen`; no float32 copy is made first.

    Args:
        model: a `SequenceModel`, or another module with a transformers model as its attribute `network`.
    """
    memo: dict[int, Any] = {}
    if frozen_dtype in _NARROW:
        for parameter, wanted in _wanted_dtypes(model.network, frozen_dtype, every=True):
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(wanted, copy=True), requires_grad=False)
    made = copy.deepcopy(model, memo).eval().requires_grad_(False)
    if frozen_dtype in _NARROW:
        _mark_narrowed(made.network, product_dtype)
    return made


def has_narrow_constants(network: nn.Module) -> bool:
    """Tell whether a network loaded in a 16-bit dtype has 16-bit buffers that no checkpoint holds: rounded constants."""
    saved = network.state_dict().keys()
    return any(name not in saved and buffer.dtype in _NARROW for name, buffer in network.named_buffers())


@contextlib.contextmanager
def exact_products(network: Any) -> Iterator[None]:
    """Run forward passes in float32 inside the context, without autocast and whatever dtype frozen weights have.

    For comparisons that rounding would hide. Weights are widened one block at a time, while the block runs.
    """
    with torch.autocast(next(network.parameters()).device.type, enabled=False):
        if getattr(network, _PRODUCT_DTYPE, None) is None:
            yield
            return
        wide = _Widening()
        blocks = blocks_of(network)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        hooks = []
        for block in blocks:
            hooks.append(block.register_forward_pre_hook(lambda module, arguments: wide.enter(module.parameters())))
            hooks.append(block.register_forward_hook(lambda module, arguments, output: wide.leave(module.parameters())))
        products = getattr(network, _PRODUCT_DTYPE)
        setattr(network, _PRODUCT_DTYPE, None)
        wide.enter(parameter for parameter in network.parameters() if id(parameter) not in inside)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            wide.restore()
            setattr(network, _PRODUCT_DTYPE, products)


class _Widening:
    """Parameters that are float32 for the moment, with the narrow tensors to restore and how many blocks use each."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[nn.Parameter, Tensor, int]] = {}

    def enter(self, parameters: Iterable[nn.Parameter]) -> None:
        """Widen parameters that a block is about to read."""
        for parameter in parameters:
            if (known := self._held.get(id(parameter))) is not None:
                self._held[id(parameter)] = (*known[:2], known[2] + 1)
            elif parameter.dtype in _NARROW:
                self._held[id(parameter)] = (parameter, parameter.data, 1)
                parameter.data = parameter.data.float()

    def leave(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restore the parameters that no other running block reads."""
        for parameter in parameters:
            if (known := self._held.get(id(parameter))) is None:
                continue
            if known[2] > 1:
                self._held[id(parameter)] = (*known[:2], known[2] - 1)
            else:
                parameter.data = self._held.pop(id(parameter))[1]

    def restore(self) -> None:
        """Restore all parameters, whoever reads them."""
        for parameter, data, _ in self._held.values():
            parameter.data = data
        self._held.clear()


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return a model's layers: the members of its outermost module lists."""
    found: list[nn.Module] = []
    for child in network.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def widen_unless_it_runs(network: Any, ids: Tensor) -> None:
    """Try a forward pass of a narrowed network; where it fails, warn and hold its frozen weights in float32.

    Args:
        ids: (T,) token ids to run.
    """
    products = getattr(network, _PRODUCT_DTYPE, None)
    if products is None:
        return
    try:
        with torch.no_grad(), torch.autocast(ids.device.type, dtype=products):
            network(input_ids=ids[None])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        log.warning(
            "frozen weights are held in float32, since the model can't run with them in 16 bits (%s)", first_line(error)
        )
        _change_product_dtype(network, torch.float32)


def within_products(network: Any) -> AbstractContextManager[Any]:
    """Return a context for forward passes: an autocast that is on stays; else narrowed weights get the autocast they need."""
    if getattr(network, _PRODUCT_DTYPE, None) is None:
        return contextlib.nullcontext()
    if torch.is_autocast_enabled(next(network.parameters()).device.type):
        return contextlib.nullcontext()
    return torch.autocast(next(network.parameters()).device.type, dtype=getattr(network, _PRODUCT_DTYPE))


def _wanted_dtypes(
    network: Any, frozen_dtype: torch.dtype, *, every: bool = False
) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Yield each frozen floating parameter once, with the dtype to hold it in; with `every`, trained ones too."""
    exact = {
        id(module.weight)
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and not (type(module) is nn.Embedding and _is_bare(name))
    }
    lookups = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    seen: set[int] = set()
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point() or (parameter.requires_grad and not every):
                continue
            seen.add(id(parameter))
            in_products = isinstance(module, nn.Linear | Conv1D) and parameter.ndim == 2
            # A copy of trained experts must compute what they do, in float32.
            experts = parameter.ndim == 3 and not isinstance(module, nn.Conv1d) and not every
            if id(parameter) in lookups:
                fits = id(parameter) not in exact and _fits(parameter, frozen_dtype)
                yield parameter, frozen_dtype if fits else torch.float32
            else:
                yield parameter, frozen_dtype if in_products or experts else torch.float32


def _is_bare(name: str) -> bool:
    """Tell whether an embedding isn't wrapped by an adapter that trains single rows of it, judging by its name."""
    return not any(part in ("token_adapter", "base_layer", "original_module") for part in name.split("."))


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether values can be held in a dtype without losing a bit."""
    return values.dtype == dtype or bool(torch.equal(values.detach().to(dtype).to(values.dtype), values.detach()))


def _mark_narrowed(network: Any, product_dtype: torch.dtype) -> None:
    """Make narrowed embeddings return float32, as wide ones do, and note the dtype that products must run in."""
    for module in network.modules():
        lookup = isinstance(module, nn.Embedding) and module.weight.dtype in _NARROW
        if lookup and _widened not in module._forward_hooks.values():
            module.register_forward_hook(_widened)
    setattr(network, _PRODUCT_DTYPE, product_dtype)


def _widened(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """Forward hook of a 16-bit embedding: return its output in float32."""
    return output.float()
