"""Functions that a trainer is given: called at their events with the arguments that they name, and checked when it is made."""

from __future__ import annotations

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer

from rlhf_core.contracts.callbacks import CALLBACKS, Callbacks, taken_arguments
from rlhf_core.contracts.result import TrainResult
from rlhf_core.infra.errors import ConfigError
from rlhf_core.registry.hooks import EVENTS, Events, Hooks
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(4)]


def trainer(output: Path | None = None, **callbacks: Any) -> SFTTrainer:
    config = SFTConfig(max_steps=2, batch_size=2, eval_steps=2, checkpoint={"every": 1} if output else {})
    model = (tiny_model(), tiny_tokenizer())
    return SFTTrainer(config, model=model, data=ROWS, eval_data=ROWS, output=output, **callbacks)


def test_every_event_has_its_callback_with_the_same_arguments() -> None:
    assert [event.name for event in CALLBACKS.values()] == list(EVENTS) and list(CALLBACKS) == [
        *Callbacks.__annotations__
    ]
    for event in CALLBACKS.values():
        assert event.arguments == tuple(inspect.signature(getattr(Events, event.name)).parameters)[1:]


def test_functions_are_called_at_their_events(tmp_path: Path) -> None:
    seen: list[Any] = []

    def on_step(metrics: dict[str, float], step: int) -> None:
        seen.append(("step", step, metrics["loss"] > 0))

    class Listener:
        def evaluated(self, step: int, **others: Any) -> None:
            seen.append(("evaluated", step, sorted(others)))

    made = trainer(
        tmp_path / "run",
        on_start=lambda run: seen.append(("start", type(run).__name__)),
        on_step=on_step,
        on_evaluate=Listener().evaluated,
        on_checkpoint=functools.partial(lambda name, path: seen.append((name, path.name)), "saved"),
        on_end=lambda result: seen.append(result),
    )
    result = made.train()
    steps = [
        ("step", 1, True),
        ("saved", "step-1"),
        ("evaluated", 2, ["metrics", "run"]),
        ("step", 2, True),
        ("saved", "step-2"),
    ]
    assert seen[0] == ("start", "SFTTrainer") and seen[2:-1] == steps
    assert seen[1][:2] == ("evaluated", 0) and seen[-1] is result and isinstance(result, TrainResult)


def test_what_a_callback_raises_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    failures = []

    def fails(step: int) -> None:
        raise KeyError(f"step {step}")

    with pytest.raises(KeyError, match="step 1") as raised:
        trainer(on_step=fails, on_failure=lambda error: failures.append(error)).train()
    assert failures == [raised.value] and raised.value.__notes__ == ["raised by the function given as `on_step`"]
    with pytest.raises(KeyError, match="step 1"), caplog.at_level(logging.WARNING):
        trainer(on_step=fails, on_failure=lambda run: run.nothing).train()
    assert "the function given as `on_failure` raised AttributeError" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_eval": print}, "unknown argument `on_eval`; fix: did you mean `on_evaluate`?"),
        ({"modle": "path"}, "unknown argument `modle`; fix: did you mean `model`?"),
        ({"on_step": 3}, "`on_step` must be a function; got int"),
        ({"on_step": lambda loss: loss}, "needs an argument `loss`; fix: name any of these: run, step, metrics"),
        ({"on_end": lambda result, /: result}, "on_end: its function needs an argument `result`"),
    ],
)  # fmt: skip
def test_what_can_not_be_called_is_refused_when_the_trainer_is_made(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        trainer(**given)
    assert message in str(raised.value)


def test_a_function_gets_what_it_names() -> None:
    assert taken_arguments("on_step", lambda step, other=1: None) == ("step",)
    assert taken_arguments("on_step", lambda **all: None) == ("run", "step", "metrics")
    assert taken_arguments("on_end", lambda: None) == ()
    hooks = Hooks()
    hooks.add_callbacks({"on_step": None})  # as an option that was left unset
    hooks.emit("step_ended", run=None, step=1, metrics={})
