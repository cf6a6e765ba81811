"""Fixtures of the tests of the online method: a tiny model, rows, and a run on them.

Also a script for runs in other processes: `online.py JOB.json`, one run; `online.py kills JOB.json`, a run that is killed again
and again, in forked children, so that only one process imports.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from online_rewards import Ends
from policy_gradient import PolicyGradientTrainer

from rlhf_core import registry
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Trainer, Window
from rlhf_core.infra.errors import RLHFError
from rlhf_core.infra.safetensors_file import write_tensors
from rlhf_core.models import PolicyModel
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training.context import RunContext
from rlhf_core.training.phases import Phases

OPTIONS: dict[str, Any] = {
    "batch_size": 8, "max_length": 64, "learning_rate": 3e-3, "lr_schedule": "constant", "warmup_ratio": 0.0, "max_steps": 8,
    "generation": {"max_new_tokens": 8}, "rollout_epochs": 2, "minibatches": 2, "logging": {"progress": False},
    "dataset": {"wrap": "none"},
    "rewards": ["online_rewards:digits", {"name": "ends", "weight": 0.5, "options": {"worth": 0.2}}],
}  # fmt: skip
"""A function and a reward by name; four windows per rollout."""
KL: dict[str, Any] = {"kl_weight": 0.05, "kl_target": 0.02, "scale": "step"}
"""A reference, and a weight of the KL that adapts and belongs in `state_dict`."""
DYNAMIC: dict[str, Any] = {"dynamic_sampling": True, "rewards": ["online_rewards:rare"]}
"""Rewards for which many groups have equal rewards throughout."""


@functools.cache
def rows(split: Any = "train", count: int = 40) -> list[dict[str, Any]]:
    return list(ArithmeticTask(digits=1).rows("prompt", count, split=split, seed=0))


@functools.cache
def _model() -> PolicyModel:
    return PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())


def model() -> PolicyModel:
    return copy.deepcopy(_model())


class Watched(PolicyGradientTrainer):
    """The method, which records its windows in `made`; it may raise `Broken`, or kill its process, before one of them."""

    # The header is read from the class's own source.
    api = 1
    record = "prompt"
    fail_at: int | None = None
    how: str = "raise"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterator[Window]:
        self.made: list[tuple[int, Window]] = []
        for window in super().experience(stream, run):
            if len(self.made) == self.fail_at:
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise Broken
            self.made.append((run.step, window))
            yield window


class Apart(Watched):
    """Dynamic sampling without `gather`: each process takes batches until it has three groups itself, which is a fault."""

    api = 1
    record = "prompt"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterator[Window]:
        self.made = []
        held: list[Batch] = []
        for batch in stream:
            rollout = self.rollout(batch, run)
            held.append(rollout.select(rollout["differs"].nonzero()[:, 0]))
            if sum(part.num_prompts for part in held) >= 3:
                for window in self.windows(Batch.cat(held), run):
                    if len(self.made) == self.fail_at:
                        raise Broken
                    self.made.append((run.step, window))
                    yield window
                held = []


class Broken(Exception):
    """Raised by a trainer of these tests before the window `fail_at`."""


def trainer(
    output: Path | str | None = None,
    *,
    kind: type[Trainer[Any]] = Watched,
    policy: PolicyModel | None = None,
    data: Any = None,
    held_out: int = 0,
    objects: Any = None,
    **options: Any,
) -> Any:
    """Return a trainer on a copy of the tiny model, or on `policy`.

    Args:
        objects: rewards instead of those named in OPTIONS.
        options: override OPTIONS.
    """
    registry.register("reward", "ends", Ends)
    own = {} if objects is None else {"rewards": []}
    config = kind.Config.parse({**OPTIONS, **own, **options})
    return kind(
        config,
        model=policy or model(),
        data=rows() if data is None else data,
        eval_data=rows("test", held_out) if held_out else None,
        output=output,
        rewards=objects,
    )


def kill_in_phase(number: int, delay: float) -> None:
    """Let this process be killed so many seconds after it has entered a phase of a step for the `number`-th time."""
    enter, entered = Phases.phase, itertools.count(1)

    def phase(self: Phases, name: str, tokens: int = 0) -> Any:
        if next(entered) == number:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return enter(self, name, tokens)

    Phases.phase = phase  # type: ignore[method-assign]


def forked(action: Callable[[], object]) -> int:
    """Do an action in a child; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_resumed(job: dict[str, Any]) -> None:
    """Train a job's method, or `Watched`, once to its end, and once more with a kill at each of the job's moments and resumes."""
    folder = Path(job["folder"])

    def train(name: str, moment: tuple[int, float] | None = None) -> None:
        if moment is not None:
            kill_in_phase(*moment)
        kind = registry.get("trainer", job["method"]) if job["method"] else Watched
        trainer(folder / name, kind=kind, **job["options"]).train(resume=name == "killed")

    assert forked(lambda: train("whole")) == 0
    for moment in job["moments"]:
        code = forked(lambda moment=moment: train("killed", moment))  # type: ignore[misc]
        assert code == -signal.SIGKILL, f"{code} in place of a kill at {moment}"
    assert forked(lambda: train("killed")) == 0


def main() -> None:
    """Train as a job says; the first process writes the weights."""
    if sys.argv[1] == "kills":
        killed_and_resumed(json.loads(Path(sys.argv[2]).read_text()))
        return
    job = json.loads(Path(sys.argv[1]).read_text())
    output = Path(job["output"])
    kind = Apart if job.get("apart") else Watched
    run = trainer(output, kind=kind, held_out=job.get("held_out", 0), **job["options"])
    run.fail_at, run.how = job.get("fail_at"), job.get("how", "raise")
    code = 0
    try:
        run.train(resume=job.get("resume", False))
    except RLHFError as error:
        print(error.line(), file=sys.stderr)
        code = error.exit_code
    rank = int(os.environ.get("RANK", "0"))
    report = {"code": code, "rows": [list(w.batch.rows) for _, w in run.made]}
    (output / f"report.{rank}.json").write_text(json.dumps(report))
    if rank == 0:
        weights = {name: p.detach() for name, p in run.models.named_parameters()}
        write_tensors(output / "weights.safetensors", weights)
    # gloo's threads may abort a process that has done all its work.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
