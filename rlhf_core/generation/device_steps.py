"""Decoding steps that need nothing from the host: what a GPU runs while the host would only wait.

Several tokens are drawn for every row before the host looks at them. Places for them are made in the cache beforehand, and from
then on the device knows everything: each drawn token is the next step's input, and where its keys and values go follows from the
row's length and its table of blocks. A step's forward pass has one shape per number of rows, rounded up, so that it can be
captured as a CUDA graph and launched at once; rows that fill a shape up write to the block that belongs to nobody.

Axes: R rows of a shape, W blocks per row, S places per block, D width of hidden states.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core.generation.block_table_attention import BlockTables, TableDecodingAttention
from rlhf_core.generation.drawn_rows import DrawnRows
from rlhf_core.generation.paged_cache import CachedSequence, PagedKVCache
from rlhf_core.infra.errors import describe_error
from rlhf_core.models.attention import MAX_KERNEL_DIFFERENCE
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.models.probe import FAILURES

log = logging.getLogger(__name__)

DEVICES = ("cuda",)
"""Types of device that decode in this way."""
STEPS = 8
"""Tokens drawn for each row before the host looks; larger waits less often, and draws more tokens behind a completion's end."""
CAPTURE_AFTER = 32
"""Steps of one shape after which it is captured: a capture takes as long as many steps."""
REPLACE_AFTER = 256
"""Steps after which it is captured although it may run in the graph of a larger shape."""
SWITCH = "RLHF_CUDA_GRAPHS"
"""Environment variable; 0 turns CUDA graphs off."""


class DeviceRow(NamedTuple):
    """A row at the beginning of a few steps."""

    token: int
    """The token that its first step reads."""
    position: int
    """That token's place in the sequence."""
    sequence: CachedSequence
    """With places appended: steps that would need more write to the block that belongs to nobody."""


@dataclass(eq=False)
class _Shape:
    """The inputs of a step for up to R rows with up to W blocks each, at addresses that stay."""

    state: Tensor
    """(3, R) long: each row's token and its position, and how many places its sequence has; 0 where a row only fills up."""
    blocks: Tensor
    """(R, W) int32, see `BlockTables`."""
    query_starts: Tensor
    """(R + 1,) int32: 0, 1, 2 …"""
    steps: int = 0
    """Steps that were run, or would have been if a larger shape hadn't been captured already."""
    replay: Callable[[], Tensor] | None = None
    """Runs the captured forward pass and returns its hidden states (R, D); None where it isn't captured."""

    def fill(self, rows: Sequence[DeviceRow]) -> None:
        """Write rows into the inputs."""
        state = np.zeros(self.state.shape, dtype=np.int64)
        blocks = np.zeros(self.blocks.shape, dtype=np.int32)
        for index, row in enumerate(rows):
            state[:, index] = row.token, row.position, row.sequence.length
            own = [view.block for view in row.sequence.views()]
            blocks[index, : len(own)] = own
        self.state.copy_(torch.from_numpy(state))
        self.blocks.copy_(torch.from_numpy(blocks))

    def feed(self, tokens: Tensor) -> None:
        """Let the tokens (r,) that were just drawn be read next."""
        self.state[0, : len(tokens)].copy_(tokens)
        self.state[1].add_(1)


