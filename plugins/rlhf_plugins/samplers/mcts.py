"""Tree search over reasoning steps, with PUCT (Silver et al. 2017) and progressive widening (Couëtoux et al. 2011)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import BaseConfig, SearchStep, StepSearchConfig, StepSearchSampler, StepTrees, distinct_first

IDLE = 256
"""A search ends after so many simulations in a row that drew nothing, since all that they reached had ended."""


def puct(value: float, visits: int, prior: float, parent_visits: int, exploration: float) -> float:
    """Return value + exploration · prior · √parent_visits / (1 + visits) (AlphaZero).

    Args:
        value: of the child, in [0, 1].
        visits: of the child, those that are on their way included.
    """
    return value + exploration * prior * math.sqrt(parent_visits) / (1 + visits)


def allowed_children(visits: int, widening: float, exponent: float) -> int:
    """Return how many children a step may have after some visits: ⌈widening · visits^exponent⌉, at least 1."""
    return max(1, math.ceil(widening * max(visits, 1) ** exponent))


def policy_priors(logps: Sequence[float], temperature: float) -> list[float]:
    """Return softmax(logps / temperature): the policy's probabilities of some steps, as shares of all of them.

    Args:
        logps: the summed log-probability of each step's tokens, nats.
    """
    largest = max(logps)
    weights = [math.exp((one - largest) / temperature) for one in logps]
    return [weight / sum(weights) for weight in weights]


class MCTSConfig(StepSearchConfig):
    """Options of tree search."""

    tree: Literal["none", "json", "svg"] = Field(
        "json",
        description="What a prompt's first completion reports of its tree in `details`: nothing, its steps (`tree`), or also a"
        " picture of them (`tree_svg`).",
    )
    simulations: int | None = Field(
        32,
        ge=1,
        description="Most simulations per prompt, each of which draws a step, or visits an end again; larger searches longer.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="A prompt's search ends once its tree has so many tokens; larger searches longer. The tree ends with more: by"
        " the steps of the last round (up to `leaves`, with `rollouts` completions of each where these give the values), and"
        " by the rest of the n completions that are returned. Null sets no limit.",
    )
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="The search ends after so many seconds; larger searches longer. Completions then depend on the computer's"
        " speed. Null sets no limit.",
    )
    values: Literal["process_reward", "rollouts"] = Field(
        "process_reward",
        description="What a step is worth: its path's score by the `process_reward`, or the mean `reward` of `rollouts`"
        " completions drawn from it.",
    )
    rollouts: int = Field(
        1,
        ge=1,
        description="Completions drawn from each step to value it (values: rollouts); larger values it better, slower.",
    )
    backup: Literal["mean", "max"] = Field(
        "mean",
        description="What a step is worth after several visits: the mean of the values below it, or the largest.",
    )
    exploration: float = Field(
        1.0,
        ge=0,
        description="Weight of priors against values, scaled to [0, 1] in each tree; larger tries more, 0 only the best.",
    )
    prior: Literal["policy", "uniform"] = Field(
        "policy",
        description="Which of a step's children are tried first: the likelier ones by the policy, or all alike.",
    )
    prior_temperature: float = Field(
        1.0,
        gt=0,
        description="Divisor of the log-probabilities of whole steps in priors by the policy; larger makes them more alike.",
    )
    widening: float = Field(
        2.0,
        gt=0,
        description="A step may have widening · visits ^ widening_exponent children; larger makes broader trees.",
    )
    widening_exponent: float = Field(
        0.5, gt=0, le=1, description="See `widening`; larger makes broader trees, 1 lets children grow with visits."
    )
    leaves: int = Field(
        4,
        ge=1,
        description="Steps drawn together, kept apart by a virtual loss; larger is faster and chooses each on less knowledge.",
    )

    @model_validator(mode="after")
    def _limits_and_values_fit(self) -> MCTSConfig:
        if self.simulations is self.max_tokens is self.max_seconds is None:
            raise ValueError("simulations: a search needs a limit: set `simulations`, `max_tokens` or `max_seconds`")
        if self.values == "rollouts" and self.aggregation != "last":
            raise ValueError("aggregation: steps that are valued by rollouts have one score, which is the path's")
        return self


@dataclass(eq=False)
class _Node:
    """A step of the tree with its statistics; without a step while that is being drawn."""

    parent: _Node | None
    step: SearchStep | None = None
    visits: int = 0
    total: float = 0.0
    """Sum of the values that were backed up through it."""
    best: float = -math.inf
    """The largest of them."""
    pending: int = 0
    """Simulations that are on their way through it."""
    repeats: int = 0
    """Children that were drawn with the tokens of another one, which is visited again instead."""
    children: list[_Node] = field(default_factory=list)

    def value(self, backup: str, worst: float = 0.0) -> float:
        """Return what it is worth; each simulation on its way counts as one that found the worst value (virtual loss)."""
        own = self.best * self.visits if backup == "max" else self.total
        return (own + self.pending * worst) / (self.visits + self.pending)


class _Tree:
    """The search for one prompt."""

    def __init__(self, root: SearchStep, config: MCTSConfig) -> None:
        self.root, self.config = _Node(None, root), config
        self.simulations = self.idle = 0
        self.low, self.high = math.inf, -math.inf
        """The least and the largest value so far."""

    def select(self) -> list[_Node] | None:
        """Return the path of a simulation, whose last node lacks its step where one is to be drawn.

        None where all that could be visited is still being drawn.
        """
        path = [node := self.root]
        while not (node.step is not None and node.step.ended):
            most = allowed_children(node.visits + node.pending, self.config.widening, self.config.widening_exponent)
            if len(node.children) + node.repeats < most:
                node.children.append(_Node(node))
                path.append(node.children[-1])
                break
            known = [child for child in node.children if child.step is not None]
            if not known:
                return None
            node = known[self._choice(node, known)]
            path.append(node)
        for each in path:
            each.pending += 1
        self.simulations += 1
        return path

    def _choice(self, node: _Node, known: Sequence[_Node]) -> int:
        """Return the index of the child with the largest PUCT; of equal ones the first drawn."""
        priors, spread = self.priors(known), self.high - self.low
        scores = []
        for child, prior in zip(known, priors, strict=True):
            value = (child.value(self.config.backup, self.low) - self.low) / spread if spread > 0 else 0.5
            visits = child.visits + child.pending
            scores.append(puct(value, visits, prior, node.visits + node.pending, self.config.exploration))
        return max(range(len(scores)), key=scores.__getitem__)

    def priors(self, children: Sequence[_Node]) -> list[float]:
        """Return the priors of some children, which add up to 1."""
        if self.config.prior == "uniform":
            return [1 / len(children)] * len(children)
        logps = [sum(child.step.own.raw_logprobs) for child in children if child.step is not None]
        return policy_priors(logps, self.config.prior_temperature)

    def drawn(self, path: list[_Node], step: SearchStep) -> None:
        """Give the last node of a path its step; a step with the tokens of another child becomes a visit to that one."""
        node, parent = path[-1], path[-2]
        twin = next((one for one in parent.children if one.step is not None and one.step.own.ids == step.own.ids), None)
        if twin is None:
            node.step = step
            return
        parent.children.remove(node)
        parent.repeats += 1
        twin.pending += 1
        path[-1] = twin

    def back_up(self, path: Sequence[_Node]) -> None:
        """Add the value of a path's last step to all nodes of the path."""
        step = path[-1].step
        value = 0.0 if step is None else step.score
        self.low, self.high = min(self.low, value), max(self.high, value)
        for node in path:
            node.visits += 1
            node.total += value
            node.best = max(node.best, value)
            node.pending -= 1

    def nodes(self) -> list[_Node]:
        """Return all nodes that have a step."""
        found = [self.root]
        for node in found:
            found += [child for child in node.children if child.step is not None]
        return found

    def principal(self) -> SearchStep:
        """Return the end of the path that was visited most; of equal visits the larger value counts."""
        node = self.root
        while node.children:
            node = max(node.children, key=lambda one: (one.visits, one.value(self.config.backup)))
        return node.step or self.root.step  # type: ignore[return-value]

    def statistics(self) -> dict[SearchStep, Mapping[str, Any]]:
        """Return the visits, value and prior of each step that the search visited."""
        found: dict[SearchStep, Mapping[str, Any]] = {}
        for node in self.nodes():
            if node.step is not None and node.visits:
                value = node.value(self.config.backup)
                found[node.step] = {**found.get(node.step, {}), "visits": node.visits, "value": value}
            for child, prior in zip(node.children, self.priors(node.children) if node.children else [], strict=True):
                if child.step is not None:
                    found[child.step] = {"prior": prior}
        return found


