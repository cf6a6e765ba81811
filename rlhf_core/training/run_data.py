"""The data of a run: the rows to train on, those held out, and the stream that deals the first out in optimiser steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data import DataStream, open_dataset
from rlhf_core.data.encoded_data import EncodedData
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.mixture import mixture_text
from rlhf_core.data.open_source import data_entries, has_splits
from rlhf_core.data.text_options import save_text_options
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models.loading import read_outline
from rlhf_core.models.sequence_model import SequenceModel
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.loader import with_length
from rlhf_core.training.roles import reference_of

log = logging.getLogger(__name__)


def open_data(trainer: Trainer[Any], tokenizer: Any) -> tuple[EncodedData, EncodedData | None]:
    """Return the training data and the held-out data (None without `eval_data`), encoded by the tokenizer.

    Raises:
        ConfigError: the held-out rows are the split that is trained on.
    """
    held_out = _eval_config(trainer) if trainer.eval_data is not None else None
    record = trainer.record_type(trainer.config)
    dataset = open_dataset(trainer.data, record, tokenizer, config=trainer.config)
    if held_out is None:
        return dataset, None
    told = dataset.encoder.plain or dataset.encoder.wrapped
    return dataset, open_dataset(trainer.eval_data, record, tokenizer, config=held_out, told=told, held_out=True)


@dataclass(frozen=True)
class EarlyData:
    """The data of a run, opened with the tokenizer in the model's files before the model was loaded."""

    dataset: EncodedData
    held_out: EncodedData | None

    def serves(self, tokenizer: Any, max_length: int) -> bool:
        """Tell whether the rows are what a loaded model's tokenizer would make of them; from then on that one encodes them."""
        opened = [self.dataset] if self.held_out is None else [self.dataset, self.held_out]
        encoders = [one.encoder.for_tokenizer(tokenizer, one.options) for one in opened]
        if any(encoder is None or encoder.max_length != max_length for encoder in encoders):
            return False
        for one, encoder in zip(opened, encoders, strict=True):
            one.encoder = cast(Encoder, encoder)
        return True


def open_data_early(trainer: Trainer[Any]) -> EarlyData | None:
    """Open the data before the model is loaded, so that a mistake in them doesn't wait for it.

    Returns:
        None for a model in memory, and for files that only the method's own kind of model can read.

    Raises:
        RLHFError: as `open_data`; or there is no such model.
    """
    if not isinstance(trainer.model, str | Path):
        return None
    config = trainer.config
    try:
        outline = read_outline(trainer.model, trust_remote_code=config.trust_remote_code, new_tokens=config.new_tokens)
    except ModelError:
        if Path(trainer.model).expanduser().exists():
            return None
        raise
    try:
        trainer.config = with_length(config, outline.max_positions)
        return EarlyData(*open_data(trainer, outline.tokenizer))
    finally:
        trainer.config = config


def mixture_of(dataset: EncodedData) -> str | None:
    """Return what share of a step's rows each entry of `data` has, as text; None where there is one alone, or it isn't known."""
    source, counted = dataset.source, dataset.report.entries if dataset.num_rows is not None else {}
    names = [part.entry.name for part in source.parts if part.entry is not None]
    if len(names) < 2:
        return None
    return mixture_text(names, [counted[name]["kept"] if name in counted else None for name in names], source.groups)


def keep_encoding(trainer: Trainer, dataset: EncodedData) -> None:
    """Keep with every trained model how its texts became tokens: the chat template, `wrap`, special tokens, what ends a turn.

    It is exported with the model, so rewards, generation, the next stage and other tools encode a prompt as training did.
    """
    for role, model in trainer.models.items():
        for module in model.modules() if trainer.roles[role].trained else ():
            if isinstance(module, SequenceModel):
                save_text_options(module.tokenizer, trainer.config.dataset)
                if dataset.encoder.chats:
                    module.add_stops(dataset.encoder.template.stops)


def _eval_config(trainer: Trainer) -> TrainerConfig:
    """Return the configuration to read `eval_data` with; where they have named splits, its split is `dataset.eval_split`."""
    config, options = trainer.config, trainer.config.dataset
    for entry in data_entries(trainer.eval_data) or []:
        for name, value in (("weight", entry.weight), ("share", entry.share)):
            if value not in (1, None):
                raise ConfigError(
                    f"held-out rows have no {name}: each is scored once",
                    place="eval_data",
                    got=f"{entry.path}: {value}",
                    fix="leave it out",
                )
    trained, held_out = _paths_and_names(trainer.data), _paths_and_names(trainer.eval_data)
    same = sorted(path for path, _ in trained & held_out)
    if not has_splits(trainer.eval_data):
        if same or trainer.eval_data is trainer.data:
            log.warning(
                "eval_data: %s is trained on too, so its scores don't measure unseen rows",
                same[0] if same else "it",
            )
        return config
    if (same or trainer.eval_data is trainer.data) and options.split == options.eval_split:
        raise ConfigError(
            "the held-out rows are those that are trained on",
            place="dataset.eval_split",
            got=f"split `{options.split}` of {same[0] if same else 'one dataset'} for both",
            fix="set another `dataset.eval_split`, or give other `eval_data`",
        )
    return config.model_copy(update={"dataset": options.model_copy(update={"split": options.eval_split})})


