"""Scoring held-out rows while training: what the method makes of each batch, averaged over the whole set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Evaluation, Loss, Pair, Trainer, Window
from rlhf_core.data import DataStream
from rlhf_core.data.base import EncodedData
from rlhf_core.infra.errors import DataError, NumbersError, PluginError
from rlhf_core.infra.out_of_memory import halve_until_fits, try_to_fit
from rlhf_core.infra.seeds import RandomState, seed_everything
from rlhf_core.models.batch_values import halves
from rlhf_core.training.context import RunContext
from rlhf_core.training.per_prompt_metrics import PerPrompt, merge_entries, standard_errors
from rlhf_core.training.per_prompt_metrics import values as per_prompt_values
from rlhf_core.training.reduction import Tally, quotients
from rlhf_core.training.update import sum_pairs

PREFIX = "eval_"
_NUMBER = "_held_out"


def evaluate(trainer: Trainer[Any], dataset: EncodedData, run: RunContext) -> dict[str, float]:
    """Return the averages over a held-out set, names prefixed `eval_`: `eval_loss`, each term where there are several, metrics.

    In evaluation mode and without gradients. A metric that the method gives one entry per prompt for has its standard error
    beside it, as `eval_NAME_se`, and what its `summary` makes of them. Random states and the method's own state are left as
    they were.
    """
    config, distribution = trainer.config, run.distribution
    random, remembered = RandomState.capture(), json.dumps(trainer.state_dict())
    seed_everything(config.seed, "evaluation", distribution.rank)
    trainer.models.eval()
    stream = DataStream(
        dataset,
        batch_size=config.batch_size,
        epochs=1.0,
        seed=config.seed,
        shuffle=False,
        rank=distribution.rank,
        world_size=distribution.world_size,
        held_out=True,
    )
    per_prompt, terms, metrics = PerPrompt(type(trainer).__name__), Tally(), Tally()
    try:
        with torch.no_grad(), run.devices.autocast(config.precision):
            for batch in stream:
                found = _evaluated(trainer, batch, run)
                terms.add(found.terms)
                metrics.add(found.metrics)
                per_prompt.add(batch, found.metrics)
                # What the method returns itself stands for what it logged under that name: never a mixture of both.
                metrics.add({name: pair for name, pair in run.logged().items() if name not in found.metrics})
    finally:
        random.restore()
        trainer.load_state_dict(json.loads(remembered))
    averages = quotients(sum_pairs(distribution, terms.totals()))
    values = {"loss": sum(averages.values())} if averages else {}
    if len(averages) > 1:
        values |= {f"loss_{name}": value for name, value in averages.items()}
    values |= quotients(sum_pairs(distribution, metrics.totals()))
    if not values:
        raise DataError("no held-out row has anything to score", place="eval_data", fix="use rows with response tokens")
    entries = merge_entries(distribution.gather(per_prompt.entries))
    values |= {f"{name}_se": error for name, error in standard_errors(entries).items()}
    values |= trainer.summary(per_prompt_values(entries)) if entries else {}
    return {PREFIX + name: value for name, value in values.items()}


def held_out_loss(trainer: Trainer[Any], batch: Batch, run: RunContext) -> Evaluation:
    """Return the sums of `loss` over the windows that `experience` makes of a batch, each micro-batch as memory allows."""
    terms, sums = Tally(), _PerBatch(batch.num_prompts)
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
                sums.add(piece, loss.metrics)
    return Evaluation(dict(terms.totals()), sums.metrics())


def _windows(trainer: Trainer[Any], batch: Batch, run: RunContext) -> Iterator[Batch]:
    numbered = batch.attach(per_prompt={_NUMBER: torch.arange(batch.num_prompts, device=batch.device)})
    for made in trainer.experience(iter([numbered]), run):
        yield made.batch if isinstance(made, Window) else made


class _PerBatch:
    """Adds up metrics of micro-batches; those of one entry per prompt at the places of the batch's prompts."""

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts
        self._plain = Tally()
        self._entries: dict[str, Tensor] = {}

    def add(self, micro: Batch, metrics: dict[str, Pair] | Any) -> None:
        for name, (total, count) in metrics.items():
            if not (isinstance(total, Tensor) and total.ndim and _NUMBER in micro.per_prompt):
                self._plain.add({name: (total, count)})
                continue
            if tuple(total.shape) != (micro.num_prompts,):
                self._entries[name] = total  # refused by shape, where all metrics are looked at
                continue
            if not isinstance(count, Tensor) or count.ndim == 0:
                count = torch.full(total.shape, float(count) / max(total.numel(), 1), device=total.device)
            table = self._entries.setdefault(name, torch.zeros(self._prompts, 2, dtype=torch.float64))
            table.index_add_(0, micro[_NUMBER].cpu(), torch.stack([total, count], dim=1).double().cpu())

    def metrics(self) -> dict[str, Pair]:
        of_prompts: dict[str, Pair] = {
            name: (table[:, 0], table[:, 1]) if table.shape == (self._prompts, 2) else (table, 1.0)
            for name, table in self._entries.items()
        }
        return {**self._plain.totals(), **of_prompts}


def _evaluated(trainer: Trainer[Any], batch: Batch, run: RunContext) -> Evaluation:
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
