"""The samplers of a run: what draws its rollouts, and the completions of held-out prompts, in place of the engine alone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from rlhf_core.config.base import BaseConfig, place_of
from rlhf_core.config.online import OnlineConfig, RewardConfig, SamplerConfig, SamplingConfig
from rlhf_core.config.training import ModelConfig, TrainerConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.encoded_prompts import EncodedPrompts
from rlhf_core.generation.sampled_rows import check_drawn
from rlhf_core.generation.sampler_models import load_policy, reward_by_path
from rlhf_core.infra.errors import ConfigError, PluginError, did_you_mean, shortened
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.registry.discovery import Plugin
from rlhf_core.registry.resolve import load, lookup
from rlhf_core.rewards import Rewards, check_given, open_rewards

log = logging.getLogger(__name__)

Given = TypeVar("Given", bound=BaseConfig)
SamplerKey = Literal["rollout_sampler", "eval_sampler"]
KEYS: tuple[SamplerKey, ...] = ("rollout_sampler", "eval_sampler")
POLICY, REWARD = "policy", "reward"


@dataclass(frozen=True)
class ChosenSampler:
    """A sampler that a run's configuration names, with valid options, before anything is loaded."""

    key: SamplerKey
    plugin: Plugin
    sampler: type[Sampler]
    given: SamplerConfig
    places: Mapping[str, str] | str
    """Where the options were set, for messages."""

    def options(self, sampling: SamplingConfig) -> BaseConfig:
        """Return the sampler's configuration: completions as `sampling` says, and the options that were given.

        Raises:
            ConfigError: an option doesn't exist, has a wrong value, or for rollouts would be another than that of `generation`.
        """
        config, drawn = self.sampler.Config, {name: getattr(sampling, name) for name in SamplingConfig.model_fields}
        values = dict(self.given.options)
        if drawn["draft"] is None:  # then a sampler's own default holds: drafts don't change what is drawn
            del drawn["draft"]
        inherits = issubclass(config, SamplingConfig)
        if not inherits and "generation" in config.model_fields:
            values["generation"] = drawn | dict(values.get("generation") or {})
        elif inherits:
            values = drawn | values
        elif self.key == "rollout_sampler":
            raise ConfigError(
                "the sampler's options are without those of sampling, so it can't draw as `generation` says",
                place=self.place(), got=f"`{self.plugin.name}`", fix="let its configuration extend `SamplingConfig`",
            )  # fmt: skip
        return config.parse(values, place=self._option_places())

    def roles(self, sampling: SamplingConfig) -> Mapping[str, str]:
        """Return the roles that the sampler needs, role → kind."""
        return self.sampler.roles_for(self.options(sampling))

    def place(self, name: str = "") -> str:
        """Return where the sampler, or something of it, was set."""
        key = f"{self.key}.{name}" if name else self.key
        return key if isinstance(self.places, str) else place_of(key, self.places)

    def rewards_of(self, role: str) -> list[RewardConfig]:
        """Return the rewards that were given for a role, one named by a model's directory as the plugin that reads it."""
        value = self.given.roles[role]
        several = value if isinstance(value, list) else [value]
        return [reward_by_path(self._parsed(RewardConfig, "name", one, role)) for one in several]

    def models_of(self, role: str, kind: str) -> list[ModelConfig]:
        """Return the model that was given for a role which generates; of kind `policies` all of them.

        Raises:
            ConfigError: a value is no model, or the kind takes a list, and it is none or empty.
        """
        value = self.given.roles[role]
        if kind == "policies" and (not isinstance(value, list) or not value):
            raise ConfigError("must be a list of models", place=self.place(f"roles.{role}"), got=shortened(value))
        several = value if kind == "policies" else [value]
        return [self._parsed(ModelConfig, "path", one, role) for one in several]

    def about_method(self, config: OnlineConfig) -> str | None:
        """Return what is to be said of a method that learns from what the sampler chooses; None for nothing.

        Raises:
            ConfigError: the method would be wrong.
        """
        if self.key != "rollout_sampler" or self.sampler.on_policy:
            return None
        try:
            return config.about_chosen_completions()
        except ConfigError as error:
            raise ConfigError(error.problem, place=self.place(), got=f"`{self.plugin.name}`", fix=error.fix) from None

    def _parsed(self, kind: type[Given], alone: str, value: Any, role: str) -> Given:
        place = self.place(f"roles.{role}")
        if not isinstance(value, str | Mapping):
            raise ConfigError(f"must be a {alone}, or a group of options", place=place, got=shortened(value))
        return kind.parse({alone: value} if isinstance(value, str) else value, place=place)

    def _option_places(self) -> Mapping[str, str] | str:
        own = f"{self.key}.options"
        if isinstance(self.places, str):
            return own
        below = {key[len(own) + 1 :]: place for key, place in self.places.items() if key.startswith(f"{own}.")}
        return below | {"": place_of(own, self.places)}


