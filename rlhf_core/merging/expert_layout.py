"""Where the parameters that an adapter changes lie in its base's files, where these hold them otherwise than the model does.

transformers holds a layer's experts as one parameter, (experts, rows, columns), and files may hold a tensor for each expert, gate
and up apart, under other names. Which parameter a module of the adapter changes is PEFT's to say, and where it lies is
transformers': a model without values is built, PEFT puts the adapter on it, and numbered places are sent the way of saving.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.infra.errors import ModelError, describe_error, first_line

_ROWS, _COLUMNS = 24, 40
"""Size of the matrices that are sent in place of a parameter's own: enough to be cut in two, three or four."""


@dataclass(frozen=True)
class StoredPart:
    """A tensor of the files as a part of a parameter."""

    name: str
    expert: int | None
    """The expert that it is of; None where it holds all."""
    rows: tuple[float, float]
    """The parameter's rows that it holds, as shares of them all."""
    transposed: bool

    def cut(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return its part of an update's factors, (experts, rows, r) and (experts, r, columns)."""
        begin, end = (round(share * left.shape[1]) for share in self.rows)
        if self.expert is not None:
            left, right = left[self.expert : self.expert + 1], right[self.expert : self.expert + 1]
        left = left[:, begin:end]
        return (right.transpose(1, 2), left.transpose(1, 2)) if self.transposed else (left, right)


@dataclass(frozen=True)
class Parameter:
    """A parameter that a module of an adapter changes."""

    experts: int
    swapped: bool
    """Whether it is (…, inputs, outputs), the other way round than a linear layer's weight."""
    scale: float
    parts: tuple[StoredPart, ...]
    shape: tuple[int, ...]
    """That it has in a model like the base."""

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return s·B, (experts, rows, r), and A, (experts, r, columns), as the parameter has its rows.

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
        return (right.transpose(1, 2), left.transpose(1, 2)) if self.swapped else (left, right)


class AdaptedArchitecture:
    """A model without values, with an adapter on it."""

    def __init__(self, base: str, config: Mapping[str, Any], adapter: Path, name: str) -> None:
        self._base, self._config, self._adapter, self._name = base, config, adapter, name

    def parameter(self, module: str) -> Parameter:
        """Return what an adapter's module changes.

        Args:
            module: its name in the adapter's file, up to `.lora_A`.

        Raises:
            ModelError: PEFT puts nothing there, or transformers saves it in a way that isn't understood.
        """
        layer = self._layers.get(module)
        if layer is None:
            raise ModelError(
                f"the adapter doesn't fit its base, which has no module `{module.replace('.base_layer', '')}`",
                place=self._name,
                got=f"base {self._base}",
                fix="set `base_model_name_or_path` in adapter_config.json to the model that it was trained on",
            )
        inner = getattr(layer, "parameter_name", "weight")
        name = f"{module.replace('.base_layer', '')}.{inner}"
        swapped = len(self._shapes[name]) == 3 and not getattr(layer, "_did_swap_in_out_features", True)
        return Parameter(
            int(getattr(layer, "num_experts", 1)),
            swapped,
            float(layer.scaling["default"]),
            tuple(self._parts(name)),
            self._shapes[name],
        )

    @cached_property
    def _model(self) -> Any:
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            with tempfile.TemporaryDirectory() as directory:
                # Through a file: the reader of files knows what JSON has no word for, such as infinity.
                Path(directory, "config.json").write_text(json.dumps(dict(self._config)), encoding="utf-8")
                config = AutoConfig.from_pretrained(directory)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            settings = peft.PeftConfig.from_pretrained(str(self._adapter))
            with warnings.catch_warnings():  # of what is trained, which is over
                warnings.simplefilter("ignore")
                adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=True).base_model
            layers = {
                name: layer
                for name, layer in adapted.model.named_modules()
                if isinstance(layer, peft.tuners.lora.layer.LoraLayer)
            }
            return adapted.unload(), shapes, layers
        except (
            Exception
        ) as error:  # whatever these two raise, the adapter can't be put on a model of that configuration
            raise ModelError(
                "PEFT can't put the adapter on a model like its base",
                place=self._name,
                got=describe_error(error, lines=2),
                fix="set `base_model_name_or_path` in adapter_config.json to the model that it was trained on",
            ) from error

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._model[1])

    @property
    def _layers(self) -> dict[str, Any]:
        return dict(self._model[2])

    def _parts(self, name: str) -> Iterator[StoredPart]:
        """Send a parameter's places the way that transformers saves it, and see where they come out."""
        from transformers.core_model_loading import revert_weight_conversion

        model, shape = self._model[0], self._shapes[name]
        small = (*shape[:-2], _ROWS, _COLUMNS)
        places = torch.arange(torch.Size(small).numel()).view(small)
        owner, _, last = name.rpartition(".")
        # Some conversions look at the shape that the model has.
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(torch.empty(small, device="meta")))
        try:
            saved = revert_weight_conversion(model, {name: places})
            for key, found in saved.items():
                yield _stored_part(key, found)
        except Exception as error:
            raise ModelError(
                f"how `{name}` lies in the base's files isn't understood",
                place=self._name,
                got=first_line(error),
                fix="fold it with peft's `merge_and_unload` and save the model",
            ) from error


def _stored_part(name: str, found: Tensor) -> StoredPart:
    """Return what a saved tensor is a part of, from the numbers of the places that it holds."""
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