class MCTSGenerator(StepSearchSampler):
    """Tree search over reasoning steps (MCTS): PUCT with priors by the policy and values by a process reward or rollouts."""

    api = 1
    Config = MCTSConfig
    config: MCTSConfig
    roles: ClassVar = {"policy": "policy", "process_reward": "reward", "reward": "reward"}

    @classmethod
    def roles_for(cls, config: BaseConfig) -> Mapping[str, str]:
        """Return the policy, and the reward that gives the values."""
        role = "reward" if isinstance(config, MCTSConfig) and config.values == "rollouts" else "process_reward"
        return {"policy": "policy", role: "reward"}

    def search(self, trees: StepTrees, n: int) -> list[list[SearchStep]]:
        """Search until a limit is reached; return the n best ends of each prompt's tree, the most visited path's among them."""
        searches = [_Tree(root, self.config) for root in trees.roots]
        began = time.monotonic()
        while open_ones := [one for one in searches if self._continues(one, trees, began)]:
            self._round(open_ones, trees)
        for one in searches:
            trees.facts |= one.statistics()
        self._finish(searches, trees, n)
        return [distinct_first([step for step in steps if step.ended], n) for steps in trees.steps]

    def _continues(self, tree: _Tree, trees: StepTrees, began: float) -> bool:
        """Tell whether a tree has reached none of its limits."""
        config, prompt = self.config, tree.root.step.prompt if tree.root.step is not None else 0
        return (
            (config.simulations is None or tree.simulations < config.simulations)
            and (config.max_tokens is None or trees.tokens[prompt] < config.max_tokens)
            and (config.max_seconds is None or time.monotonic() - began < config.max_seconds)
            and tree.idle < IDLE
        )

    def _round(self, open_trees: Sequence[_Tree], trees: StepTrees) -> None:
        """Let several simulations of each tree draw their steps together, and back up what these are worth."""
        selected: list[tuple[_Tree, list[_Node]]] = []
        for tree in open_trees:
            for _ in range(self._leaves(tree, trees)):
                path = tree.select()
                if path is None:
                    break
                tree.idle = tree.idle + 1 if path[-1].step is not None else 0
                selected.append((tree, path))
        drawing = [(tree, path) for tree, path in selected if path[-1].step is None]
        grown = trees.grow([_step(path[-2]) for _, path in drawing])
        if self.config.values == "rollouts":
            trees.value_by_rollouts(grown, self.models["reward"], self.config.rollouts)
        for (tree, path), step in zip(drawing, grown, strict=True):
            tree.drawn(path, step)
        for tree, path in selected:
            tree.back_up(path)

    def _leaves(self, tree: _Tree, trees: StepTrees) -> int:
        """Return how many steps to draw together: no more than the limits leave, at the mean tokens of the tree's steps."""
        leaves = min(self.config.leaves, (self.config.simulations or math.inf) - tree.simulations)
        if self.config.max_tokens is not None:
            prompt = 0 if tree.root.step is None else tree.root.step.prompt
            spent, steps = trees.tokens[prompt], len(trees.steps[prompt]) - 1
            if spent and steps:
                leaves = min(leaves, max(1, round((self.config.max_tokens - spent) * steps / spent)))
        return int(leaves)

    def _finish(self, searches: Sequence[_Tree], trees: StepTrees, n: int) -> None:
        """Draw the rest of each tree's most visited path, and of its best open steps where fewer than n have ended."""
        heads: list[SearchStep] = []
        for tree, steps in zip(searches, trees.steps, strict=True):
            principal = tree.principal()
            wanted = [] if principal.ended else [principal]
            lacking = n - len(wanted) - len({step.ids for step in steps if step.ended})
            others = sorted(
                (one for one in steps if not one.ended), key=lambda one: (-len(one.step_scores[:1]), -one.score)
            )
            wanted += [others[at % len(others)] for at in range(max(0, lacking))]
            heads += wanted
        while heads := [one for one in heads if not one.ended]:
            heads = trees.grow(heads)
            if self.config.values == "rollouts":
                trees.value_by_rollouts([one for one in heads if one.ended], self.models["reward"], 1)


def _step(node: _Node) -> SearchStep:
    if node.step is None:
        raise ValueError("the step is still being drawn")
    return node.step
