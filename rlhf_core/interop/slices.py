"""The `slices` of one of mergekit's files: runs of layers, each merged from sources of its own, put one on the other.

Sources at one place in each slice make up one model of the merge. Where its runs are a whole model in its order, it is that
model; else it is put together of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.config.base import place_of
from rlhf_core.infra.errors import ConfigError, ModelError, did_you_mean, first_line, shortened
from rlhf_core.infra.files import read_json
from rlhf_core.infra.model_files import adapter_base, is_adapter, locate, split_adapter
from rlhf_core.interop.mergekit_parameters import Setting

log = logging.getLogger(__name__)


@dataclass
class Column:
    """One model of a merge, over all slices."""

    model: Any
    """Its name, or runs of layers."""
    settings: list[list[Setting]] = field(default_factory=list)
    """For each slice what is set there, what counts first first."""
    key: str = ""
    """Where it stands in the file."""


@dataclass
class Slices:
    """What a file's slices say."""

    columns: list[Column]
    shared: list[list[Setting]]
    """For each slice, what holds for all of its models."""
    base: Any
    """The base's name, or runs of layers; None where there is none."""
    counts: list[int]
    """Layers of each slice."""


@dataclass(frozen=True)
class _Source:
    model: str
    start: int
    stop: int
    setting: Setting


class _Reader:
    def __init__(self, places: Mapping[str, str], model: Callable[[Any, str], str]) -> None:
        self.places, self.model = places, model

    def fault(self, problem: str, key: str, *, got: object = None, fix: str | None = None) -> ConfigError:
        return ConfigError(problem, place=place_of(key, self.places), got=got, fix=fix)

    def slice(self, given: Any, key: str) -> tuple[list[_Source], str | None, Setting]:
        """Return a slice's sources, its own base and its own parameters."""
        known = ("sources", "parameters", "base_model", "residual_weight")
        if not isinstance(given, Mapping) or not isinstance(given.get("sources"), list) or not given["sources"]:
            raise self.fault("a slice has `sources`", key, got=shortened(given))
        for extra in set(given) - {*known}:
            raise self.fault(f"unknown key `{extra}` of a slice", f"{key}.{extra}", fix=did_you_mean(str(extra), known))
        sources = [self.source(one, f"{key}.sources.{place}") for place, one in enumerate(given["sources"])]
        if len({one.stop - one.start for one in sources}) > 1:
            spans = [[one.start, one.stop] for one in sources]
            raise self.fault("sources of one slice have runs of several lengths", key, got=spans)
        if given.get("residual_weight") is not None:
            log.warning("%s: `residual_weight` has no effect, in mergekit as here", place_of(key, self.places))
        base = given.get("base_model")
        own = None if base is None else self.model(base, f"{key}.base_model")
        return sources, own, Setting("", given.get("parameters") or {}, f"{key}.parameters")

    def source(self, given: Any, key: str) -> _Source:
        known = ("model", "layer_range", "parameters")
        if not isinstance(given, Mapping):
            raise self.fault("a source has `model`, `layer_range` and `parameters`", key, got=shortened(given))
        for extra in set(given) - {*known}:
            raise self.fault(
                f"unknown key `{extra}` of a source", f"{key}.{extra}", fix=did_you_mean(str(extra), known)
            )
        name, span = self.model(given.get("model"), f"{key}.model"), given.get("layer_range")
        if span is None:
            span = [0, depth_of(name)]
        if not isinstance(span, list) or len(span) != 2 or not all(type(one) is int for one in span):
            raise self.fault("`layer_range` is no range of layers", f"{key}.layer_range", got=shortened(span))
        if not 0 <= span[0] < span[1]:
            raise self.fault(
                "`layer_range` holds no layer", f"{key}.layer_range", got=span, fix="[first, one after the last]"
            )
        return _Source(name, span[0], span[1], Setting(name, given.get("parameters") or {}, f"{key}.parameters"))


def read_slices(
    given: Any,
    shared: list[Setting],
    base: str | None,
    places: Mapping[str, str],
    model: Callable[[Any, str], str],
    *,
    based: bool,
    at: str = "slices",
) -> Slices:
    """Return what slices say.

    Args:
        given: what stands in the file.
        shared: parameters of the whole file.
        base: its base model, for slices that have none of their own.
        places: where each key stands.
        model: checks a model's name.
        based: whether the method takes differences from the base, which is then one of each slice's sources and no model.
        at: the key under which they stand.

    Raises:
        ConfigError: the slices say what has no meaning.
    """
    reader = _Reader(places, model)
    if not isinstance(given, list) or not given:
        raise reader.fault("`slices` is no list of groups with `sources`", at, got=shortened(given))
    read = [reader.slice(one, f"{at}.{number}") for number, one in enumerate(given)]
    bases: list[_Source] = []
    rows: list[list[_Source]] = []
    for number, (sources, own, _) in enumerate(read):
        wanted = own or base
        if based and wanted is not None:
            found = next((one for one in sources if one.model == wanted), None)
            if found is None:
                raise reader.fault(
                    "the base model is none of the slice's sources",
                    f"{at}.{number}",
                    got=wanted,
                    fix="add it to `sources`",
                )
            bases.append(found)
            sources = [one for one in sources if one is not found]
        if not sources:
            raise reader.fault("the slice has no source besides the base model", f"{at}.{number}")
        rows.append(sources)
    counts = [sources[0].stop - sources[0].start for sources, _, _ in read]
    columns = []
    for place in range(max(len(row) for row in rows)):
        there = [row[place] if place < len(row) else None for row in rows]
        columns.append(Column(_whole(there, rows), key=next(one.setting.key for one in there if one is not None)))
        for one, (_, _, own_setting) in zip(there, read, strict=True):
            columns[-1].settings.append([*([one.setting] if one is not None else []), own_setting, *shared])
    for_all = [[own_setting, *shared] for _, _, own_setting in read]
    return Slices(columns, for_all, _whole([*bases], rows) if bases else base, counts)


def _whole(sources: list[_Source | None], rows: list[list[_Source]]) -> Any:
    """Return the name of the model that runs amount to, or the runs where they are no whole model."""
    first = sources[0]
    if first is not None and all(one is not None and one.model == first.model for one in sources):
        ends = [0, *(one.stop for one in sources if one is not None)]
        follow = all(one is not None and one.start == end for one, end in zip(sources, ends[:-1], strict=True))
        if follow and ends[-1] == depth_of(first.model):
            return first.model
    runs = []
    for one, row in zip(sources, rows, strict=True):
        stand_in = one or row[0]
        runs.append({"model": one.model if one is not None else None, "layers": [stand_in.start, stand_in.stop]})
    return runs


def depth_of(name: str) -> int:
    """Return how many layers a model has, by its configuration."""
    where, _ = locate((split_adapter(name) or (name,))[0])
    if is_adapter(where):
        return depth_of(adapter_base(where))
    try:
        if Path(where).is_dir():
            config = read_json(Path(where) / "config.json")
        else:
            from huggingface_hub import hf_hub_download

            config = read_json(Path(hf_hub_download(where, "config.json")))
        inner = config.get("text_config") or config
        return int(inner.get("num_hidden_layers") or inner["n_layer"])
    except Exception as error:
        raise ModelError("how many layers it has can't be read", place=name, got=first_line(error)) from error
