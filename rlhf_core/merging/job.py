"""A merge as it was asked for: a method or a file, with flags, made into a checked configuration.

A file is flat: the keys of `MergeConfig` and the method's options by name; `compat` sets options. One of mergekit's files is
known by its key `merge_method`, and read as it is. Defaults give way to the file, the file to flags. Relative paths start at the
current directory, those in a file too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import registry
from rlhf_core.config.base import place_of
from rlhf_core.config.flags import Flag, convert, convert_options, lex, refuse_unknown
from rlhf_core.config.yaml_file import dump_yaml, nest
from rlhf_core.config.yaml_file import merge as merge_values
from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ConfigError, did_you_mean, shortened
from rlhf_core.infra.model_files import split_adapter
from rlhf_core.infra.redact import redact
from rlhf_core.interop import mergekit
from rlhf_core.interop.mergekit_methods import parity
from rlhf_core.merging.config import MergeConfig, ModelEntry
from rlhf_core.merging.inputs import check_own
from rlhf_core.merging.merge import ModelMerger, Progress
from rlhf_core.merging.method import Method, is_number
from rlhf_core.merging.model_score import Evaluate
from rlhf_core.merging.weights import LayerValues
from rlhf_core.registry.method_or_file import find_method, read_method_or_file

COMPAT = "compat"
_FILE_KEYS = (*MergeConfig.KEYS, COMPAT)
_OF_MODEL = re.compile(r"models\.(\d+)\.(.+)")
"""Flags that say something of one model, by its number in the list."""
_FLAG_KEYS = (*(key for key in MergeConfig.KEYS if key != "models"), "model", COMPAT)


@dataclass(frozen=True)
class MergeJob:
    """What to merge, how, and where each value came from."""

    config: MergeConfig
    plugin: registry.Plugin
    method: type[Merger]
    places: Mapping[str, str]
    """For each dotted key that was set, its place: `file:line`, or a flag."""

    def merger(self, *, evaluate: Evaluate | str | None = None, progress: Progress | None = None) -> ModelMerger:
        """Return the merger; its arguments are `ModelMerger`'s. No model is opened yet."""
        return ModelMerger(self.config, evaluate=evaluate, progress=progress)

    def resolved(self) -> dict[str, Any]:
        """Return every setting as plain values, secrets redacted; as a file it describes the same merge."""
        values = self.config.model_dump(mode="json", exclude={"options", "models"})
        models = [
            {"model": entry["model"], "weight": entry.get("weight", 1.0), **entry.get("options", {})}
            for entry in self.config.model_dump(mode="json", exclude_unset=True)["models"]
        ]
        options = self._options()
        head = {"method": values.pop("method"), "base": values.pop("base"), "models": models}
        values = {**head, "output": values.pop("output"), **options, **values}
        return {key: redact(value, key) for key, value in values.items()}

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a file."""
        return dump_yaml(self.resolved())

    def _options(self) -> dict[str, Any]:
        method = Method(self.config, place=self.places)
        known = method.merger.config.model_dump(mode="json")
        given = self.config.model_dump(mode="json", exclude_unset=True).get("options", {})
        return {name: given.get(name, value) for name, value in known.items() if name not in MergeConfig.KEYS}


def load_merge_job(
    target: str | Path, overrides: Mapping[str, Any] | None = None, *, flags: Sequence[str] = ()
) -> MergeJob:
    """Resolve a method's name or a file into a merge that can start.

    Args:
        target: a name such as `ties` or `acme-merge:ties`, or the path of a YAML file, ours or mergekit's.
        overrides: keys and options from Python: `{"models": ["a", "b"], "density": 0.3}`.
        flags: the same as command-line tokens: `["--model", "a=0.5", "--density", "0.3"]`.

    Raises:
        ConfigError: an unknown method, key or option, a missing one, or a wrong value.
        PluginError: the method is broken, ambiguous or disabled.
    """
    given = lex(flags)
    values, places, _ = read_method_or_file(target)
    over, over_places = _key_flags(given)
    over = {**(overrides or {}), **over}
    theirs = mergekit.KEY in values
    compat = _compat(over.pop(COMPAT, None if theirs else values.pop(COMPAT, None)), {**places, **over_places})
    if theirs:
        values, places = mergekit.translate(values, places, strict=compat)
    values |= over
    places = {key: place for key, place in places.items() if key.partition(".")[0] not in over} | over_places
    plugin, method = find_method(values, places, "merger")
    name = str(values["method"])
    keys = {key: values.pop(key) for key in MergeConfig.KEYS if key in values}
    keys["models"] = _with_flags(keys.get("models"), given, method, name, places)
    _refuse_lambda(values, given, method, name, places)
    refuse_unknown(values, method.Config, name, places, _FILE_KEYS)
    option_flags = [flag for flag in given if flag.key not in _FLAG_KEYS and not _OF_MODEL.match(flag.name)]
    options, option_places = convert_options(option_flags, method.Config, name, _FLAG_KEYS)
    places |= option_places
    options = _laid(values, options)
    if compat and not theirs:
        options = parity(plugin.name, options, places)
    for key, value in options.items():
        if is_number(method, key):
            check_value(value, key, places)
    keys["models"] = _entries(keys["models"], method, name, places)
    config = MergeConfig.parse({**keys, "options": options}, place=places)
    _check(config, places)
    return MergeJob(config, plugin, method, places)


def model_flag(text: str) -> dict[str, Any]:
    """Return a model from `PATH` or `PATH=WEIGHT`; a path that is there with its `=` is taken as it stands.

    Raises:
        ConfigError: the path is there, and what follows it is no weight.
    """
    path, _, number = text.rpartition("=")
    if not path or _is_there(text):
        return {"model": text}
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if math.isfinite(weight):
        return {"model": path, "weight": weight}
    if "/" not in number and _is_there(path):
        raise ConfigError(
            f"the weight of {path} is no finite number",
            place="--model",
            got=f"`{number}`",
            fix=f"write `--model {path}=0.5`, or `--model {path}` for a weight of 1",
        )
    return {"model": text}


def _is_there(name: str) -> bool:
    """Tell whether a model's directory exists, or both of `BASE+ADAPTER`."""
    pair = split_adapter(name)
    return all(map(_is_there, pair)) if pair is not None else Path(name).expanduser().exists()


