"""How many bits weights have: those that are frozen while a model is trained, and those that are saved.

Trained weights are float32. A frozen weight that matrix products read is rounded to their precision there anyway, so it is held
in it; what else reads (normalisation, biases, recurrences) stays float32, and embeddings are narrowed where no bit is lost.
Hidden states between layers are float32 as before, and nothing that is computed changes, with one exception: products of a
mixture's experts, which autocast leaves as wide as their weights, run in 16 bits too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_core.infra.errors import ConfigError, first_line
from rlhf_core.infra.safetensors_file import header_entries

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bf16", "fp16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NARROW = (torch.bfloat16, torch.float16)
_PRODUCTS = "_rlhf_products"
"""Attribute of a network whose frozen weights were narrowed: the precision that its products must run in."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def frozen_dtype(precision: str, frozen: Precision) -> torch.dtype:
    """Return the type that frozen weights are held in, for products of a precision.

    Raises:
        ConfigError: weights of 16 bits are to be read by products of 32.
    """
    if precision == "float32" and frozen in ("bf16", "fp16"):
        raise ConfigError(f"frozen_precision {frozen} needs products of 16 bits: set precision too", place="config")
    return DTYPES[precision if frozen == "auto" else frozen]


# Holding


def narrow_frozen(network: Any, hold: torch.dtype, *, products: torch.dtype) -> None:
    """Hold a network's frozen weights in 16 bits where that changes nothing that is computed, in place.

    Args:
        network: a transformers model, adapters inside it.
        hold: the type; float32 leaves the network as it is, but that one narrowed before is widened for float32 products.
        products: the precision of matrix products from now on.
    """
    if hold not in _NARROW:
        return _keep(network, products)
    plan = list(_plan(network, hold))
    for module in network.modules() if plan else ():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in _NARROW:
                setattr(module, name, buffer.float())
    for parameter, wanted in plan:
        if parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
    if plan:
        _settle(network, products)
        size = sum(parameter.nbytes for parameter, _ in plan)
        log.info("frozen weights: %s MiB, in %s where products read them", f"{size / 2**20:,.0f}", _short(hold))
    return None


def _keep(network: Any, products: torch.dtype) -> None:
    if getattr(network, _PRODUCTS, None) is None:
        return
    if products in _NARROW:
        setattr(network, _PRODUCTS, products)
        return
    for parameter in network.parameters():
        if parameter.dtype in _NARROW:
            parameter.data = parameter.data.float()
    delattr(network, _PRODUCTS)


def narrowed_copy(model: Any, hold: torch.dtype, *, products: torch.dtype) -> Any:
    """Return a frozen copy of a model in evaluation mode, held as `narrow_frozen` holds it; no wide copy is made on the way.

    Args:
        model: holds a transformers model as `network`.
    """
    memo: dict[int, Any] = {}
    if hold in _NARROW:
        for parameter, wanted in _plan(model.network, hold, every=True):
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(wanted, copy=True), requires_grad=False)
    made = copy.deepcopy(model, memo).eval().requires_grad_(False)
    if hold in _NARROW:
        _settle(made.network, products)
    return made


def has_narrow_constants(network: nn.Module) -> bool:
    """Tell whether a network computed constants of its own in 16 bits when it was made for a checkpoint of 16 bits."""
    saved = network.state_dict().keys()
    return any(name not in saved and buffer.dtype in _NARROW for name, buffer in network.named_buffers())


@contextlib.contextmanager
def exact_products(network: Any) -> Iterator[None]:
    """Run forward passes in float32, without autocast, whatever frozen weights are held in: rounding hides what is looked for.

    Weights are widened block by block while the block runs, so no more than one is held wide.
    """
    with torch.autocast(next(network.parameters()).device.type, enabled=False):
        if getattr(network, _PRODUCTS, None) is None:
            yield
            return
        wide = _Widening()
        blocks = _blocks(network)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        hooks = []
        for block in blocks:
            hooks.append(block.register_forward_pre_hook(lambda module, arguments: wide.enter(module.parameters())))
            hooks.append(block.register_forward_hook(lambda module, arguments, output: wide.leave(module.parameters())))
        products = getattr(network, _PRODUCTS)
        setattr(network, _PRODUCTS, None)
        wide.enter(parameter for parameter in network.parameters() if id(parameter) not in inside)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            wide.restore()
            setattr(network, _PRODUCTS, products)