class RunSampler:
    """Draws a run's completions by a sampler, on the live policy.

    Args:
        chosen: the sampler.
        policy: the live policy, with which each call draws as it is then.
        models: its other models by role.
    """

    def __init__(self, chosen: ChosenSampler, policy: PolicyModel, models: Mapping[str, Any]) -> None:
        self.chosen, self.policy, self.models = chosen, policy, models
        self._made: dict[str, Sampler] = {}

    def draw(
        self, batch: Batch, n: int, sampling: SamplingConfig, *, seed: int, policy_version: int
    ) -> tuple[list[list[Completion]], dict[str, int]]:
        """Return n completions for each prompt, best first, and the tokens that models were run on for them, by role.

        Args:
            batch: its encoded prompts are completed.
            sampling: how completions are drawn, where the sampler's own options don't say otherwise.
            seed: a prompt's completions are a function of this, its tokens and its place.

        Raises:
            PluginError: the sampler returns another number of completions than was asked for, or completions for training
                without the probabilities of their tokens.
        """
        sampler = self.sampler(sampling)
        if not batch.num_prompts:
            return [], {}
        before = dict(sampler.forwarded)
        drawn = sampler.sample(EncodedPrompts(batch, self.policy.tokenizer), n, seed=seed)
        check_drawn(sampler, drawn, n, [f"row {row}" for row in batch.rows])
        if self.chosen.key == "rollout_sampler":
            _check_probabilities(sampler, drawn)
        spent = {role: tokens - before.get(role, 0) for role, tokens in sampler.forwarded.items()}
        return [[replace(one, policy_version=policy_version) for one in group] for group in drawn], spent

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """Return the sampler that draws in a way; it is made once."""
        key = sampling.model_dump_json()
        if key not in self._made:
            options, models = self.chosen.options(sampling), {POLICY: self.policy, **self.models}
            self._made[key] = self.chosen.sampler(options, **models)
        return self._made[key]


