"""A merge as the user asks for it: a method or a file, with flags, made into a checked configuration.

A file is flat: the keys of `MergeConfig` and the method's options by name; `compat: mergekit` sets the options with which the
method computes what mergekit does. mergekit's files are recognised by their key `merge_method` and translated. The file overrides
defaults, flags override the file. Relative paths start at the current directory, those in a file too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rlhf_core.config.base import place_of
from rlhf_core.config.flags import Flag, convert, convert_options, lex, refuse_unknown
from rlhf_core.config.yaml_file import dump_yaml, nest, overlay
from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ConfigError, did_you_mean, shortened
from rlhf_core.infra.model_files import split_adapter
from rlhf_core.infra.redact import redact
from rlhf_core.interop import mergekit
from rlhf_core.interop.mergekit_methods import parity
from rlhf_core.merging.config import MergeConfig, ModelEntry
from rlhf_core.merging.merge import ModelMerger, Progress
from rlhf_core.merging.merge_input import check_own
from rlhf_core.merging.method import MergeMethod
from rlhf_core.merging.model_score import Evaluate
from rlhf_core.registry.discovery import Plugin
from rlhf_core.registry.method_or_file import GivenValues, find_method, read_method_or_file

COMPAT = "compat"
_OF_MODEL = re.compile(r"models\.(\d+)\.(.+)")
"""The flags of one input model: its number in the list, and an option."""


class _FlagKeys(MergeConfig):
    """What flags other than options of the method can set."""

    base: str | None = None
    model: list[str] = Field(default_factory=list)
    compat: str | None = None


_FILE_KEYS = (*MergeConfig.KEYS, COMPAT)
_FLAG_KEYS = tuple(key for key in _FlagKeys.model_fields if key not in ("models", "options"))


@dataclass(frozen=True)
class MergeJob:
    """A checked merge: its configuration, its method, and where each value came from."""

    config: MergeConfig
    method: MergeMethod
    places: Mapping[str, str]
    """For each dotted key that was set, its place: `file:line`, or a flag."""

    @property
    def plugin(self) -> Plugin:
        """The plugin that provides the method."""
        return self.method.plugin

    def merger(self, *, evaluate: Evaluate | str | None = None, progress: Progress | None = None) -> ModelMerger:
        """Return the merger; its arguments are `ModelMerger`'s. No model is opened yet."""
        return ModelMerger(self.config, evaluate=evaluate, progress=progress, method=self.method)

    def resolved(self) -> dict[str, Any]:
        """Return the complete configuration as plain values, secrets redacted; as a file it describes the same merge."""
        given = self.config.model_dump(mode="json", exclude_unset=True)
        models = [
            {"model": entry["model"], "weight": entry.get("weight", 1.0), **entry.get("options", {})}
            for entry in given["models"]
        ]
        options = self.method.merger.config.model_dump(mode="json") | given.get("options", {})
        values = self.config.model_dump(mode="json", exclude={"options"})
        main_keys = {key: values[key] for key in ("method", "base")} | {"models": models, "output": values["output"]}
        method_options = {name: value for name, value in options.items() if name not in MergeConfig.KEYS}
        found: dict[str, Any] = redact({**main_keys, **method_options, **values, "models": models})
        return found

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a file."""
        return dump_yaml(self.resolved())


def load_merge_job(
    target: str | Path | GivenValues, overrides: Mapping[str, Any] | None = None, *, flags: Sequence[str] = ()
) -> MergeJob:
    """Return the merge that a method's name or a file describes, with flags.

    Args:
        target: a name such as `ties` or `acme-merge:ties`, the path of a YAML file, ours or mergekit's, or values that were read
            already.
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
    compat = _wants_mergekit(over.pop(COMPAT, None if theirs else values.pop(COMPAT, None)), {**places, **over_places})
    if theirs:
        values, places = mergekit.translate(values, places, strict=compat)
    values |= over
    places = {key: place for key, place in places.items() if key.partition(".")[0] not in over} | over_places
    plugin, method = find_method(values, places, "merger")
    name = str(values["method"])
    keys = {key: values.pop(key) for key in MergeConfig.KEYS if key in values}
    typed = {flag.key: flag.typed for flag in given}
    if "lambda" in {*values, *typed} and {"lambda", "scale"} & {*method.Config.model_fields} == {"scale"}:
        place = place_of("lambda", {**places, **typed})
        raise ConfigError(f"unknown option `lambda` of {name}", place=place, fix="λ is called `scale` here")
    refuse_unknown(values, method.Config, name, places, _FILE_KEYS)
    option_flags = [flag for flag in given if flag.key not in _FLAG_KEYS and not _OF_MODEL.match(flag.name)]
    options, option_places = convert_options(option_flags, method.Config, name, _FLAG_KEYS)
    places |= option_places
    options = _overridden(values, options)
    if compat and not theirs:
        options = parity(plugin.name, options, places)
    keys["models"] = _entries(keys.get("models"), places)
    _set_by_flags(keys["models"], given, method, name, places)
    config = MergeConfig.parse({**keys, "options": options}, place=places)
    return MergeJob(config, _checked(MergeMethod(config, place=places, found=(plugin, method)), places), places)


def model_flag(text: str) -> dict[str, Any]:
    """Return an entry of `models` for `PATH` or `PATH=WEIGHT`; a path that exists with an `=` in it is taken as a whole.

    Raises:
        ConfigError: the path exists, and what follows the `=` is not a finite number.
    """
    path, _, number = text.rpartition("=")
    if not path or _exists(text):
        return {"model": text}
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if math.isfinite(weight):
        return {"model": path, "weight": weight}
    if "/" not in number and _exists(path):
        raise ConfigError(
            f"the weight of {path} is not a finite number",
            place="--model",
            got=f"`{number}`",
            fix=f"write `--model {path}=0.5`, or `--model {path}` for a weight of 1",
        )
    return {"model": text}


