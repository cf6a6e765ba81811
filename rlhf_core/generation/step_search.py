"""The base class of samplers that search over reasoning steps, guided by a reward that scores each step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.engine import whole_count
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.step_trees import SearchStep, StepSearchConfig, StepTrees
from rlhf_core.generation.tree_picture import tree_svg, tree_values
from rlhf_core.rewards.step_readers import require_steps

ROLE = "process_reward"


class StepSearchSampler(Sampler):
    """Draws completions step by step, and lets a process reward say which paths are continued. A subclass gives `search`."""

    Config = StepSearchConfig
    config: StepSearchConfig
    roles: ClassVar = {"policy": "policy", ROLE: "reward"}

    def __init__(self, config: BaseConfig | None = None, **models: Any) -> None:
        """Take a configuration and the models; see `Sampler`.

        Raises:
            ConfigError: as `Sampler`, or the reward gives no scores to steps.
        """
        super().__init__(config, **models)
        if ROLE in self.models:
            require_steps(self.models[ROLE], place=f"{type(self).__name__}({ROLE}=…)")

    @abstractmethod
    def search(self, trees: StepTrees, n: int) -> list[list[SearchStep]]:
        """Grow the trees; return for each prompt n steps that have ended, the highest score first."""

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return n completions for each prompt, the highest path score first."""
        n = whole_count(n)
        trees = StepTrees(self.engine(seed), prompt_batch(self.policy, prompts), self.models.get(ROLE), self.config)
        try:
            found = self.search(trees, n)
            return [
                [
                    replace(trees.completion(step), details=self.details(trees, step, best=place == 0))
                    for place, step in enumerate(steps)
                ]
                for steps in found
            ]
        finally:
            trees.close()
            if ROLE in self.models:
                self.forwarded[ROLE] = self.forwarded.get(ROLE, 0) + trees.reader.forwarded

    def details(self, trees: StepTrees, step: SearchStep, *, best: bool) -> dict[str, Any]:
        """Return what is reported with the completion that a path is, as JSON values.

        Args:
            best: whether it is the first of its prompt.
        """
        about: dict[str, Any] = {
            "step_scores": list(step.step_scores),
            "steps_drawn": len(trees.steps[step.prompt]) - 1,
            "tokens_forwarded": trees.forwarded(step.prompt),
        }
        if best and self.config.tree != "none":
            about["tree"] = tree_values(trees.steps[step.prompt], step, trees.facts)
            if self.config.tree == "svg":
                about["tree_svg"] = tree_svg(about["tree"])
        return about
