"""The format of mergekit's files: their keys, and their input models with the layers and parameters of each slice."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from rlhf_core.config.base import BaseConfig, place_of
from rlhf_core.infra.errors import ConfigError, ModelError, first_line
from rlhf_core.infra.files import read_json
from rlhf_core.infra.model_files import adapter_base, is_adapter, locate, require_on_hub, split_adapter
from rlhf_core.interop.mergekit_parameters import ParameterScope

log = logging.getLogger(__name__)


def _model_name(name: str) -> str:
    """Return a model's name; raise where it asks for a revision of a hub model (`NAME@REVISION`)."""
    if "@" in name and not Path(name).expanduser().exists():
        raise ValueError("hub revisions (`NAME@REVISION`) aren't supported: download the model and give its path")
    return name


def _layers(span: tuple[int, int]) -> tuple[int, int]:
    """Return a layer range (first, end), the end excluded; raise where it is empty."""
    if not 0 <= span[0] < span[1]:
        raise ValueError("empty layer range: write [first, last + 1]")
    return span


_ModelName = Annotated[str, Field(min_length=1), AfterValidator(_model_name)]
_Parameters = Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]
_Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    BeforeValidator(lambda given: given.removeprefix("torch.") if isinstance(given, str) else given),
]


class _Model(BaseConfig):
    """An input model with its parameters."""

    model: _ModelName
    parameters: _Parameters = Field(default_factory=dict)


class _Source(_Model):
    """Layers of one input model, all of them where no range is given."""

    layer_range: Annotated[tuple[int, int], AfterValidator(_layers)] | None = None


class _Slice(BaseConfig):
    """Layers of the result, merged from as many layers of each source."""

    sources: list[_Source] = Field(min_length=1)
    base_model: _ModelName | None = None
    residual_weight: Any = None
    parameters: _Parameters = Field(default_factory=dict)


class _Module(BaseConfig):
    """Input models, whole or in slices, with the parameters that they share."""

    models: list[_Model] | None = Field(None, min_length=1)
    slices: list[_Slice] | None = Field(None, min_length=1)
    parameters: _Parameters = Field(default_factory=dict)


class _Tokenizer(BaseConfig):
    """Which tokenizer the result has; `tokens`, choices for single tokens, are not supported."""

    source: _ModelName = "union"
    pad_to_multiple_of: int | None = None
    tokens: Any = None


class MergekitFile(_Module):
    """The keys of a file; those that have no effect are left out."""

    merge_method: str
    modules: dict[str, _Module] | None = None
    base_model: _ModelName | None = None
    dtype: _Dtype = None
    out_dtype: _Dtype = None
    tokenizer: _Tokenizer | None = None
    tokenizer_source: _ModelName | None = None
    chat_template: str | None = None
    random_seed: int | None = None


class MergekitModel(NamedTuple):
    """One input model of the merge: the n-th source of each slice."""

    model: Any
    """Its name, or runs of layers as `LayerRun` of `rlhf_core.merging` accepts them."""
    scopes: list[list[ParameterScope]]
    """For each slice, where its parameters may be set, the narrowest scope first."""
    key: str
    """Its dotted key in the file, for messages."""


class MergekitModels(NamedTuple):
    """The input models of a file by slice; a file of whole models has one slice."""

    models: list[MergekitModel]
    """The input models, without the base where task vectors are taken from it."""
    base: Any
    """The base model's name, or its runs of layers; None where there is none."""
    counts: list[int]
    """The number of layers of each slice; 0 for whole models."""
    shared: list[list[ParameterScope]]
    """For each slice, where parameters of all models may be set, the narrowest scope first."""
    scopes: list[ParameterScope]
    """Every place of the file where parameters are set."""


def read_models(file: MergekitFile, places: Mapping[str, str], *, needs_base: bool) -> MergekitModels:
    """Return the input models from `models` or `slices` of a file, or of its only module.

    Args:
        file: the file.
        places: `file:line` of each dotted key, for messages.
        needs_base: whether the method merges task vectors; the base is then one of each slice's sources, and no input model.

    Raises:
        ConfigError: there are several modules, or the sources of a slice don't fit together.
        ModelError: the number of a model's layers can't be read.
    """
    return _Reader(places).models(file, needs_base)


_WHOLE = (0, 0)
"""The span of a whole model, where the file names no layers."""


class _Run(NamedTuple):
    """A run of layers of one model: a source of a slice."""

    model: str
    span: tuple[int, int]
    """The first layer and the one after the last, or `_WHOLE`."""
    scope: ParameterScope


