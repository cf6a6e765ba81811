"""The schema of a checkpoint's `state.json`, checked before any of its values is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rlhf_core.infra.seeds import RandomState

if TYPE_CHECKING:
    from rlhf_core.data.encoded_data import EncodedData

Metrics = dict[str, int | float | str | None]


def _is_number(text: str) -> str:
    float(text)
    return text


SavedFloat = Annotated[str, AfterValidator(_is_number)]
"""A float as text, since JSON has no name for one that isn't finite."""


def metrics_as_text(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with those that aren't finite as text (`nan`, `inf`), since JSON has no names for them."""
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def metrics_from_text(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `metrics_as_text`."""
    return {name: float(value) if isinstance(value, str) else value for name, value in metrics.items()}


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SavedProgress(_Schema):
    """What `RunProgress.to_json` returns."""

    step: int = Field(ge=1)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    skipped: int = Field(ge=0)
    alike: int = Field(0, ge=0)
    evaluated: int | None
    sampled: int | None
    metrics: Metrics
    eval_metrics: Metrics


class SavedStream(_Schema):
    """What `DataStream.state_dict` returns; the entries of `position` depend on the dataset."""

    model_config = ConfigDict(extra="allow", strict=True)

    epoch: int = Field(ge=0)
    position: list[Any]
    rows_in_epoch: int = Field(ge=0)
    rows: int = Field(ge=0)
    seed: int
    shuffle: bool
    fingerprint: str
    report: dict[str, Any] | None


class SavedRandom(_Schema):
    """What `RandomState.to_json` returns."""

    python: tuple[int, list[int], float | None] = Field(strict=False)
    numpy: tuple[str, list[int], int, int, float] = Field(strict=False)
    torch_cpu: str
    device: str | None


class SavedRank(_Schema):
    """The state of one process: random generators, the method, the stream, and metrics logged for the next step's row."""

    random: SavedRandom
    trainer: dict[str, Any]
    stream: SavedStream
    batches: int = Field(ge=0)
    logged: dict[str, Annotated[list[SavedFloat], Field(min_length=2, max_length=2)]]


class SavedMicroBatches(_Schema):
    """What `MicroBatches.state_dict` returns."""

    size: int | None = Field(ge=1)


class SavedLossScale(_Schema):
    """What `LossScale.state_dict` returns."""

    value: float = Field(gt=0)
    good: int = Field(ge=0)


class SavedBest(_Schema):
    """What `BestEvaluation.state_dict` returns."""

    metric: str | None = None
    mode: str | None = None
    best: float | None
    best_step: int = Field(ge=0)
    start: float | None
    best_metrics: dict[str, float | str]
    lost_step: int | None = Field(None, ge=1)
    lost_value: float | None = None


class SavedEarlyStopping(SavedBest):
    """What `EarlyStopping.state_dict` returns."""

    waited: int = Field(ge=0)


class SavedKLBudget(_Schema):
    """What `KLBudget.state_dict` returns."""

    mean: SavedFloat


class SavedPlan(_Schema):
    """What `run_plan` returns."""

    max_steps: int | None
    epochs: float
    windows_per_batch: int | None


class SavedState(_Schema):
    """The whole of `state.json`, as `RunState.save` writes it."""

    progress: SavedProgress
    total_steps: int | None
    plan: SavedPlan | None = None
    inside_rollout: bool
    eval_fingerprint: str | None
    micro_batches: SavedMicroBatches
    loss_scale: SavedLossScale
    early_stopping: SavedEarlyStopping | None
    keep_best: SavedBest | None = None
    kl_budget: SavedKLBudget
    optimizer: dict[str, int | float | bool]
    ranks: list[SavedRank] = Field(min_length=1)


def check_state(state: Any, dataset: EncodedData) -> None:
    """Refuse values of a `state.json` from which a run on these training data can't be restored.

    Raises:
        ValueError: says which value, and what is wrong with it.
    """
    try:
        saved = SavedState.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"state.json is malformed at `{place}`: {first['msg']}") from None
    now = RandomState.capture()
    try:
        for rank in state["ranks"]:
            RandomState.from_json(rank["random"]).restore()
    except Exception as error:
        raise ValueError(f"state.json is malformed at `ranks.random`: {error}") from None
    finally:
        now.restore()
    for rank in saved.ranks:
        _check_stream(rank.stream, dataset)


def _check_stream(stream: SavedStream, dataset: EncodedData) -> None:
    """Refuse a position that the dataset can't continue from; one of other data is refused later, when it is restored."""
    if stream.fingerprint != dataset.fingerprint:
        return
    if dataset.streaming:
        current = dataset.report.state_dict()
        wrong = [
            name for name, value in current.items() if not isinstance((stream.report or {}).get(name), type(value))
        ]
        if wrong:
            raise ValueError(f"state.json is malformed at `stream.report.{wrong[0]}`")
    try:
        walk = dataset.draw(stream.epoch, seed=stream.seed, shuffle=stream.shuffle, position=stream.position)
        next(iter(walk), None)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"state.json is malformed at `stream.position`: {error}") from None
