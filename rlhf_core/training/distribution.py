"""The seam between the loop and the processes that train together: one process, or several with a share of the rows each.

Each process accumulates its gradients alone; they are added up over the processes once per step, in buckets whose layout never
changes. torch's `DistributedDataParallel` is not used: it rebuilds its buckets after the first step, so with three or more
processes the order of additions, and with it the last bits of a gradient, differs between a run and its resume (measured:
147,000 of 540,000 elements on 3 processes); and a process that runs out of memory inside its reducer leaves the others waiting.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_core.config.training import DistributedConfig
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import (
    ConfigError,
    LostProcess,
    ModelError,
    PluginError,
    RLHFError,
    error_report,
    reported_error,
)

_CONNECTION_LOST = re.compile(
    r"gloo|nccl|closed by peer|connection (reset|refused)|broken pipe|timed? ?out waiting|socket|TCPStore|DistNetwork",
    re.IGNORECASE,
)
"""Matches the messages of gloo, NCCL and torch's store when another process has ended or doesn't answer."""

BUCKET_BYTES = 64 * 2**20
"""About how many bytes of gradients are added up over the processes at once."""

Result = TypeVar("Result")


class Distribution:
    """What the loop asks of the processes of a run; this class is for one process, `DataParallel` for several.

    Where there are several, every process must make the same calls in the same order.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value added up over the processes, in float64."""
        return list(values)

    def flags(self, *values: bool) -> list[bool]:
        """Return for each flag whether it is set on at least one process."""
        return [total > 0 for total in self.sum([float(value) for value in values])]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one process."""
        return self.flags(flag)[0]

    def all(self, flag: bool) -> bool:
        """Return whether the flag is set on every process."""
        return not self.any(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value (a JSON value), in order of rank."""
        return [json.loads(json.dumps(value))]

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Return every process's tensor, in order of rank, on this one's device; the sizes of their first axes may differ.

        Raises:
            PluginError: dtypes or other axes differ; raised on every process.
        """
        return [tensor]

    @staticmethod
    def agreed_shapes(found: Sequence[tuple[str, Sequence[int]]]) -> list[Sequence[int]]:
        """Return the shapes of all processes' tensors, refused unless they differ in their first axis alone.

        Args:
            found: each process's `dtype_and_shape`.
        """
        if len({(kind, len(shape), *shape[1:]) for kind, shape in found}) > 1:
            raise PluginError(
                "processes gather tensors of different types or shapes",
                place="run.gather",
                got=", ".join(f"{kind} {tuple(shape)}" for kind, shape in found),
                fix="make tensors of one type and shape (but for the first axis), also without rows: `values.new_zeros(0)`",
            )
        return [shape for _, shape in found]

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on all."""
        return self.gather(value)[0]

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Call `action` on the first process and return its result, a JSON value, on all; what it raises is raised on all.

        An exception that is no `RLHFError` is raised on the other processes as one, with its type and text, so that none waits
        for ever.
        """
        outcome: dict[str, Any] = {}
        fault: Exception | None = None
        if self.is_main:
            try:
                outcome["value"] = action()
            except Exception as error:
                fault = error
                outcome["error"] = error_report(error)
        if self.world_size > 1:
            outcome = self.broadcast(outcome)
        if fault is not None:
            raise fault
        if "error" in outcome:
            known = reported_error(outcome["error"])
            known = known if isinstance(known, RLHFError) else RLHFError(outcome["error"]["text"])
            known.silent = True
            raise known
        return outcome["value"]

    def lost(self, error: BaseException) -> LostProcess | None:
        """Return the fault to report where an exception means that another process has ended or doesn't answer; else None."""
        return None

    def barrier(self) -> None:
        """Wait until every process is here."""

    def same_parameters(self, module: nn.Module) -> None:
        """Copy the first process's parameters and buffers to all."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients over the processes, in place. A parameter without a gradient on any process keeps none."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the total 2-norm of gradients, a scalar on their device; they are summed over the processes already."""
        return torch.nn.utils.get_total_norm(gradients)

    def clip(self, gradients: list[Tensor], norm: float, max_norm: float | None) -> None:
        """Scale gradients of a total norm of `norm` down to `max_norm` where that is smaller; not where `norm` isn't finite."""
        if max_norm is not None and norm > max_norm and norm != float("inf"):
            torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))

    def full_state(self, module: nn.Module) -> dict[str, Tensor]:
        """Return by name the tensors of a module that a checkpoint holds: trained parameters (a tied one once) and buffers."""
        kept = module.state_dict().keys()
        state = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        state |= {name: b.detach() for name, b in module.named_buffers() if name in kept}
        return state

    @torch.no_grad()
    def load_state(self, module: nn.Module, state: dict[str, Tensor], *, place: str) -> None:
        """Copy the tensors that `full_state` returned into the module.

        Raises:
            ModelError: names, shapes or dtypes differ.
        """
        current = self.full_state(module)
        if missing := sorted(current.keys() ^ state.keys()):
            raise ModelError(
                "the checkpoint holds other tensors than the model",
                place=place,
                got=f"{missing[0]} and {len(missing) - 1} more",
            )
        for name, tensor in state.items():
            target = current[name]
            if (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
                raise ModelError(
                    f"tensor `{name}` does not fit the model",
                    place=place,
                    got=f"{tensor.dtype} {tuple(tensor.shape)} for {target.dtype} {tuple(target.shape)}",
                )
        for name, tensor in state.items():
            current[name].copy_(tensor)


def dtype_and_shape(tensor: Tensor) -> tuple[str, list[int]]:
    """Return a tensor's dtype and shape as JSON values."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


class DataParallel(Distribution):
    """Processes started by torchrun, each with the whole model and its share of every step's rows."""

    def __init__(self, device: torch.device, timeout_minutes: float) -> None:
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._timeout_minutes = timeout_minutes
        self._processes = [tuple(entry) for entry in self.gather([socket.gethostname(), os.getpid()])]
        """(host, process id) of each rank."""

    def sum(self, values: Sequence[float]) -> list[float]:
        if not values:
            return []
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def _gather_bytes(self, data: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return every process's bytes, uint8 tensors of these sizes on the run's device; `data` are this one's."""
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()], device=self.device))
        parts = self._gather_bytes(data, [int(size) for size in sizes])
        return [json.loads(part.cpu().numpy().tobytes().decode()) for part in parts]

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        # As bytes, which every backend can send, whatever the tensor's dtype is.
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        shapes = self.agreed_shapes(self.gather(dtype_and_shape(tensor)))
        parts = self._gather_bytes(data, [math.prod(shape) * tensor.element_size() for shape in shapes])
        return [
            part.view(tensor.dtype).reshape(shape).to(tensor.device) for part, shape in zip(parts, shapes, strict=True)
        ]

    def lost(self, error: BaseException) -> LostProcess | None:
        # The backends raise plain `RuntimeError`s, which only their messages tell apart.
        text = str(error)
        if isinstance(error, RLHFError) or not isinstance(error, RuntimeError) or not _CONNECTION_LOST.search(text):
            return None
        gone = self._ended_ranks()
        if gone:
            who = f"process{'es' * (len(gone) > 1)} {', '.join(map(str, gone))} of {self.world_size}"
            problem = f"{who} ended in the middle of the run"
        elif re.search("timed? ?out", text, re.IGNORECASE):
            problem = f"another of {self.world_size} processes gave no answer for {self._timeout_minutes:g} minutes"
        else:
            problem = f"the connection to another of {self.world_size} processes was lost"
        fault = LostProcess(problem, place=f"process {self.rank}")
        fault.silent = any(rank not in gone for rank in range(self.rank))
        return fault

    def _ended_ranks(self) -> list[int]:
        """Return the ranks of processes on this machine that have ended; wait up to 2 seconds for one that is about to end."""
        here, end = socket.gethostname(), time.monotonic() + 2
        while True:
            gone = [rank for rank, (host, pid) in enumerate(self._processes) if host == here and _ended(pid)]
            if gone or time.monotonic() > end:
                return gone
            time.sleep(0.05)

    def barrier(self) -> None:
        self.sum([0.0])

    @torch.no_grad()
    def same_parameters(self, module: nn.Module) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=self.device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX)
        gradients = []
        for parameter, there in zip(parameters, present.tolist(), strict=True):
            if there:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _ended(pid: int) -> bool:
    """Return whether a process of this machine has ended, zombies included."""
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _buckets(gradients: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Yield the gradients in their order, grouped into buckets of one dtype and about `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket


def create_distribution(config: DistributedConfig, devices: DeviceManager) -> Distribution:
    """Connect to the processes that torchrun started, if it started this one; return how they work together.

    Raises:
        ConfigError: another number of processes runs than the configuration asks for.
        LostProcess: not all of them connected within the time limit.
    """
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    running = int(os.environ["WORLD_SIZE"]) if launched else 1
    if config.world_size is not None and config.world_size != running:
        raise ConfigError(
            f"{config.world_size} processes were asked for",
            place="distributed.world_size",
            got=f"{running} running",
            fix=f"start with `torchrun --nproc_per_node {config.world_size} -m rlhf_core train …`",
        )
    if config.strategy == "none" and running > 1:
        raise ConfigError(
            "one process was asked for",
            place="distributed.strategy",
            got=f"`none` with {running} running",
            fix="use `ddp`",
        )
    if config.strategy == "ddp" and not launched:
        raise ConfigError(
            "data-parallel training was asked for, but torchrun didn't start this process",
            place="distributed.strategy",
            fix="start with `torchrun --nproc_per_node N -m rlhf_core train …`",
        )
    from accelerate import Accelerator, InitProcessGroupKwargs

    waiting = InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))
    try:
        accelerator = Accelerator(cpu=devices.kind == "cpu", kwargs_handlers=[waiting])
    except (RuntimeError, TimeoutError) as error:
        if running == 1:
            raise
        raise LostProcess(
            f"not all of {running} processes joined within {config.timeout_minutes:g} minutes",
            place=f"process {os.environ['RANK']}",
            got=" ".join(str(error).split())[:200],
            fix="start all of them, with one MASTER_ADDR and MASTER_PORT; `distributed.timeout_minutes` waits longer",
        ) from error
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        _leave_before_exit()
    if accelerator.num_processes != running or (dist.get_world_size() if joined else 1) != running:
        raise ConfigError(
            f"{running} processes were started",
            place="distributed",
            got=f"{accelerator.num_processes} that found each other",
        )
    return DataParallel(devices.device, config.timeout_minutes) if joined else Distribution(devices.device)


@functools.cache
def _leave_before_exit() -> None:
    """Have the process group closed when the interpreter exits, before it shuts down.

    A thread of gloo frees the tensors of the last collective operations, for which it needs the interpreter; one that is late
    would abort a process whose run has ended well.
    """

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(leave)