def _exists(name: str) -> bool:
    """Tell whether a model's directory exists, or both of `BASE+ADAPTER`."""
    pair = split_adapter(name)
    return all(map(_exists, pair)) if pair is not None else Path(name).expanduser().exists()


def _key_flags(given: Sequence[Flag]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values and places of the flags that set keys of `MergeConfig`, or `compat`."""
    values, places = convert([flag for flag in given if flag.key in _FLAG_KEYS], _FlagKeys, owner="merge")
    if "model" in values:
        values["models"] = [model_flag(str(text)) for text in values.pop("model")]
        places["models"] = places.pop("model")
    for flag in given:
        if flag.key.partition(".")[0] == "models" and not _OF_MODEL.match(flag.name):
            fix = "write `--model A=0.7 --model B=0.3`, and `--models.0.OPTION VALUE` for an option of the first"
            raise ConfigError("`--models` can't be set as a whole", place=flag.typed, fix=fix)
    return values, places


def _wants_mergekit(value: Any, places: Mapping[str, str]) -> bool:
    """Tell whether `compat: mergekit` is set. Raises ConfigError for any other value."""
    if value not in (None, "mergekit"):
        fix = did_you_mean(str(value), ["mergekit"])
        place = place_of(COMPAT, places)
        raise ConfigError("`compat` must be `mergekit`", place=place, got=shortened(value), fix=fix)
    return value is not None


def _overridden(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return values overridden by those of flags; one with a dotted key sets one entry of a group."""
    result = dict(values)
    for key, value in flags.items():
        result = overlay(result, nest({key: value})) if "." in key else {**result, key: value}
    return result


def _entries(models: Any, places: dict[str, str]) -> list[dict[str, Any]]:
    """Return the input models as `ModelEntry` accepts them, whether their options are under `options` or beside `model`.

    The places of options beside them are added to `places` under `models.N.options`.
    """
    where = place_of("models", places)
    if models is None:
        fix = "give `--model A --model B`, or `models:` in the file"
        raise ConfigError("`models` is missing", place=where, fix=fix)
    if not isinstance(models, list | tuple) or not models:
        raise ConfigError("`models` must be a list of input models", place=where, got=shortened(models))
    entries = []
    for number, given in enumerate(models):
        at = f"models.{number}"
        if not isinstance(given, str | Mapping):
            problem = "an input model must be a name, or a group with `model`"
            raise ConfigError(problem, place=place_of(at, places), got=shortened(given))
        entry = {"model": given} if isinstance(given, str) else dict(given)
        own = entry.pop("options", {})
        if not isinstance(own, Mapping):
            raise ConfigError(
                "`options` must be a group of option names and values",
                place=place_of(f"{at}.options", places),
                got=shortened(own),
            )
        own = {**own, **{str(key): entry.pop(key) for key in list(entry) if key not in ("model", "weight")}}
        for key, place in list(places.items()):
            if key.startswith(f"{at}."):
                places.setdefault(f"{at}.options.{key.removeprefix(f'{at}.')}", place)
        entries.append({**entry, **({"options": own} if own else {})})
    return entries


def _set_by_flags(
    entries: list[dict[str, Any]], given: Sequence[Flag], method: type[Merger], name: str, places: dict[str, str]
) -> None:
    """Change the entries by flags of one model, such as `--models.0.density 0.3`, and note the flags in `places`."""
    of_models: dict[int, list[Flag]] = {}
    for flag in given:
        if match := _OF_MODEL.match(flag.name):
            of_models.setdefault(int(match[1]), []).append(Flag(match[2], flag.text))
    for number, flags in of_models.items():
        at = f"models.{number}"
        if number >= len(entries):
            counted = f"{len(entries)} models, counted from 0"
            raise ConfigError(f"there is no input model {number}", place=f"--{at}.{flags[0].name}", got=counted)
        own = [flag for flag in flags if flag.key.partition(".")[0] != "weight"]
        for flag in own:
            check_own(flag.key.partition(".")[0], method, name, f"--{at}.{flag.name}")
        try:
            weight, weight_places = convert([flag for flag in flags if flag not in own], ModelEntry, owner="merge")
            options, option_places = convert(own, method.Config, owner=name)
        except ConfigError as error:
            place, fix = (text and text.replace("--", f"--{at}.") for text in (error.place, error.fix))
            raise ConfigError(error.problem, place=place, got=error.got, fix=fix) from None
        for key, place in {**weight_places, **option_places}.items():
            places[f"{at}.{key}"] = places[f"{at}.options.{key}"] = place.replace("--", f"--{at}.")
        entry = _overridden(entries[number], weight)
        entries[number] = entry | ({"options": _overridden(entry.get("options", {}), options)} if options else {})


def _checked(method: MergeMethod, places: Mapping[str, str]) -> MergeMethod:
    """Return the method, after checking its weights where they don't differ between layers: before any model is opened."""
    weights = [entry.weight for entry in method.config.models]
    if all(isinstance(weight, float) for weight in weights):
        try:
            method.merger.check_weights([float(weight) for weight in weights])  # type: ignore[arg-type]
        except ConfigError as error:
            place = place_of("models.0.weight", places)
            raise ConfigError(error.problem, place=place, got=error.got, fix=error.fix) from None
    return method
