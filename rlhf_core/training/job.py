"""A training run as it was asked for: a method's name or a file, with flags, made into checked configurations.

The preset overrides defaults, the file the preset, flags and overrides the file. A file is flat: the keys of `RunConfig` (method,
model, data, eval_data, output, preset) and the method's options by name. Relative paths in it are looked for in the working
directory, then beside the file; `output` is in the working directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import registry
from rlhf_core.config.base import place_of
from rlhf_core.config.flags import Flag, convert, convert_options, lex, refuse_unknown, spread
from rlhf_core.config.known_names import called_here
from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.presets import get_preset, with_rate_of_adapters
from rlhf_core.config.run_file import RunConfig
from rlhf_core.config.training import TrainerConfig
from rlhf_core.config.yaml_file import dump_yaml, nest, overlay
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.errors import ConfigError, Mistakes, RLHFError
from rlhf_core.infra.redact import REDACTED, redact, redact_text
from rlhf_core.registry.method_or_file import GivenValues, find_method, read_method_or_file
from rlhf_core.rewards import check_rewards, mistakes_beside
from rlhf_core.training.run_samplers import check_samplers

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class TrainingJob:
    """The configurations of a run that was asked for, its method, and where each value came from."""

    run: RunConfig
    """Method, model, data and output."""
    options: TrainerConfig
    """The method's configuration."""
    method: type[Trainer[Any]]
    plugin: registry.Plugin
    """Where the method comes from."""
    places: Mapping[str, str]
    """For each dotted key that was set, where: `file:line`, a flag, or the preset."""
    config_input: str | None = None
    """The text of the configuration file, as it was written."""

    def trainer(self, command: str | None = None) -> Trainer[Any]:
        """Return the trainer, ready to train; nothing is loaded or read yet.

        Args:
            command: the command line, written into the run directory.
        """
        trainer = self.method(
            self.options,
            model=self.run.model,
            data=self.run.model_dump()["data"],
            eval_data=self.run.eval_data,
            output=self.run.output,
        )
        trainer.run_inputs = {
            "config_input": self._flags_as_yaml() if self.config_input is None else redact_text(self.config_input),
            "command": None if command is None else redact_text(command),
            "plugin": self.plugin.as_dict(),
        }
        return trainer

    def _flags_as_yaml(self) -> str:
        """Return what was set by flags alone as the text of a configuration file."""
        given = {
            **self.run.model_dump(mode="json", exclude_none=True),
            **self.options.model_dump(mode="json", exclude_unset=True),
        }
        return "# from the command line\n" + dump_yaml(redact(given))

    def resolved(self) -> dict[str, Any]:
        """Return every option as plain values, secrets redacted; as a file they describe the same run."""
        values: dict[str, Any] = redact({**self.run.model_dump(mode="json"), **self.options.model_dump(mode="json")})
        return values

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a configuration file."""
        return dump_yaml(self.resolved())


@dataclass(frozen=True)
class CheckedJob:
    """What can be told of a run that was asked for, right or wrong: every mistake in it, and what isn't wrong."""

    mistakes: Mistakes
    """All mistakes, in the order in which they were found."""
    job: TrainingJob | None
    """The run; None where there is a mistake."""
    method: type[Trainer[Any]]
    given: Mapping[str, Any]
    """The keys of `RunConfig` as they were given."""
    options: TrainerConfig | None
    """The method's configuration without the options that are wrong; None where even the others don't go together."""


def load_job(
    target: str | Path | GivenValues, overrides: Mapping[str, Any] | None = None, *, flags: Sequence[str] = ()
) -> TrainingJob:
    """Return the job that a method's name or a configuration file describes, with overrides.

    Args:
        target: a name such as `dpo` or `acme-rlhf:dpo`, the path of a YAML file, or values that were read already.
        overrides: values by dotted key, from Python: `{"beta": 0.2, "lora.rank": 8}`.
        flags: values from the command line, as tokens: `["--beta", "0.2", "--lora.rank=8"]`.

    Raises:
        ConfigError: an unknown method, key, option or reward, a missing one, or a wrong value; of several mistakes the others are
            its `also`.
        PluginError: the method or a reward is broken, ambiguous or disabled.
    """
    checked = check_job(target, overrides, flags=flags)
    checked.mistakes.raise_first()
    assert checked.job is not None
    return checked.job


