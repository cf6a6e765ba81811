"""Rewards from Python, one call each: by name, by a model, by a function, and several as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core import registry
from rlhf_core.contracts.reward import RewardFn
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.model_files import reward_at
from rlhf_core.rewards.function_reward import FunctionReward, RewardFunction
from rlhf_core.rewards.opening import open_reward


class RewardFunctionFactory:
    """Makes rewards; each is accepted wherever a reward is, and plugins of any package are found by name."""

    @staticmethod
    def names() -> list[str]:
        """Return the names of the rewards that are installed and work."""
        return list(registry.rewards)

    @classmethod
    def create(cls, given: str | Path | RewardFn | type[RewardFn] | RewardFunction, **options: Any) -> RewardFn:
        """Return a reward, made but not prepared: no model is loaded.

        Args:
            given: a plugin's name, `package.module:function`, the directory of a reward, process reward or value model, a
                function, a `RewardFn`, or a class of it.
            options: the reward's own; of a function its keyword arguments.

        Raises:
            ConfigError: there is no such reward, or an option is wrong; an instance takes no options.
            PluginError: a plugin is broken.
        """
        if isinstance(given, Path) or (isinstance(given, str) and Path(given).expanduser().is_dir()):
            return cls.from_model(given, **options)
        if isinstance(given, str):
            return open_reward({"name": given, "options": options})
        if isinstance(given, type) and issubclass(given, RewardFn):
            return given(given.Config.parse(options, place=given.__name__))
        if options and isinstance(given, RewardFn):
            problem = "the reward is made already, so it takes no options"
            raise ConfigError(problem, place=type(given).__name__, got=", ".join(options), fix="give its class")
        if options and callable(given):
            return FunctionReward(given, options)
        return open_reward(given)

    @classmethod
    def from_model(cls, source: Any, **options: Any) -> RewardFn:
        """Return the reward of a reward, process reward or value model, in a directory (by the head in it) or in memory.

        Raises:
            ConfigError: an option is wrong, or the object is no such model.
            ModelError: the directory holds no model.
        """
        if isinstance(source, str | Path):
            return open_reward(
                {"name": reward_at(source), "options": {"model": str(Path(source).expanduser()), **options}}
            )
        head = getattr(type(source), "head_name", None)
        names = {"reward_head": "reward_model", "process_reward_head": "process_reward", "value_head": "value_model"}
        if head not in names:
            raise ConfigError("isn't a model that scores", place="from_model", got=type(source).__name__)
        return registry.get("reward", names[head]).of(source, **options)

    @classmethod
    def ensemble(cls, members: Sequence[Any], *, combine: str = "mean_less_std", **options: Any) -> RewardFn:
        """Return several rewards as one, by the plugin `ensemble`.

        Args:
            members: whatever is accepted as a reward, paths of models too, alone or as (reward, weight).
            combine: `mean`, `min`, `mean_less_std` or `mean_less_variance`.
            options: `doubt_weight`.

        Raises:
            ConfigError: fewer than two members, or an option is wrong.
        """
        return registry.get("reward", "ensemble").of([cls._member(one) for one in members], combine=combine, **options)

    @classmethod
    def constitutional(
        cls, objectives: Sequence[Any], constraints: Sequence[tuple[Any, Mapping[str, float]]], *, floor: float = -1.0
    ) -> RewardFn:
        """Return weighted objectives under hard constraints, by the plugin `constitutional`.

        Args:
            objectives: as the members of `ensemble`.
            constraints: pairs of a reward and its bounds, `{"at_least": 0.5}`.
            floor: what a completion gets that violates one.

        Raises:
            ConfigError: there is no objective or constraint, or an option is wrong.
        """
        held = [(cls._member(reward), bounds) for reward, bounds in constraints]
        wrapper = registry.get("reward", "constitutional")
        return wrapper.of([cls._member(one) for one in objectives], held, floor=floor)

    @classmethod
    def _member(cls, given: Any) -> Any:
        """Return a reward as `open_rewards` takes it; the path of a model becomes its reward."""
        if isinstance(given, tuple) and len(given) == 2:
            return (cls._member(given[0]), given[1])
        is_path = isinstance(given, Path) or (isinstance(given, str) and Path(given).expanduser().is_dir())
        return cls.from_model(given) if is_path else given
