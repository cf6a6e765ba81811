"""The processes of a distributed run, simulated by threads that run one at a time, so that results are deterministic."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_core.infra.seeds import RandomState
from rlhf_core.training.distribution import Distribution, dtype_and_shape

Result = TypeVar("Result")


class OutOfStep(AssertionError):
    """Raised where simulated processes make different collective calls: real ones would wait for each other for ever."""


def simulate(count: int, work: Callable[[Distribution], Result], device: torch.device | None = None) -> list[Result]:
    """Run `work` as each of several processes; return what each returns, in order of rank.

    Processes take turns: one runs until it waits for the others in a collective call. Each has its own random states, which are
    equal at the start.

    Args:
        count: number of processes.
        work: takes the process's `Distribution`.
        device: the device of every process; the CPU where None.

    Raises:
        OutOfStep: processes make different collective calls, or one makes more of them than another.
    """
    simulation = _Simulation(count)
    device = device or torch.device("cpu")
    return simulation.run([lambda rank=rank: work(_Process(simulation, rank, device)) for rank in range(count)])  # type: ignore[misc]


class _Simulation:
    """The turns of the processes, and the values that they have exchanged."""

    def __init__(self, count: int) -> None:
        self._count, self._turn = count, 0
        self._condition = threading.Condition()
        self._given: list[list[tuple[str, Any]]] = [
            [] for _ in range(count)
        ]  # by rank: kind and value of each exchange
        self._ended = [False] * count

    def run(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run one function per process in threads that take turns; return the results, or raise the first error."""
        results: list[Any] = [None] * self._count
        faults: list[BaseException] = []
        start = RandomState.capture()

        def thread(rank: int) -> None:
            with self._condition:
                self._condition.wait_for(lambda: self._turn == rank)
            start.restore()
            try:
                results[rank] = works[rank]()
            except BaseException as error:
                # The first error is the cause of others, of processes that then wait in vain.
                faults.append(error)
            finally:
                self._ended[rank] = True
                self._next_turn(rank)

        threads = [threading.Thread(target=thread, args=(rank,), daemon=True) for rank in range(self._count)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        start.restore()
        if faults:
            raise next((fault for fault in faults if not isinstance(fault, OutOfStep)), faults[0])
        return results

    def exchange(self, rank: int, kind: str, value: Any) -> list[Any]:
        """Return every process's value in this exchange, in order of rank, after waiting for all of them.

        Args:
            rank: the calling process.
            kind: name of the collective call; all processes must make the same one.
            value: the calling process's value.

        Raises:
            OutOfStep: another process has ended, or makes another collective call.
        """
        own = self._given[rank]
        number = len(own)
        own.append((kind, value))
        random = RandomState.capture()
        while any(len(given) <= number for given in self._given):
            if any(len(given) <= number and ended for given, ended in zip(self._given, self._ended, strict=True)):
                raise OutOfStep(f"process {rank} waits in a collective call that another process doesn't make")
            self._next_turn(rank)
            with self._condition:
                self._condition.wait_for(lambda: self._turn == rank)
        random.restore()
        if other := {given[number][0] for given in self._given} - {kind}:
            raise OutOfStep(f"process {rank} calls `{kind}` where another process calls `{min(other)}`")
        return [given[number][1] for given in self._given]

    def _next_turn(self, rank: int) -> None:
        """Give the turn to the next process after `rank` that hasn't ended."""
        order = [(rank + step) % self._count for step in range(1, self._count + 1)]
        with self._condition:
            self._turn = next((other for other in order if not self._ended[other]), -1)
            self._condition.notify_all()


class _Process(Distribution):
    """One of the simulated processes."""

    def __init__(self, simulation: _Simulation, rank: int, device: torch.device) -> None:
        super().__init__(device)
        self._simulation, self.rank, self.world_size = simulation, rank, simulation._count

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._simulation.exchange(self.rank, "sum", list(values)), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._simulation.exchange(self.rank, "gather", json.dumps(value))]

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        parts = self._simulation.exchange(self.rank, "gather_tensor", tensor.detach().clone())
        self.agreed_shapes([dtype_and_shape(part) for part in parts])
        return [part.clone() for part in parts]

    def barrier(self) -> None:
        self._simulation.exchange(self.rank, "barrier", None)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums over processes; a parameter without one on any process keeps none."""
        own = [None if parameter.grad is None else parameter.grad.detach().clone() for parameter in parameters]
        for parameter, parts in zip(
            parameters, zip(*self._simulation.exchange(self.rank, "sum_gradients", own), strict=True), strict=True
        ):
            there = [part for part in parts if part is not None]
            if there:
                parameter.grad = torch.stack(there).sum(dim=0)
