"""What every stage of a pipeline has: what it takes from earlier stages, what it makes, how it is checked and run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_core import registry
from rlhf_core.config.sampling_run import PromptRunConfig
from rlhf_core.generation.sampling_job import read_run_prompts
from rlhf_core.infra.errors import ConfigError, Mistakes, ModelError, RLHFError, did_you_mean, nearest
from rlhf_core.infra.model_files import COMPRESSOR_HEAD, adapter_chain, check_files, head_pair, hub_files, locate
from rlhf_core.pipeline.recipe import RecipeFile, StageEntry
from rlhf_core.pipeline.stage_command import RunCommand
from rlhf_core.pipeline.stage_references import MODEL, StageReference, malformed, references, spelled_out, written
from rlhf_core.registry.discovery import Plugin

POLICY, REWARD, COMPRESSOR, DATA = "policy", "reward", "compressor", "rows"
"""Kinds of products."""

Find = Callable[[str, str], str]
"""Returns the path of a stage's product: `find(stage, product)`."""


@dataclass(frozen=True)
class Product:
    """Something that a stage makes for later ones."""

    kind: str
    """`policy`, `reward`, `rows`, or the role of another trained model, such as `value`."""
    path: str
    """Relative to the stage's directory."""


@dataclass(frozen=True)
class StageWork:
    """Where and with what a stage does its work."""

    directory: Path
    """The stage's own."""
    file: Path
    """Where its configuration is written, so that the stage can be repeated alone."""
    find: Find
    run: RunCommand
    """Runs a command of `rlhf`."""


@dataclass(frozen=True)
class Need:
    """A key of a stage that must name a product of one kind."""

    key: str
    kinds: tuple[str, ...]
    what: str
    """What the key's value is, in words."""


_BY_REWARD_MODEL = ("reward_model", "process_reward", "value_model")
"""Rewards whose `model` is one that was trained to score; a judge's is a policy."""


def reward_needs(key: str, rewards: Any) -> list[Need]:
    """Return what the models of the rewards in a list must be; `key` is the list's own, dotted."""
    return [
        Need(f"{key}.{number}", (REWARD, "value"), "a reward model")
        for number, one in enumerate(rewards if isinstance(rewards, list) else [])
        if isinstance(one, Mapping) and str(one.get("name")).rpartition(":")[2] in _BY_REWARD_MODEL
    ]


COMPRESS = "compress"
"""Key of stages that complete prompts: how long ones are compressed."""
COMPRESSOR_NEED = Need(COMPRESS, (COMPRESSOR,), "a context compressor")


