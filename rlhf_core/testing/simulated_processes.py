"""Several processes of a run inside one: each a thread, one at a time, so that what they draw and exchange is always the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_core.infra.seeds import RandomState
from rlhf_core.training.distribution import Distribution, type_and_shape

Result = TypeVar("Result")


class OutOfStep(AssertionError):
    """A process waits for others that don't come: it gathers more often than they do."""


def simulate(count: int, work: Callable[[Distribution], Result], device: torch.device | None = None) -> list[Result]:
    """Return what `work` returns as each of so many processes, in order of rank.

    Processes take turns: one runs until it waits for the others. Each has random states of its own, which begin alike.

    Raises:
        OutOfStep: one gathers more often than another.
    """
    simulation = _Simulation(count)
    device = device or torch.device("cpu")
    return simulation.run([lambda rank=rank: work(_Process(simulation, rank, device)) for rank in range(count)])  # type: ignore[misc]


class _Simulation:
    def __init__(self, count: int) -> None:
        self._count, self._turn = count, 0
        self._condition = threading.Condition()
        self._said: list[list[Any]] = [[] for _ in range(count)]
        self._ended = [False] * count

    def run(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
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
                # What went wrong first is the cause of what others then wait for in vain.
                faults.append(error)
            finally:
                self._ended[rank] = True
                self._pass_on(rank)

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
        """Return what every process says in this exchange, waiting for those that haven't yet; all must be of one kind."""
        own = self._said[rank]
        number = len(own)
        own.append((kind, value))
        random = RandomState.capture()
        while any(len(said) <= number for said in self._said):
            if any(len(said) <= number and ended for said, ended in zip(self._said, self._ended, strict=True)):
                raise OutOfStep(f"process {rank} waits for another that gathers less often")
            self._pass_on(rank)
            with self._condition:
                self._condition.wait_for(lambda: self._turn == rank)
        random.restore()
        if other := {said[number][0] for said in self._said} - {kind}:
            raise OutOfStep(f"process {rank} comes to `{kind}` where another comes to `{min(other)}`")
        return [said[number][1] for said in self._said]

    def _pass_on(self, rank: int) -> None:
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
        self.agreed_shapes([type_and_shape(part) for part in parts])
        return [part.clone() for part in parts]

    def barrier(self) -> None:
        self._simulation.exchange(self.rank, "barrier", None)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        own = [None if parameter.grad is None else parameter.grad.detach().clone() for parameter in parameters]
        for parameter, parts in zip(
            parameters, zip(*self._simulation.exchange(self.rank, "sum_gradients", own), strict=True), strict=True
        ):
            there = [part for part in parts if part is not None]
            if there:
                parameter.grad = torch.stack(there).sum(dim=0)
