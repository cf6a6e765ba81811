"""Process reward models: a score for every reasoning step, learned from step labels, from pairs, or from both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rlhf_core.plugin import (
    AGGREGATIONS,
    NO_LABEL,
    RIGHT,
    TRAINED,
    WRONG,
    Batch,
    DataError,
    EncodedData,
    Loader,
    Loss,
    ProcessRewardModel,
    RunContext,
    Trainer,
    TrainerConfig,
    TrainingStage,
    collate,
    pair_accuracy,
    read_step_labels,
)
from rlhf_plugins.trainers.reward_model import ranking_loss

log = logging.getLogger(__name__)

_INSPECTED_ROWS = 256
"""Rows per batch in which data are inspected before training."""


def step_loss(steps: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each step, −y log σ(s) − (1 − y) log(1 − σ(s)); 0 where a step has no label.

    Lightman et al. 2023 (arXiv 2305.20050, section 2.6) with two classes; Wang et al. 2023 (Math-Shepherd,
    arXiv 2312.08935, equation 1). Log-odds of 0 give log 2.

    Args:
        steps: (R, T) s, log-odds that the solution is right so far, at the steps' last tokens.
        labels: (R, T) `RIGHT` (y = 1), `WRONG` (y = 0) or `NO_LABEL`.

    Returns:
        (R, T) nats.
    """
    losses = binary_cross_entropy_with_logits(steps, (labels == RIGHT).float(), reduction="none")
    return losses * (labels != NO_LABEL)


def first_wrong(wrong: Tensor) -> Tensor:
    """Return (R,) the first column where `wrong`, (R, T) bool, is set; −1 where none is."""
    return torch.where(wrong.any(dim=1), wrong.float().argmax(dim=1), -1)


