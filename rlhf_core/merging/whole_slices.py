"""The `slices` of one of mergekit's files where they amount to whole models: the common way to write a slerp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.config_errors import place_of
from rlhf_core.errors import ConfigError, ModelError, shortened
from rlhf_core.infra.files import read_json
from rlhf_core.infra.model_files import adapter_base, first_line, is_adapter, locate
from rlhf_core.merging.mergekit_values import Setting


def from_slices(
    slices: Any, shared: Mapping[str, Any], places: Mapping[str, str], model: Callable[[Any, str], str]
) -> tuple[list[Setting], list[Setting]]:
    """Return the models with their parameters, and those of the slices.

    Args:
        slices: what stands in the file.
        shared: the parameters of all.
        places: where each key stands.
        model: checks a model's name.

    Raises:
        ConfigError: the slices are something else than whole models, one beside the other.
    """

    def fault(problem: str, key: str, got: object = None) -> ConfigError:
        fix = "list whole models under `models`; layers that are put together anew are not supported"
        return ConfigError(problem, place=place_of(key, places), got=got, fix=fix)

    if not isinstance(slices, list) or not slices or not all(isinstance(one, Mapping) for one in slices):
        raise fault("`slices` is no list of groups with `sources`", "slices", shortened(slices))
    first: list[Setting] = []
    reached = 0
    for number, one in enumerate(slices):
        key = f"slices.{number}"
        if set(one) - {"sources", "parameters"} or not isinstance(one.get("sources"), list) or not one["sources"]:
            raise fault("a slice has `sources` and `parameters`", key, shortened(one))
        sources = []
        spans = set()
        for place, source in enumerate(one["sources"]):
            inner = f"{key}.sources.{place}"
            if not isinstance(source, Mapping) or set(source) - {"model", "layer_range", "parameters"}:
                raise fault("a source has `model`, `layer_range` and `parameters`", inner, shortened(source))
            span = source.get("layer_range")
            if not isinstance(span, list) or len(span) != 2 or not all(type(one) is int for one in span):
                raise fault("`layer_range` is no range of layers", inner, shortened(span))
            spans.add((span[0], span[1]))
            own = source.get("parameters") or {}
            sources.append(Setting(model(source.get("model"), f"{inner}.model"), own, f"{inner}.parameters"))
        if len(spans) > 1:
            raise fault("layers of different places are merged with each other", key, sorted(spans))
        start, stop = spans.pop()
        if start != reached:
            raise fault(
                "slices don't follow each other from the first layer to the last", key, f"{start} after {reached}"
            )
        reached = stop
        same = [(a.model, a.values) for a in sources] == [(a.model, a.values) for a in first]
        if first and not (same and one.get("parameters") == slices[0].get("parameters")):
            raise fault("slices differ in models or parameters", key)
        first = first or sources
    depth = _depth(first[0].model)
    if reached != depth:
        raise fault("slices don't amount to the whole model", "slices", f"{reached} of {depth} layers")
    groups = [slices[0].get("parameters") or {}, shared, *(source.values for source in first)]
    if len(slices) > 1 and any(_has_gradient(value) for group in groups for value in group.values()):
        raise fault("a gradient starts anew in each slice", "slices")
    return first, [Setting("", slices[0].get("parameters") or {}, "slices.0.parameters")]


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _has_gradient(value.get("value"))
    if not isinstance(value, list):
        return False
    return any(_has_gradient(one) for one in value) or not any(isinstance(one, Mapping) for one in value)


def _depth(name: str) -> int:
    """Return how many layers a model has, by its configuration."""
    whole, plus, _ = name.rpartition("+")
    where, _ = locate(whole if plus and not Path(name).expanduser().exists() else name)
    if is_adapter(where):
        return _depth(adapter_base(where))
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
