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
from typing import Any

from rlhf_core import registry
from rlhf_core.config.flags import convert, convert_options, lex, refuse_unknown, spread
from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.presets import get_preset
from rlhf_core.config.run_file import RunConfig
from rlhf_core.config.training import TrainerConfig
from rlhf_core.config.yaml_file import dump_yaml, merge, nest
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.redact import redact, redact_text
from rlhf_core.registry.method_or_file import find_method, read_method_or_file
from rlhf_core.rewards import check_rewards

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
        return "# from the command line\n" + dump_yaml({key: redact(value, key) for key, value in given.items()})

    def resolved(self) -> dict[str, Any]:
        """Return every setting as plain values, secrets redacted; as a file it describes the same run."""
        values = {**self.run.model_dump(mode="json"), **self.options.model_dump(mode="json")}
        return {key: redact(value, key) for key, value in values.items()}

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a configuration file."""
        return dump_yaml(self.resolved())


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
    values, places, text = read_method_or_file(target)
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