def step_metrics(batch: Batch, steps: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how well labelled steps are judged, each metric as (sum, count) with one entry per prompt, (P,).

    `step_accuracy`: share of labelled steps judged rightly; `first_error_found`: share of wrong solutions whose first wrong step
    is the first one judged wrong; `right_let_pass`: share of right solutions in which no step is judged wrong.

    Args:
        steps: (R, T) log-odds that the solution is right so far, at the steps' last tokens; above 0 judges a step right.
        labels: (R, T) `RIGHT`, `WRONG` or `NO_LABEL`.
    """
    known = labels != NO_LABEL
    right = (steps > 0) == (labels == RIGHT)
    first_error, first_judged = first_wrong(labels == WRONG), first_wrong((steps <= 0) & known)
    labelled = known.any(dim=1)
    has_error = (labelled & (first_error >= 0)).float()
    is_right = (labelled & (first_error < 0)).float()

    def by_prompt(values: Tensor) -> Tensor:
        return torch.zeros(batch.num_prompts, device=values.device).index_add(0, batch.owner, values.float())

    return {
        "step_accuracy": (by_prompt((right & known).sum(dim=1)), by_prompt(known.sum(dim=1))),
        "first_error_found": (by_prompt((first_judged == first_error).float() * has_error), by_prompt(has_error)),
        "right_let_pass": (by_prompt((first_judged < 0).float() * is_right), by_prompt(is_right)),
    }


class ProcessRewardModelConfig(TrainerConfig):
    """Options of process reward models."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak step size; larger learns faster and may diverge.")
    separator: str = Field("\n", min_length=1, description="Text that ends a step; another one makes other steps.")
    aggregation: Literal["min", "product", "mean", "last"] = Field(
        "min", description="How a solution's step scores make its value: the worst, their product, mean, or the last."
    )
    step_weight: float = Field(1.0, ge=0, description="Weight of the step labels; larger learns more from them.")
    ranking_weight: float = Field(
        0.1, ge=0, description="Weight of ranking pairs by aggregated steps; larger learns more from pairs."
    )
    outcome_weight: float = Field(
        0.1, ge=0, description="Weight of ranking pairs by the outcome's score; larger learns more from pairs."
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> ProcessRewardModelConfig:
        """Refuse weights that are all 0."""
        if not (self.step_weight or self.ranking_weight or self.outcome_weight):
            raise ValueError("step_weight, ranking_weight and outcome_weight are all 0, so the loss is empty")
        return self


class ProcessRewardModelTrainer(Trainer[ProcessRewardModelConfig]):
    """Process reward model on pairs, with or without labels of their steps."""

    api = 1
    record = "preference"
    stage = TrainingStage.REWARD
    Config = ProcessRewardModelConfig
    roles: ClassVar = {"reward": TRAINED}

    _data: EncodedData | None = None
    """The training data, which name the place of a row in messages; None before `inspect`."""
    _held_out: EncodedData | None = None
    """The held-out data, likewise."""

    def build(self, loader: Loader) -> dict[str, ProcessRewardModel]:
        """Return the process reward model, with the separator of its steps."""
        self._data = self._held_out = None
        # A model that was trained before keeps its separator unless the option is given.
        separator = self.config.separator if "separator" in self.config.model_fields_set else None
        return {"reward": loader.main(ProcessRewardModel, separator=separator, seed=self.config.seed)}

    def inspect(self, data: EncodedData) -> None:
        """Check every row's labels; warn where the separator is in no response. Rows of a stream are checked as they are read."""
        # Called with the training data first, then with the held-out data where there are any.
        if self._data is None:
            self._data = data
        else:
            self._held_out = data
        if data.streaming:
            return
        outcomes = (outcome.row for outcome, _ in data.walk(0, seed=0, shuffle=False, position=[]))
        rows = (row for row in outcomes if row is not None)
        labelled = separated = 0
        while chunk := list(islice(rows, _INSPECTED_ROWS)):
            batch = collate(chunk)
            ends = self.reward.step_ends(batch)
            labelled += int((self._labels(batch, ends, data) != NO_LABEL).sum())
            separated += int((ends.sum(dim=1) > 1).sum())
        if not separated:
            log.warning(
                "%s: no response contains the separator %r, so each counts as one step",
                data.report.name,
                self.reward.separator,
            )
        if not labelled and not (self.config.ranking_weight or self.config.outcome_weight):
            raise DataError(
                "no row has step `labels`",
                place=data.report.name,
                fix="give `labels`, or set `ranking_weight` to learn from pairs alone",
            )

    def _labels(self, batch: Batch, ends: Tensor, data: EncodedData | None) -> Tensor:
        """Return (R, T) `RIGHT`, `WRONG` or `NO_LABEL` at the steps' last tokens, `NO_LABEL` elsewhere.

        Args:
            ends: (R, T) bool, the last token of each step.
            data: where the rows come from, for messages.

        Raises:
            DataError: a response has another number of `labels`, or of `steps`, than of steps.
        """
        labels = torch.full(ends.shape, NO_LABEL)
        # A pair's chosen response stands directly before its rejected one.
        for response, prompt in enumerate(batch.owner.tolist() if batch.records else ()):
            at = ends[response].nonzero().squeeze(1).cpu()
            tokens = int(batch.prompt_lengths[prompt] + batch.response_lengths[response])
            last = int(batch.response_ids[response, batch.response_lengths[response] - 1])
            found = read_step_labels(
                batch.records[prompt],
                response % 2,
                len(at),
                truncated=tokens >= self.config.length_limit and last not in self.reward.tokenizer.all_special_ids,
                separator=self.reward.separator,
                place=functools.partial(_place, data, batch.rows[prompt]),
            )
            if found is not None:
                labels[response, at] = torch.tensor(found)
        return labels.to(batch.device)

    @property
    def reward(self) -> ProcessRewardModel:
        return self.models["reward"]  # type: ignore[return-value]

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        """Attach the last tokens of steps and the steps' labels, (R, T) each, to each batch."""
        data = self._held_out if run.evaluating else self._data
        for batch in stream:
            ends = self.reward.step_ends(batch)
            yield batch.attach(per_token={"step_ends": ends, "step_labels": self._labels(batch, ends, data)})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Return labelled steps and pairs, for the terms whose weight isn't 0."""
        config = self.config
        terms = {
            "steps": (config.step_weight, float((batch["step_labels"] != NO_LABEL).sum())),
            "ranking": (config.ranking_weight, batch.num_prompts),
            "outcome": (config.outcome_weight, batch.num_prompts),
        }
        return {name: count for name, (weight, count) in terms.items() if weight}

    def loss(self, batch: Batch) -> Loss:
        """Return the losses of labelled steps, and the ranking losses of aggregated steps and of outcomes, as sums."""
        config, ends, labels = self.config, batch["step_ends"], batch["step_labels"]
        steps, outcome = self.reward.scores(batch, ends)  # (R, T) and (R,)
        values = batch.pairs(
            AGGREGATIONS[config.aggregation](steps, ends)
        )  # of whole solutions: chosen (P,), rejected (P,)
        outcomes = batch.pairs(outcome)
        terms = {
            "steps": config.step_weight * step_loss(steps, labels).sum(),
            "ranking": config.ranking_weight * ranking_loss(*values).sum(),
            "outcome": config.outcome_weight * ranking_loss(*outcomes).sum(),
        }
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {}
        # Without a term on pairs the loop skips micro-batches without labels, and their pairs would be missing from these
        # metrics.
        if config.ranking_weight or config.outcome_weight:
            for name, (chosen, rejected) in (("accuracy", values), ("outcome_accuracy", outcomes)):
                metrics[name] = (pair_accuracy((chosen - rejected).detach()), batch.num_prompts)
        metrics |= step_metrics(batch, steps.detach(), labels)
        return Loss({name: term for name, term in terms.items() if name in self.weights(batch)}, metrics)


def _place(data: EncodedData | None, row: int) -> str:
    """Return what messages call a row: its file and line where the data know them."""
    return data.place_of(row) if data is not None else f"row {row}"
