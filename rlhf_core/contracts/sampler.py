"""The contract of a sampler: n completions for each prompt, best first. Importing this imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rlhf_core.config.base import BaseConfig

if TYPE_CHECKING:
    from rlhf_core.contracts.completion import Completion
    from rlhf_core.generation.backend import Backend
    from rlhf_core.generation.drafting import Drafts
    from rlhf_core.generation.engine import Engine
    from rlhf_core.models.policy_model import PolicyModel


class Sampler(ABC):
    """A way to answer prompts with exactly n completions each, best first. `Engine` draws the tokens.

    `BestOfNSampler.load(BestOfNConfig(draws=8), policy="runs/sft", reward="runs/rm").sample(["17+25=?"], n=2)`
    """

    api: ClassVar[int]
    Config: ClassVar[type[BaseConfig]] = BaseConfig
    roles: ClassVar[Mapping[str, str]] = {"policy": "policy"}
    """The models that it needs, role → kind: `policy` for a `PolicyModel`, `policies` for a list of one or more, `reward` for
    whatever is accepted as one reward or several. `roles_for` leaves out those that some options don't need."""

    shares_budget: ClassVar[bool] = False
    """Whether prompts that are answered together share what is spent, so that completions depend on all of them."""
    on_policy: ClassVar[bool] = False
    """Whether each completion is distributed as one that the policy draws by itself: nothing chose it. Else a method that takes
    completions for the policy's own warns of a `rollout_sampler`, or refuses it."""

    draws_from_policy: ClassVar[bool] = True
    """Whether every token is the policy's own, drawn from its distribution. Else it can't be a `rollout_sampler`: updates
    would take the probabilities of others, or even the ids of another vocabulary, for the policy's."""

    models: Mapping[str, Any]
    """Its models by role: a `PolicyModel`, a tuple of them, or `Rewards`."""

    def __init__(self, config: BaseConfig | None = None, **models: Any) -> None:
        """Take a configuration, its defaults where None, and each model that `roles_for` it names.

        A role of kind `policies` takes a list. A reward is a name, a function, a `RewardFn`, a `RewardConfig` or its mapping, or
        the path of a reward model.

        Raises:
            ConfigError: a role is missing, unknown, not used with these options, or given something else than it needs.
        """
        from rlhf_core.generation.sampler_models import models_by_role

        self.config = config if config is not None else self.Config()
        self.models = models_by_role(type(self), self.config, models)
        self.forwarded: dict[str, int] = {}
        """Role → tokens that its policy was run on, by the engines of `engine`, since the sampler was made."""

    @classmethod
    def load(cls, config: BaseConfig | None = None, **sources: Any) -> Self:
        """Return the sampler with its policies loaded from paths, hub names or `ModelConfig`s; loaded ones are taken as they are.

        Raises:
            ConfigError: as for the constructor.
            ModelError: a model can't be loaded.
        """
        from rlhf_core.generation.sampler_models import load_models

        config = config if config is not None else cls.Config()
        return cls(config, **load_models(cls, config, sources))

    @classmethod
    def roles_for(cls, config: BaseConfig) -> Mapping[str, str]:
        """Return the roles that a sampler with these options needs, some or all of `roles`: all by default."""
        return cls.roles

    def engine(
        self,
        seed: int | None = None,
        role: str = "policy",
        *,
        drafts: Drafts | None = None,
        backend: Backend | None = None,
    ) -> Engine:
        """Return a new engine on a role's policy, which counts the tokens that it forwards in `forwarded`.

        Args:
            seed: as for `Engine`.
            role: of kind `policy`, or one of a list, such as `members[0]`; these are counted together, as `members`.
            drafts, backend: as for `Engine`.
        """
        from rlhf_core.generation.engine import Engine
        from rlhf_core.generation.sampler_models import policies_of

        counted_as = role.partition("[")[0]

        def count(tokens: int) -> None:
            self.forwarded[counted_as] = self.forwarded.get(counted_as, 0) + tokens

        return Engine(policies_of(self)[role], seed=seed, counted=count, drafts=drafts, backend=backend)

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
                which others are answered with it, nor, where they share a budget, on their order.
        """
