"""One training run as it was asked for: a method or a file, with overrides, made into checked configurations.

Defaults give way to the preset, the preset to the file, the file to flags or overrides. A file is flat: the keys of
`RunConfig` (method, model, data, eval_data, output, preset) and the method's options by name. Relative paths in it mean what they
would on the command line: they start at the current directory, not at the file's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml

from rlhf_core import registry
from rlhf_core.config import BaseConfig, RunConfig, TrainerConfig
from rlhf_core.errors import ConfigError, nearest
from rlhf_core.flags import Flag, convert, lex, unknown_option
from rlhf_core.infra.redact import redact, redact_text
from rlhf_core.interfaces import Trainer
from rlhf_core.online import OnlineConfig
from rlhf_core.options import group_of
from rlhf_core.presets import get_preset
from rlhf_core.rewards import check_rewards
from rlhf_core.yaml_files import load_yaml, merge, nest

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Job:
    """What to run, with what, and where each value came from."""

    run: RunConfig
    options: TrainerConfig
    method: type[Trainer[Any]]
    plugin: registry.Plugin
    places: Mapping[str, str]
    """For each dotted key that was set, its place: `file:line`, a flag, or the preset."""
    config_input: str | None = None
    """The text of the configuration file, as it was written."""

    def trainer(self, command: str | None = None) -> Trainer[Any]:
        """Return the trainer, ready to train; nothing is loaded or read yet. `command` is kept in the run directory."""
        trainer = self.method(
            self.options,
            model=self.run.model,
            data=self.run.model_dump()["data"],
            eval_data=self.run.eval_data,
            output=self.run.output,
        )
        trainer.run_inputs = {
            "config_input": self._given() if self.config_input is None else redact_text(self.config_input),
            "command": None if command is None else redact_text(command),
            "plugin": self.plugin.as_dict(),
        }
        return trainer

    def _given(self) -> str:
        """Return what was set without a file, as a file's text."""
        given = {
            **self.run.model_dump(mode="json", exclude_none=True),
            **self.options.model_dump(mode="json", exclude_unset=True),
        }
        return "# from the command line\n" + _yaml({key: redact(value, key) for key, value in given.items()})

    def resolved(self) -> dict[str, Any]:
        """Return every setting as plain values, secrets redacted; as a file it describes the same run."""
        values = {**self.run.model_dump(mode="json"), **self.options.model_dump(mode="json")}
        return {key: redact(value, key) for key, value in values.items()}

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a configuration file."""
        return _yaml(self.resolved())


def load_job(target: str | Path, overrides: Mapping[str, Any] | None = None, *, flags: Sequence[str] = ()) -> Job:
    """Resolve a method's name or a configuration file into a job.

    Args:
        target: a name such as `dpo` or `acme-rlhf:dpo`, or the path of a YAML file.
        overrides: values by dotted key, from Python: `{"beta": 0.2, "lora.rank": 8}`.
        flags: the same as command-line tokens: `["--beta", "0.2", "--lora.rank=8"]`.

    Raises:
        ConfigError: an unknown method, key, option or reward, a missing one, or a wrong value.
        PluginError: the method or a reward is broken, ambiguous or disabled.
    """
    given = lex(flags)
    values, places, text = read_target(target)
    run_flags = [flag for flag in given if flag.key in RunConfig.KEYS]
    over, over_places = convert(run_flags, RunConfig, owner="train")
    overrides = dict(overrides or {})
    run_over = {**{key: overrides.pop(key) for key in RunConfig.KEYS if key in overrides}, **over}
    run_values = {key: values.pop(key) for key in RunConfig.KEYS if key in values} | run_over
    places |= over_places
    plugin, method = find_method(run_values, places, "trainer")
    name = str(run_values["method"])
    refuse_unknown(values, method.Config, name, places, RunConfig.KEYS)
    option_flags = [flag for flag in given if flag.key not in RunConfig.KEYS]
    option_values, option_places = convert_options(option_flags, method.Config, name, RunConfig.KEYS)
    option_values = spread(option_values, method.Config)
    replaced = tuple(f"{key}." for key, value in option_values.items() if isinstance(value, list))
    places = {key: place for key, place in places.items() if not key.startswith(replaced)} | option_places
    preset = _preset(run_values, places)
    options: dict[str, Any] = {}
    for layer in (preset, values, nest(overrides), nest(option_values)):
        options = merge(options, _switches(spread(layer, method.Config), options))
    run = _run(run_values, places)
    config = method.Config.parse(options, place=places)
    if isinstance(config, OnlineConfig):
        check_rewards(config, place=places)
    return Job(run, config, method, plugin, places, text)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def is_file(target: str | Path) -> bool:
    """Tell whether a target means a configuration file, by its name: a path, or an end in .yaml or .yml."""
    text = str(target)
    return isinstance(target, Path) or text.endswith((".yaml", ".yml")) or os.sep in text


def read_target(target: str | Path) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Return what a method's name or a configuration file says: values, the place of each key, and the file's text."""
    if not is_file(target):
        return {"method": str(target)}, {"": COMMAND_LINE, "method": COMMAND_LINE}, None
    values, places = load_yaml(target)
    return values, places, Path(target).read_text(encoding="utf-8-sig")


