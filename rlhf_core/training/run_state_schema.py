"""The shape of a checkpoint's `state.json`, looked at before any of it is believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rlhf_core.infra.seeds import RandomState

if TYPE_CHECKING:
    from rlhf_core.training.loop import Run

Metrics = dict[str, int | float | str | None]


def _is_number(text: str) -> str:
    float(text)
    return text


SavedFloat = Annotated[str, AfterValidator(_is_number)]
"""A float as text, which JSON has no name for where it isn't finite."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SavedProgress(_Part):
    """See `Progress`."""

    step: int = Field(ge=1)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    skipped: int = Field(ge=0)
    evaluated: int | None
    metrics: Metrics
    eval_metrics: Metrics


class SavedStream(_Part):
    """See `DataStream.state_dict`; a position is the data's own."""

    model_config = ConfigDict(extra="allow", strict=True)

    epoch: int = Field(ge=0)
    position: list[Any]
    rows_in_epoch: int = Field(ge=0)
    rows: int = Field(ge=0)
    seed: int
    shuffle: bool
    fingerprint: str
    report: dict[str, Any] | None


class SavedRandom(_Part):
    """See `RandomState.to_json`."""

    python: tuple[int, list[int], float | None] = Field(strict=False)
    numpy: tuple[str, list[int], int, int, float] = Field(strict=False)
    torch_cpu: str
    device: str | None


class SavedRank(_Part):
    """What one process remembers."""

    random: SavedRandom
    trainer: dict[str, Any]
    stream: SavedStream
    batches: int = Field(ge=0)
    logged: dict[str, Annotated[list[SavedFloat], Field(min_length=2, max_length=2)]]


class SavedMicroBatches(_Part):
    size: int | None = Field(ge=1)


class SavedLossScale(_Part):
    value: float = Field(gt=0)
    good: int = Field(ge=0)


class SavedEarlyStopping(_Part):
    best: float | None
    best_step: int = Field(ge=0)
    waited: int = Field(ge=0)
    start: float | None
    best_metrics: dict[str, float | str]


class SavedState(_Part):
    """The whole of `state.json`."""

    progress: SavedProgress
    total_steps: int | None
    inside_rollout: bool
    eval_fingerprint: str | None
    micro_batches: SavedMicroBatches
    loss_scale: SavedLossScale
    early_stopping: SavedEarlyStopping | None
    optimizer: dict[str, int | float | bool]
    ranks: list[SavedRank] = Field(min_length=1)


def check_state(run: Run, state: Any) -> None:
    """Raise `ValueError` where a state isn't one that a run like this one saves."""
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
        _check_stream(run, rank.stream)


def _check_stream(run: Run, stream: SavedStream) -> None:
    if stream.fingerprint != run.dataset.fingerprint:
        return  # Of other data, which is refused as that.
    if run.dataset.streaming:
        current = run.dataset.report.state_dict()
        wrong = [
            name for name, value in current.items() if not isinstance((stream.report or {}).get(name), type(value))
        ]
        if wrong:
            raise ValueError(f"state.json is malformed at `stream.report.{wrong[0]}`")
    try:
        walk = run.dataset.walk(stream.epoch, seed=stream.seed, shuffle=stream.shuffle, position=stream.position)
        next(iter(walk), None)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"state.json is malformed at `stream.position`: {error}") from None