class RunSamplers:
    """The samplers that a run's configuration asks for: checked when made, and ready to draw after `load`.

    Args:
        config: of the run.
        rewards: of the run; they choose among rollouts where the role `reward` is left out.

    Raises:
        ConfigError: a sampler, an option or a role that doesn't exist or is missing, or one that the method would be wrong with.
        PluginError: a sampler is broken, ambiguous or disabled.
    """

    def __init__(self, config: TrainerConfig, rewards: Rewards) -> None:
        self._config, self._rewards = config, rewards
        self._chosen = check_samplers(config, own_rewards=len(rewards) > 0)
        for one in self._chosen:
            if isinstance(config, OnlineConfig) and (said := one.about_method(config)):
                log.warning("`rollout_sampler: %s` chooses completions: %s", one.plugin.name, said)
        self._opened = {
            (one.key, role): open_rewards(one.rewards_of(role), place=one.place(f"roles.{role}"))
            for one, roles in self._roles()
            for role, kind in roles.items()
            if kind == "reward" and role in one.given.roles
        }

    def load(self, policy: Any, *, without: Collection[str] = ()) -> dict[SamplerKey, RunSampler]:
        """Load the models that the samplers need, and return the samplers by key.

        Args:
            policy: the run's live policy.
            without: keys of samplers that won't draw.

        Raises:
            ConfigError: it is none that can generate, or a reward doesn't suit the sampler.
            ModelError: a model can't be loaded.
        """
        found: dict[SamplerKey, RunSampler] = {}
        for one, roles in self._roles():
            if one.key in without:
                continue
            if not isinstance(policy, PolicyModel):
                raise ConfigError("the method has no policy that a sampler could draw from", place=one.place())
            models: dict[str, Any] = {}
            for role, kind in roles.items():
                if kind == "reward":
                    models[role] = self._opened.get((one.key, role), self._rewards)
                    models[role].prepare()
                elif role != POLICY:
                    place = one.place(f"roles.{role}")
                    loaded = [load_policy(model, role, place=place) for model in one.models_of(role, kind)]
                    models[role] = loaded if kind == "policies" else loaded[0]
            found[one.key] = RunSampler(one, policy, models)
            found[one.key].sampler(
                _sampling(one.key, self._config)
            )  # what a sampler refuses is known before the first step
        return found

    def describe(self) -> dict[str, Any]:
        """Return what the samplers are made from, for the run's record: JSON values by key."""
        found: dict[str, Any] = {}
        for one, roles in self._roles():
            models: dict[str, ModelConfig] = {}
            for role, kind in roles.items():
                if kind in ("policy", "policies") and role != POLICY:
                    several = one.models_of(role, kind)
                    names = [f"{role}[{at}]" for at in range(len(several))] if kind == "policies" else [role]
                    models |= dict(zip(names, several, strict=True))
            rewards = {role: self._opened[one.key, role] for role in roles if (one.key, role) in self._opened}
            found[one.key] = {
                "plugin": one.plugin.as_dict(),
                "models": {
                    role: {"source": model.path, "files": file_hashes(model.path)} for role, model in models.items()
                },
                "rewards": {role: opened.describe() for role, opened in rewards.items()},
            }
        return found

    def _roles(self) -> list[tuple[ChosenSampler, Mapping[str, str]]]:
        return [(one, one.roles(_sampling(one.key, self._config))) for one in self._chosen]


def check_samplers(
    config: TrainerConfig, *, own_rewards: bool = True, places: Mapping[str, str] | str = "config"
) -> list[ChosenSampler]:
    """Return the samplers that a configuration names, checked; nothing is made or loaded.

    Args:
        own_rewards: whether the run has rewards.
        places: where options were set, for messages: one text, or one per dotted key.

    Raises:
        ConfigError, PluginError: as `RunSamplers`.
    """
    found: list[ChosenSampler] = []
    for key in KEYS if isinstance(config, OnlineConfig) else ():
        given: SamplerConfig | None = getattr(config, key)
        if given is None or not isinstance(config, OnlineConfig):
            continue
        name_place = f"{key}.name" if isinstance(places, str) else place_of(f"{key}.name", places)
        try:
            plugin = lookup(given.name, "sampler")
            sampler = load(plugin)
        except ConfigError as error:
            raise type(error)(error.problem, place=name_place, got=error.got, fix=error.fix) from None
        if key == "rollout_sampler" and not sampler.draws_from_policy:
            raise ConfigError(
                "the sampler's tokens aren't drawn from the policy alone, so updates would take other probabilities for its own",
                place=name_place, got=f"`{plugin.name}`", fix="evaluate with it: `eval_sampler`",
            )  # fmt: skip
        one = ChosenSampler(key, plugin, sampler, given, places)
        _refuse_options(one, config)
        _check_roles(one, one.roles(_sampling(key, config)), own_rewards=own_rewards)
        one.about_method(config)
        found.append(one)
    return found


