"""Process reward models: a score for every reasoning step, learnt from step labels, from pairs, or from both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rlhf_core.plugin import (
    AGGREGATIONS,
    TRAINED,
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
)
from rlhf_plugins.trainers.process_metrics import NO_LABEL, RIGHT, ranked, row_labels, step_metrics

log = logging.getLogger(__name__)

_LOOK_AT = 256
"""Rows that are looked at together before training."""


def step_loss(steps: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each step, −y log σ(s) − (1 − y) log(1 − σ(s)); 0 where a step has no label.

    Lightman et al. 2023 (arXiv 2305.20050, section 2.6) with two classes; Wang et al. 2023 (Math-Shepherd,
    arXiv 2312.08935, equation 1). Log-odds of 0 give log 2.

    Args:
        steps: (R, T) log-odds that the solution is right so far, at the steps' ends.
        labels: (R, T) `RIGHT`, `WRONG` or `NO_LABEL`.

    Returns:
        (R, T).
    """
    losses = binary_cross_entropy_with_logits(steps, (labels == RIGHT).float(), reduction="none")
    return losses * (labels != NO_LABEL)


def ranking_loss(values: Tensor) -> Tensor:
    """Return −log σ(v_w − v_l) for each pair: Bradley-Terry (Ouyang et al. 2022, arXiv 2203.02155, equation 1).

    Args:
        values: (P, 2) of the chosen and the rejected response.

    Returns:
        (P,).
    """
    return -logsigmoid(values[:, 0] - values[:, 1])


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
        if not (self.step_weight or self.ranking_weight or self.outcome_weight):
            raise ValueError("step_weight, ranking_weight and outcome_weight are all 0: there is nothing to learn")
        return self


class ProcessRewardModelTrainer(Trainer[ProcessRewardModelConfig]):
    """Process reward model on pairs, with or without labels of their steps."""

    api = 1
    record = "preference"
    stage = TrainingStage.REWARD
    Config = ProcessRewardModelConfig
    roles: ClassVar = {"reward": TRAINED}

    _opened: list[EncodedData]
    """The data of the run, for messages."""

    def build(self, loader: Loader) -> dict[str, ProcessRewardModel]:
        self._opened = []
        return {"reward": loader.main(ProcessRewardModel, separator=self._asked(), seed=self.config.seed)}

    def _asked(self) -> str | None:
        return self.config.separator if "separator" in self.config.model_fields_set else None

    def inspect(self, data: EncodedData) -> None:
        self._opened.append(data)
        if data.streaming:
            return  # each batch is looked at when it comes
        outcomes = (outcome.row for outcome, _ in data.walk(0, seed=0, shuffle=False, position=[]))
        rows = (row for row in outcomes if row is not None)
        labelled = separated = 0
        while chunk := list(islice(rows, _LOOK_AT)):
            batch = collate(chunk)
            ends = self.reward.step_ends(batch)
            labelled += int((self._labels(batch, ends, data) != NO_LABEL).sum())
            separated += int((ends.sum(dim=1) > 1).sum())
        if not separated:
            log.warning("%s: no response holds %r, so each is one step", data.report.name, self.reward.separator)
        if not labelled and not (self.config.ranking_weight or self.config.outcome_weight):
            raise DataError(
                "no row has `labels` of its steps",
                place=data.report.name,
                fix="give `labels`, or set `ranking_weight` to learn from pairs alone",
            )

    def _labels(self, batch: Batch, ends: Tensor, data: EncodedData | None) -> Tensor:
        """Return (R, T) labels at the steps' ends: right so far, or not, or without a label.

        Raises:
            DataError: a response has another number of labels, or of `steps`, than of steps.
        """
        labels = torch.full(ends.shape, NO_LABEL)
        # A pair's chosen response stands directly before its rejected one.
        for response, prompt in enumerate(batch.owner.tolist() if batch.records else ()):
            at = ends[response].nonzero().squeeze(1).cpu()
            tokens = int(batch.prompt_lengths[prompt] + batch.response_lengths[response])
            last = int(batch.response_ids[response, batch.response_lengths[response] - 1])
            found = row_labels(
                batch.records[prompt],
                response % 2,
                len(at),
                cut=tokens >= self.config.length_limit and last not in self.reward.tokenizer.all_special_ids,
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
        # Held-out data are opened last.
        data = next(iter(self._opened[-1:] if run.evaluating else self._opened), None)
        for batch in stream:
            ends = self.reward.step_ends(batch)
            yield batch.attach(per_token={"step_ends": ends, "step_labels": self._labels(batch, ends, data)})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        config = self.config
        terms = {
            "steps": (config.step_weight, float((batch["step_labels"] != NO_LABEL).sum())),
            "ranking": (config.ranking_weight, batch.num_prompts),
            "outcome": (config.outcome_weight, batch.num_prompts),
        }
        return {name: count for name, (weight, count) in terms.items() if weight}

    def loss(self, batch: Batch) -> Loss:
        config, ends, labels = self.config, batch["step_ends"], batch["step_labels"]
        steps, outcome = self.reward.scores(batch, ends)
        value = AGGREGATIONS[config.aggregation](steps, ends)  # (R,)
        pairs = {name: torch.stack(batch.pairs(of), dim=1) for name, of in (("ranking", value), ("outcome", outcome))}
        terms = {
            "steps": config.step_weight * step_loss(steps, labels).sum(),
            "ranking": config.ranking_weight * ranking_loss(pairs["ranking"]).sum(),
            "outcome": config.outcome_weight * ranking_loss(pairs["outcome"]).sum(),
        }
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {}
        # Without a term of the pairs, a micro-batch without labels isn't computed, and would be missing from these.
        if config.ranking_weight or config.outcome_weight:
            metrics["accuracy"] = ranked(pairs["ranking"].detach())
            metrics["outcome_accuracy"] = ranked(pairs["outcome"].detach())
        metrics |= step_metrics(batch, steps.detach(), labels)
        return Loss({name: term for name, term in terms.items() if name in self.weights(batch)}, metrics)


def _place(data: EncodedData | None, row: int) -> str:
    return data.place_of(row) if data is not None else f"row {row}"
