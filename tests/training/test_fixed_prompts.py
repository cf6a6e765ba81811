"""What a run's model says: completions of fixed prompts, with the same random numbers at each step, unseen by training."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rlhf_plugins.trainers.dpo import DPOTrainer
from rlhf_plugins.trainers.reward_model import RewardModelTrainer
from rlhf_plugins.trainers.sft import SFTTrainer
from toy import toy

from rlhf_core import registry
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, RLHFError, Stopped, StorageError
from rlhf_core.infra.seeds import RandomState
from rlhf_core.models import PolicyModel
from rlhf_core.registry.hooks import hookimpl
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, require_same_run
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training.sample_log import read_samples
from rlhf_core.training.tracked_samples import LOG_SAMPLES

PAIRS = [{"prompt": f"{i} + {i} = ", "chosen": str(2 * i), "rejected": str(2 * i + 1) * 2} for i in range(16)]
ANSWERED = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}
    for row in ANSWERED
]
OPTIONS: dict[str, Any] = {
    "batch_size": 4, "max_steps": 6, "max_length": 64, "learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_schedule": "constant",
    "dataset": {"wrap": "none"},
}  # fmt: skip
SAMPLES: dict[str, Any] = {"prompts": ["1 + 1 = ", "Hello"], "generation": {"max_new_tokens": 6}}


@functools.cache
def _model() -> PolicyModel:
    return PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())


def trainer(
    output: Path | None,
    samples: dict[str, Any] | None = None,
    *,
    kind: type[Trainer[Any]] = SFTTrainer,
    data: Any = None,
    held_out: bool = False,
    model: Any = None,
    trackers: Any = (),
    **options: Any,
) -> Any:
    rows = data or (ANSWERED if kind.record == "sft" else PAIRS)
    logging = {"progress": False, "samples": samples or {}, "trackers": list(trackers)}
    config = kind.Config.parse({**OPTIONS, "logging": logging, **options})
    policy = copy.deepcopy(_model()) if model is None else model
    return kind(config, model=policy, data=rows, eval_data=rows[:4] if held_out else None, output=output)


def samples_of(output: Path) -> list[dict[str, Any]]:
    rows, damaged = read_samples(output / "samples.jsonl")
    assert damaged == []
    return rows


def steps_of(output: Path) -> list[int]:
    return list(dict.fromkeys(row["step"] for row in samples_of(output)))


# When, and what


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 6]),
        ({"held_out": True}, [0, 6]),
        ({"held_out": True, "eval_steps": 2}, [0, 2, 4, 6]),
        ({"samples": {**SAMPLES, "every": 4}}, [0, 4, 6]),
        ({"samples": {**SAMPLES, "every": 4}, "held_out": True, "eval_steps": 3}, [0, 4, 6]),
        ({"max_steps": None, "epochs": 1.25, "samples": {**SAMPLES, "every": 2}}, [0, 2, 4, 5]),
    ],
)
def test_prompts_are_completed_at_the_start_at_evaluations_or_every_so_many_steps_and_at_the_end(
    tmp_path: Path, options: dict[str, Any], steps: list[int]
) -> None:
    trainer(tmp_path / "run", options.pop("samples", SAMPLES), **options).train()
    assert steps_of(tmp_path / "run") == steps


def test_a_row_says_what_was_asked_and_answered(tmp_path: Path) -> None:
    """Before the first step the completions are those of the model as it was given, with the seeds of every later step."""
    run = trainer(tmp_path / "run", {**SAMPLES, "n": 2})
    run.train()
    rows = samples_of(tmp_path / "run")
    assert [(row["step"], row["row"], row["sample"]) for row in rows] == [
        (step, number, sample) for step in (0, 6) for number in (0, 1) for sample in (0, 1)
    ]
    assert {row["kind"] for row in rows} == {"prompt"} and rows[0]["prompt"] == "1 + 1 = "
    assert rows[0]["stop_reason"] in ("end", "length") and 1 <= rows[0]["tokens"] <= 6
    assert rows[0]["completion"] != rows[1]["completion"]
    # The weights alone differ: trained ones give the texts of the last step from its seeds.
    again = trainer(tmp_path / "again", {**SAMPLES, "n": 2}, model=run.policy, max_steps=1, learning_rate=1e-30)
    again.train()
    texts = [row["completion"] for row in samples_of(tmp_path / "again")]
    assert texts == [row["completion"] for row in rows[4:]] * 2


def test_a_text_is_the_users_turn_where_the_rows_are_chats(tmp_path: Path) -> None:
    trainer(tmp_path / "run", SAMPLES, data=CHATS, dataset={}).train()
    assert samples_of(tmp_path / "run")[0]["prompt"] == [{"role": "user", "content": "1 + 1 = "}]
    trainer(tmp_path / "text", SAMPLES, data=CHATS).train()  # `wrap: none` says that a text is a text
    assert samples_of(tmp_path / "text")[0]["prompt"] == "1 + 1 = "


def test_prompts_come_from_files_too(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, CHATS)))
    samples = {**SAMPLES, "prompts": ["Hello", path, [{"role": "user", "content": "Hi"}]], "limit": 2}
    trainer(tmp_path / "run", samples).train()
    prompts = [row["prompt"] for row in samples_of(tmp_path / "run")]
    asked = [[CHATS[number]["messages"][0]] for number in (0, 1)]
    assert prompts == ["Hello", *asked, [{"role": "user", "content": "Hi"}]] * 2


# Training doesn't notice


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer])
@pytest.mark.parametrize(
    "options",
    [
        {"held_out": True, "eval_steps": 2},
        {"lora": {"rank": 2, "dropout": 0.5}, "dropout": "keep"},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
        {"precision": "bf16"},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=["evaluated", "lora", "checkpointing", "bf16", "compiled"],
)
def test_training_is_the_same_bit_by_bit(tmp_path: Path, kind: type[Trainer[Any]], options: dict[str, Any]) -> None:
    samples = {**SAMPLES, **({} if "eval_steps" in options else {"every": 2})}
    trainer(tmp_path / "with", samples, kind=kind, **options).train()
    trainer(tmp_path / "without", kind=kind, **options).train()
    assert steps_of(tmp_path / "with") == [0, 2, 4, 6] and not (tmp_path / "without/samples.jsonl").exists()
    require_same_run(tmp_path / "with", tmp_path / "without", "completing prompts")


def test_modes_and_random_states_are_as_before(tmp_path: Path) -> None:
    seen: list[tuple[list[bool], dict[str, Any]]] = []

    class Watched(SFTTrainer):
        api, record = 1, "sft"

        def loss(self, batch: Any) -> Any:
            modes = [module.training for module in self.models.modules()]
            seen.append((modes, RandomState.capture().to_json()))
            return super().loss(batch)

    for samples in ({**SAMPLES, "every": 1}, None):
        trainer(tmp_path / str(bool(samples)), samples, kind=Watched, lora={"rank": 2, "dropout": 0.5}).train()
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and any(any(modes) for modes, _ in seen)


# Resuming


def test_a_resumed_run_writes_nothing_twice_and_leaves_nothing_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": interruptible(SFTTrainer), "checkpoint": {"every": 3}}
    samples = {**SAMPLES, "every": 2}
    trainer(tmp_path / "whole", samples, **options).train()
    broken = trainer(tmp_path / "broken", samples, **options)
    broken.stop_after = 5
    with pytest.raises(StoppedEarly):
        broken.train()
    assert steps_of(tmp_path / "broken") == [0, 2, 4]  # the checkpoint is of step 3
    with (tmp_path / "broken/samples.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')  # a kill in the middle of a line
    trainer(tmp_path / "broken", samples, **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")
    assert (tmp_path / "broken/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()
    trainer(tmp_path / "broken", samples, **options).train(resume=True)  # of a run that is done
    assert (tmp_path / "broken/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()


def test_prompts_may_be_added_and_changed_where_a_run_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": interruptible(SFTTrainer), "checkpoint": {"every": 3}}
    trainer(tmp_path / "whole", **options).train()
    broken = trainer(tmp_path / "broken", **options)
    broken.stop_after = 4
    with pytest.raises(StoppedEarly):
        broken.train()
    trainer(tmp_path / "broken", {**SAMPLES, "every": 2}, **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")
    assert steps_of(tmp_path / "broken") == [3, 4, 6]  # as soon as it resumes: none had been written


def test_a_stop_while_prompts_are_completed_saves_the_step_and_they_are_completed_on_the_resume(
    tmp_path: Path,
) -> None:
    samples = {**SAMPLES, "every": 2}
    trainer(tmp_path / "whole", samples).train()
    run = trainer(tmp_path / "run", samples)

    def stop(module: Any, args: Any) -> None:
        metrics = tmp_path / "run/metrics.jsonl"
        if not torch.is_grad_enabled() and metrics.exists() and len(metrics.read_text().splitlines()) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    run.model.network.get_input_embeddings().register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        run.train()
    assert steps_of(tmp_path / "run") == [0, 2]
    assert json.loads((tmp_path / "run/status.json").read_text())["step"] == 4
    trainer(tmp_path / "run", samples).train(resume=True)
    require_same_run(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()


def test_what_cannot_be_written_ends_the_run_with_its_state_saved(tmp_path: Path) -> None:
    class Blocker:
        @hookimpl
        def step_ended(self, run, step, metrics):
            if step == 4:
                (run.output / "samples.jsonl").unlink()
                (run.output / "samples.jsonl").mkdir()

    registry.register("hook", "blocker", Blocker())
    with pytest.raises(StorageError, match=r"samples\.jsonl"):
        trainer(tmp_path / "run", {**SAMPLES, "every": 2}).train()
    assert (tmp_path / "run/checkpoints/step-4").is_dir()
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 7


# What is refused, before anything is trained


@pytest.mark.parametrize(
    ("make", "kind", "problem"),
    [
        (lambda out: trainer(out, SAMPLES, kind=RewardModelTrainer), ConfigError, "RewardModelTrainer has no policy"),
        (
            lambda out: toy(out, logging={"samples": SAMPLES}),
            ConfigError,
            "policy can't complete prompts; got ToyPolicy",
        ),
        (
            lambda out: trainer(None, SAMPLES),
            ConfigError,
            "there is nowhere to keep the completions; fix: set `output`",
        ),
        (lambda out: trainer(out, {"prompts": ["a", " "]}), DataError, r"samples\.prompts\[1\]: the prompt is empty"),
        (lambda out: trainer(out, {"prompts": "none.jsonl"}), DataError, r"none\.jsonl: no such file"),
        (lambda out: trainer(out, {"prompts": ["a" * 2048]}), DataError, r"prompts\[0\].*got 2049 tokens for 2048 pos"),
        (
            lambda out: trainer(
                out,
                {"prompts": [[{"role": "user", "content": "Hi"}]]},
                model=PolicyModel(tiny_model(hidden=32, heads=2), tiny_tokenizer(chat_template=False)),
            ),
            ModelError,
            "chat template",
        ),
    ],
    ids=["no policy", "other policy", "no output", "empty", "no file", "too long", "no template"],
)
def test_what_cannot_work_is_refused(tmp_path: Path, make: Any, kind: type[RLHFError], problem: str) -> None:
    with pytest.raises(kind, match=problem):
        make(tmp_path / "run").train()
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        ({"every": 2}, "`every` needs `prompts`"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"prompts": "a", "generation": {"top_p": 0}}, "logging.samples.generation.top_p"),
        ({"prompts": "a", "temperature": 0}, "unknown option `logging.samples.temperature`"),
        (4, "expected a group of options"),
    ],
)
def test_options_that_mean_nothing_are_refused(samples: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SFTTrainer.Config.parse({"logging": {"samples": samples}})
    assert problem in str(caught.value)


# Trackers


def test_tensorboard_has_a_text_per_prompt(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path / "run", SAMPLES, trackers=["tensorboard"]).train()
    found: dict[str, list[Any]] = {}
    for folder in {path.parent for path in (tmp_path / "run/trackers").rglob("events.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        found |= {tag: events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("samples/")}
    assert [[one.step for one in found[f"samples/prompt {number}/text_summary"]] for number in (0, 1)] == [[0, 6]] * 2
    text = found["samples/prompt 1/text_summary"][0].tensor_proto.string_val[0].decode()
    assert "Hello" in text and "completion" in text


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_have_a_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages aren't needed for the tests: what they are called with is compared with their documentation's signatures."""
    seen: dict[str, Any] = {}

    class Tracker:
        def log_table(self, name: str, columns: list[str], data: list[list[Any]], step: int) -> None:
            seen.update(name=name, columns=columns, data=data, step=step)

        def log(self, values: dict[str, Any], step: int) -> None:
            ((name, frame),) = values.items()
            seen.update(name=name, columns=list(frame.columns), data=frame.values.tolist(), step=step)

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Table=lambda dataframe: dataframe))
    scored = {"step": 4, "kind": "rollout", "row": 7, "sample": 0, "completion": "4", "stop_reason": "end", "tokens": 2}
    scored |= {
        "prompt": [{"role": "user", "content": "2 + 2"}],
        "reward": 1.5,
        "rewards": {"exact": 1.0, "format": 0.5},
    }
    LOG_SAMPLES[name](Tracker(), "samples/rollout", [scored], 5)
    assert seen == {
        "name": "samples/rollout",
        "columns": [
            "step",
            "row",
            "prompt",
            "completion",
            "stop_reason",
            "tokens",
            "reward",
            "reward/exact",
            "reward/format",
        ],
        "data": [[4, 7, "user: 2 + 2", "4", "end", 2, 1.5, 1.0, 0.5]],
        "step": 5,
    }


def test_a_tracker_that_fails_costs_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setitem(LOG_SAMPLES, "tensorboard", fail)
    trainer(tmp_path / "run", SAMPLES, trackers=["tensorboard"]).train()
    assert steps_of(tmp_path / "run") == [0, 6]
    assert sum("a tracker failed" in record.message for record in caplog.records) == 1