class DeviceSteps:
    """Draws several tokens per row over a cache with tables of blocks, in graphs where the policy's forward pass can be captured.

    Args:
        cache: with `order="tokens"` and `fills_blocks`.
        graphs: whether to capture; the environment variable `RLHF_CUDA_GRAPHS=0` forbids it.
    """

    def __init__(self, policy: PolicyModel, cache: PagedKVCache, *, graphs: bool = True) -> None:
        self.policy, self.cache = policy, cache
        self.graphs = graphs and os.environ.get(SWITCH, "") != "0"
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._weights_at: Any = None
        self._cache_at: list[int] = []
        """Where weights and cache were when the graphs were captured."""
        self._reads_casts = False
        self._pool: Any = None

    def begin(self) -> None:
        """Forget graphs whose weights are elsewhere now, or of other adapters."""
        if self._captured and self._weights_at != _weights_at(self.policy):
            self._forget()

    def end(self) -> None:
        """Forget graphs that read what doesn't outlast the present context: copies of trained weights in autocast's dtype."""
        if self._reads_casts:
            self._forget()

    def run(
        self, rows: Sequence[DeviceRow], drawing: DrawnRows, steps: int, logits: Callable[[Tensor], Tensor]
    ) -> None:
        """Draw `steps` tokens for each row, in the order of `drawing`; nothing waits for the device.

        Rows that have ended on the way, or have no more places, are drawn for as well; `drawing` knows which tokens count.

        Args:
            logits: hidden states (r, D) → (r, V). Not in the graph: it is one product, and its result the largest of a step.
        """
        self.cache.finish_copies()
        shape = self._shape_for(rows, steps)
        shape.fill(rows)
        for _ in range(steps):
            hidden = self._hidden(shape) if shape.replay is None else shape.replay()
            shape.feed(drawing.draw(logits(hidden[: len(rows)])))

    def hidden(self, rows: Sequence[DeviceRow]) -> Tensor:
        """Return the hidden states (r, D) of each row's token, without a graph."""
        shape = self._shape(len(rows), _blocks_of(rows))
        shape.fill(rows)
        return self._hidden(shape)[: len(rows)]

    def _hidden(self, shape: _Shape) -> Tensor:
        """Return the hidden states (R, D) of one step. Running it again changes nothing."""
        token, position, room = shape.state
        size, blocks = self.cache.block_size, shape.blocks
        column = (position // size).clamp(max=blocks.shape[1] - 1)
        block = blocks.gather(1, column[:, None])[:, 0].long()
        index = torch.where(position < room, block * size + position % size, 0)
        lengths = torch.minimum(position + 1, room).clamp(min=1).int()
        tables = BlockTables.of(shape.query_starts, lengths, blocks, longest_query=1)
        most = self.policy.max_positions
        # A row that has ended at the model's last position is still drawn for.
        position = position if most is None else position.clamp(max=most - 1)
        attention = TableDecodingAttention(self.cache, index, tables)
        return self.policy.shared_forward.forward_over_cache(token, position, attention)

    # Shapes and their graphs

    @property
    def _captured(self) -> bool:
        return any(shape.replay is not None for shape in self._shapes.values())

    def _forget(self) -> None:
        self._shapes, self._pool, self._reads_casts = {}, None, False

    def _shape(self, rows: int, blocks: int) -> _Shape:
        """Return the shape for so many rows of so many blocks."""
        key = (rounded_rows(rows), 1 << (blocks - 1).bit_length())
        if key not in self._shapes:
            count, width = key
            device = self.cache.device
            self._shapes[key] = _Shape(
                state=torch.zeros(3, count, dtype=torch.long, device=device),
                blocks=torch.zeros(count, width, dtype=torch.int32, device=device),
                query_starts=torch.arange(count + 1, dtype=torch.int32, device=device),
            )
        return self._shapes[key]

    def _shape_for(self, rows: Sequence[DeviceRow], steps: int) -> _Shape:
        """Return a captured shape for some rows where there is one, or where it is time to capture it; else a plain one."""
        own = self._shape(len(rows), _blocks_of(rows))
        own.steps += steps
        if not self.graphs:
            return own
        if self._captured and self._cache_at != self._places_of_cache():
            self._forget()  # the cache has grown since
            return self._shape_for(rows, steps)
        count, width = own.blocks.shape
        usable = [
            shape
            for (more, wider), shape in self._shapes.items()
            if shape.replay is not None and count <= more <= 2 * count and wider >= width
        ]
        if own.replay is None and own.steps > (REPLACE_AFTER if usable else CAPTURE_AFTER):
            own.fill(rows)
            self._capture(own)
        return own if own.replay is not None else min(usable, key=lambda shape: shape.blocks.shape, default=own)

    def _capture(self, shape: _Shape) -> None:
        """Capture a shape's step; where that can't be, log why, once per policy, and capture nothing from then on."""
        facts = self.policy.measured(_Capturing)
        if facts.obstacle is None:
            try:
                facts.obstacle = first_wait(lambda: self._hidden(shape))
                if facts.obstacle is None:
                    self._pool = self._pool or new_pool()
                    replay = capture(lambda: self._hidden(shape), self.cache.device, self._pool)
                    facts.obstacle = self._difference(shape, replay)
                    if facts.obstacle is None:
                        return self._keep(shape, replay)
            except FAILURES as error:
                facts.obstacle = describe_error(error, lines=1)
            log.info(
                "%s: decoding steps are launched kernel by kernel, since they can't be captured as CUDA graphs: %s",
                self.policy.source,
                facts.obstacle,
            )
        self.graphs = False
        self._forget()
        return None

    def _keep(self, shape: _Shape, replay: Callable[[], Tensor]) -> None:
        """Keep a graph, and what its use depends on."""
        shape.replay = replay
        self._weights_at, self._cache_at = _weights_at(self.policy), self._places_of_cache()
        trained = any(parameter.requires_grad for parameter in self.policy.parameters())
        self._reads_casts = trained and torch.is_autocast_enabled(self.cache.device.type)

    def _difference(self, shape: _Shape, replay: Callable[[], Tensor]) -> str | None:
        """Run a graph and the step itself on other inputs than those captured; return how they differ, in words, if they do.

        The inputs are lost. Nothing that is kept is overwritten.
        """
        shape.state[:2].floor_divide_(2)
        shape.state[2] = 0
        found, expected = replay().float().clone(), self._hidden(shape).float()
        difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if not difference < MAX_KERNEL_DIFFERENCE:  # so written that NaN counts as wrong
            return f"the hidden states differ by {difference:.0e} (relative)"
        return None

    def _places_of_cache(self) -> list[int]:
        return [pool.data_ptr() for pools in self.cache.pools.values() for pool in pools]


class _Capturing:
    """Why a policy's decoding steps can't be captured; None where that isn't known."""

    def __init__(self, policy: PolicyModel) -> None:
        self.obstacle: str | None = None


def rounded_rows(rows: int) -> int:
    """Return how many rows the shape for so many has: 1, 2, 4, 8, 16, 24 … 64, then in steps of an eighth of a power of two."""
    power = 1 << (rows - 1).bit_length()
    step = max(min(8, power), power // 8)
    return -(-rows // step) * step


def _blocks_of(rows: Sequence[DeviceRow]) -> int:
    """Return the blocks of the longest row."""
    return max(-(-row.sequence.length // row.sequence.cache.block_size) for row in rows)


def _weights_at(policy: PolicyModel) -> Any:
    """Return where all weights are in memory, and which adapters are on."""
    adapters = [
        (str(getattr(module, "active_adapters", None)), bool(getattr(module, "disable_adapters", False)))
        for module in policy.modules()
        if hasattr(module, "lora_A")
    ]
    return [tensor.data_ptr() for tensor in (*policy.parameters(), *policy.buffers())], adapters


# CUDA graphs


def first_wait(step: Callable[[], Any]) -> str | None:
    """Run a step, and return where it waits for the device, which no graph can hold; None where it doesn't.

    A capture that fails leaves the process in a doubtful state, so what is known to fail isn't tried.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [f"{one.filename}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)]
    return f"the model waits for the device ({waits[0]})" if waits else None


def new_pool() -> Any:
    """Return memory that graphs share: no two run at once."""
    return torch.cuda.graph_pool_handle()


def capture(step: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """Capture a step as a CUDA graph; return what runs it and returns its result, which is overwritten by the next run."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those of rewards, may use the device meanwhile.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
