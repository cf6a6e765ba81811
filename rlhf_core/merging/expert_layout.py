"""Which tensors of a base's files hold the parameters that an adapter changes, where files hold parameters in another form.

transformers holds a layer's experts as one parameter, (experts, rows, columns), and files may hold one tensor per expert, gate
and up apart, under other names. PEFT decides which parameter a module of the adapter changes, transformers how a parameter is
saved: so a model without values is built, PEFT puts the adapter on it, and the parameter's elements are numbered and saved.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.infra.errors import ModelError, describe_error, first_line

WRONG_BASE = "set `base_model_name_or_path` in adapter_config.json to the model that it was trained on"
"""How an adapter that doesn't fit its base is mended."""
_ROWS, _COLUMNS = 24, 40
"""Size of the numbered matrices that replace a parameter's: divisible into two, three or four parts."""


@dataclass(frozen=True)
class StoredPart:
    """A tensor of the files that is a part of a parameter which a module of an adapter changes."""

    name: str
    expert: int | None
    """Its expert; None where it holds all."""
    rows: tuple[float, float]
    """The parameter's rows that it holds, as shares of them all."""
    transposed: bool
    """Whether it is (…, columns, rows)."""
    experts: int = 1
    """Experts of the whole parameter."""
    swapped: bool = False
    """Whether the parameter is (…, inputs, outputs), unlike a linear layer's weight."""
    scale: float = 1.0
    """LoRA's s."""
    parameter_shape: tuple[int, ...] = ()
    """The parameter's shape in a model with the base's configuration."""

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return its part of s·B, (experts, rows, r), and of A, (experts, r, columns).

        Args:
            a: lora_A, (experts · r, inputs).
            b: lora_B, (outputs, r · experts).
        """
        if self.experts == 1:
            left, right = b[None], a[None]
        else:
            right = a.view(self.experts, -1, a.shape[-1])
            left = b.view(b.shape[0], -1, self.experts).permute(2, 0, 1)
        left = left * self.scale
        if self.swapped:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        begin, end = (round(share * left.shape[1]) for share in self.rows)
        if self.expert is not None:
            left, right = left[self.expert : self.expert + 1], right[self.expert : self.expert + 1]
        left = left[:, begin:end]
        return (right.transpose(1, 2), left.transpose(1, 2)) if self.transposed else (left, right)


class AdaptedArchitecture:
    """A model of the base's configuration, without values, with the adapter on it; built when it is first needed.

    Args:
        base: the base's name.
        config: its configuration.
        adapter: the adapter's directory.
        name: the adapter's name.
    """

    def __init__(self, base: str, config: Mapping[str, Any], adapter: Path, name: str) -> None:
        self._base, self._config, self._adapter, self._name = base, config, adapter, name

    def stored_parts(self, module: str) -> list[StoredPart]:
        """Return the tensors of the files that hold the parameter which an adapter's module changes.

        Args:
            module: its name in the adapter's file, up to `.lora_A`.

        Raises:
            ModelError: PEFT changes no such module, or transformers saves the parameter in a way that isn't understood.
        """
        model, shapes, layers = self._model
        plain = module.replace(".base_layer", "")
        if (layer := layers.get(module)) is None:
            raise ModelError(
                f"the adapter doesn't fit its base, which has no module `{plain}`",
                place=self._name,
                got=f"base {self._base}",
                fix=WRONG_BASE,
            )
        name = f"{plain}.{getattr(layer, 'parameter_name', 'weight')}"
        shape = shapes[name]
        swapped = len(shape) == 3 and not getattr(layer, "_did_swap_in_out_features", True)
        experts, scale = int(getattr(layer, "num_experts", 1)), float(layer.scaling["default"])
        return [
            replace(part, experts=experts, swapped=swapped, scale=scale, parameter_shape=shape)
            for part in self._saved(model, name, shape)
        ]

    @cached_property
    def _model(self) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, Any]]:
        """The model, its parameters' shapes, and the layers of the adapter, both by name."""
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            with tempfile.TemporaryDirectory() as directory:
                # Through a file, whose reader knows numbers that JSON doesn't, such as infinity.
                Path(directory, "config.json").write_text(json.dumps(dict(self._config)), encoding="utf-8")
                config = AutoConfig.from_pretrained(directory)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            settings = peft.PeftConfig.from_pretrained(str(self._adapter))
            with warnings.catch_warnings():  # they are about training
                warnings.simplefilter("ignore")
                adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=True).base_model
            layers = {
                name: layer
                for name, layer in adapted.model.named_modules()
                if isinstance(layer, peft.tuners.lora.layer.LoraLayer)
            }
            return adapted.unload(), shapes, layers
        except Exception as error:  # whatever PEFT or transformers raise, the adapter doesn't fit that configuration
            raise ModelError(
                "PEFT can't put the adapter on a model like its base",
                place=self._name,
                got=describe_error(error, lines=2),
                fix=WRONG_BASE,
            ) from error

    def _saved(self, model: Any, name: str, shape: tuple[int, ...]) -> list[StoredPart]:
        """Number the elements of a parameter, and return the tensors in which transformers saves them."""
        from transformers.core_model_loading import revert_weight_conversion

        small = (*shape[:-2], _ROWS, _COLUMNS)
        numbers = torch.arange(torch.Size(small).numel()).view(small)
        owner, _, last = name.rpartition(".")
        # Some conversions look at the shape that the model has.
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(torch.empty(small, device="meta")))
        try:
            saved = revert_weight_conversion(model, {name: numbers})
            return [_stored_part(key, found) for key, found in saved.items()]
        except Exception as error:
            raise ModelError(
                f"how `{name}` is stored in the base's files isn't understood",
                place=self._name,
                got=first_line(error),
                fix="fold it with peft's `merge_and_unload` and save the model",
            ) from error


def _stored_part(name: str, found: Tensor) -> StoredPart:
    """Return which part of a parameter a saved tensor is, from the numbers of the elements that it holds."""
    expert, row, column = found // (_ROWS * _COLUMNS), found // _COLUMNS % _ROWS, found % _COLUMNS
    transposed = bool((column[..., 0, :] == column[..., 0, :1]).all())
    if transposed:
        expert, row, column = expert.mT, row.mT, column.mT
    first, count = int(row.flatten()[0]), row.shape[-2]
    experts = torch.arange(found.shape[0])[:, None, None] if found.ndim == 3 else expert.flatten()[0]
    whole = (
        bool((column == torch.arange(_COLUMNS)).all())
        and bool((row == torch.arange(first, first + count)[:, None]).all())
        and bool((expert == experts).all())
    )
    if not whole:
        raise ValueError(f"`{name}` holds its rows in another order")
    only = None if found.ndim == 3 else int(expert.flatten()[0])
    return StoredPart(name, only, (first / _ROWS, (first + count) / _ROWS), transposed)