def _paths_and_names(data: Any) -> set[tuple[str, str | None]]:
    """Return the paths, made absolute, and the hub names among some data, each with the split that its entry names."""
    named = [(Path(entry.path).expanduser(), entry.split) for entry in data_entries(data) or []]
    return {(str(path.resolve() if path.exists() else path), split) for path, split in named}


def open_stream(
    trainer: Trainer[Any], dataset: EncodedData, *, distribution: Distribution, saved: Mapping[str, Any] | None
) -> tuple[DataStream, int | None]:
    """Return the stream of training batches, at its beginning, and the number of optimiser steps where it is known.

    Args:
        saved: the state (`state.json`) of the checkpoint that the run resumes from, or None.
    """
    config = trainer.config
    epochs = None if config.max_steps is not None else config.epochs
    if dataset.streaming and epochs is not None:
        _restore_row_count(trainer, dataset, distribution, saved)
    stream = DataStream(
        dataset,
        batch_size=config.batch_size,
        epochs=epochs,
        seed=config.seed,
        shuffle=config.dataset.shuffle,
        rank=distribution.rank,
        world_size=distribution.world_size,
    )
    if saved is None:
        _warn_of_few_rows(stream)
    if saved is not None and len(saved["ranks"]) == distribution.world_size and _as_planned(trainer, saved):
        return stream, saved["total_steps"]
    windows = trainer.windows_per_batch()
    steps = config.max_steps
    if steps is None and stream.steps is not None and windows is not None:
        made, taken = (0, 0) if saved is None else _made_and_taken(saved, config.batch_size)
        steps = made + (stream.steps - taken) * windows
    return stream, steps


def _warn_of_few_rows(stream: DataStream) -> None:
    """Warn where no step can have as many different rows as `batch_size` asks for."""
    rows, asked = stream.dataset.num_rows, stream.batch_size
    if rows is None or not 0 < rows < asked:
        return
    have = f"batch_size: {asked} rows per step, and there {'is' if rows == 1 else 'are'} {rows}"
    if stream.epochs is None or stream.epochs * rows >= asked:
        log.warning(
            "%s: each step takes every row about %.3g times; `batch_size: %d` takes it once", have, asked / rows, rows
        )
    else:
        log.warning(
            "%s: the only step takes all of them; a smaller `batch_size`, or more `epochs`, makes more steps", have
        )


def run_plan(trainer: Trainer[Any]) -> dict[str, Any]:
    """Return what a run's length follows from, as JSON values; kept in checkpoints, so that a resume notices another plan."""
    config = trainer.config
    return {"max_steps": config.max_steps, "epochs": config.epochs, "windows_per_batch": trainer.windows_per_batch()}


def _as_planned(trainer: Trainer[Any], saved: Mapping[str, Any]) -> bool:
    """Return whether the run was planned as it is now when a checkpoint was saved; one without a plan is taken as such."""
    plan = saved.get("plan")
    return plan is None or plan == run_plan(trainer)


def _made_and_taken(saved: Mapping[str, Any], batch_size: int) -> tuple[int, int]:
    """Return how many windows were made and batches of data taken before a checkpoint."""
    progress = saved["progress"]
    return progress["step"] + progress["skipped"], -(-saved["ranks"][0]["stream"]["rows"] // batch_size)


def fits_plan(trainer: Trainer[Any], saved: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is a point that the run, as it is planned now, passes through.

    The end of a shorter run isn't always one: it may be inside a rollout, or after a last batch of the rows that were left, which
    a longer run fills up with those of the next epoch.
    """
    if _as_planned(trainer, saved):
        return True
    rows = saved["ranks"][0]["stream"]["rows"]
    return not saved["inside_rollout"] and rows % trainer.config.batch_size == 0


def _restore_row_count(
    trainer: Trainer, dataset: EncodedData, distribution: Distribution, saved: Mapping[str, Any] | None
) -> None:
    """Count a streaming dataset's rows again where the run that is resumed had counted them, by precomputing its reference."""
    if saved is not None:
        dataset.report.load_state_dict(saved["ranks"][0]["stream"]["report"])
    elif dataset.num_rows is None and (kept := reference_of(trainer)) and kept.mode == "precompute":
        for _ in one_pass(trainer, dataset, distribution):
            pass


def one_pass(
    trainer: Trainer, dataset: EncodedData, distribution: Distribution, *, shuffle: bool = False, held_out: bool = False
) -> DataStream:
    """Return this process's batches of one pass over a dataset, in which every row comes once.

    Args:
        shuffle: False keeps the data's order; True takes that of a run's first epoch.
        held_out: whether rows are only scored: there may then be fewer of them than processes.
    """
    config = trainer.config
    return DataStream(
        dataset,
        batch_size=config.batch_size,
        epochs=1.0,
        seed=config.seed,
        shuffle=shuffle,
        rank=distribution.rank,
        world_size=distribution.world_size,
        held_out=held_out,
        once=True,
    )