class _Widening:
    """Parameters that are float32 for now, with what they are held in."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[nn.Parameter, Tensor, int]] = {}

    def enter(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if (known := self._held.get(id(parameter))) is not None:
                self._held[id(parameter)] = (*known[:2], known[2] + 1)
            elif parameter.dtype in _NARROW:
                self._held[id(parameter)] = (parameter, parameter.data, 1)
                parameter.data = parameter.data.float()

    def leave(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if (known := self._held.get(id(parameter))) is None:
                continue
            if known[2] > 1:
                self._held[id(parameter)] = (*known[:2], known[2] - 1)
            else:
                parameter.data = self._held.pop(id(parameter))[1]

    def restore(self) -> None:
        for parameter, data, _ in self._held.values():
            parameter.data = data
        self._held.clear()


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost lists of modules: a model's layers."""
    found: list[nn.Module] = []
    for child in network.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def widen_unless_it_runs(network: Any, ids: Tensor) -> None:
    """Hold narrowed weights in float32 after all where a forward pass fails with them.

    Args:
        ids: (T,) token ids to try.
    """
    products = getattr(network, _PRODUCTS, None)
    if products is None:
        return
    try:
        with torch.no_grad(), torch.autocast(ids.device.type, dtype=products):
            network(input_ids=ids[None])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        log.warning("frozen weights are held in float32: in 16 bits the model fails (%s)", first_line(error))
        _keep(network, torch.float32)


def within_products(network: Any) -> AbstractContextManager[Any]:
    """Return a context that leaves an autocast as it is, and without one sees to the precision that narrowed weights need."""
    if getattr(network, _PRODUCTS, None) is None:
        return contextlib.nullcontext()
    if torch.is_autocast_enabled(next(network.parameters()).device.type):
        return contextlib.nullcontext()
    return torch.autocast(next(network.parameters()).device.type, dtype=getattr(network, _PRODUCTS))


def _plan(network: Any, hold: torch.dtype, *, every: bool = False) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Yield each frozen floating parameter once, or `every` one, with the type to hold it in."""
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
                fits = id(parameter) not in exact and _fits(parameter, hold)
                yield parameter, hold if fits else torch.float32
            else:
                yield parameter, hold if in_products or experts else torch.float32


def _is_bare(name: str) -> bool:
    """Tell whether a module stands in the model by itself, and not inside what trains single rows of it."""
    return not any(part in ("token_adapter", "base_layer", "original_module") for part in name.split("."))


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether values lose no bit in a type."""
    return values.dtype == dtype or bool(torch.equal(values.detach().to(dtype).to(values.dtype), values.detach()))


def _settle(network: Any, products: torch.dtype) -> None:
    """Have narrowed embeddings return float32, as wide ones do, and note what the products must run in."""
    for module in network.modules():
        lookup = isinstance(module, nn.Embedding) and module.weight.dtype in _NARROW
        if lookup and _widened not in module._forward_hooks.values():
            module.register_forward_hook(_widened)
    setattr(network, _PRODUCTS, products)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _widened(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.float()


# Saving


@dataclass
class Stored:
    """Types of the floating tensors of a checkpoint, or of a model in memory."""

    main: torch.dtype = torch.float32
    others: dict[str, torch.dtype] = field(default_factory=dict)
    """Tensors of another type than most, by name."""

    @classmethod
    def of(cls, types: Mapping[str, tuple[torch.dtype, int]]) -> Stored:
        """Return what tensors' types and sizes make."""
        sizes: Counter[torch.dtype] = Counter()
        for dtype, size in types.values():
            sizes[dtype] += size
        main = sizes.most_common(1)[0][0] if sizes else torch.float32
        return cls(main, {name: dtype for name, (dtype, _) in types.items() if dtype != main})

    @classmethod
    def in_memory(cls, model: nn.Module) -> Stored:
        """Return what a model holds now."""
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        return cls.of({name: (t.dtype, t.numel()) for name, t in tensors.items() if t.is_floating_point()})

    @classmethod
    def on_disk(cls, directory: Path, pattern: str = "model*.safetensors") -> Stored | None:
        """Return what a directory's files say; None where there are none."""
        types = {
            name: (_FLOATS[entry["dtype"]], entry["data_offsets"][1] - entry["data_offsets"][0])
            for file in sorted(directory.glob(pattern))
            for name, entry in header_entries(file).items()
            if entry.get("dtype") in _FLOATS
        }
        return cls.of(types) if types else None

    @property
    def loading(self) -> torch.dtype:
        """The type in which a checkpoint is loaded without losing a bit: its own where all tensors have it."""
        return self.main if not self.others and self.main in _NARROW else torch.float32

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type that a tensor is saved in; the model's prefix may stand in one of the two names only."""
        if not self.others:
            return self.main
        names = (name, name.partition(".")[2])
        found = next((self.others[n] for n in names if n in self.others), None)
        ends = (dtype for other, dtype in self.others.items() if other.partition(".")[2] == name)
        return found or next(ends, self.main)


def cast_for_saving(state: Mapping[str, Any], stored: Stored) -> dict[str, Any]:
    """Return tensors in the types that they are saved in; those that share their memory still do."""
    made: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    out: dict[str, Any] = {}
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            out[name] = tensor
            continue
        key = (tensor.data_ptr(), tensor.shape, stored.dtype_of(name))
        if key not in made:
            made[key] = tensor.detach().to(key[2])
        out[name] = made[key]
    return out


def note_dtype(config: Path, dtype: torch.dtype) -> None:
    """Have a saved config.json name the type that its weights have: transformers notes the one that they had in memory."""

    def noted(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: _short(dtype) if k == "dtype" and isinstance(v, str) else noted(v) for k, v in values.items()}

    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(noted(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")
