"""Scoring held-out rows while training: the method's own loss and metrics, averaged over the whole set."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import torch

from rlhf_core.batch import Batch
from rlhf_core.data import DataStream
from rlhf_core.data.base import EncodedData
from rlhf_core.errors import DataError
from rlhf_core.infra.devices import DeviceManager, is_out_of_memory
from rlhf_core.infra.seeds import RandomState, seed_everything
from rlhf_core.interfaces import Trainer
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.micro_batches import MicroBatches, halves
from rlhf_core.training.per_prompt import PerPrompt, merge_entries, standard_errors
from rlhf_core.training.per_prompt import values as per_prompt_values
from rlhf_core.training.reduction import Tally, quotients
from rlhf_core.training.update import sum_pairs

PREFIX = "eval_"


def evaluate(
    trainer: Trainer,
    dataset: EncodedData,
    *,
    distribution: Distribution,
    devices: DeviceManager,
    micro_batches: MicroBatches,
) -> dict[str, float]:
    """Return `eval_loss`, each term where there are several, and the method's metrics, names prefixed `eval_`.

    The same `experience`, `weights` and `loss` as in training, in evaluation mode and without gradients; every average is
    over the whole set. A metric that the method gives one entry a prompt for has its standard error beside it, as
    `eval_NAME_se`, and what its `summary` makes of them. Random states and the method's own state are left as they were.
    """
    random, remembered = RandomState.capture(), json.dumps(trainer.state_dict())
    seed_everything(trainer.config.seed, "evaluation", distribution.rank)
    trainer.models.eval()
    stream = DataStream(
        dataset,
        batch_size=trainer.config.batch_size,
        epochs=1.0,
        seed=trainer.config.seed,
        shuffle=False,
        rank=distribution.rank,
        world_size=distribution.world_size,
    )
    seam, trainer.seam = trainer.seam, replace(trainer.seam, evaluating=True)
    scores = _Scores(PerPrompt(type(trainer).__name__))
    try:
        with torch.no_grad(), devices.autocast(trainer.config.precision):
            for window in trainer.experience(stream):
                for micro in micro_batches.cut(window):
                    _score(trainer, micro, devices, scores)
    finally:
        trainer.seam = seam
        random.restore()
        trainer.load_state_dict(json.loads(remembered))
    averages = quotients(sum_pairs(distribution, scores.terms.totals()))
    if not averages:
        raise DataError("no held-out row has anything to score", place="eval_data", fix="use rows with response tokens")
    values = {"loss": sum(averages.values())}
    if len(averages) > 1:
        values |= {f"loss_{name}": value for name, value in averages.items()}
    values |= quotients(sum_pairs(distribution, scores.metrics.totals()))
    entries = merge_entries(distribution.gather(scores.per_prompt.entries))
    values |= {f"{name}_se": error for name, error in standard_errors(entries).items()}
    values |= trainer.summary(per_prompt_values(entries)) if entries else {}
    return {PREFIX + name: value for name, value in values.items()}


@dataclass
class _Scores:
    """What one process adds up over its held-out rows."""

    per_prompt: PerPrompt
    terms: Tally = field(default_factory=Tally)
    metrics: Tally = field(default_factory=Tally)


def _score(trainer: Trainer, micro: Batch, devices: DeviceManager, scores: _Scores) -> None:
    weights = trainer.weights(micro)
    if not any(weights.values()):
        return
    try:
        loss = trainer.loss(micro.to(devices.device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or micro.num_prompts == 1:
            raise
        loss = None
    if loss is None:
        devices.release()
        for half in halves(micro):
            _score(trainer, half, devices, scores)
        return
    scores.terms.add({name: (term, weights[name]) for name, term in loss.terms.items() if weights[name] > 0})
    scores.metrics.add(loss.metrics)
    scores.per_prompt.add(micro, loss.metrics)
