"""Options that pick parts: the configuration of a method whose loss is made of parts of the core's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import model_validator

from rlhf_core.config.base import refused
from rlhf_core.config.online import OnlineConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.policy_gradient.part_table import Part, PartTable


class PolicyGradientConfig(OnlineConfig):
    """Options of a method whose loss is made of parts, which are checked here, their own options included.

    For each KIND of its `tables` it has two fields, the name of a part and the part's options:

        tables: ClassVar = {"clip": CLIPS}

        clip: str = CLIPS.field("ppo")
        clip_options: dict[str, Any] = CLIPS.options_field()
    """

    tables: ClassVar[Mapping[str, PartTable]] = {}
    """The kinds of parts of which the method uses one each."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for kind in cls.tables:
            for field, of in ((kind, "field"), (f"{kind}_options", "options_field")):
                if field not in cls.model_fields:
                    raise TypeError(
                        f"{cls.__name__} has `{kind}` in `tables` and no field `{field}`: use the table's `{of}`"
                    )

    def part(self, kind: str) -> tuple[str, dict[str, Any]]:
        """Return the name of the part of a kind that is used, and its options that aren't its defaults.

        Override it where a part or its options may be left open.
        """
        return getattr(self, kind), getattr(self, f"{kind}_options")

    def bound_parts(self) -> dict[str, Part]:
        """Return the parts by kind, with their options set and their results checked at each call."""
        return {kind: table.bind(*self.part(kind)) for kind, table in self.tables.items()}

    def trainer_computes_old_logps(self, precision: torch.dtype) -> bool:
        """Whether ratios are taken to the trainer's log-probabilities of a rollout, not to the engine's.

        So it is where a correction compares the two, and where a ratio adds up what 16 bits round. A token's ratio is off by a
        few percent then, far inside its clip, but over a completion that is more than the bounds of such a ratio: half of the
        completions would be clipped before anything was updated.

        Args:
            precision: dtype of the policy's matrix products.
        """
        return self.part("correction")[0] != "none" or (self.part("ratio")[0] != "token" and precision != torch.float32)

    def about_chosen_completions(self) -> str | None:
        """Return that a gradient on chosen completions is that of rejection sampling; refuse corrections.

        Raises:
            ConfigError: completions would be corrected to be the policy's, which chosen ones aren't.
        """
        if "correction" in self.tables and (name := self.part("correction")[0]) != "none":
            raise ConfigError(
                f"the correction `{name}` weights completions to be draws of the policy, and chosen ones aren't",
                fix="set `correction: none`, or leave `rollout_sampler` out",
            )
        return (
            "ratios hold for each token, and the gradient is that of rejection sampling, not of the expected reward; a KL is that"
            " of what was chosen"
        )

    def choices(self) -> dict[str, str]:
        return {kind: table.shown(*self.part(kind)) for kind, table in self.tables.items()}

    @model_validator(mode="after")
    def _parts_exist(self) -> PolicyGradientConfig:
        """Refuse a part that doesn't exist, and an option that it doesn't have or that doesn't fit."""
        for kind, table in self.tables.items():
            name, options = self.part(kind)
            require_part(table, name, options, at=(kind,), options_at=(f"{kind}_options",))
        return self

    @model_validator(mode="after")
    def _completions_differ(self) -> PolicyGradientConfig:
        if self.generation.temperature == 0:
            problem = "completions of temperature 0 are all alike, so no one of them is better than another"
            raise refused(ConfigError(problem, fix="set it above 0"), ("generation", "temperature"), 0)
        return self

    @model_validator(mode="after")
    def _completions_are_the_policys(self) -> PolicyGradientConfig:
        if self.generation.repetition_penalty != 1:
            problem = "ratios and KL would be those of the penalised policy, which isn't the one that trains"
            fix = "leave it out, and let the reward `repetition` punish repeating"
            at = ("generation", "repetition_penalty")
            raise refused(ConfigError(problem, fix=fix), at, self.generation.repetition_penalty)
        return self


def require_part(
    table: PartTable, name: str, options: Mapping[str, Any], *, at: tuple[str, ...], options_at: tuple[str, ...]
) -> None:
    """Refuse a part that doesn't exist, and options that it doesn't have, in a validator of a configuration.

    Args:
        at: the fields that lead to the part's name; `options_at`: to its options.
    """
    with refusing(at, name):
        table.get(name)
    for key, value in options.items():
        with refusing((*options_at, key), value):
            table.options(name, {key: value})


@contextmanager
def refusing(at: tuple[str, ...], value: Any) -> Iterator[None]:
    """Let a `ConfigError` raised inside name the option at `at`, whose value is `value`, as an error of a validator does."""
    try:
        yield
    except ConfigError as error:
        raise refused(error, at, value) from None