def check_value(value: Any, key: str, places: Mapping[str, str]) -> None:
    """Raise where values by place are wrong: what is wrong inside is told, and not that they are no number."""
    if isinstance(value, Mapping):
        for part, one in (value["filters"] if isinstance(value.get("filters"), Mapping) else {}).items():
            check_value(one, f"{key}.filters.{part}", places)
        inner = {"": place_of(key, places)}
        inner |= {at[len(key) + 1 :]: place for at, place in places.items() if at.startswith(f"{key}.")}
        LayerValues.parse(value, place=inner)


def _refuse_lambda(
    values: Mapping[str, Any], given: Sequence[Flag], method: type[Merger], name: str, places: Mapping[str, str]
) -> None:
    """Raise where λ is called as in papers and in mergekit, by a method that calls it `scale`."""
    fields = method.Config.model_fields
    flag = next((flag for flag in given if flag.key == "lambda"), None)
    if (flag is not None or "lambda" in values) and "lambda" not in fields and "scale" in fields:
        place = place_of("lambda", places) if flag is None else flag.typed
        raise ConfigError(f"unknown option `lambda` of {name}", place=place, fix="λ is called `scale` here")


def _key_flags(given: Sequence[Flag]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values and places of the flags that aren't options of the method."""
    plain = [flag for flag in given if flag.key in MergeConfig.KEYS and flag.key != "models"]
    bases = [flag for flag in plain if flag.key == "base"]
    if len(bases) > 1:  # it may be a list, but of layers, which no flag can say
        raise ConfigError(f"given {len(bases)} times", place=bases[0].typed, fix="keep one of them")
    values, places = convert(plain, MergeConfig, owner="merge")
    models, compat = ([flag for flag in given if flag.key == key] for key in ("model", COMPAT))
    for flag in [*models, *compat]:
        if not flag.text:
            raise ConfigError("needs a value", place=flag.typed, fix=f"write `{flag.typed} VALUE`")
    if models:
        values["models"] = [model_flag(str(flag.text)) for flag in models]
        places["models"] = models[0].typed
    if compat:
        values[COMPAT], places[COMPAT] = compat[-1].text, compat[-1].typed
    if wrong := next(
        (flag for flag in given if re.match(r"models(\.|$)", flag.key) and not _OF_MODEL.match(flag.name)), None
    ):
        fix = "write `--model A=0.7 --model B=0.3`, and `--models.0.OPTION VALUE` for an option of the first"
        raise ConfigError("models are given one by one", place=wrong.typed, fix=fix)
    return values, places


def _with_flags(models: Any, given: Sequence[Flag], method: type[Merger], name: str, places: dict[str, str]) -> Any:
    """Return the models with what flags such as `--models.0.density 0.3` say of one of them, by its number."""
    of_models = [(match, flag) for flag in given if (match := _OF_MODEL.match(flag.name))]
    if not of_models or not isinstance(models, list | tuple):
        return models
    entries = [{"model": one} if isinstance(one, str) else one for one in models]
    for number in dict.fromkeys(int(match[1]) for match, _ in of_models):
        flags = [Flag(match[2], flag.text) for match, flag in of_models if int(match[1]) == number]
        at = f"models.{number}"
        if number >= len(entries):
            counted = f"{len(entries)} models, counted from 0"
            raise ConfigError("there is no such model", place=f"--{at}.{flags[0].name}", got=counted)
        entry = entries[number]
        own: Any = entry.get("options", {}) if isinstance(entry, Mapping) else None
        if not isinstance(entry, Mapping) or not isinstance(own, Mapping):
            continue  # an error of its own, reported where entries are read
        for flag in flags:
            if (key := flag.key.partition(".")[0]) != "weight":
                check_own(key, method, name, f"--{at}.{flag.name}")
        try:
            values, set_at = convert([flag for flag in flags if flag.key == "weight"], ModelEntry, owner="merge")
            more, more_at = convert([flag for flag in flags if flag.key != "weight"], method.Config, owner=name)
        except ConfigError as error:
            place, fix = (text and text.replace("--", f"--{at}.") for text in (error.place, error.fix))
            raise ConfigError(error.problem, place=place, got=error.got, fix=fix) from None
        for key, place in {**set_at, **more_at}.items():
            places[f"{at}.{key}"] = places[f"{at}.options.{key}"] = place.replace("--", f"--{at}.")
        plain = {key: value for key, value in entry.items() if key != "options"}
        entries[number] = _laid({**plain, **own}, {**values, **more})
    return entries


def _laid(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with those of flags over them; a dotted one sets one entry of a group."""
    laid = dict(values)
    for key, value in flags.items():
        laid = merge_values(laid, nest({key: value})) if "." in key else {**laid, key: value}
    return laid


def _compat(value: Any, places: Mapping[str, str]) -> bool:
    if value not in (None, "mergekit"):
        raise ConfigError(
            "there are no definitions of that name",
            place=place_of(COMPAT, places),
            got=shortened(value),
            fix=did_you_mean(str(value), ["mergekit"]),
        )
    return value is not None


def _entries(models: Any, method: type[Merger], name: str, places: dict[str, str]) -> list[dict[str, Any]]:
    """Return the models as `ModelEntry` takes them: a model's own options stand beside its name and weight, or in `options`."""
    where = place_of("models", places)
    if models is None:
        raise ConfigError(
            "`models` is missing", place=where, fix="give `--model A --model B`, or `models:` in the file"
        )
    if not isinstance(models, list | tuple) or not models:
        raise ConfigError("`models` is no list of models", place=where, got=shortened(models))
    entries = []
    for number, given in enumerate(models):
        at = f"models.{number}"
        if not isinstance(given, str | Mapping):
            raise ConfigError(
                "a model is a name, or a group with `model`", place=place_of(at, places), got=shortened(given)
            )
        entry = {"model": given} if isinstance(given, str) else dict(given)
        own = entry.pop("options", {})
        if not isinstance(own, Mapping):
            raise ConfigError("`options` is a group", place=place_of(f"{at}.options", places), got=shortened(own))
        own = {**own, **{key: entry.pop(key) for key in list(entry) if key not in ("model", "weight")}}
        for key in own:
            check_own(str(key), method, name, place_of(f"{at}.{key}", places))
        for key, value in {**own, "weight": entry.get("weight", 1.0)}.items():
            if key == "weight" or is_number(method, key):
                check_value(value, f"{at}.{key}", places)
            if f"{at}.{key}" in places:
                places.setdefault(f"{at}.options.{key}", places[f"{at}.{key}"])
        entries.append({**entry, **({"options": own} if own else {})})
    return entries


def _check(config: MergeConfig, places: Mapping[str, str]) -> None:
    """Check the method's options, and weights that don't vary, before anything is opened."""
    merger = Method(config, place=places).merger
    weights = [entry.weight for entry in config.models]
    if all(isinstance(weight, float) for weight in weights):
        try:
            merger.check_weights([float(weight) for weight in weights])  # type: ignore[arg-type]
        except ConfigError as error:
            place = place_of("models.0.weight", places)
            raise ConfigError(error.problem, place=place, got=error.got, fix=error.fix) from None
