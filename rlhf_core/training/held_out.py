"""The evaluation of held-out data: what the method's `evaluate` returns for each batch, averaged over the whole set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Evaluation, Loss, Pair, Trainer, Window
from rlhf_core.data.encoded_data import EncodedData
from rlhf_core.infra.errors import ConfigError, DataError, NumbersError, PluginError
from rlhf_core.infra.out_of_memory import halve_until_fits, try_to_fit
from rlhf_core.infra.seeds import RandomState, seed_everything
from rlhf_core.models.batch_values import halves
from rlhf_core.training.context import RunContext
from rlhf_core.training.distribution import Distribution
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

    Each is averaged over the whole set, in evaluation mode and without gradients; of several files each has its own beside them,
    as `eval_FILE_loss` and `eval_FILE_NAME`. A metric that the method returns with one entry per prompt has its standard error
    beside it, as `eval_NAME_se`; the method's `summary` adds figures of its own. Random states and the method's own state are
    restored afterwards.

    Raises:
        ConfigError: a file's metric has the name of another metric.
        DataError: no held-out row has anything to score.
    """
    config, distribution = trainer.config, run.distribution
    random, method_state = RandomState.capture(), json.dumps(trainer.state_dict())
    seed_everything(config.seed, "evaluation", distribution.rank)
    trainer.models.eval()
    scores: dict[str, _Scores] = {}
    try:
        with torch.no_grad(), run.devices.autocast(config.precision):
            for batch in one_pass(trainer, dataset, distribution, held_out=True):
                for entry, part in _by_entry(batch, dataset, distribution):
                    found = _evaluate_batch(trainer, part, run)
                    # A metric that the method returns replaces what it logged under that name: never a mixture of both.
                    logged = {name: pair for name, pair in run.logged().items() if name not in found.metrics}
                    scores.setdefault(entry, _Scores(type(trainer).__name__)).add(part, found, logged)
    finally:
        random.restore()
        trainer.load_state_dict(json.loads(method_state))
    values = _averages(trainer, list(scores.values()), distribution)
    if not values:
        raise DataError("no held-out row has anything to score", place="eval_data", fix="use rows with response tokens")
    if len(scores) > 1:
        for entry, score in scores.items():
            own = {f"{entry}_{name}": value for name, value in _averages(trainer, [score], distribution).items()}
            if twice := next((name for name in own if name in values), None):
                problem = f"two metrics would be called `eval_{twice}`, one of them that of the entry `{entry}`"
                raise ConfigError(problem, place="eval_data", fix="give the entry another `name`")
            values |= own
    return {f"eval_{name}": value for name, value in values.items()}


class _Scores:
    """What the evaluation of some held-out rows gave, as sums."""

    def __init__(self, place: str) -> None:
        self.by_row, self.terms, self.metrics = MetricsByRow(place), Tally(), Tally()

    def add(self, batch: Batch, found: Evaluation, logged: Mapping[str, Pair]) -> None:
        """Add what the method returned for a batch, and what it logged."""
        self.terms.add(found.terms)
        self.metrics.add(found.metrics)
        self.by_row.add(batch, found.metrics)
        self.metrics.add(logged)


def _by_entry(batch: Batch, dataset: EncodedData, distribution: Distribution) -> Iterator[tuple[str, Batch]]:
    """Yield this process's share of a batch by the entry of `eval_data` that rows are of; every process yields as many parts."""
    names = [part.entry.name for part in dataset.source.parts if part.entry is not None]
    if len(names) < 2:
        yield "", batch
        return
    entries = [dataset.entry_of(row) for row in batch.rows]
    found = {entry for share in distribution.gather(entries) for entry in share}
    for entry in filter(found.__contains__, names):
        yield entry, batch.select([number for number, of_row in enumerate(entries) if of_row == entry])


def _averages(trainer: Trainer[Any], scores: Sequence[_Scores], distribution: Distribution) -> dict[str, float]:
    """Return the loss, the metrics with their standard errors and the method's own figures over the rows of all processes."""
    terms, metrics = Tally(), Tally()
    for score in scores:
        terms.add(score.terms.totals())
        metrics.add(score.metrics.totals())
    averages = quotients(sum_pairs(distribution, terms.totals()))
    values = {"loss": sum(averages.values())} if averages else {}
    if len(averages) > 1:
        values |= {f"loss_{name}": value for name, value in averages.items()}
    values |= quotients(sum_pairs(distribution, metrics.totals()))
    entries = merge_entries(distribution.gather(merge_entries(score.by_row.entries for score in scores)))
    values |= {f"{name}_se": error for name, error in standard_errors(entries).items()} if values else {}
    return values | trainer.summary(row_values(entries)) if entries and values else values


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
