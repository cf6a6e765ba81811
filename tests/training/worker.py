"""One process of a distributed test: trains the toy, and the first process writes what came out.

Started by torchrun: `worker.py JOB.json`; the job names the output, the options, and what to do under way.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from toy import ROWS, ToyTrainer, toy

from rlhf_core import registry
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss, Trainer
from rlhf_core.infra.errors import DataError, LostProcess, RLHFError
from rlhf_core.infra.safetensors_file import write_tensors
from rlhf_core.models import PolicyModel
from rlhf_core.registry.hooks import hookimpl
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


class Worker(ToyTrainer):
    """The toy without random columns, which each process would draw for its own rows."""

    job: dict[str, Any]

    def experience(self, stream: Any, run: Any) -> Any:
        for batch in stream:
            self.windows += 1
            noise = torch.tensor([1.0 + row / 100 for row in batch.rows])
            yield batch.attach(per_response={"noise": noise})

    def loss(self, batch: Batch) -> Loss:
        event = self.job.get("event") if dist.is_initialized() and dist.get_rank() == 1 else None
        if event == "sigterm" and self.windows == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if event == "killed" and self.windows == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "fault" and self.windows == 3:
            raise DataError("bad", place="rows.jsonl:7")
        if event == "stuck" and self.windows == 3:
            time.sleep(60)
        if event == "memory" and batch.num_prompts > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss = super().loss(batch)
        if event == "nan" and self.windows == 2:
            return Loss({**loss.terms, "nll": loss.terms["nll"] * float("nan")})
        return loss


class Listener:
    """Notes the steps that it is called for, under its process's number."""

    @hookimpl
    def step_ended(self, run: Any, step: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        with (run.output / f"heard.{rank}").open("a") as file:
            file.write(f"{step} ")


def trainer_of(job: dict[str, Any], output: Path) -> Trainer[Any]:
    """Return the toy, or a registered method on a tiny model and the embedded task."""
    if "method" not in job:
        return toy(output, kind=Worker, dropout=0.0, eval_rows=ROWS[:9], **job["options"])
    method = registry.get("trainer", job["method"])
    config = method.Config(**job["options"])
    rows = list(ArithmeticTask().rows(method.record_type(config), 24, split="train", seed=0))
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    return method(config, model=policy, data=rows, eval_data=rows[:7], output=output)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Worker.job = job
    output = Path(job["output"])
    noted: list[dict[str, torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *arguments: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        noted.append({f"{len(noted)}.{index}": p.grad.clone() for index, p in enumerate(parameters)})
        return step(self, *arguments)

    torch.optim.AdamW.step = noting  # type: ignore[method-assign]
    registry.register("hook", "listener", Listener)
    trainer = trainer_of(job, output)
    code = 0
    try:
        trainer.train(resume=job.get("resume", False))
    except RLHFError as error:
        code = error.exit_code
        (output / f"line.{dist.get_rank() if dist.is_initialized() else 0}").write_text(
            f"{error.silent} {error.line()}"
        )
    if code == LostProcess.exit_code:
        (output / f"code.{dist.get_rank()}").write_text(str(code))
        os._exit(code)
    rank = dist.get_rank() if dist.is_initialized() else 0
    weights = {name: p.detach() for name, p in trainer.models.named_parameters()} if hasattr(trainer, "models") else {}
    write_tensors(output / f"weights.{rank}.safetensors", weights)
    write_tensors(output / f"gradients.{rank}.safetensors", {name: g for step in noted for name, g in step.items()})
    (output / f"code.{rank}").write_text(str(code))


if __name__ == "__main__":
    main()