def find_method(values: Mapping[str, Any], places: Mapping[str, str], kind: str) -> tuple[registry.Plugin, Any]:
    """Return the plugin of some kind that `method` names, and its class.

    Raises:
        ConfigError: no such plugin, or none is named.
        PluginError: it is broken, ambiguous or disabled.
    """
    name = values.get("method")
    if not isinstance(name, str):
        known = ", ".join(registry.View(kind))
        problem = "`method` is missing" if name is None else "`method` is not a name"
        place = places.get("method", places[""])
        raise ConfigError(
            problem, place=place, got=None if name is None else repr(name), fix=f"set it to one of: {known}"
        )
    try:
        plugin = registry.lookup(name, kind)
        return plugin, registry.load(plugin)
    except ConfigError as error:
        fix = error.fix
        if not is_file(name) and Path(f"{name}.yaml").is_file():
            fix = f"write `{name}.yaml` for the file; {fix}"
        raise type(error)(error.problem, place=places.get("method", places[""]), got=error.got, fix=fix) from None


def refuse_unknown(
    values: Mapping[str, Any], config: type[BaseConfig], name: str, places: Mapping[str, str], keys: Sequence[str]
) -> None:
    """Raise where a key of a file is no option of a method; `keys` are the file's own, for the hint."""
    for key in values:
        if str(key) not in config.model_fields:
            place = places.get(str(key), places[""])
            raise unknown_option(str(key), config, owner=name, place=place, also=keys)


def convert_options(
    flags: Sequence[Flag], config: type[BaseConfig], name: str, keys: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values and places of flags that are options of a method; `keys` are no options of it, for the hint."""
    for flag in flags:
        head = flag.key.partition(".")[0]
        near = nearest(head, [*keys, *config.model_fields])
        if head not in config.model_fields and near in keys:
            raise ConfigError(f"unknown option `{flag.name}`", place=flag.typed, fix=f"did you mean `--{near}`?")
    values, places = convert(flags, config, owner=name)
    for group in [key for key in values if any(other.startswith(f"{key}.") for other in values)]:
        if values[group] in (False, None):
            inner = next(other for other in values if other.startswith(f"{group}."))
            raise ConfigError(
                f"`{group}` is off, so `{inner}` has no meaning", place=places[inner], fix="leave one out"
            )
        switched = values.pop(group)  # `--lora --lora.rank 8`, in either order: the group is on, and so filled
        whole = spread({group: switched}, config)[group]  # `--teacher M --teacher.precision bf16`: so is its path
        values = {**({group: whole} if isinstance(whole, Mapping) else {}), **values}
    return values, places


def spread(values: Mapping[str, Any], config: type[BaseConfig]) -> dict[str, Any]:
    """Return options with what stands for a group made that group, and one item a list, for another layer to be merged with."""
    whole = dict(values)
    for name, value in values.items():
        annotation = config.model_fields[name].annotation if name in config.model_fields else None
        alone = getattr(group_of(annotation), "alone", None)
        if alone is not None and get_origin(annotation) is list:
            whole[name] = [value] if isinstance(value, str | Mapping) else value
        elif alone is not None and isinstance(value, str):
            whole[name] = {alone: value}
    return whole


def _preset(values: Mapping[str, Any], places: dict[str, str]) -> dict[str, Any]:
    if values.get("preset") is None:
        return {}
    try:
        preset = get_preset(str(values["preset"]))
    except ConfigError as error:
        raise ConfigError(error.problem, place=places.get("preset", places[""]), fix=error.fix) from None
    for key in preset:
        places.setdefault(key, f"preset `{values['preset']}`")
    return preset


def _switches(layer: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """`lora: true` over a group that a lower layer has filled keeps that group instead of resetting it."""
    return {key: {} if value is True and isinstance(below.get(key), Mapping) else value for key, value in layer.items()}


def _run(values: dict[str, Any], places: Mapping[str, str]) -> RunConfig:
    for key in ("model", "data"):
        if values.get(key) is None:
            raise ConfigError(f"`{key}` is missing", place=places[""], fix=f"give `--{key}`, or `{key}:` in the file")
    if values.get("output") is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problem = "several processes need one run directory that they agree on"
            raise ConfigError(problem, place="output", fix="give `--output DIR`")
        method = str(values["method"]).replace(":", "-")
        values["output"] = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    if isinstance(values["output"], str):
        values["output"] = str(Path(values["output"]).expanduser())
    return RunConfig.parse(values, place=places)
