"""A run of a sampler over prompts as it was asked for: a name or a file, with flags, made into checked configurations."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.flags import convert_options, lex, refuse_unknown, spread
from rlhf_core.config.sampling_run import POLICY, PromptRunConfig, SamplingRunConfig, run_config_of
from rlhf_core.config.training import DatasetConfig, ModelConfig
from rlhf_core.config.yaml_file import dump_yaml, nest, overlay
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.data.prompt_rows import PromptRow, names_file, read_prompts
from rlhf_core.generation.sampled_rows import input_columns
from rlhf_core.generation.sampler_models import policies_of, reward_by_path
from rlhf_core.infra.errors import ConfigError, DataError, Mistakes, PluginError, RLHFError
from rlhf_core.infra.redact import redact
from rlhf_core.registry.method_or_file import GivenValues, find_method, read_method_or_file
from rlhf_core.rewards import Rewards, check_given, open_rewards

if TYPE_CHECKING:
    from rlhf_core.generation.prompt_compression import PromptCompression
    from rlhf_core.models.policy_model import PolicyModel

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class SamplingJob:
    """The configurations of a run of a sampler over prompts, and where each value came from."""

    run: SamplingRunConfig
    options: BaseConfig
    """The sampler's configuration."""
    sampler: type[Sampler]
    plugin: registry.Plugin
    places: Mapping[str, str]
    """For each dotted key that was set, where: `file:line`, or a flag."""

    @property
    def roles(self) -> Mapping[str, str]:
        """The roles that the sampler needs with its options, role → kind."""
        return self.sampler.roles_for(self.options)

    def policies(self) -> dict[str, list[ModelConfig]]:
        """Return the models to load, by the sampler's role: one each, or for the kind `policies` one or more."""
        found: dict[str, list[ModelConfig]] = {}
        for role, kind in self.roles.items():
            given: Any = getattr(self.run, "model" if role == POLICY else role, None)
            if kind in ("policy", "policies"):
                found[role] = given if kind == "policies" else [given]
        return found

    def loaded_with(self, load: Callable[[ModelConfig], PolicyModel]) -> dict[str, Any]:
        """Return the policies that a function loads, by role as the sampler takes them."""
        loaded = {role: [load(model) for model in models] for role, models in self.policies().items()}
        return {role: models if self.roles[role] == "policies" else models[0] for role, models in loaded.items()}

    def rewards(self) -> dict[str, Rewards]:
        """Return the opened rewards by the sampler's role; no model is loaded yet.

        Raises:
            ConfigError: there is no such reward (the message has the nearest), or it has no such option.
            PluginError: a reward is broken, or can't be imported.
        """
        roles = [role for role, kind in self.roles.items() if kind == "reward"]
        return {
            role: open_rewards([reward_by_path(one) for one in getattr(self.run, role)], place=self._place(role))
            for role in roles
        }

    def prompts(self) -> list[PromptRow]:
        """Return the prompts, read and checked.

        Raises:
            DataError: a file doesn't exist or can't be read, a row has no prompt, or an empty one, or there is no row.
        """
        return read_run_prompts(self.run)

    def text_options(self) -> DatasetConfig:
        """Return how prompts are encoded, as the options of training that mean the same."""
        return text_options_of(self.run)

    def resolved(self) -> dict[str, Any]:
        """Return every option as plain values, secrets redacted; as a file they describe the same run."""
        values: dict[str, Any] = redact({**self.run.model_dump(mode="json"), **self.options.model_dump(mode="json")})
        return values

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a configuration file."""
        return dump_yaml(self.resolved())

    def record(self, sampler: Sampler, rows: Sequence[PromptRow], together: int) -> dict[str, Any]:
        """Return what determines the rows of the output, as JSON values: options, models, rewards, prompts.

        Args:
            sampler: with its models loaded.
            rows: the prompts.
            together: how many of them the sampler gets at once.
        """
        options = {name: value for name, value in self.resolved().items() if name not in (*self.run.FREE, "limit")}
        return {
            "sampler": self.plugin.as_dict(),
            "options": options | {"method": self.plugin.qualified, "batch_size": together},
            "models": {
                name: policy.describe() | {"precision": str(policy.precision)}
                for name, policy in policies_of(sampler).items()
            },
            "rewards": {role: sampler.models[role].describe() for role, kind in self.roles.items() if kind == "reward"},
            "prompts": prompts_record(rows),
        } | compression_record(policies_of(sampler).values())

    def _place(self, key: str) -> str:
        return self.places.get(key, f"--{key}")


def read_run_prompts(run: PromptRunConfig) -> list[PromptRow]:
    """Return the prompts that a command names, read and checked.

    Raises:
        DataError: a file doesn't exist or can't be read, a row has no prompt, or an empty one, or there is no row.
    """
    data = run.dataset
    given = [one for text in run.prompts for one in (stdin_lines() if text == "-" else [_prompt_source(text)])]
    rows = read_prompts(given, columns=data.columns, name="--prompts", split=data.split)
    found = list(itertools.islice(rows, run.limit))
    if not found:
        raise DataError("holds no prompts", place=", ".join(run.prompts)[:200], fix="give at least one")
    return found


def text_options_of(run: PromptRunConfig) -> DatasetConfig:
    """Return how a command's prompts are encoded, as the options of training that mean the same."""
    data = run.dataset
    return DatasetConfig(chat_template=data.chat_template, wrap=data.wrap, special_tokens=data.special_tokens)


