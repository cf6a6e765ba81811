"""The contract of a sampler: n completions for each prompt, best first. Importing this imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rlhf_core.config.base import BaseConfig

if TYPE_CHECKING:
    from rlhf_core.contracts.completion import Completion
    from rlhf_core.models.policy_model import PolicyModel


class Sampler(ABC):
    """A way to answer prompts with exactly n completions each, best first. `Engine` draws the tokens.

    `BestOfNSampler.load(BestOfNConfig(draws=8), policy="runs/sft", reward="runs/rm").sample(["17+25=?"], n=2)`
    """

    api: ClassVar[int]
    Config: ClassVar[type[BaseConfig]] = BaseConfig
    roles: ClassVar[Mapping[str, str]] = {"policy": "policy"}
    """The models that it needs, role → kind: `policy` for a `PolicyModel`, `reward` for whatever is accepted as one reward or
    several."""

    models: Mapping[str, Any]
    """Its models by role: a `PolicyModel`, or `Rewards`."""

    def __init__(self, config: BaseConfig | None = None, **models: Any) -> None:
        """Take a configuration, its defaults where None, and each model that `roles` names.

        A reward is a name, a function, a `RewardFn`, a `RewardConfig` or its mapping, or the path of a reward model.

        Raises:
            ConfigError: a role is missing, unknown, or given something else than it needs.
        """
        from rlhf_core.generation.sampler_models import models_by_role

        self.config = config if config is not None else self.Config()
        self.models = models_by_role(type(self), models)

    @classmethod
    def load(cls, config: BaseConfig | None = None, **sources: Any) -> Self:
        """Return the sampler with its policies loaded from paths, hub names or `ModelConfig`s; loaded ones are taken as they are.

        Raises:
            ConfigError: as for the constructor.
            ModelError: a model can't be loaded.
        """
        from rlhf_core.generation.sampler_models import load_models

        return cls(config, **load_models(cls, sources))

    @property
    def policy(self) -> PolicyModel:
        return self.models["policy"]

    @abstractmethod
    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return exactly n completions for each prompt, best first; their scores are all set, or all None.

        Args:
            prompts: texts, lists of chat messages, or rows: mappings with a `prompt` and other columns (an `answer`), which reach
                the reward. `prompt_batch` encodes them as in training.
            seed: makes the completions repeatable; None draws others each time. With one, a prompt's completions don't depend on
                which others are answered with it.
        """
