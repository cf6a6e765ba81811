"""The evaluation of held-out data: what the method's `evaluate` returns for each batch, averaged over the whole set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Evaluation, Loss, Trainer, Window
from rlhf_core.data.encoded_data import EncodedData
from rlhf_core.infra.errors import DataError, NumbersError, PluginError
from rlhf_core.infra.out_of_memory import halve_until_fits, try_to_fit
from rlhf_core.infra.seeds import RandomState, seed_everything
from rlhf_core.models.batch_values import halves
from rlhf_core.training.context import RunContext
from rlhf_core.training.per_prompt_metrics import (
    MetricsByPrompt,
    MetricsByRow,
    merge_entries,
    number_prompts,
    row_values,
    standard_errors,
)
from rlhf_core.training.reduction import Tally, quotients, sum_pairs
from rlhf_core.training.run_data import one_pass


def evaluate(trainer: Trainer[Any], dataset: EncodedData, run: RunContext) -> dict[str, float]:
    """Return a held-out set's loss (`eval_loss`, and `eval_loss_TERM` where there are several terms) and metrics (`eval_NAME`).

    Each is averaged over the whole set, in evaluation mode and without gradients. A metric that the method returns with one entry
    per prompt has its standard error beside it, as `eval_NAME_se`; the method's `summary` adds figures of its own. Random states
    and the method's own state are restored afterwards.

    Raises:
        DataError: no held-out row has anything to score.
    """
    config, distribution = trainer.config, run.distribution
    random, method_state = RandomState.capture(), json.dumps(trainer.state_dict())
    seed_everything(config.seed, "evaluation", distribution.rank)
    trainer.models.eval()
    by_row, terms, metrics = MetricsByRow(type(trainer).__name__), Tally(), Tally()
    try:
        with torch.no_grad(), run.devices.autocast(config.precision):
            for batch in one_pass(trainer, dataset, distribution, held_out=True):
                found = _evaluate_batch(trainer, batch, run)
                terms.add(found.terms)
                metrics.add(found.metrics)
                by_row.add(batch, found.metrics)
                # A metric that the method returns replaces what it logged under that name: never a mixture of both.
                metrics.add({name: pair for name, pair in run.logged().items() if name not in found.metrics})
    finally:
        random.restore()
        trainer.load_state_dict(json.loads(method_state))
    averages = quotients(sum_pairs(distribution, terms.totals()))
    values = {"loss": sum(averages.values())} if averages else {}
    if len(averages) > 1:
        values |= {f"loss_{name}": value for name, value in averages.items()}
    values |= quotients(sum_pairs(distribution, metrics.totals()))
    if not values:
        raise DataError("no held-out row has anything to score", place="eval_data", fix="use rows with response tokens")
    entries = merge_entries(distribution.gather(by_row.entries))
    values |= {f"{name}_se": error for name, error in standard_errors(entries).items()}
    values |= trainer.summary(row_values(entries)) if entries else {}
    return {f"eval_{name}": value for name, value in values.items()}


def held_out_loss(trainer: Trainer[Any], batch: Batch, run: RunContext) -> Evaluation:
    """Return the loss terms and metrics of a batch of held-out rows as sums, by `experience`, `weights` and `loss`.

    A micro-batch that doesn't fit in memory is computed in halves.
    """
    terms, metrics = Tally(), MetricsByPrompt(batch.num_prompts)
    device = run.devices.device
    for window in _windows(trainer, batch, run):
        for micro in run.micro_batches.cut(window):
            if not any(trainer.weights(micro).values()):
                continue

            def work(piece: Batch) -> tuple[Batch, Loss]:
                return piece, trainer.loss(piece.to(device))

            def cut(piece: Batch) -> list[Batch]:
                return halves(piece, divide=trainer.splits_groups)

            for piece, loss in halve_until_fits(micro, work, cut, device=device, unit=run.micro_batches.unit):
                weights = trainer.weights(piece)
                terms.add({name: (term, weights[name]) for name, term in loss.terms.items() if weights[name] > 0})
                metrics.add(piece, loss.metrics)
    return Evaluation(dict(terms.totals()), metrics.pairs())


def _windows(trainer: Trainer[Any], batch: Batch, run: RunContext) -> Iterator[Batch]:
    """Yield the windows that the method's `experience` makes of a batch, whose prompts are numbered."""
    for made in trainer.experience(iter([number_prompts(batch)]), run):
        yield made.batch if isinstance(made, Window) else made


def _evaluate_batch(trainer: Trainer[Any], batch: Batch, run: RunContext) -> Evaluation:
    """Return what the method's `evaluate` returns for a batch, checked to be an `Evaluation`."""
    place = f"{type(trainer).__name__}.evaluate"
    made = try_to_fit(lambda: trainer.evaluate(batch, run), run.devices.device)
    if made is None:
        raise NumbersError(
            "out of memory",
            place=place,
            fix="set a smaller `batch_size`; a method forwards batches through `run.forward`",
        )
    if not isinstance(made.value, Evaluation):
        raise PluginError("must return an `Evaluation`", place=place, got=type(made.value).__name__)
    return made.value