class _Reader:
    """Reads one file and collects the scopes in which it sets parameters."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = places
        self.scopes: list[ParameterScope] = []

    def models(self, file: MergekitFile, needs_base: bool) -> MergekitModels:
        """Return the input models; whole ones are read as the sources of one slice."""
        given: _Module = file
        at, shared = "", [self.add_scope("parameters", given.parameters)]
        if file.modules is not None:
            if len(file.modules) != 1 or file.models or file.slices:
                raise self.fault(
                    "only a file of one module is supported, without `models` or `slices` beside it", "modules"
                )
            name, given = next(iter(file.modules.items()))
            at = f"modules.{name}."
            shared.insert(0, self.add_scope(f"{at}parameters", given.parameters))
        if given.models is not None and given.slices is None:
            keys, named, by_slice = [f"{at}models"], [file.base_model], [shared]
            rows = [self.runs(keys[0], given.models)]
        elif given.slices is not None and given.models is None:
            keys = [f"{at}slices.{number}" for number in range(len(given.slices))]
            slices = list(zip(keys, given.slices, strict=True))
            named = [one.base_model or file.base_model for one in given.slices]
            by_slice = [[self.add_scope(f"{key}.parameters", one.parameters), *shared] for key, one in slices]
            rows = [self.runs(f"{key}.sources", one.sources) for key, one in slices]
            for key in [key for key, one in slices if one.residual_weight is not None]:
                log.warning("%s: `residual_weight` has no effect (nor has it in mergekit)", place_of(key, self.places))
        else:
            raise self.fault(
                "a mergekit file needs either `models` or `slices`", f"{at}models" if given.models else at.rstrip(".")
            )
        counts = [row[0].span[1] - row[0].span[0] for row in rows]
        base: Any = file.base_model
        if needs_base and any(named):
            base = _joined([self.take_base(*one) for one in zip(rows, named, keys, strict=True)], rows)
        models = []
        for runs in zip_longest(*rows):
            own = [[run.scope] if run is not None else [] for run in runs]
            scopes = [[*one, *wider] for one, wider in zip(own, by_slice, strict=True)]
            key = next(run.scope.key for run in runs if run is not None)
            models.append(MergekitModel(_joined(runs, rows), scopes, key))
        return MergekitModels(models, base, counts, by_slice, self.scopes)

    def fault(self, problem: str, key: str, *, got: object = None, fix: str | None = None) -> ConfigError:
        return ConfigError(problem, place=place_of(key, self.places), got=got, fix=fix)

    def add_scope(self, key: str, values: Mapping[str, Any], *, of_model: bool = False) -> ParameterScope:
        """Record the parameters under a dotted key as a scope, and return it."""
        self.scopes.append(ParameterScope(key, values, of_model))
        return self.scopes[-1]

    def runs(self, key: str, sources: Sequence[_Model]) -> list[_Run]:
        """Return the runs of layers of a slice's sources, `key` being the dotted key of their list."""
        runs = []
        for number, one in enumerate(sources):
            span = _WHOLE if not isinstance(one, _Source) else one.layer_range or (0, _count_layers(one.model))
            scope = self.add_scope(f"{key}.{number}.parameters", one.parameters, of_model=True)
            runs.append(_Run(one.model, span, scope))
        if len({run.span[1] - run.span[0] for run in runs}) > 1:
            spans = [[*run.span] for run in runs]
            raise self.fault("the sources of a slice must have the same number of layers", key, got=spans)
        return runs

    def take_base(self, row: list[_Run], name: str | None, key: str) -> _Run:
        """Return the base's run of layers, and remove it from `row`, the runs of its slice: it is no input model."""
        if name is None:
            raise self.fault("the slice has no base model, though others have one", key, fix="set its `base_model`")
        base = next((run for run in row if run.model == name), None)
        if base is None and row[0].span != _WHOLE:
            fix = "add it to `sources`"
            raise self.fault("the base model must be one of the slice's sources", key, got=name, fix=fix)
        row[:] = [run for run in row if base is None or run[:2] != base[:2]]
        if not row:
            raise self.fault("there is no model besides the base model", key)
        return base or _Run(name, _WHOLE, ParameterScope("base_model", {}))


def _joined(runs: Sequence[_Run | None], rows: Sequence[Sequence[_Run]]) -> Any:
    """Return a stack of runs as the name of a model where they are all of its layers in order, else as a list of runs.

    Args:
        runs: one of each slice; None where the input model has no part in the slice.
        rows: all runs of each slice, by which such a slice's number of layers is known.
    """
    if runs[0] is not None and runs[0].span == _WHOLE:
        return runs[0].model
    names = [run.model if run is not None else None for run in runs]
    spans = [(run or row[0]).span for run, row in zip(runs, rows, strict=True)]
    consecutive = all(stop == start for (_, stop), (start, _) in pairwise(spans))
    one_model = names[0] is not None and len(set(names)) == 1
    if one_model and spans[0][0] == 0 and consecutive and spans[-1][1] == _count_layers(str(names[0])):
        return names[0]
    return [{"model": name, "layers": [*span]} for name, span in zip(names, spans, strict=True)]


def _count_layers(name: str) -> int:
    """Return a model's number of layers, from its config.json; an adapter's from that of its base."""
    where, _ = locate((split_adapter(name) or (name,))[0])
    if is_adapter(where):
        return _count_layers(adapter_base(where))
    try:
        if not Path(where).is_dir():
            from huggingface_hub import hf_hub_download

            require_on_hub(where)
            where = str(Path(hf_hub_download(where, "config.json")).parent)
        config = read_json(Path(where) / "config.json")
        inner = config.get("text_config") or config
        return int(inner.get("num_hidden_layers") or inner["n_layer"])
    except Exception as error:
        raise ModelError(
            "the number of the model's layers can't be read from its configuration", place=name, got=first_line(error)
        ) from error