def check_job(
    target: str | Path | GivenValues, overrides: Mapping[str, Any] | None = None, *, flags: Sequence[str] = ()
) -> CheckedJob:
    """Return what `load_job` finds, every mistake included.

    Raises:
        ConfigError: the method isn't known, or the file or the flags can't be read, so that nothing else can be checked.
        PluginError: the method is broken, ambiguous or disabled.
    """
    mistakes = Mistakes()
    given = lex(flags)
    values, places, text = read_method_or_file(target)
    run_flags = [flag for flag in given if flag.key in RunConfig.KEYS]
    over, over_places = convert(run_flags, RunConfig, owner="train", mistakes=mistakes)
    overrides = dict(overrides or {})
    run_over = {**{key: overrides.pop(key) for key in RunConfig.KEYS if key in overrides}, **over}
    run_values = {key: values.pop(key) for key in RunConfig.KEYS if key in values} | run_over
    places |= over_places
    plugin, method = find_method(run_values, places, "trainer")
    with mistakes.noted():
        refuse_unknown(values, method.Config, str(run_values["method"]), places, RunConfig.KEYS)
    named = [*values, *(flag.key for flag in given)]
    renamed = {ours for key in named if key not in method.Config.model_fields for ours in called_here(key)}
    values = {key: value for key, value in values.items() if key in method.Config.model_fields}
    option_flags = [flag for flag in given if flag.key not in RunConfig.KEYS]
    options = _options(method, values, overrides, option_flags, run_values, places, mistakes)
    mistakes += _left_out({**run_values, **options}, places)
    run: RunConfig | None = None
    with mistakes.noted():
        run = _run(run_values, places, renamed)
    config, wrong, found = method.Config.parse_sound(options, place=places, instead={})
    mistakes += found
    if isinstance(config, OnlineConfig):
        if "rewards" in wrong:
            mistakes += mistakes_beside(options.get("rewards"), place=places)
        else:
            with mistakes.noted():
                check_rewards(config, place=places)
        with mistakes.noted():
            check_samplers(config, own_rewards=bool(config.rewards), places=places)
    job = None
    if not mistakes and run is not None and config is not None:
        job = TrainingJob(run, config, method, plugin, places, text)
    return CheckedJob(mistakes, job, method, run_values, config)


def _left_out(values: Any, places: Mapping[str, str], key: str = "") -> list[RLHFError]:
    """Return an error for each value that holds the mark of a secret which a run's record doesn't have."""
    if isinstance(values, Mapping | list):
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        return [error for name, one in items for error in _left_out(one, places, f"{key}.{name}" if key else str(name))]
    if not isinstance(values, str) or REDACTED not in values:
        return []
    fix = f"give `--{key}`, or name the file that the run was started with in place of its record"
    return [ConfigError(f"`{key}` is a secret, which records leave out", place=place_of(key, places), fix=fix)]


def _options(
    method: type[Trainer[Any]],
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
    flags: Sequence[Flag],
    run_values: Mapping[str, Any],
    places: dict[str, str],
    mistakes: Mistakes,
) -> dict[str, Any]:
    """Return the method's options from the preset, the file, Python and flags, the later before the earlier.

    Args:
        values: of the file.
        places: completed in place by the places of flags and the preset.
        mistakes: gets those of the flags and the preset.
    """
    name = str(run_values["method"])
    option_values, option_places = convert_options(flags, method.Config, name, RunConfig.KEYS, mistakes)
    option_values = spread(option_values, method.Config)
    replaced = tuple(f"{key}." for key, value in option_values.items() if isinstance(value, list))
    for key in [key for key in places if key.startswith(replaced)] if replaced else ():
        del places[key]
    places |= option_places
    preset: dict[str, Any] = {}
    with mistakes.noted():
        preset = _preset(run_values, places)
    options: dict[str, Any] = {}
    for layer in (preset, values, nest(overrides), nest(option_values)):
        options = overlay(options, _keep_groups(spread(layer, method.Config), options))
    if preset:
        options = with_rate_of_adapters(options, method.Config)
        if "learning_rate" in options:
            places.setdefault("learning_rate", f"preset `{run_values['preset']}`")
    return options


def _preset(values: Mapping[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """Return the option values of the preset that was asked for, and note it as their place."""
    if values.get("preset") is None:
        return {}
    try:
        preset = get_preset(str(values["preset"]))
    except ConfigError as error:
        raise ConfigError(error.problem, place=places.get("preset", places[""]), fix=error.fix) from None
    for key in preset:
        places.setdefault(key, f"preset `{values['preset']}`")
    return preset


def _keep_groups(layer: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer of options in which `lora: true` keeps the group's values of the layer below instead of resetting them."""
    return {key: {} if value is True and isinstance(below.get(key), Mapping) else value for key, value in layer.items()}


def _run(values: dict[str, Any], places: Mapping[str, str], renamed: Collection[str]) -> RunConfig | None:
    """Return the checked `RunConfig`; without `output` the directory is `runs/METHOD-DATE-TIME`.

    Args:
        renamed: keys that were given by a name of another trainer, whose mistake is noted already; None is returned without one.
    """
    missing = [key for key in ("model", "data") if values.get(key) is None]
    Mistakes(
        ConfigError(f"`{key}` is missing", place=places[""], fix=f"give `--{key}`, or `{key}:` in the file")
        for key in missing
        if key not in renamed
    ).raise_first()
    if missing:
        return None
    if values.get("output") is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problem = "several processes need the same run directory, and none is set"
            raise ConfigError(problem, place="output", fix="give `--output DIR`")
        method = str(values["method"]).replace(":", "-")
        values["output"] = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    if isinstance(values["output"], str):
        values["output"] = str(Path(values["output"]).expanduser())
    return RunConfig.parse(values, place=places)