class Stage(ABC):
    """One stage of a recipe, planned: its references are looked up among the earlier stages, its method in the registry.

    What is wrong with it is in `errors` and in what `check` returns, so that all stages can be shown with all their mistakes.
    """

    plugin: Plugin | None = None
    """The plugin that provides its method; None where it has none, or none of that name could be loaded."""
    model_keys: ClassVar[tuple[str, ...]] = (MODEL,)
    """Keys in which a stage's bare name means its model."""
    takes_policy: ClassVar[bool] = True
    """Whether it begins with a model: without `model`, the last policy that was made before it."""

    def __init__(self, entry: StageEntry, recipe: RecipeFile, earlier: Mapping[str, Stage]) -> None:
        self.entry, self.recipe, self.earlier = entry, recipe, earlier
        self.values: dict[str, Any] = dict(entry.values)
        """Its keys, with references written out."""
        self.errors: list[RLHFError] = []
        self.makes: Mapping[str, Product] | None = {}
        """What it makes, by name; None where that isn't known, because its method isn't."""
        self._find_method()
        names = recipe.names
        for key in self.model_keys:
            if key in self.values:
                self.values[key] = spelled_out(self.values[key], names)
        if self.takes_policy and self.values.get(MODEL) is None:
            last = next((one for one in reversed(list(earlier.values())) if one.makes_policy), None)
            self.values[MODEL] = written(last.entry.name) if last is not None else recipe.recipe.model
        self.values = self._completed()
        self.references: tuple[StageReference, ...] = tuple(references(self.values))
        self.errors += self._reference_errors(names)

    @property
    def makes_policy(self) -> bool:
        """Whether it makes a policy, which later stages begin with, and which is guarded."""
        return self.makes is not None and MODEL in self.makes and self.makes[MODEL].kind == POLICY

    @property
    def label(self) -> str:
        """Its kind and method in words: `train grpo`, `evaluate`."""
        return " ".join(filter(None, [self.entry.kind, self.entry.method]))

    @property
    def needed(self) -> list[str]:
        """The stages whose products it takes."""
        return list(dict.fromkeys(one.stage for one in self.references))

    def input_models(self) -> list[str]:
        """Return the models that it begins with, as its values have them; the first is the one it is compared with."""
        model = self.values.get(MODEL)
        model = model.get("path") if isinstance(model, Mapping) else model
        return [model] if isinstance(model, str) else []

    # What a kind of stage defines

    @abstractmethod
    def check(self, find: Find) -> list[RLHFError]:
        """Return what is wrong with its options, data and models, before anything has run.

        Args:
            find: gives the paths that products will have.
        """

    @abstractmethod
    def run(self, work: StageWork) -> dict[str, Any]:
        """Do the work, or continue it where it was stopped, and return its metrics.

        Raises:
            RLHFError: it failed, or was stopped.
        """

    def gain(self, metrics: Mapping[str, Any]) -> str:
        """Return in one line what the stage came to, from its metrics; '' where there is nothing to say."""
        return ""

    def identity(self) -> dict[str, Any]:
        """Return the values that decide what the stage makes, references as they are."""
        return {"kind": self.entry.kind, "method": self.plugin and self.plugin.qualified, **self.values}

    @abstractmethod
    def _find_method(self) -> None:
        """Set `plugin` and `makes`, or add to `errors`."""

    def _completed(self) -> dict[str, Any]:
        """Return its values with defaults of the recipe, and with what shorter spellings mean."""
        return self.values

    def _needs(self) -> Sequence[Need]:
        """Return the keys whose references must be of a certain kind."""
        return ()

    def with_compression(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values with the recipe's `compress`, where they have none; not in a stage before the one that trains it."""
        shared, own = self.recipe.recipe.compress, values.get(COMPRESS)
        if shared is None or (COMPRESS in values and not isinstance(own, Mapping)):
            return dict(values)
        names = self.recipe.names
        given = spelled_out(shared.model_dump(mode="json", exclude_unset=True), names)
        if any(one.stage not in self.earlier for one in references(given)):
            return dict(values)
        return {**values, COMPRESS: {**given, **(own or {})}}

    def compression_errors(self) -> list[RLHFError]:
        """Return what is wrong with the compressor of its prompts: that there is none there, or one for greater ratios."""
        given = self.values.get(COMPRESS)
        given = {"compressor": given} if isinstance(given, str) else given
        source = given.get("compressor") if isinstance(given, Mapping) else None
        if not isinstance(source, str) or not isinstance(given, Mapping):
            return []
        place, named = self.entry.place(COMPRESS), list(references(source))
        if not named:
            errors = check_model(source, place, self.earlier)
            if not errors and Path(source).expanduser().is_dir() and head_pair(source, COMPRESSOR_HEAD, source) is None:
                fix = "train one: `rlhf train context_compressor`"
                errors = [ModelError("is no compressor", place=f"{place}: {source}", fix=fix)]
            return errors
        maker, ratio = self.earlier.get(named[0].stage), given.get("ratio", 4.0)
        trained = maker.values.get("ratios", [2.0]) if maker is not None else []
        if maker is None or maker.values.get("summary") != "memory" or not isinstance(ratio, int | float):
            return []
        if isinstance(trained, list) and all(isinstance(one, int | float) for one in trained) and ratio < min(trained):
            problem = f"the stage `{named[0].stage}` trains no compressor for so small a ratio"
            fix = f"choose one from {min(trained):g} on, or add it to that stage's `ratios`"
            return [ConfigError(problem, place=place, got=f"{ratio:g}", fix=fix)]
        return []

    def reward_by_stage(self, given: Any) -> Any:
        """Return the reward that uses an earlier stage's model, where a text is a reference to one; anything else as it is.

        It is the reward with the name of the stage's method, where there is one of that name, else `reward_model`.
        """
        named = list(references(given)) if isinstance(given, str) else []
        if len(named) != 1 or given != str(named[0]):
            return given
        maker = self.earlier.get(named[0].stage)
        name = maker.plugin.name if maker is not None and maker.plugin is not None else ""
        return {"name": name if name in registry.rewards else "reward_model", "options": {MODEL: given}}

    # References

    def _reference_errors(self, names: Sequence[str]) -> list[RLHFError]:
        """Return what is wrong with its references."""
        place = self.entry.place
        errors: list[RLHFError] = [
            ConfigError("isn't a reference", place=place(key), got=f"`{text}`", fix="write `${stages.NAME.model}`")
            for key, text in malformed(self.values)
        ]
        for one in self.references:
            if (error := self._wrong(one, names)) is not None:
                errors.append(error)
        return errors

    def _wrong(self, one: StageReference, names: Sequence[str]) -> RLHFError | None:
        """Return what is wrong with one reference."""
        place = self.entry.place(one.key)
        if one.stage == self.entry.name:
            return ConfigError("a stage can't take what it makes itself", place=place, got=str(one))
        if one.stage in self.recipe.lost:  # which is a mistake of its own
            return None
        if one.stage not in self.earlier:
            if one.stage in names:
                fix = f"move the stage `{one.stage}` before `{self.entry.name}`"
                problem = f"needs what the stage `{one.stage}` makes, which comes later"
                return ConfigError(problem, place=place, got=str(one), fix=fix)
            problem = f"needs what a stage `{one.stage}` makes, and no earlier stage has that name"
            return ConfigError(problem, place=place, got=str(one), fix=did_you_mean(one.stage, self.earlier))
        makes = self.earlier[one.stage].makes
        if makes is None:
            return None
        if one.product not in makes:
            of = self.earlier[one.stage]
            problem = f"the stage `{one.stage}` ({of.label}) makes no `{one.product}`"
            fix = (
                f"it makes {', '.join(f'`{name}`' for name in makes)}" if makes else "it makes nothing for later stages"
            )
            return ConfigError(problem, place=place, got=str(one), fix=fix)
        kind = makes[one.product].kind
        for need in self._needs():
            if (one.key == need.key or one.key.startswith(f"{need.key}.")) and kind not in need.kinds:
                return ConfigError(f"must be {need.what}", place=place, got=f"`{one}`, a model of kind `{kind}`")
        return None


def placed(error: RLHFError, place: str) -> RLHFError:
    """Return an error of something that a recipe names, with the place in the recipe before its own."""
    where = f"{place}: {error.place}" if error.place else place
    return type(error)(error.problem, place=where, got=error.got, fix=error.fix)


def check_prompts(values: Mapping[str, Any], place: str) -> list[RLHFError]:
    """Return what is wrong with a stage's prompts; nothing of those that an earlier stage makes, or whose options are wrong.

    Args:
        values: the stage's `prompts`, `limit` and `dataset`, among others.
        place: where its prompts were set.
    """
    if list(references(values.get("prompts"))):
        return []
    mistakes = Mistakes()
    with suppress(ConfigError):
        given = {key: values[key] for key in PromptRunConfig.model_fields if key in values}
        run = PromptRunConfig.parse(given)
        with mistakes.noted():
            read_run_prompts(run)
    return [placed(error, place) for error in mistakes]


def check_model(source: Any, place: str, stages: Collection[str] = ()) -> list[RLHFError]:
    """Return what is wrong with a model's path or hub name: that it isn't there, isn't whole, or can't be reached.

    Args:
        place: where it was set, for messages.
        stages: names of which one may have been meant.
    """
    if not isinstance(source, str) or not source or "${" in source:  # a reference, which is checked as one
        return []
    try:
        where, options = locate(source)
        if options:  # a GGUF file
            return []
        if Path(where).is_dir():
            check_files(adapter_chain(where)[0])
        elif near := nearest(where, stages):
            problem = f"needs what a stage `{source}` makes, and no earlier stage has that name"
            return [ConfigError(problem, place=place, fix=f"did you mean `{near}`?")]
        else:
            _require_on_hub(where)
    except RLHFError as error:
        kind = type(error)
        return [kind(error.problem, place=f"{place}: {source}", got=error.got, fix=error.fix)]
    return []


def _require_on_hub(name: str) -> None:
    """Raise `ModelError` where the hub has no such model, or can't be reached and the cache lacks it, too."""
    if hub_files(name, ("config.json", "adapter_config.json")) == [None, None]:
        raise ModelError("the hub has no such model, or gives no access to it", place=name)