def compression_record(policies: Iterable[PolicyModel]) -> dict[str, Any]:
    """Return how policies read long prompts, as part of what determines completions; nothing where they read them whole."""
    found = [one.prompt_compression.describe() for one in policies if one.prompt_compression is not None]
    return {"compression": found[0]} if found else {}


class PolicyPreparation:
    """Lets the policies of a command read its prompts as its options say: how they are encoded, and long ones compressed.

    Args:
        run: the options.
    """

    def __init__(self, run: PromptRunConfig) -> None:
        self._run = run
        self.compression: PromptCompression | None = None
        """How long prompts are compressed, once there is a policy."""

    def __call__(self, policy: PolicyModel) -> PolicyModel:
        """Return the policy, prepared in place; all policies share one compressor.

        Raises:
            ModelError: the compressor can't be loaded, or isn't for this policy.
            ConfigError: the ratio is one that the compressor has too few memory tokens for.
        """
        from rlhf_core.data.text_options import save_text_options
        from rlhf_core.generation.prompt_compression import PromptCompression

        save_text_options(policy.tokenizer, text_options_of(self._run))
        if self._run.compress is not None:
            if self.compression is None:
                self.compression = PromptCompression.load(self._run.compress, policy)
            self.compression.attach(policy)
        return policy


def prompts_record(rows: Sequence[PromptRow]) -> dict[str, Any]:
    """Return the number of prompts and a hash of them with their columns, by which a resumed run notices other ones."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.tools, input_columns(row)], default=str).encode() + b"\n")
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def load_sampling_job(target: str | Path | GivenValues, *, flags: Sequence[str] = ()) -> SamplingJob:
    """Return the run that a sampler's name or a configuration file describes, with flags.

    A file is flat: `method`, the keys of `SamplingRunConfig`, one per role of the sampler, and its options by name.

    Args:
        target: a name such as `generate` or `acme-rlhf:best`, the path of a YAML file, or values that were read already.
        flags: values from the command line, as tokens: `["--model", "M", "--temperature=0.7"]`.

    Raises:
        ConfigError: an unknown sampler, key or option, a missing one, or a wrong value; of several mistakes the others are its
            `also`.
        PluginError: the sampler is broken, ambiguous or disabled.
    """
    given = lex(flags)
    values, places, _ = read_method_or_file(target)
    plugin, sampler = find_method(values, places, "sampler")
    name = str(values["method"])
    run_config = run_config_of(sampler.roles, sampler=name)
    keys = tuple(run_config.model_fields)
    if "model" in sampler.Config.model_fields.keys() & keys:
        raise PluginError("a sampler's option can't be named `model`", place=f"sampler `{name}`")
    run_values = {key: values.pop(key) for key in keys if key in values}
    mistakes = Mistakes()
    with mistakes.noted():
        refuse_unknown(values, sampler.Config, name, places, keys)
    values = {key: value for key, value in values.items() if key in sampler.Config.model_fields}
    texts = [flag for flag in given if flag.key == "prompts" and flag.text is not None]
    run_flags = [flag for flag in given if flag.key.partition(".")[0] in keys and flag not in texts]
    over, over_places = convert_options(run_flags, run_config, name, ())
    option_flags = [flag for flag in given if flag not in run_flags and flag not in texts]
    option_values, option_places = convert_options(option_flags, sampler.Config, name, keys)
    places |= over_places | option_places
    run_values = overlay(spread(run_values, run_config), nest(spread(over, run_config)))
    if texts:  # kept as typed: a prompt may look like YAML
        run_values["prompts"], places["prompts"] = [flag.text for flag in texts], "--prompts"
    given_options = overlay(values, nest(spread(option_values, sampler.Config)))
    options, _, found = sampler.Config.parse_sound(given_options, place=places, instead={})
    mistakes += found
    needed = sampler.roles if options is None else sampler.roles_for(options)
    for role in sorted(sampler.roles.keys() - needed.keys()):
        if run_values.get(role) is not None:
            problem = "the sampler doesn't use this role with these options"
            mistakes.append(ConfigError(problem, place=places.get(role, f"`{role}`"), fix="leave it out"))
    mistakes += _missing(run_values, run_config, needed, places)
    given_values = {key: value for key, value in run_values.items() if value is not None}
    instead = {"model": "model", "prompts": ["prompts"], "method": name}
    run, _, found = run_config.parse_sound(instead | given_values, place=places, instead=instead)
    mistakes += found
    for role in [role for role, kind in needed.items() if kind == "reward"]:
        with mistakes.noted():
            rewards = [reward_by_path(one) for one in getattr(run, role, None) or []]
            check_given(rewards, place={"": places.get(role, f"--{role}")})
    mistakes.raise_first()
    assert run is not None and options is not None
    return SamplingJob(run, options, sampler, plugin, places)


def _missing(
    values: Mapping[str, Any], config: type[SamplingRunConfig], roles: Mapping[str, str], places: Mapping[str, str]
) -> list[RLHFError]:
    """Return an error for the run's model, its prompts, and each model of one of the sampler's roles that isn't given."""
    errors: list[RLHFError] = []
    for key, info in config.model_fields.items():
        role = POLICY if key == "model" else key
        if not (info.is_required() or role in roles) or values.get(key) is not None:
            continue
        what = {"policy": "PATH", "policies": "PATH", "reward": "NAME"}.get(roles.get(role, ""), "FILE|TEXT")
        of = f", the sampler's role `{key}`" if key in roles else ""
        fix = f"give `--{key} {what}`, or `{key}:` in a file"
        errors.append(ConfigError(f"`{key}` is missing{of}", place=places[""], fix=fix))
    return errors


def stdin_lines() -> list[str]:
    """Return the lines of standard input that aren't blank."""
    return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]


def _prompt_source(text: str) -> Any:
    """Return what `read_prompts` takes for a text of `--prompts`: a text as it is, a file, a folder or a hub name as a path."""
    path = Path(text).expanduser()
    if names_file(text) or len(text.split()) != 1:
        return text
    exists = len(text) < 4096 and path.exists()
    pattern = "/" in text and any(sign in text for sign in "*?[")
    written_as_path = text.startswith(("./", "../", "~/", "/"))
    return {"path": text} if exists or pattern or written_as_path or _HUB_NAME.fullmatch(text) else text