def _sampling(key: SamplerKey, config: Any) -> SamplingConfig:
    """Return how completions are drawn by the sampler of a key."""
    return config.generation if key == "rollout_sampler" else config.evaluated_sampling


def _refuse_options(one: ChosenSampler, config: OnlineConfig) -> None:
    """Refuse options of sampling that are given twice, or where the updates wouldn't know them."""
    values: Mapping[str, Any] = one.given.options
    at = "options"
    if not issubclass(one.sampler.Config, SamplingConfig):
        inner, at = values.get("generation"), "options.generation"
        values = inner if isinstance(inner, Mapping) else {}
    named = {name: f"{at}.{name}" for name in values}
    for name, where in named.items() if one.key == "rollout_sampler" else ():
        if name in SamplingConfig.model_fields:
            raise ConfigError(
                f"`{name}` of rollouts belongs to `generation`, by which updates compute probabilities",
                place=one.place(where),
                fix=f"set `generation.{name}`",
            )  # fmt: skip
    if one.key == "eval_sampler" and "temperature" in named and config.eval_temperature is not None:
        raise ConfigError(
            "the temperature is set twice", place=one.place(named["temperature"]), fix="leave out `eval_temperature`"
        )


def _check_roles(one: ChosenSampler, needed: Mapping[str, str], *, own_rewards: bool) -> None:
    """Refuse a sampler that doesn't draw from the live policy, and roles that are missing, unknown, unused or invalid."""
    given, declared = one.given.roles, one.sampler.roles
    if needed.get(POLICY) != "policy":
        raise ConfigError(
            "the sampler has no role `policy`, so it doesn't draw from the run's",
            place=one.place(),
            got=f"`{one.plugin.name}`",
        )
    for role in given:
        place = one.place(f"roles.{role}")
        if role == POLICY:
            raise ConfigError("the role `policy` is the policy that the run trains", place=place, fix="leave it out")
        if role not in declared:
            fix = did_you_mean(role, [other for other in declared if other != POLICY])
            raise ConfigError(f"the sampler has no role `{role}`", place=place, fix=fix)
        if role not in needed:
            raise ConfigError(
                f"the sampler doesn't use its role `{role}` with these options", place=place, fix="leave it out"
            )
    for role, kind in needed.items():
        own = role == REWARD and one.key == "rollout_sampler" and own_rewards
        if role not in given and role != POLICY and not own:
            what = {"policy": "a model's path", "policies": "a list of models' paths"}.get(
                kind, "a reward's name or a reward model's path"
            )
            no_default = "; the run's own rewards may read the answers" if role == REWARD and own_rewards else ""
            raise ConfigError(
                f"nothing is given for the sampler's role `{role}`", place=one.place("roles"),
                fix=f"set `{one.key}.roles.{role}` to {what}{no_default}",
            )  # fmt: skip
        if role in given and kind == "reward":
            check_given(one.rewards_of(role), place=one.place(f"roles.{role}"))
        elif role in given:
            one.models_of(role, kind)


def _check_probabilities(sampler: Sampler, drawn: Sequence[Sequence[Completion]]) -> None:
    """Refuse completions that can't be trained on: each token needs the probabilities with which it was drawn."""
    for one in (one for group in drawn for one in group):
        lengths = {len(one.logprobs), len(one.raw_logprobs), len(one.kept_mass)}
        if lengths != {len(one.ids)} or not one.ids:
            raise PluginError(
                "a completion to be trained on needs tokens with `logprobs`, `raw_logprobs` and `kept_mass`",
                place=f"{type(sampler).__name__}.sample",
                got=f"{len(one.ids)} tokens with {len(one.logprobs)}, {len(one.raw_logprobs)} and {len(one.kept_mass)}",
            )
